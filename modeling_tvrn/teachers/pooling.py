"""Features of detector boxes: the mean of a backbone's map inside each box."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

SLACK = 1e-4  # a pixel box divided in float32 may end a rounding above 1
PIXEL_SLACK = 1.0  # detectors disagree by one pixel on where an image ends


def pool_boxes(feature_map: Tensor, boxes: Tensor) -> Tensor:
    """Mean of a map inside each box, cells counted by the area that the box covers of them.

    This is the exact integral of the piecewise constant map, so a box inside one cell gives that cell's feature.

    Args:
        feature_map: (B, C, h, w).
        boxes: (B, R, 4) xyxy in [0, 1]; a box without area gives zeros.

    Returns:
        (B, R, C).
    """
    rows, columns = feature_map.shape[-2:]
    boxes = boxes.to(torch.promote_types(feature_map.dtype, torch.float32))  # half precision moves a box by a cell
    down = _covered(boxes[..., 1], boxes[..., 3], rows)
    across = _covered(boxes[..., 0], boxes[..., 2], columns)
    weights = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(2)
    return weights.to(feature_map.dtype) @ feature_map.flatten(2).transpose(1, 2)


def _covered(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Share of the interval [low, high] that lies in each of the equal cells of [0, 1]: (..., cells)."""
    edges = torch.arange(cells + 1, device=low.device, dtype=low.dtype) / cells
    overlap = torch.minimum(high.unsqueeze(-1), edges[1:]) - torch.maximum(low.unsqueeze(-1), edges[:-1])
    overlap = overlap.clamp_min(0)
    return overlap / overlap.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(low.dtype).tiny)


def fractional_boxes(boxes: Any, image_size: tuple[int, int], image_id: int | str) -> np.ndarray:
    """One image's boxes as fractions of it, (R, 4) float32.

    Args:
        boxes: (R, 4) xyxy, in pixels of the image where any coordinate is above 1.
        image_size: (width, height) in pixels.
        image_id: For the messages.

    Raises:
        ValueError: If there is no box, or one is malformed, outside the image, or without area.
    """
    found = np.asarray(boxes, dtype=np.float64)
    if found.ndim != 2 or found.shape[1:] != (4,) or not len(found):
        raise ValueError(f"the boxes of image {image_id!r} have shape {found.shape}, expected (at least 1, 4)")
    slack = SLACK
    if found.max() > 1 + SLACK:
        found = found / np.array([*image_size, *image_size])
        slack = PIXEL_SLACK / min(image_size)
    wrong = ~((found >= -slack) & (found <= 1 + slack)).all(axis=1) | (found[:, 2:] <= found[:, :2]).any(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"box {row} of image {image_id!r} is {np.asarray(boxes)[row].tolist()}, expected x1 < x2 and y1 < y2 "
            f"inside the image of {image_size[0]} x {image_size[1]} pixels, as pixels or as fractions of it"
        )
    return np.clip(found, 0, 1).astype(np.float32)
