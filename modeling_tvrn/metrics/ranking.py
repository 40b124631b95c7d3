"""Exact ranks of the first positive, counted block by block without the score matrix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Reduction = Callable[[Tensor], Tensor]


@dataclass
class Ranks:
    """What counting leaves of one gallery.

    Attributes:
        image_to_text: (I,) 1-based rank of each image's best caption.
        text_to_image: (T,) 1-based rank of each caption's best image; of captions without an image there is none.
        ties: Negatives that score exactly as much as the positive they are compared with, both directions.
        image_to_text_unscored: Images none of whose captions was scored (every positive −inf).
        text_to_image_unscored: Captions none of whose images was scored.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray
    ties: int = 0
    image_to_text_unscored: int = 0
    text_to_image_unscored: int = 0


def positive_pairs(
    image_count: int,
    caption_count: int,
    caption_image_rows: Sequence[int] | np.ndarray | Tensor | None = None,
    positives: Sequence[Sequence[int]] | np.ndarray | Tensor | None = None,
    distractors: bool = False,
) -> np.ndarray:
    """The (image row, caption) pairs that count as right, checked, sorted and without repeats.

    Args:
        image_count: Number of images I.
        caption_count: Number of captions T.
        caption_image_rows: (T,) the row of each caption's image.
        positives: (n, 2) pairs (image row, caption), instead, where a caption has several images.
        distractors: Whether captions may have no image.

    Returns:
        (n, 2) int64, by image, then by caption.

    Raises:
        ValueError: If a row is outside the gallery, or an image or (without `distractors`) a caption has no positive.
    """
    if (caption_image_rows is None) == (positives is None):
        raise ValueError("Give either caption_image_rows (T,) or positives (n, 2), and not both.")
    if image_count < 1 or caption_count < 1:
        raise ValueError(
            f"The gallery has {image_count} images, {caption_count} captions; expected at least 1 of each."
        )
    if positives is None:
        rows = _integers("caption_image_rows", caption_image_rows)
        if rows.shape != (caption_count,):
            raise ValueError(
                f"caption_image_rows has shape {rows.shape}; expected ({caption_count},), one image row per caption."
                " The scores' rows are images and their columns captions: a matrix the other way needs a transpose."
            )
        pairs = np.stack([rows, np.arange(caption_count)], axis=1)
    else:
        pairs = _integers("positives", positives)
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"positives has shape {pairs.shape}; expected (n, 2): pairs of (image row, caption).")
    _check_cover(pairs[:, 0], image_count, "image")
    _check_cover(pairs[:, 1], caption_count, "caption", distractors)
    return np.unique(pairs, axis=0)


