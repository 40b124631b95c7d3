"""A folder of image files beside a table of captions (CSV, TSV, JSON, JSON lines, Flickr's token file)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .caption_files import CAPTION_SUFFIXES, read_caption_file
from .schema import Layout, SourceRow, detect_layout, read_captions, read_ids
from .sources import Content, PairSource, joined
from .splits import SplitChoice, choose_splits, group_by_split

_IMAGE_FOLDERS = ("", "images", "Images")


def find_image(root: Path, names: Sequence[str]) -> Path:
    """The first of the names that is a file below the root, or in a folder "images" of it; else where it should be."""
    for name in names:
        for folder in _IMAGE_FOLDERS:
            for path in (root / folder / name, root / folder / Path(name).name):
                if os.path.isfile(path):  # False, and no error, for names that no file can have
                    return path
    return root / (names[0] if names else "(no file name)")


def size_of_file(path: str | Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def names_of_file(values: Mapping[str, Any], layout: Layout) -> list[str]:
    """The names under which a row's image file may be found, the fullest first."""
    folder, name = (str(values.get(column or "") or "") for column in (layout.folder, layout.filename))
    joint = f"{folder}/{name}" if folder and name and folder != name else ""
    return [part for part in (joint, folder, name) if part]


class FolderSource(PairSource):
    """Image files of one caption table; rows that name the same file are one row with all their captions."""

    def __init__(
        self,
        name: str,
        split: str | None,
        rows: Sequence[Mapping[str, Any]],
        layout: Layout,
        root: Path,
        extra_columns: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.split = split
        self.layout = layout
        self.root = root
        self.extra_columns = tuple(extra_columns)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> Iterator[SourceRow]:
        for values in self._rows:
            yield SourceRow(values, self.split, str(values[self.layout.filename or ""]))

    def content(self, row: int) -> Content:
        values = self._rows[row]
        kept = {column: values.get(column) for column in self.extra_columns}
        return kept | {"image": self._path(values)}

    def image_size(self, row: int) -> int | None:
        return size_of_file(self._path(self._rows[row]))

    def _path(self, values: Mapping[str, Any]) -> Path:
        return find_image(self.root, names_of_file(values, self.layout))


def open_folder(
    caption_files: Sequence[Path],
    root: Path,
    name: str,
    split: str | None,
    columns: Mapping[str, Any] | None = None,
    image_root: str | Path | None = None,
    extra_columns: Sequence[str] = (),
) -> tuple[PairSource, SplitChoice]:
    """Caption tables, one or one a split, and the image files that they name.

    Args:
        image_root: folder of the images, by default the one the tables lie in (or a folder "images" in it).
        extra_columns: columns that records keep under their own names.
    """
    groups = group_by_split(caption_files, root)
    choice = choose_splits(list(groups), split, name)
    parts = []
    for part in choice.parts:
        if len(groups[part]) > 1:
            files = [path.name for path in groups[part]]
            raise ValueError(f"{name} has several caption tables {files}; pass captions_file= with one of them")
        path = groups[part][0]
        folder = Path(image_root) if image_root is not None else path.parent
        rows, layout = _grouped_table(path, columns, extra_columns)
        parts.append(FolderSource(str(path), part, rows, layout, folder, extra_columns))
    return joined(name, parts), choice


def _grouped_table(
    path: Path, columns: Mapping[str, Any] | None, extra_columns: Sequence[str]
) -> tuple[list[dict[str, Any]], Layout]:
    table = read_caption_file(path)
    seen = list(dict.fromkeys(column for row in table for column in row))
    layout = detect_layout(seen, columns, str(path), has_images=True)
    filename = layout.filename or layout.image
    if filename is None:
        raise ValueError(
            f"{path} has no column with the images' file names; columns seen: {seen}. Expected filename, file_name, "
            "image, filepath, ..., or columns={'filename': ...}"
        )
    for extra in extra_columns:
        if extra not in seen:
            raise ValueError(f"extra_columns={extra!r}: {path} has no such column; it has {seen}")
    layout = replace(layout, filename=filename, image=None, regions=())
    return _grouped(table, layout), replace(layout, captions=("captions",), caption_ids="caption_ids")


def _grouped(table: Sequence[Mapping[str, Any]], layout: Layout) -> list[dict[str, Any]]:
    """Rows of the same file and split brought together, in the order in which each file first appears.

    A file whose rows are of two splits is in both, so that who trains on one and validates on the other hears of it.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in table:
        place = tuple(str(row.get(name or "") or "") for name in (layout.folder, layout.filename, layout.split))
        groups.setdefault(place, []).append(row)
    return [_merged(rows, layout) for rows in groups.values()]


def _merged(rows: Sequence[Mapping[str, Any]], layout: Layout) -> dict[str, Any]:
    """The first row, with the captions of all under "captions" and their ids, where every caption has one."""
    merged = {name: value for name, value in rows[0].items() if name not in layout.captions}
    texts = [read_captions([row.get(name) for name in layout.captions]) or [""] for row in rows]
    ids = [read_ids(row, layout) for row in rows]
    merged["captions"] = [text for part in texts for text in part]
    merged["caption_ids"] = None if None in ids else [item for part in ids for item in part or ()]
    return merged


def caption_files_in(folder: Path) -> list[Path]:
    """Files directly in a folder that may be caption tables."""
    tables = (path for path in folder.iterdir() if path.suffix.lower() in CAPTION_SUFFIXES)
    return sorted(path for path in tables if os.path.isfile(path))
