"""The image side of an explanation: its regions as the model takes them, and the picture they lie on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from ..data.images import decode_image
from ..layers_tvrn import grid_boxes
from ..pixels_tvrn import rgb_images

PROBE = 512  # longest side in pixels of what shows which part of a photograph is seen


@dataclass
class Scene:
    """One image.

    Attributes:
        inputs: `region_features (1, R, F)`, `region_mask` and, where there are any, `region_boxes`, `image_embeds`:
            arguments of `encode_images`.
        picture: The photograph, as it was given; None where only features are known.
        resized: Whether the model's boxes are fractions of what its image processor leaves of the photograph.
    """

    inputs: dict[str, Tensor]
    picture: PIL.Image.Image | None
    resized: bool = False


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
        shown = None if image.get("image") is None else open_image(image["image"])
        return Scene(inputs, shown, shown is not None and processor.image_processor is not None)
    if isinstance(image, Mapping) and "image" in image:
        image = image["image"]
    picture = open_image(image)
    inputs = model.extract_image_features(**processor(images=[picture], return_tensors="pt").to(device))
    return Scene(inputs, picture, model.config.detector_config is None)


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


def on_photograph(boxes: np.ndarray, processor: Any, picture: PIL.Image.Image) -> np.ndarray:
    """(R, 4) fractions of what an image processor leaves of a photograph, as fractions of the photograph.

    Read off a picture of the same shape whose red says how far right a pixel lies and whose green how far down: image
    processors resize and crop by settings of many names.
    """
    width, height = (max(round(side * PROBE / max(picture.size)), 1) for side in picture.size)
    probe = np.zeros((3, height, width, 3), np.uint8)  # black, white, and the two slopes
    probe[1] = 255
    probe[2, ..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
    probe[2, ..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    given = processor(images=[PIL.Image.fromarray(each) for each in probe], return_tensors="pt")
    black, white, slopes = given["pixel_values"].double().cpu().numpy()  # (3, H, W) each
    left, right = _ends(black[0], white[0], slopes[0])
    top, bottom = _ends(black[1].T, white[1].T, slopes[1].T)
    return np.array([left, top] * 2) + boxes * np.array([right - left, bottom - top] * 2)


def _ends(black: np.ndarray, white: np.ndarray, slope: np.ndarray) -> tuple[float, float]:
    """Where the middle row of a slope (H, W) begins and ends, as fractions of the way from black to white."""
    row, count = len(slope) // 2, slope.shape[1]
    kept = slice(count // 8, count - count // 8)  # padding, and what resizing bends, lies at the ends
    places = (np.arange(count)[kept] + 0.5) / count
    values = (slope[row] - black.min()) / (white.max() - black.min())
    rise, start = np.polyfit(places, values[kept], 1)
    return float(start), float(start + rise)
