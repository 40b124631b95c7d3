"""Pictures of any form to RGB, by one function for the whole package; and to pixel values as a Hub image processor
makes them, with a quicker way to the very same pixels.

`to_rgb` decides what a picture looks like: processor, index, tables, page and ONNX runner all ask it.

The quick way resizes in uint8 and looks the values up in a table. A PIL-backed Hub processor converts each photograph
between PIL and NumPy several times and rescales it in float64. Rescaling and normalising map each of the 256 byte
values of a channel to one float, so the processor itself is asked once for those 3 x 256 floats. Whether its resizing
and cropping are the common ones is not guessed from its class either: only a processor that gave the very same pixels
on probe pictures is taken this way.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

logger = logging.getLogger(__name__)

# Pillow's own warning threshold: a quarter of a gigabyte once decoded.
MAX_IMAGE_PIXELS = 89_478_485
MAX_DOWNLOAD = 64 * 2**20  # bytes of a picture behind an address
TIMEOUT = 20.0  # seconds
# Raster formats only. Pillow would also start Ghostscript for an EPS file, whatever the file is called. MPO, phones'
# JPEG with further pictures behind the first, has no opener of its own: JPEG's reads it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
# What white can be, where a picture's numbers are no bytes: of floats, and of integers.
FLOAT_RANGES, INTEGER_RANGES = (1, 255, 65_535), (255, 65_535, 2**31 - 1, 2**32 - 1)
RANGE_SLACK = 1e-3  # of the range: resampling leaves it by a little
_CHANNELS = (1, 3, 4)
_EXIF_ORIENTATION = 0x0112
_EXIF_SOURCES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # in `info`; TIFF's tags apart

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


def padded_pixels(
    image_processor: Any, images: Sequence[PIL.Image.Image], **settings: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels of an image processor that `pads`, made picture by picture: none depends on the others of its batch.

    Returns:
        Pixel values `(B, 3, H, W)`, 0 where a picture ends before the largest; and `(B, 2)` float32 its height and
        width as fractions of them, None where all pictures fill them.
    """
    squares = type(image_processor).__name__.startswith("Owlv2")
    settings |= {} if squares else {"do_pad": False}
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


