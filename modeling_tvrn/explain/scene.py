"""The image side of an explanation: its regions as the model takes them, and the picture they lie on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..data.images import decode_image
from ..layers_tvrn import grid_boxes
from ..pixels_tvrn import rgb_images


@dataclass
class Scene:
    """One image.

    Attributes:
        inputs: `region_features (1, R, F)` and, where there are any, `region_boxes`, `region_mask`, `image_embeds`:
            arguments of `encode_images`.
        picture: What the boxes are fractions of: the part of the photograph that the model saw; None where only
            features are known.
    """

    inputs: dict[str, Tensor]
    picture: PIL.Image.Image | None


def read_scene(model: Any, processor: Any, image: Any) -> Scene:
    """A photograph (PIL, path, bytes, array) through the model's tower, or a record with region features.

    Raises:
        ValueError: If the model has no vision tower for a photograph, or the image can't be read.
    """
    device = next(model.parameters()).device
    if isinstance(image, Mapping) and "region_features" in image:
        names = ("region_features", "region_boxes", "region_mask", "image_sizes")
        given = {name: [image[name]] for name in names if image.get(name) is not None}
        inputs = {name: value.to(device) for name, value in processor(**given, return_tensors="pt").items()}
        shown = image.get("image")
        return Scene(inputs, None if shown is None else _seen(processor, open_image(shown)))
    if isinstance(image, Mapping) and "image" in image:
        image = image["image"]
    picture = open_image(image)
    given = {name: value.to(device) for name, value in processor(images=[picture], return_tensors="pt").items()}
    inputs = model.extract_image_features(**given)
    if model.config.detector_config is not None:  # its boxes are fractions of the photograph
        return Scene(inputs, picture)
    return Scene(inputs, _as_image(given["pixel_values"][0], processor.image_processor))


def open_image(image: Any) -> PIL.Image.Image:
    """RGB of a PIL image, a path, encoded bytes or an array."""
    if isinstance(image, np.ndarray | Tensor):
        return rgb_images([image])[0]
    if isinstance(image, PIL.Image.Image | str | os.PathLike | bytes | memoryview | Mapping):
        return decode_image(image)
    raise ValueError(
        f"the image is a {type(image).__name__}; expected a PIL image, a path, encoded bytes, an array, or a "
        "record with 'region_features' (and 'image', to draw on)"
    )


def grid_shape(boxes: np.ndarray | None) -> tuple[int, int] | None:
    """(rows, columns) if the boxes are the model's own grid, else None."""
    if boxes is None:
        return None
    for rows in range(1, len(boxes) + 1):
        columns, left = divmod(len(boxes), rows)
        if not left and np.allclose(grid_boxes(rows, columns).numpy(), boxes, atol=1e-3):
            return rows, columns
    return None


def _seen(processor: Any, picture: PIL.Image.Image) -> PIL.Image.Image:
    """The part of a photograph that an image processor leaves; all of it without one."""
    if getattr(processor, "image_processor", None) is None:
        return picture
    return _as_image(processor(images=[picture], return_tensors="pt")["pixel_values"][0], processor.image_processor)


def _as_image(pixels: Tensor, image_processor: Any) -> PIL.Image.Image:
    """Pixel values (3, H, W) back to a picture: resizing and cropping stay, normalisation is undone."""
    values = pixels.float().cpu()
    if getattr(image_processor, "do_normalize", False):
        std, mean = (
            torch.tensor(getattr(image_processor, name)).view(-1, 1, 1) for name in ("image_std", "image_mean")
        )
        values = values * std + mean
    scale = getattr(image_processor, "rescale_factor", 1.0) if getattr(image_processor, "do_rescale", False) else 1.0
    values = (values / scale).round().clamp(0, 255).to(torch.uint8)
    return PIL.Image.fromarray(values.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
