"""One bad file or caption among many: no command, index, table or run ends because of it; it is counted and named."""

import csv
import json
import os
import re
import socket
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from data_makers import SIZE, colour, encoded, noise, shows, write_parquet, write_tar
from hub_makers import CAPTIONS, pixel_model, save
from test_cli import TINY_VIT, tvrn
from training_makers import tiny_config

from modeling_tvrn.data import ImageError, ShuffledStream, load_pairs, unusable_captions, with_words
from modeling_tvrn.data.images import check_image, decode_image
from modeling_tvrn.demo import Searches
from modeling_tvrn.evaluation import SentencePairs, evaluate, evaluate_unimodal
from modeling_tvrn.index import ImageTextIndex
from modeling_tvrn.training.loop import Training

HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + b"\x00" * 99
WORDLESS = ["<pad>", "\u200b", "\ufe0f", " \u2003\t", "\x00\x07", "<pad> <pad>", "\u3164"]
GUARD = 20.0  # seconds after which whoever waits for a pipe is set free, to fail and not to hang


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), *pixel_model())


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A FIFO among photographs, which nobody ever writes into."""
    path = tmp_path / "photos" / "pipe.jpg"
    path.parent.mkdir()
    os.mkfifo(path)
    guard = threading.Timer(GUARD, lambda: os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK)))
    guard.start()
    yield path
    guard.cancel()


def several_pictures(path: Path) -> None:
    """MPO, as phones write it: a JPEG with further pictures behind the first."""
    first, second = (PIL.Image.new("RGB", SIZE, colour(number)) for number in (0, 7))
    first.save(path, "MPO", save_all=True, append_images=[second])


@pytest.fixture
def photos(pipe: Path) -> Path:
    """Good photographs in six formats, and one of everything that is none."""
    folder = pipe.parent
    (folder / "a.png").write_bytes(encoded(0))
    (folder / "b.jfif").write_bytes(encoded(1, "JPEG"))
    (folder / "c.avif").write_bytes(encoded(2, "AVIF"))
    (folder / "d.jp2").write_bytes(encoded(3, "JPEG2000"))
    several_pictures(folder / "e.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.png").write_bytes(encoded(4))
    for name, content in (
        ("page.jpg", HTML), ("empty.jpg", b""), ("pointer.jpg", LFS), ("phone.HEIC", HEIC), ("zeros.png", b"\0" * 500),
        ("note.png", b"see the other folder"), ("cut.jpg", noise("JPEG")[:900]),
    ):  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "turns_back").symlink_to(folder)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(5))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.png"))
    return folder


GOOD = {"a.png", "b.jfif", "c.avif", "d.jp2", "e.jpg", "folder.jpg/inside.png"}
SKIPPED = {
    "not an image": 4, "corrupt image": 3, "unreadable file": 3, "missing image": 1, "name that is not UTF-8": 1,
}  # fmt: skip


# -- what a file is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["AVIF", "JPEG2000", "MPO", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("how", ["header", "full"])
def test_every_format_is_read(image_format: str, how: Any, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"  # whatever it is called
    if image_format == "MPO":
        several_pictures(path)
    else:
        path.write_bytes(encoded(0, image_format))
    for content in (path, path.read_bytes()):
        check_image(content, how)
        assert shows(decode_image(content), 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\0" * 5000, "zeros"),
        (HTML, "an HTML page"),
        (b"\n <html><body>403", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"<?xml version='1.0'?><svg width='9'/>", "SVG"),
        (b'{"error": "quota"}', "JSON"),
        ("schöne Grüße".encode(), "text ('schöne Grüße')"),
        ("ä".encode() * 600, "text"),  # cut within a letter
        ("Notiz".encode("utf-16"), "text ('Notiz')"),
        (LFS, "a Git LFS pointer"),
        (HEIC, "HEIC; pip install pillow-heif"),
        (b"\0\0\0\x14ftypmif1\0\0\0\0heic" + b"\0" * 99, "HEIC; pip install pillow-heif"),
        (b"\0\0\0\x14ftypisom\0\0\0\0mp42" + b"\0" * 99, "a video"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"8BPS\0\x01", "Photoshop"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"\x89PNG\r\n\x1a\n", "PNG with a damaged header"),
        (b"\xff\xd8\xff\xe0", "JPEG with a damaged header"),
        (b"\x01\x02\x80", "begins with 01 02 80"),
    ],
)
def test_what_is_no_image_is_told_by_what_it_looks_like(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for given in (content, path, {"bytes": content, "path": None}):
        with pytest.raises(ImageError) as refused:
            check_image(given, "header")
        assert said in str(refused.value) and "KeyError" not in str(refused.value)
    with pytest.raises(ImageError, match=re.escape(str(path))):
        decode_image(path)


@pytest.mark.parametrize("known", ["registered", "installed"])
def test_heic_is_read_by_its_plug_in(known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for pillow-heif: one that the user registered, or that only is there."""
    for table in ("OPEN", "ID"):
        monkeypatch.setattr(PIL.Image, table, type(getattr(PIL.Image, table))(getattr(PIL.Image, table)))

    def register_heif_opener() -> None:
        def opened(file: Any, name: str) -> Any:
            picture = PIL.Image.new("RGB", SIZE, colour(6))
            picture.format = "HEIF"
            return picture

        PIL.Image.register_open("HEIF", opened, lambda head: head[4:12] == b"ftypheic")  # type: ignore[arg-type]

    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", _module(register_heif_opener))
    if known == "registered":
        register_heif_opener()
    assert shows(decode_image(HEIC), 6)


