"""Nearest neighbours by cosine: a scan, or a graph (faiss HNSW); of float32 vectors, or of int8 or binary codes.

Codes find `OVERSAMPLE` times as many candidates as are wanted, and the float32 vectors, mapped from disk, order them.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "int8", "binary")
ENGINES = ("auto", "exact", "hnsw")
EXACT_UP_TO = 50_000  # vectors; a scan of more takes longer than a graph's search
OVERSAMPLE = {"float32": 1, "int8": 4, "binary": 16}
BLOCK = 65_536  # vectors of a scan that are held as float32 at a time
LINKS, BUILD_EFFORT, SEARCH_EFFORT = 32, 200, 128  # of the graph
RECALL_QUERIES = 200
GRAPH = "graph.faiss"


class Codes(Protocol):
    """Compressed vectors that can be compared with a query."""

    def scores(self, query: np.ndarray, rows: slice | np.ndarray) -> np.ndarray: ...


class FloatCodes:
    """The vectors themselves."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def scores(self, query: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        """Cosines (n,)."""
        return self.vectors[rows] @ query


class Int8Codes:
    """Each dimension scaled to -127 … 127."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.scale = np.maximum(np.abs(vectors).max(axis=0), 1e-12) / 127
        self.codes = np.empty(vectors.shape, np.int8)
        for start in range(0, len(vectors), BLOCK):
            self.codes[start : start + BLOCK] = np.rint(vectors[start : start + BLOCK] / self.scale)

    def scores(self, query: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        """Approximate cosines (n,)."""
        return self.codes[rows].astype(np.float32) @ (query * self.scale)


class BinaryCodes:
    """The sign of each dimension, compared by Hamming distance."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.codes = _bits(vectors)

    def scores(self, query: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        """Minus the number of differing bits (n,)."""
        differing = np.bitwise_count(self.codes[rows] ^ _bits(query[None]))
        return -differing.sum(axis=1, dtype=np.int32)


CODES: dict[str, type] = {"float32": FloatCodes, "int8": Int8Codes, "binary": BinaryCodes}


class VectorSearch:
    """Nearest neighbours among n unit-norm vectors.

    Args:
        vectors: (n, P) float32, perhaps mapped from disk.
        precision: "float32", "int8" (a quarter of the memory) or "binary" (a thirty-second); the last two need the
            float32 vectors only to order their candidates.
        engine: "exact" scans, codes several times as fast where faiss is installed; "hnsw" walks a graph and needs
            faiss; "auto" takes the graph beyond 50,000 vectors, where faiss is installed.

    Raises:
        ValueError: On an unknown precision or engine.
        ImportError: If "hnsw" is asked for without faiss.
    """

    def __init__(self, vectors: np.ndarray, precision: str = "float32", engine: str = "auto") -> None:
        check_search(precision, engine)
        self.vectors, self.precision = vectors, precision
        self.engine = choose_engine(engine, len(vectors))
        self.graph: Any = None
        self._flat: Any = None  # faiss's codes of a scan
        self._codes: Codes | None = None

    def train(self) -> None:
        """Build the graph, or the codes of a scan."""
        if self.engine == "hnsw":
            self.graph = _faiss_index(self.vectors, self.precision, LINKS)
        elif self.precision != "float32" and find_spec("faiss") is not None:
            self._flat = _faiss_index(self.vectors, self.precision)
        else:
            self._codes = CODES[self.precision](self.vectors)

    def save(self, directory: Path) -> None:
        """Write the graph; a scan's codes are made from the vectors when it is opened."""
        if self.graph is not None:
            faiss = import_faiss()
            write = faiss.write_index_binary if self.precision == "binary" else faiss.write_index
            write(self.graph, str(directory / GRAPH))

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        if self.engine == "hnsw":
            faiss = import_faiss()
            read = faiss.read_index_binary if self.precision == "binary" else faiss.read_index
            self.graph = read(str(directory / GRAPH))
        else:
            self.train()

    def search(self, query: np.ndarray, limit: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The `limit` nearest rows and their cosines, nearest first; fewer where there are fewer.

        Args:
            query: (P,) unit norm.
            limit: How many.
            rows: Only these rows are considered; they are scanned, so that the result is exact however few they are.

        Raises:
            ValueError: If the query has another length than the vectors.
        """
        if query.shape != self.vectors.shape[1:]:
            raise ValueError(f"the query has shape {query.shape}, expected {self.vectors.shape[1:]} as the index has")
        query = np.ascontiguousarray(query, np.float32)
        if rows is None and (self.graph is not None or self._flat is not None):
            found = self._by_faiss(query, limit * OVERSAMPLE[self.precision])
        else:
            found = self._scan(query, limit * OVERSAMPLE[self.precision], rows)
        cosines = self.vectors[found] @ query
        order = np.argsort(-cosines, kind="stable")[:limit]
        return found[order], cosines[order]

    def _by_faiss(self, query: np.ndarray, count: int) -> np.ndarray:
        wanted = min(count, len(self.vectors))
        index = self._flat
        if self.graph is not None:
            index = self.graph
            index.hnsw.efSearch = max(SEARCH_EFFORT, wanted)
        rows = index.search(_packed(query[None]) if self.precision == "binary" else query[None], wanted)[1][0]
        return np.sort(rows[rows >= 0])

    def _scan(self, query: np.ndarray, count: int, rows: np.ndarray | None) -> np.ndarray:
        codes: Codes = self._codes if self._codes is not None else FloatCodes(self.vectors)
        total = len(self.vectors) if rows is None else len(rows)
        best: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, total, BLOCK):
            block = slice(start, min(start + BLOCK, total)) if rows is None else rows[start : start + BLOCK]
            scores = codes.scores(query, block)
            top = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
            best.append((scores[top], top + start if rows is None else rows[start + top]))
        if not best:
            return np.empty(0, np.int64)
        scores, found = (np.concatenate(parts) for parts in zip(*best, strict=True))
        return np.sort(found[np.argsort(-scores, kind="stable")[:count]])

    def recall(self, limit: int = 10, seed: int = 0) -> float:
        """Share of the true `limit` nearest that a search finds, percent; queries lie between stored vectors."""
        random = np.random.default_rng(seed)
        pairs = random.integers(0, len(self.vectors), (2, RECALL_QUERIES))
        queries = self.vectors[pairs[0]] + self.vectors[pairs[1]]
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        queries = queries / np.maximum(norms, 1e-12)
        limit = min(limit, len(self.vectors))
        found = 0
        for query in queries.astype(np.float32):
            exact = VectorSearch(self.vectors, "float32", "exact").search(query, limit)[0]
            found += len(np.intersect1d(exact, self.search(query, limit)[0]))
        return 100.0 * found / (limit * RECALL_QUERIES)

    @property
    def bytes(self) -> int:
        """Of what a search holds in memory, beside the float32 vectors that codes map from disk."""
        size = self.vectors.shape[1] * {"float32": 4.0, "int8": 1.0, "binary": 1 / 8}[self.precision]
        return int(len(self.vectors) * (size + (8 * LINKS if self.engine == "hnsw" else 0)))


def check_search(precision: str, engine: str) -> None:
    """Refuse what a search can't be made with.

    Raises:
        ValueError: On an unknown precision or engine.
        ImportError: If "hnsw" is asked for without faiss.
    """
    for name, value, known in (("precision", precision, PRECISIONS), ("engine", engine, ENGINES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if engine == "hnsw":
        import_faiss()


def choose_engine(engine: str, count: int) -> str:
    """ "exact" or "hnsw"."""
    if engine != "auto":
        return engine
    if count <= EXACT_UP_TO:
        return "exact"
    try:
        import_faiss()
    except ImportError as error:
        logger.warning("%d vectors are searched one by one: %s", count, error)
        return "exact"
    return "hnsw"


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        ImportError: Naming the command that installs it.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'a graph for large collections needs faiss: pip install "modeling-tvrn[index]", or use engine="exact"'
        ) from error
    return faiss


def _faiss_index(vectors: np.ndarray, precision: str, links: int = 0) -> Any:
    """A graph of so many links an item, or without any the codes alone."""
    faiss = import_faiss()
    size, bits = vectors.shape[1], _packed(vectors[:1]).shape[1] * 8
    code, product = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    if precision == "binary":
        index = faiss.IndexBinaryHNSW(bits, links) if links else faiss.IndexBinaryFlat(bits)
    elif precision == "int8":
        sizes = (size, code, links, product) if links else (size, code, product)
        index = (faiss.IndexHNSWSQ if links else faiss.IndexScalarQuantizer)(*sizes)
        index.train(np.ascontiguousarray(vectors[: 4 * BLOCK]))
    else:
        index = faiss.IndexHNSWFlat(size, links, product)
    if links:
        index.hnsw.efConstruction = BUILD_EFFORT
    # A block at a time: in memory is what the index keeps, not the vectors that it is made of.
    for start in range(0, len(vectors), BLOCK):
        block = np.ascontiguousarray(vectors[start : start + BLOCK])
        index.add(_packed(block) if precision == "binary" else block)
    return index


def _packed(vectors: np.ndarray) -> np.ndarray:
    """(n, P) -> (n, bytes) uint8, a multiple of 8 bytes."""
    bits = np.packbits(vectors > 0, axis=1)
    return np.ascontiguousarray(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))))


def _bits(vectors: np.ndarray) -> np.ndarray:
    """(n, P) -> (n, words) uint64."""
    return _packed(vectors).view(np.uint64)
