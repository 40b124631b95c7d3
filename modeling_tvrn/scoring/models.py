"""What can be scored: a model and its encoded galleries, several of them averaged, or the embeddings alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import kernels


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
    """The mean of several models' matching scores, their calibrated sigmoids, as the papers of this family report."""

    def __init__(self, models: Sequence[Any]):
        self.models = list(models)

    def match(self, images: AveragedGallery, texts: AveragedGallery, chunk_size: int | None = None) -> Tensor:
        """(I, T) mean matching scores in (0, 1).

        In float64, where the device knows it: in float32 a confident model's sigmoid is 1, and such pairs would tie.
        """
        parts = zip(self.models, images.parts, texts.parts, strict=True)
        return self.mean([match(model, left, right, chunk_size) for model, left, right in parts])

    def mean(self, logits: Iterable[Tensor]) -> Tensor:
        """The mean of the models' matching scores from their logits, in float64 where the device knows it."""
        scores = [
            model.scores(each if each.device.type == "mps" else each.double())
            for model, each in zip(self.models, logits, strict=True)
        ]
        return torch.stack([each.to(scores[0].device) for each in scores]).sum(dim=0) / len(scores)


def models_of(model: Any) -> list[Any]:
    """The models whose scores are averaged; of one that is no average, itself."""
    return list(model.models) if isinstance(model, AveragedModel) else [model]


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
    """`model.match` where the model is; the chunk size is the model's own affair where none is given."""
    images, texts = at_hand(model, images), at_hand(model, texts)
    return model.match(images, texts) if chunk_size is None else model.match(images, texts, chunk_size=chunk_size)


def at_hand(model: PairModel, gallery: Any, dtype: torch.dtype | None = None) -> Any:
    """A part of a gallery on the model's device: a gallery larger than a GPU stays in main memory.

    In bfloat16, where that is asked for, it is converted once and not at every use.
    """
    if isinstance(gallery, AveragedGallery):
        return gallery  # its parts may belong on different devices
    device = model_device(model)
    if device is not None and gallery.embeds.device != device:
        gallery = gallery.to(device)
    return gallery.to(dtype) if dtype == torch.bfloat16 and hasattr(gallery, "to") else gallery


def model_device(model: Any) -> torch.device | None:
    """Where a model's weights are, the first one's of several; None for what has none."""
    scorer = models_of(model)[0]
    first = next(scorer.parameters(), None) if isinstance(scorer, torch.nn.Module) else None
    return None if first is None else first.device


@contextlib.contextmanager
def precision(model: Any, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Scores in a dtype: None is the model's own, bfloat16 is autocast.

    Raises:
        ValueError: On another dtype, or float32 of a model whose weights have less.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; expected torch.float32, torch.bfloat16, or None for the model's own.")
    weights = {
        str(value.dtype)
        for each in models_of(model)
        if isinstance(each, torch.nn.Module)
        for value in each.parameters()
    }
    half = weights & {"torch.bfloat16", "torch.float16"}
    if dtype == torch.float32 and half:
        raise ValueError(
            f"Scores in float32 were asked of a model with weights in {', '.join(sorted(half))}; load it with"
            " from_pretrained(..., dtype=torch.float32), or leave dtype at None."
        )
    if dtype is None:
        yield
    else:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            yield


def check_models(model: Any, images: Any, texts: Any) -> None:
    """Refuse galleries of another model than the one that scores them, as far as the galleries know whose they are.

    Raises:
        ValueError: Naming the fingerprints that differ.
    """
    if isinstance(model, AveragedModel):
        for each, left, right in zip(model.models, images.parts, texts.parts, strict=True):
            check_models(each, left, right)
        return
    own = model.fingerprint() if hasattr(model, "fingerprint") else None
    found = {"images": getattr(images, "model_fingerprint", None), "texts": getattr(texts, "model_fingerprint", None)}
    known = {name: mark for name, mark in (found | {"model": own}).items() if mark is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {mark[:12]}" for name, mark in known.items())
        raise ValueError(
            f"The galleries and the model that scores them are not of one checkpoint (fingerprints: {listed}); encode"
            " both galleries with this model, and again after any training."
        )


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No gradients, and no dropout: a model that is training is put into evaluation mode and back."""
    training = [each for each in models_of(model) if isinstance(each, torch.nn.Module) and each.training]
    for each in models_of(model):
        kernels.enable(each)  # fused programs, on a CUDA device with Triton
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
