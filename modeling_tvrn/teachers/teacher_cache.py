"""A teacher's vectors of a data set: computed once, kept on disk in half precision, read by image or caption id."""

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..storage.arrays import (
    ArrayStore,
    StoredCache,
    StoreWriter,
    built_once,
    finished_store,
    read_manifest,
    shard_name,
)  # fmt: skip
from ..storage.fingerprints import ItemId, StaleStoreError, items_fingerprint
from .extraction import STORED_DTYPES
from .regions import RegionCache
from .teacher import Teacher
from .teacher_items import check_contents, compare_contents, fill, fill_from_regions, item_ids, items_of

logger = logging.getLogger(__name__)

_PART = "part-{process:05d}-of-{processes:05d}"


class TeacherCache(StoredCache):
    """Unit-norm vectors of a teacher, memory-mapped and looked up by image id or caption id.

    Attributes:
        modality: "image" (ids are image ids) or "text" (caption ids).
        fingerprint: what the vectors were made from: teacher, preprocessing, pooling, numbers, data.
        info: where they came from and what that took; decides nothing.
    """

    def __init__(self, store: ArrayStore) -> None:
        if "teacher_embeds" not in store.layout:
            raise ValueError(
                f"the store in {str(store.directory)!r} is no teacher cache: it holds {sorted(store.layout)}, "
                "expected teacher_embeds; make one with TeacherCache.build or `tvrn teachers`"
            )
        super().__init__(store)
        self.modality: str = store.fingerprint["teacher"]["modality"]

    @classmethod
    def load(  # type: ignore[override]  # by teacher and records, not by a fingerprint
        cls,
        directory: str | os.PathLike,
        teacher: Teacher | None = None,
        dataset: Any = None,
        modality: str | None = None,
        verify: bool = False,
    ) -> "TeacherCache":
        """Open a finished cache.

        Args:
            directory: its folder.
            teacher: whose vectors these must be: weights, preprocessing and pooling are compared.
            dataset: map-style records whose every item must be there, and be the one that was cached.
            modality: "image" or "text", what the cache must be of.
            verify: compare the checksums of all vectors, which reads them.

        Raises:
            FileNotFoundError: there is none in `directory`.
            StaleStoreError: it was made by another teacher, of other items or of the other modality; with both values.
            KeyError: an item of `dataset` is not in it; the message names it.
            StorageError: it is unfinished or damaged.
        """
        expected = None
        if teacher is not None:
            expected = {key: value for key, value in teacher.fingerprint().items() if key != "compute_dtype"}
        cache = cls(ArrayStore.load(directory, expected, verify))
        if modality is not None and cache.modality != modality:
            raise StaleStoreError(
                f"the teacher cache in {os.fspath(directory)!r} is of modality {cache.modality!r}, expected "
                f"{modality!r}: are the paths of the two caches exchanged?"
            )
        if dataset is not None:
            cache.check(dataset)
        return cache

    @classmethod
    def build(
        cls,
        teacher: Teacher,
        dataset: Iterable[Mapping[str, Any]],
        directory: str | os.PathLike,
        *,
        batch_size: int = 64,
        dtype: str = "float16",
        shard_size: int = 4096,
        num_workers: int = 0,
        process: int = 0,
        processes: int = 1,
        overwrite: bool = False,
        info: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> "TeacherCache":
        """Run a teacher once over records; a build that was killed continues, a finished one is just opened.

        Args:
            teacher: of images (one vector a record) or of texts (one a caption).
            dataset: of `load_pairs`, map-style or a stream; every id once.
            directory: the cache's folder; one that holds another cache is refused.
            batch_size: items that the teacher takes at once.
            dtype: how vectors are stored, "float16" or "float32".
            shard_size: items a file, and so the most that a kill loses.
            num_workers: processes that decode photographs beside this one; only for map-style records.
            process, processes: this process's number among those that share the work, each with its part of the
                records; when all are done, `TeacherCache.join(directory)` makes one cache of the parts.
            overwrite: drop what is in the folder.
            info: facts to keep with the cache that decide nothing.
            progress: show a progress bar.

        Returns:
            The cache; with several processes that of this process's part.

        Raises:
            StaleStoreError: the folder's cache was made from something else; with both values.
            ValueError: bad settings or records, or a vector that is zero or not finite (its id is named).
        """
        if dtype not in STORED_DTYPES or batch_size < 1:
            raise ValueError(f"dtype is {dtype!r}, batch_size {batch_size}; expected {STORED_DTYPES} and at least 1")
        if not 0 <= process < processes:
            raise ValueError(f"process is {process} of {processes} processes; expected 0 to {processes - 1}")
        made_from = teacher.fingerprint()
        made_from["numbers"] = {"dtype": dtype, "compute_dtype": made_from.pop("compute_dtype")}
        ids = item_ids(dataset, teacher.modality)
        whole = dict(made_from) if ids is None else made_from | {"data": items_fingerprint(ids)}
        if processes > 1:
            if ids is None:
                raise ValueError("a stream has no parts for several processes: use map-style records, or one process")
            if not overwrite and (finished := finished_store(directory, whole)) is not None:
                return cls(finished)
            rows = np.array_split(np.arange(len(dataset)), processes)[process]  # type: ignore[arg-type]
            dataset = dataset.select(rows.tolist())  # type: ignore[attr-defined]
            directory = Path(directory) / _PART.format(process=process, processes=processes)
            whole = made_from | {"data": items_fingerprint(item_ids(dataset, teacher.modality) or ())}

        def facts(writer: StoreWriter) -> dict[str, Any]:
            return fill(writer, teacher, dataset, batch_size, dtype, num_workers, progress) | dict(info or {})

        return cls(built_once(directory, whole, shard_size, overwrite, facts))

    @classmethod
    def from_regions(
        cls,
        regions: RegionCache,
        dataset: Any,
        directory: str | os.PathLike,
        *,
        dtype: str = "float16",
        shard_size: int = 4096,
        overwrite: bool = False,
        progress: bool = True,
    ) -> "TeacherCache":
        """Image vectors without another pass over the photographs: the mean of each image's cached regions.

        Args:
            regions: of the backbone that is to be the teacher.
            dataset: map-style records, whose images are in `regions`; none is decoded.
            directory, dtype, shard_size, overwrite, progress: as in `build`.

        Raises:
            KeyError: an image is not in `regions`.
            StaleStoreError: the folder's cache was made from something else; with both values.
        """
        ids = item_ids(dataset, "image")
        if ids is None or dtype not in STORED_DTYPES:
            raise ValueError(f"expected map-style records, not a stream, and dtype {STORED_DTYPES}, not {dtype!r}")
        parts = {name: regions.fingerprint[name] for name in ("preprocessing", "regions")}
        made_from = {
            "teacher": {"modality": "image", **regions.fingerprint["backbone"]},
            "pooling": "mean of regions",
            **parts,
            "numbers": {"dtype": dtype, "regions": regions.fingerprint["numbers"]},
            "data": items_fingerprint(ids),
        }

        def facts(writer: StoreWriter) -> dict[str, Any]:
            fill_from_regions(writer, regions, dataset, ids, dtype, progress)
            return {"teacher": regions.info.get("backbone", ""), "regions": str(regions.store.directory)}

        return cls(built_once(directory, made_from, shard_size, overwrite, facts))

    @classmethod
    def join(cls, directory: str | os.PathLike) -> "TeacherCache":
        """One cache of the parts that several processes have built in a folder.

        Raises:
            FileNotFoundError: a part is missing.
            StaleStoreError: the parts were made by different teachers.
        """
        directory = Path(directory)
        if (manifest := read_manifest(directory)) is not None and manifest["complete"]:
            return cls.load(directory)
        parts = _parts(directory)
        first = {name: value for name, value in parts[0].fingerprint.items() if name != "data"}
        for part in parts[1:]:
            ArrayStore.load(part.directory, first)  # refuses another teacher's
        writer = StoreWriter(directory, first, overwrite=True)
        number = 0
        for part in parts:
            for path in part.paths:
                try:  # a second name for the file: a kill while parts are joined loses nothing
                    os.link(path, directory / shard_name(number))
                except OSError:
                    shutil.copyfile(path, directory / shard_name(number))
                number += 1
        del writer
        facts = {"parts": [part.info for part in parts]}
        joined = cls(StoreWriter(directory, first).finish(facts))
        for part in parts:
            shutil.rmtree(part.directory)
        return joined

    def check(self, dataset: Any) -> None:
        """Compare map-style records with what was cached.

        Raises:
            KeyError: an item is not in the cache; the message names it.
            StaleStoreError: an id is there, but its caption (or its picture's name and captions) was another one.
        """
        check_contents(self.store, dataset, self.modality)

    def check_records(self, records: Iterable[Mapping[str, Any]]) -> None:
        """As `check`, of some records at hand, such as those of a stream's batch."""
        for record in records:
            found = items_of({"image": None, **record}, self.modality)
            ids, _, firsts, seconds = zip(*found, strict=True)
            compare_contents(self.store, ids, firsts, seconds, self.modality)

    @property
    def source(self) -> dict[str, Any]:
        """Whose vectors these are, in few words: model, revision, class, weights' hash, pooling; None if not known."""
        [info, *_] = self.info.get("parts") or [self.info]
        teacher = self.fingerprint["teacher"]
        return {
            "model": info.get("teacher"),
            "revision": info.get("revision"),
            "class": teacher.get("class"),
            "weights_sha256": teacher.get("weights_sha256"),
            "pooling": self.fingerprint.get("pooling"),
        }

    @property
    def ids(self) -> Sequence[ItemId]:
        """Image or caption ids, in the order in which they were stored."""
        return self.store.ids

    @property
    def size(self) -> int:
        """D, the size of one vector."""
        return int(self.store.layout["teacher_embeds"][1][0])

    def __getitem__(self, ids: Iterable[ItemId]) -> Tensor:
        """Unit-norm vectors (n, D) of n items, in the stored dtype; only these rows are read.

        Raises:
            KeyError: an id is not in the cache; the message names it.
        """
        if isinstance(ids, (int, str, np.integer)):
            raise TypeError(f"expected several ids, got {ids!r}: write [[{ids!r}]] for one")
        return torch.from_numpy(self.store.read(self.store.rows(ids), ["teacher_embeds"])["teacher_embeds"])

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.store.directory)!r}, modality={self.modality!r}, items={len(self)}, "
            f"size={self.size})"
        )


def _parts(directory: Path) -> list[ArrayStore]:
    found = sorted(directory.glob("part-*-of-*"))
    if not found:
        raise FileNotFoundError(f"no parts in {str(directory)!r}: build them first, with process= and processes=")
    processes = int(found[0].name.rsplit("-", 1)[1])
    return [ArrayStore.load(directory / _PART.format(process=k, processes=processes)) for k in range(processes)]
