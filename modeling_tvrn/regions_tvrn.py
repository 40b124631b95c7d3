"""Region inputs made ready for a batch: checked, padded to one length, boxes as fractions of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

BOX_SLACK = 1e-4  # a box divided by its image's size in float32 may end a rounding above 1
PIXEL_SLACK = 1.0  # detectors disagree by one pixel on where an image ends


def pad_regions(
    region_features: Any, region_boxes: Any = None, region_mask: Any = None, image_sizes: Any = None
) -> dict[str, np.ndarray]:
    """Check the regions of B images and pad them to the longest, R.

    Args:
        region_features: `(B, R, F)`, one image's `(R, F)`, or a list of B arrays `(R_i, F)`.
        region_boxes: xyxy, `(B, R, 4)`, `(R, 4)` or a list of `(R_i, 4)`: fractions of the image in [0, 1], or pixels
            where `image_sizes` is given. Optional.
        region_mask: `(B, R)`, `(R,)` or a list of `(R_i,)`, 1 for the regions to use. Optional: all of them.
        image_sizes: B pairs (height, width) in pixels; the boxes are then divided by them.

    Returns:
        `region_features (B, R, F)` float32, `region_mask (B, R)` bool and, with boxes, `region_boxes (B, R, 4)`
        float32 in [0, 1]. Whatever the mask leaves out is zero.

    Raises:
        ValueError: wrong shapes, no images, an image without regions, NaN or infinite features, pixel boxes without
            sizes, boxes outside the image or with x2 < x1 or y2 < y1.
    """
    features = _split_images(region_features, "region_features", "(regions, features)", ndim=2)
    widths = sorted({array.shape[1] for array in features})
    if len(widths) > 1:
        raise ValueError(f"region_features have {widths} columns in one batch: every region needs the same number")
    counts = [len(array) for array in features]
    mask = _pad(_keep_rows(region_mask, counts))
    padded = {"region_features": _masked(_pad(features), mask), "region_mask": mask}
    _check_finite(padded["region_features"])
    if region_boxes is not None:
        boxes = _split_images(region_boxes, "region_boxes", "(regions, 4)", ndim=2)
        _check_counts("region_boxes", boxes, counts)
        padded["region_boxes"] = _relative_boxes(_masked(_pad(boxes), mask), mask, image_sizes)
    elif image_sizes is not None:
        raise ValueError("image_sizes turn pixel boxes into fractions, but region_boxes is missing: pass both")
    return padded


def _split_images(value: Any, name: str, shape: str, ndim: int) -> list[np.ndarray]:
    """One float32 array of `ndim` dimensions for each image."""
    images = list(value) if isinstance(value, (list, tuple)) else _split_array(value, name, shape, ndim)
    if not images:
        raise ValueError(f"{name} holds zero images: pass at least one")
    arrays = [_to_numpy(image, f"{name}[{i}]") for i, image in enumerate(images)]
    for i, array in enumerate(arrays):
        if array.ndim != ndim:
            raise ValueError(f"{name}[{i}] has shape {array.shape}, expected {shape}: pass one such array an image")
    return arrays


def _split_array(value: Any, name: str, shape: str, ndim: int) -> list[Any]:
    array = _to_numpy(value, name)
    if array.ndim == ndim:
        return [array]
    if array.ndim != ndim + 1:
        raise ValueError(
            f"{name} has shape {array.shape}, expected {shape} for one image, (images, {shape[1:]} for a batch, "
            "or a list with one array an image"
        )
    return list(array)


def _to_numpy(value: Any, name: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()  # float first: NumPy has no bfloat16
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no numeric array ({type(value).__name__}: {error})") from error


def _keep_rows(region_mask: Any, counts: Sequence[int]) -> list[np.ndarray]:
    """The regions to use of each image, all where no mask is given; every image must keep one."""
    if region_mask is None:
        rows = [np.ones(count, dtype=bool) for count in counts]
    else:
        values = _split_images(region_mask, "region_mask", "(regions,)", ndim=1)
        _check_counts("region_mask", values, counts)
        rows = [value > 0 for value in values]
    empty = [i for i, row in enumerate(rows) if not row.any()]
    if empty:
        raise ValueError(
            f"region_mask keeps no region of image {empty[0]} ({len(empty)} such images, {counts[empty[0]]} regions "
            "given): every image needs at least one; leave the others out of the batch"
        )
    return rows


def _check_counts(name: str, values: Sequence[np.ndarray], counts: Sequence[int]) -> None:
    if len(values) != len(counts):
        raise ValueError(f"{name} holds {len(values)} images, region_features {len(counts)}: pass the same images")
    for i, (value, count) in enumerate(zip(values, counts, strict=True)):
        if len(value) != count:
            raise ValueError(f"{name}[{i}] has {len(value)} regions, region_features[{i}] has {count}: one each")
        if name == "region_boxes" and value.shape[1] != 4:
            raise ValueError(f"region_boxes[{i}] has shape {value.shape}, expected ({count}, 4): x1, y1, x2, y2")


def _pad(rows: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.zeros((len(rows), max(len(row) for row in rows), *rows[0].shape[1:]), dtype=rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    values[~mask] = 0  # assigned, not multiplied: NaN times 0 is NaN
    return values


def _check_finite(features: np.ndarray) -> None:
    if not np.isfinite(features).all():
        image, region, column = np.argwhere(~np.isfinite(features))[0]
        raise ValueError(
            f"region_features[{image}][{region}] holds {features[image, region, column]} in column {column}: expected "
            "finite numbers; extract this image again, or mask the region out with region_mask"
        )


def _relative_boxes(boxes: np.ndarray, mask: np.ndarray, image_sizes: Any) -> np.ndarray:
    """Boxes as fractions of the image, clipped to [0, 1]."""
    if image_sizes is None:
        _check_boxes(boxes, mask, np.ones((len(boxes), 2), dtype=np.float32), BOX_SLACK)
        return np.clip(boxes, 0, 1)
    sizes = _check_sizes(image_sizes, len(boxes))
    _refuse_relative(boxes, sizes)
    _check_boxes(boxes, mask, sizes, PIXEL_SLACK)
    return np.clip(boxes / sizes[:, None, [1, 0, 1, 0]], 0, 1)


def _check_sizes(image_sizes: Any, count: int) -> np.ndarray:
    sizes = np.atleast_2d(_to_numpy(image_sizes, "image_sizes"))
    if sizes.shape != (count, 2):
        raise ValueError(f"image_sizes has shape {sizes.shape}, expected ({count}, 2): (height, width) of each image")
    if not (sizes > 0).all():
        raise ValueError(f"image_sizes {sizes.tolist()} must be positive pixels (height, width)")
    return sizes


def _refuse_relative(boxes: np.ndarray, sizes: np.ndarray) -> None:
    """Dividing fractions by the image's size would shrink every box to a point without a word."""
    largest = boxes.max(axis=(1, 2))
    for i in np.flatnonzero((largest <= 1) & (sizes.min(axis=1) > 2)):
        raise ValueError(
            f"image_sizes makes region_boxes pixels, but the largest coordinate of image {i} is {largest[i]:g} "
            f"(its size is {sizes[i].tolist()}): leave image_sizes out where boxes are fractions already"
        )


