"""Batches for training: one item a caption, and a collator that encodes each image of a batch once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data

from ..pixels_tvrn import rgb_images
from .records import Record
from .schema import CAPTION_COLUMNS, REGION_COLUMNS, ItemId, read_captions

Item = dict[str, Any]


class Records(Protocol):
    """Map-style records, from `load_pairs` or elsewhere (a region cache)."""

    @property
    def image_ids(self) -> Sequence[ItemId]: ...
    @property
    def captions(self) -> Sequence[Sequence[str]]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Record: ...


class CaptionDataset(torch.utils.data.Dataset[Item]):
    """One item for each (image, caption) of map-style records: an epoch is every caption once.

    An item is `{"record": the image's record, "caption": str, "caption_number": its place in the record, "row": row
    number of the image}`. Equal image ids have equal row numbers.

    Args:
        records: map-style records; their captions must not change afterwards.

    Attributes:
        image_rows: for each item the row number of its image, int64 (items,).

    Raises:
        ValueError: there are no captions.
    """

    def __init__(self, records: Records) -> None:
        if not hasattr(records, "captions"):
            raise ValueError(
                f"the records are a {type(records).__name__}, whose captions are not known beforehand; give what "
                "load_pairs makes of it: CaptionDataset(load_pairs(data))"
            )
        self.records = records
        counts = [len(captions) for captions in records.captions]
        if not sum(counts):
            raise ValueError(f"no captions in {len(counts)} records: nothing to train on")
        self._rows = np.repeat(np.arange(len(counts)), counts)
        self._starts = np.array([0, *accumulate(counts)][:-1])
        first_row: dict[ItemId, int] = {}
        for row, image_id in enumerate(records.image_ids):
            first_row.setdefault(image_id, row)
        self._numbers = np.array([first_row[image_id] for image_id in records.image_ids])
        self.image_rows = self._numbers[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Several items; data loaders call it with a batch, so that an image is decoded once a batch."""
        places = [range(len(self))[index] for index in indices]
        records = {row: self.records[row] for row in dict.fromkeys(self._rows[places].tolist())}
        items = []
        for place in places:
            row = int(self._rows[place])
            record, number = records[row], place - int(self._starts[row])
            caption = record["captions"][number]
            items.append(
                {"record": record, "caption": caption, "caption_number": number, "row": int(self._numbers[row])}
            )
        return items


class CaptionStream(torch.utils.data.IterableDataset[Item]):
    """One item for each (image, caption) of a stream of records, in its order: an image's captions follow each other.

    Items are those of `CaptionDataset` without the row number, which a stream cannot know.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = records

    def __iter__(self) -> Iterator[Item]:
        for record in self.records:
            yield from _items_of(record)


class PairCollator:
    """Makes model inputs of a batch of items; every image is encoded once, however many of its captions are there.

    Args:
        processor: the model's processor (`processor(images=..., text=..., return_tensors="pt")`).
        return_loss: whether the model is asked for its loss.
    """

    def __init__(self, processor: Any, return_loss: bool = True) -> None:
        self.processor = processor
        self.return_loss = return_loss

    def __call__(self, items: Sequence[Item] | Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Collate items of `CaptionDataset` or `CaptionStream`, or whole records (then with all of their captions).

        Also rows or columns of a `datasets.Dataset` with pictures in "image": without "image_id" equal ones are one.

        Returns:
            The processor's inputs for I images and T captions, I <= T; `image_ids (I,)` and `text_image_ids (T,)`,
            int64 numbers that are equal for equal image ids, on every process of a run; `return_loss`.

        Raises:
            ValueError: no items, or records with images beside records with region features.
        """
        if isinstance(items, Mapping):  # columns, as a slice of a data set gives them
            items = [dict(zip(items, row, strict=True)) for row in zip(*items.values(), strict=True)]
        pairs = [pair for item in items for pair in ([item] if "record" in item else _items_of(item))]
        if not pairs:
            raise ValueError(f"a batch of {len(items)} items holds no caption: nothing to collate")
        numbers = [_image_number(pair) for pair in pairs]
        records: dict[int, Record] = {}
        for number, pair in zip(numbers, pairs, strict=True):
            records.setdefault(number, pair["record"])
        inputs = dict(
            self.processor(
                text=[pair["caption"] for pair in pairs], return_tensors="pt", **image_inputs(list(records.values()))
            )
        )
        inputs["image_ids"] = torch.tensor(list(records), dtype=torch.int64)
        inputs["text_image_ids"] = torch.tensor(numbers, dtype=torch.int64)
        if self.return_loss:
            inputs["return_loss"] = True
        return inputs


def image_inputs(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The processor's arguments for the image side of some records: `images`, or `region_features` and the like.

    Raises:
        ValueError: the records do not all hold the same of them, or a path or an address in place of a picture.
    """
    columns = ("image", *REGION_COLUMNS, "image_embeds")
    forms = {tuple(name for name in columns if name in record) for record in records}
    if len(forms) != 1 or not any("region_features" in form or form == ("image",) for form in forms):
        raise ValueError(
            f"the records of a batch hold {sorted(forms)}; expected in all of them either 'image', or "
            "'region_features' with the same of 'region_boxes' and 'region_mask'"
        )
    names = forms.pop()
    if names == ("image",):
        try:
            return {"images": rgb_images([record["image"] for record in records])}
        except ValueError as error:  # of a path, which only a user may name
            raise ValueError(
                f"a record's 'image' cannot be used: {error}; load_pairs reads and checks data"
            ) from error
    return {name: [record[name] for record in records] for name in names if name != "image"}


def _items_of(record: Record) -> list[Item]:
    column = next((name for name in CAPTION_COLUMNS if name in record), None) if isinstance(record, Mapping) else None
    if column is None:
        keys = f"with the keys {sorted(record)}" if isinstance(record, Mapping) else f"{record!r:.80}"
        raise ValueError(
            f"a {type(record).__name__} {keys} is neither a record with captions nor of CaptionDataset; of a Trainer "
            "set remove_unused_columns=False, or it removes what the collator reads"
        )
    return [
        {"record": record, "caption": caption, "caption_number": number}
        for number, caption in enumerate(read_captions([record[column]]))
    ]


def _image_number(item: Item) -> int:
    """The image's row number; of a stream 63 bits of a hash, the same in every process: of its id, else of itself."""
    if "row" in item:
        return int(item["row"])
    record = item["record"]
    if "image_id" in record:
        name = str(record["image_id"]).encode()
    else:
        values = image_inputs([record])
        name = b"".join(np.asarray(each).tobytes() for column in values.values() for each in column)
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
