"""Which captions make a batch: every caption once an epoch, in an order that follows from seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

from .phases import Learning, PhaseConfig, kept_in

if TYPE_CHECKING:
    from ..data import CaptionDataset, PairCollator
    from .config import TrainingConfig

__all__ = [
    "Batches",
    "CaptionBatches",
    "DistributedBatchSampler",
    "PaddedItems",
    "PaddingCollator",
    "Phase",
    "make_phases",
    "phases",
]


class Batches(Protocol):
    """Batches of a phase, in an order that a run can go on with anywhere."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[list[Any]]: ...
    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next pass, and how many of its batches to pass over."""


class CaptionBatches(Sampler[list[int]]):
    """Batches of caption rows; call `set_epoch` before each epoch.

    The order is a function of the seed and the epoch, so a run can be continued anywhere and reads the same batches.
    The last batch of an epoch is smaller where the captions do not divide; a single left-over caption, which would
    have no negatives, joins the batch before it.

    Args:
        image_rows: for each caption the row of its image.
        batch_size: captions a batch.
        captions_per_image: captions of the same image that stay together in a batch.
        seed: of the order.
    """

    def __init__(self, image_rows: Sequence[int], batch_size: int, captions_per_image: int = 1, seed: int = 0) -> None:
        if len(image_rows) < 2:
            raise ValueError(f"{len(image_rows)} captions to train on; expected at least 2 for negatives")
        self.image_rows = np.asarray(image_rows, dtype=np.int64)
        self.batch_size = batch_size
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch whose order the next pass has, and how many of its batches to pass over."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        captions = len(self.image_rows)
        return max(math.ceil(captions / self.batch_size) - (captions % self.batch_size == 1), 1)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for number in range(self.start, len(self)):
            end = (number + 1) * self.batch_size if number + 1 < len(self) else len(order)
            yield order[number * self.batch_size : end].tolist()

    def order(self) -> np.ndarray:
        """All caption rows in this epoch's order."""
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.permutation(len(self.image_rows))
        if self.captions_per_image == 1:
            return shuffled
        by_image = shuffled[np.argsort(self.image_rows[shuffled], kind="stable")]
        rows = self.image_rows[by_image]
        first = np.searchsorted(rows, rows)
        part = (np.arange(len(rows)) - first) // self.captions_per_image
        starts = np.flatnonzero(np.r_[True, (np.diff(rows) != 0) | (np.diff(part) != 0)])
        groups = np.split(by_image, starts[1:])
        return np.concatenate([groups[number] for number in rng.permutation(len(groups))])


class DistributedBatchSampler(Sampler[list[int]]):
    """The part of each batch that one process reads: the images dealt out in a row, each with all of its captions.

    The batches are the same for any number of processes, and no image is encoded by two of them. Where a batch has
    fewer images than there are processes, one that would get nothing reads the batch's first caption as padding, so
    that it goes through the same steps as the others; the number is then `~row`, below 0.

    Args:
        batches: the global batches.
        process: rank of this process.
        processes: how many there are.
    """

    def __init__(self, batches: CaptionBatches, process: int = 0, processes: int = 1) -> None:
        self.batches = batches
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield self.own(batch) if self.processes > 1 else batch

    def own(self, batch: list[int]) -> list[int]:
        """This process's captions of a batch."""
        rows = self.batches.image_rows[batch].tolist()
        images = list(dict.fromkeys(rows))
        bounds = [len(images) * number // self.processes for number in (self.process, self.process + 1)]
        own = set(images[bounds[0] : bounds[1]])
        return [caption for caption, row in zip(batch, rows, strict=True) if row in own] or [~batch[0]]


class PaddedItems(Dataset[dict[str, Any]]):
    """Items of a caption data set by the sampler's numbers; padding carries the key `is_padding`."""

    def __init__(self, captions: CaptionDataset) -> None:
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        items = self.captions.__getitems__([max(number, ~number) for number in numbers])
        for item, number in zip(items, numbers, strict=True):
            if number < 0:
                item["is_padding"] = True
        return items


class PaddingCollator:
    """A collator that passes on whether the batch is padding."""

    def __init__(self, collator: PairCollator) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate one process's share of a batch."""
        batch = self.collator(items)
        return {**batch, "is_padding": True} if items[0].get("is_padding") else batch


@dataclass
class Phase:
    """A phase of a run under way.

    Attributes:
        config: what the run's configuration says of it.
        batches: those of an epoch.
        rate: what the configured learning rates are multiplied by.
        accumulation: batches an optimizer step.
        kept: components that stay as they are because an earlier phase trained them.
    """

    config: PhaseConfig
    batches: Batches
    rate: float = 1.0
    accumulation: int = 1
    kept: frozenset[str] = frozenset()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return math.ceil(len(self.batches) / self.accumulation)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole phase, which may end within an epoch."""
        return self.config.steps or (self.config.epochs or 1) * self.steps_per_epoch

    @property
    def learning(self) -> Learning:
        """What its steps compute and learn."""
        return self.config.learning


def make_phases(config: TrainingConfig, batches_of: Callable[[PhaseConfig], Batches]) -> list[Phase]:
    """The phases of a run, whose batches a function makes."""
    planned, group = config.schedule(), config.gradient_accumulation_steps
    return [
        Phase(each, batches_of(each), each.learning_rate / config.learning_rate, group, kept)
        for each, kept in zip(planned, kept_in(planned), strict=True)
    ]


def phases(config: TrainingConfig, image_rows: Sequence[int]) -> list[Phase]:
    """The phases of a run over captions whose images are known."""
    grouped, seed = config.batch_captions_per_image, config.seed
    return make_phases(config, lambda each: CaptionBatches(image_rows, each.batch_size, grouped, seed))
