"""What every reader offers: rows of text columns and, apart from them, the content of each row's image."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .images import MAX_IMAGE_PIXELS, Check, ImageError, check_image, decode_image
from .schema import REGION_COLUMNS, Layout, SourceRow
from .skipped import BAD_REGIONS

# {"image": encoded image, or the error why there is none} or {"region_features": ..., "region_boxes": ...}, and
# columns kept at the user's wish
Content = dict[str, Any]


Rows = Iterator[tuple[SourceRow, Callable[[], Content]]]


@dataclass(frozen=True)
class Shard:
    """A part of a source that can be read alone.

    Attributes:
        name: what to call it in messages.
        open: its rows from front to back, as `PairSource.stream` gives those of all shards.
    """

    name: str
    open: Callable[[], Rows]


class PairSource(ABC):
    """Rows of one or more files in a fixed order; `content(i)` belongs to the i-th of `rows()`.

    Attributes:
        name: what to call the source in messages.
        layout: which column holds what.
        is_trusted: whether its images need no check.
        scenes: `SceneRecords` that it reads; None of what is not generated.
    """

    name: str
    layout: Layout
    is_trusted = False
    scenes: Any = None

    @abstractmethod
    def rows(self) -> Iterator[SourceRow]:
        """Every row without its image."""

    @abstractmethod
    def content(self, row: int) -> Content:
        """The image of one row, not yet decoded, or its regions."""

    def image_size(self, row: int) -> int | None:
        """Bytes of one row's encoded image, where they are known without reading it."""
        return None

    def stream(self) -> Rows:
        """Rows in one pass from front to back, each with a function for its content (rows left out never call it)."""
        for number, row in enumerate(self.rows()):
            yield row, partial(self.content, number)

    def shards(self) -> list[Shard]:
        """The parts that can be streamed apart from one another; together they hold every row once."""
        return [Shard(self.name, self.stream)]

    def __len__(self) -> int:
        return sum(1 for _ in self.rows())


class JoinedSource(PairSource):
    """Several sources of one layout, one after the other: the parts of a source that has splits."""

    def __init__(self, name: str, parts: Sequence[PairSource]) -> None:
        self.name = name
        self.parts = list(parts)
        self.layout = self.parts[0].layout
        self._starts: list[int] | None = None

    def rows(self) -> Iterator[SourceRow]:
        for part in self.parts:
            yield from part.rows()

    def content(self, row: int) -> Content:
        part, own_row = self._place(row)
        return part.content(own_row)

    def image_size(self, row: int) -> int | None:
        part, own_row = self._place(row)
        return part.image_size(own_row)

    def _place(self, row: int) -> tuple[PairSource, int]:
        if self._starts is None:
            self._starts = np.cumsum([0] + [len(part) for part in self.parts]).tolist()
        number = bisect.bisect_right(self._starts, row) - 1
        return self.parts[number], row - self._starts[number]

    def stream(self) -> Rows:
        for part in self.parts:
            yield from part.stream()

    def shards(self) -> list[Shard]:
        return [shard for part in self.parts for shard in part.shards()]


def joined(name: str, parts: Sequence[PairSource]) -> PairSource:
    """One source out of its parts.

    Raises:
        ValueError: the parts keep their columns under different names.
    """
    for part in parts[1:]:
        if part.layout != parts[0].layout:
            raise ValueError(
                f"{name}: {parts[0].name} has the layout {parts[0].layout}, but {part.name} has {part.layout}; load "
                "them one by one"
            )
    return parts[0] if len(parts) == 1 else JoinedSource(name, parts)


def decode_content(content: Content, max_pixels: int = MAX_IMAGE_PIXELS) -> dict[str, Any]:
    """A row's content as a record holds it: an RGB picture, or arrays.

    Raises:
        ImageError: the image or the regions cannot be used.
    """
    decoded = dict(content)
    if "image" in decoded:
        decoded["image"] = decode_image(_encoded(decoded), max_pixels)
    else:
        check_regions(decoded)
    return decoded


def check_content(content: Content, how: Check, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Find out whether a row's content can be used.

    Raises:
        ImageError: it cannot.
    """
    if "image" in content:
        check_image(_encoded(content), how, max_pixels)
    elif how == "full":
        check_regions(content)


def _encoded(content: Content) -> Any:
    if isinstance(content["image"], ImageError):
        raise content["image"]
    return content["image"]


def check_regions(content: Mapping[str, Any]) -> None:
    """Check one image's region arrays; whether boxes are needed is the model's decision.

    Raises:
        ImageError: wrong shapes, no regions, values that are not finite, or boxes inside out.
    """
    features = np.asarray(content["region_features"])
    if features.ndim != 2 or not features.size:
        raise ImageError(BAD_REGIONS, f"region_features of shape {features.shape}, expected (regions, features)")
    if not np.isfinite(features).all():
        raise ImageError(BAD_REGIONS, "region_features hold NaN or infinity")
    for name, shape in zip(REGION_COLUMNS[1:], ((len(features), 4), (len(features),)), strict=True):
        if name in content and np.shape(content[name]) != shape:
            raise ImageError(BAD_REGIONS, f"{name} of shape {np.shape(content[name])}, expected {shape}")
    if "region_boxes" in content:
        boxes = np.asarray(content["region_boxes"])[np.asarray(content.get("region_mask", True), dtype=bool)]
        if not (boxes[..., 2:] >= boxes[..., :2]).all() or not np.isfinite(boxes).all():  # NaN is in no order
            raise ImageError(BAD_REGIONS, "region_boxes hold NaN, or boxes with x2 < x1 or y2 < y1")


class ScenesSource(PairSource):
    """Generated scenes: captions are known beforehand, a picture is drawn when its record is asked for."""

    is_trusted = True
    layout = Layout(captions=("captions",), image="image", image_id="image_id")

    def __init__(self, records: Any) -> None:
        self.name = "scenes"
        self.records = self.scenes = records

    def __len__(self) -> int:
        return len(self.records)

    def rows(self) -> Iterator[SourceRow]:
        for image_id, captions in zip(self.records.image_ids, self.records.captions, strict=True):
            yield SourceRow({"image_id": image_id, "captions": captions}, self.records.split, f"{image_id}.png")

    def content(self, row: int) -> Content:
        text = {"captions", "image_id", "caption_ids", "split", "filename"}
        return {name: value for name, value in self.records[row].items() if name not in text}
