"""A folder whose content changes all at once: numbered versions, a pointer to the current, one builder at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..durable import lock, publish

POINTER, LOCK, VERSIONS = "current.json", "build.lock", "versions"
FORMAT, FORMAT_VERSION = "tvrn-index", 1


class IndexBusyError(OSError):
    """Another process is building the same index."""


@contextlib.contextmanager
def building(directory: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it when the process ends, however it ends.

    Raises:
        IndexBusyError: If another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "a+", encoding="utf-8") as file:
        try:
            lock(file)
        except OSError as error:
            file.seek(0)
            raise IndexBusyError(
                f"another build of the index in {directory} is running (process {file.read().strip() or 'unknown'}); "
                "wait until it is done, or build into another folder"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def current(directory: Path) -> Path | None:
    """The folder of the current version; None where nothing was finished yet.

    Raises:
        ValueError: If the pointer is of something else, or of a newer release.
    """
    path = directory / POINTER
    if not path.exists():
        return None
    try:
        pointer = json.loads(path.read_text("utf-8"))
        found = (pointer["format"], pointer["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the pointer of an index ({type(error).__name__}: {error})") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{path} is {found[0]!r} version {found[1]!r}; this release reads {FORMAT!r} {FORMAT_VERSION}"
        )
    return directory / VERSIONS / str(pointer["version"])


def next_version(directory: Path) -> Path:
    """A fresh folder for the next version; what an interrupted build left of it is dropped."""
    latest = current(directory)
    number = 1 if latest is None else int(latest.name) + 1
    path = directory / VERSIONS / f"{number:06d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def switch_to(directory: Path, version: Path) -> None:
    """Make a version the current one. Whoever opens the folder sees the old one whole, or the new one whole."""
    pointer: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "version": version.name}
    temporary = directory / f"{POINTER}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(pointer) + "\n", "utf-8")
    publish(temporary, directory / POINTER)


def drop_old_versions(directory: Path, keep: int = 2) -> list[Path]:
    """Remove all but the last versions; those kept come back. One more than the current is kept for slow readers."""
    latest = current(directory)
    found = sorted((directory / VERSIONS).iterdir())
    kept = [path for path in found if latest is None or path.name <= latest.name][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return kept
