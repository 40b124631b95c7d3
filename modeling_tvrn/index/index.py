"""`ImageTextIndex`: build it, search it in both directions, save and load it; embedded, or on a Qdrant server."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..data.worded import about_unknown_words
from ..encoded_tvrn import EncodedItems
from ..explain.scene import read_scene
from ..scoring.models import evaluating
from ..storage.files import StorageError, flush
from ..storage.tables import Where
from ..storage.verify import verify as verify_files
from .build import BuildReport, BuildSettings, build_version
from .fingerprint import check_model
from .folder import FolderBackend
from .sources import RESERVED, open_source
from .versions import SEGMENTS, next_version, switch_to

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One thing found.

    Attributes:
        rank: From 1.
        id: Its name in the index.
        score: Says what the ranking, which is by logit, says. Where the pair score reranked, of a calibrated model the
            probability that it fits (`TVRNModel.fits`), else the matching score in (0, 1); the cosine without
            reranking, and of a dual encoder alone that isn't calibrated.
        logit: The pair logit; None without reranking.
        cosine: Of the embeddings.
        path: Its file, where it has one.
        text: Its caption, where it is one.
        metadata: As given at the build.
        score_kind: What `score` is: "probability", "cosine", or as `TVRNModel.score_kind`.
    """

    rank: int
    id: str
    score: float
    logit: float | None
    cosine: float
    path: str | None
    text: str | None
    metadata: dict[str, Any] = field(default_factory=dict)
    score_kind: str = "matching score"


class Hits(list[Hit]):
    """What a search found, best first.

    Attributes:
        seconds: What it cost: "encode", "shortlist", "rerank".
        ending: Where `min_score` ended the hits, a sentence that says so; else empty.
    """

    def __init__(self, hits: Sequence[Hit], seconds: Mapping[str, float], ending: str = "") -> None:
        super().__init__(hits)
        self.seconds = dict(seconds)
        self.ending = ending


class Backend(Protocol):
    """Where the vectors and features lie."""

    manifest: dict[str, Any]

    def __len__(self) -> int: ...
    def nearest(self, query: np.ndarray, count: int, where: Any) -> list[tuple[Any, float]]: ...
    def item(self, place: Any) -> dict[str, Any]: ...
    def features(self, places: Sequence[Any]) -> EncodedItems: ...


