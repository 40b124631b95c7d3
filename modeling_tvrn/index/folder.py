"""One version of an index in a folder, as a search reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..encoded_tvrn import EncodedItems
from .build import ITEMS, MANIFEST, SEGMENTS, read_vectors
from .segments import Segments
from .table import ItemTable, Where
from .vectors import VectorSearch
from .versions import current

OPEN_TRIES = 5  # of a version that a builder replaces while it is opened


class FolderBackend:
    """One version of an index in a folder, opened whole: a later build does not change what it answers."""

    def __init__(self, directory: Path) -> None:
        version = current(directory)
        if version is None:
            raise FileNotFoundError(f"there is no finished index in {str(directory)!r}: build it there first")
        self.directory, self.version = directory, version
        self.manifest: dict[str, Any] = json.loads((version / MANIFEST).read_text("utf-8"))
        self.table = ItemTable.load(version / ITEMS)
        self.keys = self.table.keys
        self.search = VectorSearch(read_vectors(version), self.manifest["precision"], self.manifest["engine"])
        self.search.load(version)
        self.segments = Segments(directory / SEGMENTS, self.manifest["build"], self.manifest["side"])
        self.segments.open(self.manifest["segments"])

    @classmethod
    def open(cls, directory: Path) -> FolderBackend:
        """The current version; a builder may replace it while it is opened, then the newer one is opened."""
        for _ in range(OPEN_TRIES):
            before = current(directory)
            try:
                return cls(directory)
            except (OSError, ValueError):
                if current(directory) == before:
                    raise
        return cls(directory)

    def __len__(self) -> int:
        return len(self.table)

    def nearest(self, query: np.ndarray, count: int, where: Where | None) -> list[tuple[int, float]]:
        """(row, cosine), nearest first."""
        rows, cosines = self.search.search(query, count, self.table.rows_where(where))
        return list(zip(rows.tolist(), cosines.tolist(), strict=True))

    def item(self, place: int) -> dict[str, Any]:
        """One item's columns."""
        return self.table.row(place)

    def features(self, places: Sequence[int]) -> EncodedItems:
        """What reranking needs of the given rows."""
        return self.segments.read([self.keys[place] for place in places], self.manifest["model_fingerprint"])
