"""Tables with one row an image: parquet files, and datasets of the Hub read through `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from .folders import find_image, names_of_file
from .schema import Layout, SourceRow, detect_layout
from .sources import Content, PairSource, joined
from .splits import EVERY_SPLIT, SplitChoice, choose_splits, group_by_split

_BATCH = 64  # rows decompressed at a time while streaming: some megabytes of photographs


class TableSource(PairSource):
    """A table whose rows hold images (or names of files, or region arrays) and captions.

    Args:
        name: what to call it in messages.
        split: the split its file or folder is named after.
        layout: which column holds what.
        image_root: folder of the images where the table only names them.
        extra_columns: columns that records keep under their own names.
    """

    def __init__(
        self, name: str, split: str | None, layout: Layout, image_root: Path | None, extra_columns: Sequence[str]
    ) -> None:
        self.name = name
        self.split = split
        self.layout = layout
        self.image_root = image_root
        self.extra_columns = tuple(extra_columns)

    @cached_property
    def dataset(self) -> Any:
        """The `datasets.Dataset`, memory-mapped, whose images are left encoded."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self) -> Iterator[SourceRow]:
        text = self.dataset.select_columns(self.layout.text_columns).with_format("arrow")
        batches = (batch.to_pylist() for batch in text.iter(1000))
        return self._numbered(row for batch in batches for row in batch)

    def content(self, row: int) -> Content:
        return self._content(self._contents[row])

    @cached_property
    def _contents(self) -> Any:
        """The dataset without the columns that a record's content does not need."""
        return self.dataset.select_columns(self._content_columns)

    @property
    def _content_columns(self) -> list[str]:
        names = [*self.layout.regions, *self.extra_columns]
        if self.image_root is not None:
            names += [name for name in (self.layout.folder, self.layout.filename) if name is not None]
        if self.layout.image is not None:
            names.append(self.layout.image)
        return list(dict.fromkeys(names))

    def _numbered(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[SourceRow]:
        for number, values in enumerate(rows):
            yield SourceRow(values, self.split, f"{self.split or EVERY_SPLIT}/{number:06d}")

    def _content(self, values: Mapping[str, Any]) -> Content:
        content: Content = {name: values[name] for name in self.extra_columns}
        if self.layout.regions:
            arrays = {name: np.asarray(values[name]) for name in self.layout.regions if values[name] is not None}
            return content | {"region_features": np.empty((0, 0))} | arrays
        image = values[self.layout.image] if self.layout.image else None
        if self.image_root is not None and not _holds_bytes(image):
            path = image.get("path") if isinstance(image, Mapping) else image
            image = find_image(self.image_root, [*([path] if path else []), *names_of_file(values, self.layout)])
        return content | {"image": image}


def _holds_bytes(image: Any) -> bool:
    return isinstance(image, bytes) or (isinstance(image, Mapping) and image.get("bytes") is not None)


class ParquetSource(TableSource):
    """Parquet files of one split. Their rows are mapped by `datasets` when first needed, not while streaming."""

    def __init__(self, files: Sequence[Path], cache_dir: str | None = None, **table: Any) -> None:
        super().__init__(**table)
        self.files = list(files)
        self.cache_dir = cache_dir

    @cached_property
    def dataset(self) -> Any:
        import datasets

        files = {"train": [str(path) for path in self.files]}
        dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=self.cache_dir)
        return _left_encoded(dataset, self.layout.image)

    def stream(self) -> Iterator[tuple[SourceRow, Callable[[], Content]]]:
        # with pyarrow alone: the read-ahead threads of `datasets` can abort a process that stops in mid-stream
        for row in self._numbered(self._file_rows()):
            yield row, partial(self._content, row.values)

    def _file_rows(self) -> Iterator[Mapping[str, Any]]:
        import pyarrow.parquet

        columns = list(dict.fromkeys([*self.layout.text_columns, *self._content_columns]))
        for path in self.files:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BATCH, columns=columns, use_threads=False):
                    yield from batch.to_pylist()


class HubSource(TableSource):
    """One split of a dataset on the Hub, mapped or streamed by `datasets`."""

    def __init__(self, dataset: Any, **table: Any) -> None:
        super().__init__(**table)
        self._given = dataset

    @cached_property
    def dataset(self) -> Any:
        return _left_encoded(self._given, self.layout.image)

    def stream(self) -> Iterator[tuple[SourceRow, Callable[[], Content]]]:
        for row in self._numbered(self.dataset):
            yield row, partial(self._content, row.values)


