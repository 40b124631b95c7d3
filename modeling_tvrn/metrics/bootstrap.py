"""Paired bootstrap over queries: is one system's recall better than another's on the same gallery?"""

from dataclasses import dataclass

import numpy as np

from .retrieval import RECALL_AT, RetrievalMetrics


@dataclass(frozen=True)
class BootstrapComparison:
    """System minus baseline, by the names of `RetrievalMetrics.as_dict`, in percent points.

    Attributes:
        difference: The observed difference.
        low: Lower end of its confidence interval.
        high: Upper end.
        p_value: Two-sided: twice the share of resamples on the other side of zero.
        confidence: Of the interval, such as 0.95.
        resamples: How many resamples were drawn.
    """

    difference: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    p_value: dict[str, float]
    confidence: float
    resamples: int

    def table(self) -> str:
        """A Markdown table, one row per recall and one for rSum."""
        lines = [f"| system − baseline | difference | {self.confidence:.0%} interval | p |", "|---|--:|--:|--:|"]
        for name, value in self.difference.items():
            interval = f"{self.low[name]:+.2f} … {self.high[name]:+.2f}"
            lines.append(f"| {name} | {value:+.2f} | {interval} | {self.p_value[name]:.4f} |")
        return "\n".join(lines)


def paired_bootstrap(
    system: RetrievalMetrics,
    baseline: RetrievalMetrics,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapComparison:
    """Resample the queries, the same for both systems, and look at the difference of their recalls.

    Images and captions are resampled as queries of their own direction; captions of one image are treated as
    independent, so intervals are somewhat narrow where an image has several.

    Args:
        system: Metrics of one system.
        baseline: Metrics of the other, on the same gallery in the same order.
        resamples: Draws.
        confidence: Of the interval, in (0, 1).
        seed: Of the draws.

    Raises:
        ValueError: If the two were measured on galleries of different sizes, or a setting is out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples is {resamples}, confidence {confidence}; expected at least 1, and a share in (0, 1)."
        )
    generator = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray] = {}
    difference: dict[str, float] = {}
    for way in ("image_to_text", "text_to_image"):
        ranks, other = getattr(system, f"{way}_ranks"), getattr(baseline, f"{way}_ranks")
        if len(ranks) != len(other):
            raise ValueError(
                f"The systems have {len(ranks)} and {len(other)} {way} queries; expected the same gallery in the same"
                " order."
            )
        names = [f"{way}_R@{k}" for k in RECALL_AT]
        gains = _gains(ranks, other)
        difference |= dict(zip(names, 100.0 * gains.mean(axis=0), strict=True))
        drawn |= dict(zip(names, _resampled_means(gains, resamples, generator).T, strict=True))
    difference["rsum"] = sum(difference.values())
    drawn["rsum"] = np.sum(list(drawn.values()), axis=0)
    tail = (1 - confidence) / 2
    return BootstrapComparison(
        difference={name: float(value) for name, value in difference.items()},
        low={name: float(np.quantile(values, tail)) for name, values in drawn.items()},
        high={name: float(np.quantile(values, 1 - tail)) for name, values in drawn.items()},
        p_value={name: _p_value(values) for name, values in drawn.items()},
        confidence=confidence,
        resamples=resamples,
    )


def _gains(ranks: np.ndarray, other: np.ndarray) -> np.ndarray:
    columns = [(ranks <= k).astype(np.int64) - (other <= k) for k in RECALL_AT]
    return np.stack(columns, axis=1)


def _resampled_means(gains: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    # Queries with the same outcomes are interchangeable, so drawing how often each of the at most 27 outcomes
    # occurs is the bootstrap itself, at a cost that does not depend on the number of queries.
    outcomes, counts = np.unique(gains, axis=0, return_counts=True)
    draws = generator.multinomial(len(gains), counts / len(gains), size=resamples)
    return 100.0 * (draws @ outcomes) / len(gains)


def _p_value(values: np.ndarray) -> float:
    # The observed sample counts as one draw on either side: no finite number of draws gives a p-value of 0.
    below, above = int(np.sum(values <= 0)) + 1, int(np.sum(values >= 0)) + 1
    return min(1.0, 2 * min(below, above) / (len(values) + 1))
