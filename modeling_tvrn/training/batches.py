"""Which captions make a batch: every caption once an epoch, in an order that follows from seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from ..data import CaptionDataset, PairCollator
    from .config import TrainingConfig
    from .streams import StreamBatches

__all__ = ["CaptionBatches", "Phase", "ShareCollator", "ShareItems", "Shares", "Stage", "phases", "plans"]


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


class Shares(Sampler[list[int]]):
    """The part of each batch that one process reads: the images dealt out in a row, each with all of its captions.

    The batches are the same for any number of processes, and no image is encoded by two of them. Where a batch has
    fewer images than there are processes, one that would get nothing reads the batch's first caption as a stand-in, so
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
            yield self.share(batch) if self.processes > 1 else batch

    def share(self, batch: list[int]) -> list[int]:
        """This process's captions of a batch."""
        rows = self.batches.image_rows[batch].tolist()
        images = list(dict.fromkeys(rows))
        bounds = [len(images) * number // self.processes for number in (self.process, self.process + 1)]
        own = set(images[bounds[0] : bounds[1]])
        return [caption for caption, row in zip(batch, rows, strict=True) if row in own] or [~batch[0]]


class ShareItems(Dataset[dict[str, Any]]):
    """Items of a caption data set by the numbers of `Shares`; a stand-in carries the key `stand_in`."""

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
                item["stand_in"] = True
        return items


class ShareCollator:
    """A collator that passes on whether the batch is a stand-in."""

    def __init__(self, collator: PairCollator) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate one process's share of a batch."""
        batch = self.collator(items)
        return {**batch, "stand_in": True} if items[0].get("stand_in") else batch


class Stage(StrEnum):
    """How much of the pair score a step computes and trains: each stage holds the ones before it.

    TAUGHT trains the embeddings alone, as EMBEDDINGS does, but computes the tokens too, which teach them.
    """

    EMBEDDINGS = "embeddings"
    TOKENS = "tokens"
    TAUGHT = "taught embeddings"
    EVIDENCE = "evidence"


@dataclass
class Phase:
    """A stretch of training with its own warm-up and decay of the rates.

    Attributes:
        stage: what its steps train.
        rate: what the configured learning rate is multiplied by.
        region_dropout: probability that a region is left out of a step.
        accumulation: batches an optimizer step.
    """

    batches: CaptionBatches | StreamBatches
    epochs: int
    stage: Stage
    rate: float = 1.0
    region_dropout: float = 0.0
    accumulation: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return math.ceil(len(self.batches) / self.accumulation)


@dataclass(frozen=True)
class Plan:
    """What the configuration says of a phase.

    Attributes:
        length: epochs; of a stream, optimizer steps.
        batch_size: captions a batch.
        rate: what the configured learning rate is multiplied by.
        region_dropout: probability that a region is left out of a step.
    """

    stage: Stage
    length: int
    batch_size: int
    rate: float
    region_dropout: float


def plans(config: TrainingConfig) -> list[Plan]:
    """The head start, the tokens' phase and the distillation, where there are any, then the one that scores pairs."""
    head_start, tokens, taught = config.head_start_epochs, config.token_epochs, config.distillation_epochs
    evidence = config.epochs
    if config.streaming:
        head_start, tokens, taught = config.head_start_steps, config.token_steps, config.distillation_steps
        evidence = (config.max_steps or 0) - head_start - tokens - taught

    def plan(
        stage: Stage,
        length: int,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        region_dropout: float | None = None,
    ) -> Plan:
        rate = (learning_rate or config.learning_rate) / config.learning_rate
        dropout = config.region_dropout if region_dropout is None else region_dropout
        return Plan(stage, length, batch_size or config.batch_size, rate, dropout)

    # Without a phase of their own the tokens learn in the head start.
    first = Stage.EMBEDDINGS if tokens or not config.use_late_interaction else Stage.TOKENS
    embeddings = config.head_start_batch_size, config.head_start_learning_rate, config.head_start_region_dropout
    found = [
        plan(first, head_start, *embeddings),
        plan(Stage.TOKENS, tokens, config.token_batch_size, config.token_learning_rate),
        plan(Stage.TAUGHT, taught, *embeddings),
        plan(Stage.EVIDENCE, evidence),
    ]
    return [each for each in found if each.length]


def phases(config: TrainingConfig, image_rows: Sequence[int]) -> list[Phase]:
    """The phases of a run over captions whose images are known."""
    return [
        Phase(
            CaptionBatches(image_rows, plan.batch_size, config.batch_captions_per_image, config.seed),
            plan.length,
            plan.stage,
            plan.rate,
            plan.region_dropout,
            config.gradient_accumulation_steps,
        )
        for plan in plans(config)
    ]
