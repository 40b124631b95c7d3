"""What can be indexed: a folder of photographs, records, captions, encoded features."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..data.file_kinds import is_unicode, printable, why_unreadable
from ..data.image_folder import image_files
from ..data.images import ImageError, decode_image, read_image_file
from ..data.schema import REGION_COLUMNS
from ..data.skipped import BAD_NAME, BROKEN_CAPTION, UNREADABLE_FILE, WORDLESS_CAPTION, Unusable
from ..encoded_tvrn import EncodedItems

RESERVED = ("id", "path", "text", "key", "size", "mtime_ns")
READ_TRIES = 3  # of a file that changes while it is read


@dataclass
class Loaded:
    """An item's content.

    Attributes:
        key: Hash of the content: equal content is encoded once, whatever it is called.
        content: A record for the processor, a caption, or encoded features of one item.
    """

    key: str
    content: Any


@dataclass
class Item:
    """One thing to be found.

    Attributes:
        id: Its name in the index.
        load: Reads it; raises `Unusable` for what cannot be used.
        path: Its file, where it has one.
        text: Its caption, where it is one.
        size: Of its file, bytes; 0 without a file.
        mtime_ns: Of its file; 0 without a file.
        metadata: What searches can filter by.
    """

    id: str
    load: Callable[[], Loaded]
    path: str | None = None
    text: str | None = None
    size: int = 0
    mtime_ns: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Where items come from."""

    @property
    def name(self) -> str: ...
    @property
    def side(self) -> str: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Item]: ...


class FolderSource:
    """The photographs of a folder, at any depth; hidden files, and links that lead out of it, are left out."""

    side = "images"

    def __init__(self, folder: Path, metadata: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.folder = folder.resolve()
        self.name = str(self.folder)
        self.metadata = metadata or {}
        self._closed: list[OSError] = []
        self._paths = sorted(image_files(self.folder, onerror=self._closed.append))

    def __len__(self) -> int:
        return len(self._paths) + len(self._closed)

    def __iter__(self) -> Iterator[Item]:
        for error in self._closed:
            detail = f"{printable(error.filename)}: {why_unreadable(error.filename, error)}"
            yield Item(printable(error.filename), _Refused(Unusable(UNREADABLE_FILE, detail)))
        for path in self._paths:
            name = path.relative_to(self.folder).as_posix()
            item = Item(name, load=lambda: Loaded("", None), path=str(path))
            folder = path.parent.relative_to(self.folder).as_posix()
            item.metadata = {"folder": "" if folder == "." else folder} | dict(self.metadata.get(name, {}))
            _note_file(item, path)
            item.load = _FileLoader(item, path)
            yield item


def folder_names(folder: str) -> list[str]:
    """What a filter may call a folder: "2021/winter" is found by its path, and by "2021" or "winter"."""
    parts = folder.split("/")
    return ["/".join(parts[start:end]) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1)]


class _FileLoader:
    """Reads a photograph whole, so that what is hashed is what is decoded, even in a folder that changes meanwhile."""

    def __init__(self, item: Item, path: Path) -> None:
        self.item, self.path = item, path

    def __call__(self) -> Loaded:
        content = b""
        for _ in range(READ_TRIES):
            before = (self.item.size, self.item.mtime_ns)
            content = read_image_file(self.path)
            _note_file(self.item, self.path)
            if before == (self.item.size, self.item.mtime_ns) and len(content) == self.item.size:
                break
        try:
            image = decode_image(content)
        except ImageError as error:
            raise ImageError(error.reason, f"{printable(self.path)}: {error.why}", error.why) from error
        return Loaded(_hash(content), {"image": image})


def _note_file(item: Item, path: Path) -> None:
    try:
        found = path.stat()
    except OSError:  # gone since the folder was read: loading says so
        item.size, item.mtime_ns = -1, -1
    else:
        item.size, item.mtime_ns = found.st_size, found.st_mtime_ns


class RecordSource:
    """The images of records, or their captions."""

    def __init__(self, records: Any, side: str) -> None:
        self.records, self.side = records, side
        self.name = str(getattr(records, "name", type(records).__name__))

    def __len__(self) -> int:
        if self.side == "texts" and hasattr(self.records, "captions"):
            return sum(len(captions) for captions in self.records.captions)
        return len(self.records) if hasattr(self.records, "__len__") else 0

    def __iter__(self) -> Iterator[Item]:
        return self._captions() if self.side == "texts" else self._images()

    def _images(self) -> Iterator[Item]:
        ids = getattr(self.records, "image_ids", None)
        if ids is None or not hasattr(self.records, "__getitem__"):
            yield from map(self._image, self.records)
            return
        for row, image_id in enumerate(ids):
            try:
                yield self._image(self.records[row])
            except ImageError as error:  # what a check of the headers cannot see
                yield Item(str(image_id), _Refused(error))

    def _image(self, record: Mapping[str, Any]) -> Item:
        metadata = {name: record[name] for name in ("split", "captions") if record.get(name) is not None}
        item = Item(str(record["image_id"]), _Ready(_record_key(record), record), metadata=metadata)
        item.path = record.get("filename") or None
        return item

    def _captions(self) -> Iterator[Item]:
        for captions, ids, image_id, filename in self._texts():
            for caption, caption_id in zip(captions, ids, strict=True):
                metadata = {"image_id": str(image_id)} | ({"filename": filename} if filename else {})
                yield Item(str(caption_id), _Caption(caption), text=caption, metadata=metadata)

    def _texts(self) -> Iterator[tuple[Sequence[str], Sequence[Any], Any, str | None]]:
        """Captions without decoding an image, where the records know them."""
        if all(hasattr(self.records, name) for name in ("captions", "caption_ids", "image_ids", "filenames")):
            table = self.records
            yield from zip(table.captions, table.caption_ids, table.image_ids, table.filenames, strict=True)
            return
        for record in self.records:
            ids = record.get("caption_ids") or [f"{record['image_id']}#{k}" for k in range(len(record["captions"]))]
            yield record["captions"], ids, record["image_id"], record.get("filename")