def rgb_images(images: Any, files: bool = False, web: bool = False) -> list[PIL.Image.Image]:
    """Each image as `to_rgb` shows it.

    Args:
        images: a PIL image, an array or tensor `(H, W)`, `(H, W, C)` or `(C, H, W)` of 1, 3 or 4 channels, `(B, ...)`
            of them, any iterable of these, or lists of lists. Where both ends could be the channels, a tensor has them
            first and a NumPy array last. Numbers that are no bytes as in `to_rgb`.
        files: also take paths and encoded bytes. Only of what the user names: data could name any file.
        web: also take http(s) addresses. Of the user's own argument alone.

    Raises:
        ValueError: zero images, or one that is none: the message names it.
    """
    lone = isinstance(images, PIL.Image.Image | str | os.PathLike | bytes | bytearray | memoryview)
    if lone or (hasattr(images, "ndim") and images.ndim in (2, 3)):
        images = [images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise ValueError(f"images is {type(images).__name__} {images!r:.80}: expected a picture, or several")
    # one level of nesting: some processors have one list of pictures for each text
    flat = [one for image in images for one in (image if isinstance(image, list | tuple) else [image])]
    if not flat:
        raise ValueError("images holds zero images: pass at least one")
    found = []
    for i, image in enumerate(flat):
        try:
            # a user's own picture stays open
            given = contextlib.nullcontext(image) if isinstance(image, PIL.Image.Image) else _opened(image, files, web)
            with given as picture:
                found.append(to_rgb(picture))
        except Exception as error:  # Pillow's decoders raise almost anything on corrupt data
            why = str(error) if isinstance(error, ValueError) else f"cannot be read ({type(error).__name__}: {error})"
            name = f" ({os.fspath(image)!r:.200})" if files and isinstance(image, str | os.PathLike) else ""
            raise ValueError(f"images[{i}]{name} {why}") from error
    return found


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture as a viewer shows it: upright by its EXIF orientation, 8 bits a channel, transparency over white.

    16-bit grey is scaled. What is white is not written in pictures of floats and 32-bit integers: it is the smallest
    of 1, 255 and 65535, or of 255, 65535, 2^31 - 1 and 2^32 - 1, that is not below their largest number.

    Raises:
        ValueError: no pixels, or numbers that are negative, NaN or too large.
    """
    picture.load()  # some formats say how they are held behind their pixels
    if 0 in picture.size:
        raise ValueError(f"has width and height {picture.size}: no pixels; leave it out")
    if _may_lie(picture) and picture.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = PIL.Image.fromarray(_to_bytes(np.asarray(picture)))
    if picture.mode == "RGB" and picture.info.get("transparency") is None:
        # A plain Image, free of the file and of the decoder's plugin class. Its pixels need not be copied, unless they
        # are those of a mapped file.
        return picture.copy() if picture.readonly else picture._new(picture.im)
    if picture.has_transparency_data and picture.info.get("transparency", 0) is not None:
        # the colour under full transparency is arbitrary: show it as on a page
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def known_formats() -> list[str]:
    """Of `FORMATS` those that this Pillow has: the last ones need a new one, or a plug-in."""
    PIL.Image.preinit()
    if any(name not in PIL.Image.OPEN for name in FORMATS):
        PIL.Image.init()
    return [name for name in FORMATS if name in PIL.Image.OPEN]


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


def _opened(image: Any, files: bool, web: bool) -> PIL.Image.Image:
    """An image that is not Pillow's as Pillow's; a file is not decoded yet."""
    if hasattr(image, "shape"):
        return _from_array(image)
    if not files or not isinstance(image, str | os.PathLike | bytes | bytearray | memoryview):
        raise ValueError(
            f"is {type(image).__name__} {image!r:.80}: expected a PIL image or an array"
            + ("; files of data are read by load_pairs" if isinstance(image, str | os.PathLike) else "")
        )
    if web and isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        source: Any = io.BytesIO(_downloaded(image))
    elif not isinstance(image, str | os.PathLike):
        source = io.BytesIO(image)
    elif os.path.isfile(image):  # a pipe would be waited for, a device never ends
        source = image
    else:
        raise ValueError("is no plain file" if os.path.exists(image) else "is no file; captions go to text=")
    try:
        picture = PIL.Image.open(source, formats=known_formats())
    except PIL.UnidentifiedImageError as error:
        raise ValueError("is no picture that Pillow reads; look at what it holds") from error
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        picture.close()
        raise ValueError(f"is {picture.width} x {picture.height}, over {MAX_IMAGE_PIXELS} pixels")
    return picture


def _downloaded(address: str) -> bytes:
    opener = urllib.request.OpenerDirector()  # not build_opener, which reads files and FTP as well
    for handler in (
        *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
        *(urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor),
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(address, headers={"User-Agent": "modeling_tvrn"})
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            content: bytes = response.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be fetched ({error}); fetch it yourself and pass the file") from error
    if len(content) > MAX_DOWNLOAD:
        raise ValueError(f"holds more than {MAX_DOWNLOAD >> 20} MB; fetch it yourself and pass the file")
    return content


def _from_array(image: Any) -> PIL.Image.Image:
    is_tensor = hasattr(image, "detach")
    if is_tensor:
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # NumPy has no bfloat16
    array = np.asarray(image)
    shape = array.shape
    first, last = (array.ndim == 3 and shape[end] in _CHANNELS for end in (0, -1))
    if first and (is_tensor or not last):
        array, last = np.moveaxis(array, 0, -1), True
    if 0 in shape or not (array.ndim == 2 or last):
        raise ValueError(
            f"is a {array.dtype} array of shape {shape}: expected (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 "
            "channels"
        )
    array = _to_bytes(array)
    grey = array.ndim == 3 and array.shape[-1] == 1
    return PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if grey else array))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Numbers of any range as bytes, see `to_rgb`."""
    if values.dtype == np.uint8:
        return values
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind not in "uif":
        raise ValueError(f"holds {values.dtype}: expected integers or floats")
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("holds NaN or infinity: expected finite numbers")
    slack = RANGE_SLACK if kind == "f" else 0.0
    ranges: tuple[int, ...] = FLOAT_RANGES if kind == "f" else INTEGER_RANGES
    if kind == "u" and values.dtype.itemsize == 2:  # a dark picture of 16 bits is not one of 8
        ranges = ranges[1:]
    white = next((top for top in ranges if high <= top * (1 + slack)), None)
    if white is None or low < -slack * white:
        raise ValueError(
            f"holds numbers from {low:.6g} to {high:.6g}: expected 0 to 1 (floats), 255 or 65535; what is normalised "
            "already goes to the model as pixel_values"
        )
    return np.rint(values.astype(np.float32) * np.float32(255 / white)).clip(0, 255).astype(np.uint8)


def _may_lie(picture: PIL.Image.Image) -> bool:
    """Whether a picture says how the camera was held; asking Pillow costs a twentieth of decoding a small one."""
    return hasattr(picture, "tag_v2") or any(name in picture.info for name in _EXIF_SOURCES)


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
