"""The demo's page: what it finds and shows, and what it does not let in or out."""

import json
import re
import struct
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from data_makers import encoded, noise
from test_index import bomb, build, photographs, seeing  # noqa: F401 (a fixture)

from modeling_tvrn import demo
from modeling_tvrn.data.images import decode_image
from modeling_tvrn.demo import Searches
from modeling_tvrn.index import ImageTextIndex


@pytest.fixture(scope="module")
def searches(seeing: Any, tmp_path_factory: pytest.TempPathFactory) -> Searches:  # noqa: F811
    folder = photographs(tmp_path_factory.mktemp("demo") / "photos")
    return Searches(*seeing, build(*seeing, folder, folder.parent / "index"), folder)


def test_text_and_photograph_find_pictures_and_a_hit_is_explained(searches: Searches) -> None:
    gallery, state, said = searches.by_text("two dogs run in snow", 5)
    assert len(gallery) == len(state) == 5 and said.startswith("5 found.")
    assert [label.split("  ")[1] for _, label in gallery] == [each["id"] for each in state]
    reason = searches.why(state, 1)
    assert reason.count("<button") == 6 and "matching score" in reason and state[1]["id"] in reason
    alike, found, _ = searches.by_image(state[0]["path"], 3)
    assert len(alike) == 3 and "Type a text" in searches.why(found, 0)
    assert "<svg" in searches.why(found, 0, "a red kite")
    assert searches.why(state, 99) == ""


def test_before_anything_is_asked_there_are_photographs_and_queries_to_try(searches: Searches) -> None:
    gallery, state, said = searches.first()
    assert len(gallery) == len(state) == 9 and "try an example" in said
    assert "<img" in searches.why(state, 0) and "Type a text" in searches.why(state, 0)
    assert searches.examples() == [], "this model knows few words"


def test_unknown_words_are_named(searches: Searches, tmp_path: Path) -> None:
    _, state, said = searches.by_text("dogs xyzzy run", 2)
    assert "the model does not know xyzzy: each is <unk>" in said
    assert "does not know" not in searches.by_text("dogs run", 2)[2]
    assert "the model does not know xyzzy" in searches.why(state, 0)
    (tmp_path / "good.png").write_bytes(encoded(3))
    assert "the model does not know xyzzy" in searches.score(tmp_path / "good.png", "dogs xyzzy")


def test_an_upload_is_shown_at_once_or_named(searches: Searches, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded(3))
    (tmp_path / "page.png").write_bytes(b"<html>")
    picture, nothing = searches.preview(tmp_path / "good.png")
    assert picture is not None and nothing == ""
    assert (
        searches.preview(tmp_path / "page.png")[0] is None
        and "HTML page" in searches.preview(tmp_path / "page.png")[1]
    )


def test_empty_and_wild_input_gets_an_answer_not_an_error(searches: Searches) -> None:
    assert searches.by_text("   ")[0] == [] and searches.by_image(None)[0] == []
    assert len(searches.by_text("dogs " * 10_000, 10_000)[0]) == 9
    assert len(searches.by_text("<script>alert(1)</script>", -3)[0]) == 1
    assert "Choose a photograph" in searches.score(None, "a dog")


def test_an_uploaded_pair_is_scored_and_bad_files_are_named_not_opened(searches: Searches, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(encoded(3))
    page = searches.score(good, "<b>dogs</b> run")
    assert "matching score" in page and "<b>dogs" not in page
    for name, content, reason in (
        ("cut.jpg", noise("JPEG")[:900], "corrupt image"),
        ("bomb.png", bomb(), "image over the pixel limit"),
        ("page.png", b"<html>", "not an image (an HTML page"),
    ):
        (tmp_path / name).write_bytes(content)
        assert reason in searches.score(tmp_path / name, "dogs run")
        assert reason in searches.by_image(tmp_path / name)[2]


def test_an_upload_is_bounded_before_it_is_decoded(searches: Searches, tmp_path: Path) -> None:
    """Behind the header is another picture's data: to decode it would say that it is corrupt."""
    header = struct.pack(">I4sIIBBBBB", 13, b"IHDR", 5001, 5000, 8, 6, 0, 0, 0)
    header += struct.pack(">I", zlib.crc32(header[4:]))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + encoded(1)[33:])
    assert "pixel limit" in searches.score(tmp_path / "a.png", "dogs run")
    assert "pixel limit" in searches.by_image(tmp_path / "a.png")[2]


