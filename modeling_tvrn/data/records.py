"""Image-caption records: a map-style data set and a stream, both in one shape whatever the source."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, overload

import torch.utils.data
from tqdm.auto import tqdm

from .images import MAX_IMAGE_PIXELS, Check, ImageError, image_content
from .named_files import size_of_file
from .schema import ItemId, Pair, SourceRow, read_pair
from .skipped import SkipReport, good_captions
from .sources import Content, PairSource, Shard, check_content, decode_content
from .splits import NoSuchSplit, SplitChoice

logger = logging.getLogger(__name__)

Record = dict[str, Any]
ImageFile = tuple[str, int | None]  # name of an image's file, and its bytes where they are known
REMEMBERED_IDS = 1 << 18  # of a stream, with the files that they are of: some 60 MB
_CHECK_THREADS = 8  # decoding releases Python's lock


@dataclass
class PairTable:
    """Everything of a data set's records but their images: parallel lists, one entry an image.

    Attributes:
        source_rows: the place of each image's content in the source.
    """

    image_ids: list[ItemId] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    caption_ids: list[list[ItemId]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    filenames: list[str] = field(default_factory=list)
    source_rows: list[int] = field(default_factory=list)

    def append(self, pair: Pair, source_row: int) -> None:
        """Add one image."""
        self.image_ids.append(pair.image_id)
        self.captions.append(pair.captions)
        self.caption_ids.append(pair.caption_ids)
        self.splits.append(pair.split)
        self.filenames.append(pair.filename)
        self.source_rows.append(source_row)

    def pair(self, row: int) -> Pair:
        """One image's texts, copied."""
        captions, ids = list(self.captions[row]), list(self.caption_ids[row])
        return Pair(self.image_ids[row], captions, ids, self.splits[row], self.filenames[row])

    def select(self, rows: Sequence[int]) -> PairTable:
        """The given rows, in this order."""
        return PairTable(*([getattr(self, part.name)[row] for row in rows] for part in fields(self)))


def _record(content: Record, pair: Pair) -> Record:
    return content | {
        "captions": pair.captions,
        "image_id": pair.image_id,
        "caption_ids": pair.caption_ids,
        "split": pair.split,
        "filename": pair.filename,
    }


class PairDataset(torch.utils.data.Dataset[Record]):
    """Map-style records; captions and ids are in memory, an image is decoded when its record is asked for.

    A record is `{"image": PIL.Image | "region_features", "region_boxes": arrays, "captions": [str, ...], "image_id":
    int | str, "caption_ids": [...], "split": str, "filename": str}`. Every image id occurs once.

    Attributes:
        name: what the data set is called in messages.
        skipped: what was left out while loading: reason -> count, with examples.
    """

    def __init__(self, source: PairSource, table: PairTable, skipped: SkipReport, max_pixels: int) -> None:
        self.name = source.name
        self.skipped = skipped
        self._source = source
        self._table = table
        self._max_pixels = max_pixels

    @property
    def image_ids(self) -> list[ItemId]:
        """Id of each record's image."""
        return self._table.image_ids

    @property
    def captions(self) -> list[list[str]]:
        """Captions of each record."""
        return self._table.captions

    @property
    def caption_ids(self) -> list[list[ItemId]]:
        """Ids of each record's captions."""
        return self._table.caption_ids

    @property
    def splits(self) -> list[str]:
        """Split of each record."""
        return self._table.splits

    @property
    def filenames(self) -> list[str]:
        """File name of each record, or its place in the source where it has none."""
        return self._table.filenames

    @property
    def scenes(self) -> Any:
        """The generated scenes that the records come from (`SceneRecords`, perhaps more of them); None of others."""
        return self._source.scenes

    def __len__(self) -> int:
        return len(self._table.image_ids)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> PairDataset: ...
    def __getitem__(self, index: int | slice) -> Record | PairDataset:
        """One record with its image decoded, or a data set of a slice.

        Raises:
            ImageError: (a ValueError) the image cannot be decoded; the message names the record.
        """
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = range(len(self))[index]  # negative ones, and IndexError past the end
        try:
            content = decode_content(self._source.content(self._table.source_rows[row]), self._max_pixels)
        except ImageError as error:
            raise ImageError(
                error.reason,
                f"record {row} (image id {self.image_ids[row]!r}, {self.filenames[row]}) of {self.name}: {error}. "
                "Load with verify='full' to find such images beforehand and leave them out",
            ) from error
        return _record(content, self._table.pair(row))

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))

    def select(self, rows: Sequence[int]) -> PairDataset:
        """A data set of the given rows, in this order; images are shared, none is read."""
        chosen = copy.copy(self)
        chosen._table = self._table.select([range(len(self))[row] for row in rows])
        return chosen

    def image_size(self, row: int) -> int | None:
        """Bytes of a record's encoded image, where the source tells them without reading it."""
        return self._source.image_size(self._table.source_rows[row])

    def encoded_image(self, row: int) -> Any:
        """A record's image as the source has it, not decoded: bytes, a path, or a struct of both; None for regions."""
        return self._source.content(self._table.source_rows[row]).get("image")

    def __repr__(self) -> str:
        count = sum(map(len, self.captions))
        return f"PairDataset({self.name!r}, images={len(self)}, captions={count}, skipped={dict(self.skipped)})"


