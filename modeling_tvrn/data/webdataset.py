"""Webdataset shards: tar files whose members `key.jpg`, `key.txt`, `key.json` together make one row."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .file_kinds import printable
from .schema import IMAGE_COLUMNS, SourceRow, detect_layout
from .sources import Content, PairSource, Rows, Shard, joined
from .splits import SplitChoice, choose_splits, group_by_split

logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SEEN_SAMPLES = 20  # of the first shard, from which the layout is told: one of them may lack a member
_TEXT = ("txt", "caption", "captions", "text", "json")  # members read along with the index


class TarSource(PairSource):
    """Shards of one split, read in order; by row their images are read in place, without unpacking."""

    def __init__(
        self, name: str, split: str | None, shards: Sequence[Path], columns: Mapping[str, Any] | None
    ) -> None:
        self.name = name
        self.split = split
        self._tars = list(shards)
        first = list(itertools.islice(self._samples(self._tars[0]), _SEEN_SAMPLES))
        if not first:
            raise ValueError(f"{self._tars[0]} holds no samples; expected members such as 0001.jpg and 0001.txt")
        seen = dict.fromkeys(name for _, values in first for name in values if name != "json")
        self.layout = detect_layout(seen, columns, str(self._tars[0]))
        self._image_names = tuple(dict.fromkeys((self.layout.image or "jpg", *IMAGE_COLUMNS)))

    def __len__(self) -> int:
        return len(self._index)

    def rows(self) -> Iterator[SourceRow]:
        return (row for row, _ in self._index)

    def content(self, row: int) -> Content:
        place = self._index[row][1]
        if place is None:
            return {"image": None}
        shard, start, size = place
        with open(self._tars[shard], "rb") as file:  # opened anew: safe in forked workers and threads
            file.seek(start)
            return {"image": file.read(size)}

    def image_size(self, row: int) -> int | None:
        place = self._index[row][1]
        return None if place is None else place[2]

    def stream(self) -> Iterator[tuple[SourceRow, Callable[[], Content]]]:
        for shard in self._tars:
            yield from self._shard_stream(shard)

    def shards(self) -> list[Shard]:
        return [Shard(str(shard), partial(self._shard_stream, shard)) for shard in self._tars]

    def _shard_stream(self, shard: Path) -> Rows:
        for key, values in self._samples(shard):
            yield self._row(shard, key, values), partial(dict, image=self._image_of(values))

    @cached_property
    def _index(self) -> list[tuple[SourceRow, tuple[int, int, int] | None]]:
        """Every row's texts, and its image's place: number of the shard, first byte, size."""
        return [entry for number in range(len(self._tars)) for entry in self._indexed(number)]

    def _indexed(self, number: int) -> list[tuple[SourceRow, tuple[int, int, int] | None]]:
        shard = self._tars[number]
        if shard.suffix != ".tar":
            raise ValueError(
                f"{shard} is compressed, so its rows cannot be read by number; unpack it, or streaming=True"
            )
        samples: dict[str, dict[str, Any]] = {}
        with _reading(shard, "r:") as tar:
            for member, key, extension in _members(tar):
                sample = samples.setdefault(key, {})
                if extension in _TEXT:
                    sample |= _text_columns(shard, member.name, extension, _bytes(tar, member))
                else:
                    sample[extension] = (number, member.offset_data, member.size)
        return [(self._row(shard, key, values), self._image_of(values)) for key, values in samples.items()]

    def _samples(self, shard: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Samples in the order of the file, their members read; those of one sample stand together."""
        current, sample = "", dict[str, Any]()
        with _reading(shard, "r|*") as tar:
            for member, key, extension in _members(tar):
                if key != current and sample:
                    yield current, sample
                    sample = {}
                current = key
                content = _bytes(tar, member)
                is_text = extension in _TEXT
                sample |= _text_columns(shard, member.name, extension, content) if is_text else {extension: content}
        if sample:
            yield current, sample

    def _row(self, shard: Path, key: str, values: Mapping[str, Any]) -> SourceRow:
        # keys begin anew in every shard of many data sets, so the shard and the split are part of the name
        place = [part for part in (self.split, printable(shard.name).split(".")[0], key) if part]
        return SourceRow({k: v for k, v in values.items() if k not in self._image_names}, self.split, "/".join(place))

    def _image_of(self, values: Mapping[str, Any]) -> Any:
        return next((values[name] for name in self._image_names if name in values), None)


@contextmanager
def _reading(shard: Path, mode: Any) -> Iterator[tarfile.TarFile]:
    """An open tar file, whose damage is reported with the shard's name."""
    try:
        with tarfile.open(shard, mode) as tar:
            yield tar
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{shard} is not a whole tar file ({error}); fetch it again, or leave it out") from error


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Plain files with their key and extension, split at the name's first dot as webdataset does."""
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if member.isfile() and stem and extension and not name.startswith("__"):
            yield member, f"{folder}/{stem}" if folder not in ("", ".") else stem, extension.lower()


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return content


def _text_columns(shard: Path, name: str, extension: str, content: bytes) -> dict[str, Any]:
    text = content.decode("utf-8", "surrogateescape")  # a caption that is no UTF-8 is left out as such
    if extension != "json":
        return {extension: text}
    try:
        found = json.loads(text)
    except ValueError as error:
        logger.warning("%s in %s is not valid JSON (%s): read without it", printable(name), shard, error)
        found = {}
    # images come from members alone, whatever a JSON field of that name says
    fields = found if isinstance(found, Mapping) else {}
    return {"json": True} | {column: value for column, value in fields.items() if column not in IMAGE_COLUMNS}


def open_webdataset(
    shards: Sequence[Path],
    root: Path,
    name: str,
    split: str | None,
    columns: Mapping[str, Any] | None = None,
) -> tuple[PairSource, SplitChoice]:
    """Tar shards, whose names or folders tell their splits (`test/0.tar`, `flickr30k-test-000.tar`)."""
    groups = group_by_split(shards, root)
    choice = choose_splits(list(groups), split, name)
    return joined(name, [TarSource(name, part, groups[part], columns) for part in choice.parts]), choice