def test_one_photograph_at_a_time_is_in_memory(
    searches: Searches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(3))
    _, state, _ = searches.by_text("two dogs run in snow", 2)
    now, most = [0], [0]

    def counted(*given: Any, **how: Any) -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.01)
        now[0] -= 1
        return decode_image(*given, **how)

    monkeypatch.setattr(demo, "decode_image", counted)
    with ThreadPoolExecutor(8) as threads:
        calls = [
            lambda: searches.by_text("dogs", 4), lambda: searches.score(tmp_path / "a.png", "dogs"),
            lambda: searches.by_image(tmp_path / "a.png", 4), lambda: searches.why(state, 0),
        ]  # fmt: skip
        for done in [threads.submit(call) for call in calls * 2]:
            done.result()
    assert most == [1]


def test_a_hit_is_explained_by_the_score_that_found_it(seeing: Any, tmp_path: Path) -> None:  # noqa: F811
    """Of the photograph itself, however large: a smaller copy of it would score otherwise."""
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 900, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    PIL.Image.fromarray(pixels).save(tmp_path / "photos" / "large.png")
    searches = Searches(*seeing, build(*seeing, tmp_path / "photos", tmp_path / "index"), tmp_path / "photos")
    _, state, _ = searches.by_text("two dogs run in snow", 1)
    hit = searches.index.search(text="two dogs run in snow", limit=1)[0]
    assert f"{hit.score:.3f}" in searches.why(state, 0)


def test_nothing_outside_the_folder_is_shown(searches: Searches, seeing: Any, tmp_path: Path) -> None:  # noqa: F811
    """An index names files; one that was built elsewhere, or tampered with, must not open the disk."""
    narrow = Searches(*seeing, searches.index, searches.folder / "summer")
    gallery, state, said = narrow.by_text("two dogs", 9)
    assert {each["id"].split("/")[0] for each in state} == {"summer"} and "5 are not there" in said
    assert "not there" in narrow.why([{"id": "x", "path": "/etc/passwd", "query": "dogs"}], 0)
    captions = ImageTextIndex.build(*seeing, ["a dog"], progress=False)
    with pytest.raises(ValueError, match="index of texts"):
        Searches(*seeing, captions, tmp_path)
    assert gallery


@pytest.fixture(scope="module")
def page(searches: Searches) -> Iterator[Any]:
    pytest.importorskip("gradio", reason='the page comes with pip install ".[demo]"')
    page = demo.launch(searches.model, searches.processor, searches.folder, searches.index, block=False)
    yield page
    page.close()


def get(page: Any, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(page.local_url.rstrip("/") + path) as response:
            return response.status, response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_the_page_fetches_nothing_from_elsewhere_and_serves_no_file(page: Any, searches: Searches) -> None:
    status, text = get(page, "/")
    assert status == 200
    linked = re.findall(r"<(?:link|script|img|iframe)[^>]*(?:href|src)=[\"']?(https?://[^\"' >]+)", text)
    elsewhere = [url for url in linked if not url.startswith(page.local_url.rstrip("/"))]
    assert not elsewhere, "works offline"
    assert "fonts.googleapis" not in text + get(page, "/theme.css")[1]
    photograph = next(searches.folder.glob("*.png"))
    for path in ("/etc/passwd", str(photograph), str(Path(demo.__file__))):
        assert get(page, f"/gradio_api/file={path}")[0] in (403, 404), path


@pytest.mark.slow
def test_the_page_answers_over_http(page: Any, searches: Searches, tmp_path: Path) -> None:
    client_library = pytest.importorskip("gradio_client", reason='the page comes with pip install ".[demo]"')
    client = client_library.Client(page.local_url, verbose=False)
    gallery, said = client.predict("two dogs run in snow", 4, api_name="/search")
    assert said.startswith("4 found.") and len(gallery) == 4
    wanted = [hit.id for hit in searches.index.search(text="two dogs run in snow", limit=4)]
    assert [item["caption"].split("  ")[1] for item in gallery] == wanted
    good = tmp_path / "good.png"
    good.write_bytes(encoded(3))
    assert "matching score" in client.predict(client_library.handle_file(good), "dogs run", api_name="/score")
    (tmp_path / "bomb.png").write_bytes(bomb())
    sent = client_library.handle_file(tmp_path / "bomb.png")
    assert "pixel limit" in client.predict(sent, "dogs run", api_name="/score")
    large = tmp_path / "large.png"
    large.write_bytes(bytes(demo.MAX_UPLOAD_BYTES + 2**20))
    with pytest.raises(Exception, match=r"(?i)size|large|413"):
        client.predict(client_library.handle_file(large), "dogs run", api_name="/score")
    assert client.predict("a red kite", 2, api_name="/search")[1].startswith("2 found."), "it is still there"
    assert "search_by_image" in json.dumps(client.view_api(return_format="dict"))
