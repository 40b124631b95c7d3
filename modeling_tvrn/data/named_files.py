"""The image files that data name: exactly the one that is meant, and none outside of what the user pointed at."""

from __future__ import annotations

import os
from pathlib import Path

from .file_kinds import printable
from .image_folder import leads_out
from .images import ImageError
from .skipped import AMBIGUOUS_IMAGE, MISSING_IMAGE, OUTSIDE_IMAGE

__all__ = ["HUB_FILES", "OWN_FILES", "NamedFiles", "bounds_of", "size_of_file"]

IMAGE_FOLDERS = ("", "images", "Images")  # a table's names may leave "images/" out, in either spelling


class NamedFiles:
    """Finds the files that names in data mean.

    Relative names stay below a folder; absolute ones are followed below it where the user named it. Links that lead
    out of it are not followed: pictures of elsewhere would come into features, pages and indexes.

    Args:
        folder: where names begin; None for data that may name no file.
        root: the folder of the data, which no name leaves, where that is another.
        is_given: whether the user named the folder (`image_root=`), and not the data alone.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, root: Path | None = None, is_given: bool = False
    ) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.is_given = is_given
        self._bounds = None if self.folder is None else bounds_of((root or self.folder).resolve())

    def find(self, name: str) -> Path | ImageError:
        """The file of that name, or where it should be; or why it is not read."""
        if not name:
            return ImageError(MISSING_IMAGE, "the row names no file", "the row names no file")
        if self.folder is None or self._bounds is None:
            return _outside(name, "data from the Hub, or read by `datasets`, name no files of this machine")
        if os.path.isabs(name):
            if not self.is_given:
                return _outside(name, "an absolute path in data")
            paths = [Path(name)]
        else:
            paths = [self.folder / prefix / name for prefix in IMAGE_FOLDERS]
        # `isfile` is False, and no error, for names that no file can have
        found = [path for path in paths if os.path.isfile(path)] or paths[:1]
        if any(leads_out(path, self._bounds) for path in found):
            return _outside(name, f"it leads out of {self._bounds}")
        if len(found) > 1 and not all(os.path.samefile(path, found[0]) for path in found):
            both = " and ".join(map(printable, found))
            return ImageError(AMBIGUOUS_IMAGE, f"{printable(name)} is {both}: keep one, or write its whole name", both)
        return found[0]


class _OwnFiles(NamedFiles):
    """Names that the user's own program made: they mean what they mean to it."""

    def find(self, name: str) -> Path:
        return Path(name)


HUB_FILES = NamedFiles(None)
OWN_FILES = _OwnFiles(None)


def size_of_file(path: str | Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return None


def bounds_of(folder: Path) -> Path:
    """What links of a resolved folder may not leave: itself; in the Hub's cache, all of links, its repository."""
    for parent in folder.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return folder


def _outside(name: str, why: str) -> ImageError:
    remedy = "; image_root=FOLDER (tvrn score: --images FOLDER) names a folder that holds it"
    return ImageError(OUTSIDE_IMAGE, f"{printable(name)}: {why}{remedy}", f"{why}{remedy}")
