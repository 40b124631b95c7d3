"""`load_pairs`: image-caption records out of a preset, a folder, files or a dataset of the Hub."""

from __future__ import annotations

import glob
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, overload

from .caption_files import CAPTION_SUFFIXES
from .folders import caption_files_in, is_hidden, open_folder, open_sidecars
from .hub_tables import is_dataset, is_saved, load_saved, name_of, open_datasets, open_hub
from .image_folder import IMAGE_SUFFIXES, leads_out
from .images import MAX_IMAGE_PIXELS, Check
from .named_files import NamedFiles
from .parquet_tables import open_parquet
from .paths import is_local, missing_path
from .records import PairDataset, PairStream, build_dataset
from .scan import open_scan, scan_stems
from .skipped import OF_CAPTIONS
from .sources import JoinedSource, PairSource, ScenesSource, joined
from .splits import EVERY_SPLIT, SplitChoice, choose_splits
from .tables import TableSource
from .webdataset import TAR_SUFFIXES, open_webdataset

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Source: TypeAlias = str | os.PathLike[str] | Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset]

logger = logging.getLogger(__name__)

Opened = tuple[PairSource, SplitChoice]


@dataclass(frozen=True)
class Preset:
    """A public copy of a benchmark under Karpathy's splits.

    Attributes:
        repositories: Hub repository of each split.
        images: how many images each split has.
    """

    repositories: Mapping[str, str]
    images: Mapping[str, int]


PRESETS: dict[str, Preset] = {
    "flickr8k": Preset(
        dict.fromkeys(("train", "validation", "test"), "jxie/flickr8k"),
        {"train": 6000, "validation": 1000, "test": 1000},
    ),
    "flickr30k": Preset(
        dict.fromkeys(("train", "validation", "test"), "umaru97/flickr30k_train_val_test"),
        {"train": 29000, "validation": 1014, "test": 1000},
    ),
    "coco": Preset(
        {
            "train": "Multimodal-Fatima/COCO_captions_train",
            "validation": "Multimodal-Fatima/COCO_captions_validation",
            "test": "Multimodal-Fatima/COCO_captions_test",
        },
        {"train": 113287, "validation": 5000, "test": 5000},
    ),
}


@overload
def load_pairs(
    source: Source,
    split: str | None = ...,
    streaming: Literal[False] = ...,
    *,
    verify: Check = ...,
    max_pixels: int = ...,
    **options: Any,
) -> PairDataset: ...
@overload
def load_pairs(
    source: Source,
    split: str | None = ...,
    *,
    streaming: Literal[True],
    max_pixels: int = ...,
    **options: Any,
) -> PairStream: ...
def load_pairs(
    source: Source,
    split: str | None = None,
    streaming: bool = False,
    *,
    verify: Check = "header",
    max_pixels: int = MAX_IMAGE_PIXELS,
    **options: Any,
) -> PairDataset | PairStream:
    """Image-caption records in one shape, whatever the source.

    Args:
        source: "flickr8k", "flickr30k" or "coco" (copies on the Hub, Karpathy's splits); "scenes" (generated); or a
            path: parquet files, webdataset tars, a table of captions beside image files, a text file beside each of
            them, SCAN's `{split}_ims.npy` and `{split}_caps.txt`, one file, a folder (also of `save_to_disk`) or a
            pattern such as "data/*.parquet"; or a Hub dataset's id; or a `datasets.Dataset`, several by split
            (`DatasetDict`), or with streaming an `IterableDataset`.
        split: "train", "validation" (or "val", "dev"), "test", ...; "train+restval" for two, "all" for all. May be
            left out where the source has only one. A preset's name never means a folder: write "./coco" for one.
        streaming: read the records in the order of the source as they are needed, without a length.
        verify: how a map-style data set finds images that cannot be used: "header" (25 microseconds an image; finds
            what is missing, no image, too large or cut short), "full" (decodes every image), or False.
        max_pixels: images with more are left out.
        options: of the source's reader: columns={"image": ..., "captions": ..., "image_id": ...} for tables whose
            columns have other names, extra_columns, image_root (where names of image files begin, and below which
            absolute ones must lie; without it names begin beside the table, or in a folder "images" there, and none
            leaves the data's folder), split_file (Karpathy's JSON, for tables with other splits), captions_file
            (folders), captions_per_image (SCAN), config_name, revision, token, cache_dir (Hub),
            count, seed, image_size (scenes).

    Returns:
        Map-style records, or a stream of them. What cannot be used is left out, counted in `.skipped` and reported.

    Raises:
        ValueError: the source is not found or not understood, the split is not in it, or nothing in it can be used.
    """
    if verify not in ("header", "full", False):
        raise ValueError(f"verify={verify!r}: expected 'header', 'full' or False")
    if max_pixels < 1:
        raise ValueError(f"max_pixels={max_pixels}: expected at least 1")
    name = name_of(source)
    opened, choice = _open(name, source if is_dataset(source) else None, split, streaming, options)
    if streaming:
        return PairStream(opened, choice, max_pixels)
    records = build_dataset(opened, choice, verify, max_pixels)
    if name in PRESETS and not is_dataset(source):
        _check_count(name, choice, records)
    return records


