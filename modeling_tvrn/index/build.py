"""Building an index: every item encoded once, in segments that survive a kill; the new version appears all at once."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.file_kinds import printable
from ..data.skipped import WORDLESS_CAPTION, SkipReport, Unusable
from ..data.training_pairs import image_inputs
from ..data.worded import unusable_captions
from ..encoded_tvrn import EncodedItems
from ..redaction import redacted
from ..scoring.models import evaluating
from ..storage.files import FORMATS, StorageError, check_file, file_entry, locked, read_json
from ..storage.fingerprints import digest
from ..storage.tables import Table, write_table
from ..storage.tensors import write_tensors
from .coded import BITS, StoredItems, check_region_storage, stored
from .fingerprint import index_fingerprint
from .segments import SIDES, Segments
from .sources import RESERVED, Item, Loaded, Source, check_name
from .vectors import GRAPH, VectorSearch, check_search
from .versions import (
    FORMAT,
    LOCK,
    MANIFEST,
    SEGMENTS,
    current,
    drop_old_versions,
    make_usable,
    next_version,
    switch_to,
)

logger = logging.getLogger(__name__)

ITEMS, VECTORS = "items.sqlite", "vectors.safetensors"
FIX = FORMATS[FORMAT][1]
SEGMENTS_BEFORE_GROWTH = 128  # from there on they grow, so that a million items are in fewer than 600
Known = dict[str, tuple[int, int, str]]  # id -> size, mtime_ns, key: what tells whether a file has changed


@dataclass(frozen=True)
class BuildSettings:
    """How an index is built; `ImageTextIndex.build` explains each."""

    precision: str = "float32"
    engine: str = "auto"
    features: bool = True
    batch_size: int = 32
    segment_size: int = 256
    num_workers: int = 4
    progress: bool = True
    repair: bool = False
    region_storage: str | None = None  # that of the version before, else float16

    def check(self, side: str) -> None:
        """Refuse wrong settings at once, not after an hour."""
        check_search(self.precision, self.engine)
        check_region_storage(self.region_storage or "float16", side, self.features)
        for name in ("batch_size", "segment_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        items: In the index now.
        encoded: Encoded in this run.
        reused: Taken over unchanged from earlier builds, also interrupted ones.
        added, changed, deleted: Against the version before.
        skipped: What cannot be used: reason -> count, with examples.
        truncated_captions: Of those encoded in this run: longer than the model reads, and cut.
        engine: "exact" or "hnsw".
        precision: "float32", "int8" or "binary".
        recall_at_10: Share of the true ten nearest that the search finds, percent.
        vector_bytes: What the search holds in memory.
        feature_bytes: What reranking reads from disk.
        seconds: Of the whole build; `encode_seconds`, `search_seconds`: of the encoding, of making the search.
    """

    items: int = 0
    encoded: int = 0
    reused: int = 0
    added: int = 0
    changed: int = 0
    deleted: int = 0
    skipped: SkipReport = field(default_factory=SkipReport)
    truncated_captions: int = 0
    engine: str = "exact"
    precision: str = "float32"
    recall_at_10: float = 100.0
    vector_bytes: int = 0
    feature_bytes: int = 0
    seconds: float = 0.0
    encode_seconds: float = 0.0
    search_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """All attributes by name, as JSON values."""
        return {**vars(self), "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        cut = f" {self.truncated_captions} captions cut to what the model reads;" if self.truncated_captions else ""
        return (
            f"{self.items} items ({self.encoded} encoded, {self.reused} as before; {self.added} new, {self.changed}"
            f" changed, {self.deleted} gone; skipped: {self.skipped}) in {self.seconds:.1f} s;{cut} {self.precision}"
            f" {self.engine} search, recall@10 {self.recall_at_10:.1f} %;"
            f" {self.vector_bytes / max(self.items, 1):.0f} bytes an item in memory,"
            f" {self.feature_bytes / max(self.items, 1):.0f} on disk for reranking"
        )


def build_version(model: Any, processor: Any, source: Source, directory: Path, settings: BuildSettings) -> BuildReport:
    """Bring the index in `directory` up to date with the source.

    Raises:
        BusyError: If another process is at it.
        StorageError: If embeddings of an earlier build are damaged.
        ValueError: If there is nothing to index.
    """
    settings.check(source.side)
    started = time.perf_counter()
    with locked(directory / LOCK):
        make_usable(directory, thoroughly=settings.repair)
        before = _version_before(directory)
        if settings.region_storage is None:  # an index stays as it is where nothing else is asked for
            kept = before[1].get("region_storage") if before is not None and settings.features else None
            settings = replace(settings, region_storage=kept or "float16")
        fingerprint = index_fingerprint(model, processor)
        content = {"model": fingerprint, "side": source.side, "features": settings.features}
        if settings.region_storage in BITS:
            content["region_storage"] = settings.region_storage
        build = digest(content)
        segments = Segments(directory / SEGMENTS, build, source.side)
        segments.scan()
        report = BuildReport(precision=settings.precision)
        known = _known_before(before)
        cut_before = getattr(processor, "truncated_captions", 0)
        items, keys = _Encoder(model, processor, segments, settings, report).run(source, known)
        report.truncated_captions = getattr(processor, "truncated_captions", 0) - cut_before
        report.encode_seconds = time.perf_counter() - started
        _compare(report, {item.id: key for item, key in zip(items, keys, strict=True)}, known)
        if not items:
            raise ValueError(f"{printable(source.name)} holds nothing to index (skipped: {report.skipped})")
        segments.compact(keys, _segment_size(settings, len(keys)))
        version = next_version(directory)
        files = {ITEMS: write_table(version / ITEMS, _columns(items, keys))}
        files |= _write_search(version, segments.embeds(keys), settings, report)
        names = sorted({segments.place[key][0] for key in keys})
        used = {f"../../{SEGMENTS}/{name}": segments.files[name].entry for name in names}
        report.feature_bytes = sum(entry["bytes"] for entry in used.values())
        report.seconds = time.perf_counter() - started
        manifest = {
            "side": source.side,
            "source": printable(redacted(source.name)),
            "fingerprint": fingerprint,
            "build": build,
            "precision": settings.precision,
            "engine": report.engine,
            "features": settings.features,
            "region_storage": settings.region_storage,
            "model_fingerprint": model.fingerprint() if hasattr(model, "fingerprint") else None,
            "segments": names,
            "files": files | used,
            "report": report.as_dict(),
        }
        switch_to(directory, version, manifest)
        _clean(directory, segments)
    report.skipped.warn(printable(source.name))
    logger.info("%s: %s", directory, report)
    return report


def _segment_size(settings: BuildSettings, items: int) -> int:
    """Segments grow with the index: every one is a file that a search holds open, and a system allows some 1000."""
    return max(settings.segment_size, items // SEGMENTS_BEFORE_GROWTH)


class _Encoder:
    """Items in, keys out; what is not in a segment yet is encoded and written in segments as it comes."""

    def __init__(self, model: Any, processor: Any, segments: Segments, settings: BuildSettings, report: BuildReport):
        self.model, self.processor, self.segments = model, processor, segments
        self.settings, self.report = settings, report
        self.earlier = frozenset(segments.place)
        self.batch: dict[str, Any] = {}  # key -> content, waiting to be prepared
        self.preparing: tuple[list[str], Future] | None = None  # keys, and what the model reads of them
        self.encoded: list[EncodedItems] = []
        self.encoded_keys: dict[str, None] = {}  # in their order

    def run(self, source: Source, known: Known) -> tuple[list[Item], list[str]]:
        """All items that can be used, with their keys."""
        items, keys = [], []
        off = None if self.settings.progress else True
        with (
            tqdm(total=len(source) or None, desc=source.side, delay=2.0, disable=off) as bar,
            evaluating(self.model),
            ThreadPoolExecutor(1) as self.preparer,
        ):
            for item, loaded in self._loaded(source, known):
                bar.update()
                if isinstance(loaded, Unusable):
                    self.report.skipped.add(loaded.reason, str(loaded))
                    continue
                self._add(loaded)
                items.append(item)
                keys.append(loaded.key)
            self._prepare()
            self._encode()
            self._write(everything=True)
        return items, keys

    def _loaded(self, source: Iterable[Item], known: Known) -> Iterator[tuple[Item, Loaded | Unusable]]:
        """Items with their content, in their order; files are read and decoded by threads, a few batches ahead."""
        ahead: deque[tuple[Item, Future]] = deque()
        with ThreadPoolExecutor(self.settings.num_workers) as pool:
            for item in source:
                ahead.append((item, pool.submit(self._load, item, known.get(item.id))))
                if len(ahead) > 2 * self.settings.batch_size:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()

    def _load(self, item: Item, known: tuple[int, int, str] | None) -> Loaded | Unusable:
        """A file of the same size and time as before is not read again."""
        unchanged = known is not None and item.size > 0 and known[:2] == (item.size, item.mtime_ns)
        if known is not None and unchanged and known[2] in self.segments.place:
            return Loaded(known[2], None)
        try:
            check_name(item)
            loaded = item.load()
        except Unusable as error:
            return error
        if isinstance(loaded.content, str) and (found := unusable_captions([self.processor], [loaded.content])):
            return Unusable(WORDLESS_CAPTION, f"{item.id}: {found[0]}")
        return loaded

    def _add(self, loaded: Loaded) -> None:
        if loaded.key in self.earlier:
            self.report.reused += 1
            return
        prepared = self.preparing[0] if self.preparing is not None else ()
        if not any(loaded.key in done for done in (self.segments.place, self.batch, prepared, self.encoded_keys)):
            self.batch[loaded.key] = loaded.content
            if len(self.batch) >= self.settings.batch_size:
                self._prepare()

    def _prepare(self) -> None:
        """Give the waiting batch to a thread that makes the model's inputs of it, and encode the one before."""
        waiting, self.batch = self.batch, {}
        if not waiting:
            return
        future = self.preparer.submit(prepare, self.processor, list(waiting.values()), self.segments.side)
        self._encode()
        self.preparing = list(waiting), future

    def _encode(self) -> None:
        if self.preparing is None:
            return
        (keys, future), self.preparing = self.preparing, None
        coded = self.settings.region_storage in BITS
        encoded = encode(self.model, future.result(), self.segments.side, "late_interaction" if coded else "full")
        if not torch.isfinite(encoded.tensors()["embeds"]).all():
            raise ValueError(f"an embedding of {keys[0]} … is NaN or infinite; check the model's weights")
        if not self.settings.features:
            self.encoded.append(StoredItems(encoded.tensors()["embeds"].detach().float().cpu()))
        elif coded:
            self.encoded.append(stored(encoded, str(self.settings.region_storage)))
        else:
            self.encoded.append(encoded.to("cpu").to(torch.float16))
        self.encoded_keys |= dict.fromkeys(keys)
        self.report.encoded += len(keys)
        self._write()

    def _write(self, everything: bool = False) -> None:
        size = _segment_size(self.settings, len(self.segments.place))
        while self.encoded_keys and (everything or len(self.encoded_keys) >= size):
            count = min(size, len(self.encoded_keys))
            whole = type(self.encoded[0]).cat(self.encoded)
            keys = list(self.encoded_keys)
            self.segments.write(keys[:count], whole.select(slice(0, count)))
            self.encoded_keys = dict.fromkeys(keys[count:])
            self.encoded = [whole.select(slice(count, None))] if self.encoded_keys else []


def prepare(processor: Any, contents: list[Any], side: str) -> Any:
    """The model's inputs for a batch of records or captions; encoded features are joined, and are not encoded."""
    if isinstance(contents[0], EncodedItems):
        return SIDES[side].cat(contents)
    inputs = {"text": contents} if side == "texts" else image_inputs(contents)
    return processor(**inputs, return_tensors="pt")


def encode(model: Any, inputs: Any, side: str, level: str = "full") -> EncodedItems:
    """Encode what `prepare` made; `level` is of images."""
    if isinstance(inputs, EncodedItems):
        return inputs.at_level(level)
    device = next(model.parameters()).device
    moved = {name: value.to(device) for name, value in inputs.items()}
    encoded: EncodedItems = (
        model.encode_texts(**moved) if side == "texts" else model.encode_images(**moved, level=level)
    )
    return encoded


def _columns(items: list[Item], keys: list[str]) -> dict[str, list[Any]]:
    """The table of some items, in the order of the vectors: names, paths, what tells a change, and metadata.

    Raises:
        ValueError: If two items have one id, or metadata use a name of the table's own.
    """
    counts = Counter(item.id for item in items)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"the id {twice[0]!r} comes twice; every item of an index needs an id of its own")
    names = list(dict.fromkeys(name for item in items for name in item.metadata))
    if taken := sorted({*names} & {*RESERVED}):
        raise ValueError(f"metadata use the names {taken}, which are the table's own; rename them")
    columns = {name: [getattr(item, name) for item in items] for name in RESERVED if name != "key"}
    return columns | {"key": keys} | {name: [item.metadata.get(name) for item in items] for name in names}


def _write_search(
    version: Path, embeds: np.ndarray, settings: BuildSettings, report: BuildReport
) -> dict[str, dict[str, Any]]:
    """Vectors and search of a version, as its manifest lists them; its recall goes into the report."""
    started = time.perf_counter()
    vectors = write_tensors(version / VECTORS, {"embeds": embeds})
    search = VectorSearch(vectors.mapped().arrays["embeds"], settings.precision, settings.engine)
    search.train()
    search.save(version)
    report.search_seconds = time.perf_counter() - started
    if (settings.precision, search.engine) != ("float32", "exact"):
        report.recall_at_10 = search.recall()
    report.items, report.vector_bytes, report.engine = len(embeds), search.bytes, search.engine
    graph = {} if search.graph is None else {GRAPH: file_entry(version / GRAPH)}
    return {VECTORS: vectors.entry, **graph}


def _version_before(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and manifest of the version before; None where there is none that can be read."""
    version = current(directory)
    try:
        return None if version is None else (version, read_json(version / MANIFEST, FORMAT))
    except StorageError as error:
        logger.warning("%s. Every file is read again", error)
        return None


def _known_before(before: tuple[Path, dict[str, Any]] | None) -> Known:
    """Of the items of the version before; nothing where there is none that can be read."""
    if before is None:
        return {}
    try:
        table = open_table(*before)
    except StorageError as error:
        logger.warning("%s. Every file is read again", error)
        return {}
    names, *columns = (table.column(name) for name in ("id", "size", "mtime_ns", "key"))
    return dict(zip(names, zip(*columns, strict=True), strict=True))


def open_table(version: Path, manifest: Mapping[str, Any]) -> Table:
    """The items of a version, checked whole.

    Raises:
        StorageError: If their file is missing or damaged.
    """
    check_file(version / ITEMS, manifest["files"][ITEMS], FIX)
    return Table(version / ITEMS, FIX)


def _compare(report: BuildReport, now: dict[str, str], known: Known) -> None:
    report.added = len(now.keys() - known.keys())
    report.deleted = len(known.keys() - now.keys())
    report.changed = sum(1 for name, key in now.items() if name in known and known[name][2] != key)


def _clean(directory: Path, segments: Segments) -> None:
    """Remove what neither this version nor the one before refers to, and the one before if a file of it is gone."""
    used: set[str] = set()
    for version in drop_old_versions(directory):
        try:
            manifest = read_json(version / MANIFEST, FORMAT)
        except StorageError:
            manifest = None
        if manifest is None or not all((version / name).exists() for name in manifest["files"]):
            shutil.rmtree(version)
        else:
            used |= set(manifest["segments"])
    segments.drop_unused(used)
