"""What a file is that is no readable image, in words: an HTML page, a Git LFS pointer, HEIC, a named pipe."""

from __future__ import annotations

import codecs
import os
import stat

HEAD = 1024  # bytes that tell what a file is
HEIC = "HEIC; pip install pillow-heif to read it"
# What goes wrong when photographs are downloaded, exported or copied; the longer beginnings first.
_MAGIC = (
    (b"version https://git-lfs.github.com/spec", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer; fetch the file itself with `git annex get`"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL; convert it to JPEG or PNG"),
    (b"\xff\x0a", "JPEG XL; convert it to JPEG or PNG"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "PostScript, which is not run; convert it to PNG"),
    (b"\xc5\xd0\xd3\xc6", "PostScript, which is not run; convert it to PNG"),
    (b"8BPS", "a Photoshop document; convert it to PNG"),
    (b"\x00\x00\x01\x00", "an icon (ICO); convert it to PNG"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip-compressed data; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"PAR1", "a parquet table"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
    (b"\x00\x05\x16\x07", "macOS metadata (AppleDouble), without the photograph"),
)
# Beginnings of formats that are read: such a file is damaged, not of another kind.
_RASTER = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of_content(head: bytes) -> str | None:
    """What a file is that is no image of a format that is read; None for damaged images and for what nobody knows.

    Args:
        head: its first `HEAD` bytes, or all of it.
    """
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] != b"WEBP":
        return "a video (AVI)" if head[8:12] == b"AVI " else "a RIFF file, such as sound"
    if head[4:8] == b"ftyp":
        brands = _brands(head)
        if brands & {b"avif", b"avis"}:
            return None
        return HEIC if brands & _HEIC_BRANDS else "a video (MP4 or QuickTime)"
    return None if _begun_format(head) else _kind_of_text(head)


def kind_in_place_of_text(head: bytes) -> str | None:
    """What a file is that should be a table of text, such as a Git LFS pointer or a server's page; None for text."""
    text = _as_text(head)
    is_other = text is None or text.lstrip().startswith(("<", "version https://git-lfs", "/annex/objects/"))
    return kind_of_content(head) if is_other else None


def kind_of_damage(head: bytes) -> str:
    """What is wrong with a file of which `kind_of_content` says nothing."""
    if not head:
        return "empty (0 bytes)"
    if not head.strip(b"\x00"):
        return "nothing but zeros, as a broken download or disk leaves it"
    begun = _begun_format(head)
    return f"{begun} with a damaged header" if begun else f"of no known format (begins with {head[:8].hex(' ')})"


def _begun_format(head: bytes) -> str | None:
    """The image format that a file begins like."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp" and _brands(head) & {b"avif", b"avis"}:
        return "AVIF"
    if head[4:8] == b"ftyp" and _brands(head) & _HEIC_BRANDS:
        return "HEIC"
    return next((name for magic, name in _RASTER if head.startswith(magic)), None)


def _brands(head: bytes) -> set[bytes]:
    """The brands of an ISO media file (HEIC, AVIF, MP4): its first one, and those that it also goes by."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[start : start + 4] for start in range(16, end, 4))}


def _kind_of_text(head: bytes) -> str | None:
    """What kind of text it is; None for what is none."""
    text = _as_text(head)
    if not text:
        return None
    start = text.strip().lower()
    if "<svg" in start:
        return "SVG, a drawing; convert it to PNG"
    if start.startswith("<!doctype html") or "<html" in start or "<head" in start or "<body" in start:
        return "an HTML page, such as a server's error message"
    if start.startswith("<?xml"):
        return "XML, such as a server's error message"
    if start.startswith(("{", "[")):
        return "JSON text"
    return f"text ({' '.join(text.split())[:40]!r})" if start else "blank text"


def _as_text(head: bytes) -> str | None:
    """The bytes as text without control characters; a letter that the end cuts in two is left out."""
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return None
    return None if any(not letter.isprintable() and not letter.isspace() for letter in text) else text


def kind_of_file(mode: int) -> str | None:
    """What a path leads to in place of a file, by its `st_mode`; None for a plain file."""
    return next((kind for test, kind in _SPECIAL if test(mode)), None)


def why_unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    """Why a path cannot be read, without Python's names for it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        dangling = os.path.islink(path)
        return f"a link to {printable(os.readlink(path))}, which is not there" if dangling else "there is no such file"
    if isinstance(error, OSError):
        return error.strerror or str(error)  # "Permission denied", "Too many levels of symbolic links"
    return str(error)


def printable(name: str | os.PathLike[str]) -> str:
    r"""A name as it can be printed and stored: bytes that are no UTF-8 become `\xe9`, lone surrogates `\ud800`."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return os.fspath(name).encode("utf-8", "backslashreplace").decode()


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8: it holds no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