def _open(name: str, dataset: Any, split: str | None, streaming: bool, options: dict[str, Any]) -> Opened:
    """Find the reader for a source, and let it open the source."""
    reader: Callable[..., Opened]
    path = os.path.expanduser(name)
    if dataset is not None:
        reader = partial(open_datasets, dataset, split, streaming, name=name, images=None)
    elif name == "scenes":
        reader = partial(_open_scenes, split=split)
    elif name in PRESETS:
        reader = partial(_open_preset, name, split, streaming)
    elif is_saved(Path(path)):
        images = NamedFiles(Path(path))
        reader = partial(open_datasets, load_saved(Path(path)), split, streaming, name=name, images=images)
    elif Path(path).exists() or glob.has_magic(path):
        reader, options = _file_reader(path, split, dict(options))
    elif name.count("/") == 1 and not is_local(name):
        reader = partial(open_hub, name, split, streaming)
    else:
        raise missing_path(name, f"a path, one of {', '.join([*PRESETS, 'scenes'])}, or a Hub id (owner/name)")
    _check_options(name, reader, options)
    return reader(**options)


def _check_options(name: str, reader: Callable[..., Opened], options: Mapping[str, Any]) -> None:
    taken = reader.keywords if isinstance(reader, partial) else {}
    parameters = inspect.signature(reader).parameters.values()
    known = [p.name for p in parameters if p.default is not p.empty and p.name not in taken]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"{name!r} takes no option {', '.join(unknown)}; its options are {', '.join(known) or 'none'}"
        )


def _file_reader(
    name: str, split: str | None, options: dict[str, Any]
) -> tuple[Callable[..., Opened], dict[str, Any]]:
    """The reader for files or a folder, told by what is there."""
    root = Path(name)
    files = _files(name)
    if not root.is_dir():
        root = Path(os.path.commonpath([path.parent for path in files]))
    tars = [path for path in files if path.name.lower().endswith(TAR_SUFFIXES)]
    shards = {path.with_suffix("") for path in tars}
    # img2dataset leaves a parquet of addresses beside each shard
    parquet = [path for path in files if path.suffix.lower() == ".parquet" and path.with_suffix("") not in shards]
    arrays = [path for path in files if path.name.endswith("_ims.npy")]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    given = options.pop("captions_file", None)
    captions = [Path(given)] if given else [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES]
    if given:
        if not Path(given).is_file():
            raise ValueError(f"captions_file={str(given)!r} is no file; pass the path of the table of captions")
        image_folder = {"image_root": name} if Path(name).is_dir() else {}
        return partial(open_folder, captions, Path(given).parent, name, split), image_folder | options
    if parquet:
        return partial(open_parquet, parquet, root, name, split), options
    if arrays and scan_stems(root):
        return partial(open_scan, root, name, split), options
    if tars:
        return partial(open_webdataset, tars, root, name, split), options
    if captions:
        return partial(open_folder, captions, root, name, split), options
    if images:
        return partial(open_sidecars, images, root, name, split), options
    raise ValueError(
        f"{name} holds nothing that is understood (files seen: {[path.name for path in files[:8]]}). Expected "
        ".parquet files, .tar shards, *_ims.npy with *_caps.txt, or a table of captions "
        f"({', '.join(CAPTION_SUFFIXES)}) beside the images, or a text file for each of them (a.jpg, a.txt); "
        "captions_file= names a table that lies elsewhere"
    )


