"""Files that last through a power cut, flushed to the disk before their names are; and one writer at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

__all__ = ["flush", "lock", "publish"]


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


def lock(file: IO[str], wait: bool = False) -> None:
    """Take the lock of an open file; the system lets go of it when the file is closed or the process ends.

    Args:
        wait: until another process lets go of it.

    Raises:
        OSError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        mode = getattr(msvcrt, "LK_LOCK" if wait else "LK_NBLCK")
        getattr(msvcrt, "locking")(file.fileno(), mode, 1)  # noqa: B009 (absent elsewhere)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def publish(temporary: Path, path: Path) -> None:
    """Put a written file in its place: after a power cut it is there whole or not at all.

    Raises:
        OSError: as `flush`; the place is then as it was.
    """
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)
