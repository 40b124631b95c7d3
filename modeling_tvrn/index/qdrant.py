"""The same index on a Qdrant server, which shards and replicates it: vectors to search, features to rerank with.

An index is a numbered collection behind an alias. A new one is filled beside it and the alias moved at the end, so
that readers see the old one whole; it is dropped when the next but one is published.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from safetensors.torch import load, save

from ..encoded_tvrn import EncodedItems
from ..redaction import redacted_text
from ..storage.files import FORMATS, StorageError
from ..storage.tables import values_of
from .segments import SIDES, widened
from .sources import RESERVED, folder_names
from .versions import FORMAT

if TYPE_CHECKING:
    from .folder import FolderBackend

logger = logging.getLogger(__name__)

VECTOR, FEATURES, META, FOLDERS = "embedding", "features", "meta", "folders"
UPLOAD_BATCH = 64  # points a request; with features one takes some 100 kB
API_KEY = "QDRANT_API_KEY"
SHAPE = ("shard_number", "replication_factor", "write_consistency_factor")


def connect(url: Any, **options: Any) -> Any:
    """A client of a server ("http://…"), of its local mode in a folder, or in memory (":memory:"); or one as it is.

    A server's `api_key` is an option, or the environment's QDRANT_API_KEY.

    Raises:
        ImportError: Naming the command that installs qdrant-client.
        ConnectionError: No server answers, or it refuses.
    """
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise ImportError('an index on a server needs qdrant-client: pip install "modeling-tvrn[qdrant]"') from error
    if isinstance(url, QdrantClient):
        return url
    if not isinstance(url, str | os.PathLike):
        raise ValueError(f"url is a {type(url).__name__}; expected the server's address, a folder, or a QdrantClient")
    address = os.fspath(url)
    if address == ":memory:":
        return QdrantClient(":memory:")
    if "://" not in address:
        return QdrantClient(path=address)
    client = QdrantClient(url=address, **{"api_key": os.environ.get(API_KEY) or None} | options)
    with answered(client):
        client.get_aliases()
    return client


@contextlib.contextmanager
def answered(client: Any) -> Iterator[None]:
    """What a server that is gone, or refuses, makes the client raise, as one sentence.

    Raises:
        ConnectionError: With the server's address and what it said.
    """
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

    try:
        yield
    except (ApiException, QdrantException) as error:
        said, advice = str(error), "look into its log"
        if isinstance(error, ResponseHandlingException):
            said, advice = f"{error.source}", "start it, or give the address of another node"
        elif isinstance(error, UnexpectedResponse):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = f"{error.status_code}: {error.structured()['status']['error']}"
            if error.status_code in (401, 403):
                advice = f"give its api_key (in Python, or as {API_KEY} in the environment)"
            elif error.status_code == 404:
                advice = "correct the address, or, if an index was built anew meanwhile, load it again"
        where = redacted_text(str(client.init_options["url"] or client.init_options["host"]))
        raise ConnectionError(
            f"the Qdrant server at {where!r} does not answer as it should ({' '.join(said.split())}); {advice}"
        ) from error


def check_shape(shape: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of shards and copies that are given; wrong ones are refused before the work of a build.

    Raises:
        ValueError: One is below 1, or more copies would have to answer than there are.
    """
    for name, value in shape.items():
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
    copies, needed = shape.get("replication_factor"), shape.get("write_consistency_factor")
    if copies is not None and needed is not None and needed > copies:
        raise ValueError(
            f"write_consistency_factor is {needed}, but there are {copies} copies (replication_factor); expected at "
            "most as many"
        )
    return {name: int(value) for name, value in shape.items() if value is not None}


