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
        return self._captions.numbers.numpy()

    @property
    def images(self) -> np.ndarray:
        """(T, K) image rows, best first."""
        return self._images.numbers.numpy()


class _Lists:
    def __init__(self, queries: int, size: int):
        self.size = size
        self.scores = torch.full((queries, size), -torch.inf, dtype=torch.float64)
        self.numbers = torch.full((queries, size), torch.iinfo(torch.int64).max)

    def add(self, scores: Tensor, queries: np.ndarray, candidates: np.ndarray) -> None:
        rows = torch.from_numpy(queries)
        numbers = torch.from_numpy(candidates).expand(len(rows), -1)
        values = scores.detach().cpu().double()
        # Most blocks change few lists: the others are left alone.
        better = (values >= self.scores[rows, -1:]).any(dim=1)
        self._merge(rows[better], values[better], numbers[better])

    def _merge(self, rows: Tensor, scores: Tensor, numbers: Tensor) -> None:
        scores, numbers = (
            torch.cat([self.scores[rows], scores], dim=1),
            torch.cat([self.numbers[rows], numbers], dim=1),
        )
        by_number = numbers.argsort(dim=1)
        order = scores.gather(1, by_number).argsort(dim=1, descending=True, stable=True)[:, : self.size]
        chosen = by_number.gather(1, order)
        self.scores[rows], self.numbers[rows] = scores.gather(1, chosen), numbers.gather(1, chosen)

    def share(self, processes: Processes) -> None:
        mine = self.scores, self.numbers
        every = torch.arange(len(self.scores))
        for number in range(processes.count):
            own = number == processes.rank
            scores = processes.sum(mine[0] if own else torch.zeros_like(mine[0]))
            numbers = processes.sum(mine[1] if own else torch.zeros_like(mine[1]))
            if not own:
                self._merge(every, scores, numbers)