class ImageTextIndex:
    """Search over photographs (or captions): a shortlist by embeddings, reranked by the pair score.

    Made by `build` or `load`.

    Attributes:
        side: "images" or "texts": what is found.
        report: Of the build that made this object; None for a loaded one.
    """

    def __init__(self, backend: Backend, model: Any = None, processor: Any = None, report: BuildReport | None = None):
        self.backend, self.model, self.processor, self.report = backend, model, processor, report
        self._temporary: tempfile.TemporaryDirectory | None = None

    @property
    def side(self) -> str:
        """ "images" or "texts": what is found."""
        return str(self.backend.manifest["side"])

    @property
    def directory(self) -> Path | None:
        """The index's folder, where it lies in one."""
        return getattr(self.backend, "directory", None)

    def __len__(self) -> int:
        return len(self.backend)

    def __repr__(self) -> str:
        manifest = self.backend.manifest
        return f"ImageTextIndex({len(self)} {self.side}, {manifest['precision']} {manifest['engine']})"

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        source: Any,
        directory: str | os.PathLike | None = None,
        *,
        side: str | None = None,
        ids: Sequence[Any] | None = None,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        precision: str = "float32",
        engine: str = "auto",
        features: bool = True,
        batch_size: int = 32,
        segment_size: int = 256,
        num_workers: int = 4,
        progress: bool = True,
        repair: bool = False,
        region_storage: str | None = None,
        url: str | None = None,
        collection: str = "tvrn",
        **server: Any,
    ) -> ImageTextIndex:
        """Encode a collection, or bring an index of it up to date.

        Building again into the same folder encodes only what is new or has changed (told by size and time of a file,
        then by its content) and leaves out what is gone. A build that was killed goes on after its last whole segment.
        Whoever has the index open goes on with the version before.

        Args:
            model: A `TVRNModel`; `processor`: its processor.
            source: A folder of photographs, records of `load_pairs` (or a list of such), a list of captions, or
                `EncodedImages` / `EncodedTexts`.
            directory: The index's folder; None keeps it in a temporary one until `save`.
            side: Of records, "images" (default) or "texts".
            ids: Of encoded features: their names; default: row numbers.
            metadata: Id -> columns that searches can filter by.
            precision: Of the vectors searched: "float32", "int8" or "binary"; the last two are reordered by float32.
            engine: "exact", "hnsw" (needs faiss), or "auto": exact up to 50,000 items.
            features: Keep what reranking needs; False keeps embeddings alone.
            region_storage: Of images: "float16" keeps all that reranking reads; "int8" and "int4" keep the regions
                alone in so many bits a dimension, and compute the rest for each shortlist. None: as the index in
                `directory` does, "float16" for a new one.
            batch_size: Items encoded at a time.
            segment_size: Items a file of features, and so the most that a kill loses; of a large index a 128th of it.
            num_workers: Threads that read and decode photographs.
            progress: Show a progress bar with the time left, if it takes longer than a moment.
            repair: Read the index's files first and make anew those that aren't what was written.
            url: Of a Qdrant server, to which the finished index is also sent; `server`: `shard_number`,
                `replication_factor`, `write_consistency_factor`, and what `qdrant_client.QdrantClient` takes besides.
            collection: Its name there.

        Raises:
            ValueError: If there is nothing to index, or a setting is out of range or unknown.
            ConnectionError: If the server does not answer, or refuses.
            IndexBusyError: If another process is building in the same folder.
        """
        settings = BuildSettings(
            precision, engine, features, batch_size, segment_size, num_workers, progress, repair, region_storage
        )
        shape = {}
        if url is not None:
            from .qdrant import SHAPE, check_shape, connect

            shape = {name: server.pop(name) for name in SHAPE if name in server}
            shape = check_shape(shape)
            url = connect(url, **server)  # before hours of work
        elif server:
            raise ValueError(f"{', '.join(server)}: no setting of a build; of a server's they go with url=")
        temporary = tempfile.TemporaryDirectory(prefix="tvrn-index-") if directory is None else None
        folder = Path(temporary.name if temporary is not None else os.fspath(directory or ""))
        report = build_version(model, processor, open_source(source, side, ids, metadata), folder, settings)
        backend = FolderBackend.open(folder)
        index = cls(backend, model, processor, report)
        index._temporary = temporary
        if url is not None:
            from .qdrant import QdrantBackend, publish

            index.backend = QdrantBackend(publish(backend, url, collection, **shape), collection)
        return index

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike | None = None,
        model: Any = None,
        processor: Any = None,
        *,
        verify: bool = False,
        url: str | None = None,
        collection: str = "tvrn",
        **server: Any,
    ) -> ImageTextIndex:
        """Open an index: of a folder, or of a Qdrant server with `url`.

        Args:
            directory: The index's folder.
            model: The model it was built with, and its `processor`; without them only `search_vector` works.
            verify: Compare the checksums of the vectors and features in a folder too, which reads them.
            url: Of a Qdrant server; `server`: what `qdrant_client.QdrantClient` takes besides.
            collection: Its name there.

        Raises:
            FileNotFoundError: If there is none.
            StorageError: If a file of the folder is damaged or missing, or it is of another format.
            OtherModelError: If it was built with another model; every difference is named with both values.
        """
        backend: Backend
        if (directory is None) == (url is None):
            raise ValueError("load takes either a directory or url=, exactly one of them")
        if url is not None:
            from .qdrant import QdrantBackend, connect

            backend = QdrantBackend(connect(url, **server), collection)
        else:
            backend = FolderBackend.open(Path(os.fspath(directory or "")))
            for broken in verify_files(os.fspath(directory or ""))[1] if verify else ():
                raise broken
        if model is not None:
            where = f"the collection {collection!r}" if directory is None else repr(os.fspath(directory))
            check_model(backend.manifest["fingerprint"], model, processor, where)
        return cls(backend, model, processor)

    def save(self, directory: str | os.PathLike) -> Path:
        """Copy the index into another folder, which then holds this version alone.

        Raises:
            ValueError: If it lies on a server.
        """
        if not isinstance(self.backend, FolderBackend):
            raise ValueError("this index lies on a server; load it from there with ImageTextIndex.load(url=…)")
        target = Path(directory)
        if target.resolve() == self.backend.directory.resolve():
            return target
        (target / SEGMENTS).mkdir(parents=True, exist_ok=True)
        for name in self.backend.manifest["segments"]:
            if name != os.path.basename(name):  # of a made-up manifest: it would be written outside the folder
                raise StorageError(self.backend.version, f"damaged: it names a segment {name!r}")
            shutil.copyfile(self.backend.segments.directory / name, target / SEGMENTS / name)
            flush(target / SEGMENTS / name)
        version = next_version(target)
        for name in {*self.backend.manifest["files"]} & {*os.listdir(self.backend.version)}:
            shutil.copyfile(self.backend.version / name, version / name)
            flush(version / name)
        switch_to(target, version, self.backend.manifest)
        return target

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        limit: int = 10,
        *,
        where: Where | None = None,
        shortlist_size: int = 64,
        rerank: bool = True,
        min_score: float | None = None,
    ) -> Hits:
        """Find what fits a text or an image.

        Reranking needs one side of each kind: text against images, or an image against texts. A search of images by an
        image, or of texts by a text, is by embeddings alone.

        Args:
            text: The query; or
            image: a PIL image, path, encoded bytes, uint8 array, or a record with region features.
            limit: Hits wanted, at most.
            where: Filter by metadata: {"folder": "summer", "year": [2023, 2024]}; a folder of photographs by its path
                or by any name in it: "summer" finds 2021/summer too. In a folder's index also a `pyarrow.compute`
                expression or a function of an item's columns.
            shortlist_size: Candidates by embeddings that the pair score sees (at least `limit`).
            rerank: False ranks by the embeddings alone.
            min_score: Leave out what fits with a lower probability, in [0, 1]; `ending` says so.

        Raises:
            ValueError: If not exactly one of text and image is given, `limit` is below 1, or there is no model; if
                `min_score` is out of its range or there are no probabilities, because the model isn't calibrated or
                the search is by embeddings alone.
        """
        if (text is None) == (image is None):
            raise ValueError(
                f"search takes either text or image; got text={text!r:.80}, an image: {image is not None}"
            )
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text is {text!r:.80}, a {type(text).__name__}; expected one sentence")
        _check_counts(limit=limit, shortlist_size=shortlist_size)
        if self.model is None or self.processor is None:
            raise ValueError("this index was opened without a model: ImageTextIndex.load(directory, model, processor)")
        across = rerank and (text is not None) == (self.side == "images") and self.backend.manifest["features"]
        if min_score is not None:
            self._check_min_score(min_score, across)
        started = time.perf_counter()
        with evaluating(self.model):
            query = self._encode(text, image)
            if text is not None and (unknown := about_unknown_words(self.processor, [text])):
                logger.warning(unknown)
            encoded = time.perf_counter()
            vector = query.tensors()["embeds"][0].float().cpu().numpy()
            found = self.backend.nearest(vector, max(limit, shortlist_size) if across else limit, where)
            listed = time.perf_counter()
            logits = self._rerank(query, [place for place, _ in found]) if across and found else None
            hits = self._hits(found, logits, limit, query)
        seconds = {"encode": encoded - started, "shortlist": listed - encoded, "rerank": time.perf_counter() - listed}
        if min_score is None or not hits or hits[-1].score >= min_score:
            return Hits(hits, seconds)
        fitting = [hit for hit in hits if hit.score >= min_score]
        begin = "No more fit: the next" if fitting else "Nothing fits: the best"
        missed = hits[len(fitting)].score
        return Hits(fitting, seconds, f"{begin} has a probability of {missed:.3f}, below {min_score:g}.")

    def _check_min_score(self, min_score: Any, across: bool) -> None:
        if not isinstance(min_score, Real) or isinstance(min_score, bool) or not 0 <= float(min_score) <= 1:
            raise ValueError(f"min_score is {min_score!r}; expected a probability from 0 to 1")
        if not self.model.has_probabilities:
            raise ValueError(
                f"min_score is {min_score:g}, but the model is not calibrated: its scores rank and have no value from "
                "which on something fits. Calibrate it (tvrn calibrate MODEL --data … --split …), or leave it out"
            )
        if not across:
            raise ValueError(
                f"min_score is {min_score:g}, but this search is by embeddings alone; probabilities come of the pair "
                "score, of a text with images or an image with texts, with reranking, in an index with features"
            )

    def search_vector(self, vector: Any, limit: int = 10, *, where: Where | None = None) -> Hits:
        """The nearest items of an embedding (P,), by cosine alone; needs no model.

        Raises:
            ValueError: If it has another shape, holds NaN, or is zero throughout.
        """
        _check_counts(limit=limit)
        started = time.perf_counter()
        found = self.backend.nearest(_unit_vector(vector), limit, where)
        return Hits(self._hits(found, None, limit), {"shortlist": time.perf_counter() - started})

    def _encode(self, text: str | None, image: Any) -> EncodedItems:
        if text is not None:
            inputs = self.processor(text=[text], return_tensors="pt")
            device = next(self.model.parameters()).device
            return self.model.encode_texts(**{name: value.to(device) for name, value in inputs.items()})
        return self.model.encode_images(**read_scene(self.model, self.processor, image).inputs)

    def _rerank(self, query: EncodedItems, places: Sequence[Any]) -> list[float]:
        """Pair logits of the query with the shortlist."""
        candidates = self.backend.features(places).to(next(self.model.parameters()).device)
        if self.backend.manifest.get("region_storage", "float16") != "float16":
            candidates = self.model.complete_images(candidates)
        images, texts = (candidates, query) if self.side == "images" else (query, candidates)
        return [float(value) for value in self.model.match(images, texts).flatten()]

    def _hits(
        self, found: list[tuple[Any, float]], logits: list[float] | None, limit: int, query: Any = None
    ) -> list[Hit]:
        scored = [(place, cosine, None if logits is None else logits[k]) for k, (place, cosine) in enumerate(found)]
        if logits is not None:
            scored.sort(key=lambda each: -float(each[2] or 0.0))
        scored = scored[:limit]
        scores, kind = [cosine for _, cosine, _ in scored], "cosine"
        if logits is not None:
            scores, kind = self._readable([float(logit or 0.0) for *_, logit in scored], query)
        hits = []
        for rank, ((place, cosine, logit), score) in enumerate(zip(scored, scores, strict=True), start=1):
            item = self.backend.item(place)
            metadata = {name: value for name, value in item.items() if name not in RESERVED}
            found_at = (item.get("path"), item.get("text"))
            hits.append(Hit(rank, item["id"], score, logit, cosine, *found_at, metadata, kind))
        return hits

    def _readable(self, logits: list[float], query: EncodedItems) -> tuple[list[float], str]:
        """Pair logits as numbers to show, and what these are."""
        values = torch.tensor(logits, dtype=torch.float64)
        if not self.model.has_probabilities:
            return self.model.readable_scores(values).tolist(), self.model.score_kind
        text = query if self.side == "images" else None
        return self.model.fits(values.unsqueeze(1), len(self), text)[:, 0].tolist(), "probability"


def _unit_vector(vector: Any) -> np.ndarray:
    """A query's embedding (P,) in float32, of unit norm.

    Raises:
        ValueError: If it is none: NaN would be as near to everything as anything.
    """
    if isinstance(vector, torch.Tensor):
        vector = vector.detach().float().cpu()  # NumPy has no bfloat16
    try:
        plain = np.asarray(vector, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the vector is a {type(vector).__name__} {vector!r:.80}; expected numbers (P,)") from error
    plain = plain[0] if plain.ndim == 2 and len(plain) == 1 else plain
    norm = float(np.linalg.norm(plain))
    if not np.isfinite(norm) or norm == 0:
        what = "zeros alone" if norm == 0 else "NaN or infinity"
        raise ValueError(f"the vector holds {what}; expected an embedding, as get_text_features gives it")
    return (plain / norm).astype(np.float32)


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
