"""Arrays of many items on disk: written in resumable shards, keyed by a fingerprint, read memory-mapped.

A store is a folder of `shard-00000.safetensors`, ... and a `manifest.json`. A shard is the unit of resuming. Items of
an array have one shape, or are ragged: each with a number of rows of its own.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..redaction import redacted
from .files import BUILD_LOCK, StorageError, locked, make_folder, read_json, sweep, write_json
from .fingerprints import ItemId, check_fingerprint, digest, items_fingerprint, plain_id
from .ids import IdIndex
from .tensors import MappedFile, TensorFile, write_tensors

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
FORMAT = "tvrn-array-store"
LENGTHS = ".lengths"  # beside a ragged array, whose items lie one after another: how many rows each item has
Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape of one item, or of one row of a ragged item


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(path: Path, ids: Sequence[ItemId], build: str, arrays: Mapping[str, np.ndarray]) -> TensorFile:
    """Write the arrays of some items, with their ids and the digest of what they were made from."""
    return write_tensors(path, arrays, {"ids": json.dumps(list(ids)), "build": build})


def shard_ids(shard: TensorFile) -> list[ItemId]:
    """Whose arrays a shard holds."""
    return list(json.loads(shard.about["ids"]))


def shard_layout(shard: TensorFile) -> Layout:
    """What a shard holds of each item."""
    return {name: (dtype, shape[1:]) for name, (dtype, shape, _) in shard.layout.items()}


class ArrayStore:
    """Read-only view of a finished store: arrays of any item by its id, without loading the rest.

    In memory it keeps 16 bytes an id, and of the files nothing but what is being read. Safe to hand to worker
    processes: each maps the files itself.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any], shards: Sequence[TensorFile]) -> None:
        self.directory = directory
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.info: dict[str, Any] = manifest["info"]
        self.bytes: int = manifest["bytes"]
        self.layout = shard_layout(shards[0])
        self.paths = [shard.path for shard in shards]
        ids = [shard_ids(shard) for shard in shards]
        self._starts = np.cumsum([0] + [len(part) for part in ids])
        self._index = IdIndex([item_id for part in ids for item_id in part])
        self._mapped: dict[int, MappedFile] = {}

    @classmethod
    def load(
        cls, directory: str | os.PathLike, fingerprint: Mapping[str, Any] | None = None, verify: bool = False
    ) -> "ArrayStore":
        """Open a finished store.

        Args:
            directory: The store's folder.
            fingerprint: What the store must have been made from. Only the sections it names are compared.
            verify: Read all arrays and compare their checksums; otherwise their files' headers and sizes are checked.

        Raises:
            FileNotFoundError: If there is no store in `directory`.
            StaleStoreError: If the fingerprint differs; every differing field is named with both values.
            StorageError: If the build has not finished, or a shard is missing, damaged or of another build.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if manifest is None:
            raise FileNotFoundError(f"no {MANIFEST_NAME} in {str(directory)!r}: build the store there first")
        if fingerprint is not None:
            check_fingerprint(manifest["fingerprint"], fingerprint, directory)
        if not manifest["complete"]:
            raise StorageError(
                directory, "unfinished: its build was stopped", "run the same build again, it resumes after the last "
                "whole shard"
            )  # fmt: skip
        shards = [TensorFile.open(directory / name) for name in manifest["files"]]
        for shard, entry in zip(shards, manifest["files"].values(), strict=True):
            shard.check(entry)
            if verify:
                shard.verify()
        return cls(directory, manifest, shards)

    @property
    def ids(self) -> tuple[ItemId, ...]:
        """Ids of all items, in the order of their rows; read from the files each time."""
        return tuple(item_id for path in self.paths for item_id in shard_ids(TensorFile.open(path)))

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, (int, str)) and bool(self._index.find([item_id])[0] >= 0)

    def has(self, ids: Sequence[ItemId]) -> np.ndarray:
        """Which of these ids are in the store, bool (n,)."""
        return self._index.find([plain_id(item_id) for item_id in ids]) >= 0

    def rows(self, ids: Iterable[ItemId]) -> np.ndarray:
        """Rows of the items with these ids, int64 (n,).

        Raises:
            KeyError: If an id is not in the store; the message names it.
        """
        wanted = [plain_id(item_id) for item_id in ids]
        rows = self._index.find(wanted)
        missing = [wanted[place] for place in np.flatnonzero(rows < 0).tolist()]
        if missing:
            some = tuple(shard_ids(TensorFile.open(self.paths[0]))[:3])
            raise KeyError(
                f"{len(missing)} of {len(wanted)} ids are not in the store at {str(self.directory)!r}, the first is "
                f"{missing[0]!r} ({type(missing[0]).__name__}); its {len(self)} ids look like {some!r}: "
                "build a store of the data that has these ids"
            )
        return rows

    def read(self, rows: np.ndarray, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Arrays of the given rows, copied out of the files: name -> (n, ...); all of them, or those named.

        Of a ragged array (n, L, ...): items are filled up with zeros to the longest of the n. How long each is says
        `name.lengths`.
        """
        layout = self.layout if names is None else {name: self.layout[name] for name in names}
        ragged = [name for name in layout if name + LENGTHS in self.layout]
        even = [name for name in layout if name not in ragged]
        found = {name: np.empty((len(rows), *layout[name][1]), layout[name][0]) for name in even}
        for name in ragged:
            dtype, shape = layout[name]
            longest = self.read(rows, [name + LENGTHS])[name + LENGTHS].max(initial=0)
            found[name] = np.zeros((len(rows), longest, *shape), dtype)
        shard_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard_of_row).tolist():
            places = np.flatnonzero(shard_of_row == number)
            shard, own = self._shard(number), rows[places] - self._starts[number]
            for name in even:
                found[name][places] = shard.arrays[name][own]
            for name in ragged:
                lengths = shard.arrays[name + LENGTHS]
                starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
                for place, start, end in zip(places, starts[own], starts[own + 1], strict=True):
                    found[name][place, : end - start] = shard.arrays[name][start:end]
            shard.release()
        return found

    def __getitem__(self, ids: Iterable[ItemId]) -> dict[str, np.ndarray]:
        """Arrays of the items with these ids, in this order: name -> (n, ...)."""
        if isinstance(ids, (int, str, np.integer)):
            raise TypeError(f"expected several ids, got {ids!r}: write [[{ids!r}]] for one")
        return self.read(self.rows(ids))

    def _shard(self, number: int) -> MappedFile:
        if number not in self._mapped:
            self._mapped[number] = TensorFile.open(self.paths[number]).mapped()
        return self._mapped[number]

    def __getstate__(self) -> dict[str, Any]:
        # Sent to a worker, a memory map would travel with all its contents.
        return self.__dict__ | {"_mapped": {}}