def publish(
    index: FolderBackend,
    url: Any,
    collection: str = "tvrn",
    *,
    shard_number: int | None = None,
    replication_factor: int | None = None,
    write_consistency_factor: int | None = None,
    **options: Any,
) -> Any:
    """Send a finished index to a server; the client that did it comes back.

    An upload that was cut off goes on where it stopped when it is called again.

    Args:
        index: In its folder.
        url: See `connect`; `options`: what `QdrantClient` takes besides, such as `api_key`.
        collection: What readers call it.
        shard_number: Pieces the server cuts it into; `replication_factor`: copies of each, on different nodes;
            `write_consistency_factor`: copies that have to confirm what is sent. None: the server's own; a client's
            local mode has one piece and one copy.

    Raises:
        ValueError: One of the three is out of range.
        ConnectionError: The server refuses, or went away.
    """
    shape = check_shape(dict(zip(SHAPE, (shard_number, replication_factor, write_consistency_factor), strict=True)))
    client = connect(url, **options)
    with answered(client):
        number = 1 + _current_number(client, collection)
        name = f"{collection}-{number:06d}"
        manifest = dict(index.manifest) | {"engine": "qdrant", "segments": [], "files": {}, "shape": shape}
        if client.collection_exists(name) and _manifest(client, name) != manifest:
            client.delete_collection(name)  # what is left of another build's upload
        if not client.collection_exists(name):
            _create(client, name, index, manifest, shape)
        there = set(_ids(client, name))
        points = [(row, str(uuid5(NAMESPACE_URL, f"{row}/{key}"))) for row, key in enumerate(index.keys)]
        missing = [(row, point) for row, point in points if point not in there]
        logger.info("%s: %d of %d items are there already", name, len(points) - len(missing), len(points))
        for start in range(0, len(missing), UPLOAD_BATCH):
            client.upsert(name, [_point(index, row, point) for row, point in missing[start : start + UPLOAD_BATCH]])
        _switch(client, collection, name)
        for old in _numbered(client, collection):
            if old < number - 1:
                client.delete_collection(f"{collection}-{old:06d}")
    return client


class QdrantBackend:
    """One published version, opened whole: publishing another does not change what it answers."""

    def __init__(self, client: Any, collection: str) -> None:
        self.client = client
        with answered(client):
            number = _current_number(client, collection)
            if not number:
                raise FileNotFoundError(f"the server has no index called {collection!r}: build one with url= first")
            self.name = f"{collection}-{number:06d}"
            self.manifest = _manifest(client, self.name)
        version, wanted = self.manifest.get("format_version"), FORMATS[FORMAT][0]
        if version != wanted:
            problem = f"of format {FORMAT} {version}: this release reads {FORMAT} {wanted}"
            raise StorageError(self.name, problem, "build it again: `tvrn index MODEL SOURCE INDEX --url URL`")

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        """Asked once: a published version does not change."""
        with answered(self.client):
            return int(self.client.count(self.name, exact=True).count)

    def nearest(self, query: np.ndarray, count: int, where: Any) -> list[tuple[Any, float]]:
        """(point, cosine), nearest first; a point carries its columns, not its features."""
        from qdrant_client import models

        quantization = models.QuantizationSearchParams(rescore=True, oversampling=4.0)
        with answered(self.client):
            found = self.client.query_points(
                self.name,
                query=query.tolist(),
                using=VECTOR,
                limit=count,
                query_filter=_filter(where),
                with_payload=models.PayloadSelectorExclude(exclude=[FEATURES]),
                search_params=models.SearchParams(quantization=quantization),
            ).points
        return [(point, float(point.score)) for point in found]

    def item(self, place: Any) -> dict[str, Any]:
        """One item's columns."""
        payload = dict(place.payload)
        return {name: payload.get(name) for name in ("id", "path", "text")} | dict(payload.get(META) or {})

    def features(self, places: Sequence[Any]) -> EncodedItems:
        """What reranking needs of the given points, in float32."""
        with answered(self.client):
            points = self.client.retrieve(self.name, [place.id for place in places], with_payload=[FEATURES])
        by_id = {point.id: point.payload[FEATURES] for point in points}
        parts = []
        for place in places:
            tensors = widened(load(base64.b64decode(by_id[place.id])))
            parts.append(SIDES[self.manifest["side"]](**tensors, model_fingerprint=self.manifest["model_fingerprint"]))
        return SIDES[self.manifest["side"]].cat(parts)