class CaptionSource:
    """Captions alone; their ids are their places in the list."""

    side, name = "texts", "captions"

    def __init__(self, captions: Sequence[str], metadata: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.captions, self.metadata = captions, metadata or {}

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator[Item]:
        for number, caption in enumerate(self.captions):
            metadata = dict(self.metadata.get(str(number), {}))
            yield Item(str(number), _Caption(caption), text=caption, metadata=metadata)


class EncodedSource:
    """Features that are encoded already, with ids of the caller's."""

    def __init__(
        self,
        encoded: EncodedItems,
        ids: Sequence[Any] | None = None,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if ids is not None and len(ids) != len(encoded):
            raise ValueError(f"{len(ids)} ids for {len(encoded)} encoded items; give one an item")
        self.encoded, self.ids, self.metadata = encoded, ids, metadata or {}
        self.side = "images" if type(encoded).__name__ == "EncodedImages" else "texts"
        self.name = "encoded features"

    def __len__(self) -> int:
        return len(self.encoded)

    def __iter__(self) -> Iterator[Item]:
        embeds = self.encoded.tensors()["embeds"]
        for row in range(len(self.encoded)):
            name = str(row if self.ids is None else self.ids[row])
            key = _hash(embeds[row].detach().float().cpu().numpy().tobytes() + name.encode())
            content = self.encoded.select(slice(row, row + 1))
            yield Item(name, _Ready(key, content), metadata=dict(self.metadata.get(name, {})))


def open_source(source: Any, side: str | None, ids: Any, metadata: Any) -> Source:
    """The reader for whatever was given.

    Raises:
        ValueError: If it is nothing that can be indexed.
    """
    if side not in (None, "images", "texts"):
        raise ValueError(f"side is {side!r}; expected 'images' or 'texts'")
    if isinstance(source, EncodedItems):
        return EncodedSource(source, ids, metadata)
    if ids is not None:
        raise ValueError("ids= names encoded features; other sources have names of their own: leave it out")
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_dir():
            raise ValueError(f"{os.fspath(source)!r} is no folder; give a folder of photographs, records, or captions")
        if side == "texts":
            raise ValueError("a folder of photographs has no captions to index; give records, or a list of captions")
        return FolderSource(Path(source), metadata)
    if isinstance(source, Sequence) and any(isinstance(each, str) for each in source):
        return CaptionSource(source, metadata)
    if isinstance(source, Iterable):
        return RecordSource(source, side or "images")
    raise ValueError(
        f"a {type(source).__name__} cannot be indexed; expected a folder, records of load_pairs, a list of captions, "
        "or EncodedImages / EncodedTexts"
    )


@dataclass
class _Ready:
    """Content that is at hand."""

    key: str
    content: Any

    def __call__(self) -> Loaded:
        return Loaded(self.key, self.content)


@dataclass
class _Caption:
    """A caption; what is none is refused when it is its turn."""

    caption: Any

    def __call__(self) -> Loaded:
        if not isinstance(self.caption, str):
            raise Unusable(WORDLESS_CAPTION, f"{self.caption!r:.80} is a {type(self.caption).__name__}")
        if not is_unicode(self.caption):
            raise Unusable(BROKEN_CAPTION, f"{self.caption!r:.80}")
        return Loaded(_hash(self.caption), self.caption)


@dataclass
class _Refused:
    """What turned out to be of no use while it was listed."""

    error: Unusable

    def __call__(self) -> Loaded:
        raise self.error


def check_name(item: Item) -> None:
    """Refuse what the table of the index could not hold: after everything was encoded would be too late.

    Raises:
        Unusable: the id or the path is no UTF-8.
    """
    if not is_unicode(f"{item.id}{item.path}"):
        raise Unusable(BAD_NAME, f"{printable(item.path or item.id)}: rename it")


def _record_key(record: Mapping[str, Any]) -> str:
    if "image" in record:
        image = record["image"]
        return _hash(f"{image.mode}{image.size}".encode() + image.tobytes())
    names = (*REGION_COLUMNS, "image_embeds")
    arrays = [record[name] for name in names if name in record]
    plain = [array.numpy() if isinstance(array, torch.Tensor) else np.asarray(array) for array in arrays]
    return _hash(b"".join(f"{array.dtype}{array.shape}".encode() + array.tobytes() for array in plain))


def _hash(content: bytes | str) -> str:
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=16).hexdigest()
