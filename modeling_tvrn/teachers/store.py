"""Arrays of many items on disk: written in resumable shards, keyed by a fingerprint, read memory-mapped.

A store is a folder of `shard-00000.safetensors`, ... and a `manifest.json`. A shard is the unit of resuming. Items of
an array have one shape, or are ragged: each with a number of rows of its own.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..durable import publish
from ..redaction import redacted
from ..storage.fingerprints import ItemId, check_fingerprint, digest, ids_digest, items_fingerprint, plain_id
from .id_index import IdIndex
from .shards import LENGTHS, BrokenShardError, MappedShard, Shard, shard_name, write_shard

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
FORMAT = "tvrn-array-store"
FORMAT_VERSION = 1


class ArrayStore:
    """Read-only view of a finished store: arrays of any item by its id, without loading the rest.

    In memory it keeps 16 bytes an id, and of the files nothing but what is being read. Safe to hand to worker
    processes: each maps the files itself.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any], shards: Sequence[Shard]) -> None:
        self.directory = directory
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.info: dict[str, Any] = manifest["info"]
        self.bytes: int = manifest["bytes"]
        self.layout = shards[0].layout
        self._shards = [shard.without_ids() for shard in shards]
        self._starts = np.cumsum([0] + [shard.count for shard in shards])
        self._index = IdIndex([item_id for shard in shards for item_id in shard.ids])
        self._mapped: dict[int, MappedShard] = {}

    @classmethod
    def load(cls, directory: str | os.PathLike, fingerprint: Mapping[str, Any] | None = None) -> "ArrayStore":
        """Open a finished store.

        Args:
            directory: The store's folder.
            fingerprint: What the store must have been made from. Only the sections it names are compared.

        Raises:
            FileNotFoundError: If there is no store in `directory`.
            StaleStoreError: If the fingerprint differs; every differing field is named with both values.
            ValueError: If the build has not finished, or a shard is missing, half-written or of another build.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if manifest is None:
            raise FileNotFoundError(f"no {MANIFEST_NAME} in {str(directory)!r}: build the store there first")
        if fingerprint is not None:
            check_fingerprint(manifest["fingerprint"], fingerprint, directory)
        if not manifest["complete"]:
            raise ValueError(
                f"the store in {str(directory)!r} is not finished: run the same build again, it resumes after the "
                "last whole shard"
            )
        shards = [Shard.open(directory / shard_name(number)) for number in range(manifest["shards"])]
        found = ids_digest(item_id for shard in shards for item_id in shard.ids), {shard.build for shard in shards}
        if found != (manifest["ids_sha256"], {manifest["build"]}):
            raise BrokenShardError(f"{str(directory)!r} holds a shard of another build: build with overwrite=True")
        return cls(directory, manifest, shards)

    @property
    def ids(self) -> tuple[ItemId, ...]:
        """Ids of all items, in the order of their rows; read from the files each time."""
        return tuple(item_id for shard in self._shards for item_id in Shard.open(shard.path).ids)

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
            some = Shard.open(self._shards[0].path).ids[:3]
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
                starts = shard.starts[name]
                for place, start, end in zip(places, starts[own], starts[own + 1], strict=True):
                    found[name][place, : end - start] = shard.arrays[name][start:end]
            shard.release()
        return found

    def __getitem__(self, ids: Iterable[ItemId]) -> dict[str, np.ndarray]:
        """Arrays of the items with these ids, in this order: name -> (n, ...)."""
        if isinstance(ids, (int, str, np.integer)):
            raise TypeError(f"expected several ids, got {ids!r}: write [[{ids!r}]] for one")
        return self.read(self.rows(ids))

    def _shard(self, number: int) -> MappedShard:
        if number not in self._mapped:
            self._mapped[number] = self._shards[number].mapped()
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
    def load(cls, directory: str | os.PathLike, fingerprint: Mapping[str, Any] | None = None) -> Self:
        """Open a finished cache.

        Args:
            directory: Its folder.
            fingerprint: What it must have been made from. Only the sections that are named are compared: without
                `"data"`, for one, the items may be others.

        Raises:
            FileNotFoundError: If there is none in `directory`.
            StaleStoreError: If it was made from something else; every differing field is named with both values.
            ValueError: If it is unfinished or broken.
        """
        return cls(ArrayStore.load(directory, fingerprint))

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
        self.directory.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._remove_shards(0)
            (self.directory / MANIFEST_NAME).unlink(missing_ok=True)
        self._shards = self._resume()
        self.ids: list[ItemId] = [item_id for shard in self._shards for item_id in shard.ids]
        self._known = set(self.ids)
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._layout = self._shards[0].layout if self._shards else None

    def _resume(self) -> list[Shard]:
        manifest = read_manifest(self.directory)
        if manifest is not None:
            # The data of an unfinished store may still change behind what is stored: the caller compares `ids`.
            compared = {name for name in self.fingerprint if manifest["complete"] or name != "data"}
            expected = {name: self.fingerprint[name] for name in compared}
            check_fingerprint(manifest["fingerprint"], expected, self.directory)
        shards = self._whole_shards() if manifest else []
        if manifest is None or not manifest["complete"] or len(shards) < manifest["shards"]:
            self._remove_shards(len(shards))
            self._write_manifest(complete=False, shards=shards, info={})
        if shards:
            items = sum(len(shard.ids) for shard in shards)
            logger.info("%s: %d whole shards with %d items are there already", self.directory, len(shards), items)
        return shards

    def _whole_shards(self) -> list[Shard]:
        shards: list[Shard] = []
        while (path := self.directory / shard_name(len(shards))).exists():
            try:
                shard = Shard.open(path)
            except BrokenShardError as error:
                logger.warning("%s: it is built again", error)
                break
            if shard.build != self.build:
                logger.warning("%s is of another build: it is built again", path)
                break
            shards.append(shard)
        return shards

    def _remove_shards(self, first: int) -> None:
        kept = {shard_name(number) for number in range(first)}
        for path in self.directory.glob("shard-*.safetensors*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

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
        while self._waiting_items() >= self.shard_size:
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

    def _waiting_items(self) -> int:
        return len(self.ids) - sum(len(shard.ids) for shard in self._shards)

    def _write(self, count: int) -> None:
        start = len(self.ids) - self._waiting_items()
        joined = {name: np.concatenate(parts) for name, parts in self._waiting.items()}
        path = self.directory / shard_name(len(self._shards))
        ids = self.ids[start : start + count]
        ends = {name: joined[name + LENGTHS][:count].sum() if name + LENGTHS in joined else count for name in joined}
        full = {name: array[: ends[name]] for name, array in joined.items()}
        self._shards.append(write_shard(path, ids, self.build, full))
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
        if self._waiting_items():
            self._write(self._waiting_items())
        self.fingerprint.setdefault("data", items_fingerprint(self.ids))
        self._write_manifest(complete=True, shards=self._shards, info=dict(info or {}))
        return ArrayStore.load(self.directory, self.fingerprint)

    def _write_manifest(self, complete: bool, shards: Sequence[Shard], info: dict[str, Any]) -> None:
        ids = [item_id for shard in shards for item_id in shard.ids]
        layout = shards[0].layout if shards else {}
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": complete,
            "items": len(ids),
            "shards": len(shards),
            "bytes": sum(shard.path.stat().st_size for shard in shards),
            "arrays": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in layout.items()},
            "fingerprint": self.fingerprint,
            "build": self.build,
            "ids_sha256": ids_digest(ids),
            "info": redacted(info),
        }
        temporary = self.directory / f"{MANIFEST_NAME}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        publish(temporary, self.directory / MANIFEST_NAME)


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
    """The store in a folder if it is whole; of one with a broken shard, which a build mends, `None`.

    Raises:
        StaleStoreError: If it was made from something else.
    """
    manifest = read_manifest(directory)
    if manifest is None or not manifest["complete"]:
        return None
    try:
        return ArrayStore.load(directory, fingerprint)
    except BrokenShardError as error:
        logger.warning("%s: building what is missing", error)
        return None


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
        ValueError: If there is a `manifest.json` of something else, or of a newer format.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of a store ({type(error).__name__}: {error})") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{path} is {found[0]!r} version {found[1]!r}, this release reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    return dict(manifest)
