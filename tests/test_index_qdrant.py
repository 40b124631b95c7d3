"""The index on a Qdrant server: through the client's local mode, and on a real one where QDRANT_URL names it."""

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from model_makers import tiny_model
from test_index import CAPTIONS, COUNT, records

from modeling_tvrn import TVRNProcessor
from modeling_tvrn.index import ImageTextIndex, OtherModelError
from modeling_tvrn.storage.files import StorageError

qdrant = pytest.importorskip("modeling_tvrn.index.qdrant")
client_library = pytest.importorskip("qdrant_client", reason='comes with pip install ".[qdrant]"')

pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")


@pytest.fixture(scope="module")
def processor() -> TVRNProcessor:
    return TVRNProcessor.from_captions(CAPTIONS)


@pytest.fixture(params=["memory", "server"])
def server(request: pytest.FixtureRequest) -> Any:
    if request.param == "memory":
        return client_library.QdrantClient(":memory:")
    if not os.environ.get("QDRANT_URL"):
        pytest.skip("set QDRANT_URL to test against a server")
    return client_library.QdrantClient(url=os.environ["QDRANT_URL"], api_key=os.environ.get("QDRANT_API_KEY"))


@pytest.fixture
def collection(server: Any) -> Any:
    name = f"tvrn-test-{uuid4().hex[:8]}"
    yield name
    for each in server.get_collections().collections:
        if each.name.startswith(name):
            server.delete_collection(each.name)


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
