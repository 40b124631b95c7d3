"""Files and folders written whole or not at all, with checksums, and one error that says what is wrong and what to do.

A kill at any moment, or a power cut, leaves what was there before or what is there now: content is flushed to the disk
before its name is. Manifests are JSON that carries its own checksum; they list the checksums of the files beside them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .fingerprints import digest

logger = logging.getLogger(__name__)

LEFT = re.compile(r".+\.[0-9a-f]+\.tmp")
OLD = ".removing-"  # begins the name of a folder that is on its way out
REBUILD = "delete it and run the build that made it again, which makes anew what is missing"
# What a manifest is of -> the version that this release reads and writes, and what to do about one that it can't read
FORMATS = {
    "tvrn-array-store": (2, REBUILD),
    "tvrn-index": (2, "delete it and run `tvrn index MODEL SOURCE INDEX` again, which makes anew what is missing"),
    "tvrn-checkpoint": (2, "start anew with resume=null, or give the path of another checkpoint"),
    "tvrn-score-blocks": (2, "give another folder, or delete this one and run the same command again"),
    "tvrn-tower-graph": (1, "delete it; it is made again when it is needed"),
    "tvrn-model-files": (1, "copy the folder again or train again; if you changed it yourself, delete its files.json"),
}
BUILD_LOCK = "build.lock"  # held by the one process that builds in a folder
FILES = "files.json"  # the list of a model's files, in its folder


class StorageError(ValueError):
    """A file that is damaged, unfinished, or of another format: which, what is wrong with it, and what to do.

    Args:
        path: Of the file or folder.
        problem: Follows "is": "damaged: …", "unfinished: …", "of format …: …".
        fix: What to do about it.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str, fix: str = REBUILD) -> None:
        super().__init__(path, problem, fix)  # as they came: an error travels between processes
        self.path, self.problem, self.fix = Path(path), problem, fix

    def __str__(self) -> str:
        return f"{self.path} is {self.problem}; {self.fix}"


class BusyError(OSError):
    """Another process is writing into the same folder."""


def flush(path: str | os.PathLike[str]) -> None:
    """Bring a file's content, or a folder's names, to the disk.

    Raises:
        OSError: The disk refuses, for instance because it is full.
    """
    if os.name != "posix" and os.path.isdir(path):  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not os.path.isdir(path) or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some network disks flush no folders, and write their names at once
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """A folder to write into, made if need be; to be asked for before the work, not after it.

    Raises:
        OSError: It can't be made or written to; says why.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK) else "it is not writable"
    except OSError as error:
        reason = "there is a file of that name" if isinstance(error, FileExistsError) else error.strerror or str(error)
    if reason is not None:
        raise OSError(f"{path} can't be a folder to write into: {reason}; give another one")
    return path


def cache_folder(name: str) -> Path:
    """Where this package keeps for a user what it can make again; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modeling_tvrn" / name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file then takes its place, whole, or the place stays as it was."""
    # Not the process's number alone: threads share it, and so do containers on one disk.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete what killed writers of `replacing` left in a folder; for whoever alone writes there."""
    for path in folder.glob("*.tmp"):
        if LEFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def publish_folder(aside: Path, target: Path) -> None:
    """Put a written folder in its place; one that was there before goes.

    A folder with content can't be renamed over: a kill between two renames leaves the former one whole, but under a
    name that begins with `OLD`.
    """
    for path in [*aside.rglob("*"), aside]:
        flush(path)
    old = target.with_name(OLD + target.name)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a kill just after the renames
        os.rename(target, old)
    os.rename(aside, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder's lock file, made if need be; the system lets go of it when the process ends, however it ends.

    Args:
        path: Of the lock file.
        wait: Until another process lets go of it.

    Raises:
        BusyError: Another process holds it, and `wait` is not set.
    """
    make_folder(path.parent)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            _lock(file.fileno(), wait=False)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if not wait:
                raise BusyError(
                    f"another build in {path.parent} is running (process {holder}); wait until it is done, or build "
                    "into another folder"
                ) from error
            logger.info("%s: process %s is building there; waiting until it is done", path.parent, holder)
            _lock(file.fileno(), wait=True)
        except OSError as error:  # some network disks have no locks
            logger.warning("%s can't be locked (%s): let no other run build there now", path.parent, error)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock(descriptor: int, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        mode = getattr(msvcrt, "LK_LOCK" if wait else "LK_NBLCK")
        getattr(msvcrt, "locking")(descriptor, mode, 1)  # noqa: B009 (absent elsewhere)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def write_json(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a manifest, whole or not at all, with its format and its own checksum."""
    # As it will be read: tuples are lists then, and names text.
    head = {"format": kind, "format_version": FORMATS[kind][0]}
    document = json.loads(json.dumps(head | dict(content) | head))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document | {"sha256": digest(document)}, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, kind: str, fix: str | None = None) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        StorageError: It is not there, is damaged, or of another format.
    """
    version, fix = FORMATS[kind][0], fix or FORMATS[kind][1]
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.get("format"), document.get("format_version")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise StorageError(path, f"damaged: it can't be read ({type(error).__name__}: {error})", fix) from error
    if found != (kind, version):
        of = " ".join(str(part) for part in found if part is not None) or "nobody knows what"
        raise StorageError(path, f"of format {of}: this release reads {kind} {version}", fix)
    if document.pop("sha256", None) != digest(document):
        raise StorageError(path, "damaged: its content has another checksum than when it was written", fix)
    return dict(document)


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_file(path: Path, entry: Mapping[str, Any], fix: str = REBUILD) -> None:
    """Compare a whole file with its `file_entry`.

    Raises:
        StorageError: It is missing, or has another size or checksum.
    """
    if not path.is_file():
        raise StorageError(path, "damaged: it is missing", fix)
    if (size := path.stat().st_size) != entry["bytes"]:
        raise StorageError(path, f"damaged: it has {size} bytes, and had {entry['bytes']} when it was written", fix)
    if file_entry(path) != entry:
        raise StorageError(path, "damaged: its content has another checksum than when it was written", fix)


def list_files(folder: Path) -> None:
    """Write down the sizes and checksums of a model folder's files, in the folder."""
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / FILES, "tvrn-model-files", {"files": files})


def check_listed(folder: Path) -> None:
    """Compare a folder's files with what `list_files` wrote.

    Raises:
        StorageError: One is damaged or missing, or the list is.
    """
    for name, entry in read_json(folder / FILES, "tvrn-model-files")["files"].items():
        check_file(folder / name, entry, FORMATS["tvrn-model-files"][1])
