"""What the doctor found, as a table for people and as JSON for scripts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Check", "DoctorReport"]

Status = Literal["ok", "warning", "failed", "not run"]
SHOWN = {"ok": "ok", "warning": "warning", "failed": "FAILED", "not run": "not run"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what it was.
        status: "ok", "warning" (works, but should be better), "failed", or "not run".
        detail: what was seen.
        advice: what to do about it; empty where nothing has to be done.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass
class DoctorReport:
    """The result of `doctor`; `str(report)` is a table.

    Attributes:
        model: folder, Hub id, or "model in memory".
        checks: in the order in which they were made.
        revision: the commit that was looked at, for a Hub id.
    """

    model: str
    checks: list[Check] = field(default_factory=list)
    revision: str | None = None

    @property
    def ok(self) -> bool:
        """Nothing failed. Whether everything was looked at says `complete`."""
        return not self.failed

    @property
    def complete(self) -> bool:
        """Every check was run."""
        return all(check.status != "not run" for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are {[check.name for check in self.checks]}")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        summary = {"model": self.model, "revision": self.revision, "ok": self.ok, "complete": self.complete}
        return summary | {"checks": [asdict(check) for check in self.checks]}

    def to_json(self) -> str:
        """`as_dict` as a JSON document."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [self.model + (f" at {self.revision}" if self.revision else ""), ""]
        lines += [f"{check.name:<{width}}  {SHOWN[check.status]:<7}  {check.detail}" for check in self.checks]
        advice = [f"- {check.name}: {check.advice}" for check in self.checks if check.advice and check.status != "ok"]
        if advice:
            lines += ["", "What to do:", *advice]
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        """One sentence."""
        if self.failed:
            return f"Does not hold: {', '.join(check.name for check in self.failed)}."
        unseen = [check.name for check in self.checks if check.status == "not run"]
        return "Everything holds." if not unseen else f"Nothing failed, but these were not run: {', '.join(unseen)}."
