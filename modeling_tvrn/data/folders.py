"""A folder of image files beside a table of captions (CSV, TSV, JSON, …), or beside a text file for each of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .caption_files import CAPTION_SUFFIXES, SIDECAR_SUFFIXES, is_caption_table, read_caption_file, read_sidecars
from .image_folder import IMAGE_SUFFIXES, image_files
from .named_files import NamedFiles, size_of_file
from .schema import (
    LINE_COLUMNS,
    Layout,
    SourceRow,
    check_extra_columns,
    detect_layout,
    file_name,
    named_columns,
    read_captions,
    read_ids,
)  # fmt: skip
from .sources import Content, PairSource, joined
from .splits import SplitChoice, choose_splits, group_by_split


class FolderSource(PairSource):
    """Image files of one caption table; rows that name the same file are one row with all their captions."""

    def __init__(
        self,
        name: str,
        split: str | None,
        rows: Sequence[Mapping[str, Any]],
        layout: Layout,
        images: NamedFiles,
        extra_columns: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.split = split
        self.layout = layout
        self.images = images
        self.extra_columns = tuple(extra_columns)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> Iterator[SourceRow]:
        for number, values in enumerate(self._rows):
            yield SourceRow(values, self.split, file_name(self.layout, values) or f"{self.name}, image {number}")

    def content(self, row: int) -> Content:
        values = self._rows[row]
        kept = {column: values.get(column) for column in self.extra_columns}
        return kept | {"image": self.images.find(file_name(self.layout, values))}

    def image_size(self, row: int) -> int | None:
        found = self.images.find(file_name(self.layout, self._rows[row]))
        return size_of_file(found) if isinstance(found, Path) else None


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
        images = NamedFiles(path.parent, root) if image_root is None else NamedFiles(image_root, is_given=True)
        rows, layout = _grouped_table(path, columns, extra_columns)
        parts.append(FolderSource(str(path), part, rows, layout, images, extra_columns))
    return joined(name, parts), choice


def open_sidecars(images: Sequence[Path], root: Path, name: str, split: str | None) -> tuple[PairSource, SplitChoice]:
    """Image files, each beside a text file of its name with a caption a line (`a.jpg`, `a.txt`)."""
    root = root.resolve()
    groups = group_by_split(images, root)
    choice = choose_splits(list(groups), split, name)
    layout = Layout(captions=("captions",), filename="filename")
    parts = [
        FolderSource(name, part, read_sidecars(groups[part], root), layout, NamedFiles(root)) for part in choice.parts
    ]
    return joined(name, parts), choice


def _grouped_table(
    path: Path, columns: Mapping[str, Any] | None, extra_columns: Sequence[str]
) -> tuple[list[dict[str, Any]], Layout]:
    """The rows of a table, those of the same file and split as one, in the order in which each file first appears."""
    table = read_caption_file(path, named_columns(columns or {}))
    seen = list(dict.fromkeys(column for row in table for column in row))
    layout = detect_layout(seen, columns, str(path), has_images=True)
    filename = layout.filename or layout.image
    if filename is None:
        raise ValueError(
            f"{path} has no column with the images' file names; columns seen: {seen}. Expected filename, file_name, "
            "image, filepath, ..., or columns={'filename': ...}"
        )
    check_extra_columns(extra_columns, seen, str(path))
    layout = replace(layout, filename=filename, image=None, regions=())
    # A file whose rows are of two splits is in both: who trains on one and validates on the other is to hear of it.
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in table:
        place = tuple(str(row.get(name or "") or "") for name in (layout.folder, layout.filename, layout.split))
        groups.setdefault(place, []).append(row)
    merged = [_merged(rows, layout) for rows in groups.values()]
    return merged, replace(layout, captions=("captions",), caption_ids="caption_ids")


def _merged(rows: Sequence[Mapping[str, Any]], layout: Layout) -> dict[str, Any]:
    """The first row, with the captions of all under "captions" and their ids, where every caption has one."""
    merged = {name: value for name, value in rows[0].items() if name not in layout.captions}
    per_line = layout.captions[0] in LINE_COLUMNS
    texts = [read_captions([row.get(name) for name in layout.captions], per_line) or [""] for row in rows]
    merged["captions"] = [text for part in texts for text in part]
    ids = [read_ids(row, layout) for row in rows]
    merged["caption_ids"] = None if None in ids else [item for part in ids for item in part or ()]
    return merged


def caption_files_in(folder: Path) -> list[Path]:
    """The tables of captions directly in a folder; where there is none, its images, if texts of their names lie beside
    them (`a.jpg`, `a.txt`), else the tables in folders of it (`train/metadata.csv`).

    A README or statistics beside a table are none, unless there is nothing else.
    """
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and os.path.isfile(path)]
    images = {path.stem for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
    texts = sorted(path for path in files if path.suffix.lower() in CAPTION_SUFFIXES)
    tables = [path for path in texts if not (path.suffix.lower() in SIDECAR_SUFFIXES and path.stem in images)]
    if found := list(filter(is_caption_table, tables)):
        return found
    captioned = sorted(image_files(folder.resolve()))
    if any(path.with_suffix(ending).is_file() for path in captioned for ending in SIDECAR_SUFFIXES):
        return captioned
    return _tables_below(folder) or texts


def _tables_below(folder: Path) -> list[Path]:
    endings = set(CAPTION_SUFFIXES) - {".json"}  # which must be read whole to be told from others
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    tables = (path for path in paths if path.suffix.lower() in endings and not is_hidden(path, folder))
    return sorted(path for path in tables if os.path.isfile(path) and is_caption_table(path))


def is_hidden(path: Path, root: Path) -> bool:
    """Whether a file, or a folder of it below the root, is hidden."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)
