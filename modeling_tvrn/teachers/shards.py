"""One file of a store: the arrays of some hundred items in safetensors, with the items' ids in its header."""

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from ..durable import publish
from ..storage.fingerprints import ItemId

_DTYPES = {
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape of one item, or of one row of a ragged item
LENGTHS = ".lengths"  # beside a ragged array, whose items lie one after another: how many rows each item has


class BrokenShardError(ValueError):
    """A shard that is missing, cut short, or of another build."""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True)
class Shard:
    """A whole shard on disk: whose arrays it holds, and where in the file each lies.

    Attributes:
        ids: of the items; empty in a shard `without_ids`, whose `count` stays.
        rows: first dimension of each array: the number of items, or of all their rows where they are ragged.
        build: digest of what the arrays were made from.
    """

    path: Path
    ids: tuple[ItemId, ...]
    count: int
    build: str
    layout: Layout
    offsets: dict[str, int]
    rows: dict[str, int]

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Read the header alone, and check the file's length against it.

        Raises:
            BrokenShardError: If the file is missing, half-written, or no shard of a store.
        """
        try:
            size = path.stat().st_size
            header, start = _read_header(path, size)
            metadata = header.pop("__metadata__")
            end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            layout = {name: (_DTYPES[entry["dtype"]], tuple(entry["shape"][1:])) for name, entry in header.items()}
            offsets = {name: start + entry["data_offsets"][0] for name, entry in header.items()}
            rows = {name: int(entry["shape"][0]) for name, entry in header.items()}
            ids = tuple(json.loads(metadata["ids"]))
            shard = cls(path, ids, len(ids), metadata["build"], layout, offsets, rows)
        except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BrokenShardError(f"{path} is not a shard of a store ({type(error).__name__}: {error})") from error
        if size != end:
            raise BrokenShardError(f"{path} is half-written: it has {size} bytes and its header says {end}")
        return shard

    def without_ids(self) -> "Shard":
        """The same shard without its ids in memory."""
        return replace(self, ids=())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays alone, of `mapped()`."""
        return self.mapped().arrays

    def mapped(self) -> "MappedShard":
        """Map the arrays into memory, read-only: a page is read from disk when it is first used."""
        return MappedShard(self)


class MappedShard:
    """A shard's arrays as views of its file.

    Attributes:
        arrays: name -> (n, ...), read-only; of a ragged one the rows of all items, item `i` from `starts[name][i]` on.
        starts: name of a ragged array -> (n + 1,) int64.
    """

    def __init__(self, shard: Shard) -> None:
        with shard.path.open("rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.arrays = {
            name: np.frombuffer(self._file, dtype, math.prod((shard.rows[name], *shape)), shard.offsets[name]).reshape(
                shard.rows[name], *shape
            )
            for name, (dtype, shape) in shard.layout.items()
        }
        self.starts = {
            name.removesuffix(LENGTHS): np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            for name, lengths in self.arrays.items()
            if name.endswith(LENGTHS)
        }

    def release(self) -> None:
        """Take the pages that were read out of this process's resident memory; the system keeps them cached."""
        # Without it, random reads make the whole file resident in the end.
        if hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)


def write_shard(path: Path, ids: Sequence[ItemId], build: str, arrays: Mapping[str, np.ndarray]) -> Shard:
    """Write a shard so that it has its name only once it is whole on the disk."""
    for name, array in arrays.items():
        if str(array.dtype) not in _DTYPES.values():
            raise ValueError(f"{name!r} is {array.dtype}, expected one of {sorted(_DTYPES.values())}")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        # save_file would leave the file to its owner alone; a cache is shared.
        temporary.write_bytes(save(contiguous, metadata={"ids": json.dumps(list(ids)), "build": build}))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Shard.open(path)


def _read_header(path: Path, size: int) -> tuple[dict, int]:
    """The header of a safetensors file (8 bytes of length, then JSON) and where its data starts."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise BrokenShardError(f"{path} is half-written: its header takes {start} bytes and the file has {size}")
        return json.loads(file.read(start - 8)), start
