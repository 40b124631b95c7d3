"""Webdataset shards: tar files whose members `key.jpg`, `key.txt`, `key.json` together make one row."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .file_kinds import printable
from .schema import IMAGE_COLUMNS, SourceRow, detect_layout, read_captions
from .skipped import BAD_METADATA, Unusable
from .sources import Content, PairSource, Rows, Shard, joined
from .splits import SplitChoice, choose_splits, group_by_split
from .text_files import read_json

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SEEN_SAMPLES = 20  # of the first shard, from which the layout is told: one of them may lack a member
_TEXT = ("txt", "caption", "captions", "text", "json")  # members read along with the index
_FAULT = "why it is unusable"  # a column that is added to a sample

Place = tuple[int, int]  # first byte and size of a member
Sample = dict[str, Any]


class TarSource(PairSource):
    """Shards of one split, read in order; of plain ones images are read in place, without unpacking."""

    def __init__(
        self, name: str, split: str | None, shards: Sequence[Path], columns: Mapping[str, Any] | None
    ) -> None:
        self.name = name
        self.split = split
        self._tars = list(shards)
        first = _first_samples(self._tars[0])
        if not first:
            raise ValueError(f"{self._tars[0]} holds no samples; expected members such as 0001.jpg and 0001.txt")
        seen = dict.fromkeys(name for values in first for name in values if name not in ("json", _FAULT))
        self.layout = detect_layout(seen, columns, str(self._tars[0]))
        self._image_names = tuple(dict.fromkeys((self.layout.image or "jpg", *IMAGE_COLUMNS)))

    def __len__(self) -> int:
        return len(self._index)

    def rows(self) -> Iterator[SourceRow]:
        return (row for row, _, _ in self._index)

    def content(self, row: int) -> Content:
        _, shard, place = self._index[row]
        return _content_at(shard, place)

    def image_size(self, row: int) -> int | None:
        place = self._index[row][2]
        return None if place is None else place[1]

    def stream(self) -> Rows:
        for shard in self._tars:
            yield from self._shard_stream(shard)

    def shards(self) -> list[Shard]:
        return [Shard(str(shard), partial(self._shard_stream, shard)) for shard in self._tars]

    def _shard_stream(self, shard: Path) -> Rows:
        if _is_plain(shard):
            for row, place in self._indexed(shard):
                yield row, partial(_content_at, shard, place)
        else:
            for key, values in _samples_in_a_row(shard):
                yield self._row(shard, key, values), partial(dict, image=self._image_of(values))

    @cached_property
    def _index(self) -> list[tuple[SourceRow, Path, Place | None]]:
        """Every row's texts, its shard, and its image's place there."""
        return [(row, shard, place) for shard in self._tars for row, place in self._indexed(shard)]

    def _indexed(self, shard: Path) -> Iterator[tuple[SourceRow, Place | None]]:
        if not _is_plain(shard):
            raise ValueError(
                f"{shard} is compressed, so its rows cannot be read by number; unpack it, or streaming=True"
            )
        samples: dict[str, Sample] = {}
        with _reading(shard, "r:") as tar:
            for member, key, extension in _members(tar):
                samples.setdefault(key, {}).update(_columns_of(tar, member, extension, in_place=True))
        return ((self._row(shard, key, values), self._image_of(values)) for key, values in samples.items())

    def _row(self, shard: Path, key: str, values: Sample) -> SourceRow:
        # keys begin anew in every shard of many data sets, so the shard and the split are part of the name
        place = [part for part in (self.split, printable(shard.name).split(".")[0], key) if part]
        texts = {name: value for name, value in values.items() if name not in self._image_names}
        return SourceRow(texts, self.split, "/".join(place), values.get(_FAULT))

    def _image_of(self, values: Sample) -> Any:
        return next((values[name] for name in self._image_names if name in values), None)


def _is_plain(shard: Path) -> bool:
    return shard.suffix.lower() == ".tar"


def _content_at(shard: Path, place: Place | None) -> Content:
    if place is None:
        return {"image": None}
    with open(shard, "rb") as file:  # opened anew: safe in forked workers and threads
        file.seek(place[0])
        return {"image": file.read(place[1])}


def _first_samples(shard: Path) -> list[Sample]:
    """A shard's samples up to so many that have an image and something beside it."""
    samples: dict[str, Sample] = {}
    whole = set[str]()
    with _reading(shard, "r:" if _is_plain(shard) else "r|*") as tar:
        for member, key, extension in _members(tar):
            if len(whole) == _SEEN_SAMPLES and key not in whole:
                break
            sample = samples.setdefault(key, {})
            sample |= _columns_of(tar, member, extension, in_place=True)
            if len(sample) > 1 and not sample.keys().isdisjoint(IMAGE_COLUMNS):
                whole.add(key)
    return list(samples.values())


def _samples_in_a_row(shard: Path) -> Iterator[tuple[str, Sample]]:
    """Samples of a compressed shard in the order of the file, their members read; those of one must stand together."""
    current, sample, seen = "", Sample(), set[str]()
    with _reading(shard, "r|*") as tar:
        for member, key, extension in _members(tar):
            if key != current and sample:
                yield current, sample
                seen.add(current)
                sample = {}
            if key in seen:
                raise ValueError(
                    f"{shard}: the members of {key!r} do not stand together, which a compressed file is not searched "
                    "for; unpack it"
                )
            current = key
            sample |= _columns_of(tar, member, extension, in_place=False)
    if sample:
        yield current, sample


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


def _columns_of(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, in_place: bool) -> Sample:
    """What a member adds to its sample: texts as they are read, an image as its place in the file or its bytes."""
    if extension not in _TEXT:
        return {extension: (member.offset_data, member.size) if in_place else _bytes(tar, member)}
    text = _bytes(tar, member).decode("utf-8", "surrogateescape")  # a caption that is no UTF-8 is left out as such
    if extension != "json":
        return {extension: read_captions([text], per_line=True)}
    try:
        found = read_json(text, printable(member.name))
    except ValueError as error:
        return {"json": True, _FAULT: Unusable(BAD_METADATA, f"{error} (in {tar.name!s})")}
    # images come from members alone, whatever a JSON field of that name says
    fields = found if isinstance(found, Mapping) else {}
    return {"json": True} | {name: fields[name] for name in fields if name not in (*IMAGE_COLUMNS, _FAULT)}


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return content


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
