"""The images of a folder, by the names of its files. Copied to exports that search photographs: it imports nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    ".avif", ".jp2", ".j2k", ".jpx", ".heic", ".heif", ".hif",
)  # fmt: skip


def image_files(folder: Path, onerror: Callable[[OSError], Any] | None = None) -> Iterator[Path]:
    """The images of a folder by their names' ends, at any depth; hidden files and folders, and links that lead out of
    it, are left out.

    Args:
        folder: resolved.
        onerror: told of folders that may not be read, and of files and folders that links lead out to.
    """
    for root, folders, names in os.walk(folder, onerror=onerror):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [path for path in (Path(root, name) for name in folders) if path.is_symlink()]
        linked = [path for path in links if leads_out(path, folder)]
        for name in names:
            path = Path(root, name)
            if path.suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            if path.is_symlink() and leads_out(path, folder):
                linked.append(path)
            else:
                yield path
        if onerror is not None:
            for path in linked:
                onerror(OSError(errno.EXDEV, "a link that leads out of the folder, which is not followed", str(path)))


def leads_out(path: str | os.PathLike[str], folder: Path) -> bool:
    """Whether a path leads out of a (resolved) folder by links; one that leads nowhere stays in it."""
    try:
        return not Path(path).resolve().is_relative_to(folder)
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a name that no file can have
        return False