class StoredCache:
    """What caches of one kind of arrays have in common: a finished store, opened, with what it was made from.

    Attributes:
        store: The arrays, by id.
        fingerprint: What they were made from.
        info: How they were made; decides nothing.
    """

    def __init__(self, store: ArrayStore) -> None:
        self.store = store
        self.fingerprint = store.fingerprint
        self.info = store.info

    @classmethod
    def load(
        cls, directory: str | os.PathLike, fingerprint: Mapping[str, Any] | None = None, verify: bool = False
    ) -> Self:
        """Open a finished cache.

        Args:
            directory: Its folder.
            fingerprint: What it must have been made from. Only the sections that are named are compared: without
                `"data"`, for one, the items may be others.
            verify: Compare the checksums of all arrays, which reads them.

        Raises:
            FileNotFoundError: If there is none in `directory`.
            StaleStoreError: If it was made from something else; every differing field is named with both values.
            StorageError: If it is unfinished or damaged.
        """
        return cls(ArrayStore.load(directory, fingerprint, verify))

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self.store


class StoreWriter:
    """Appends items to a store, and continues after a kill: what whole shards hold stays.

    Args:
        directory: The store's folder, made if need be.
        fingerprint: What the arrays are made from, as nested dictionaries of JSON values. Its section `"data"` may be
            left out where the items are known only once they have all passed; `finish` then fills it in.
        shard_size: Items a shard, and so the most that a kill loses.
        overwrite: Drop a store that is already there.

    Attributes:
        ids: Items stored or waiting, in order. After a resume: those to be skipped.

    Raises:
        StaleStoreError: If the folder holds a store, finished or not, with another fingerprint.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        fingerprint: Mapping[str, Any],
        shard_size: int = 512,
        overwrite: bool = False,
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}, expected at least 1")
        self.directory = Path(directory)
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(dict(fingerprint)))
        self.shard_size = shard_size
        # A shard is tied to what made it, whatever the whole data turn out to be.
        self.build = digest({name: part for name, part in self.fingerprint.items() if name != "data"})
        sweep(make_folder(self.directory))
        if overwrite:
            self._remove_shards(0)
            (self.directory / MANIFEST_NAME).unlink(missing_ok=True)
        self._shards = self._resume()
        self.ids: list[ItemId] = [item_id for shard in self._shards for item_id in shard_ids(shard)]
        self._known = set(self.ids)
        self._stored = len(self.ids)
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._layout = shard_layout(self._shards[0]) if self._shards else None

    def _resume(self) -> list[TensorFile]:
        manifest = read_manifest(self.directory)
        if manifest is not None:
            # The data of an unfinished store may still change behind what is stored: the caller compares `ids`.
            compared = {name for name in self.fingerprint if manifest["complete"] or name != "data"}
            expected = {name: self.fingerprint[name] for name in compared}
            check_fingerprint(manifest["fingerprint"], expected, self.directory)
        shards = self._whole_shards(manifest["files"]) if manifest else []
        if manifest is None or not manifest["complete"] or len(shards) < len(manifest["files"]):
            self._remove_shards(len(shards))
            self._write_manifest(complete=False, shards=shards, info={})
        if shards:
            logger.info("%s: %d whole shards are there already", self.directory, len(shards))
        return shards

    def _whole_shards(self, listed: Mapping[str, Any]) -> list[TensorFile]:
        shards: list[TensorFile] = []
        while (path := self.directory / shard_name(len(shards))).exists():
            try:
                shard = TensorFile.open(path)
            except StorageError as error:
                logger.warning("%s. It is built again", error)
                break
            if shard.about.get("build") != self.build or listed.get(path.name, shard.entry) != shard.entry:
                logger.warning("%s is of another build: it is built again", path)
                break
            shards.append(shard)
        return shards

    def _remove_shards(self, first: int) -> None:
        kept = {shard_name(number) for number in range(first)}
        for path in self.directory.glob("shard-*.safetensors*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def check_resumable(self, wanted: Sequence[ItemId], noun: str = "item") -> None:
        """Refuse to continue unless the data begin with what is stored.

        Raises:
            ValueError: they do not; names the first place where they differ, with both ids.
        """
        for row, old in enumerate(self.ids):
            new = repr(wanted[row]) if row < len(wanted) else "nothing more"
            if repr(old) != new:
                raise ValueError(
                    f"the unfinished cache in {str(self.directory)!r} has {noun} {old!r} at place {row} where the "
                    f"data have {new}: continue with the data it was begun with, or build with overwrite=True"
                )

    def append(self, ids: Iterable[ItemId], arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]]) -> None:
        """Add items; full shards are written at once.

        Args:
            ids: Their ids, (n,).
            arrays: name -> (n, ...), or of ragged items a list of n arrays (L, ...); the same names, dtypes and shapes
                (but for L) at every call.

        Raises:
            ValueError: If an id was there before, or an array has another name, dtype or shape than before.
        """
        new_ids, flat = [plain_id(item_id) for item_id in ids], _one_after_another(arrays)
        self._check(new_ids, flat)
        self.ids += new_ids
        for name, array in flat.items():
            self._waiting.setdefault(name, []).append(array)
        while len(self.ids) - self._stored >= self.shard_size:
            self._write(self.shard_size)

    def _check(self, ids: list[ItemId], arrays: Mapping[str, np.ndarray]) -> None:
        for item_id in ids:
            if item_id in self._known:
                raise ValueError(f"the id {item_id!r} comes twice: a store holds one item of an id; make ids unique")
            self._known.add(item_id)
        lengths = {name: len(array) for name, array in arrays.items() if name + LENGTHS not in arrays}
        if set(lengths.values()) != {len(ids)}:
            raise ValueError(f"{len(ids)} ids come with arrays of lengths {lengths}, expected the same number")
        layout = {name: (str(array.dtype), tuple(array.shape[1:])) for name, array in arrays.items()}
        if self._layout is None:
            self._layout = layout
        elif layout != self._layout:
            raise ValueError(f"the arrays of {ids[:1]} are {layout}, expected {self._layout} as for the items before")

    def _write(self, count: int) -> None:
        joined = {name: np.concatenate(parts) for name, parts in self._waiting.items()}
        path = self.directory / shard_name(len(self._shards))
        ids = self.ids[self._stored : self._stored + count]
        ends = {name: joined[name + LENGTHS][:count].sum() if name + LENGTHS in joined else count for name in joined}
        full = {name: array[: ends[name]] for name, array in joined.items()}
        self._shards.append(write_shard(path, ids, self.build, full))
        self._stored += count
        self._waiting = {name: [array[ends[name] :]] for name, array in joined.items()}

    def finish(self, info: Mapping[str, Any] | None = None) -> ArrayStore:
        """Write what is waiting and declare the store complete.

        Args:
            info: Facts worth keeping that decide nothing (where it came from, how long it took).

        Raises:
            ValueError: If no item was ever added.
        """
        if not self.ids:
            raise ValueError(f"no item was added to the store in {str(self.directory)!r}: the data are empty")
        if waiting := len(self.ids) - self._stored:
            self._write(waiting)
        self.fingerprint.setdefault("data", items_fingerprint(self.ids))
        self._write_manifest(complete=True, shards=self._shards, info=dict(info or {}))
        return ArrayStore.load(self.directory, self.fingerprint)

    def _write_manifest(self, complete: bool, shards: Sequence[TensorFile], info: dict[str, Any]) -> None:
        layout = shard_layout(shards[0]) if shards else {}
        manifest = {
            "complete": complete,
            "items": sum(len(shard_ids(shard)) for shard in shards),
            "bytes": sum(shard.entry["bytes"] for shard in shards),
            "arrays": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in layout.items()},
            "fingerprint": self.fingerprint,
            "build": self.build,
            "info": redacted(info),
            "files": {shard.path.name: shard.entry for shard in shards},
        }
        write_json(self.directory / MANIFEST_NAME, FORMAT, manifest)


def _one_after_another(arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Ragged items as one array of all their rows, and the lengths beside it."""
    flat: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            flat[name] = array
        else:
            flat[name] = np.concatenate(array)
            flat[name + LENGTHS] = np.array([len(item) for item in array], dtype=np.int32)
    return flat


