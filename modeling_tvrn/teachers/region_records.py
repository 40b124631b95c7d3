"""Records whose photographs are replaced by their cached regions; whatever reads records works on as before."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from ..storage.fingerprints import ItemId
from .regions import RegionCache, image_ids_of, region_fingerprint

Record = dict[str, Any]
# A record's fields beside its image, and the attribute in which map-style records keep each
_TEXT_FIELDS = {
    "captions": "captions",
    "image_id": "image_ids",
    "caption_ids": "caption_ids",
    "split": "splits",
    "filename": "filenames",
}


def with_regions(records: Any, cache: RegionCache) -> "RegionRecords | RegionStream":
    """The same records with `region_features` (R, F) and `region_boxes` (R, 4) in place of `"image"`.

    Masked regions are left out, so a record holds the valid ones alone. Of map-style records no image is decoded any
    more; columns beside the standard ones are then left out.

    Args:
        records: Of `load_pairs`, map-style or a stream.
        cache: Of the same images, or more.

    Raises:
        KeyError: If a map-style record's image is not in the cache, at once; of a stream, when it comes.
    """
    return RegionStream(records, cache) if image_ids_of(records) is None else RegionRecords(records, cache)


def with_checked_regions(
    records: Any, folder: str | os.PathLike[str], model: Any, processor: Any
) -> "RegionRecords | RegionStream":
    """`with_regions` of the cache in a folder, which must be of this model's tower and preprocessing.

    How the numbers were computed and stored is left open, and so are a detector's boxes, which are no grid of the
    model's. A model without a vision tower takes any regions.

    Args:
        records: Of `load_pairs`, map-style or a stream.
        folder: Of a `RegionCache`.
        model: A `TVRNModel` with its float32 weights: a cache names them by their hash.
        processor: Its processor.

    Raises:
        FileNotFoundError: If there is no cache.
        StaleStoreError: If it was made by another tower, preprocessing or grid; names what differs.
        KeyError: As `with_regions`.
    """
    cache = RegionCache.load(folder)
    if model.dual_encoder is not None and "image_embeds" not in cache.store.layout:
        raise ValueError(
            f"the region cache in {str(folder)!r} has no embeddings of the dual encoder, which are the first stage: "
            "build it with that dual encoder as the model"
        )
    if model.config.looks:
        expected = region_fingerprint(model, processor)
        own = cache.fingerprint["regions"]["boxes"] in ("grid", "detector")
        sections = ["backbone", "preprocessing"] + ["regions"] * own
        cache = RegionCache.load(folder, {name: expected[name] for name in sections})
    return with_regions(records, cache)


class RegionRecords:
    """Map-style records with cached regions; made by `with_regions`.

    Offers what the wrapped records offer (`image_ids`, `captions`, `skipped`, ...).
    """

    def __init__(self, records: Any, cache: RegionCache) -> None:
        self.records = records
        self.cache = cache
        self._rows = cache.store.rows(image_ids_of(records) or ())

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "RegionRecords": ...
    def __getitem__(self, index: "int | slice") -> "Record | RegionRecords":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = range(len(self))[index]
        text = {
            name: getattr(self.records, plural)[row]
            for name, plural in _TEXT_FIELDS.items()
            if hasattr(self.records, plural)
        }
        return text | regions_of(self.cache.store.read(self._rows[row : row + 1]))

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))

    def select(self, rows: Sequence[int]) -> "RegionRecords":
        """Records of the given rows, in this order."""
        return RegionRecords(self.records.select(rows), self.cache)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "records":  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.records, name)


class RegionStream:
    """A stream of records with cached regions; made by `with_regions`."""

    def __init__(self, records: Iterable[Record], cache: RegionCache) -> None:
        self.records = records
        self.cache = cache

    def __iter__(self) -> Iterator[Record]:
        for record in self.records:
            image_id: ItemId = record["image_id"]
            kept = {name: value for name, value in record.items() if name != "image"}
            yield kept | regions_of(self.cache.store[[image_id]])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "records":
            raise AttributeError(name)
        return getattr(self.records, name)


def regions_of(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The valid regions of the one image that was read: `region_features` (R, F) and `region_boxes` (R, 4).

    Of a dual encoder's cache also `image_embeds` (P,).
    """
    kept = stored["region_mask"][0]
    whole = {"image_embeds": stored["image_embeds"][0]} if "image_embeds" in stored else {}
    return whole | {name: stored[name][0][kept] for name in ("region_features", "region_boxes")}
