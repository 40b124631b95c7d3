"""Safetensors files that carry their own checksums: of the header, checked on opening, and of each tensor.

A tensor's checksum is compared where it is read whole, and by `TensorFile.verify`: what is mapped into memory is
opened without reading gigabytes. Nothing but the library is needed to read these files.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import REBUILD, StorageError, replacing
from .fingerprints import digest

DTYPES = {
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
}
_CODES = {name: code for code, name in DTYPES.items()}
BLOCK = 1 << 24  # bytes that a check holds at a time


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | np.ndarray], about: Mapping[str, str] | None = None
) -> TensorFile:
    """Write tensors so that the file has its name only once it is whole on the disk.

    Args:
        path: Of the file.
        tensors: By name; of any device.
        about: Texts to keep beside them.

    Returns:
        The file, opened; its checksums are those of what was in memory.

    Raises:
        ValueError: If a tensor is of a type that is not stored; names it.
        OSError: If the disk refuses; what was there stays.
    """
    values: dict[str, tuple[str, list[int], np.ndarray]] = {}
    for name, value in tensors.items():
        dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
        if dtype not in _CODES:
            raise ValueError(f"{name!r} is {dtype}, expected one of {sorted(_CODES)}")
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        values[name] = (dtype, shape, flat)
    # Wide numbers first: every tensor then begins at a multiple of its numbers' size.
    order = sorted(values, key=lambda name: (-torch.empty(0, dtype=getattr(torch, values[name][0])).itemsize, name))
    entries: dict[str, Any] = {}
    sums, end = {}, 0
    for name in order:
        dtype, shape, flat = values[name]
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [end, end + flat.nbytes]}
        sums[name] = hashlib.sha256(flat.data).hexdigest()
        end += flat.nbytes
    kept = {**(about or {}), "sums": json.dumps(sums)}
    header = json.dumps({"__metadata__": {**kept, "sha256": digest([entries, kept])}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(values[name][2].data)
    return TensorFile.open(path)


@dataclass(frozen=True)
class TensorFile:
    """A whole file on disk: what it holds, and where in it each tensor lies.

    Attributes:
        about: The texts beside the tensors.
        layout: Name -> dtype, shape, first byte.
        entry: What a manifest says of the file, by which it is told from any other: its size and checksum.
    """

    path: Path
    about: dict[str, str]
    layout: dict[str, tuple[str, tuple[int, ...], int]]
    entry: dict[str, Any]
    fix: str = field(default=REBUILD, repr=False)

    @classmethod
    def open(cls, path: Path, fix: str = REBUILD) -> TensorFile:
        """Read the header alone, check it, and the file's length against it.

        Raises:
            StorageError: If the file is missing, half-written, damaged, or not written by `write_tensors`.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                if start > size:
                    what = f"damaged, half-written: its header takes {start} bytes and it has {size}"
                    raise StorageError(path, what, fix)
                entries = json.loads(file.read(start - 8))
            about = entries.pop("__metadata__")
            checksum = about.pop("sha256")
            if digest([entries, about]) != checksum:
                raise StorageError(path, "damaged: its header has another checksum than when it was written", fix)
        except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            what = "missing" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
            raise StorageError(path, f"damaged, or no file of ours: {what}", fix) from error
        layout = {
            name: (DTYPES[each["dtype"]], tuple(each["shape"]), start + each["data_offsets"][0])
            for name, each in entries.items()
        }
        end = start + max((each["data_offsets"][1] for each in entries.values()), default=0)
        if size != end:
            raise StorageError(path, f"damaged, half-written: it has {size} bytes, and its header says {end}", fix)
        return cls(path, about, layout, {"bytes": size, "seal": checksum}, fix)

    def check(self, entry: Mapping[str, Any]) -> None:
        """Refuse a whole file in another's place.

        Raises:
            StorageError: If a manifest's entry is another.
        """
        if self.entry != entry:
            raise StorageError(self.path, "damaged: it is of another build than its manifest", self.fix)

    def verify(self) -> None:
        """Read the data and compare it with its checksums.

        Raises:
            StorageError: If it is not what was written; names the tensor.
        """
        with self.path.open("rb") as file:
            for name, (dtype, shape, offset) in self.layout.items():
                file.seek(offset)
                total, left = hashlib.sha256(), math.prod(shape) * getattr(torch, dtype).itemsize
                while left and (block := file.read(min(left, BLOCK))):
                    total.update(block)
                    left -= len(block)
                self._compare(name, total.hexdigest())

    def compare(self, name: str, values: np.ndarray) -> None:
        """Refuse a tensor that was read whole and is not what was written."""
        self._compare(name, hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest())

    def _compare(self, name: str, checksum: str) -> None:
        if checksum != json.loads(self.about["sums"])[name]:
            problem = f"damaged: its data, of {name!r}, has another checksum than when it was written"
            raise StorageError(self.path, problem, self.fix)

    def read(self) -> dict[str, Tensor]:
        """All tensors, in memory of their own, checked.

        Raises:
            StorageError: If they are not what was written.
        """
        # Read once: what is hashed is what is given.
        content = bytearray(self.path.read_bytes())
        found = {}
        for name, (dtype, shape, offset) in self.layout.items():
            kind, count = getattr(torch, dtype), math.prod(shape)
            part = memoryview(content)[offset : offset + count * kind.itemsize]
            self._compare(name, hashlib.sha256(part).hexdigest())
            flat = torch.frombuffer(content, dtype=kind, count=count, offset=offset) if count else torch.empty(0)
            found[name] = flat.to(kind).reshape(shape)
        return found

    def mapped(self) -> MappedFile:
        """Map the tensors into memory, read-only: a page is read from disk when it is first used."""
        return MappedFile(self)


class MappedFile:
    """A file's arrays as views of it.

    Attributes:
        arrays: name -> array, read-only.
    """

    def __init__(self, file: TensorFile) -> None:
        with file.path.open("rb") as opened:
            self._file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self.arrays = {
            name: np.frombuffer(self._file, dtype, math.prod(shape), offset).reshape(shape)
            for name, (dtype, shape, offset) in file.layout.items()
        }

    def release(self) -> None:
        """Take the pages that were read out of this process's resident memory; the system keeps them cached."""
        # Without it, random reads make the whole file resident in the end.
        if hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)
