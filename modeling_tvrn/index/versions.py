"""A folder whose content changes all at once: numbered versions, a pointer to the current, one builder at a time."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from ..storage.files import FORMATS, StorageError, flush, read_json, sweep, write_json
from ..storage.tensors import TensorFile
from ..storage.verify import verify

logger = logging.getLogger(__name__)

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
    name = str(read_json(path, FORMAT).get("version"))
    if not name.isdecimal():  # of a made-up pointer: it could lead out of the folder
        raise StorageError(path, f"damaged: it names the version {name!r}", FORMATS[FORMAT][1])
    return directory / VERSIONS / name


def make_usable(directory: Path, thoroughly: bool = False) -> None:
    """Delete what hinders a build: leftovers of killed ones, and a damaged pointer; its versions are made anew.

    Args:
        directory: Of the index, of which the lock is held.
        thoroughly: Read everything, and delete every file that isn't what was written.

    Raises:
        StorageError: If the index is of another format.
    """
    for folder in (directory, directory / SEGMENTS, *(directory / VERSIONS).glob("*")):
        sweep(folder)
    broken = _broken(directory) if thoroughly else []
    try:
        current(directory)
    except StorageError as error:
        if not error.problem.startswith("damaged"):
            raise
        broken.append(error)
    for found in broken:
        logger.warning("%s is %s: it is made anew", found.path, found.problem)
        found.path.unlink(missing_ok=True)


def _broken(directory: Path) -> list[StorageError]:
    """The files of versions and segments that aren't what was written, whoever else keeps files in the folder."""
    found = []
    for version in (directory / VERSIONS).glob("*"):
        try:
            found += verify(version)[1]
        except FileNotFoundError:  # without a manifest, nobody reads it
            continue
    for path in (directory / SEGMENTS).glob("*.safetensors"):  # those too that an interrupted build left
        try:
            TensorFile.open(path).verify()
        except StorageError as error:
            found.append(error)
    return [error for error in {error.path: error for error in found}.values() if error.problem.startswith("damaged")]


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
