"""How often the right one of two scored higher, with an interval."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUANTILE = 1.959964  # of the normal distribution, 97.5 %


@dataclass(frozen=True)
class Accuracy:
    """A share of comparisons.

    Attributes:
        right: How often the right one was above.
        count: Of so many, at least 1.
    """

    right: int
    count: int

    @property
    def percent(self) -> float:
        """The share."""
        return 100.0 * self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval in percent, which stays within 0 and 100 for few comparisons too."""
        share, squared = self.right / self.count, QUANTILE**2 / self.count
        centre = (share + squared / 2) / (1 + squared)
        reach = QUANTILE * math.sqrt(share * (1 - share) / self.count + squared / 4 / self.count) / (1 + squared)
        return 100.0 * (centre - reach), 100.0 * (centre + reach)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, percent."""
        return {"accuracy": self.percent, "interval": list(self.interval), "right": self.right, "count": self.count}


def accuracy_table(rows: Mapping[str, Mapping[str, Accuracy]], title: str = "") -> str:
    """A Markdown table: a row for each name, with a column and its interval for each system."""
    systems = list(next(iter(rows.values())))
    lines = [
        f"| {title} | rows |" + "".join(f" {system} | 95 % |" for system in systems),
        "|---|--:|" + "--:|---|" * len(systems),
    ]
    for name, measured in rows.items():
        cells = [(each.percent, *each.interval) for each in measured.values()]
        shown = " | ".join(f"{percent:.1f} | {low:.1f} … {high:.1f}" for percent, low, high in cells)
        lines.append(f"| {name} | {measured[systems[0]].count} | {shown} |")
    return "\n".join(lines)
