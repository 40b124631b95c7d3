"""Tables of captions in text files: CSV, TSV, JSON, JSON lines, Karpathy's and COCO's JSON, Flickr's token file."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .schema import CAPTION_COLUMNS, FILENAME_COLUMNS, IMAGE_COLUMNS

CAPTION_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".json", ".jsonl", ".ndjson")
_TOKEN_LINE = re.compile(r"([^\t#]+)#\d+\t")
Row = dict[str, Any]


def read_caption_file(path: Path) -> list[Row]:
    """Rows of a caption table, as columns by name.

    Raises:
        ValueError: the file is not in a form that is understood, or a line of it is broken; the message names both.
    """
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".json": _read_json, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines
    }  # fmt: skip
    if path.suffix.lower() not in CAPTION_SUFFIXES:
        raise ValueError(f"{path} is not a caption table; expected a file that ends in {', '.join(CAPTION_SUFFIXES)}")
    try:
        rows = readers.get(path.suffix.lower(), _read_text)(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if not rows:
        raise ValueError(f"{path} holds no rows; expected one caption or one image a row")
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


def _read_json(path: Path) -> list[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if isinstance(content, Mapping) and "images" in content:
        content = _joined_coco(content) if "annotations" in content else content["images"]
    elif isinstance(content, Mapping):
        content = [{"filename": name, "captions": texts} for name, texts in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        raise ValueError(
            f"{path} is not a table; expected a list of objects, Karpathy's or COCO's form with 'images', or an "
            "object of file name -> captions"
        )
    return [dict(row) for row in content]


def _joined_coco(content: Mapping[str, Any]) -> list[Row]:
    """COCO's caption files: images and captions apart, tied by image id."""
    images = {image["id"]: image.get("file_name") for image in content["images"]}
    return [
        {
            "image_id": note["image_id"],
            "filename": images.get(note["image_id"]),
            "caption": note.get("caption"),
            "caption_id": note["id"],
        }
        for note in content["annotations"]
    ]


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}, line {number} is a {type(row).__name__}, expected an object")
        rows.append(dict(row))
    return rows


def _read_text(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    header = text.split("\n", 1)[0]
    if _TOKEN_LINE.match(header):
        return _token_rows(path, text)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(header)
    return _delimited_rows(path, text, delimiter)


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


def _delimiter(header: str) -> str:
    """The character at which the header falls into the most names that are known; a comma where none does."""
    known = {*CAPTION_COLUMNS, *FILENAME_COLUMNS, *IMAGE_COLUMNS}

    def score(delimiter: str) -> int:
        return sum(name.strip().strip('"') in known for name in header.split(delimiter))

    return max(",\t|;", key=score)


def _delimited_rows(path: Path, text: str, delimiter: str) -> list[Row]:
    clean: Callable[[str], str] = str.strip
    if delimiter in ",;":
        # strict: a stray quote would otherwise swallow lines without a word
        reader = csv.reader(_lines(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    else:
        reader, clean = csv.reader(_lines(text), delimiter=delimiter, quoting=csv.QUOTE_NONE), _unquoted
    rows: list[Row] = []
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = [clean(cell) for cell in cells]
            elif cells:
                rows.append(_row(path, reader.line_num, header, [clean(cell) for cell in cells]))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; put captions in quotes, inner quotes doubled"
        ) from error
    return rows


def _lines(text: str) -> list[str]:
    """Lines with their ends, cut at newlines only."""
    return [line + "\n" for line in text.rstrip("\n").split("\n")]


def _row(path: Path, line: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) > len(header):
        raise ValueError(
            f"{path}, line {line} has {len(cells)} cells where the header has {len(header)} ({header}); put captions "
            "that hold the delimiter in quotes, or use JSON lines"
        )
    return dict(itertools.zip_longest(header, cells))


def _unquoted(cell: str) -> str:
    """The cell without the blanks and quotes around it."""
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell
