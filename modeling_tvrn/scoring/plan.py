"""How the score matrix is cut into blocks: sized to a memory budget, positives in few of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .models import AveragedGallery, Gallery
from .ragged import RaggedTexts

DEFAULT_MEMORY_BUDGET = 1.0  # gigabytes
# Pairs of a block: enough to keep the arithmetic dense, and few enough that a bar moves and little is lost in a crash.
BLOCK_PAIRS = {"cpu": 1 << 17, "cuda": 1 << 21}
PAIR_BYTES = 24  # a score, its copy among the kept ones, and the masks and comparisons of counting


@dataclass(frozen=True)
class BlockPlan:
    """The matrix cut into blocks, with the captions in an order that puts positives into few blocks.

    Attributes:
        image_count: I.
        order: (T,) caption numbers in the order the blocks take them.
        block_images: Images of a block (fewer in the last one).
        block_captions: Captions of a block.
    """

    image_count: int
    order: np.ndarray
    block_images: int
    block_captions: int

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks along the images, and along the captions."""
        return -(-self.image_count // self.block_images), -(-len(self.order) // self.block_captions)

    def rows(self, i: int) -> np.ndarray:
        """Image rows of the blocks (i, ·)."""
        return np.arange(i * self.block_images, min((i + 1) * self.block_images, self.image_count))

    def columns(self, j: int) -> np.ndarray:
        """Caption numbers of the blocks (·, j)."""
        return self.order[j * self.block_captions : (j + 1) * self.block_captions]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """All blocks, row by row."""
        rows, columns = self.shape
        return ((i, j) for i in range(rows) for j in range(columns))

    def pairs_in(self, block: tuple[int, int]) -> int:
        """Pairs of a block."""
        return len(self.rows(block[0])) * len(self.columns(block[1]))

    def blocks_of(self, pairs: np.ndarray) -> list[tuple[int, int]]:
        """The blocks that hold any of (n, 2) pairs (image row, caption)."""
        blocks = np.stack(
            [pairs[:, 0] // self.block_images, self._place[pairs[:, 1]] // self.block_captions],
            axis=1,
        )
        return [(i, j) for i, j in np.unique(blocks, axis=0).tolist()]

    @cached_property
    def _place(self) -> np.ndarray:
        place = np.empty(len(self.order), dtype=np.int64)
        place[self.order] = np.arange(len(self.order))
        return place

    @cached_property
    def order_digest(self) -> str:
        """SHA-256 of the captions' order."""
        return hashlib.sha256(np.ascontiguousarray(self.order, dtype=np.int64).tobytes()).hexdigest()


def plan_blocks(
    images: Gallery, texts: Gallery, order: np.ndarray, memory_budget: float, device: torch.device
) -> BlockPlan:
    """Blocks whose scores and items fit a budget, about twice as many captions as images.

    Args:
        images: I encoded images.
        texts: T encoded texts.
        order: (T,) the captions' order.
        memory_budget: Gigabytes for what a block needs beyond the galleries and the model's own intermediates.
        device: Where the model runs.

    Raises:
        ValueError: If the budget is not above 0.
    """
    if not memory_budget > 0 or math.isinf(memory_budget):
        raise ValueError(f"memory_budget is {memory_budget}; expected gigabytes above 0, such as 1.0.")
    limit, room = BLOCK_PAIRS.get(device.type, BLOCK_PAIRS["cuda"]), memory_budget * 1e9
    image, text = item_bytes(images), item_bytes(texts)
    # The budget's largest i of PAIR_BYTES·2i² + (image + 2 text)·i ≤ room.
    linear, square = image + 2 * text, 2 * PAIR_BYTES
    fitting = (math.sqrt(linear**2 + 4 * square * room) - linear) / (2 * square)
    rows = max(1, min(len(images), int(fitting), int(math.sqrt(limit / 2))))
    columns = min(limit // rows, int((room - image * rows) / (PAIR_BYTES * rows + text)))
    columns = max(1, min(len(texts), columns))
    if columns == len(texts):  # few captions: more images a block instead
        more = min(limit // columns, int((room - text * columns) / (PAIR_BYTES * columns + image)))
        rows = max(rows, min(len(images), more))
    return BlockPlan(len(images), order, rows, columns)


def item_bytes(gallery: Any) -> float:
    """Mean bytes of an encoded item."""
    if isinstance(gallery, AveragedGallery):
        return sum(item_bytes(part) for part in gallery.parts)
    if isinstance(gallery, RaggedTexts):
        return sum(item_bytes(part) * len(part) for part in gallery.parts) / len(gallery)
    return sum(value.numel() * value.element_size() for value in gallery_tensors(gallery).values()) / len(gallery)


def gallery_tensors(gallery: Any) -> dict[str, torch.Tensor]:
    """An encoded gallery's tensors by name."""
    named = gallery.tensors() if hasattr(gallery, "tensors") else vars(gallery)
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
