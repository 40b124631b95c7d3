"""Tables with one row an image, as parquet files and datasets of the Hub have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from .caption_files import read_splits
from .named_files import NamedFiles, size_of_file
from .schema import Layout, SourceRow, check_extra_columns, detect_layout, file_name
from .sources import Content, PairSource, Rows
from .splits import EVERY_SPLIT

_SPLIT_OF_FILE = "split in split_file"  # a column that is added
_UNLISTED = "unlisted"


@dataclass(frozen=True)
class TableOptions:
    """How to read a table.

    Attributes:
        columns: the user's choice of columns, see `schema.detect_layout`.
        image_root: folder of the images where the table only names them.
        extra_columns: columns that records keep under their own names.
        split_file: a table of file names and splits, in place of the splits that the data have themselves.
    """

    columns: Mapping[str, Any] | None = None
    image_root: str | Path | None = None
    extra_columns: Sequence[str] = ()
    split_file: str | Path | None = None

    def layout(self, seen: Sequence[str], name: str) -> Layout:
        """The layout of a table with the columns `seen`.

        Raises:
            ValueError: the columns are not understood, or do not serve these options.
        """
        check_extra_columns(self.extra_columns, seen, name)
        layout = detect_layout(seen, self.columns, name, has_images=self.image_root is not None)
        if layout.filename is None and (self.split_file or not (layout.image or layout.regions)):
            raise ValueError(
                f"{name} has no column with the images' file names, which image_root= and split_file= need; columns "
                f"seen: {list(seen)}. Name it with columns={{'filename': ...}}"
            )
        return layout if self.split_file is None else replace(layout, split=_SPLIT_OF_FILE)


class TableSource(PairSource):
    """A table whose rows hold images (or names of files, or region arrays) and captions.

    Args:
        name: what to call it in messages.
        split: the split its file or folder is named after.
        seen: its columns.
        options: how to read it.
        images: the files that it may name where `options` have no `image_root`.
    """

    start = 0  # number of the first row

    def __init__(
        self, name: str, split: str | None, seen: Sequence[str], options: TableOptions, images: NamedFiles
    ) -> None:
        self.name = name
        self.split = split
        self.layout = options.layout(seen, name)
        self.images = images if options.image_root is None else NamedFiles(options.image_root, is_given=True)
        self.has_root = options.image_root is not None
        self.extra_columns = tuple(options.extra_columns)
        self.split_of = None if options.split_file is None else read_splits(Path(options.split_file))

    @cached_property
    def dataset(self) -> Any:
        """The `datasets.Dataset`, memory-mapped, whose images are left encoded."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self) -> Iterator[SourceRow]:
        text = self.dataset.select_columns(self._text_columns).with_format("arrow")
        batches = (batch.to_pylist() for batch in text.iter(1000))
        return self._numbered((row for batch in batches for row in batch), self.start)

    def content(self, row: int) -> Content:
        return self._content(self._contents[row])

    def image_size(self, row: int) -> int | None:
        known = self._image_sizes[row] if self._image_sizes else None
        if known is not None:
            return known
        image = self.content(row).get("image")
        return size_of_file(image) if isinstance(image, Path) else None

    @cached_property
    def _image_sizes(self) -> list[int | None]:
        """Bytes of each image in the table itself, from the column's offsets: none of them is read."""
        if self.layout.image is None:
            return []
        column = self.dataset.select_columns([self.layout.image]).with_format("arrow")
        return [size for batch in column.iter(1000) for size in _sizes(batch.column(0).combine_chunks())]

    @cached_property
    def _contents(self) -> Any:
        """The dataset without the columns that a record's content does not need."""
        return self.dataset.select_columns(self._content_columns)

    @property
    def _text_columns(self) -> list[str]:
        return [name for name in self.layout.text_columns if name != _SPLIT_OF_FILE]

    @property
    def _content_columns(self) -> list[str]:
        names = [*self.layout.regions, *self.extra_columns]
        if self.has_root:
            names += [name for name in (self.layout.folder, self.layout.filename) if name is not None]
        if self.layout.image is not None:
            names.append(self.layout.image)
        return list(dict.fromkeys(names))

    def _numbered(self, rows: Iterable[Mapping[str, Any]], start: int = 0, shard: str = "") -> Iterator[SourceRow]:
        for number, values in enumerate(rows, start):
            if self.split_of is not None:
                found = self.split_of.get(str(values[self.layout.filename or ""]), _UNLISTED)
                values = {**values, _SPLIT_OF_FILE: found}
            yield SourceRow(values, self.split, f"{self.split or EVERY_SPLIT}/{shard}{number:06d}")

    def _streamed(self, rows: Iterable[Mapping[str, Any]], start: int = 0, shard: str = "") -> Rows:
        for row in self._numbered(rows, start, shard):
            yield row, partial(self._content, row.values)

    def _content(self, values: Mapping[str, Any]) -> Content:
        content: Content = {name: values[name] for name in self.extra_columns}
        if self.layout.regions:
            arrays = {name: np.asarray(values[name]) for name in self.layout.regions if values[name] is not None}
            return content | {"region_features": np.empty((0, 0))} | arrays
        image = values[self.layout.image] if self.layout.image else None
        path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
        if isinstance(path, str) or (path is None and self.has_root):
            image = self.images.find(path or file_name(self.layout, values))
        return content | {"image": image}


def _sizes(images: Any) -> list[int | None]:
    """Sizes of a column's images, of bytes or of structs with bytes; None for files that are named."""
    import pyarrow
    import pyarrow.compute

    kind = images.type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _sizes(images.field("bytes"))
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return list(pyarrow.compute.binary_length(images).to_pylist())
    return [None] * len(images)


def left_encoded(dataset: Any, image: str | None) -> Any:
    """The dataset with images as bytes: they are decoded here, within bounds, and one that is corrupt is seen."""
    import datasets

    if image is not None and isinstance((dataset.features or {}).get(image), datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    return dataset
