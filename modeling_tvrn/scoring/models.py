"""What can be scored: a model and its encoded galleries, several of them averaged, or the embeddings alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Gallery(Protocol):
    """Encoded images or encoded texts."""

    @property
    def embeds(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def select(self, indices: Any) -> Any: ...


class PairModel(Protocol):
    """Whatever scores every pair of two galleries: `match(images, texts, chunk_size=...)` -> (I, T)."""

    def match(self, images: Any, texts: Any, chunk_size: int | None = None) -> Tensor: ...


class EmbeddingScore:
    """The cosine of `image_embeds` and `text_embeds` as a pair score: what a search by embeddings alone ranks by."""

    def match(self, images: Gallery, texts: Gallery, chunk_size: int | None = None) -> Tensor:
        """(I, T) cosines in float32 (float64 for float64 embeddings); `chunk_size` is of no use here."""
        left, right = (wide(side.embeds) for side in (images, texts))
        with torch.autocast(left.device.type, enabled=False):  # in bfloat16 thousands of cosines would tie
            return left @ right.to(left).T


class AveragedGallery:
    """The same items encoded by several models, in one order."""

    def __init__(self, parts: Sequence[Gallery]):
        sizes = [len(part) for part in parts]
        if len(set(sizes)) != 1:
            raise ValueError(f"The models' galleries hold {sizes} items; expected the same ones, in the same order.")
        self.parts = list(parts)

    @property
    def embeds(self) -> Tensor:
        """(n, P₁ + P₂ + …) unit norm, whose cosine is the mean of the models' cosines."""
        first = wide(self.parts[0].embeds)
        return torch.cat([part.embeds.to(first) for part in self.parts], dim=1) / math.sqrt(len(self.parts))

    def __len__(self) -> int:
        return len(self.parts[0])

    def select(self, indices: Any) -> AveragedGallery:
        """The items at `indices` of every part."""
        return AveragedGallery([part.select(indices) for part in self.parts])


class AveragedModel:
    """The mean of several models' matching scores: of their sigmoids, as the papers of this family report."""

    def __init__(self, models: Sequence[PairModel]):
        self.models = list(models)

    def match(self, images: AveragedGallery, texts: AveragedGallery, chunk_size: int | None = None) -> Tensor:
        """(I, T) mean matching scores in (0, 1).

        In float64, where the device knows it: in float32 a confident model's sigmoid is 1, and such pairs would tie.
        """
        total: Tensor | None = None
        for model, left, right in zip(self.models, images.parts, texts.parts, strict=True):
            logits = match(model, left, right, chunk_size)
            scores = (logits if logits.device.type == "mps" else logits.double()).sigmoid()
            total = scores if total is None else total + scores.to(total.device)
        assert total is not None
        return total / len(self.models)


def average(
    systems: Sequence[tuple[PairModel, Gallery, Gallery]],
) -> tuple[PairModel, Gallery, Gallery]:
    """Several (model, images, texts) as one, for `score_matrix`, `rank` and `search_then_rerank`.

    Args:
        systems: Each model with the same images and texts, encoded by itself. One system comes back as it is.

    Raises:
        ValueError: If there are none, or their galleries differ in size.
    """
    if not systems:
        raise ValueError("average got no systems; expected at least one (model, images, texts).")
    if len(systems) == 1:
        return systems[0]
    models, images, texts = zip(*systems, strict=True)
    return AveragedModel(models), AveragedGallery(images), AveragedGallery(texts)


def match(model: PairModel, images: Any, texts: Any, chunk_size: int | None) -> Tensor:
    """`model.match`; the chunk size is the model's own affair where none is given."""
    return model.match(images, texts) if chunk_size is None else model.match(images, texts, chunk_size=chunk_size)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No gradients, and no dropout: a model that is training is put into evaluation mode and back."""
    models = model.models if isinstance(model, AveragedModel) else [model]
    training = [each for each in models if isinstance(each, torch.nn.Module) and each.training]
    try:
        for each in training:
            each.eval()
        with torch.no_grad():
            yield
    finally:
        for each in training:
            each.train()


def wide(values: Tensor) -> Tensor:
    """float32, or float64 where it is that already: a cosine in half precision moves ranks."""
    return values if values.dtype == torch.float64 else values.float()
