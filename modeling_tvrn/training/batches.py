"""Which captions make a batch: every caption once an epoch, in an order that follows from seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["CaptionBatches", "Phase", "phases"]


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

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass has."""
        self.epoch = epoch

    def __len__(self) -> int:
        captions = len(self.image_rows)
        return max(math.ceil(captions / self.batch_size) - (captions % self.batch_size == 1), 1)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for number in range(len(self)):
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


@dataclass
class Phase:
    """A stretch of training with its own warm-up and decay of the rates.

    Attributes:
        with_pairs: whether pairs are scored, or the embeddings trained alone.
        rate: what the configured learning rate is multiplied by.
        accumulation: batches an optimizer step.
    """

    batches: CaptionBatches
    epochs: int
    with_pairs: bool
    rate: float = 1.0
    accumulation: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return math.ceil(len(self.batches) / self.accumulation)


def phases(config: TrainingConfig, image_rows: Sequence[int]) -> list[Phase]:
    """The head start, where the configuration has one, and the epochs in which pairs are scored."""

    def phase(epochs: int, batch_size: int, with_pairs: bool, rate: float = 1.0) -> Phase:
        batches = CaptionBatches(image_rows, batch_size, config.batch_captions_per_image, config.seed)
        return Phase(batches, epochs, with_pairs, rate, config.gradient_accumulation_steps)

    main = phase(config.epochs, config.batch_size, True)
    if not config.head_start_epochs:
        return [main]
    rate = (config.head_start_learning_rate or config.learning_rate) / config.learning_rate
    return [phase(config.head_start_epochs, config.head_start_batch_size or config.batch_size, False, rate), main]