def _create(client: Any, name: str, index: FolderBackend, manifest: dict[str, Any], shape: Mapping[str, int]) -> None:
    from qdrant_client import models

    int8 = models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8))
    binary = models.BinaryQuantization(binary=models.BinaryQuantizationConfig())
    size = index.search.vectors.shape[1]
    client.create_collection(
        name,
        vectors_config={VECTOR: models.VectorParams(size=size, distance=models.Distance.COSINE, on_disk=True)},
        quantization_config={"int8": int8, "binary": binary}.get(manifest["precision"]),
        on_disk_payload=True,
        metadata={"tvrn": json.dumps(manifest)},
        **shape,
    )


def _point(index: FolderBackend, row: int, point: str) -> Any:
    from qdrant_client import models

    item = index.item(row)
    meta = {name: value for name, value in item.items() if name not in RESERVED and value is not None}
    payload: dict[str, Any] = {"id": item["id"], "path": item["path"], "text": item["text"], META: meta}
    if isinstance(meta.get("folder"), str):
        payload[FOLDERS] = folder_names(meta["folder"])
    if index.manifest["features"]:
        tensors = index.features([row]).tensors()
        half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        payload[FEATURES] = base64.b64encode(save({name: value.contiguous() for name, value in half.items()})).decode()
    return models.PointStruct(id=point, vector={VECTOR: index.search.vectors[row].tolist()}, payload=payload)


def _switch(client: Any, collection: str, name: str) -> None:
    from qdrant_client import models

    remove = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=collection))
    create = models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=name, alias_name=collection))
    known = any(alias.alias_name == collection for alias in client.get_aliases().aliases)
    client.update_collection_aliases([remove, create] if known else [create])


def _current_number(client: Any, collection: str) -> int:
    """Of the collection behind the alias; 0 where there is none."""
    behind = [a.collection_name for a in client.get_aliases().aliases if a.alias_name == collection]
    return int(behind[0].rpartition("-")[2]) if behind else 0


def _numbered(client: Any, collection: str) -> list[int]:
    names = [each.name for each in client.get_collections().collections]
    numbers = [name.removeprefix(f"{collection}-") for name in names if name.startswith(f"{collection}-")]
    return [int(number) for number in numbers if number.isdigit() and len(number) == 6]


def _manifest(client: Any, name: str) -> dict[str, Any]:
    metadata = client.get_collection(name).config.metadata or {}
    if "tvrn" not in metadata:
        raise ValueError(
            f"the collection {name!r} holds no index of this package; choose another name (a server older than Qdrant "
            "1.16 keeps none)"
        )
    return dict(json.loads(metadata["tvrn"]))


def _ids(client: Any, name: str) -> Iterator[str]:
    offset = None
    while True:
        points, offset = client.scroll(name, limit=1000, offset=offset, with_payload=False, with_vectors=False)
        yield from (str(point.id) for point in points)
        if offset is None:
            return


def _filter(where: Any) -> Any:
    """{"folder": "summer", "year": [2023, 2024]} as the server takes it."""
    if where is None:
        return None
    from qdrant_client import models

    if not isinstance(where, Mapping):
        raise ValueError(f"where is a {type(where).__name__}; on a server a filter is a dict of columns and values")
    conditions: list[Any] = []
    for name, wanted in where.items():
        key = name if name in ("id", "path", "text") else f"{META}.{name}"
        keys = [key, FOLDERS] if name == "folder" else [key]
        either = [_condition(key, value) for key in keys for value in values_of(wanted)]
        conditions.append(models.Filter(should=either))
    return models.Filter(must=conditions)


def _condition(key: str, value: Any) -> Any:
    from qdrant_client import models

    if value is None:
        return models.IsEmptyCondition(is_empty=models.PayloadField(key=key))
    if isinstance(value, float):
        return models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))
    return models.FieldCondition(key=key, match=models.MatchValue(value=value))
