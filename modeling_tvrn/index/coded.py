"""Regions in a few bits a dimension: what an index keeps of an image where its disk counts.

A region has unit norm, so that its direction is all there is to keep: whole numbers in place of its coordinates, 256
or 16 levels of one step, with which the vector is normalised again. What the reasoning reads besides (refined regions,
their Gram matrix, …) the model computes of the regions after loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoded_tvrn import EncodedImages, EncodedItems
from ..layers_tvrn import normalize

BITS = {"int8": 8, "int4": 4}
REGION_STORAGE = ("float16", *BITS)
CLIPS = {8: (1.0,), 4: (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)}  # largest level, as a share of the largest coordinate


@dataclass
class StoredItems(EncodedItems):
    """Items as segments hold them: embeddings, and of images perhaps coded regions.

    Attributes:
        embeds: (n, P) unit-norm embeddings.
        region_mask: (n, R) bool.
        region_boxes: (n, R, 4).
        region_int8: (n, R, D) uint8.
        region_int4: (n, R, D / 2) uint8, two dimensions a byte.
    """

    embeds: Tensor
    region_mask: Tensor | None = None
    region_boxes: Tensor | None = None
    region_int8: Tensor | None = None
    region_int4: Tensor | None = None


def check_region_storage(storage: str, side: str, features: bool) -> None:
    """Refuse a storage that there isn't, or where there are no regions to store.

    Raises:
        ValueError: Naming what there is.
    """
    if storage not in REGION_STORAGE:
        raise ValueError(f"region_storage is {storage!r}; expected one of {', '.join(REGION_STORAGE)}")
    if storage in BITS and (side == "texts" or not features):
        what = "captions" if side == "texts" else "embeddings alone (features=False)"
        raise ValueError(f"region_storage is {storage!r}, but this index keeps {what}; leave it out")


def stored(images: EncodedItems, storage: str) -> StoredItems:
    """Encoded images, of level "late_interaction", as "int8" or "int4".

    Raises:
        ValueError: If they hold no regions, or for "int4" an odd number of dimensions.
    """
    if not isinstance(images, EncodedImages) or images.regions is None:
        raise ValueError(
            f"region_storage is {storage!r}, but there are no regions: of a model of embeddings alone, or of images "
            "that were encoded without late interaction. Use region_storage='float16', or encode them anew"
        )
    codes = coded(images.regions.detach().float().cpu(), BITS[storage])
    mask, boxes = (None if each is None else each.cpu() for each in (images.region_mask, images.region_boxes))
    return StoredItems(images.embeds.detach().cpu(), mask, boxes, **{f"region_{storage}": codes})  # type: ignore[arg-type]


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a segment holds of images, with regions in place of their codes."""
    found = dict(tensors)
    for name, bits in BITS.items():
        if f"region_{name}" in found:
            found["regions"] = decoded(found.pop(f"region_{name}"), bits)
    return found


def coded(regions: Tensor, bits: int) -> Tensor:
    """Unit-norm regions (n, R, D) as levels, (n, R, D · bits / 8) uint8; a region's step is the best of a few."""
    if bits == 4 and regions.shape[-1] % 2:
        raise ValueError(f"region_storage='int4' packs two dimensions a byte; the model's {regions.shape[-1]} are odd")
    middle = (2**bits - 1) / 2
    largest = regions.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
    best, nearest = torch.zeros_like(regions), torch.full_like(largest, -torch.inf)
    for clip in CLIPS[bits]:
        levels = (regions * (middle / (clip * largest)) + middle).round().clamp(0, 2 * middle)
        cosine = (normalize(levels - middle) * regions).sum(dim=-1, keepdim=True)
        best, nearest = torch.where(cosine > nearest, levels, best), torch.maximum(cosine, nearest)
    codes = best.to(torch.uint8)
    return codes if bits == 8 else codes[..., ::2] * 16 + codes[..., 1::2]


def decoded(codes: Tensor, bits: int) -> Tensor:
    """Regions (n, R, D) float32 of unit norm."""
    levels = codes if bits == 8 else torch.stack([codes // 16, codes % 16], dim=-1).flatten(-2)
    return normalize(levels.float() - (2**bits - 1) / 2)
