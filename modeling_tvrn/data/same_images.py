"""Records of the same image: two splits that share some, and copies of a file under several names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from .images import image_content
from .records import PairDataset

__all__ = ["equal_content", "shared_images"]

_TAIL = 4096  # bytes at the end of a file, which differ where the files do but for the rarest cases
Item = tuple[PairDataset, int]


def shared_images(training: PairDataset, validation: PairDataset) -> list[tuple[int, int]]:
    """Rows (of training, of validation) of the same image, one a validation row, in its order.

    The same image is one whose encoded content is the same, or whose id is, unless the contents are known to differ:
    `0001.jpg` of two folders are two images. Region features, and pictures that are drawn, go by their ids alone.
    """
    found = {}
    row_of = {str(name): row for row, name in enumerate(training.image_ids)}
    for row, name in enumerate(validation.image_ids):
        same = row_of.get(str(name))
        if same is None:
            continue
        first, second = (training, same), (validation, row)
        known = _size(first) is not None and _size(second) is not None
        if not (known and any(key(first) != key(second) for key in (_size, _tail, _digest))):
            found[row] = same
    others = [(validation, row) for row in range(len(validation)) if row not in found]
    sizes = {_size(item) for item in others}
    candidates = [(training, row) for row in range(len(training)) if training.image_size(row) in sizes]
    for group in equal_content([*candidates, *others]):
        trained = [row for records, row in group if records is training]
        found |= {row: trained[0] for records, row in group if records is validation and trained}
    return [(found[row], row) for row in sorted(found)]


def equal_content(items: Iterable[Item]) -> list[list[Item]]:
    """Records whose encoded images are the same bytes, in groups of two and more.

    Only files of equal size are opened, and only those that end alike are read.
    """
    groups = [list(items)]
    for key in (_size, _tail, _digest):
        groups = [part for group in groups for part in _parted(group, key)]
    return groups


def _parted(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    parts: dict[Hashable, list[Item]] = {}
    for item in items:
        if (value := key(item)) is not None:
            parts.setdefault(value, []).append(item)
    return [part for part in parts.values() if len(part) > 1]


def _size(item: Item) -> int | None:
    records, row = item
    return records.image_size(row)


def _tail(item: Item) -> bytes | None:
    return _read(item, _TAIL)


def _digest(item: Item) -> bytes | None:
    content = _read(item)
    return None if content is None else hashlib.sha256(content).digest()


def _read(item: Item, last: int = 0) -> bytes | None:
    """A record's encoded image, or so many of its last bytes; None where it is not to be had."""
    records, row = item
    encoded = image_content(records.encoded_image(row))
    if isinstance(encoded, bytes):
        return encoded[-last:]
    if not isinstance(encoded, str | os.PathLike):
        return None
    try:
        with Path(encoded).open("rb") as file:
            file.seek(-min(last, os.path.getsize(encoded)), os.SEEK_END if last else os.SEEK_SET)
            return file.read()
    except OSError:
        return None
