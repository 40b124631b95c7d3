"""The items of an index as a Parquet table: names, paths, what tells a change, and metadata to filter by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .sources import RESERVED, Item

# {"column": value or values}, a function of an item's columns, or a pyarrow.compute.Expression (which has no types).
Where = Mapping[str, Any] | Callable[[dict[str, Any]], bool] | Any

_TYPES = {"id": pa.string(), "path": pa.string(), "text": pa.string(), "key": pa.string()}
_TYPES |= {"size": pa.int64(), "mtime_ns": pa.int64()}


class ItemTable:
    """Rows in the order of the vectors."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, items: Sequence[Item], keys: Sequence[str]) -> ItemTable:
        """The table of some items.

        Raises:
            ValueError: If two items have one id, or metadata use a name of the table's own.
        """
        ids = [item.id for item in items]
        if len(set(ids)) != len(ids):
            twice = next(each for each in ids if ids.count(each) > 1)
            raise ValueError(f"the id {twice!r} comes twice; every item of an index needs an id of its own")
        names = list(dict.fromkeys(name for item in items for name in item.metadata))
        taken = sorted({*names} & {*RESERVED})
        if taken:
            raise ValueError(f"metadata use the names {taken}, which are the table's own; rename them")
        columns = {
            name: pa.array([getattr(item, name) for item in items], _TYPES[name]) for name in RESERVED if name != "key"
        }
        columns["key"] = pa.array(keys, pa.string())
        for name in names:
            columns[name] = _column([item.metadata.get(name) for item in items])
        return cls(pa.table(columns))

    def __len__(self) -> int:
        return self.table.num_rows

    def save(self, path: Path) -> None:
        """Write Parquet."""
        pq.write_table(self.table, path)

    @classmethod
    def load(cls, path: Path) -> ItemTable:
        """Read what `save` wrote."""
        return cls(pq.read_table(path))

    @property
    def keys(self) -> list[str]:
        """The content keys, row by row."""
        return self.table.column("key").to_pylist()

    def row(self, number: int) -> dict[str, Any]:
        """One item's columns."""
        return self.table.slice(number, 1).to_pylist()[0]

    def known(self) -> dict[str, tuple[int, int, str]]:
        """Id -> (size, mtime_ns, key): what tells whether a file has changed."""
        columns = [self.table.column(name).to_pylist() for name in ("id", "size", "mtime_ns", "key")]
        return {name: (size, mtime, key) for name, size, mtime, key in zip(*columns, strict=True)}

    def rows_where(self, where: Where | None) -> np.ndarray | None:
        """Rows that a filter keeps; None for no filter.

        Raises:
            ValueError: If a column is not there.
        """
        if where is None:
            return None
        if isinstance(where, Mapping):
            where = expression(where, self.table.column_names)
        if isinstance(where, pc.Expression):
            numbered = self.table.append_column("_row", pa.array(np.arange(len(self))))
            return numbered.filter(where).column("_row").to_numpy().astype(np.int64)
        if not callable(where):
            raise ValueError(f"where is a {type(where).__name__}; expected a dict, a pyarrow expression or a function")
        kept = [number for number, row in enumerate(self.table.to_pylist()) if where(row)]
        return np.array(kept, np.int64)


def expression(where: Mapping[str, Any], names: Sequence[str]) -> pc.Expression:
    """{"folder": "summer", "year": [2023, 2024]}: all columns have to agree, each with one of its values."""
    unknown = sorted(set(where) - set(names))
    if unknown or not where:
        raise ValueError(f"the filter names the columns {unknown}; the index has {list(names)}")
    found: pc.Expression | None = None
    for name, wanted in where.items():
        several = isinstance(wanted, list | tuple | set | frozenset)
        part = pc.field(name).isin(list(wanted)) if several else pc.field(name) == wanted
        found = part if found is None else found & part
    assert found is not None
    return found


def _column(values: list[Any]) -> pa.Array:
    """Values as Arrow has them; where they are of several types, or no Unicode, as text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        texts = [None if value is None else str(value) for value in values]
        return pa.array([text and text.encode("utf-8", "backslashreplace").decode() for text in texts], pa.string())
