"""Delimited text, read strictly: what could merge rows, lose a column or garble letters is refused with its line."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from .image_folder import IMAGE_SUFFIXES

DELIMITERS = ",\t|;"
Cells = dict[str, str | None]


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
                header = cells
                if twice := [name for name in header if name and header.count(name) > 1]:
                    raise ValueError(f"{path} has the column {twice[0]!r} twice ({header}); rename one of them")
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
