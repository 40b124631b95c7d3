"""Photographs to pixel values: as a Hub image processor makes them, and a quicker way to the very same pixels.

The quick way resizes in uint8 and looks the values up in a table. A PIL-backed Hub processor converts each photograph
between PIL and NumPy several times and rescales it in float64. Rescaling and normalising map each of the 256 byte
values of a channel to one float, so the processor itself is asked once for those 3 x 256 floats. Whether its resizing
and cropping are the common ones is not guessed from its class either: only a processor that gave the very same pixels
on probe pictures is taken this way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

logger = logging.getLogger(__name__)

# Image processors of detectors that pad: to the largest of a batch, OWLv2's each picture to a square.
PADDING = ("DetrImageProcessor", "DeformableDetrImageProcessor", "YolosImageProcessor", "Owlv2ImageProcessor")
# (width, height) of the probes: both orientations, odd sizes, smaller and larger than the usual targets, one very long
PROBE_SIZES = ((53, 37), (41, 64), (301, 440), (190, 31))


@dataclass(frozen=True)
class PixelTable:
    """What the common image processor does, as data: made by `pixel_table`, never by hand.

    Args:
        size: the processor's target, height and width or the shortest edge; None: no resizing.
        crop: (width, height) of the centre crop, or None.
        resample: PIL's resampling filter.
        values: `(3, 256)` float32, what each byte of each channel becomes.
    """

    size: dict[str, int] | None
    crop: tuple[int, int] | None
    resample: int | None
    values: np.ndarray

    def pixels(self, images: Sequence[PIL.Image.Image]) -> np.ndarray | None:
        """Pixel values `(B, 3, H, W)` float32 of RGB images; None where the processor has to do it itself."""
        resized = [self._resize(image) for image in images]
        if any(image is None for image in resized):
            return None
        ready = [image for image in resized if image is not None]
        if len({image.size for image in ready}) != 1:
            return None
        pixels = np.empty((len(ready), 3, ready[0].height, ready[0].width), dtype=np.float32)
        for target, image in zip(pixels, ready, strict=True):
            for channel, band in enumerate(image.split()):
                # mode="clip" never clips a byte here; it spares NumPy a buffered copy of the output
                np.take(self.values[channel], np.asarray(band), out=target[channel], mode="clip")
        return pixels

    def _resize(self, image: PIL.Image.Image) -> PIL.Image.Image | None:
        target = image.size if self.size is None else _target_size(image.size, self.size)
        if image.size != target:
            image = image.resize(target, resample=self.resample)
        if self.crop is None:
            return image
        width, height = self.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        if left < 0 or top < 0:  # such an image is padded: the processor's business
            return None
        return image.crop((left, top, left + width, top + height))


def pixel_table(image_processor: Any) -> PixelTable | None:
    """The table of a Hub image processor as it is set now, or None if its pixels are not to be had this way."""
    if getattr(image_processor, "backend", None) != "pil" or getattr(image_processor, "do_pad", None):
        return None
    size = dict(image_processor.size) if image_processor.do_resize else None
    if size is not None and set(size) not in ({"height", "width"}, {"shortest_edge"}):
        return None
    crop_size = image_processor.crop_size if image_processor.do_center_crop else None
    crop = (crop_size["width"], crop_size["height"]) if crop_size else None
    values = _byte_values(image_processor)
    if values is None:
        return None
    table = PixelTable(size, crop, getattr(image_processor, "resample", None), values)
    if _same_pixels(table, image_processor):
        return table
    logger.debug("%s resizes or crops in its own way: its pixels come from itself", type(image_processor).__name__)
    return None


def hub_pixels(image_processor: Any, images: Sequence[Any], **settings: Any) -> np.ndarray:
    """Pixel values `(B, C, H, W)` float32 as the Hub image processor makes them.

    Raises:
        ValueError: the processor leaves the images at different shapes, which no batch can hold.
    """
    output = image_processor(images=list(images), **settings)["pixel_values"]
    arrays = [np.asarray(array) for array in output]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"{type(image_processor).__name__} leaves the images of a batch at different shapes {shapes}: set its "
            "size to a height and a width, or do_center_crop=True, or give image_size to TVRNProcessor.from_backbones"
        )
    return np.stack(arrays).astype(np.float32, copy=False)


def pads(image_processor: Any) -> bool:
    """Whether an image processor is a detector's that pads pictures."""
    return bool(getattr(image_processor, "do_pad", None)) and type(image_processor).__name__.startswith(PADDING)