def _check_boxes(boxes: np.ndarray, mask: np.ndarray, sizes: np.ndarray, slack: float) -> None:
    limits = sizes[:, None, [1, 0, 1, 0]]
    with np.errstate(invalid="ignore"):
        outside = ~((boxes >= -slack) & (boxes <= limits + slack)).all(axis=-1) & mask
        flipped = (boxes[..., 2:] < boxes[..., :2]).any(axis=-1) & mask
    if outside.any():
        image, region = np.argwhere(outside)[0]
        raise ValueError(_describe_outside(boxes[image, region], image, region, limits[image, 0], slack))
    if flipped.any():
        image, region = np.argwhere(flipped)[0]
        raise ValueError(
            f"region_boxes[{image}][{region}] is {boxes[image, region].tolist()}: x2 < x1 or y2 < y1; expected "
            "corners (x1, y1, x2, y2), not (x, y, width, height)"
        )


def _describe_outside(box: np.ndarray, image: int, region: int, limits: np.ndarray, slack: float) -> str:
    where = f"region_boxes[{image}][{region}] is {box.tolist()}"
    if slack == PIXEL_SLACK:
        width, height = limits[0], limits[1]
        return (
            f"{where}: outside its image of height {height:g} and width {width:g}; check image_sizes (height, width)"
        )
    return (
        f"{where}: expected x1, y1, x2, y2 in [0, 1], fractions of the image; for boxes in pixels pass "
        "image_sizes=[(height, width), ...]"
    )
