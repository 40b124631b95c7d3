"""The index on a Qdrant server: through the client's local mode, over HTTP, and on a real server where there is one.

QDRANT_BIN names a binary, which is then started and ended here, or QDRANT_URL (with QDRANT_API_KEY) a server.
"""

import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_makers import tiny_model
from qdrant_server import own_collection, started
from test_index import CAPTIONS, COUNT, records

from modeling_tvrn import TVRNProcessor
from modeling_tvrn.index import ImageTextIndex, OtherModelError
from modeling_tvrn.storage.files import StorageError

qdrant = pytest.importorskip("modeling_tvrn.index.qdrant")
client_library = pytest.importorskip("qdrant_client", reason='comes with pip install ".[qdrant]"')

STAND_IN = (sys.executable, str(Path(__file__).with_name("qdrant_stand_in.py")))
pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")


@pytest.fixture(scope="module")
def processor() -> TVRNProcessor:
    return TVRNProcessor.from_captions(CAPTIONS)


@pytest.fixture(scope="module", params=["memory", pytest.param("stand-in", marks=pytest.mark.slow), "server"])
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "memory":
        yield client_library.QdrantClient(":memory:")
    elif request.param == "stand-in":
        with started(*STAND_IN) as (url, _):
            yield client_library.QdrantClient(url=url)
    elif "QDRANT_BIN" in os.environ:
        with started(os.environ["QDRANT_BIN"]) as (url, _):
            yield client_library.QdrantClient(url=url, timeout=60)
    elif "QDRANT_URL" in os.environ:
        key = os.environ.get("QDRANT_API_KEY")
        yield client_library.QdrantClient(url=os.environ["QDRANT_URL"], api_key=key, timeout=60)
    else:
        pytest.skip("set QDRANT_BIN or QDRANT_URL to test against a server")


@pytest.fixture
def collection(server: Any) -> Iterator[str]:
    with own_collection(server) as name:
        yield name


def build(model: Any, processor: Any, source: Any, directory: Any, server: Any, collection: str) -> ImageTextIndex:
    return ImageTextIndex.build(
        model, processor, source, directory, url=server, collection=collection, progress=False, segment_size=7
    )


def test_it_answers_as_the_folder_does(processor: TVRNProcessor, tmp_path: Path, server: Any, collection: str) -> None:
    model = tiny_model()
    built = build(model, processor, records(), tmp_path, server, collection)
    there = ImageTextIndex.load(url=server, collection=collection, model=model, processor=processor)
    here = ImageTextIndex.load(tmp_path, model, processor)
    for options in ({}, {"rerank": False}, {"where": {"split": "test"}}, {"where": {"id": ["image-3", "image-8"]}}):
        wanted, *found = (index.search(text=CAPTIONS[0], limit=5, **options) for index in (here, there, built))
        for hits in found:
            assert [hit.id for hit in hits] == [hit.id for hit in wanted], options
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in wanted], abs=2e-3)
            assert hits[0].metadata == wanted[0].metadata and hits[0].path == wanted[0].path
    assert len(there) == COUNT and there.side == "images"
    assert there.search(image=records()[4], limit=1)[0].id == "image-4"
    with pytest.raises(ValueError, match="a filter is a dict"):
        there.search(text="a", where=lambda row: True)
    with pytest.raises(ValueError, match="lies on a server"):
        there.save(tmp_path / "copy")


def test_captions_are_searched_by_image_there_too(
    processor: TVRNProcessor, tmp_path: Path, server: Any, collection: str
) -> None:
    model = tiny_model(refinement="gru")
    build(model, processor, CAPTIONS, tmp_path, server, collection)
    there = ImageTextIndex.load(url=server, collection=collection, model=model, processor=processor)
    here = ImageTextIndex.load(tmp_path, model, processor)
    found, wanted = (index.search(image=records()[4]) for index in (there, here))
    assert [hit.text for hit in found] == [hit.text for hit in wanted] and found[0].logit is not None


