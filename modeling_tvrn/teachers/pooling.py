"""Boxes of a column, checked."""

from typing import Any

import numpy as np

SLACK = 1e-4  # a pixel box divided in float32 may end a rounding above 1
PIXEL_SLACK = 1.0  # detectors disagree by one pixel on where an image ends


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