def finished_store(directory: str | os.PathLike, fingerprint: Mapping[str, Any]) -> ArrayStore | None:
    """The store in a folder if it is whole; of one with a damaged shard, which a build mends, `None`.

    Raises:
        StaleStoreError: If it was made from something else.
    """
    manifest = read_manifest(directory)
    if manifest is None or not manifest["complete"]:
        return None
    try:
        return ArrayStore.load(directory, fingerprint)
    except StorageError as error:
        logger.warning("%s. Building what is missing", error)
        return None


def built_once(
    directory: str | os.PathLike,
    fingerprint: Mapping[str, Any],
    shard_size: int,
    overwrite: bool,
    fill: Callable[[StoreWriter], Mapping[str, Any]],
) -> ArrayStore:
    """The finished store in a folder, or the one that `fill` makes: a process builds it, others wait for it.

    Args:
        directory, fingerprint, shard_size, overwrite: As of `StoreWriter`.
        fill: Appends what the writer lacks, and gives the store's `info`.
    """

    def finished() -> ArrayStore | None:
        # Of a stream, whose items nobody knows before, a store can't be known to be whole.
        return None if overwrite or "data" not in fingerprint else finished_store(directory, fingerprint)

    if (store := finished()) is not None:
        return store
    with locked(Path(directory) / BUILD_LOCK, wait=True):
        if (store := finished()) is not None:  # another process built it meanwhile
            return store
        writer = StoreWriter(directory, fingerprint, shard_size, overwrite)
        return writer.finish(fill(writer))