def _module(register: Any) -> types.ModuleType:
    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = register  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pipe.jpg", "a named pipe"), ("socket.png", "a socket"), ("folder.jpg", "a folder"), ("loop.jpg", "symbolic"),
        ("dangling.jpg", "nowhere.jpg, which is not there"), ("none.jpg", "no such file"), ("a.png/b.jpg", "no such"),
        ("x" * 300, "too long"), ("nul\0.jpg", "null"), ("\ud800.jpg", "surrogates"),
    ],
)  # fmt: skip
def test_what_is_no_plain_file_is_refused_at_once(name: str, said: str, photos: Path) -> None:
    with pytest.raises(ImageError, match=said):
        decode_image(photos / name)
    with pytest.raises(ImageError, match="a device"):
        decode_image("/dev/zero")


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may read everything, so it steps back for the test."""
    torch.onnx.is_in_onnx_export()  # imports late; an environment of root's may be closed to others
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_what_may_not_be_read_is_named(tmp_path: Path, as_nobody: None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "closed").mkdir()
        for path in ("a.png", "b.png", "closed/c.png"):
            (folder / path).write_bytes(encoded(0))
        for path in ("a.png", "closed"):
            (folder / path).chmod(0)
        with pytest.raises(ImageError, match="unreadable file: .*a.png: Permission denied"):
            decode_image(folder / "a.png")
        index = ImageTextIndex.build(*pixel_model(), folder, progress=False)
        assert len(index) == 1 and index.report is not None and dict(index.report.skipped) == {"unreadable file": 2}
        (folder / "closed").chmod(0o700)


# -- the commands -----------------------------------------------------------------------------------------------------


def test_index_leaves_out_what_is_no_photograph_and_names_it(
    model: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = json.loads(tvrn("index", model, photos, tmp_path / "index", "--json").stdout)
    assert report["items"] == len(GOOD) and report["skipped"] == SKIPPED
    for named in (r"caf\xe9.png", "dangling.jpg", "such as"):
        assert named in caplog.text
    again = json.loads(tvrn("index", model, photos, tmp_path / "index", "--json").stdout)
    assert (again["encoded"], again["reused"], again["skipped"]) == (0, len(GOOD), SKIPPED)


@pytest.mark.slow
def test_search_of_the_folder_finds_the_rest_and_draws_what_is_still_there(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "index"
    found = tvrn("search", model, photos, CAPTIONS[0], "--index", kept, "--json", "-n", 50)
    assert {hit["id"] for hit in json.loads(found.stdout)} == GOOD and "skipped" in found.stderr
    (photos / "a.png").unlink()  # since it was indexed
    drawn = tvrn("search", model, kept, CAPTIONS[0], "-n", 50, "--picture", tmp_path / "found.png")
    assert "a.png" in drawn.stdout and (tmp_path / "found.png").stat().st_size > 1000
    assert "tvrn: not drawn: missing image" in drawn.stderr
    assert "no word" in tvrn("search", model, kept, "<pad>", code=2).stderr
    assert "surrogates" in tvrn("search", model, kept, "caf\udce9", code=2).stderr


def test_a_folder_of_nothing_good_is_a_mistake_with_the_reasons(model: Path, pipe: Path, tmp_path: Path) -> None:
    outcome = tvrn("index", model, pipe.parent, tmp_path / "index", code=2)
    assert "nothing to index" in outcome.stderr and "pipe.jpg: a named pipe (FIFO)" in outcome.stderr


@pytest.mark.slow
def test_the_gallery_of_the_demo_goes_on(photos: Path) -> None:
    loaded, processor = pixel_model()
    searches = Searches(loaded, processor, ImageTextIndex.build(loaded, processor, photos, progress=False), photos)
    (photos / "b.jfif").unlink()
    (photos / "b.jfif").symlink_to(photos / "b.jfif")
    gallery, state, said = searches.by_text(CAPTIONS[0], 48)
    assert {each["id"] for each in state} == GOOD - {"b.jfif"} and len(gallery) == 5 and "1 are not there" in said
    assert searches.by_text("<pad>")[0] == [] and "no word" in searches.by_text("<pad>")[2]
    assert "no word" in searches.why([{**state[0], "query": None}], 0, "<pad>")


@pytest.mark.slow
def test_score_gives_every_other_row_its_score(model: Path, photos: Path, tmp_path: Path) -> None:
    names = [
        "a.png",
        "pipe.jpg",
        "loop.jpg",
        "folder.jpg",
        "page.jpg",
        "phone.HEIC",
        "none.jpg",
        "c.avif",
        "e.jpg",
        "",
    ]
    rows = [(name, CAPTIONS[0]) for name in names] + [("a.png", text) for text in WORDLESS]
    table = photos / "pairs.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    with table.open("ab") as file:  # a line of another encoding: its file is found, its caption is no text
        file.write(b"caf\xe9.png,a dog\r\na.png,caf\xe9\r\n")
    outcome = tvrn("score", model, table, "-o", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", errors="surrogateescape") as file:
        scored = [row["image"] for row in csv.DictReader(file) if row["score"]]
    assert scored == ["a.png", "c.avif", "e.jpg", "caf\udce9.png"]
    count = len(names) - 3 + len(WORDLESS) + 1
    assert f"tvrn: {count} rows without a score" in outcome.stderr.splitlines()
    for said in ("row 2: no score for 'pipe.jpg'", "a named pipe", "an HTML page", "pillow-heif", "row 11: no score"):
        assert said in outcome.stderr
    assert len(tvrn("score", model, table).stdout.splitlines()) == len(rows) + 3
    as_json = tvrn("score", model, table, "--json").stdout.splitlines()
    assert json.loads(as_json[-2])["image"] == "caf\udce9.png" and len(as_json) == len(rows) + 2


# -- captions ---------------------------------------------------------------------------------------------------------


def test_a_caption_that_is_not_unicode_is_found_whatever_the_processor() -> None:
    plain = object()  # of another model, which does not look at captions itself
    assert unusable_captions([plain], [CAPTIONS[0], "half \ud83d"]) == {1: "'half \\ud83d' is not UTF-8"}


def test_an_index_of_captions_leaves_out_those_without_a_word() -> None:
    loaded, processor = pixel_model()
    given: list[Any] = [CAPTIONS[0], *WORDLESS, "half \ud83d", None, CAPTIONS[1]]
    index = ImageTextIndex.build(loaded, processor, given, progress=False)
    assert len(index) == 2 and index.report is not None
    assert dict(index.report.skipped) == {"caption without a word": len(WORDLESS) + 1, "caption that is not UTF-8": 1}
    assert "1: '<pad>' has no word left" in index.report.skipped.examples["caption without a word"][0]
    assert [hit.id for hit in index.search(image=PIL.Image.new("RGB", SIZE))] in (["0", "10"], ["10", "0"])


def test_records_whose_image_breaks_in_the_middle_do_not_end_an_index(tmp_path: Path) -> None:
    middle = bytearray(noise("PNG"))
    middle[len(middle) // 2] ^= 0xFF
    write_parquet(tmp_path / "a.parquet", {"image": [encoded(0), bytes(middle), encoded(1)], "caption": ["a"] * 3})
    loaded, processor = pixel_model()
    index = ImageTextIndex.build(loaded, processor, load_pairs(tmp_path), progress=False)
    assert len(index) == 2 and index.report is not None and dict(index.report.skipped) == {"corrupt image": 1}


def test_blank_and_broken_captions_are_left_out_whatever_the_source(tmp_path: Path) -> None:
    blank = [text for text in WORDLESS if "pad" not in text]
    broken = [{"filename": "a.png", "caption": "half \ud83d"}, {"filename": "\ud800.png", "caption": "a dog"}]
    rows = [{"filename": "a.png", "caption": text} for text in ["a dog", *blank]] + broken
    rows += [{"filename": "pipe.png", "caption": "a cat"}, {"filename": "a.png", "caption": 7}]
    folder = tmp_path / "json"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "a.png").write_bytes(encoded(0))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_parquet(tmp_path / "parquet" / "a.parquet", {"image": [encoded(0)], "captions": [["a dog", *blank]]})
    members: dict[str, Any] = {"0.png": encoded(0), "0.txt": "a dog", "1.png": encoded(1), "1.txt": b"caf\xe9"}
    members |= {
        "2.png": encoded(2),
        "2.txt": "\u200b",
        "3.heic": HEIC,
        "3.txt": "a dog",
        "4.avif": encoded(4, "AVIF"),
        "4.txt": "a cat",
    }
    write_tar(tmp_path / "tar" / "a.tar", members)
    expected = {
        "json": {
            "empty caption": 5,
            "caption that is not UTF-8": 1,
            "name that is not UTF-8": 1,
            "unreadable file": 1,
        },
        "parquet": {"empty caption": 5},
        "tar": {"caption that is not UTF-8": 1, "empty caption": 1, "no caption left": 2, "not an image": 1},
    }
    captions = {"json": ["a dog", "7"], "parquet": ["a dog"], "tar": ["a dog", "a cat"]}
    for name, skipped in expected.items():
        for streaming in (False, True):
            records = load_pairs(tmp_path / name, streaming=streaming)
            assert [text for record in records for text in record["captions"]] == captions[name]
            if name != "json" or not streaming:  # its rows are grouped by file beforehand
                assert dict(records.skipped) == skipped, name


def test_tables_that_are_no_files_are_passed_over(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [encoded(0)], "caption": ["a dog"]})
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "loop.parquet").symlink_to(tmp_path / "loop.parquet")
    assert len(load_pairs(tmp_path)) == 1


def wordless_data(folder: Path, count: int = 8) -> Path:
    """Images with a good caption and one without a word each; the last image has none but such."""
    texts = [[f"{CAPTIONS[n % 2]} {n}", WORDLESS[n % len(WORDLESS)]] for n in range(count)] + [["<pad>", "<pad><pad>"]]
    images = [noise("PNG", (40, 32 + n)) for n in range(count + 1)]
    write_parquet(folder / "a.parquet", {"image": images, "captions": texts, "img_id": list(range(count + 1))})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_leaves_captions_without_a_word_out(streaming: bool, tmp_path: Path) -> None:
    records = load_pairs(wordless_data(tmp_path), streaming=streaming)
    report = evaluate(*pixel_model(), records, progress=False)
    assert (report.image_count, report.caption_count) == (8, 8)
    assert report.skipped == {"empty caption": 5, "caption without a word": 5, "no caption left": 1} and report.metrics
    listed = [{"image": PIL.Image.new("RGB", SIZE, colour(n)), "image_id": n, "captions": ["a dog", "<pad>"]}
              for n in range(3)]  # fmt: skip
    listed.append({**listed[0], "image_id": 3, "captions": ["<pad>"]})
    assert evaluate(*pixel_model(), listed, progress=False).caption_count == 3


def test_sentence_pairs_without_a_word_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    pairs = SentencePairs([*CAPTIONS[:3], "<pad>"], [*CAPTIONS[1:], "a dog"], np.array([1.0, 2.0, 3.0, 4.0]), "sts")
    assert evaluate_unimodal(*pixel_model(), sentence_pairs=pairs, progress=False).pairs == 3
    assert "left out 1 pairs" in caplog.text and "<pad>" in caplog.text


def test_what_is_left_is_consistent_and_streams_agree(tmp_path: Path) -> None:
    _, processor = pixel_model()
    records = load_pairs(wordless_data(tmp_path))
    kept = with_words(records, processor)
    assert kept.image_ids == list(range(8)) and [len(texts) for texts in kept.captions] == [1] * 8
    assert [record["caption_ids"] for record in kept] == kept.caption_ids and kept.filenames == records.filenames[:8]
    assert kept[1:3].image_ids == [1, 2] and kept.select([5])[0]["captions"] == kept.captions[5]
    assert with_words(kept, processor) is kept
    stream = with_words(load_pairs(tmp_path, streaming=True), processor)
    shuffled = ShuffledStream(stream).items()
    once = sorted(next(shuffled)[0].pair.captions[0] for _ in range(8))
    assert once == sorted(text for texts in kept.captions for text in texts)
    assert [record["captions"] for record in stream] == kept.captions


@pytest.mark.slow
def test_a_run_trains_on_what_is_left(tmp_path: Path) -> None:
    data = wordless_data(tmp_path / "data", 12)
    sizes = "hidden_size=12", "projection_size=12", "similarity_size=6", "pooled_hidden_size=12", "word_hidden_size=12"
    keys = [f"data={data}", "train_split=all", "validation_split=all", f"output_dir={tmp_path / 'run'}", "epochs=1"]
    keys += [f"model.{size}" for size in sizes] + [f"model.vision_config={json.dumps(TINY_VIT)}", "image_size=32"]
    keys += ["batch_size=6", "evaluation_batch_size=4", "vision=null", "text=null", "allow_overlap=true"]
    keys += ["model.freeze_vision=false", "model.freeze_text=false", "model.vision_grid_size=null"]
    tvrn("train", *keys)
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert results["data"]["train"]["captions"] == results["data"]["validation"]["captions"] == 12
    assert results["data"]["train"]["skipped"]["caption without a word"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_with_a_hub_tower_passes_over_special_tokens_alone(streaming: bool, tmp_path: Path) -> None:
    loaded, processor = pixel_model()
    loaded.text_model.save_pretrained(tmp_path / "text")
    processor.tokenizer.save_pretrained(tmp_path / "text")
    cached = {"text_features": str(tmp_path / "captions")}
    keys: dict[str, Any] = {"streaming": True, "max_steps": 5} if streaming else cached
    model = {"vision_config": TINY_VIT, "vision_grid_size": None, "freeze_text": True}
    config = tiny_config(
        wordless_data(tmp_path / "data", 12), tmp_path / "run", train_split="all", validation_split="all",
        data_options={}, text=str(tmp_path / "text"), image_size=32, model=model, batch_size=6,
        allow_overlap=True, **keys,
    )  # fmt: skip
    run = Training(config)
    run.fit()
    assert run.best.rsum > 0 and run.train_records.skipped["caption without a word"] >= 5
