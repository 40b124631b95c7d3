"""Names of splits: one spelling for each, found in file names, and chosen among those that a source has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ALIASES = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "restval": "restval",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "tst": "test",
}
EVERY_SPLIT = "all"  # also what the records of a source without splits are said to belong to


def canonical_split(name: str) -> str:
    """`"val"`, `"dev"`, ... are `"validation"`; a name that is not known stays as it is."""
    return ALIASES.get(name.strip().lower(), name.strip())


def split_of_path(path: Path, root: Path) -> str | None:
    """The split that a file's name tells, or the nearest of its folders below `root`; None where none does."""
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        parts = (path.name,)
    for part in reversed(parts):
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word in ALIASES]
        if words:
            return ALIASES[words[0]]
    return None


def group_by_split(paths: Iterable[Path], root: Path) -> dict[str | None, list[Path]]:
    """Files of each split, in the order of their paths."""
    groups: dict[str | None, list[Path]] = {}
    for path in sorted(paths):
        groups.setdefault(split_of_path(path, root), []).append(path)
    return groups


class NoSuchSplit(ValueError):
    """The chosen split is not in the source.

    Attributes:
        available: the splits that are; `["all"]` where nothing in the source names a split.
    """

    def __init__(self, message: str, available: Iterable[str]) -> None:
        super().__init__(message)
        self.available = sorted({canonical_split(name) for name in available})


@dataclass(frozen=True)
class SplitChoice:
    """Which parts of a source to read, and which of their rows.

    Attributes:
        parts: the chosen parts; None stands for files whose names tell no split.
        rows: the splits that rows may say they belong to; None for any.
        by_name: whether the parts' names were enough; otherwise only the rows can tell.
        several: whether rows of different splits may be mixed.
    """

    parts: tuple[str | None, ...]
    rows: frozenset[str] | None = None
    by_name: bool = True
    several: bool = False


def choose_splits(available: Sequence[str | None], split: str | None, source: str) -> SplitChoice:
    """Choose among a source's named parts; a single part may hold several splits, which its rows then must tell.

    Args:
        available: the splits the source's parts are named after; None for files whose name tells none.
        split: what the user asked for.
        source: the source's name, for the message.

    Raises:
        ValueError: the source has several splits and none was chosen.
        NoSuchSplit: the chosen one is none of them.
    """
    named = [name for name in available if name is not None]
    if split is None and len(available) > 1:
        raise ValueError(
            f"{source} has the splits {_listed(named)} and none was chosen; pass split= one of them, 'a+b' for "
            "several, or 'all'"
        )
    if split is None or split == EVERY_SPLIT:
        return SplitChoice(tuple(available), several=split == EVERY_SPLIT)
    wanted = [canonical_split(part) for part in split.split("+")]
    if not all(wanted):
        raise ValueError(f"split={split!r} holds an empty name; write it as 'train', 'train+restval' or 'all'")
    chosen = [part for name in wanted for part in named if canonical_split(part) == name]
    if len(chosen) == len(wanted):
        # files named "train" commonly hold Karpathy's restval too, each row saying which it is
        extra = ["restval"] if "train" in wanted else []
        return SplitChoice(tuple(chosen), frozenset([*wanted, *extra]), several=True)
    if len(available) == 1:
        return SplitChoice(tuple(available), frozenset(wanted), by_name=False, several=True)
    missing = [name for name in wanted if name not in map(canonical_split, named)]
    text = f"{source} has no split {_listed(missing)}; it has {_listed(named)}: pass one of these, or 'all'"
    raise NoSuchSplit(text, named)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
