"""Each query's best candidates out of the whole gallery, kept while blocks are scored: never images × captions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .processes import Processes


class BestCandidates:
    """The `size` best captions of each image and the `size` best images of each caption, exactly.

    Candidates of equal scores stand in the order of their numbers, so the lists do not depend on the blocks.

    Args:
        image_count: Number of images I.
        caption_count: Number of captions T.
        size: Candidates of a list; where a side has fewer, all of them.

    Raises:
        ValueError: If `size` is below 1.
    """

    def __init__(self, image_count: int, caption_count: int, size: int):
        if size < 1:
            raise ValueError(f"size is {size}; expected at least 1 candidate a query.")
        self._captions = _Lists(image_count, min(size, caption_count))
        self._images = _Lists(caption_count, min(size, image_count))

    def add(self, scores: Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
        """Look at one block: scores (r, c) of images `rows` with captions `columns`."""
        self._captions.add(scores, rows, columns)
        self._images.add(scores.T, columns, rows)

    def share(self, processes: Processes) -> None:
        """All processes: each then has the lists of the whole matrix."""
        for lists in (self._captions, self._images):
            lists.share(processes)

    @property
    def captions(self) -> np.ndarray:
        """(I, K) caption numbers, best first."""
        return self._captions.numbers()

    @property
    def images(self) -> np.ndarray:
        """(T, K) image rows, best first."""
        return self._images.numbers()


class _Lists:
    """(queries, size) complex numbers −score + i·number: NumPy orders them by score, and among equal ones by number.

    The last of a list is its worst; the others stand in no order.
    """

    def __init__(self, queries: int, size: int):
        self.best = np.full((queries, size), complex(np.inf, np.inf))

    def add(self, scores: Tensor, queries: np.ndarray, candidates: np.ndarray) -> None:
        values, size = scores.detach().cpu(), self.best.shape[1]
        least = torch.from_numpy(-self.best.real[queries, -1:]).to(values.dtype)
        if least.isneginf().any() and len(candidates) > size:  # a list isn't full: the block's own first ones do
            least = torch.maximum(least, values.topk(size, dim=1).values[:, -1:])
        # A block brings few candidates (ties with the last one among them): these alone are ordered.
        kept = values >= least
        place, column = (each.numpy() for each in kept.nonzero(as_tuple=True))
        if not len(place):
            return
        changed, first, counts = np.unique(place, return_index=True, return_counts=True)
        slot = np.arange(len(place)) - np.repeat(first, counts)
        packed = np.full((len(changed), counts.max()), complex(np.inf, np.inf))
        row = np.repeat(np.arange(len(changed)), counts)
        packed.real[row, slot] = -values[kept].double().numpy()
        packed.imag[row, slot] = candidates[column]
        self._merge(queries[changed], packed)

    def _merge(self, queries: np.ndarray, others: np.ndarray) -> None:
        size = self.best.shape[1]
        both = np.concatenate([self.best[queries], others], axis=1)
        self.best[queries] = np.partition(both, size - 1, axis=1)[:, :size]

    def numbers(self) -> np.ndarray:
        return np.sort(self.best, axis=1).imag.astype(np.int64)

    def share(self, processes: Processes) -> None:
        mine = torch.from_numpy(self.best.view(np.float64).copy())
        for number in range(processes.count):
            own = number == processes.rank
            others = processes.sum(mine if own else torch.zeros_like(mine))
            if not own:
                self._merge(np.arange(len(self.best)), others.numpy().view(np.complex128))