def test_readers_keep_the_old_one_while_and_after_a_new_one_is_published(
    processor: TVRNProcessor, tmp_path: Path, server: Any, collection: str
) -> None:
    model = tiny_model()
    reader = build(model, processor, records(), tmp_path, server, collection)
    before = [hit.id for hit in reader.search(text=CAPTIONS[1])]
    build(model, processor, records(5), tmp_path, server, collection)
    assert [hit.id for hit in reader.search(text=CAPTIONS[1])] == before
    assert len(ImageTextIndex.load(url=server, collection=collection)) == 5
    build(model, processor, records(6), tmp_path, server, collection)
    names = [each.name for each in server.get_collections().collections if each.name.startswith(collection)]
    assert sorted(names) == [f"{collection}-000002", f"{collection}-000003"], "the one before the last is gone"


def test_an_upload_that_was_cut_off_goes_on(
    processor: TVRNProcessor, tmp_path: Path, server: Any, collection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    folder = ImageTextIndex.build(model, processor, records(), tmp_path, progress=False).backend
    sent: list[int] = []
    upsert = server.upsert

    def cut_off(name: str, points: list[Any]) -> Any:
        if len(sent) == 2:
            raise ConnectionError("the server went away")
        sent.append(len(points))
        return upsert(name, points)

    monkeypatch.setattr(qdrant, "UPLOAD_BATCH", 5)
    monkeypatch.setattr(server, "upsert", cut_off)
    with pytest.raises(ConnectionError):
        qdrant.publish(folder, server, collection)
    with pytest.raises(FileNotFoundError, match="no index called"):
        ImageTextIndex.load(url=server, collection=collection)
    monkeypatch.setattr(server, "upsert", lambda name, points: (sent.append(len(points)), upsert(name, points)))
    qdrant.publish(folder, server, collection)
    assert sum(sent) == COUNT == len(ImageTextIndex.load(url=server, collection=collection)), "nothing sent twice"


def test_another_model_and_a_wrong_address_are_refused(processor: TVRNProcessor, tmp_path: Path) -> None:
    server = client_library.QdrantClient(":memory:")
    build(tiny_model(), processor, records(), tmp_path, server, "tvrn")
    with pytest.raises(OtherModelError, match="attention_scale: stored 9.0, expected 5.0"):
        ImageTextIndex.load(url=server, model=tiny_model(attention_scale=5.0), processor=processor)
    with pytest.raises(ValueError, match="expected the server's address"):
        qdrant.connect(3)
    local = qdrant.connect(tmp_path / "local")
    assert local.get_collections().collections == []
    local.close()


def test_a_collection_of_an_older_format_is_refused(processor: TVRNProcessor, tmp_path: Path) -> None:
    server = client_library.QdrantClient(":memory:")
    folder = ImageTextIndex.build(tiny_model(), processor, records(3), tmp_path, progress=False).backend
    folder.manifest["format_version"] = 1
    qdrant.publish(folder, server, "tvrn")
    with pytest.raises(StorageError, match="tvrn-000001 is of format tvrn-index 1: this release reads .*tvrn index"):
        ImageTextIndex.load(url=server, model=tiny_model(), processor=processor)


def test_a_server_is_told_how_to_cut_and_copy_and_wrong_numbers_are_refused_before_the_work(
    processor: TVRNProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, model = client_library.QdrantClient(":memory:"), tiny_model()
    create, told = server.create_collection, {}
    monkeypatch.setattr(server, "create_collection", lambda *name, **how: told.update(how) or create(*name, **how))
    shape = {"shard_number": 6, "replication_factor": 2, "write_consistency_factor": 1}
    ImageTextIndex.build(model, processor, records(3), tmp_path / "a", url=server, progress=False, **shape)
    assert {name: told[name] for name in shape} == shape
    for wrong, words in (
        ({"shard_number": 0}, "shard_number is 0; expected"),
        ({"replication_factor": 2.5}, "replication_factor is 2.5; expected"),
        ({"replication_factor": 2, "write_consistency_factor": 3}, "is 3, but there are 2 copies"),
    ):
        with pytest.raises(ValueError, match=words):
            ImageTextIndex.build(model, processor, records(3), tmp_path / "b", url=server, progress=False, **wrong)
    with pytest.raises(ValueError, match="shard_number: no setting of a build; .* go with url="):
        ImageTextIndex.build(model, processor, records(3), tmp_path / "b", shard_number=6)
    assert not (tmp_path / "b").exists()


def test_what_a_search_asks_of_a_server_does_not_grow_with_its_hits(
    processor: TVRNProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, model, asked = client_library.QdrantClient(":memory:"), tiny_model(), []
    build(model, processor, records(), tmp_path, server, "tvrn")
    there = ImageTextIndex.load(url=server, model=model, processor=processor)
    for name in ("count", "query_points", "retrieve", "scroll", "get_collection", "get_aliases"):
        call = getattr(server, name)
        monkeypatch.setattr(
            server, name, lambda *given, name=name, call=call, **how: asked.append(name) or call(*given, **how)
        )
    monkeypatch.setattr(type(model), "has_probabilities", True)
    assert len(there.search(text=CAPTIONS[0], limit=COUNT)) == len(there) == COUNT
    assert asked == ["query_points", "retrieve", "count"]
    there.search(text=CAPTIONS[0], limit=2)
    assert asked[3:] == ["query_points", "retrieve"], "a version that does not change is counted once"


@pytest.mark.slow
def test_a_users_server_keeps_nothing_and_loses_nothing_and_one_that_goes_away_is_named(
    processor: TVRNProcessor, tmp_path: Path
) -> None:
    model = tiny_model()
    with started(*STAND_IN) as (url, process):
        server = client_library.QdrantClient(url=url)
        build(model, processor, records(3), tmp_path / "theirs", server, "theirs")
        before = [each.name for each in server.get_collections().collections]
        with own_collection(server) as name:
            there = build(model, processor, records(), tmp_path / "ours", server, name)
            assert len(there) == COUNT and len(server.get_collections().collections) == 2
        assert [each.name for each in server.get_collections().collections] == before
        assert len(ImageTextIndex.load(url=url, collection="theirs")) == 3
        with pytest.raises(ConnectionError, match=f"{url}.*404.*not found.*load it again"):
            there.search(text=CAPTIONS[0])
        process.kill()
        process.wait()
        gone = rf"the Qdrant server at '{url}' does not answer as it should \(.*refused\); start it, or"
        theirs = lambda: ImageTextIndex.load(url=url, collection="theirs")  # noqa: E731
        for act in (theirs, lambda: there.search(text=CAPTIONS[0]), lambda: qdrant.publish(there.backend, server)):
            with pytest.raises(ConnectionError, match=gone):
                act()


@pytest.mark.slow
def test_a_program_that_is_no_server_is_shown_with_its_last_words() -> None:
    with (
        pytest.raises(RuntimeError, match="ended with 3: no storage here"),
        started(sys.executable, "-c", "import sys; print('no storage here'); sys.exit(3)"),
    ):
        pass


def test_a_server_s_key_is_an_option_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guarded(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            knows = self.headers.get("api-key") == "sesame"
            answer = {"result": {"aliases": []}, "status": "ok" if knows else {"error": "no key"}, "time": 0.0}
            body = json.dumps({"version": client_library.__version__} if self.path == "/" else answer).encode()
            self.send_response(200 if knows or self.path == "/" else 401)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, check = f"http://127.0.0.1:{server.server_port}", {"check_compatibility": False}
        monkeypatch.delenv("QDRANT_API_KEY", raising=False)
        with pytest.raises(ConnectionError, match="401: no key.*give its api_key .*QDRANT_API_KEY"):
            qdrant.connect(url, **check)
        with pytest.warns(UserWarning, match="insecure"):
            qdrant.connect(url, api_key="sesame", **check)
        monkeypatch.setenv("QDRANT_API_KEY", "sesame")
        with pytest.warns(UserWarning, match="insecure"):
            qdrant.connect(url, **check)
        monkeypatch.setenv("QDRANT_API_KEY", "other")
        with pytest.warns(UserWarning, match="insecure"), pytest.raises(ConnectionError, match="401"):
            qdrant.connect(url, **check)
        server.shutdown()