def _files(name: str) -> list[Path]:
    """The files that a path or pattern stands for: of a folder its tables, shards and arrays, at any depth."""
    if Path(name).is_file():
        return [Path(name)]
    if not Path(name).is_dir():
        found = sorted(Path(path) for path in glob.glob(name, recursive=True) if isfile(path))
        if not found:
            raise ValueError(f"source={name!r}: the pattern matches no file; check it from {os.getcwd()}")
        return found
    folder = Path(name)
    endings = (".parquet", *TAR_SUFFIXES)
    large, linked = [], []
    for parent, folders, names in os.walk(folder):
        paths = [Path(parent, found) for found in names if found.lower().endswith(endings)]
        large += [path for path in paths if isfile(path)]  # a pipe or a folder of such a name is no table
        links = [path for path in (Path(parent, found) for found in folders) if path.is_symlink()]
        linked += [path for path in links if leads_out(path, folder.resolve())]
    if linked:
        count = len(linked)
        logger.warning("%s: %d linked folders were not followed, such as %s; pass their paths", name, count, linked[0])
    arrays = [path for path in folder.glob("*_ims.npy") if isfile(path)]
    large = [path for path in large if not is_hidden(path, folder)]
    return sorted(large) or sorted({*arrays, *caption_files_in(folder)})


def _open_preset(
    name: str, split: str | None, streaming: bool, revision: str | None = None, token: str | None = None,
    cache_dir: str | None = None, extra_columns: Sequence[str] = (),
) -> Opened:  # fmt: skip
    """A preset's splits, each from its repository."""
    preset = PRESETS[name]
    options: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "extra_columns": extra_columns,
    }
    chosen = choose_splits(list(preset.repositories), split, name)
    opened = []
    for part in map(str, chosen.parts):
        repository = preset.repositories[part]
        # a repository that holds one split alone may call it anything
        alone = list(preset.repositories.values()).count(repository) == 1
        source, _ = open_hub(repository, EVERY_SPLIT if alone else part, streaming, **options)
        for table in source.parts if isinstance(source, JoinedSource) else [source]:
            cast(TableSource, table).split = part
        opened.append(source)
    return joined(name, opened), chosen


def _check_count(name: str, choice: SplitChoice, records: PairDataset) -> None:
    """Refuse a benchmark whose copy has changed: figures on it would compare with nothing."""
    expected = sum(PRESETS[name].images[str(part)] for part in choice.parts)
    lost = sum(count for reason, count in records.skipped.items() if reason not in OF_CAPTIONS)
    if len(records) + lost != expected:
        raise ValueError(
            f"{name}, split {'+'.join(map(str, choice.parts))!r}: {len(records)} images and {lost} left out, expected "
            f"{expected}: the public copy has changed. Pass revision= of an earlier state, or load it under its own "
            "id if you want it as it is"
        )


def _open_scenes(split: str | None, count: int | None = None, seed: int = 0, image_size: int | None = None) -> Opened:
    """Generated scenes; see `scenes.generate_scenes`."""
    from .scenes import generate_scenes

    size = {} if image_size is None else {"image_size": image_size}
    choice = choose_splits(["train", "validation", "test"], split, "scenes")
    parts = [ScenesSource(generate_scenes(str(part), count=count, seed=seed, **size)) for part in choice.parts]
    return joined("scenes", parts), choice
