"""Rows of named values on disk: a table of SQLite, which Python reads without any other library.

Text and numbers are stored as they are, so that they can be filtered by; anything else as JSON in a BLOB.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import REBUILD, StorageError, file_entry, replacing

# {"column": value or values}, a function of a row's columns, or a pyarrow.compute.Expression (which has no types).
Where = Mapping[str, Any] | Callable[[dict[str, Any]], bool] | Any

ROW = "_row"
PARAMETERS = 500  # of a statement, below every build's limit


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Write columns of equal length, whole or not at all; what a manifest says of the file comes back.

    Raises:
        ValueError: If the names of two columns differ in case alone.
    """
    folded = [name.casefold() for name in (ROW, *columns)]
    if twice := [name for name in columns if folded.count(name.casefold()) > 1]:
        raise ValueError(f"the columns {twice} are there already to a table, which knows no case; rename one of them")
    with replacing(path) as temporary:
        connection = sqlite3.connect(temporary)
        try:
            names = ", ".join(map(_quoted, columns))
            connection.execute(f"CREATE TABLE items ({ROW} INTEGER PRIMARY KEY, {names})")
            rows = (map(_stored, row) for row in zip(*columns.values(), strict=True))
            marks = ", ".join("?" * (len(columns) + 1))
            connection.executemany(f"INSERT INTO items VALUES ({marks})", ((n, *row) for n, row in enumerate(rows)))
            connection.commit()
        finally:
            connection.close()
        entry = file_entry(temporary)
    return entry


class Table:
    """A table as it is read: row by row from the disk, by row number.

    Raises:
        StorageError: If it is not there, or no table.
    """

    def __init__(self, path: Path, fix: str = REBUILD) -> None:
        self.path = path
        try:
            # Nobody writes to it: no lock is needed, and a file that a later build removes stays readable.
            address = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
            self._connection = sqlite3.connect(address, uri=True, check_same_thread=False)
            described = self._connection.execute("SELECT * FROM items LIMIT 0").description
            [self._count] = self._connection.execute("SELECT count(*) FROM items").fetchone()
        except sqlite3.Error as error:
            raise StorageError(path, f"damaged: it is no table of ours ({error})", fix) from error
        self.names = [name for name, *_ in described if name != ROW]

    def __len__(self) -> int:
        return int(self._count)

    def column(self, name: str) -> list[Any]:
        """One column's values, row by row."""
        found = self._connection.execute(f"SELECT {_quoted(name)} FROM items ORDER BY {ROW}")
        return [_given(value) for (value,) in found]

    def distinct(self, name: str) -> list[Any]:
        """One column's different values."""
        found = self._connection.execute(f"SELECT DISTINCT {_quoted(name)} FROM items")
        return [_given(value) for (value,) in found]

    def row(self, number: int) -> dict[str, Any]:
        """One row's columns."""
        names = ", ".join(map(_quoted, self.names))
        values = self._connection.execute(f"SELECT {names} FROM items WHERE {ROW} = ?", [int(number)]).fetchone()
        return dict(zip(self.names, map(_given, values), strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.row(number) for number in range(len(self)))

    def rows_where(self, where: Where | None) -> np.ndarray | None:
        """Rows that a filter keeps, int64 (n,); None for no filter.

        Args:
            where: {"folder": "summer", "year": [2023, 2024]}: all columns have to agree, each with one of its values;
                or a function of a row's columns, or a `pyarrow.compute` expression.

        Raises:
            ValueError: If a column is not there, or the filter is something else.
        """
        if where is None:
            return None
        if isinstance(where, Mapping):
            unknown = sorted(set(where) - set(self.names))
            if unknown or not where:
                raise ValueError(f"the filter names the columns {unknown}; the index has {self.names}")
            kept = []
            for name, wanted in where.items():
                kept.append(self._rows_of(name, [_stored(value) for value in values_of(wanted)]))
            return np.array(sorted(set.intersection(*kept)), np.int64)
        if type(where).__module__.startswith("pyarrow"):
            import pyarrow

            numbered = pyarrow.Table.from_pylist([{ROW: n, **row} for n, row in enumerate(self)])
            return numbered.filter(where).column(ROW).to_numpy().astype(np.int64)
        if not callable(where):
            raise ValueError(f"where is a {type(where).__name__}; expected a dict, a pyarrow expression or a function")
        return np.array([number for number, row in enumerate(self) if where(row)], np.int64)

    def _rows_of(self, name: str, values: list[Any]) -> set[int]:
        """Rows whose column has one of these values."""
        found: set[int] = set()
        for start in range(0, len(values), PARAMETERS):
            some = values[start : start + PARAMETERS]
            # IS finds a value that is not there, too; IN does not.
            condition = " OR ".join([f"{_quoted(name)} IS ?"] * len(some))
            found |= {row for (row,) in self._connection.execute(f"SELECT {ROW} FROM items WHERE {condition}", some)}
        return found


def values_of(wanted: Any) -> list[Any]:
    """The values that a filter accepts of a column: one, or several."""
    return list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _stored(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # a lone surrogate is no Unicode
    is_plain = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if value is None or is_plain or (isinstance(value, float) and math.isfinite(value)):
        return value
    return json.dumps(value, default=lambda each: each.tolist() if hasattr(each, "tolist") else str(each)).encode()


def _given(value: Any) -> Any:
    return json.loads(value) if isinstance(value, bytes) else value
