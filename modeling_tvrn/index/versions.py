"""A folder whose content changes all at once: numbered versions, a pointer to the current, one builder at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..storage.files import flush, read_json, write_json

POINTER, LOCK, VERSIONS, SEGMENTS, MANIFEST = "current.json", "build.lock", "versions", "segments", "manifest.json"
FORMAT = "tvrn-index"


def current(directory: Path) -> Path | None:
    """The folder of the current version; None where nothing was finished yet.

    Raises:
        StorageError: If the pointer is damaged, of something else, or of another format.
    """
    path = directory / POINTER
    if not path.exists():
        return None
    return directory / VERSIONS / str(read_json(path, FORMAT)["version"])


def next_version(directory: Path) -> Path:
    """A fresh folder for the next version; what an interrupted build left of it is dropped."""
    latest = current(directory)
    number = 1 if latest is None else int(latest.name) + 1
    path = directory / VERSIONS / f"{number:06d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def switch_to(directory: Path, version: Path, manifest: dict[str, Any]) -> None:
    """Make a version the current one. Whoever opens the folder sees the old one whole, or the new one whole."""
    write_json(version / MANIFEST, FORMAT, manifest)
    for folder in (version.parent, directory):  # their names last through a power cut before the pointer names them
        flush(folder)
    write_json(directory / POINTER, FORMAT, {"version": version.name})


def drop_old_versions(directory: Path, keep: int = 2) -> list[Path]:
    """Remove all but the last versions; those kept come back. One more than the current is kept for slow readers."""
    latest = current(directory)
    found = sorted((directory / VERSIONS).iterdir())
    kept = [path for path in found if latest is None or path.name <= latest.name][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return kept
