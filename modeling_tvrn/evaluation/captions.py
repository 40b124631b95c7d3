"""Which images and captions a gallery holds, in order: what a protocol checks and a fingerprint names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data import data_fingerprint

ItemId = int | str


@dataclass
class CaptionTable:
    """A gallery without its pictures: parallel lists, one entry an image.

    Attributes:
        image_ids: Id of each image.
        captions: Captions of each image.
        caption_ids: Ids of each image's captions.
        splits: Split of each image.
    """

    image_ids: list[ItemId] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    caption_ids: list[list[ItemId]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, dataset: Any) -> CaptionTable | None:
        """The table of a data set that can be read without decoding pictures; None for a stream."""
        if hasattr(dataset, "image_ids") and hasattr(dataset, "captions"):
            count = len(dataset.image_ids)
            captions = [list(each) for each in dataset.captions]
            ids = getattr(dataset, "caption_ids", None)
            caption_ids = [list(each) for each in ids] if ids is not None else _numbered(dataset.image_ids, captions)
            return cls(list(dataset.image_ids), captions, caption_ids, list(getattr(dataset, "splits", [""] * count)))
        if not isinstance(dataset, Sequence):
            return None
        table = cls()
        table.extend(dataset)
        return table

    def extend(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the texts and ids of records."""
        for record in records:
            captions = list(record["captions"])
            self.image_ids.append(record["image_id"])
            self.captions.append(captions)
            ids = record.get("caption_ids")
            self.caption_ids.append(list(ids) if ids is not None else _numbered([record["image_id"]], [captions])[0])
            self.splits.append(record.get("split", ""))

    def first_captions(self, count: int) -> CaptionTable:
        """With the first `count` captions of each image alone."""
        captions = [texts[:count] for texts in self.captions]
        return CaptionTable(self.image_ids, captions, [ids[:count] for ids in self.caption_ids], self.splits)

    def check(self) -> None:
        """Refuse a gallery that cannot be ranked.

        Raises:
            ValueError: If it is empty, an image has no caption, or an id occurs twice.
        """
        if not self.image_ids:
            raise ValueError("The data set holds no images; expected at least 1 with a caption.")
        empty = [image_id for image_id, captions in zip(self.image_ids, self.captions, strict=True) if not captions]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(self.image_ids)} images have no caption (the first is {empty[0]!r}): nothing"
                " can be right for them; leave them out."
            )
        _refuse_repeats("Image", self.image_ids)
        named = zip(self.image_ids, self.caption_ids, strict=True)
        _refuse_repeats("Caption", [f"{image} / {caption}" for image, captions in named for caption in captions])

    @property
    def image_count(self) -> int:
        """Number of images I."""
        return len(self.image_ids)

    @property
    def caption_count(self) -> int:
        """Number of captions T."""
        return sum(map(len, self.captions))

    @property
    def caption_image_rows(self) -> np.ndarray:
        """(T,) row of each caption's image."""
        return np.repeat(np.arange(self.image_count), [len(captions) for captions in self.captions])

    @property
    def flat_captions(self) -> list[str]:
        """All captions, image by image."""
        return [caption for captions in self.captions for caption in captions]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of image ids and caption ids in order."""
        return data_fingerprint(self)


def _numbered(image_ids: Sequence[ItemId], captions: Sequence[Sequence[str]]) -> list[list[ItemId]]:
    return [[f"{name}#{n}" for n in range(len(texts))] for name, texts in zip(image_ids, captions, strict=True)]


def _refuse_repeats(what: str, ids: Sequence[ItemId]) -> None:
    names = [str(each) for each in ids]
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    repeated = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    raise ValueError(
        f"{what} id {repeated[0]!r} occurs more than once ({len(repeated)} repeats among {len(names)}); expected every"
        " id once: merge the records of one image, or give its copies ids of their own."
    )
