"""Tables of captions in text files: CSV, TSV, JSON, JSON lines, Karpathy's and COCO's JSON, Flickr's token file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .delimited import DELIMITERS, read_delimited
from .image_folder import leads_out
from .schema import CAPTION_COLUMNS, FILENAME_COLUMNS, IMAGE_COLUMNS, is_caption_column, lines_of
from .text_files import read_json_file, read_json_lines, text_of

CAPTION_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".json", ".jsonl", ".ndjson")
SIDECAR_SUFFIXES = (".txt", ".caption")  # of a text file that is called as its image
_KNOWN_COLUMNS = {*CAPTION_COLUMNS, *FILENAME_COLUMNS, *IMAGE_COLUMNS}
_TOKEN_LINE = re.compile(r"([^\t#]+)#\d+\t")
Row = dict[str, Any]


def read_caption_file(path: Path, columns: Iterable[str] = ()) -> list[Row]:
    """Rows of a caption table, as columns by name.

    Args:
        columns: further names by which the delimiter of a header is found.

    Raises:
        ValueError: the file is not in a form that is understood, or a line of it is broken; the message names both.
    """
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".json": _read_json, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines
    }  # fmt: skip
    suffix = path.suffix.lower()
    if suffix not in CAPTION_SUFFIXES:
        raise ValueError(f"{path} is not a caption table; expected a file that ends in {', '.join(CAPTION_SUFFIXES)}")
    rows = readers[suffix](path) if suffix in readers else _read_text(path, columns)
    if not rows:
        raise ValueError(f"{path} holds no rows; expected one caption or one image a row")
    return rows


def read_sidecars(images: Iterable[Path], folder: Path) -> list[Row]:
    """A row for each image of a resolved folder, with the lines of the text file that is called as it is (`a.txt`)."""
    rows = []
    for image in images:
        beside = map(image.with_suffix, SIDECAR_SUFFIXES)
        texts = [path for path in beside if path.is_file() and not leads_out(path, folder)]
        text = texts[0].read_bytes().decode("utf-8-sig", "surrogateescape") if texts else ""
        rows.append({"filename": image.relative_to(folder).as_posix(), "captions": lines_of(text) if texts else []})
    return rows


def read_splits(path: Path) -> dict[str, str]:
    """The split of each image file, from a table with both, such as Karpathy's `dataset_flickr30k.json`.

    Raises:
        ValueError: the table has no file names or no splits.
    """
    rows = read_caption_file(path)
    filename = next((name for name in FILENAME_COLUMNS if name in rows[0]), None)
    if filename is None or "split" not in rows[0]:
        raise ValueError(
            f"{path} does not tell which split an image file belongs to; columns seen: {list(rows[0])}, expected "
            "filename and split, as in Karpathy's dataset_*.json"
        )
    return {str(row[filename]): str(row["split"]) for row in rows}


def is_caption_table(path: Path) -> bool:
    """Whether a text file beside a table can be one itself; a README or statistics are none. Broken ones may be."""
    try:
        if path.suffix.lower() == ".txt":
            header = text_of(path).split("\n", 1)[0]
            names = (name.strip().strip('"') for mark in DELIMITERS for name in header.split(mark))
            return _TOKEN_LINE.match(header) is not None or any(map(is_caption_column, names))
        if path.suffix.lower() == ".json":
            content = read_json_file(path)
            rows = _table_in(content) or [{}]
            return any(map(is_caption_column, rows[0])) or (isinstance(content, Mapping) and "annotations" in content)
    except ValueError:
        pass
    return True


def _read_json(path: Path) -> list[Row]:
    content = read_json_file(path)
    if isinstance(content, Mapping) and "images" in content and "annotations" in content:
        return _joined_coco(path, content)
    rows = _table_in(content)
    if rows is None:
        raise ValueError(
            f"{path} is not a table; expected a list of objects, Karpathy's or COCO's form with 'images', or an "
            "object of file name -> captions"
        )
    return rows


def _table_in(content: Any) -> list[Row] | None:
    """The rows in a JSON value: its objects, those under "images", or names with their captions; None for no table."""
    if isinstance(content, Mapping) and "images" in content:
        content = content["images"]
    elif isinstance(content, Mapping):
        if not all(isinstance(texts, str | list) for texts in content.values()):
            return None
        return [{"filename": name, "captions": texts} for name, texts in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        return None
    return [dict(row) for row in content]


def _joined_coco(path: Path, content: Mapping[str, Any]) -> list[Row]:
    """COCO's caption files: images and captions apart, tied by image id."""
    images = _objects_with(path, content, "images", "id")
    notes = _objects_with(path, content, "annotations", "image_id")
    names = {image["id"]: image.get("file_name") for image in images}
    rows = [
        {"image_id": note["image_id"], "filename": names.get(note["image_id"]), "caption": note.get("caption")}
        for note in notes
    ]
    if all("id" in note for note in notes):
        return [{**row, "caption_id": note["id"]} for row, note in zip(rows, notes, strict=True)]
    return rows


def _objects_with(path: Path, content: Mapping[str, Any], part: str, key: str) -> Sequence[Mapping[str, Any]]:
    found = content[part]
    if isinstance(found, list) and all(
        isinstance(row, Mapping) and isinstance(row.get(key), int | str) for row in found
    ):
        return found
    raise ValueError(f"{path}: {part!r} is not a list of objects that each have {key!r}, as COCO's files hold it")


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    for number, row in read_json_lines(path):
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}, line {number} is a {type(row).__name__}, expected an object")
        rows.append(dict(row))
    return rows


def _read_text(path: Path, columns: Iterable[str]) -> list[Row]:
    text = text_of(path)
    if _TOKEN_LINE.match(text.split("\n", 1)[0]):
        return _token_rows(path, text)
    return list(read_delimited(path, text, _KNOWN_COLUMNS.union(columns)))


def _token_rows(path: Path, text: str) -> list[Row]:
    """Flickr's own form, without a header: `1000268201.jpg#0<tab>A child ...`."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        match = _TOKEN_LINE.match(line)
        if match is None:
            raise ValueError(f"{path}, line {number}: expected 'file.jpg#number<tab>caption', got {line[:80]!r}")
        caption_id, caption = line.split("\t", 1)
        rows.append({"filename": match[1], "caption_id": caption_id, "caption": caption})
    return rows