class PairStream(torch.utils.data.IterableDataset[Record]):
    """Records in the order of the source, read as they come; every iteration is one pass.

    Rows that cannot be used are left out, counted in `skipped` and reported by a warning when the pass ends. In a data
    loader with several workers each takes every n-th row and keeps a report of its own.

    Attributes:
        name: what the data set is called in messages.
        skipped: what this pass has left out so far: reason -> count, with examples.
    """

    def __init__(self, source: PairSource, choice: SplitChoice, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        self.name = source.name
        self.skipped = SkipReport()
        self._source = source
        self._choice = choice
        self._max_pixels = max_pixels
        self._files: dict[ItemId, ImageFile] = {}
        self._problems: Callable[[Sequence[str]], Mapping[int, str]] | None = None

    def leaving_out(self, problems: Callable[[Sequence[str]], Mapping[int, str]]) -> PairStream:
        """The stream without captions that a function finds unusable: it gives their places and why."""
        stream = copy.copy(self)
        stream.skipped = SkipReport()
        stream._problems = problems
        return stream

    def shards(self) -> list[Shard]:
        """The parts of the source that can be read alone."""
        return self._source.shards()

    def load(self, row: SourceRow, content: Callable[[], Content]) -> tuple[Content, Pair] | None:
        """A row's content with its captions and names; None where it has no captions that are wanted, which is counted
        in `skipped`.

        Raises:
            ValueError: its image id is that of another file, among the first `REMEMBERED_IDS` ids.
        """
        return self._load(row, content, set())

    def _load(self, row: SourceRow, content: Callable[[], Content], seen: set[str]) -> tuple[Content, Pair] | None:
        pair = self._wanted(row, seen)
        if pair is None:
            return None
        loaded = content()
        file = pair.filename, _encoded_size(loaded)
        if pair.image_id in self._files or len(self._files) < REMEMBERED_IDS:
            _check_one_file(self._source, pair, self._files.setdefault(pair.image_id, file), file)
        return loaded, pair

    def _wanted(self, row: SourceRow, seen: set[str]) -> Pair | None:
        pair = read_pair(self._source.layout, row, self.skipped)
        if pair is None or not _is_wanted(pair, self._choice, seen):
            return None
        problems = self._problems(pair.captions) if self._problems is not None else {}
        if problems:
            kept = good_captions(pair.image_id, pair.captions, problems, self.skipped)
            pair.captions = [pair.captions[place] for place in kept]
            pair.caption_ids = [pair.caption_ids[place] for place in kept]
        return pair if pair.captions else None

    def decode(self, content: Content, pair: Pair) -> Record:
        """A record of a row's content and pair.

        Raises:
            ImageError: the image cannot be decoded.
        """
        return _record(decode_content(content, self._max_pixels), pair)

    def __iter__(self) -> Iterator[Record]:
        self.skipped.clear()
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        seen: set[str] = set()
        found = False
        for row, content in itertools.islice(self._source.stream(), first, None, step):
            loaded = self._load(row, content, seen)
            if loaded is not None:
                try:
                    record = self.decode(*loaded)
                except ImageError as error:
                    self.skipped.add(error.reason, f"{loaded[1].image_id}: {error}")
                    continue
                found = True
                yield record
        self.skipped.warn(self.name)
        if not found and worker is None:
            raise _nothing_left(self.name, self._choice, seen, self.skipped)


def build_dataset(
    source: PairSource, choice: SplitChoice, verify: Check = "header", max_pixels: int = MAX_IMAGE_PIXELS
) -> PairDataset:
    """Read all texts of a source, check its images, and report what was left out.

    Rows that repeat an image id are one record with the captions of all of them.

    Raises:
        ValueError: nothing is left, or several splits are mixed without having been asked for.
        NoSuchSplit: no row is of the chosen split.
    """
    report = SkipReport()
    table, seen = _read_table(source, choice, report)
    if not table.image_ids:
        raise _nothing_left(source.name, choice, seen, report)
    if choice.rows is None and len(seen) > 1 and not choice.several:
        raise ValueError(f"{source.name} holds the splits {sorted(seen)}; pass split= one of them, or 'all'")
    if verify and not source.is_trusted:
        table = _checked(source, table, verify, max_pixels, report)
    report.warn(source.name)
    if not table.image_ids:
        raise _nothing_left(source.name, choice, seen, report)
    return PairDataset(source, table, report, max_pixels)


def _read_table(source: PairSource, choice: SplitChoice, report: SkipReport) -> tuple[PairTable, set[str]]:
    table, seen = PairTable(), set[str]()
    row_of: dict[ItemId, int] = {}
    others = merged = 0
    for source_row, row in enumerate(source.rows()):
        pair = read_pair(source.layout, row, report)
        if pair is None:
            continue
        if not _is_wanted(pair, choice, seen):
            others += 1
        elif (known := row_of.setdefault(pair.image_id, len(table.image_ids))) < len(table.image_ids):
            sizes = (source.image_size(place) for place in (table.source_rows[known], source_row))
            files = (table.filenames[known], pair.filename)
            _check_one_file(source, pair, *zip(files, sizes, strict=True))
            _merge(table, known, pair)
            merged += 1
        else:
            table.append(pair, source_row)
    if table.image_ids:
        logger.info("%s: %d images; %d rows of other splits", source.name, len(table.image_ids), others)
    if merged:
        logger.info("%s: %d rows repeat an image id; their captions went to the first such row", source.name, merged)
    return table, seen


def _check_one_file(source: PairSource, pair: Pair, first: ImageFile, second: ImageFile) -> None:
    """Refuse an image id that two files have: one would get the other's captions.

    Raises:
        ValueError: the rows name different files, or their images are of different sizes.
    """
    same_name = first[0] == second[0] or not pair.is_named
    if same_name and (None in (first[1], second[1]) or first[1] == second[1]):
        return
    files = " and ".join(f"{name} ({'unknown' if size is None else size} bytes)" for name, size in (first, second))
    by = source.layout.image_id
    remedy = f"mend the column {by!r}, or leave it out with columns={{'image_id': None}}" if by else "rename one"
    raise ValueError(f"{source.name}: the image id {pair.image_id!r} is of two files, {files}; {remedy}")


def _encoded_size(content: Content) -> int | None:
    image = image_content(content.get("image"))
    if isinstance(image, bytes):
        return len(image)
    return size_of_file(image) if isinstance(image, Path) else None


def _merge(table: PairTable, row: int, pair: Pair) -> None:
    """Add captions to an image that is there already, with ids made anew where they were made of its own place."""
    taken = set(table.caption_ids[row])
    fresh = (f"{pair.image_id}#{number}" for number in itertools.count(len(taken)))
    table.caption_ids[row] += [next(fresh) if name in taken else name for name in pair.caption_ids]
    table.captions[row] += pair.captions


def _is_wanted(pair: Pair, choice: SplitChoice, seen: set[str]) -> bool:
    """Whether a record belongs to the chosen split; a row that names none belongs where its file does."""
    seen.add(pair.split)
    return choice.rows is None or pair.split in choice.rows or (choice.by_name and not pair.own_split)


def _checked(source: PairSource, table: PairTable, how: Check, max_pixels: int, report: SkipReport) -> PairTable:
    """The rows whose images pass the check."""

    def problem(row: int) -> ImageError | None:
        try:
            check_content(source.content(row), how, max_pixels)
        except ImageError as error:
            return error
        return None

    good = []
    # delayed, so that small sets stay silent
    bar = tqdm(total=len(table.source_rows), desc="checking images", unit="image", delay=2, leave=False, disable=None)
    with bar, ThreadPoolExecutor(_CHECK_THREADS) as pool:
        run: Any = pool.map if how == "full" else map
        for start in range(0, len(table.source_rows), 1024):  # in blocks: `map` would queue everything at once
            block = range(start, min(start + 1024, len(table.source_rows)))
            found = run(problem, [table.source_rows[row] for row in block])
            for row, error in zip(block, found, strict=True):
                if error is None:
                    good.append(row)
                else:
                    report.add(error.reason, f"{table.image_ids[row]}: {error}")
            bar.update(len(block))
    return table if len(good) == len(table.source_rows) else table.select(good)


def _nothing_left(name: str, choice: SplitChoice, seen: set[str], report: SkipReport) -> ValueError:
    if choice.rows is not None and not seen & choice.rows:
        text = f"{name} has no record of the split {sorted(choice.rows)}; its rows are of {sorted(seen)}"
        return NoSuchSplit(f"{text}: pass one of these", seen)
    return ValueError(f"{name}: no usable record is left; skipped: {report}")