def check_space(directory: str | os.PathLike, needed: float) -> None:
    """Say how large a store will be, and refuse one for which its disk has no room.

    Args:
        directory: The store's folder, which is there.
        needed: Bytes still to be written.

    Raises:
        OSError: If fewer are free; says how many.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"no room for a cache of {_shown(needed)} in {os.fspath(directory)!r}, whose disk has "
            f"{_shown(free)} free: free some, or put the cache on another disk"
        )
    logger.info("%s: about %s to write, %s free", os.fspath(directory), _shown(needed), _shown(free))


def _shown(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} bytes"


def read_manifest(directory: str | os.PathLike) -> dict[str, Any] | None:
    """The manifest of the store in a folder; `None` where there is none.

    Raises:
        StorageError: If there is a `manifest.json` that is damaged, of something else, or of another format.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.exists():
        return None
    return read_json(path, FORMAT, rebuild_command(path))


def rebuild_command(path: Path) -> str:
    """What makes a store anew: the command that made it, where its manifest, of whatever format, still tells."""
    try:
        command = json.loads(path.read_text(encoding="utf-8"))["info"]["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return (
            f"give another folder, or delete {path.parent} and run the same build again (with overwrite=True, or "
            "`tvrn regions … --overwrite`, `tvrn teachers … --overwrite`, it deletes itself)"
        )
    return f"build it again: {str(command).removesuffix(' --overwrite')} --overwrite"
