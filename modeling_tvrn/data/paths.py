"""Names of data sources: whether one means something on this machine, and what is like one that is not there."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from .caption_files import CAPTION_SUFFIXES
from .webdataset import TAR_SUFFIXES

__all__ = ["is_local", "missing_path", "near_paths"]

_SUFFIXES = (*CAPTION_SUFFIXES, *TAR_SUFFIXES, ".parquet", ".npy", ".arrow")
_SHOWN = 3


def is_local(name: str) -> bool:
    """Whether a name can only mean a file or folder of this machine: the Hub's are `owner/name`, without a suffix.

    A mistyped suffix counts (`pairs.cvs`), so that nobody waits for the Hub to answer that it knows no such data.
    """
    begins = name.startswith((".", "~", os.sep, "/")) or os.path.isabs(name)
    suffix = Path(name).suffix.lower()
    mistyped = len(suffix) > 3 and difflib.get_close_matches(suffix, _SUFFIXES, 1, cutoff=0.74)
    return begins or name.count("/") > 1 or "\\" in name or name.lower().endswith(_SUFFIXES) or bool(mistyped)


def missing_path(name: str, expected: str) -> ValueError:
    """What to say of a path that is not there: where it was looked for, and what there is instead."""
    path = Path(name).expanduser()
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    where = f"looked for {path.absolute()}"
    if parent != path.absolute().parent:
        where += f", but there is no folder {parent / path.absolute().relative_to(parent).parts[0]}"
    near = near_paths(name)
    advice = f"did you mean {' or '.join(near)}?" if near else f"expected {expected}"
    return ValueError(f"{name!r} is no file or folder here ({where}); {advice}")


def near_paths(name: str) -> list[str]:
    """Files and folders whose names are like the first part of a path that is not there, written as the path is."""
    path = Path(name).expanduser()
    known = Path(path.anchor)
    for part in path.relative_to(known).parts:
        if not (known / part).exists():
            return [str(known / found) for found in _alike(part, known)]
        known = known / part
    return []


def _alike(name: str, folder: Path) -> list[str]:
    """Names in a folder that are like this one, in whatever case, or differ in the suffix alone."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError:
        return []
    found = difflib.get_close_matches(name, names, _SHOWN, cutoff=0.6)
    stem = Path(name).stem.lower()
    found += [other for other in names if Path(other).stem.lower() == stem and other not in found]
    return found[:_SHOWN]