def padded_pixels(image_processor: Any, images: Sequence[PIL.Image.Image]) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels of an image processor that `pads`, made picture by picture: none depends on the others of its batch.

    Returns:
        Pixel values `(B, 3, H, W)`, 0 where a picture ends before the largest; and `(B, 2)` float32 its height and
        width as fractions of them, None where all pictures fill them.
    """
    squares = type(image_processor).__name__.startswith("Owlv2")
    settings = {} if squares else {"do_pad": False}
    found = [hub_pixels(image_processor, [image], **settings)[0] for image in images]
    size = np.max([pixels.shape[1:] for pixels in found], axis=0)
    padded = np.zeros((len(found), found[0].shape[0], *size), dtype=np.float32)
    for target, pixels in zip(padded, found, strict=True):
        target[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    if squares:
        extents = [np.divide((image.height, image.width), max(image.size)) for image in images]
    else:
        extents = [pixels.shape[1:] / size for pixels in found]
    return padded, None if np.all(np.equal(extents, 1)) else np.asarray(extents, np.float32)


def rgb_images(images: Any) -> list[PIL.Image.Image]:
    """Each image as RGB, transparency over white.

    Args:
        images: a PIL image, a uint8 array or tensor `(H, W)`, `(H, W, C)` or `(C, H, W)`, a list of these, or
            `(B, ...)` of them.

    Raises:
        ValueError: zero images, an image without pixels, or something that is no image.
    """
    if isinstance(images, PIL.Image.Image) or (hasattr(images, "ndim") and images.ndim in (2, 3)):
        images = [images]
    images = list(images)
    if not images:
        raise ValueError("images holds zero images: pass at least one")
    return [_to_rgb(image, i) for i, image in enumerate(images)]


def with_image_size(image_processor: Any, image_size: int) -> Any:
    """The image processor set to bring images to `image_size` x `image_size`, with the same part cropped away.

    Raises:
        ValueError: `image_size` is no positive integer.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size={image_size!r}: expected the side of a square in pixels, a positive integer")
    settings = image_processor.to_dict()
    square = {"height": image_size, "width": image_size}
    size = dict(image_processor.size)
    if settings.get("do_center_crop"):
        scale = image_size / image_processor.crop_size["height"]
        settings["size"] = {edge: round(length * scale) for edge, length in size.items()}
        settings["crop_size"] = square
    else:
        settings["size"] = {"shortest_edge": image_size} if "shortest_edge" in size else square
    return type(image_processor).from_dict(settings)


def resize_only(image_processor: Any) -> Any:
    """Make an image processor squeeze the whole photograph into its size, without cropping or padding.

    Fractions of the photograph are then fractions of the pixels, whatever the aspect ratio. Changed in place.
    """
    if getattr(image_processor, "do_center_crop", None):
        if getattr(image_processor, "crop_size", None):
            image_processor.size = dict(image_processor.crop_size)
        image_processor.do_center_crop = False
    if getattr(image_processor, "do_pad", None):
        image_processor.do_pad = False
    size = dict(image_processor.size)
    edge = size.get("shortest_edge") or size.get("longest_edge")
    if edge:
        image_processor.size = {"height": edge, "width": edge}
    return image_processor


def _to_rgb(image: Any, index: int) -> PIL.Image.Image:
    picture = image if isinstance(image, PIL.Image.Image) else _from_array(image, index)
    if 0 in picture.size:
        raise ValueError(f"images[{index}] has width and height {picture.size}: no pixels; leave it out")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_array(image: Any, index: int) -> PIL.Image.Image:
    if not hasattr(image, "shape"):
        raise ValueError(
            f"images[{index}] is {type(image).__name__} {image!r:.80}: expected a PIL image or a uint8 array; open a "
            "file with PIL.Image.open"
        )
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))):
        raise ValueError(
            f"images[{index}] is a {array.dtype} array of shape {np.shape(image)}: expected uint8, 0 to 255, of shape "
            "(H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels"
        )
    return PIL.Image.fromarray(np.ascontiguousarray(array.squeeze(-1) if array.shape[-1] == 1 else array))


def _byte_values(image_processor: Any) -> np.ndarray | None:
    """The float each byte becomes, `(3, 256)`: the processor's own output for a picture of all 256 greys."""
    greys = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    values = hub_pixels(image_processor, [PIL.Image.fromarray(greys)], do_resize=False, do_center_crop=False)[0]
    return np.ascontiguousarray(values.reshape(3, 256)) if values.shape == (3, 16, 16) else None


def _same_pixels(table: PixelTable, image_processor: Any) -> bool:
    random = np.random.default_rng(0)
    compared = 0
    for width, height in PROBE_SIZES:
        probe = PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels = table.pixels([probe])
        if pixels is None:
            continue
        if not np.array_equal(pixels, hub_pixels(image_processor, [probe])):
            return False
        compared += 1
    return compared > 1


def _target_size(size: tuple[int, int], target: dict[str, int]) -> tuple[int, int]:
    """PIL's (width, height) after resizing to `target`."""
    if "shortest_edge" not in target:
        return target["width"], target["height"]
    # Cut, not rounded: so do transformers and torchvision.
    (width, height), short = size, target["shortest_edge"]
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
