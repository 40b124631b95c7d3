"""Near-duplicates among negatives: all found, none of one image, and a page that shows them."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
from teacher_makers import write_cache
from test_cli import tvrn

from modeling_tvrn.data import load_pairs
from modeling_tvrn.teachers import StaleStoreError, false_negatives, near_duplicates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photographs with two captions each; 2 and 5 look alike, and a caption of 1 says what one of 6 says."""
    folder, random, rows = tmp_path_factory.mktemp("near"), np.random.default_rng(0), []
    for number in range(8):
        PIL.Image.fromarray(random.integers(0, 256, (9, 13, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        captions = [f"caption <{number}> & {word}" for word in ("one", "two")]
        rows.append({"image": f"{number}.png", "image_id": 40 + number, "captions": captions})
    (folder / "captions.json").write_text(json.dumps(rows))
    records = load_pairs(folder)
    images, texts = random.normal(size=(8, 12)), random.normal(size=(16, 12))
    images[5] = images[2] + 0.1 * random.normal(size=12)
    texts[13] = texts[2] + 0.1 * random.normal(size=12)
    texts[9] = texts[8] + 0.01 * random.normal(size=12)  # two captions of one photograph: no negatives
    write_cache(folder / "image-teacher", "image", records, images)
    write_cache(folder / "text-teacher", "text", records, texts)
    return folder


@pytest.mark.parametrize("block_size", [3, 7, 100])
@pytest.mark.parametrize("limit", [4, 1000])
def test_all_pairs_above_the_threshold_are_found_whatever_the_blocks(
    tmp_path: Path, block_size: int, limit: int
) -> None:
    random = np.random.default_rng(1)
    vectors, groups = random.normal(size=(23, 4)), random.integers(0, 9, size=23)

    class Records:
        image_ids = range(23)
        captions = filenames = tuple(map(str, range(23)))

        def __getitem__(self, row: int) -> None: ...

    cache = write_cache(tmp_path, "image", Records(), vectors)
    found = near_duplicates(cache, Records.image_ids, groups, 0.7, limit, block_size)
    unit = cache[Records.image_ids].numpy().astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(23) for j in range(i + 1, 23) if groups[i] != groups[j]]
    expected = sorted(((-(unit[i] @ unit[j]), i, j) for i, j in pairs if unit[i] @ unit[j] >= 0.7))
    assert found.count == len(expected) > 4 and found.compared == len(pairs)
    assert list(zip(found.first, found.second, strict=True)) == [(i, j) for _, i, j in expected[:limit]]
    np.testing.assert_allclose(found.cosines, [-value for value, *_ in expected[:limit]], atol=1e-5)


def test_both_teachers_pairs_with_the_captions_most_alike(folder: Path) -> None:
    from modeling_tvrn.teachers import TeacherCache

    records = load_pairs(folder)
    images, texts = (TeacherCache.load(folder / f"{side}-teacher") for side in ("image", "text"))
    table, counts = false_negatives(records, images, texts, 0.95, 0.95)
    found = {(row["first_image_id"], row["second_image_id"]): row for row in table}
    assert set(found) == {(42, 45), (41, 46)}
    assert found[42, 45]["found_by"] == "image" and found[41, 46]["found_by"] == "text"
    row = found[41, 46]
    assert (row["first_caption"], row["second_caption"]) == ("caption <1> & one", "caption <6> & two")
    assert row["text_cosine"] > 0.95 > row["image_cosine"]
    assert counts["image"] == {"pairs": 1, "compared": 28, "wrong_negatives": pytest.approx(128 * 127 / 28)}
    assert counts["text"]["compared"] == 16 * 15 // 2 - 8
    alone, _ = false_negatives(records, image_teacher=images, image_threshold=0.95)
    assert [row["text_cosine"] for row in alone] == [None]


def test_the_verb_writes_a_table_and_a_page_with_the_photographs(folder: Path, tmp_path: Path) -> None:
    command = ["duplicates", folder, "--image-teacher", folder / "image-teacher", "--output", tmp_path]
    command += ["--text-teacher", folder / "text-teacher", "--thumbnail", 8]
    said = tvrn(*command, "--image-threshold", 0.95, "--text-threshold", 0.95)
    assert f"2 pairs of photographs: {tmp_path / 'false_negatives.html'}" in said.stdout
    rows = pyarrow.parquet.read_table(tmp_path / "false_negatives.parquet").to_pylist()
    assert {(row["first_image_id"], row["second_image_id"]) for row in rows} == {(42, 45), (41, 46)}
    page = (tmp_path / "false_negatives.html").read_text()
    assert page.count("<article>") == 2 and "caption &lt;1&gt; &amp; one" in page and "<1>" not in page
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)]
    assert len(pictures) == 4
    assert all(max(PIL.Image.open(io.BytesIO(picture)).size) == 8 for picture in pictures)
    found = json.loads(tvrn(*command, "--image-threshold", 1, "--text-threshold", 1, "--json").stdout)
    assert found["pairs"] == 0 and found["teachers"]["image"]["compared"] == 28
    assert not pyarrow.parquet.read_table(tmp_path / "false_negatives.parquet").num_rows


def test_the_verb_s_mistakes_are_one_sentence_and_code_2(folder: Path, tmp_path: Path) -> None:
    images, output = ["--image-teacher", folder / "image-teacher"], ["--output", tmp_path / "report"]
    other = tmp_path / "other"
    other.mkdir()
    PIL.Image.new("RGB", (9, 9)).save(other / "1.png")
    (other / "captions.json").write_text(json.dumps([{"image": "1.png", "image_id": 1, "captions": ["one", "two"]}]))
    wrong = {
        "'nowhere'": ["nowhere", *images, *output],
        "no teacher: give --image-teacher": [folder, *output],
        "no manifest.json in": [folder, "--text-teacher", tmp_path / "nothing", *output],
        "is of modality 'image', expected 'text'": [folder, "--text-teacher", folder / "image-teacher", *output],
        "threshold is 1.5": [folder, *images, "--image-threshold", 1.5, *output],
        "cache is of other data": [other, *images, *output],
    }
    for message, arguments in wrong.items():
        said = tvrn("duplicates", *arguments, code=2)
        assert message in said.stderr and said.stdout == "" and "Traceback" not in said.stderr, said.stderr
    assert not (tmp_path / "report").exists()


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path) -> None:
    from modeling_tvrn.teachers import TeacherCache

    records, texts = load_pairs(folder), TeacherCache.load(folder / "text-teacher")
    with pytest.raises(ValueError, match="no teacher"):
        false_negatives(records)
    with pytest.raises(ValueError, match="threshold is 1.5"):
        near_duplicates(texts, texts.ids, range(16), 1.5)
    with pytest.raises(ValueError, match="16 ids and 3 groups"):
        near_duplicates(texts, texts.ids, range(3), 0.5)
    records.captions[0][1] = "something else"
    with pytest.raises(StaleStoreError, match="something else"):
        false_negatives(records, text_teacher=texts)
