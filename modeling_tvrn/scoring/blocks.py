"""The score matrix, and exact ranks without it: block by block, no pair scored twice, memory of a few blocks."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..metrics import RankCounter, RetrievalMetrics, positive_pairs
from ..metrics.ranking import check_scores
from .best import BestCandidates
from .finished import FinishedBlocks, run_fingerprint
from .models import Gallery, PairModel, at_hand, check_models, evaluating, model_device, precision
from .plan import DEFAULT_MEMORY_BUDGET, BlockPlan, plan_blocks
from .processes import Processes
from .threads import keep_freed_memory, match_on_cores

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class ScoringOptions:
    """How pairs are scored, whatever is made of the scores.

    Attributes:
        chunk_size: Pairs the model scores at a time (default: its own choice); bounds memory, does not change scores.
        memory_budget: Gigabytes for blocks, beyond the galleries and the intermediates of a chunk.
        dtype: `torch.float32`, `torch.bfloat16` (autocast), or None for the model's own.
        folder: Of finished blocks, with which an interrupted run goes on.
        share: Whether the processes of torch.distributed, where it is initialised, share the blocks out.
        progress: Show a progress bar with the time left, if it takes longer than a moment.
    """

    chunk_size: int | None = None
    memory_budget: float = DEFAULT_MEMORY_BUDGET
    dtype: torch.dtype | None = None
    folder: Folder | None = None
    share: bool = True
    progress: bool = True


def score_matrix(
    model: PairModel,
    images: Gallery,
    texts: Gallery,
    chunk_size: int | None = None,
    progress: bool = True,
    *,
    memory_budget: float = DEFAULT_MEMORY_BUDGET,
    dtype: torch.dtype | None = None,
    folder: Folder | None = None,
    share: bool = True,
) -> Tensor:
    """All pair scores, (I, T); rows are images.

    Where torch.distributed is initialised its processes share the blocks out (each with both galleries) and every one
    gets the whole matrix, the same bits as one process would compute.

    Args:
        model: With `match`; see `average` for several.
        images: I encoded images.
        texts: T encoded texts, padded or a `RaggedTexts`.
        chunk_size: Pairs the model scores at a time (default: its own choice); bounds memory, does not change scores.
        progress: Show a progress bar with the time left, if it takes longer than a moment.
        memory_budget: Gigabytes for a block's scores and items, beyond the galleries, the matrix and the chunk.
        dtype: `torch.float32`, `torch.bfloat16` (autocast), or None for the model's own.
        folder: Where finished blocks are kept: the same call goes on after a crash. Refused if it holds another run's.
        share: False where one of several processes scores alone.

    Raises:
        ValueError: If a side is empty, a score is NaN, two models encoded the galleries, or a setting is out of range.
    """
    options = ScoringOptions(chunk_size, memory_budget, dtype, folder, share, progress)
    with _scored(model, images, texts, np.arange(len(texts)), options) as blocks:
        matrix: Tensor | None = None
        with blocks.processes.together():
            for block in blocks.processes.mine(blocks.plan.blocks()):
                scores, rows, columns = blocks.score(block)
                check_scores(scores, rows, columns)
                if matrix is None:
                    matrix = scores.new_zeros((len(images), len(texts)))
                matrix[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = scores
        return _whole(matrix, blocks)


def rank(
    model: PairModel,
    images: Gallery,
    texts: Gallery,
    caption_image_rows: Sequence[int] | np.ndarray | Tensor | None = None,
    *,
    positives: Sequence[Sequence[int]] | np.ndarray | Tensor | None = None,
    chunk_size: int | None = None,
    progress: bool = True,
    memory_budget: float = DEFAULT_MEMORY_BUDGET,
    dtype: torch.dtype | None = None,
    folder: Folder | None = None,
    share: bool = True,
) -> RetrievalMetrics:
    """`retrieval_metrics(score_matrix(...))` without the matrix: memory is O(block), never images × captions.

    The blocks that hold positives are scored first, then the others; each pair is scored once. (Only where positives
    are spread over more blocks than fit the budget, as `positives` may be, are some scored a second time; not with a
    `folder`.) Where torch.distributed is initialised its processes share the blocks out, each with both galleries, and
    every one gets the same result as one process would.

    Args:
        model: With `match`; see `average` for several.
        images: I encoded images.
        texts: T encoded texts, padded or a `RaggedTexts`.
        caption_image_rows: (T,) row of each caption's image, in any order.
        positives: (n, 2) (image row, caption) pairs instead, where a caption has several images.
        chunk_size: Pairs the model scores at a time (default: its own choice); bounds memory.
        progress: Show a progress bar with the time left, if it takes longer than a moment.
        memory_budget: Gigabytes for blocks, beyond the galleries and the intermediates of a chunk.
        dtype: `torch.float32`, `torch.bfloat16` (autocast), or None for the model's own.
        folder: Where finished blocks are kept (4 bytes a pair): the same call goes on after a crash. Refused if it
            holds another run's.
        share: False where one of several processes scores alone.

    Raises:
        ValueError: As `score_matrix` and `retrieval_metrics`.
    """
    options = ScoringOptions(chunk_size, memory_budget, dtype, folder, share, progress)
    return _ranked(model, images, texts, (caption_image_rows, positives), options, None)


def rank_and_list(
    model: PairModel,
    images: Gallery,
    texts: Gallery,
    caption_image_rows: Sequence[int] | np.ndarray | Tensor,
    size: int,
    options: ScoringOptions | None = None,
) -> tuple[RetrievalMetrics, BestCandidates]:
    """`rank`, and out of the same pass over the blocks each query's `size` best candidates.

    For protocols whose answers are judged by lists (ECCV Caption, CxC).

    Raises:
        ValueError: As `rank`, or if `size` is below 1.
    """
    best = BestCandidates(len(images), len(texts), size)
    return _ranked(model, images, texts, (caption_image_rows, None), options or ScoringOptions(), best), best


def _ranked(
    model: PairModel, images: Gallery, texts: Gallery, right: tuple[Any, Any], options: ScoringOptions, best: Any
) -> RetrievalMetrics:
    check_galleries(model, images, texts, options.chunk_size)
    pairs = positive_pairs(len(images), len(texts), *right)
    first_image = np.full(len(texts), len(images))
    np.minimum.at(first_image, pairs[:, 1], pairs[:, 0])
    order = np.argsort(first_image, kind="stable")
    with _scored(model, images, texts, order, options) as blocks:
        return RetrievalMetrics.from_ranks(_count(blocks, pairs, best).ranks())


def _count(blocks: ScoredBlocks, pairs: np.ndarray, best: BestCandidates | None) -> RankCounter:
    """Both passes over the blocks: first what holds positives, then everything."""
    processes, plan = blocks.processes, blocks.plan
    counter = RankCounter(plan.image_count, len(plan.order), pairs)
    with_positives = plan.blocks_of(pairs)
    known = set(with_positives)
    own = list(processes.mine(with_positives))
    with processes.together():
        for block in own:
            counter.add_positives(*blocks.score(block, keep=True))
    if processes.shared:
        counter.share_positives(processes.max, processes.sum)
    with processes.together():
        others = processes.mine(each for each in plan.blocks() if each not in known)
        for block in itertools.chain(own, others):
            scored = blocks.score(block)
            counter.add(*scored)
            if best is not None:
                best.add(*scored)
    if processes.shared:
        counter.share_counts(processes.sum)
    if best is not None:
        best.share(processes)
    return counter


class ScoredBlocks:
    """The scores of any block of a plan: computed, or read where they are finished already."""

    def __init__(
        self, model: PairModel, sides: tuple[Gallery, Gallery], plan: BlockPlan, options: ScoringOptions, bar: tqdm
    ):
        self.model, self.images, self.texts = model, *sides
        self.options, self.bar = options, bar
        self.processes = Processes(options.share)
        self.device = model_device(model) or self.images.embeds.device
        self.finished: FinishedBlocks | None = None
        if options.folder is not None:
            marks = run_fingerprint(model, *sides, options.dtype)
            self.finished = FinishedBlocks(options.folder, marks, plan)
            plan = self.finished.plan
        self.plan = plan
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._counted: set[tuple[int, int]] = set()
        self._room = options.memory_budget * 1e9 / 2
        self._row: tuple[int, Any] = (-1, None)

    def score(self, block: tuple[int, int], keep: bool = False) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """The scores of a block, its image rows and its caption numbers.

        Args:
            block: Its place in the plan.
            keep: It will be asked for once more; its scores stay in memory if there is room.
        """
        rows, columns = self.plan.rows(block[0]), self.plan.columns(block[1])
        scores = self._kept.pop(block, None)
        if scores is None:
            scores = self._read(block) if self.finished is not None else self._compute(block, rows, columns)
            if keep and self.finished is None and scores.nbytes <= self._room:
                self._kept[block], self._room = scores, self._room - scores.nbytes
            if block not in self._counted:
                self.bar.update(scores.numel())
        if keep:
            self._counted.add(block)
        return scores, rows, columns

    def _read(self, block: tuple[int, int]) -> Tensor:
        assert self.finished is not None
        scores = self.finished.load(block)
        if scores is None:
            scores = self._compute(block, self.plan.rows(block[0]), self.plan.columns(block[1]))
            self.finished.save(block, scores)
        elif block not in self._counted and not self.bar.disable:
            self.bar.initial += scores.numel()  # the time left is that of blocks still to be computed
        return scores.to(self.device)

    def _compute(self, block: tuple[int, int], rows: np.ndarray, columns: np.ndarray) -> Tensor:
        if self._row[0] != block[0]:
            self._row = (block[0], at_hand(self.model, take(self.images, rows), self.options.dtype))
        texts = at_hand(self.model, take(self.texts, columns), self.options.dtype)
        return match_on_cores(self.model, self._row[1], texts, self.options.chunk_size)


@contextlib.contextmanager
def _scored(
    model: PairModel, images: Gallery, texts: Gallery, order: np.ndarray, options: ScoringOptions
) -> Iterator[ScoredBlocks]:
    """Everything around scoring blocks: checks, plan, evaluation mode, precision, progress."""
    check_galleries(model, images, texts, options.chunk_size)
    device = model_device(model) or images.embeds.device
    plan = plan_blocks(images, texts, order, options.memory_budget, device)
    processes = Processes(options.share)
    shape = f"{len(images)} × {len(texts)}, blocks {plan.block_images} × {plan.block_captions}, {plan.order_digest}"
    processes.check_same("galleries or settings", shape)
    pairs = len(images) * len(texts) // processes.count
    progress = options.progress and processes.rank == 0
    keep_freed_memory()
    with evaluating(model), precision(model, options.dtype, device), pair_bar(pairs, progress) as bar:
        with processes.together():
            blocks = ScoredBlocks(model, (images, texts), plan, options, bar)
        yield blocks


def _whole(matrix: Tensor | None, blocks: ScoredBlocks) -> Tensor:
    """The matrix with every process's blocks: each was zero where it scored nothing."""
    processes, shape = blocks.processes, (blocks.plan.image_count, len(blocks.plan.order))
    if not processes.shared:
        assert matrix is not None
        return matrix
    doubled = processes.max(torch.tensor([float(matrix is not None and matrix.dtype == torch.float64)]))
    if matrix is None:  # more processes than blocks
        dtype = torch.float64 if doubled[0] else torch.float32
        matrix = torch.zeros(shape, dtype=dtype, device=blocks.device)
    for i in range(blocks.plan.shape[0]):
        rows = blocks.plan.rows(i)
        matrix[rows[0] : rows[-1] + 1] = processes.sum(matrix[rows[0] : rows[-1] + 1])
    return matrix


