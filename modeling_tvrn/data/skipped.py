"""What was left out while reading, and why: counted, with examples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

CORRUPT_IMAGE = "corrupt image"
MISSING_IMAGE = "missing image"
HUGE_IMAGE = "image over the pixel limit"
NO_IMAGE = "not an image"  # a file of another kind
UNREADABLE_FILE = "unreadable file"  # no plain file, or one that may not be read
OUTSIDE_IMAGE = "file outside the data's folder"
AMBIGUOUS_IMAGE = "image name of several files"
BAD_REGIONS = "bad region features"
BAD_NAME = "name that is not UTF-8"
EMPTY_CAPTION = "empty caption"
WORDLESS_CAPTION = "caption without a word"
BROKEN_CAPTION = "caption that is not UTF-8"
NOT_TEXT = "caption that is no text"
NO_CAPTION = "no caption left"
ID_MISMATCH = "caption ids do not match the captions"
BAD_ID = "id that is no number or text"
BAD_METADATA = "broken metadata"
OF_CAPTIONS = (EMPTY_CAPTION, WORDLESS_CAPTION, BROKEN_CAPTION, NOT_TEXT)  # counted by caption, the others by record


class Unusable(ValueError):
    """An item that cannot be used; `reason` is the heading under which it is counted, `why` says more in words."""

    def __init__(self, reason: str, detail: str, why: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.why = reason, detail, why

    def __reduce__(self) -> Any:  # workers of a data loader send it to the main process
        return type(self), (self.reason, self.detail, self.why)


class SkipReport(Mapping[str, int]):
    """A mapping reason -> how many; `examples[reason]` holds the first few cases in words.

    Images are counted by record, captions that cannot be used by caption. In a data loader every worker keeps
    a report of its own.
    """

    def __init__(self, max_examples: int = 5) -> None:
        self.max_examples = max_examples
        self.examples: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, reason: str, example: str) -> None:
        """Count one case."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < self.max_examples:
            kept.append(example)

    def after(self, former: object) -> SkipReport:
        """A report of what another one counted, and of what this one did; of this one alone where that is none."""
        report = SkipReport(self.max_examples)
        for part in (former, self):
            if isinstance(part, SkipReport):
                for reason, count in part.items():
                    report._counts[reason] = report._counts.get(reason, 0) + count
                    report.examples.setdefault(reason, []).extend(part.examples[reason])
        return report

    def clear(self) -> None:
        """Forget everything, for another pass over the same data."""
        self._counts.clear()
        self.examples.clear()

    @property
    def total(self) -> int:
        """All cases of all reasons."""
        return sum(self._counts.values())

    def warn(self, name: str) -> None:
        """Log one warning that names every reason, its count and an example; nothing where nothing was skipped."""
        if self._counts:
            logger.warning("%s: skipped %s", name, self)

    def __getitem__(self, reason: str) -> int:
        return self._counts[reason]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __str__(self) -> str:
        parts = (f"{count} x {reason} (such as {self.examples[reason][0]})" for reason, count in self._counts.items())
        return "; ".join(parts) or "nothing"

    def __repr__(self) -> str:
        return f"SkipReport({self._counts})"


def good_captions(
    image_id: int | str, captions: Sequence[Any], problems: Mapping[int, str], report: SkipReport
) -> list[int]:
    """The places of one image's captions that can be used; the others are counted."""
    for place in problems:
        report.add(WORDLESS_CAPTION, f"caption {place} of {image_id}: {problems[place]}")
    if problems and len(problems) == len(captions):
        report.add(NO_CAPTION, str(image_id))
    return [place for place in range(len(captions)) if place not in problems]
