"""The order of training: a function of seed and epoch alone, so that it can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch.utils.data


class EpochShuffledSampler(torch.utils.data.Sampler[int]):
    """All of `0 ... length - 1` in an order that depends on `seed` and `epoch` and on nothing else.

    Not on how often it was iterated, on torch's global state, or on the number of workers. Resuming in mid-epoch is
    `set_epoch(epoch, start=items already seen)`: exactly the remaining items come, in the order they had.

    Args:
        length: number of items.
        seed: of all epochs; not negative.

    Raises:
        ValueError: a length below 1 or a negative seed.
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        if length < 1 or seed < 0:
            raise ValueError(f"length={length}, seed={seed}: expected a length of at least 1 and a seed of at least 0")
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many of its items to pass over; `start` is forgotten at the next call.

        Raises:
            ValueError: a negative epoch, or a start outside the epoch.
        """
        if epoch < 0 or not 0 <= start <= self.length:
            raise ValueError(f"epoch={epoch}, start={start}: expected epoch >= 0 and 0 <= start <= {self.length}")
        self.epoch = epoch
        self.start = start

    def order(self) -> np.ndarray:
        """The whole epoch's order, int64 (length,)."""
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.length)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.start :].tolist())

    def __len__(self) -> int:
        """Items that are left of this epoch."""
        return self.length - self.start
