"""R@K, rSum, median and mean rank of image–text retrieval, from ranks; the same by chance. All recalls in percent."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .ranking import RankCounter, Ranks, positive_pairs

Metrics = TypeVar("Metrics", bound="RetrievalMetrics")

RECALL_AT = (1, 5, 10)
_BLOCK_ELEMENTS = 1 << 22  # scores looked at together: bounds the temporaries, not the result


@dataclass(frozen=True)
class Recalls:
    """R@1, R@5 and R@10 both ways, in percent.

    Attributes:
        image_to_text: K → share of images with any of their captions among the first K.
        text_to_image: K → share of captions with any of their images among the first K.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def rsum(self) -> float:
        """The six recalls summed, in percent: 600 is perfect."""
        return sum(self.image_to_text.values()) + sum(self.text_to_image.values())

    def as_dict(self) -> dict[str, float]:
        """Flat names, such as `image_to_text_R@1`, and `rsum`."""
        named = {f"image_to_text_R@{k}": value for k, value in self.image_to_text.items()}
        named |= {f"text_to_image_R@{k}": value for k, value in self.text_to_image.items()}
        return named | {"rsum": self.rsum}


@dataclass(frozen=True)
class RetrievalMetrics(Recalls):
    """Retrieval of one gallery; ranks are 1-based and ties count against the query.

    Attributes:
        image_to_text_median_rank: Median rank of an image's first right caption (the field's code floors it).
        image_to_text_mean_rank: Mean of the same.
        text_to_image_median_rank: Median rank of a caption's first right image.
        text_to_image_mean_rank: Mean of the same.
        ties: Negatives that score exactly as much as the positive they are compared with, both directions.
        image_to_text_unscored: Images none of whose captions was scored.
        text_to_image_unscored: Captions none of whose images was scored.
        image_to_text_ranks: (I,) the ranks themselves, for a paired bootstrap.
        text_to_image_ranks: (T,) the same for captions.
    """

    image_to_text_median_rank: float
    image_to_text_mean_rank: float
    text_to_image_median_rank: float
    text_to_image_mean_rank: float
    ties: int
    image_to_text_unscored: int
    text_to_image_unscored: int
    image_to_text_ranks: np.ndarray = field(repr=False, compare=False)
    text_to_image_ranks: np.ndarray = field(repr=False, compare=False)

    @property
    def image_count(self) -> int:
        """Number of images queried with."""
        return len(self.image_to_text_ranks)

    @property
    def caption_count(self) -> int:
        """Number of captions queried with."""
        return len(self.text_to_image_ranks)

    @classmethod
    def from_ranks(cls: type[Metrics], ranks: Ranks, **more: Any) -> Metrics:
        """The metrics of 1-based ranks of each query's best positive; `more` are fields of a subclass."""
        return cls(
            image_to_text=_recalls(ranks.image_to_text),
            text_to_image=_recalls(ranks.text_to_image),
            image_to_text_median_rank=float(np.median(ranks.image_to_text)),
            image_to_text_mean_rank=float(np.mean(ranks.image_to_text)),
            text_to_image_median_rank=float(np.median(ranks.text_to_image)),
            text_to_image_mean_rank=float(np.mean(ranks.text_to_image)),
            ties=ranks.ties,
            image_to_text_unscored=ranks.image_to_text_unscored,
            text_to_image_unscored=ranks.text_to_image_unscored,
            image_to_text_ranks=ranks.image_to_text,
            text_to_image_ranks=ranks.text_to_image,
            **more,
        )

    def as_dict(self) -> dict[str, float]:
        """Flat names: recalls in percent, `rsum`, median and mean ranks, `ties`, counts of queries and of unscored."""
        named = super().as_dict()
        for name in ("image_to_text", "text_to_image"):
            for statistic in ("median_rank", "mean_rank", "unscored"):
                named[f"{name}_{statistic}"] = getattr(self, f"{name}_{statistic}")
        return named | {"ties": self.ties, "image_count": self.image_count, "caption_count": self.caption_count}


