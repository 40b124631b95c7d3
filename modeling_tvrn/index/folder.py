"""One version of an index in a folder, as a search reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..encoded_tvrn import EncodedItems
from ..storage.files import check_file, read_json
from ..storage.tables import Where, values_of
from ..storage.tensors import TensorFile
from .build import FIX, VECTORS, open_table
from .segments import Segments
from .sources import folder_names
from .vectors import GRAPH, VectorSearch
from .versions import FORMAT, MANIFEST, SEGMENTS, current

OPEN_TRIES = 5  # of a version that a builder replaces while it is opened


class FolderBackend:
    """One version of an index in a folder, opened whole: a later build does not change what it answers."""

    def __init__(self, directory: Path) -> None:
        version = current(directory)
        if version is None:
            raise FileNotFoundError(f"there is no finished index in {str(directory)!r}: build it there first")
        self.directory, self.version = directory, version
        self.manifest: dict[str, Any] = read_json(version / MANIFEST, FORMAT)
        files = self.manifest["files"]
        self.table = open_table(version, self.manifest)
        self.keys = self.table.column("key")
        vectors = TensorFile.open(version / VECTORS, FIX)
        vectors.check(files[VECTORS])
        if GRAPH in files:
            check_file(version / GRAPH, files[GRAPH], FIX)
        embeds = vectors.mapped().arrays["embeds"]
        if GRAPH not in files and self.manifest["precision"] != "float32":
            vectors.compare("embeds", embeds)  # read whole, to make codes of
        self.search = VectorSearch(embeds, self.manifest["precision"], self.manifest["engine"])
        self.search.load(version)
        self.segments = Segments(directory / SEGMENTS, self.manifest["build"], self.manifest["side"])
        self.segments.open(self.manifest["segments"], files)

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
        rows, cosines = self.search.search(query, count, self.table.rows_where(self._with_folders(where)))
        return list(zip(rows.tolist(), cosines.tolist(), strict=True))

    def _with_folders(self, where: Where | None) -> Where | None:
        """The filter with the paths of all folders that it names."""
        if not isinstance(where, Mapping) or "folder" not in where or "folder" not in self.table.names:
            return where
        wanted = values_of(where["folder"])
        names = {str(value) for value in wanted if value is not None}
        found = [path for path in self.table.distinct("folder") if names & {*folder_names(str(path))}]
        return {**where, "folder": [*wanted, *found]}

    def item(self, place: int) -> dict[str, Any]:
        """One item's columns."""
        return self.table.row(place)

    def features(self, places: Sequence[int]) -> EncodedItems:
        """What reranking needs of the given rows."""
        return self.segments.read([self.keys[place] for place in places], self.manifest["model_fingerprint"])