def take(gallery: Gallery, numbers: np.ndarray) -> Any:
    """Some items of a gallery; consecutive ones without a copy."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return gallery.select(slice(int(numbers[0]), int(numbers[-1]) + 1))
    return gallery.select(torch.from_numpy(numbers))


def check_galleries(model: PairModel, images: Gallery, texts: Gallery, chunk_size: int | None) -> None:
    """Refuse what can't score pairs, empty sides, a chunk without pairs, and galleries of another model."""
    if not hasattr(model, "match"):
        raise ValueError(
            f"A {type(model).__name__} has no match(images, texts) to score pairs with; load a dual encoder (CLIP, …)"
            " by load_model, or make a TVRN of it by TVRNModel.from_dual_encoder(model, use_late_interaction=False,"
            " use_reasoning=False)."
        )
    if not len(images) or not len(texts):
        raise ValueError(
            f"There are {len(images)} images and {len(texts)} texts to score; expected at least 1 of each."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1 pair, or None for the model's own choice.")
    check_models(model, images, texts)


def pair_bar(pairs: int, progress: bool) -> tqdm:
    """A bar over pairs, with the time left, once it takes longer than a moment."""
    off = None if progress else True
    return tqdm(total=pairs, desc="pairs", unit=" pairs", unit_scale=True, delay=2.0, leave=False, disable=off)
