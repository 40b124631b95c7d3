"""Encoded images: checked cheaply, decoded to RGB, bounded in size."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import PIL.Image

from ..pixels_tvrn import MAX_IMAGE_PIXELS as MAX_IMAGE_PIXELS
from ..pixels_tvrn import known_formats, to_rgb
from .file_kinds import HEAD, HEIC, kind_of_content, kind_of_damage, kind_of_file, printable, why_unreadable
from .skipped import CORRUPT_IMAGE, HUGE_IMAGE, MISSING_IMAGE, NO_IMAGE, UNREADABLE_FILE, Unusable

Check = Literal["header", "full", False]

KEPT_BLOCKS = 64
_TAIL = 64  # bytes at the end of a file in which its end marker is looked for

# encoded bytes, a file, what `datasets` makes of an image that it does not decode, or a picture
EncodedImage = bytes | memoryview | str | os.PathLike[str] | Mapping[str, Any] | PIL.Image.Image


class ImageError(Unusable):
    """An image that cannot be used; `reason` is the heading under which it is counted, `why` says more in words."""


def decode_image(encoded: EncodedImage, max_pixels: int = MAX_IMAGE_PIXELS) -> PIL.Image.Image:
    """Decode to RGB, see `to_rgb`; the first frame of an animation.

    Raises:
        ImageError: missing, corrupt, cut short, or of more than `max_pixels` pixels.
    """
    with _opened(encoded, max_pixels) as image:
        try:
            return to_rgb(image)
        except Exception as error:  # Pillow's decoders raise almost anything on corrupt data
            raise _corrupt(encoded, error) from error


def keep_image_memory(worker: int = 0) -> None:
    """Let Pillow use the memory of freed pictures again, in this process; for one that decodes batch after batch.

    Otherwise every picture of a batch gets fresh pages from the system, which costs a fifth of decoding small ones.
    Up to `KEPT_BLOCKS` blocks stay, each of a picture's size and at most 16 MB; PILLOW_BLOCKS_MAX in the environment
    wins.

    Args:
        worker: a data loader's, which calls this with its number (`worker_init_fn`).
    """
    if "PILLOW_BLOCKS_MAX" not in os.environ:
        cast(Any, PIL.Image).core.set_blocks_max(KEPT_BLOCKS)


def check_image(encoded: EncodedImage, how: Check, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Find out whether an image can be used.

    Args:
        how: "full" decodes it; "header" reads its header and looks for the end of the file's data, and decodes only
            where that end is not found, so that files cut short are caught at a hundredth of the cost.

    Raises:
        ImageError: as `decode_image` does; "header" does not see damage in the middle of the data.
    """
    if how is False:
        return
    if how == "full":
        decode_image(encoded, max_pixels)
        return
    with _opened(encoded, max_pixels) as image:
        try:
            whole = _is_whole(image.format, encoded)
        except OSError as error:  # gone since it was opened
            raise _unreadable(_described(encoded), error) from error
    if not whole:
        decode_image(encoded, max_pixels)


def _opened(encoded: EncodedImage, max_pixels: int) -> PIL.Image.Image:
    """The image with its header read and its size within bounds."""
    image = encoded.copy() if isinstance(encoded, PIL.Image.Image) else _identified(encoded)  # the caller closes it
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        why = f"{width} x {height}, over {max_pixels} pixels"
        raise ImageError(HUGE_IMAGE, f"{_described(encoded)} is {why}", why)
    return image


def _identified(encoded: EncodedImage) -> PIL.Image.Image:
    """The image with its header read, by the first format that takes it."""
    file = _as_file(encoded)
    try:
        return PIL.Image.open(file, formats=known_formats())
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(HUGE_IMAGE, f"{_described(encoded)}: {error}", str(error)) from error
    except OSError as error:
        if error.errno is not None:  # gone since it was looked at
            raise _unreadable(_described(encoded), error) from error
        kind = kind_of_content(_head(encoded))
        if kind == HEIC and _registers_heif():
            return _identified(encoded)
        if kind is None or (kind == HEIC and "HEIF" in PIL.Image.OPEN):
            raise _corrupt(encoded, error) from error
        raise ImageError(NO_IMAGE, f"{_described(encoded)}: {kind}", kind) from error
    except Exception as error:
        raise _corrupt(encoded, error) from error


def _registers_heif() -> bool:
    """Whether HEIC can be read from now on: its plug-in is there, and nobody had registered it."""
    if "HEIF" in PIL.Image.OPEN:
        return False
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return "HEIF" in PIL.Image.OPEN


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a plain file.

    Raises:
        ImageError: there is none, it may not be read, or the path leads to a pipe, a socket, a device or a folder.
    """
    check_image_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def check_image_file(path: str | os.PathLike[str]) -> None:
    """Refuse what would block, never end, or cannot be opened.

    Raises:
        ImageError: as `read_image_file`.
    """
    try:
        kind = kind_of_file(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # a ValueError: a name with a null character, or with lone surrogates
        raise _unreadable(path, error) from error
    if kind is not None:
        raise ImageError(UNREADABLE_FILE, f"{printable(path)}: {kind}", kind)


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ImageError:
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    why = why_unreadable(path, error)
    return ImageError(MISSING_IMAGE if missing else UNREADABLE_FILE, f"{printable(path)}: {why}", why)


def _head(encoded: EncodedImage) -> bytes:
    content = image_content(encoded)
    if not isinstance(content, str | os.PathLike):
        return bytes(memoryview(content)[:HEAD])
    try:
        with open(content, "rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise _unreadable(content, error) from error


def image_content(encoded: Any) -> Any:
    """The bytes or the path that stand behind an encoded image."""
    if isinstance(encoded, Mapping):
        return encoded.get("path") if encoded.get("bytes") is None else encoded["bytes"]
    return encoded


def _as_file(encoded: EncodedImage) -> Any:
    content = image_content(encoded)
    if content is None:
        raise ImageError(MISSING_IMAGE, "the image field is empty")
    if isinstance(content, str | os.PathLike):
        check_image_file(content)
        return Path(content)
    try:
        return io.BytesIO(content)
    except TypeError as error:
        raise ImageError(NO_IMAGE, f"a {type(content).__name__} in place of encoded bytes") from error


def _is_whole(image_format: str | None, encoded: EncodedImage) -> bool:
    """Whether the data end as this format's data do. "No" is a suspicion only: bytes may follow the image."""
    if isinstance(encoded, PIL.Image.Image):
        return True
    size, head, tail = _ends(image_content(encoded))
    if image_format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if image_format in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if image_format == "PNG":
        return b"IEND" in tail
    return False


def _ends(content: Any) -> tuple[int, bytes, bytes]:
    """Size, first and last bytes of a file or of bytes."""
    if not isinstance(content, str | os.PathLike):
        view = memoryview(content)
        return len(view), bytes(view[:16]), bytes(view[-_TAIL:])
    with open(content, "rb") as file:
        head = file.read(16)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        return size, head, file.read()


def _corrupt(encoded: EncodedImage, error: Exception) -> ImageError:
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, PIL.UnidentifiedImageError):
        why = kind_of_damage(_head(encoded))
    return ImageError(CORRUPT_IMAGE, f"{_described(encoded)}: {why}", why)


def _described(encoded: EncodedImage) -> str:
    content = image_content(encoded)
    if isinstance(content, str | os.PathLike):
        return printable(content)
    if isinstance(content, PIL.Image.Image):
        return f"a {content.mode} picture"
    return f"{len(content)} bytes"
