"""Parquet files on this machine."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .named_files import NamedFiles
from .sources import PairSource, Rows, Shard, joined
from .splits import SplitChoice, choose_splits, group_by_split
from .tables import TableOptions, TableSource, left_encoded

_BATCH = 64  # rows decompressed at a time while streaming: some megabytes of photographs


class ParquetSource(TableSource):
    """Parquet files of one split and of the same column types. Their rows are mapped by `datasets` when first needed,
    not while streaming.

    Args:
        files: of the same types.
        start: number of the first row.
    """

    def __init__(
        self,
        files: Sequence[Path],
        name: str,
        split: str | None,
        options: TableOptions,
        images: NamedFiles,
        cache_dir: str | None = None,
        start: int = 0,
    ) -> None:
        super().__init__(name, split, _metadata(files[0]).schema.to_arrow_schema().names, options, images)
        self.files = list(files)
        self.cache_dir = cache_dir
        self.start = start

    @cached_property
    def dataset(self) -> Any:
        import datasets

        # `datasets` takes names for patterns
        files = {"train": [glob.escape(str(path)) for path in self.files]}
        try:
            dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=self.cache_dir)
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(
                f"{self.name} cannot be read ({error.__cause__ or error}); load its {len(self.files)} parquet files "
                "one by one to find the broken one, and fetch that again"
            ) from error
        return left_encoded(dataset, self.layout.image)

    def stream(self) -> Rows:
        # with pyarrow alone: the read-ahead threads of `datasets` can abort a process that stops in mid-stream
        return self._streamed(itertools.chain.from_iterable(map(self._rows_of, self.files)), self.start)

    def shards(self) -> list[Shard]:
        """Row groups: a file is often written as several, of some hundred rows each."""
        import pyarrow.parquet

        found, start = [], self.start
        for path in self.files:
            metadata = pyarrow.parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                found.append(Shard(f"{path}, row group {group}", partial(self._group_stream, path, group, start)))
                start += metadata.row_group(group).num_rows
        return found

    def _group_stream(self, path: Path, group: int, start: int) -> Rows:
        return self._streamed(self._rows_of(path, [group]), start)

    def _rows_of(self, path: Path, groups: list[int] | None = None) -> Iterator[Mapping[str, Any]]:
        """Rows of some row groups of a file, or of all of them."""
        import pyarrow.parquet

        columns = list(dict.fromkeys([*self._text_columns, *self._content_columns]))
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_BATCH, row_groups=groups, columns=columns, use_threads=False)
            for batch in batches:
                yield from batch.to_pylist()


def open_parquet(
    files: Sequence[Path],
    root: Path,
    name: str,
    split: str | None,
    columns: Mapping[str, Any] | None = None,
    image_root: str | Path | None = None,
    extra_columns: Sequence[str] = (),
    split_file: str | Path | None = None,
    cache_dir: str | None = None,
) -> tuple[PairSource, SplitChoice]:
    """Parquet files, whose names tell their splits (`train-00000-of-00004.parquet`).

    Args:
        columns, image_root, extra_columns, split_file: see `TableOptions`.
        cache_dir: where `datasets` keeps the mapped copy instead of its own cache.
    """
    groups = group_by_split(files, root)
    choice = choose_splits(list(groups), split, name)
    options = TableOptions(columns, image_root, extra_columns, split_file)
    images = NamedFiles(root)
    parts = []
    for part in choice.parts:
        start = 0
        for run, rows in _alike(groups[part], name):
            parts.append(ParquetSource(run, name, part, options, images, cache_dir, start))
            start += rows
    return joined(name, parts), choice


def _alike(files: Sequence[Path], name: str) -> list[tuple[list[Path], int]]:
    """The files in runs of equal column types, each with its number of rows; those without a row are left out.

    Raises:
        ValueError: none has a row, or they differ in their columns.
    """
    runs: list[tuple[list[Path], int]] = []
    known = None
    for path in files:
        metadata = _metadata(path)
        schema = metadata.schema.to_arrow_schema()
        if not metadata.num_rows:
            continue
        if len(set(schema.names)) < len(schema.names):
            raise ValueError(f"{path} has a column twice: {schema.names}; rename one of them")
        if known is not None and set(known.names) != set(schema.names):
            seen = sorted([sorted(known.names), sorted(schema.names)])
            raise ValueError(f"{name}: files of one split differ in their columns: {seen}; load them apart")
        if known is not None and known.equals(schema):
            run, rows = runs.pop()
            runs.append(([*run, path], rows + metadata.num_rows))
        else:
            runs.append(([path], metadata.num_rows))
        known = schema
    if not runs:
        raise ValueError(f"{name} holds no rows in {len(files)} parquet files; expected an image or a caption a row")
    return runs


def _metadata(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole parquet file ({error}); fetch it again, or leave it out") from error
