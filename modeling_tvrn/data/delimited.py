"""Delimited text, read strictly: what could merge rows, lose a column or garble letters is refused with its line."""

from __future__ import annotations

import codecs
import csv
import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from .file_kinds import HEAD, is_unicode, kind_in_place_of_text
from .images import IMAGE_SUFFIXES

DELIMITERS = ",\t|;"
Cells = dict[str, str | None]


def text_of(path: Path) -> str:
    r"""A text file's letters, with `\n` for the ends of lines; UTF-16 is told by its mark, everything else is UTF-8.

    Single bytes that are no UTF-8 stand as lone surrogates, as in file names: what holds them is left out by itself.

    Raises:
        ValueError: the whole file is in another encoding, or no text; the message says how to convert it.
    """
    content = path.read_bytes()
    if kind := kind_in_place_of_text(content[:HEAD]):
        raise ValueError(f"{path} is no table: it is {kind}")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} begins as UTF-16 and is none ({error.reason}); save it as UTF-8") from error
    else:
        text = content.decode("utf-8-sig", "surrogateescape")
    if 4 * text.count("\0") > len(text):
        raise ValueError(
            f"{path} is half zero bytes, as UTF-16 without a mark is: save it as UTF-8, such as by "
            f"`iconv -f UTF-16LE -t UTF-8 {path.name}`"
        )
    text = text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    lines = text.split("\n")
    broken = [number for number, line in enumerate(lines, start=1) if not is_unicode(line)]
    if broken and not any(is_unicode(line) and not line.isascii() for line in lines):
        raise ValueError(
            f"{path} is not UTF-8 text (first in line {broken[0]}), and probably Latin-1 or Windows-1252: save it as "
            f"UTF-8, such as by `iconv -f WINDOWS-1252 -t UTF-8 {path.name}`"
        )
    return text


def read_delimited(path: Path, text: str, known: Collection[str]) -> Iterator[Cells]:
    """Rows of a table with a header, cells by column and without blanks around them; None for those a row lacks.

    Args:
        path: its file, for messages; of one that ends in .tsv a tab is the likelier delimiter.
        text: what `text_of` gives.
        known: names of columns, by which the delimiter is found in the header.

    Raises:
        ValueError: a row has more cells than the header, a column's name occurs twice, or a quote is not closed.
    """
    delimiter = _delimiter(text.split("\n", 1)[0], known, path.suffix.lower() == ".tsv")
    lines = [line + "\n" for line in text.rstrip("\n").split("\n")]
    clean: Callable[[str], str] = str.strip
    if delimiter in ",;":
        # strict: a stray quote would otherwise swallow lines without a word
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    else:
        reader, clean = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE), _unquoted
    header: list[str] = []
    first = 1
    try:
        for cells in reader:
            _check_lines(path, lines, first, reader.line_num, delimiter)
            cells = [clean(cell) for cell in cells]
            if not header:
                header = _checked_header(path, cells)
            elif cells:
                if len(cells) > len(header):
                    raise ValueError(
                        f"{path}, line {first} has {len(cells)} cells where the header has {len(header)} ({header}); "
                        "put captions that hold the delimiter in quotes, or use JSON lines"
                    )
                yield dict(itertools.zip_longest(header, cells))
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {first}: {error}; put captions in quotes, inner quotes doubled, and close every quote"
        ) from error


def _delimiter(header: str, known: Collection[str], tabs: bool) -> str:
    """The character at which the header falls into the most names that are known; a comma, or tab, where none does."""

    def score(delimiter: str) -> int:
        return sum(name.strip().strip('"') in known for name in (header.lower() + delimiter + header).split(delimiter))

    return max("\t" + DELIMITERS if tabs else DELIMITERS, key=score)


def _checked_header(path: Path, names: list[str]) -> list[str]:
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} has the column {twice!r} twice ({names}); rename one of them")
    return names


def _check_lines(path: Path, lines: list[str], first: int, last: int, delimiter: str) -> None:
    """Refuse a quoted cell that holds what looks like rows: a quote that was opened in one caption and not closed."""
    for number in range(first + 1, last + 1):
        if any(cell.strip().lower().endswith(IMAGE_SUFFIXES) for cell in lines[number - 1].split(delimiter)):
            raise ValueError(
                f"{path}, line {first}: a quote is opened that takes in line {number}, which looks like a row of its "
                "own; close it, or double a quote that is part of the caption"
            )


def _unquoted(cell: str) -> str:
    """The cell without the blanks and quotes around it."""
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell
