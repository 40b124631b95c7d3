"""No Qdrant: its client's local mode behind the REST routes that an index uses.

It takes its port from the server's own variable, so that what starts a server, speaks to one over HTTP and loses one
can be tested where there is no binary. It is one node, keeps nothing on disk, and searches exactly.
"""

import json
import os
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from typing import Any

from qdrant_client import QdrantClient, models

local = QdrantClient(":memory:")


def create(name: str, body: Any) -> bool:
    known = {"vectors_config": body["vectors"], "quantization_config": body.get("quantization_config")}
    request = models.CreateCollection(**body)  # refuses what the server does not know
    return local.create_collection(name, **known | {"vectors_config": request.vectors}, metadata=request.metadata)


def upsert(name: str, body: Any) -> Any:
    return local.upsert(name, models.PointsList(**body).points)


def query(name: str, body: Any) -> Any:
    request = models.QueryRequest(**body)
    return local.query_points(
        name, request.query, using=request.using, limit=request.limit, query_filter=request.filter,
        with_payload=request.with_payload,
    )  # fmt: skip


def scroll(name: str, body: Any) -> Any:
    points, after = local.scroll(name, limit=body["limit"], offset=body.get("offset"), with_payload=False)
    return models.ScrollResult(points=points, next_page_offset=after)


def retrieve(name: str, body: Any) -> Any:
    return local.retrieve(name, body["ids"], with_payload=models.PointRequest(**body).with_payload)


def rename(_: str, body: Any) -> Any:
    return local.update_collection_aliases(models.ChangeAliasesOperation(**body).actions)


NAME = "/collections/([^/]+)"
ROUTES: dict[str, Callable[[str, Any], Any]] = {
    "GET /aliases": lambda name, body: local.get_aliases(),
    "GET /collections": lambda name, body: local.get_collections(),
    "POST /collections/aliases": rename,
    f"GET {NAME}/exists": lambda name, body: {"exists": local.collection_exists(name)},
    f"GET {NAME}": lambda name, body: local.get_collection(name),
    f"PUT {NAME}": create,
    f"DELETE {NAME}": lambda name, body: local.delete_collection(name),
    f"PUT {NAME}/points": upsert,
    f"POST {NAME}/points": retrieve,
    f"POST {NAME}/points/query": query,
    f"POST {NAME}/points/scroll": scroll,
    f"POST {NAME}/points/count": lambda name, body: local.count(name, exact=True),
}


class Handler(BaseHTTPRequestHandler):
    """One request after the other: the local mode is not made for several threads."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {self.path.partition('?')[0].rstrip('/')}"
        if asked == "GET /readyz":
            return self.send(200, "all shards are ready")
        if asked == "GET ":
            return self.send(200, {"title": "stand-in", "version": version("qdrant-client")})
        for route, function in ROUTES.items():
            if found := re.fullmatch(route, asked):
                name = found[1] if found.groups() else ""
                try:
                    result = function(name, json.loads(body or b"{}"))
                except ValueError as error:  # so the local mode says that there is no such collection
                    return self.send(404, {"status": {"error": str(error)}, "time": 0.0})
                return self.send(200, {"result": result, "status": "ok", "time": 0.0})
        return self.send(501, {"status": {"error": f"the stand-in has no {asked}"}, "time": 0.0})

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def send(self, status: int, content: Any) -> None:
        data = json.dumps(content, default=lambda value: value.model_dump(mode="json")).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: what is in the log is for errors."""


HTTPServer(("127.0.0.1", int(os.environ["QDRANT__SERVICE__HTTP_PORT"])), Handler).serve_forever()
