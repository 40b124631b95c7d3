"""`ImageTextIndex`: finds what exhaustive scoring finds, survives kills, bad files and changing folders."""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from data_makers import encoded, noise
from model_makers import FEATURES, regions, tiny_model, words

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.index import Hits, ImageTextIndex, IndexBusyError, OtherModelError
from modeling_tvrn.index import build as building_module
from modeling_tvrn.index.segments import Segments
from modeling_tvrn.index.sources import open_source
from modeling_tvrn.index.vectors import VectorSearch
from modeling_tvrn.index.versions import FORMAT, LOCK
from modeling_tvrn.storage.files import StorageError, locked, write_json

CAPTIONS = ["two dogs run in snow", "a red kite over the sea", "a man on a skateboard", "children play football"]
COUNT = 23


@pytest.fixture(scope="module")
def processor() -> TVRNProcessor:
    return TVRNProcessor.from_captions(CAPTIONS)


def records(count: int = COUNT, seed: int = 3) -> list[dict[str, Any]]:
    """Images as region features, of different region counts."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        regions_of = 4 + number % 3
        corners = random.random((regions_of, 2)) * 0.5
        boxes = np.concatenate([corners, corners + 0.2 + 0.3 * random.random((regions_of, 2))], axis=1)
        made.append(
            {
                "region_features": random.normal(size=(regions_of, FEATURES)).astype(np.float32),
                "region_boxes": boxes.astype(np.float32),
                "captions": [CAPTIONS[number % 4]],
                "image_id": f"image-{number}",
                "caption_ids": [f"caption-{number}"],
                "split": "train" if number % 2 else "test",
                "filename": f"{number}.jpg",
            }
        )
    return made


def exhaustive(model: Any, processor: Any, items: list[dict[str, Any]], text: str) -> np.ndarray:
    """Logits of every record with a text, straight from the model."""
    inputs = processor(
        region_features=[item["region_features"] for item in items],
        region_boxes=[item["region_boxes"] for item in items],
        text=text,
    )
    with torch.no_grad():
        return model(**inputs).logits_per_image[:, 0].numpy()


def build(model: Any, processor: Any, source: Any, directory: Any = None, **options: Any) -> ImageTextIndex:
    return ImageTextIndex.build(
        model, processor, source, directory, **{"progress": False, "segment_size": 7} | options
    )


# -- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refinement", ["gate", "gru"])
def test_with_a_whole_shortlist_the_ranking_is_the_exhaustive_one(
    processor: TVRNProcessor, tmp_path: Path, refinement: str
) -> None:
    model, items = tiny_model(refinement=refinement), records()
    index = build(model, processor, items, tmp_path / "index")
    logits = exhaustive(model, processor, items, CAPTIONS[0])
    hits = index.search(text=CAPTIONS[0], limit=COUNT, shortlist_size=COUNT)
    found = np.array([int(hit.id.split("-")[1]) for hit in hits])
    assert sorted(found) == list(range(COUNT)), "each once"
    np.testing.assert_allclose([hit.logit for hit in hits], logits[found], atol=2e-2)  # kept in half precision
    assert [hit.rank for hit in hits] == list(range(1, COUNT + 1))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].path == f"{found[0]}.jpg" and hits[0].metadata["captions"] == [CAPTIONS[found[0] % 4]]
    assert set(hits.seconds) == {"encode", "shortlist", "rerank"}


def test_both_directions_and_both_sides(processor: TVRNProcessor) -> None:
    model, items = tiny_model(), records()
    images, texts = build(model, processor, items), build(model, processor, items, side="texts")
    assert (images.side, texts.side, len(texts)) == ("images", "texts", COUNT)
    hits = texts.search(image=items[5], limit=3, shortlist_size=COUNT)
    best = max(exhaustive(model, processor, items[5:6], caption)[0] for caption in CAPTIONS)
    assert hits[0].logit == pytest.approx(best, abs=2e-2) and hits[0].text in CAPTIONS
    same = images.search(image=items[5], limit=2)
    assert same[0].id == "image-5" and same[0].score == pytest.approx(1, abs=1e-5) and same[0].logit is None
    assert texts.search(text=CAPTIONS[2], limit=1)[0].text == CAPTIONS[2]


def test_records_that_differ_in_one_array_are_not_taken_for_the_same() -> None:
    first = {**records(1)[0], "region_mask": np.ones(4, bool), "image_embeds": np.ones(5, np.float32)}
    changed = [first | {name: 1 - first[name]} for name in ("region_features", "region_boxes", "image_embeds")]
    changed.append(first | {"region_mask": ~first["region_mask"]})
    keys = {item.load().key for item in open_source([first, *changed, dict(first)], None, None, None)}
    assert len(keys) == 5


def test_captions_alone_are_a_collection_too(processor: TVRNProcessor) -> None:
    index = build(tiny_model(), processor, CAPTIONS)
    assert [hit.id for hit in index.search(text=CAPTIONS[1], limit=1)] == ["1"]


def test_a_filter_is_exact_however_few_it_leaves(processor: TVRNProcessor) -> None:
    index = build(tiny_model(), processor, records())
    for where in ({"split": "test"}, pc.field("split") == "test", lambda row: row["split"] == "test"):
        hits = index.search(text=CAPTIONS[0], limit=COUNT, where=where)
        assert len(hits) == 12 and {hit.metadata["split"] for hit in hits} == {"test"}
    one = index.search(text=CAPTIONS[0], where={"id": ["image-3", "image-4"], "split": "train"})
    assert [hit.id for hit in one] == ["image-3"]
    assert index.search(text=CAPTIONS[0], where={"split": "nowhere"}) == []
    with pytest.raises(ValueError, match=r"columns \['splt'\]; the index has"):
        index.search(text=CAPTIONS[0], where={"splt": "test"})


def test_without_features_it_ranks_by_embeddings(processor: TVRNProcessor) -> None:
    model = tiny_model()
    whole, slim = build(model, processor, records()), build(model, processor, records(), features=False)
    hits = slim.search(text=CAPTIONS[0])
    assert [hit.logit for hit in hits] == [None] * 10 and [hit.score for hit in hits] == [hit.cosine for hit in hits]
    assert [hit.id for hit in hits] == [hit.id for hit in whole.search(text=CAPTIONS[0], rerank=False)]
    assert slim.report.feature_bytes < whole.report.feature_bytes / 4


@pytest.mark.parametrize("settings", [{"refinement": "gru"}, {"use_late_interaction": False}], ids=str)
@pytest.mark.parametrize(("storage", "share", "tolerance"), [("int8", 0.5, 5e-2), ("int4", 0.4, 0.4)])
def test_coded_regions_take_less_and_score_as_whole_ones(
    processor: TVRNProcessor, tmp_path: Path, settings: dict[str, Any], storage: str, share: float, tolerance: float
) -> None:
    model, items = tiny_model(hidden_size=36, **settings), records()
    whole = build(model, processor, items)
    build(model, processor, items, tmp_path, region_storage=storage)
    index = ImageTextIndex.load(tmp_path, model, processor)
    logits = exhaustive(model, processor, items, CAPTIONS[0])
    hits = index.search(text=CAPTIONS[0], limit=COUNT, shortlist_size=COUNT)
    found = np.array([int(hit.id.split("-")[1]) for hit in hits])
    assert sorted(found) == list(range(COUNT)), "each once"
    np.testing.assert_allclose([hit.logit for hit in hits], logits[found], atol=tolerance * logits.std())
    assert index.backend.manifest["report"]["feature_bytes"] <= share * whole.report.feature_bytes
    more = [*items, records(1, seed=9)[0] | {"image_id": "new"}]
    assert build(model, processor, more, tmp_path).report.encoded == 1, "as it was"


def test_an_index_from_before_coded_regions_opens_as_it_did(processor: TVRNProcessor, tmp_path: Path) -> None:
    model = tiny_model()
    index = build(model, processor, records(), tmp_path)
    manifest = {name: value for name, value in index.backend.manifest.items() if name != "region_storage"}
    write_json(index.backend.version / "manifest.json", FORMAT, manifest)
    old = ImageTextIndex.load(tmp_path, model, processor)
    assert logits_of(old) == logits_of(index)
    assert build(model, processor, records(), tmp_path).report.encoded == 0


def test_encoded_features_need_no_second_encoding(processor: TVRNProcessor) -> None:
    model = tiny_model()
    with torch.no_grad():
        images = model.encode_images(**regions(5))
        texts = model.encode_texts(**words(4))
    index = build(model, processor, images, ids=list("abcde"), metadata={"c": {"year": 2024}})
    assert index.report.encoded == 5
    assert index.search_vector(images.embeds[2], limit=1)[0].id == "c"
    assert [hit.id for hit in index.search_vector(images.embeds[0], where={"year": 2024})] == ["c"]
    assert build(model, processor, texts).search_vector(texts.embeds[3], limit=1)[0].id == "3"
    with pytest.raises(ValueError, match="2 ids for 5 encoded"):
        build(model, processor, images, ids=["a", "b"])


def test_wrong_questions_are_refused(processor: TVRNProcessor, tmp_path: Path) -> None:
    model = tiny_model()
    index = build(model, processor, records(), tmp_path / "index")
    for wrong in ({}, {"text": "a", "image": records()[0]}):
        with pytest.raises(ValueError, match="either text or image"):
            index.search(**wrong)
    with pytest.raises(ValueError, match="limit is 0; expected a whole number"):
        index.search(text="a", limit=0)
    with pytest.raises(ValueError, match="without a model"):
        ImageTextIndex.load(tmp_path / "index").search(text="a")
    with pytest.raises(ValueError, match="either a directory or url="):
        ImageTextIndex.load()
    with pytest.raises(ValueError, match="no folder"):
        build(model, processor, tmp_path / "nothing")
    with pytest.raises(ValueError, match="precision is 'int4'"):
        build(model, processor, records(), precision="int4")
    with pytest.raises(ValueError, match="the id 'image-0' comes twice"):
        build(model, processor, [*records(3), records(1)[0]])
    with pytest.raises(ValueError, match="batch_size is 0"):
        build(model, processor, records(), batch_size=0)


# -- vectors ----------------------------------------------------------------------------------------------------------


def unit(count: int, size: int = 72, seed: int = 0) -> np.ndarray:
    """Vectors in clusters, as embeddings are."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(40, size))
    vectors = centres[random.integers(0, 40, count)] + 0.6 * random.normal(size=(count, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("engine", ["exact", "hnsw", "exact without faiss"])
def test_nearest_neighbours_against_a_sort_of_all_cosines(
    precision: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "exact without faiss":
        monkeypatch.setitem(sys.modules, "faiss", None)
        engine = "exact"
    if engine == "hnsw":
        pytest.importorskip("faiss", reason='a graph comes with pip install ".[index]"')
    vectors = unit(1500)
    search = VectorSearch(vectors, precision, engine)
    search.train()
    query = unit(1, seed=0)[0]
    rows, cosines = search.search(query, 10)
    truth = np.argsort(-(vectors @ query), kind="stable")[:10]
    np.testing.assert_allclose(cosines, (vectors @ query)[rows], atol=1e-6)
    assert list(cosines) == sorted(cosines, reverse=True)
    expected = 10 if (precision, engine) == ("float32", "exact") else 8
    assert len(np.intersect1d(rows, truth)) >= expected
    recall = search.recall()
    assert recall == 100 if (precision, engine) == ("float32", "exact") else recall > 80
    search.save(tmp_path)
    again = VectorSearch(vectors, precision, engine)
    again.load(tmp_path)
    np.testing.assert_array_equal(again.search(query, 10)[0], rows)
    few = np.array([5, 17, 1499])
    assert set(search.search(query, 10, few)[0]) == set(few), "a filter's rows are scanned exactly"


def test_codes_take_the_memory_they_promise() -> None:
    vectors = unit(500, size=128)
    sizes = {
        precision: VectorSearch(vectors, precision, "exact").bytes / 500 for precision in ("float32", "int8", "binary")
    }
    assert sizes == {"float32": 512, "int8": 128, "binary": 16}


def test_without_faiss_a_large_collection_is_scanned_and_a_graph_names_the_command(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("modeling_tvrn.index.vectors.EXACT_UP_TO", 10)
    with caplog.at_level(logging.WARNING):
        assert VectorSearch(unit(20)).engine == "exact"
    assert "pip install" in caplog.text
    with pytest.raises(ImportError, match=r"pip install \"modeling-tvrn\[index\]\""):
        VectorSearch(unit(20), engine="hnsw")


# -- on disk ----------------------------------------------------------------------------------------------------------


def ids(hits: Hits) -> list[str]:
    return [hit.id for hit in hits]


@pytest.mark.parametrize("precision", ["float32", "binary"])
def test_saved_and_loaded_it_answers_the_same(processor: TVRNProcessor, tmp_path: Path, precision: str) -> None:
    model = tiny_model()
    index = build(model, processor, records(), precision=precision)
    index.save(tmp_path / "copy")
    loaded = ImageTextIndex.load(tmp_path / "copy", model, processor)
    first, second = (each.search(text=CAPTIONS[0], shortlist_size=COUNT) for each in (index, loaded))
    assert list(first) == list(second) and repr(loaded) == repr(index)
    suffixes = {path.suffix for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".sqlite", ".json"}, "nothing that runs code when it is read"


def test_another_model_is_refused_with_both_values(processor: TVRNProcessor, tmp_path: Path) -> None:
    model = tiny_model()
    build(model, processor, records(), tmp_path / "index")
    other = tiny_model(attention_scale=5.0)
    with pytest.raises(OtherModelError, match=r"config.attention_scale: stored 9.0, expected 5.0"):
        ImageTextIndex.load(tmp_path / "index", other, processor)
    with torch.no_grad():
        model.pair.head.logit.bias.add_(1e-3)
    with pytest.raises(OtherModelError, match="weights_sha256: stored '"):
        ImageTextIndex.load(tmp_path / "index", model, processor)
    with pytest.raises(FileNotFoundError, match="no finished index"):
        ImageTextIndex.load(tmp_path / "elsewhere", model, processor)


# -- a folder of photographs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing() -> tuple[TVRNModel, TVRNProcessor]:
    """A tiny model with a tower that sees photographs, and its processor."""
    from transformers import MobileNetV2Config, MobileNetV2Model
    from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

    size = {"height": 48, "width": 48}
    config = MobileNetV2Config(depth_multiplier=0.1, image_size=48)
    tower = MobileNetV2Model(config, add_pooling_layer=False)
    image_processor = MobileNetV2ImageProcessorPil(size=size, do_center_crop=False)
    processor = TVRNProcessor.from_captions(CAPTIONS, image_processor=image_processor)
    channels = tower(torch.zeros(1, 3, 48, 48)).last_hidden_state.shape[1]
    model = tiny_model(vision_config=config, region_feature_size=channels, vision_grid_size=2)
    return model, processor


def photographs(folder: Path, count: int = 9) -> Path:
    (folder / "summer").mkdir(parents=True)
    for number in range(count):
        path = folder / ("summer" if number % 2 else ".") / f"{number}.png"
        path.write_bytes(encoded(number))
    return folder


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_folder_with_bad_files_is_indexed_without_them_and_says_so(seeing: Any, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "photos")
    (folder / "cut.jpg").write_bytes(noise("JPEG")[:900])
    (folder / "text.png").write_text("no picture")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_bytes(encoded(3))
    outside = tmp_path / "secret.png"
    outside.write_bytes(encoded(4))
    (folder / "link.png").symlink_to(outside)
    index = build(*seeing, folder, tmp_path / "index")
    assert len(index) == 9 and dict(index.report.skipped) == dict.fromkeys(
        ("corrupt image", "not an image", "image over the pixel limit", "unreadable file"), 1
    )
    assert "link.png: a link that leads out" in str(index.report)
    assert "bomb.png" in str(index.report) and index.report.as_dict()["items"] == 9
    hits = {hit.id: hit for hit in index.search(image=folder / "summer" / "3.png")}
    itself = hits["summer/3.png"]
    assert itself.cosine == pytest.approx(1, abs=1e-5) and Path(itself.path).samefile(folder / "summer" / "3.png")
    assert {hit.metadata["folder"] for hit in index.search(text="a dog", where={"folder": "summer"})} == {"summer"}


def test_only_what_is_new_or_changed_is_encoded_again(seeing: Any, tmp_path: Path) -> None:
    folder, home = photographs(tmp_path / "photos"), tmp_path / "index"
    build(*seeing, folder, home)
    untouched = build(*seeing, folder, home).report
    assert (untouched.encoded, untouched.reused, untouched.added, untouched.deleted) == (0, 9, 0, 0)
    (folder / "new.png").write_bytes(encoded(11))
    (folder / "0.png").write_bytes(noise("PNG"))
    (folder / "2.png").unlink()
    os.rename(folder / "4.png", folder / "moved.png")
    os.utime(folder / "6.png", ns=(1, 1))  # touched, not changed
    index = build(*seeing, folder, home)
    report = index.report
    assert (report.encoded, report.reused) == (2, 7), "a renamed and a touched file are known by their content"
    assert (report.added, report.changed, report.deleted) == (2, 1, 2)
    fresh = build(*seeing, folder)
    found, wanted = (each.search(text="two dogs", limit=20) for each in (index, fresh))
    # Noise looks alike to a model that has learned nothing: places within a digit of float32 may change.
    assert {hit.id: hit.logit for hit in found} == pytest.approx({hit.id: hit.logit for hit in wanted}, abs=3e-6)


def test_a_reader_keeps_the_index_it_opened(seeing: Any, tmp_path: Path) -> None:
    """Two rebuilds remove the files of what a reader opened; its answers must not change."""
    folder, home = photographs(tmp_path / "photos"), tmp_path / "index"
    reader = build(*seeing, folder, home)
    before = list(reader.search(text="two dogs", limit=20))
    for number in range(3):
        for path in folder.rglob("*.png"):
            path.write_bytes(encoded(int(path.stem) + number + 1, "PNG", compress_level=number))
        build(*seeing, folder, home)
    assert list(reader.search(text="two dogs", limit=20)) == before
    assert len(list((home / "versions").iterdir())) == 2, "old versions do not pile up"
    assert list(ImageTextIndex.load(home, *seeing).search(text="two dogs", limit=20)) != before


def test_a_build_that_fails_leaves_the_old_index_and_what_it_encoded(
    seeing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = photographs(tmp_path / "photos"), tmp_path / "index"
    old = build(*seeing, folder, home)
    for number in range(20, 30):
        (folder / f"{number}.png").write_bytes(encoded(number))
    with monkeypatch.context() as patch:
        patch.setattr(building_module, "switch_to", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(*seeing, folder, home)
    assert len(ImageTextIndex.load(home, *seeing)) == len(old) == 9
    assert (report := build(*seeing, folder, home).report).encoded == 0 and report.items == 19


def test_two_builders_at_once_and_a_folder_that_changes_meanwhile(seeing: Any, tmp_path: Path) -> None:
    folder, home = photographs(tmp_path / "photos"), tmp_path / "index"
    with locked(home / LOCK), pytest.raises(IndexBusyError, match=f"process {os.getpid()}"):
        build(*seeing, folder, home)

    class Vanishing:
        """A folder source whose files go, and change, between the scan and the reading."""

        def __init__(self) -> None:
            from modeling_tvrn.index.sources import FolderSource

            self.source = FolderSource(folder)
            self.name, self.side = self.source.name, "images"

        def __len__(self) -> int:
            return len(self.source)

        def __iter__(self) -> Any:
            for item in self.source:
                if item.id == "0.png":
                    (folder / "0.png").unlink()
                if item.id == "2.png":
                    (folder / "2.png").write_bytes(encoded(7, "PNG", compress_level=1))
                yield item

    settings = building_module.BuildSettings(progress=False)
    report = building_module.build_version(*seeing, Vanishing(), home, settings)
    assert report.items == 8 and dict(report.skipped) == {"missing image": 1}
    row = next(row for row in ImageTextIndex.load(home).backend.table if row["id"] == "2.png")
    assert row["size"] == (folder / "2.png").stat().st_size
    assert build(*seeing, folder, home).report.encoded == 0


def _build_slowly(folder: Path, home: Path, seeing: Any) -> None:
    from modeling_tvrn.index import build as module

    encode = module.encode

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.2)
        return encode(*arguments)

    module.encode = slowly
    torch.set_num_threads(1)
    build(*seeing, folder, home, segment_size=2, batch_size=2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="starts its builder by forking")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_9_loses_nothing_that_was_finished(seeing: Any, tmp_path: Path) -> None:
    folder, home = photographs(tmp_path / "photos", 20), tmp_path / "index"
    process = multiprocessing.get_context("fork").Process(target=_build_slowly, args=(folder, home, seeing))
    process.start()
    deadline = time.monotonic() + 60
    while len(list((home / "segments").glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was killed in the middle"
    with pytest.raises(FileNotFoundError, match="no finished index"):
        ImageTextIndex.load(home)
    kept = len(list((home / "segments").glob("*.safetensors")))
    report = build(*seeing, folder, home).report
    assert report.items == 20 and report.reused == 2 * kept and report.encoded == 20 - 2 * kept


def test_a_half_written_segment_is_encoded_again(processor: TVRNProcessor, tmp_path: Path) -> None:
    model = tiny_model()
    build(model, processor, records(), tmp_path)
    broken = next((tmp_path / "segments").glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-5])
    report = build(model, processor, records(), tmp_path).report
    assert report.encoded in (7, COUNT % 7) and report.reused == COUNT - report.encoded


# -- damage and churn -------------------------------------------------------------------------------------------------


def logits_of(index: ImageTextIndex) -> dict[str, Any]:
    return {hit.id: hit.logit for hit in index.search(text=CAPTIONS[0], limit=COUNT)}


def spoil(path: Path) -> None:
    path.write_bytes(b"{" + path.read_bytes()[10:])


def flip_last_byte(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


DAMAGE: dict[str, Callable[[Path], None]] = {
    "pointer": lambda home: spoil(home / "current.json"),
    "empty pointer": lambda home: (home / "current.json").write_text(""),
    "no pointer": lambda home: (home / "current.json").unlink(),
    "pointer out of the folder": lambda home: write_json(home / "current.json", FORMAT, {"version": "../../x"}),
    "pointer to nothing": lambda home: write_json(home / "current.json", FORMAT, {"version": "000007"}),
    "manifest": lambda home: spoil(home / "versions" / "000001" / "manifest.json"),
    "no manifest": lambda home: (home / "versions" / "000001" / "manifest.json").unlink(),
    "items": lambda home: spoil(home / "versions" / "000001" / "items.sqlite"),
    "no items": lambda home: (home / "versions" / "000001" / "items.sqlite").unlink(),
    "vectors": lambda home: spoil(home / "versions" / "000001" / "vectors.safetensors"),
    "no version": lambda home: shutil.rmtree(home / "versions"),
    "segment": lambda home: spoil(next((home / "segments").iterdir())),
    "no segments": lambda home: shutil.rmtree(home / "segments"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("repair", [False, True])
def test_a_damaged_index_is_built_again(processor: TVRNProcessor, tmp_path: Path, damage: str, repair: bool) -> None:
    model = tiny_model()
    before = logits_of(build(model, processor, records(), tmp_path / "index"))
    DAMAGE[damage](tmp_path / "index")
    report = build(model, processor, records(), tmp_path / "index", repair=repair).report
    assert (report.encoded > 0) == ("segment" in damage) and (report.encoded < COUNT or damage == "no segments")
    again = ImageTextIndex.load(tmp_path / "index", model, processor, verify=repair)
    assert logits_of(again) == pytest.approx(before, abs=1e-3)


def test_repair_finds_damaged_features_and_leaves_the_files_of_others(
    processor: TVRNProcessor, tmp_path: Path
) -> None:
    model = tiny_model()
    before = logits_of(build(model, processor, records(), tmp_path))
    segment = flip_last_byte(next((tmp_path / "segments").iterdir()))
    (tmp_path / "manifest.json").write_text("{not ours")
    index = build(model, processor, records(), tmp_path, repair=True)
    assert 0 < index.report.encoded < COUNT and not segment.exists()
    assert logits_of(index) == pytest.approx(before, abs=1e-3)
    assert (tmp_path / "manifest.json").read_text() == "{not ours"


def test_an_index_of_another_format_is_not_built_over(processor: TVRNProcessor, tmp_path: Path) -> None:
    (tmp_path / "current.json").write_text('{"format": "tvrn-index", "format_version": 99}')
    for repair in (False, True):
        with pytest.raises(StorageError, match="of format tvrn-index 99"):
            build(tiny_model(), processor, records(), tmp_path, repair=repair)


def test_what_killed_builds_left_half_written_goes(processor: TVRNProcessor, tmp_path: Path) -> None:
    build(tiny_model(), processor, records(), tmp_path)
    left = ["current.json.4711.tmp", "segments/a.safetensors.0123456789ab.tmp", "versions/000001/x.0123456789ab.tmp"]
    for name in left:
        (tmp_path / name).write_text("half")
    (tmp_path / "mine.tmp").write_text("somebody else's")
    build(tiny_model(), processor, records(), tmp_path)
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["mine.tmp"]


@pytest.mark.slow
@pytest.mark.parametrize("features", [True, False])
def test_churn_leaves_no_more_than_a_fresh_index_would_take(
    processor: TVRNProcessor, tmp_path: Path, features: bool
) -> None:
    """Every build changes one of 9 items; what is in use is copied together as garbage grows."""
    model, items, changed = tiny_model(), records(9), records(30, seed=5)
    for number in range(30):
        items[number % 9] = changed[number] | {"image_id": f"image-{number % 9}"}
        index = build(model, processor, items, tmp_path / "old", features=features)
        assert index.report.encoded == (9 if number == 0 else 1)
    fresh = build(model, processor, items, tmp_path / "fresh", features=features)
    size = {name: sum(path.stat().st_size for path in (tmp_path / name).rglob("*")) for name in ("old", "fresh")}
    assert size["old"] < 4 * size["fresh"], "two versions are kept"
    assert len(index.backend.manifest["segments"]) <= 5 * len(fresh.backend.manifest["segments"])
    found, wanted = (each.search(text=CAPTIONS[0], limit=COUNT) for each in (index, fresh))
    assert {hit.id: hit.score for hit in found} == pytest.approx({hit.id: hit.score for hit in wanted}, abs=1e-3)


@pytest.mark.parametrize(
    ("written", "used", "files"),
    [
        ([8], 8, 1),  # nothing to gain
        ([8], 4, 1),  # half of it in use
        ([8], 3, 2),  # copied out
        ([1] * 4, 4, 4),
        ([1] * 5, 5, 6),  # joined into one
        ([8, 8, 1, 1, 1, 1, 1], 21, 8),  # full ones stay
        ([8, 8, 8], 3, 4),
        ([3, 5, 4, 8], 1, 5),
    ],
)
def test_what_is_in_use_is_copied_bit_for_bit_out_of_garbage(
    processor: TVRNProcessor, tmp_path: Path, written: list[int], used: int, files: int
) -> None:
    model, keys = tiny_model(), [str(number) for number in range(sum(written))]
    segments = Segments(tmp_path, "build", "images")
    items = iter(records(len(keys)))
    for start, count in zip(np.cumsum([0, *written]), written, strict=False):
        prepared = building_module.prepare(processor, list(itertools.islice(items, count)), "images")
        encoded_items = building_module.encode(model, prepared, "images")
        segments.write(keys[start : start + count], encoded_items.to(torch.float16))
    kept = keys[::-1][:used]  # the last
    before = segments.read(kept, None)
    segments.compact(kept, size=8)
    assert len(list(tmp_path.iterdir())) == files
    segments.drop_unused({segments.place[key][0] for key in kept})
    again = Segments(tmp_path, "build", "images")
    again.scan()
    for name, tensor in before.tensors().items():
        assert torch.equal(again.read(kept, None).tensors()[name], tensor), name


def test_a_large_index_lies_in_few_files(
    processor: TVRNProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search holds every segment open: a million items in segments of 256 are more files than a system allows."""
    monkeypatch.setattr(building_module, "SEGMENTS_BEFORE_GROWTH", 4)
    index = build(tiny_model(), processor, records(40), tmp_path, segment_size=1, batch_size=2)
    assert len(index.backend.manifest["segments"]) < 16 and index.report.encoded == len(index) == 40
    assert build(tiny_model(), processor, records(40), tmp_path, segment_size=1).report.encoded == 0


def test_damaged_items_are_not_copied_as_whole(
    processor: TVRNProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    build(model, processor, records(), tmp_path, segment_size=64)
    segment = flip_last_byte(next((tmp_path / "segments").iterdir()))  # of features that building doesn't read
    build(model, processor, records(5), tmp_path, segment_size=64)  # most of it is garbage now
    assert "--repair" in caplog.text and segment.exists()
    assert build(model, processor, records(5), tmp_path, segment_size=64, repair=True).report.encoded == 5


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"precision": "int4"}, "precision is 'int4'; expected one of float32, int8, binary"),
        ({"engine": "annoy"}, "engine is 'annoy'; expected one of auto, exact, hnsw"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"region_storage": "int2"}, "region_storage is 'int2'; expected one of float16, int8, int4"),
        ({"region_storage": "int4", "side": "texts"}, "this index keeps captions"),
        ({"region_storage": "int4", "features": False}, "this index keeps embeddings alone"),
        ({"side": "sounds"}, "side is 'sounds'"),
        ({"url": "foo://host"}, "foo"),
    ],
)
def test_a_wrong_setting_is_found_before_anything_is_encoded(
    processor: TVRNProcessor, tmp_path: Path, setting: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "url" in setting:
        pytest.importorskip("qdrant_client", reason='comes with pip install ".[qdrant]"')
    monkeypatch.setattr(building_module, "encode", lambda *_: pytest.fail("it was encoded"))
    with pytest.raises(ValueError, match=said):
        build(tiny_model(), processor, records(), tmp_path / "index", **setting)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"text": "a dog", "limit": "3"}, "limit is '3'; expected a whole number of at least 1"),
        ({"text": "a dog", "limit": 2.5}, "limit is 2.5"),
        ({"text": "a dog", "limit": 0}, "limit is 0"),
        ({"text": "a dog", "limit": None}, "limit is None"),
        ({"text": "a dog", "shortlist_size": "64"}, "shortlist_size is '64'"),
        ({"text": "\ud800"}, "lone surrogates"),
        ({"text": ""}, "empty caption"),
        ({"text": 5}, "text is 5, a int; expected one sentence"),
        ({"text": ["a", "b"]}, "a list; expected one sentence"),
        ({}, "either text or image"),
    ],
)
def test_a_query_that_is_none_is_a_sentence(processor: TVRNProcessor, query: dict[str, Any], said: str) -> None:
    index = build(tiny_model(), processor, records(3))
    with pytest.raises(ValueError, match=said):
        index.search(**query)
    assert len(index.search(text="a dog", limit=np.int64(2))) == 2


def test_a_folder_is_found_by_any_name_in_its_path(seeing: Any, tmp_path: Path) -> None:
    places = {"a.png": "", "winter/b.png": "winter", "2021/winter/c.png": "2021/winter", "2021/d.png": "2021"}
    for number, name in enumerate(places):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(encoded(number))
    index = build(*seeing, tmp_path / "photos")
    for wanted, found in {
        "winter": {"winter", "2021/winter"},
        "2021": {"2021", "2021/winter"},
        2021: {"2021", "2021/winter"},
        "2021/winter": {"2021/winter"},
        "": {""},
        "win": set(),
        "%": set(),
    }.items():
        hits = index.search(text="two dogs", where={"folder": wanted})
        assert {hit.metadata["folder"] for hit in hits} == found, wanted
    both = index.search(text="two dogs", where={"folder": ["", "winter"]})
    assert {hit.metadata["folder"] for hit in both} == {"", "winter", "2021/winter"}


@pytest.mark.slow
def test_it_is_imported_without_its_extras(run_python: Any) -> None:
    code = (
        "import sys, modeling_tvrn.index; print([n for n in ('faiss', 'qdrant_client', 'gradio') if n in sys.modules])"
    )
    assert run_python(code).strip() == "[]"
