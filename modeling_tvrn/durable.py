"""Files that last through a power cut: flushed to the disk before their names are."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["flush", "publish"]


def flush(path: str | os.PathLike[str]) -> None:
    """Bring a file's content, or a folder's names, to the disk.

    Raises:
        OSError: the disk refuses, for instance because it is full.
    """
    if os.name != "posix" and os.path.isdir(path):  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Put a written file in its place: after a power cut it is there whole or not at all.

    Raises:
        OSError: as `flush`; the place is then as it was.
    """
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)
