"""The Hub that other tests push to and read from behaves as the real one where they rely on it."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, online
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    online(monkeypatch)
    with HubServer() as server:
        yield server


def fetch(url: str, bytes_range: str) -> tuple[bytes, str]:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": bytes_range})) as answer:
        return answer.read(), answer.headers["Content-Range"]


def test_commits_are_seen_by_readers_and_old_ones_stay(hub: HubServer) -> None:
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("org/one", exist_ok=True)
    api.create_repo("org/one", exist_ok=True)
    first = api.create_commit("org/one", [CommitOperationAdd("a/b.txt", b"old")], commit_message="first").oid
    operations = [CommitOperationAdd("a/c.txt", b"new"), CommitOperationDelete("a/b.txt")]
    second = api.create_commit("org/one", operations, commit_message="second").oid
    assert api.list_repo_files("org/one") == [".gitattributes", "a/c.txt"] and api.model_info("org/one").sha == second
    assert {file.path for file in api.list_repo_tree("org/one", recursive=True)} == {".gitattributes", "a", "a/c.txt"}
    assert {file.path for file in api.list_repo_tree("org/one", revision=first)} == {".gitattributes", "a"}
    assert "a/b.txt" in api.list_repo_files("org/one", revision=first)


def test_what_is_missing_or_private_is_told_apart(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/secret", {"x": b"1"}, private=True)
    sha = hub.add_repo("org/open", {"x": b"1"})
    reader = HfApi(endpoint=hub.url, token=hub.reader)
    with pytest.raises(RepositoryNotFoundError):
        reader.model_info("org/secret")
    with pytest.raises(RevisionNotFoundError):
        reader.model_info("org/open", revision="v2")
    with pytest.raises(EntryNotFoundError):
        reader.hf_hub_download("org/open", "y", cache_dir=tmp_path)
    writer = HfApi(endpoint=hub.url, token=hub.token)
    assert writer.model_info("org/secret").private and writer.model_info("org/open", revision=sha).sha == sha


def test_ranges_of_a_data_file(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file.parquet").write_bytes(bytes(range(100)))
    hub.add_repo("org/data", {"d/file.parquet": tmp_path / "file.parquet"}, repo_type="dataset")
    url = f"{hub.url}/datasets/org/data/resolve/main/d/file.parquet"
    assert fetch(url, "bytes=10-19") == (bytes(range(10, 20)), "bytes 10-19/100")
    assert fetch(url, "bytes=90-") == (bytes(range(90, 100)), "bytes 90-99/100")
    assert fetch(url, "bytes=-3") == (bytes(range(97, 100)), "bytes 97-99/100")
    with pytest.raises(urllib.error.HTTPError, match="416"):
        fetch(url, "bytes=100-")


@pytest.mark.slow
def test_a_dropped_download_is_tried_again_by_the_client(hub: HubServer, tmp_path: Path) -> None:
    content = bytes(i % 251 for i in range(60_000))
    hub.add_repo("org/data", {"big.bin": content}, repo_type="dataset")
    hub.drop(after=20_000, match="big.bin")
    path = hf_hub_download("org/data", "big.bin", repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path)
    assert Path(path).read_bytes() == content
    gets = [request for request in hub.requests if request.method == "GET" and request.path.endswith("big.bin")]
    assert [(request.dropped, request.sent) for request in gets] == [(True, 20_000), (False, 60_000)]