def _left_encoded(dataset: Any, image: str | None) -> Any:
    """The dataset with images as bytes: they are decoded here, within bounds, and one that is corrupt is seen."""
    import datasets

    if image is not None and isinstance((dataset.features or {}).get(image), datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    return dataset


def open_parquet(
    files: Sequence[Path],
    root: Path,
    name: str,
    split: str | None,
    columns: Mapping[str, Any] | None = None,
    image_root: str | Path | None = None,
    extra_columns: Sequence[str] = (),
    cache_dir: str | None = None,
) -> tuple[PairSource, SplitChoice]:
    """Parquet files, whose names tell their splits (`train-00000-of-00004.parquet`).

    Args:
        image_root: folder of the images where the tables only name them.
        extra_columns: columns that records keep under their own names.
        cache_dir: where `datasets` keeps the mapped copy instead of its own cache.
    """
    import pyarrow.parquet

    groups = group_by_split(files, root)
    choice = choose_splits(list(groups), split, name)
    image_folder = None if image_root is None else Path(image_root)
    parts = []
    for part in choice.parts:
        seen = {tuple(pyarrow.parquet.read_schema(path).names) for path in groups[part]}
        if len(seen) > 1:
            raise ValueError(f"{name}: files of one split differ in their columns: {sorted(seen)}; load them apart")
        layout = _table_layout(seen.pop(), name, columns, image_folder, extra_columns)
        table = {"name": name, "split": part, "layout": layout, "image_root": image_folder}
        parts.append(ParquetSource(groups[part], cache_dir, extra_columns=extra_columns, **table))
    return joined(name, parts), choice


def open_hub(
    repository: str,
    split: str | None,
    streaming: bool,
    columns: Mapping[str, Any] | None = None,
    image_root: str | Path | None = None,
    extra_columns: Sequence[str] = (),
    config_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> tuple[PairSource, SplitChoice]:
    """A dataset of the Hub in parquet or webdataset form (or a folder that `datasets` can load).

    Args:
        image_root: folder of the images where the dataset only names them (`yerevann/coco-karpathy`).
        extra_columns: columns that records keep under their own names.
        config_name, revision, token, cache_dir: as `datasets.load_dataset` takes them.
    """
    import datasets

    place = {"name": config_name, "revision": revision, "token": token, "cache_dir": cache_dir}
    with _hub_errors(repository):
        builder = datasets.load_dataset_builder(repository, **place)
    available = [str(part) for part in (builder.info.splits or builder.config.data_files or {})]
    choice = choose_splits(available, split, repository)
    image_folder = None if image_root is None else Path(image_root)
    parts = []
    for part in choice.parts:
        with _hub_errors(repository):
            dataset = datasets.load_dataset(repository, split=part, streaming=streaming, **place)
        seen = dataset.column_names or list(next(iter(dataset)))
        layout = _table_layout(seen, repository, columns, image_folder, extra_columns)
        table = {"name": repository, "split": part, "layout": layout, "image_root": image_folder}
        parts.append(HubSource(dataset, extra_columns=extra_columns, **table))
    return joined(repository, parts), choice


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Failures to find or reach a dataset, said in one way."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # not found, gated, offline, or a loading script
        raise ValueError(
            f"{repository!r} is no file or folder here and could not be loaded from the Hub: {error} "
            f"({type(error).__name__}). Check the name, the network and, for gated data, the token; or download it "
            "and pass the folder"
        ) from error


def _table_layout(
    columns: Sequence[str],
    name: str,
    chosen: Mapping[str, Any] | None,
    image_root: Path | None,
    extra_columns: Sequence[str],
) -> Layout:
    for extra in extra_columns:
        if extra not in columns:
            raise ValueError(f"extra_columns={extra!r}: {name} has no such column; it has {list(columns)}")
    layout = detect_layout(columns, chosen, name, has_images=image_root is not None)
    if layout.image is None and not layout.regions and layout.filename is None:
        raise ValueError(
            f"{name} names no image files, so image_root={str(image_root)!r} cannot serve; {list(columns)}"
        )
    return layout
