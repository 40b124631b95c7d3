"""Encoded items on disk in immutable segments, found again by what was encoded: the unit of resuming and of reuse."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from ..encoded_tvrn import EncodedImages, EncodedItems, EncodedTexts
from ..storage.arrays import shard_ids, write_shard
from ..storage.files import FORMATS, StorageError
from ..storage.tensors import TensorFile
from .coded import restored
from .versions import FORMAT

logger = logging.getLogger(__name__)

GARBAGE = 0.5  # share of a segment's items that nothing refers to, from which on the others are copied out of it
MANY = 4  # times as many small segments as full ones would do, from which on they are joined

SIDES: dict[str, type[EncodedItems]] = {"images": EncodedImages, "texts": EncodedTexts}


class Segments:
    """The segments of one index and one model.

    Args:
        directory: Where they lie.
        build: Digest of the model and the settings; segments of another build are not seen.
        side: "images" or "texts".
    """

    fix = FORMATS[FORMAT][1]

    def __init__(self, directory: Path, build: str, side: str) -> None:
        self.directory, self.build, self.side = directory, build, side
        self.files: dict[str, TensorFile] = {}
        self.place: dict[str, tuple[str, int]] = {}  # key -> segment, row
        self._mapped: dict[str, dict[str, np.ndarray]] = {}

    def scan(self) -> None:
        """Find every whole segment in the folder: what earlier builds, also killed ones, have finished."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                file = TensorFile.open(path, self.fix)
            except StorageError as error:
                logger.warning("%s. Its items are encoded again", error)
                continue
            if file.about.get("build") == self.build:
                self._take(file)

    def open(self, names: Sequence[str], listed: Mapping[str, Any]) -> None:
        """Open and map some segments, so that they stay readable when a later build removes their files.

        Args:
            names: Of their files.
            listed: A version's list of files.

        Raises:
            StorageError: If one is missing, damaged in size or header, or another than is listed.
        """
        for name in names:
            file = TensorFile.open(self.directory / name, self.fix)
            file.check(listed[f"../../{self.directory.name}/{name}"])
            self._take(file)
            self._arrays(name)

    def _take(self, file: TensorFile) -> None:
        self.files[file.path.name] = file
        for row, key in enumerate(shard_ids(file)):
            self.place.setdefault(str(key), (file.path.name, row))

    def write(self, keys: Sequence[str], encoded: EncodedItems) -> None:
        """A new segment; it has its name only once it is whole on the disk."""
        # NumPy has no bfloat16.
        tensors = {name: value.detach().cpu() for name, value in encoded.tensors().items()}
        wide = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in tensors.items()}
        self._write(keys, {name: value.numpy() for name, value in wide.items()})

    def _write(self, keys: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        self._take(write_shard(self.directory / f"{uuid4().hex}.safetensors", keys, self.build, arrays))

    def compact(self, keys: Sequence[str], size: int) -> None:
        """Copy items out of segments that are mostly garbage, or small and many, into segments of `size` items.

        Args:
            keys: Of all items in use.
            size: Of a full segment; those of which half is in use stay.
        """
        live: dict[str, list[str]] = {}
        for key in dict.fromkeys(keys):
            live.setdefault(self.place[key][0], []).append(key)
        thin = {name: own for name, own in live.items() if len(own) < size / 2}
        moved = [key for own in thin.values() for key in own]
        rows = sum(len(shard_ids(self.files[name])) for name in thin)
        if rows - len(moved) <= GARBAGE * rows and len(thin) <= MANY * math.ceil(len(moved) / size):
            return
        try:
            for name in thin:
                self.files[name].verify()  # a copy of what is damaged would pass for whole
        except StorageError as error:
            logger.warning("%s (with --repair the build does)", error)
            return
        for start in range(0, len(moved), size):
            some = moved[start : start + size]
            places = [self.place.pop(key) for key in some]
            names = self._arrays(places[0][0])
            self._write(
                some, {name: _stacked([self._arrays(file)[name][row] for file, row in places]) for name in names}
            )

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        if name not in self._mapped:
            self._mapped[name] = self.files[name].mapped().arrays
        return self._mapped[name]

    def embeds(self, keys: Sequence[str]) -> np.ndarray:
        """(n, P) float32 embeddings, compared with their checksums: new vectors are made of them."""
        rows: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(self.place[key][0], []).append(row)
        found: np.ndarray | None = None
        for name, own in rows.items():
            embeds = self._arrays(name)["embeds"]
            self.files[name].compare("embeds", embeds)
            found = np.empty((len(keys), embeds.shape[1]), np.float32) if found is None else found
            found[own] = embeds[[self.place[keys[row]][1] for row in own]]
        assert found is not None
        return found

    def copy(self, keys: Sequence[str], directory: Path) -> None:
        """Write these items, and no others, into segments of another folder."""
        rows: dict[str, dict[str, int]] = {}
        for key in keys:
            name, row = self.place[key]
            rows.setdefault(name, {})[key] = row
        directory.mkdir(parents=True)
        target = Segments(directory, self.build, self.side)
        for name, own in rows.items():
            self.files[name].verify()  # a copy of what is damaged would pass for whole
            target._write([*own], {field: array[[*own.values()]] for field, array in self._arrays(name).items()})

    def read(self, keys: Sequence[str], model_fingerprint: str | None) -> EncodedItems:
        """Everything that is kept of the given items, in float32; padding is brought to one length."""
        parts = []
        for key in keys:
            name, row = self.place[key]
            copies = {field: np.array(array[row : row + 1]) for field, array in self._arrays(name).items()}
            tensors = restored(widened({field: torch.from_numpy(array) for field, array in copies.items()}))
            parts.append(SIDES[self.side](**tensors, model_fingerprint=model_fingerprint))
        return SIDES[self.side].cat(parts)

    def drop_unused(self, used: set[str]) -> None:
        """Remove the files of segments that no kept version refers to."""
        for path in self.directory.glob("*.safetensors*"):
            if path.name not in used:
                path.unlink(missing_ok=True)


def _stacked(items: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of one dtype, filled up with zeros to the largest: (n, ...)."""
    whole = np.zeros((len(items), *np.max([item.shape for item in items], axis=0)), items[0].dtype)
    for place, item in enumerate(items):
        whole[place][tuple(slice(length) for length in item.shape)] = item
    return whole


def widened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored features as they are computed with: half precision becomes float32."""
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in tensors.items()}