def _integers(name: str, values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {array.dtype}; expected integers: row numbers, not ids.")
    return array.astype(np.int64)


def _check_cover(rows: np.ndarray, count: int, what: str, may_miss: bool = False) -> None:
    outside = np.flatnonzero((rows < 0) | (rows >= count))
    if outside.size:
        raise ValueError(
            f"Entry {outside[0]} names {what} {rows[outside[0]]}; expected 0 to {count - 1} for {count} {what}s"
            f" ({outside.size} such entries)."
        )
    missing = np.flatnonzero(np.bincount(rows, minlength=count) == 0)
    if missing.size and not may_miss:
        other = "caption" if what == "image" else "image"
        raise ValueError(
            f"{missing.size} of {count} {what}s have no {other} (the first is {what} {missing[0]});"
            " such a query has no right answer: leave them out of the gallery."
        )


class RankCounter:
    """Counts, block by block, the candidates that come before each query's best positive.

    The rank of a query is 1 + the number of negatives that score at least its best positive: ties count against the
    query, so that a collapsed model scores chance and not 100. Another positive never counts against it. A score of
    −inf means unscored; a query whose positives are all unscored comes after every negative. First give every block
    that holds a positive to `add_positives`, then every block to `add`: memory is O(block), whatever the gallery,
    and the result does not depend on how the matrix was cut, nor on the order of the blocks.

    Args:
        image_count: Number of images I.
        caption_count: Number of captions T.
        pairs: (n, 2) positives, as `positive_pairs` returns them.
    """

    def __init__(self, image_count: int, caption_count: int, pairs: np.ndarray):
        self.image_count, self.caption_count, self.pairs = image_count, caption_count, pairs
        self._starts = np.searchsorted(pairs[:, 0], np.arange(image_count + 1))
        self._column_of = np.full(caption_count, -1, dtype=np.int64)
        self._positives_seen = self._pairs_counted = 0
        self._image_best: Tensor | None = None
        self._caption_best: Tensor | None = None
        self._image_above = torch.zeros(image_count, dtype=torch.int64)
        self._caption_above = torch.zeros(caption_count, dtype=torch.int64)
        self._ties = 0
        self._any_dtype = False

    def add_positives(self, scores: Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
        """Read the positives' scores of one block.

        Args:
            scores: (r, c) scores of images `rows` with captions `columns`.
            rows: (r,) image rows.
            columns: (c,) caption numbers.
        """
        image_best, caption_best = self._best(scores)
        mask = self._positive_mask(scores, rows, columns)
        only = scores.masked_fill(~mask, -torch.inf)
        image_best[rows] = torch.maximum(image_best[rows], only.amax(dim=1))
        caption_best[columns] = torch.maximum(caption_best[columns], only.amax(dim=0))
        self._positives_seen += int(mask.sum())

    def add(self, scores: Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
        """Count one block's candidates; every positive must have been seen before. Arguments as `add_positives`.

        Raises:
            ValueError: If a score is NaN or +inf, or positives are missing.
        """
        if self._positives_seen != len(self.pairs):
            raise ValueError(
                f"{self._positives_seen} positive pairs were given to add_positives before the first add; expected"
                f" each of {len(self.pairs)} exactly once."
            )
        check_scores(scores, rows, columns)
        negative = ~self._positive_mask(scores, rows, columns)
        image_best, caption_best = self._best(scores)
        for best, index, above, dim in (
            (image_best[rows][:, None], rows, self._image_above, 1),
            (caption_best[columns][None, :], columns, self._caption_above, 0),
        ):
            above[index] += ((scores >= best) & negative).sum(dim=dim).to(above.device)
            self._ties += int(((scores == best) & negative & (best > -torch.inf)).sum())
        self._pairs_counted += scores.numel()

    def share_positives(self, largest: Reduction, total: Reduction) -> None:
        """Between the last `add_positives` and the first `add`, where several processes count parts of one matrix.

        Args:
            largest: A tensor of this process -> its maximum over all processes, element by element.
            total: The same for the sum.
        """
        for name, count in (("_image_best", self.image_count), ("_caption_best", self.caption_count)):
            own = getattr(self, name)
            # float64 holds every other float exactly, and a process without positives knows no dtype of scores yet.
            wide = torch.full((count,), -torch.inf, dtype=torch.float64) if own is None else own.double()
            setattr(self, name, largest(wide).to(wide if own is None else own))
            self._any_dtype = own is None
        self._positives_seen = int(total(torch.tensor([self._positives_seen]))[0])

    def share_counts(self, total: Reduction) -> None:
        """After the last `add`: every process then has the ranks of the whole matrix. Argument as above."""
        self._image_above, self._caption_above = total(self._image_above), total(self._caption_above)
        sums = total(torch.tensor([self._ties, self._pairs_counted]))
        self._ties, self._pairs_counted = int(sums[0]), int(sums[1])

    def ranks(self) -> Ranks:
        """The ranks, once every pair has been counted; captions without an image are candidates and no queries.

        Raises:
            ValueError: If the blocks given to `add` do not make up the matrix.
        """
        expected = self.image_count * self.caption_count
        if self._pairs_counted != expected or self._image_best is None or self._caption_best is None:
            raise ValueError(
                f"{self._pairs_counted} pairs were counted; expected {expected}"
                f" ({self.image_count} images × {self.caption_count} captions), each exactly once."
            )
        queries = np.unique(self.pairs[:, 1])
        return Ranks(
            image_to_text=self._image_above.numpy() + 1,
            text_to_image=self._caption_above.numpy()[queries] + 1,
            ties=self._ties,
            image_to_text_unscored=int((self._image_best == -torch.inf).sum()),
            text_to_image_unscored=int((self._caption_best[queries] == -torch.inf).sum()),
        )

    def _best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        # In the scores' own dtype: a conversion could make two different scores a tie, or part a tie.
        if self._image_best is None or self._caption_best is None:
            self._image_best = scores.new_full((self.image_count,), -torch.inf)
            self._caption_best = scores.new_full((self.caption_count,), -torch.inf)
        if self._any_dtype:
            self._image_best, self._caption_best = self._image_best.to(scores), self._caption_best.to(scores)
            self._any_dtype = False
        if scores.dtype != self._image_best.dtype:
            raise ValueError(f"A block has dtype {scores.dtype}; expected the first one's, {self._image_best.dtype}.")
        return self._image_best, self._caption_best

    def _positive_mask(self, scores: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        if tuple(scores.shape) != (len(rows), len(columns)):
            raise ValueError(f"A block has shape {tuple(scores.shape)}; expected ({len(rows)}, {len(columns)}).")
        starts, counts = self._starts[rows], self._starts[rows + 1] - self._starts[rows]
        local_rows = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._column_of[columns] = np.arange(len(columns))
        local_columns = self._column_of[self.pairs[np.repeat(starts, counts) + within, 1]]
        self._column_of[columns] = -1
        inside = local_columns >= 0
        mask = np.zeros((len(rows), len(columns)), dtype=bool)
        mask[local_rows[inside], local_columns[inside]] = True
        return torch.from_numpy(mask).to(scores.device)


def check_scores(scores: Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
    """Refuse NaN and +inf, naming the first pair; −inf means unscored and is kept."""
    wrong = scores.isnan() | (scores == torch.inf)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"The score of image {rows[row]} and caption {columns[column]} is {scores[row, column].item()}"
            f" ({int(wrong.sum())} such in this block); expected finite scores, or -inf for a pair left unscored."
            " Look for an overflow or a NaN in the model's inputs."
        )


def shortlist_ranks(scores: Tensor, is_positive: Tensor, candidate_count: int, positive_counts: Tensor) -> Ranks:
    """Ranks of one direction's queries when only a shortlist of candidates was scored.

    Args:
        scores: (Q, K) scores of each query's shortlist.
        is_positive: (Q, K) bool.
        candidate_count: Size of the whole gallery.
        positive_counts: (Q,) positives of each query in the whole gallery.

    Returns:
        `Ranks` with this direction's ranks in both fields; a query whose shortlist holds no positive comes after every
        negative of the gallery, as with −inf in the whole matrix.
    """
    best = scores.masked_fill(~is_positive, -torch.inf).amax(dim=1, keepdim=True)
    unscored = (best == -torch.inf).squeeze(1)
    above = ((scores >= best) & ~is_positive).sum(dim=1)
    ranks = torch.where(unscored, candidate_count - positive_counts, above).cpu().numpy() + 1
    ties = int(((scores == best) & ~is_positive & (best > -torch.inf)).sum())
    return Ranks(ranks, ranks, ties, int(unscored.sum()), int(unscored.sum()))
