"""Datasets of the Hub, read through `datasets`: parquet or webdataset, without loading scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..redaction import redacted_text
from .schema import SourceRow
from .sources import Content, PairSource, Rows, Shard, joined
from .splits import SplitChoice, choose_splits
from .tables import TableOptions, TableSource, left_encoded


class HubSource(TableSource):
    """One split of a dataset on the Hub, mapped or streamed."""

    def __init__(self, dataset: Any, name: str, split: str | None, options: TableOptions) -> None:
        super().__init__(name, split, dataset.column_names or list(next(iter(dataset))), options)
        self._given = dataset

    @cached_property
    def dataset(self) -> Any:
        return left_encoded(self._given, self.layout.image)

    def stream(self) -> Iterator[tuple[SourceRow, Callable[[], Content]]]:
        for row in self._numbered(self.dataset):
            yield row, partial(self._content, row.values)

    def shards(self) -> list[Shard]:
        count = int(getattr(self.dataset, "num_shards", 1))
        if count < 2:
            return super().shards()
        names = [f"{self.name}, {self.split or 'all'}, shard {number} of {count}" for number in range(count)]
        return [Shard(name, partial(self._shard_stream, number, count)) for number, name in enumerate(names)]

    def _shard_stream(self, number: int, count: int) -> Rows:
        part = self.dataset.shard(num_shards=count, index=number)
        for row in self._numbered(part, shard=f"{number:05d}-"):
            yield row, partial(self._content, row.values)


def open_hub(
    repository: str,
    split: str | None,
    streaming: bool,
    columns: Mapping[str, Any] | None = None,
    image_root: str | Path | None = None,
    extra_columns: Sequence[str] = (),
    split_file: str | Path | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> tuple[PairSource, SplitChoice]:
    """A dataset of the Hub in parquet or webdataset form (or a folder that `datasets` can load).

    Args:
        columns, extra_columns: see `TableOptions`.
        image_root: folder of the images where the dataset only names them (`yerevann/coco-karpathy`).
        split_file: for datasets of other splits than Karpathy's (`lmms-lab/flickr30k`): his `dataset_*.json`, or
            another table of file names and splits.
        config_name, revision, token, cache_dir: as `datasets.load_dataset` takes them.
    """
    import datasets

    options = TableOptions(columns, image_root, extra_columns, split_file)
    place = {"name": config_name, "revision": revision, "token": token, "cache_dir": cache_dir}
    with _hub_errors(repository):
        builder = datasets.load_dataset_builder(repository, **place)
    available = [str(part) for part in (builder.info.splits or builder.config.data_files or {})]
    choice = choose_splits(available, split, repository)
    parts = []
    for part in choice.parts:
        with _hub_errors(repository):
            dataset = datasets.load_dataset(repository, split=part, streaming=streaming, **place)
        parts.append(HubSource(dataset, repository, part, options))
    return joined(repository, parts), choice


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Failures to find or reach a dataset, said in one way."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # not found, gated, offline, or a loading script
        problem = redacted_text(str(error))
        raise ValueError(
            f"{repository!r} is no file or folder here and could not be loaded from the Hub: {problem} "
            f"({type(error).__name__}). Check the name, the network and, for gated data, the token; or download it "
            "and pass the folder"
        ) from error
