"""Datasets of the Hub (parquet or webdataset, without loading scripts) and in memory, read through `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..redaction import redacted_text
from .image_folder import leads_out
from .named_files import HUB_FILES, OWN_FILES, NamedFiles, bounds_of
from .paths import near_paths
from .sources import PairSource, Rows, Shard, joined
from .splits import SplitChoice, choose_splits
from .tables import TableOptions, TableSource, left_encoded
from .text_files import read_json_file


class HubSource(TableSource):
    """A `datasets.Dataset` or `IterableDataset`: one split of a dataset on the Hub, or of one in memory."""

    def __init__(self, dataset: Any, name: str, split: str | None, options: TableOptions, images: NamedFiles) -> None:
        super().__init__(name, split, dataset.column_names or list(next(iter(dataset))), options, images)
        self._given = dataset

    @cached_property
    def dataset(self) -> Any:
        return left_encoded(self._given, self.layout.image)

    def stream(self) -> Rows:
        return self._streamed(self.dataset)

    def shards(self) -> list[Shard]:
        count = int(getattr(self.dataset, "num_shards", 1))
        if count < 2:
            return super().shards()
        names = [f"{self.name}, {self.split or 'all'}, shard {number} of {count}" for number in range(count)]
        return [Shard(name, partial(self._shard_stream, number, count)) for number, name in enumerate(names)]

    def _shard_stream(self, number: int, count: int) -> Rows:
        return self._streamed(self.dataset.shard(num_shards=count, index=number), shard=f"{number:05d}-")


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
        parts.append(HubSource(dataset, repository, part, options, _files_of(dataset, HUB_FILES)))
    return joined(repository, parts), choice


def is_dataset(source: Any) -> bool:
    """Whether a source is a dataset in memory, or datasets by split, and no name or path."""
    return not isinstance(source, str | os.PathLike)


def name_of(source: Any) -> str:
    """What to call a source in messages: a name or path as it is, a dataset by its class."""
    return f"datasets.{type(source).__name__}" if is_dataset(source) else os.fspath(source)


def open_datasets(
    source: Any,
    split: str | None,
    streaming: bool,
    columns: Mapping[str, Any] | None = None,
    image_root: str | Path | None = None,
    extra_columns: Sequence[str] = (),
    split_file: str | Path | None = None,
    *,
    name: str,
    images: NamedFiles | None = None,
) -> tuple[PairSource, SplitChoice]:
    """A `datasets.Dataset`, an `IterableDataset`, or a mapping of split to these, such as a `DatasetDict`.

    Args:
        columns, image_root, extra_columns, split_file: see `TableOptions`.
        name: what messages call it.
        images: the files that it may name; default: by where it comes from.

    Raises:
        ValueError: something else, a mapping that holds something else, or a stream that is not to be streamed.
    """
    options = TableOptions(columns, image_root, extra_columns, split_file)
    if isinstance(source, Mapping):
        parts = dict(source)
    else:  # the split that it says it is, without the rows chosen of it (`train[:10%]`)
        own = getattr(source, "split", None)
        parts = {None if own is None else str(own).partition("[")[0]: source}
    _check_datasets(parts)
    choice = choose_splits(list(parts), split, name)
    # Without the user's format or transform: records hold what the columns hold.
    chosen = {part: _checked_stream(parts[part], name, streaming).with_format(None) for part in choice.parts}
    sources = [HubSource(part, name, split, options, images or _files_of(part)) for split, part in chosen.items()]
    return joined(name, sources), choice


def load_saved(folder: Path) -> Any:
    """What a folder of `save_to_disk` holds.

    Raises:
        ValueError: it is damaged, or says that its tables lie elsewhere.
    """
    import datasets

    try:
        for state in folder.rglob("state.json"):
            for file in read_json_file(state)["_data_files"]:
                # tables that lie elsewhere would be another dataset's
                if leads_out(state.parent / file["filename"], bounds_of(folder.resolve())):
                    raise ValueError(f"{state} names {file['filename']!r}, which is outside of it")
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} cannot be read as save_to_disk writes it ({error}); save it again") from error


def is_saved(folder: Path) -> bool:
    """Whether a folder is one of `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _files_of(dataset: Any, others: NamedFiles = OWN_FILES) -> NamedFiles:
    """Which files a dataset may name: those whose names its program made, and not the data."""
    builder = getattr(dataset.info, "builder_name", None)
    if builder == "imagefolder":  # it names what lies in the folder that it was given
        return OWN_FILES
    return others if builder in (None, "generator") else HUB_FILES


def _check_datasets(parts: Mapping[Any, Any]) -> None:
    import datasets

    allowed = datasets.Dataset | datasets.IterableDataset
    kinds = {type(part).__name__ for part in parts.values() if not isinstance(part, allowed)}
    if kinds or not parts:
        raise ValueError(
            f"source is or holds {', '.join(sorted(kinds)) or 'nothing'}; expected a name, a path, a datasets.Dataset "
            "or IterableDataset, or these by split (Dataset.from_list makes one of a list of dicts, "
            "Dataset.from_pandas of a table)"
        )


def _checked_stream(dataset: Any, name: str, streaming: bool) -> Any:
    import datasets

    if isinstance(dataset, datasets.IterableDataset) and not streaming:
        raise ValueError(
            f"{name} is a stream, without a length or rows by number; pass streaming=True, or make a datasets.Dataset "
            "of it (Dataset.from_generator, or load_dataset without streaming)"
        )
    return dataset


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Failures to find or reach a dataset, or to make it of its files, said in one way."""
    import datasets

    try:
        yield
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # not found, gated, offline, a loading script, or a broken file
        problem = redacted_text(str(error))
        near = near_paths(repository)
        raise ValueError(
            f"{repository!r} is no file or folder here and could not be loaded from the Hub: {problem} "
            f"({type(error).__name__}). Check the name, the network and, for gated data, the token; or download it "
            f"and pass the folder{f'. Did you mean {near[0]}?' if near else ''}"
        ) from error
