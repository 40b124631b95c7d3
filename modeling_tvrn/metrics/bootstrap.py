"""Paired bootstrap over images or queries: is one system's recall better than another's on the same gallery?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))

    def in_words(self, name: str = "rsum") -> str:
        """One difference with its interval, as `+9.6 (95 %: +8.0 … +11.2)`."""
        low, high = self.low[name], self.high[name]
        return f"{self.difference[name]:+.1f} ({100 * self.confidence:.0f} %: {low:+.1f} … {high:+.1f})"

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
    caption_image_rows: Sequence[int] | np.ndarray | None = None,
) -> BootstrapComparison:
    """Resample the gallery, the same for both systems, and look at the difference of their recalls.

    With `caption_image_rows` images are drawn, each with its captions, whose ranks are not independent of one another.
    Without, images and captions are drawn as queries of their own direction, which makes intervals somewhat narrow.

    Args:
        system: Metrics of one system.
        baseline: Metrics of the other, on the same gallery in the same order.
        resamples: Draws.
        confidence: Of the interval, in (0, 1).
        seed: Of the draws.
        caption_image_rows: (T,) row of each caption's image.

    Raises:
        ValueError: If the two were measured on galleries of different sizes, or a setting is out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples is {resamples}, confidence {confidence}; expected at least 1, and a share in (0, 1)."
        )
    gains: dict[str, np.ndarray] = {}
    for way in ("image_to_text", "text_to_image"):
        ranks, other = getattr(system, f"{way}_ranks"), getattr(baseline, f"{way}_ranks")
        if len(ranks) != len(other):
            raise ValueError(
                f"The systems have {len(ranks)} and {len(other)} {way} queries; expected the same gallery in the same"
                " order."
            )
        gains[way] = np.stack([(ranks <= k).astype(np.int64) - (other <= k) for k in RECALL_AT], axis=1)
    generator = np.random.default_rng(seed)
    if caption_image_rows is None:
        means = [_resampled_means(values, resamples, generator) for values in gains.values()]
    else:
        rows = np.asarray(caption_image_rows)
        means = _means_by_image(gains["image_to_text"], gains["text_to_image"], rows, resamples, generator)
    names = [f"{way}_R@{k}" for way in gains for k in RECALL_AT]
    observed = np.concatenate([100.0 * values.mean(axis=0) for values in gains.values()])
    difference = dict(zip(names, observed, strict=True))
    difference["rsum"] = sum(difference.values())
    drawn = dict(zip(names, np.concatenate(means, axis=1).T, strict=True))
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


def _resampled_means(gains: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    # Queries with the same outcomes are interchangeable, so drawing how often each of the at most 27 outcomes
    # occurs is the bootstrap itself, at a cost that does not depend on the number of queries.
    outcomes, counts = np.unique(gains, axis=0, return_counts=True)
    draws = generator.multinomial(len(gains), counts / len(gains), size=resamples)
    return 100.0 * (draws @ outcomes) / len(gains)


def _means_by_image(
    by_image: np.ndarray, by_caption: np.ndarray, rows: np.ndarray, resamples: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Means over drawn images, (resamples, K), and over all captions of these; percent."""
    images = len(by_image)
    if rows.shape != (len(by_caption),) or rows.min() < 0 or rows.max() >= images:
        raise ValueError(
            f"caption_image_rows has shape {rows.shape}, rows {rows.min()} to {rows.max()}; expected the image of "
            f"each of the {len(by_caption)} captions, from 0 to {images - 1}."
        )
    of_image = np.zeros((images, by_caption.shape[1] + 1))
    np.add.at(of_image, rows, np.column_stack([by_caption, np.ones(len(rows))]))
    means: list[np.ndarray] = []
    for _ in range(resamples):
        times = np.bincount(generator.integers(images, size=images), minlength=images)
        *sums, captions = times @ of_image
        means.append(np.concatenate([times @ by_image / images, np.divide(sums, captions)]))
    return [100.0 * np.stack(means)]


def _p_value(values: np.ndarray) -> float:
    # The observed sample counts as one draw on either side: no finite number of draws gives a p-value of 0.
    below, above = int(np.sum(values <= 0)) + 1, int(np.sum(values >= 0)) + 1
    return min(1.0, 2 * min(below, above) / (len(values) + 1))
