"""Batches of pairs of different images, as dual encoders' losses expect them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["DifferentImages", "DualEncoderCollator"]


class DifferentImages(Sampler[list[int]]):
    """Batches of captions of different images: an epoch is one round for each caption of the images that have most.

    Every caption comes once, but for rounds in which fewer than two images a process have one left. Of several
    processes each gets its own part of every batch.
    """

    def __init__(self, image_rows: np.ndarray, size: int, seed: int = 0, process: int = 0, processes: int = 1) -> None:
        self.captions = [np.flatnonzero(image_rows == row) for row in np.unique(image_rows)]
        if min(size, len(self.captions)) < 2 * processes:
            raise ValueError(
                f"batches of {size} of {len(self.captions)} images leave {processes} processes with less than two "
                "pairs each, so without negatives; expected more images, or a larger batch_size"
            )
        self.size, self.seed, self.process, self.processes = size, seed, process, processes
        self.rounds = max(map(len, self.captions))
        self.epoch = 0

    def _batches(self, count: int) -> int:
        """Batches of a round; what does not divide joins the last one, or is one where it is large enough."""
        least = 2 * self.processes
        return max(count // self.size + (count % self.size >= least), 1) if count >= least else 0

    def __len__(self) -> int:
        return sum(self._batches(sum(len(own) > number for own in self.captions)) for number in range(self.rounds))

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        orders = [rng.permutation(own) for own in self.captions]
        for number in range(self.rounds):
            captions = rng.permutation([own[number] for own in orders if len(own) > number])
            last = self._batches(len(captions)) - 1
            for cut in range(last + 1):
                end = (cut + 1) * self.size if cut < last else len(captions)
                yield np.array_split(captions[cut * self.size : end], self.processes)[self.process].tolist()


class DualEncoderCollator:
    """Pictures and captions of items of `CaptionDataset` as the model's inputs, with `text_image_ids`."""

    def __init__(self, processor: Any, full_length: bool) -> None:
        self.processor = processor
        self.full_length = full_length

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """N items of different images -> the processor's inputs of N pairs."""
        inputs = self.texts([item["caption"] for item in items])
        inputs |= self.images([item["record"]["image"] for item in items])
        return inputs | {"text_image_ids": torch.tensor([item["row"] for item in items], dtype=torch.int64)}

    def texts(self, captions: list[str]) -> dict[str, Any]:
        """Token ids, padded as the model was trained."""
        padding = "max_length" if self.full_length else True
        return dict(self.processor(text=captions, padding=padding, truncation=True, return_tensors="pt"))

    def images(self, images: list[Any]) -> dict[str, Any]:
        """Pixel values."""
        return dict(self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt"))
