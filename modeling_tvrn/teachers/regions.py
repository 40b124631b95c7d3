"""Region features of a data set's photographs: extracted once, kept on disk, read by image id."""

import importlib.metadata
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..engines import used
from ..storage.arrays import ArrayStore, StoredCache, StoreWriter, built_once, check_space
from ..storage.fingerprints import ItemId, items_fingerprint, plain_id
from .extraction import ImagePreparation, RegionExtraction

logger = logging.getLogger(__name__)


class RegionCache(StoredCache):
    """Region features, boxes and masks of images, memory-mapped and looked up by image id.

    Attributes:
        fingerprint: What the regions were made from: backbone, preprocessing, regions, numbers, data.
        info: Where they came from and what the extraction took; decides nothing.
    """

    def __init__(self, store: ArrayStore) -> None:
        missing = {"region_features", "region_boxes", "region_mask"} - store.layout.keys()
        if missing:
            raise ValueError(f"the store in {str(store.directory)!r} is no region cache: it has no {sorted(missing)}")
        super().__init__(store)

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        records: Iterable[Mapping[str, Any]],
        directory: str | os.PathLike,
        *,
        batch_size: int = 32,
        dtype: str = "float16",
        compute_dtype: str = "float32",
        boxes_column: str | None = None,
        max_regions: int = 36,
        feature_map: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        shard_size: int = 512,
        num_workers: int = 0,
        overwrite: bool = False,
        info: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> "RegionCache":
        """Run a frozen backbone once over records; a build that was killed continues, a finished one is just opened.

        Args:
            model, processor, dtype, compute_dtype, boxes_column, max_regions, feature_map: See [`RegionExtraction`].
            records: Of `load_pairs`, map-style or a stream; every image id once.
            directory: The cache's folder; one that holds another cache is refused.
            batch_size: Images in memory and in the backbone at once.
            fingerprint: In place of the computed one, where the model is a bare function.
            shard_size: Images a file, and so the most that a kill loses.
            num_workers: Processes that decode and preprocess beside this one; only for map-style records.
            overwrite: Drop what is in the folder.
            info: Facts to keep with the cache that decide nothing.
            progress: Show a progress bar.

        Raises:
            StaleStoreError: If the folder's cache was made from something else.
            ValueError: On bad settings or records, and on NaN features (naming the image).
            OSError: If the disk has no room for the cache.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        extraction = RegionExtraction(model, processor, dtype, compute_dtype, boxes_column, max_regions, feature_map)
        made_from = dict(extraction.fingerprint() if fingerprint is None else fingerprint)
        ids = image_ids_of(records)
        if ids is not None:
            made_from["data"] = items_fingerprint(ids)

        def fill(writer: StoreWriter) -> dict[str, Any]:
            facts = _origin(extraction) | {"resumed_after": len(writer.ids)}
            started = time.monotonic()
            cut = _fill(writer, extraction, records, ids, batch_size, num_workers, progress)
            if cut:
                logger.warning(
                    "%d images have more than %d boxes: the first %d were kept", cut, max_regions, max_regions
                )
            facts |= {"seconds": round(time.monotonic() - started, 1), "images_with_boxes_cut": cut}
            facts["tower_engine"] = used(extraction.model)
            return facts | dict(info or {})

        return cls(built_once(directory, made_from, shard_size, overwrite, fill))

    @property
    def ids(self) -> tuple[ItemId, ...]:
        """Image ids, in the order in which they were stored."""
        return self.store.ids

    def __getitem__(self, image_ids: Iterable[ItemId]) -> dict[str, Tensor]:
        """Regions of n images: `region_features` (n, R, F), `region_boxes` (n, R, 4), `region_mask` (n, R).

        Raises:
            KeyError: If an image id is not in the cache; the message names it.
        """
        return {name: torch.from_numpy(array) for name, array in self.store[image_ids].items()}

    def __repr__(self) -> str:
        regions, features = self.store.layout["region_features"][1]
        return (
            f"RegionCache({str(self.store.directory)!r}, images={len(self)}, regions={regions}, features={features})"
        )


def region_fingerprint(
    model: Any, processor: Any, records: Iterable[Mapping[str, Any]] | None = None, **settings: Any
) -> dict[str, Any]:
    """What a cache for this model, processor and these records must have been made from.

    Args:
        model, processor, **settings: As given to `RegionCache.build`; see [`RegionExtraction`].
        records: Map-style records; without them the data are not compared.
    """
    found = RegionExtraction(model, processor, **settings).fingerprint()
    ids = None if records is None else image_ids_of(records)
    return found if ids is None else found | {"data": items_fingerprint(ids)}


def image_ids_of(records: Iterable[Mapping[str, Any]]) -> list[ItemId] | None:
    """Image ids of map-style records, without decoding an image; `None` for a stream."""
    ids = getattr(records, "image_ids", None)
    if ids is None or not hasattr(records, "__getitem__"):
        return None
    return [plain_id(image_id) for image_id in ids]


def _fill(
    writer: StoreWriter,
    extraction: RegionExtraction,
    records: Any,
    ids: list[ItemId] | None,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> int:
    """Extract what the writer lacks; returns how many images had more boxes than are kept."""
    done = len(writer.ids)
    batches: Iterable[dict[str, Any]]
    if ids is None:
        if num_workers:
            raise ValueError(f"num_workers is {num_workers}, but a stream is read here: use 0, or map-style records")
        batches = _stream_batches(extraction.preparation(), records, writer, batch_size)
    else:
        writer.check_resumable(ids, "image")
        prepared = PreparedBatches(extraction.preparation(), records, done, batch_size)
        batches = DataLoader(prepared, batch_size=None, num_workers=num_workers)
    total = None if ids is None else len(ids)
    cut, is_first = 0, True
    bar = tqdm(total=total, initial=done, unit="image", desc="extracting regions", disable=None if progress else True)
    with bar, extraction.evaluating():
        for batch in batches:
            arrays = extraction.extract(batch)
            if is_first and total is not None:
                item = sum(array[0].nbytes for array in arrays.values())
                check_space(writer.directory, item * (total - done))
            is_first = False
            writer.append(batch["image_ids"], arrays)
            cut += batch.get("cut", 0)
            bar.update(len(batch["image_ids"]))
    return cut


class PreparedBatches(Dataset[Any]):
    """Batches of decoded records from a place on, and what is made of each, for the workers of a loader."""

    def __init__(self, prepare: Callable[[Sequence[Any]], Any], records: Any, start: int, batch_size: int) -> None:
        self.prepare = prepare
        self.records = records
        starts = range(start, len(records), batch_size)
        self.rows = [range(first, min(first + batch_size, len(records))) for first in starts]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.prepare([self.records[row] for row in self.rows[number]])


def _stream_batches(
    prepare: ImagePreparation, records: Iterable[Any], writer: StoreWriter, batch_size: int
) -> Iterator[dict[str, Any]]:
    stream = iter(records)
    passed = [plain_id(record["image_id"]) for record in itertools.islice(stream, len(writer.ids))]
    writer.check_resumable(passed, "image")
    while waiting := list(itertools.islice(stream, batch_size)):
        yield prepare(waiting)


def _origin(extraction: RegionExtraction) -> dict[str, Any]:
    config = getattr(extraction.backbone, "config", None)
    return {
        "backbone": getattr(config, "_name_or_path", "") or type(extraction.model).__name__,
        "device": str(extraction.device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
    }