def retrieval_metrics(
    score_matrix: np.ndarray | Tensor,
    caption_image_rows: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    positives: Sequence[Sequence[int]] | np.ndarray | Tensor | None = None,
    distractors: bool = False,
) -> RetrievalMetrics:
    """R@K of this field both ways, in percent: a query is a hit if *any* of its positives is among the first K.

    A query's rank is 1 + the negatives that score at least its best positive, so ties count against it. −inf is an
    unscored pair. (Not torchmetrics' recall, which divides by the number of positives.)

    Args:
        score_matrix: (I, T) scores, rows are images; any float dtype, compared as given.
        caption_image_rows: (T,) row of each caption's image; any number of captions per image.
        positives: (n, 2) (image row, caption) pairs instead, where a caption has several images.
        distractors: whether captions may have no image: they stand among every image's candidates and are no queries.

    Returns:
        `RetrievalMetrics`.

    Raises:
        ValueError: On NaN or +inf, another shape, rows outside the gallery, an image without captions or (unless
            `distractors`) a caption without an image.

    >>> m = retrieval_metrics([[0.9, 0.1, 0.2], [0.3, 0.8, 0.8]], [0, 1, 0])
    >>> m.image_to_text[1], round(m.text_to_image[1], 1), m.ties
    (50.0, 66.7, 1)
    """
    scores = score_matrix.detach() if isinstance(score_matrix, Tensor) else np.asarray(score_matrix)
    if scores.ndim != 2:
        raise ValueError(f"score_matrix has shape {tuple(scores.shape)}; expected (images, captions).")
    image_count, caption_count = scores.shape
    pairs = positive_pairs(image_count, caption_count, caption_image_rows, positives, distractors)
    counter = RankCounter(image_count, caption_count, pairs)
    step = max(1, _BLOCK_ELEMENTS // caption_count)
    columns = np.arange(caption_count)
    for add in (counter.add_positives, counter.add):
        for start in range(0, image_count, step):
            rows = np.arange(start, min(start + step, image_count))
            add(_as_float_tensor(scores[start : start + step]), rows, columns)
    return RetrievalMetrics.from_ranks(counter.ranks())


def mean_metrics(parts: Sequence[RetrievalMetrics]) -> RetrievalMetrics:
    """The mean of several galleries' metrics (COCO 1K's folds): recalls and ranks averaged, ties and unscored summed.

    Raises:
        ValueError: If there are no parts.
    """
    if not parts:
        raise ValueError("mean_metrics got no parts; expected the metrics of at least one gallery.")
    values: dict[str, object] = {}
    for name in (item.name for item in dataclasses.fields(RetrievalMetrics)):
        column = [getattr(part, name) for part in parts]
        if isinstance(column[0], dict):
            values[name] = {k: float(np.mean([each[k] for each in column])) for k in column[0]}
        elif name.endswith("_ranks"):
            values[name] = np.concatenate(column)
        elif name.endswith("_rank"):
            values[name] = float(np.mean(column))
        else:
            values[name] = sum(column)
    return RetrievalMetrics(**values)  # type: ignore[arg-type]


def chance_level(
    image_count: int,
    caption_count: int,
    caption_image_rows: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    positives: Sequence[Sequence[int]] | np.ndarray | Tensor | None = None,
) -> Recalls:
    """The recalls a random order is expected to reach, exactly: R@K = 1 − C(N−p, K) / C(N, K) for p positives of N.

    Args:
        image_count: Number of images I.
        caption_count: Number of captions T.
        caption_image_rows: (T,) row of each caption's image; or `positives` (n, 2), as for `retrieval_metrics`.
        positives: See above.

    Raises:
        ValueError: As `retrieval_metrics`.
    """
    pairs = positive_pairs(image_count, caption_count, caption_image_rows, positives)
    return Recalls(
        image_to_text=_chance(np.bincount(pairs[:, 0], minlength=image_count), caption_count),
        text_to_image=_chance(np.bincount(pairs[:, 1], minlength=caption_count), image_count),
    )


def recall_table(systems: Mapping[str, Recalls], title: str = "") -> str:
    """A Markdown table of R@K and rSum, in percent, one row per system."""
    heads = [f"{way}R@{k}" for way in ("image→text ", "text→image ") for k in RECALL_AT]
    # The direction stands once: a table of seven wide columns does not fit a terminal.
    heads = [head if head.endswith("@1") else f" {head.split()[1]:>4}" for head in heads] + [" rSum"]
    width = max([len(title), *map(len, systems)])
    lines = [f"| {title:<{width}} | " + " | ".join(heads) + " |", "|" + "-" * (width + 2) + "|"]
    lines[1] += "|".join("-" * (len(head) + 1) + ":" for head in heads) + "|"
    for name, recalls in systems.items():
        values = [getattr(recalls, way)[k] for way in ("image_to_text", "text_to_image") for k in RECALL_AT]
        cells = [f"{value:{len(head)}.1f}" for value, head in zip([*values, recalls.rsum], heads, strict=True)]
        lines.append(f"| {name:<{width}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _recalls(ranks: np.ndarray) -> dict[int, float]:
    return {k: 100.0 * float(np.mean(ranks <= k)) for k in RECALL_AT}


def _chance(positive_counts: np.ndarray, candidate_count: int) -> dict[int, float]:
    missed = np.ones(len(positive_counts))
    chance = {}
    for drawn in range(max(RECALL_AT)):
        left = max(candidate_count - drawn, 1)
        missed = missed * np.clip(left - positive_counts, 0, None) / left
        if drawn + 1 in RECALL_AT:
            chance[drawn + 1] = 100.0 * float(np.mean(1 - missed))
    return chance


def _as_float_tensor(block: np.ndarray | Tensor) -> Tensor:
    if isinstance(block, Tensor):
        return block if block.is_floating_point() else block.double()
    if block.dtype.kind not in "fiub":
        raise ValueError(f"score_matrix has dtype {block.dtype}; expected real numbers.")
    # A copy per block: PyTorch knows neither read-only memory nor negative strides nor foreign byte orders.
    known = block.dtype.kind == "f" and block.dtype.itemsize <= 8
    return torch.from_numpy(np.array(block, dtype=block.dtype.newbyteorder("=") if known else np.float64, order="C"))
