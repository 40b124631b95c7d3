"""A Hub on this machine for tests: models and datasets are pushed to it and read from it by the real clients.

    with HubServer() as hub:
        hub.add_repo("org/pairs", {"data/train-00000.parquet": path_or_bytes}, repo_type="dataset")
        hub.drop(after=20_000, match=".parquet")            # the next GET of such a file breaks after 20,000 bytes
        run_in_a_process_with(HF_ENDPOINT=hub.url)          # must be set before huggingface_hub is imported there

Within the process of the test itself `HfApi(endpoint=hub.url, token=hub.token)` works after `online(monkeypatch)`:
conftest.py switches the network off. What a test can look at or bring about:

* `hub.head(repo_id)`: commit of the main branch; `hub.files(repo_id)`: its files, path -> bytes;
  `hub.commits(repo_id)`: all commits, first to last.
* `hub.add_repo(repo_id, files, repo_type, private)`: a repository with one commit; contents are bytes, or paths of
  files that are served from where they lie.
* `hub.drop(after, method, match, times)`: cut connections. GET: after so many bytes of a file's content, counted from
  where the request (its Range) begins. POST: after so many bytes of the request's body have arrived.
* `hub.requests`: what was asked, as `Request(method, path, range, status, sent)`; a dropped one has `dropped=True`.
* Two tokens are known: `hub.token` may write to the namespaces "org" and "me", `hub.reader` may only read public ones.

Files are all "regular": neither LFS nor Xet. A commit is applied when the whole of it has arrived, or not at all.
Range requests (`bytes=a-b`, `bytes=a-`, `bytes=-n`) are served. Endpoints that no test needs answer 501.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

Content = bytes | Path
DATE = "2026-01-01T00:00:00.000Z"
CHUNK = 16384
NAMES = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = re.compile(rf"/api/(?P<kind>models|datasets|spaces)/{NAMES}(?:/(?P<verb>[\w-]+)(?:/(?P<rest>.*))?)?$")
RESOLVE = re.compile(rf"/(?:(?P<kind>datasets|spaces)/)?{NAMES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")


def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's clients use the network again, for one test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def oid_of(content: Content) -> str:
    """What git calls a blob of that content."""
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def size_of(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


@dataclass
class Repo:
    """Commits, oldest first: each a complete set of files."""

    kind: str
    private: bool
    commits: list[tuple[str, dict[str, Content]]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Content]) -> str:
        text = json.dumps([len(self.commits), sorted((path, oid_of(content)) for path, content in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits.append((sha, dict(files)))
        self.refs["main"] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, Content]] | None:
        """The commit that a branch, tag or (shortened) hash names."""
        wanted = self.refs.get(revision, revision)
        return next((commit for commit in reversed(self.commits) if commit[0].startswith(wanted)), None)


@dataclass
class Request:
    method: str
    path: str
    range: str | None = None
    status: int = 0
    sent: int = 0
    dropped: bool = False


@dataclass
class Drop:
    after: int
    method: str
    match: str
    times: int


class Dropped(Exception):
    """The connection was cut on purpose."""


class HubServer:
    """See the module's docstring. The address is free until the server is entered."""

    token, reader = "hf_test_writer", "hf_test_reader"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.drops: list[Drop] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(
        self, repo_id: str, files: Mapping[str, Content] | None = None, repo_type: str = "model", private: bool = False
    ) -> str:
        """A repository with one commit; gives its hash."""
        repo = self.repos[f"{repo_type}s", repo_id] = Repo(f"{repo_type}s", private)
        return repo.commit({".gitattributes": b""} if files is None else files)

    def drop(self, after: int, method: str = "GET", match: str = "", times: int = 1) -> None:
        """Cut the next connections of that method whose path contains `match`, after so many bytes of content."""
        self.drops.append(Drop(after, method, match, times))

    def head(self, repo_id: str, repo_type: str = "model") -> str:
        return self.repos[f"{repo_type}s", repo_id].refs["main"]

    def commits(self, repo_id: str, repo_type: str = "model") -> list[str]:
        return [sha for sha, _ in self.repos[f"{repo_type}s", repo_id].commits]

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What the main branch holds."""
        found = self.repos[f"{repo_type}s", repo_id].commits[-1][1]
        return {path: item.read_bytes() if isinstance(item, Path) else item for path, item in found.items()}

    def due_drop(self, method: str, path: str) -> Drop | None:
        with self.lock:
            for drop in self.drops:
                if drop.times > 0 and drop.method == method and drop.match in path:
                    drop.times -= 1
                    return drop
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    asked: Request

    def log_message(self, *_: Any) -> None:  # a test's output is its own
        return

    def do_GET(self) -> None:
        self.guarded(self.get)

    def do_HEAD(self) -> None:
        self.guarded(self.get)

    def do_POST(self) -> None:
        self.guarded(self.post)

    def guarded(self, handle: Any) -> None:
        self.url = urlsplit(self.path)
        self.asked = Request(self.command, unquote(self.url.path), self.headers.get("Range"))
        self.hub.requests.append(self.asked)
        try:
            handle(self.asked.path)
        except (Dropped, BrokenPipeError, ConnectionResetError):
            self.asked.dropped = self.close_connection = True

    def cut(self) -> None:
        """End the connection without another word."""
        self.connection.shutdown(socket.SHUT_RDWR)
        raise Dropped

    # -- answers ------------------------------------------------------------------------------------------------

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.begin(status, len(body), {"Content-Type": "application/json", **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.asked.status = status
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def user(self) -> str | None:
        """Who asks: "writer", "reader", "stranger" with a token nobody gave out, or None."""
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        known = {"": None, self.hub.token: "writer", self.hub.reader: "reader"}
        return known.get(given, "stranger")

    def repo(self, kind: str, repo_id: str) -> Repo | None:
        """The repository, if there is one that this user may see; otherwise the answer is given already."""
        if self.user() == "stranger":
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return None
        found = self.hub.repos.get((kind, repo_id))
        if found is None or (found.private and self.user() != "writer"):
            self.refuse(404 if self.user() else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    # -- reading ------------------------------------------------------------------------------------------------

    def get(self, path: str) -> None:
        if path == "/api/whoami-v2":
            return self.whoami()
        if match := RESOLVE.match(path):
            return self.resolve(match)
        match = API.match(path)
        repo = self.repo(match["kind"], match["repo"]) if match else None
        if match is None:
            return self.answer(501, {"error": f"no {path} here"})
        if repo is None:
            return None
        verb, rest = match["verb"], match["rest"] or ""
        if verb == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.refs.items()]
            return self.answer(200, {"branches": branches, "converts": [], "tags": []})
        revision, _, folder = rest.partition("/")
        commit = repo.at(revision if verb in ("revision", "tree", "commits") else "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb in (None, "revision"):
            return self.answer(200, self.info(match["repo"], repo, *commit))
        if verb == "tree":
            return self.answer(200, list(self.tree(commit[1], folder)))
        return self.answer(501, {"error": f"no {verb} here"})

    def whoami(self) -> None:
        if self.user() in (None, "stranger"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        orgs = [{"name": "org", "type": "org"}] if self.user() == "writer" else []
        return self.answer(200, {"type": "user", "name": "me", "orgs": orgs, "auth": {"type": "access_token"}})

    def info(self, repo_id: str, repo: Repo, sha: str, files: Mapping[str, Content]) -> dict[str, Any]:
        siblings = [{"rfilename": path, "size": size_of(item), "blobId": oid_of(item)} for path, item in files.items()]
        dates = {"lastModified": DATE, "createdAt": DATE}
        flags = {"private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        names = {"_id": sha[:24], "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]}
        return {**names, "sha": sha, **dates, **flags, "siblings": siblings}

    def tree(self, files: Mapping[str, Content], folder: str) -> Iterator[dict[str, Any]]:
        recursive = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() in ("1", "true")
        start, folders = f"{folder.rstrip('/')}/" if folder else "", set()
        for path, item in sorted(files.items()):
            if path.startswith(start):
                parents = path[len(start) :].split("/")[:-1]
                for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                    folders.add(start + "/".join(parents[:depth]))
                if recursive or not parents:
                    yield entry(path, item)
        yield from ({"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders))

    def resolve(self, match: re.Match[str]) -> None:
        repo = self.repo(match["kind"] or "models", match["repo"])
        if repo is None:
            return
        commit = repo.at(match["revision"])
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
        content = commit[1].get(match["path"])
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{oid_of(content)}"', "X-Repo-Commit": commit[0], "Accept-Ranges": "bytes"}
        self.send_content(content, {**headers, "Content-Type": "application/octet-stream"})

    def send_content(self, content: Content, headers: dict[str, str]) -> None:
        size = size_of(content)
        first, last, status = 0, size - 1, 200
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.asked.range or ""):
            a, b = found.groups()
            first = int(a) if a else max(size - int(b), 0)
            last = min(int(b), size - 1) if a and b else size - 1
            if first >= size:
                return self.begin(416, 0, {"Content-Range": f"bytes */{size}"})
            status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        length = last - first + 1
        self.begin(status, length, headers)
        if self.command == "HEAD":
            return
        drop = self.hub.due_drop("GET", self.asked.path)
        for part in parts_of(content, first, length if drop is None else min(drop.after, length)):
            self.wfile.write(part)
            self.asked.sent += len(part)
        if drop is not None and drop.after < length:
            self.wfile.flush()
            self.cut()

    # -- writing ------------------------------------------------------------------------------------------------

    def body(self) -> bytes:
        length, drop = int(self.headers.get("Content-Length") or 0), self.hub.due_drop("POST", self.asked.path)
        if drop is not None and drop.after < length:
            self.rfile.read(drop.after)
            self.cut()
        return self.rfile.read(length)

    def post(self, path: str) -> None:
        body = self.body()
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if self.user() in (None, "stranger"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        match = API.match(path)
        repo = self.repo(match["kind"], match["repo"]) if match else None
        if match is None or match["verb"] not in ("paths-info", "preupload", "commit", "tag"):
            return self.answer(501, {"error": f"no {path} here"})
        if repo is None:
            return None
        commit = repo.at((match["rest"] or "main").partition("/")[0])
        if commit is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if match["verb"] == "paths-info":
            wanted = paths_of(body, self.headers.get("Content-Type", ""))
            return self.answer(200, [entry(p, commit[1][p]) for p in wanted if p in commit[1]])
        if not self.may_write(match["repo"].split("/")[0]):
            return None
        if match["verb"] == "preupload":
            return self.preupload(json.loads(body), commit[1])
        if match["verb"] == "tag":
            repo.refs[json.loads(body)["tag"]] = commit[0]
            return self.answer(200, {})
        return self.commit(match["repo"], repo, body)

    def may_write(self, namespace: str) -> bool:
        if self.user() == "writer" and namespace in ("org", "me"):
            return True
        self.refuse(403, "", f"You don't have the rights to write to {namespace}")
        return False

    def validate(self, text: str) -> None:
        found = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
        try:
            errors = [] if found is None or isinstance(yaml.safe_load(found[1]), dict) else ["not a mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def create(self, asked: dict[str, Any]) -> None:
        namespace, kind = asked.get("organization") or "me", f"{asked.get('type') or 'model'}s"
        repo_id = f"{namespace}/{asked['name']}"
        if not self.may_write(namespace):
            return None
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                return self.answer(409, {**url, "error": "You already created this model repo"})
            self.hub.add_repo(repo_id, None, kind.removesuffix("s"), is_private)
        return self.answer(200, url)

    def preupload(self, asked: dict[str, Any], files: Mapping[str, Content]) -> None:
        def plan(path: str) -> dict[str, Any]:
            known = {"oid": oid_of(files[path])} if path in files else {}
            return {"path": path, "uploadMode": "regular", "shouldIgnore": False, **known}

        self.answer(200, {"files": [plan(file["path"]) for file in asked["files"]]})

    def commit(self, repo_id: str, repo: Repo, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        values = [(line["key"], line["value"]) for line in lines]
        with self.hub.lock:
            sha, files = repo.commits[-1]
            parent = next(value.get("parentCommit") for key, value in values if key == "header")
            if parent is not None and parent != sha:
                return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(files)
            for key, value in values:
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "deletedFile":
                    files.pop(value["path"], None)
                elif key != "header":
                    return self.refuse(400, "", f"no {key} here")
            new = repo.commit(files)
        return self.answer(
            200, {"success": True, "commitOid": new, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{new}"}
        )


def entry(path: str, content: Content) -> dict[str, Any]:
    """One file as a listing shows it."""
    commit = {"id": "0" * 40, "title": "commit", "date": DATE}
    return {"type": "file", "oid": oid_of(content), "size": size_of(content), "path": path, "lastCommit": commit}


def paths_of(body: bytes, content_type: str) -> list[str]:
    """The paths asked for, as JSON or as a form."""
    if "json" in content_type:
        found = json.loads(body)["paths"]
        return [found] if isinstance(found, str) else found
    return parse_qs(body.decode())["paths"]


def parts_of(content: Content, first: int, length: int) -> Iterator[bytes]:
    """A stretch of the content, bit by bit."""
    if isinstance(content, bytes):
        yield from (content[i : min(i + CHUNK, first + length)] for i in range(first, first + length, CHUNK))
        return
    with content.open("rb") as file:
        file.seek(first)
        while length > 0 and (part := file.read(min(CHUNK, length))):
            length -= len(part)
            yield part
