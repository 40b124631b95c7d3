"""The score matrix, and exact ranks without it: block by block, no pair scored twice, memory of a few blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..metrics import RankCounter, RetrievalMetrics, positive_pairs
from .models import Gallery, PairModel, evaluating, match

BLOCK_IMAGES, BLOCK_CAPTIONS = 256, 512  # scores held at once; what they cost to compute is bounded by chunk_size
KEPT_SCORES = 1 << 26  # scores of positives' blocks that are kept for the second pass; the rest is scored again


def score_matrix(
    model: PairModel, images: Gallery, texts: Gallery, chunk_size: int | None = None, progress: bool = True
) -> Tensor:
    """All pair scores, (I, T); rows are images.

    Args:
        model: With `match`; see `average` for several.
        images: I encoded images.
        texts: T encoded texts.
        chunk_size: Pairs scored at a time (default: the model's own); bounds memory, does not change scores.
        progress: Show a progress bar with the time left, if it takes longer than a moment.

    Raises:
        ValueError: If a side is empty or `chunk_size` is below 1.
    """
    check_galleries(images, texts, chunk_size)
    matrix: Tensor | None = None
    with evaluating(model), pair_bar(len(images) * len(texts), progress) as bar:
        for rows in _blocks(np.arange(len(images)), BLOCK_IMAGES):
            block_images = images.select(torch.from_numpy(rows))
            for columns in _blocks(np.arange(len(texts)), BLOCK_CAPTIONS):
                scores = match(model, block_images, texts.select(torch.from_numpy(columns)), chunk_size)
                if matrix is None:
                    matrix = scores.new_empty((len(images), len(texts)))
                matrix[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = scores
                bar.update(scores.numel())
    assert matrix is not None
    return matrix


def rank(
    model: PairModel,
    images: Gallery,
    texts: Gallery,
    caption_image_rows: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    positives: Sequence[Sequence[int]] | np.ndarray | Tensor | None = None,
    chunk_size: int | None = None,
    progress: bool = True,
) -> RetrievalMetrics:
    """`retrieval_metrics(score_matrix(...))` without the matrix: memory is O(block), never images × captions.

    The blocks that hold positives are scored first, then the others; each pair is scored once. (Only where positives
    are spread over more than 64 million pairs' blocks, as `positives` may be, are some scored a second time.)

    Args:
        model: With `match`; see `average` for several.
        images: I encoded images.
        texts: T encoded texts.
        caption_image_rows: (T,) row of each caption's image, in any order.
        positives: (n, 2) (image row, caption) pairs instead, where a caption has several images.
        chunk_size: Pairs scored at a time (default: the model's own); bounds memory, does not change the result.
        progress: Show a progress bar with the time left, if it takes longer than a moment.

    Raises:
        ValueError: As `score_matrix` and `retrieval_metrics`.
    """
    check_galleries(images, texts, chunk_size)
    pairs = positive_pairs(len(images), len(texts), caption_image_rows, positives)
    counter = RankCounter(len(images), len(texts), pairs)
    with evaluating(model), pair_bar(len(images) * len(texts), progress) as bar:
        _RankedBlocks(model, images, texts, pairs, chunk_size, bar).count(counter)
    return RetrievalMetrics.from_ranks(counter.ranks())


class _RankedBlocks:
    """The matrix cut into blocks, with captions ordered by their image so that few blocks hold positives."""

    def __init__(
        self, model: PairModel, images: Gallery, texts: Gallery, pairs: np.ndarray, chunk_size: int | None, bar: tqdm
    ):
        self.model, self.images, self.texts, self.chunk_size, self.bar = model, images, texts, chunk_size, bar
        first_image = np.full(len(texts), len(images))
        np.minimum.at(first_image, pairs[:, 1], pairs[:, 0])
        order = np.argsort(first_image, kind="stable")
        self.rows = _blocks(np.arange(len(images)), BLOCK_IMAGES)
        self.columns = _blocks(order, BLOCK_CAPTIONS)
        place = np.empty(len(texts), dtype=np.int64)
        place[order] = np.arange(len(texts))
        blocks = np.stack([pairs[:, 0] // BLOCK_IMAGES, place[pairs[:, 1]] // BLOCK_CAPTIONS], axis=1)
        self.with_positives: list[tuple[int, int]] = [(i, j) for i, j in np.unique(blocks, axis=0).tolist()]

    def count(self, counter: RankCounter) -> None:
        """Both passes."""
        kept: dict[tuple[int, int], Tensor] = {}
        room = KEPT_SCORES
        for i, j in self.with_positives:
            scores = self.score(i, j)
            counter.add_positives(scores, self.rows[i], self.columns[j])
            if scores.numel() <= room:
                kept[i, j], room = scores, room - scores.numel()
                self.bar.update(scores.numel())
        for i, rows in enumerate(self.rows):
            for j, columns in enumerate(self.columns):
                if (i, j) in kept:
                    scores = kept.pop((i, j))
                else:
                    scores = self.score(i, j)
                    self.bar.update(scores.numel())
                counter.add(scores, rows, columns)

    def score(self, i: int, j: int) -> Tensor:
        """The scores of one block."""
        images = self.images.select(torch.from_numpy(self.rows[i]))
        texts = self.texts.select(torch.from_numpy(self.columns[j]))
        return match(self.model, images, texts, self.chunk_size)


def _blocks(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def check_galleries(images: Gallery, texts: Gallery, chunk_size: int | None) -> None:
    if not len(images) or not len(texts):
        raise ValueError(
            f"There are {len(images)} images and {len(texts)} texts to score; expected at least 1 of each."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1 pair, or None for the model's own choice.")


def pair_bar(pairs: int, progress: bool) -> tqdm:
    return tqdm(
        total=pairs, desc="pairs", unit=" pairs", unit_scale=True, delay=2.0, leave=False, disable=not progress
    )
