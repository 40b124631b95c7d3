"""Parquet and Hub layouts: every public one gives the same records, and an unknown one is refused."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from data_makers import captions, encoded, shows, write_parquet, write_tar

from modeling_tvrn.data import PRESETS, load_pairs, loading
from modeling_tvrn.data.loading import Preset

ROWS = (3, 1, 4)  # images: their order is not that of their numbers


def flickr30k(split="test"):
    """`umaru97/flickr30k_train_val_test`, and with a column less `lmms-lab/flickr30k`."""
    return {
        "image": [encoded(n) for n in ROWS],
        "caption": [captions(n) for n in ROWS],
        "sentids": [[5 * n + k for k in range(5)] for n in ROWS],
        "split": [split for _ in ROWS],
        "img_id": list(ROWS),
        "filename": [f"{n}.jpg" for n in ROWS],
    }


def multimodal_fatima():
    """`Multimodal-Fatima/COCO_captions_test`."""
    return {
        "image": [encoded(n) for n in ROWS],
        "filepath": [f"COCO_val2014_{n}.jpg" for n in ROWS],
        "sentids": [[5 * n + k for k in range(5)] for n in ROWS],
        "filename": [f"COCO_val2014_{n}.jpg" for n in ROWS],
        "imgid": [1000 + n for n in ROWS],
        "split": ["test" for _ in ROWS],
        "sentences_tokens": [[["a", "token"]] for _ in ROWS],
        "sentences_raw": [captions(n) for n in ROWS],
        "sentences_sentid": [[5 * n + k for k in range(5)] for n in ROWS],
        "cocoid": list(ROWS),
    }


def thai_coco():
    """`patomp/thai-mscoco-2014-captions`: COCO's own captions, and Thai ones beside them."""
    return {
        "image": [encoded(n) for n in ROWS],
        "sentences_raw": [captions(n) for n in ROWS],
        "sentences_sentid": [[5 * n + k for k in range(5)] for n in ROWS],
        "cocoid": list(ROWS),
        "th_sentences_raw": [["ภาพ"] * 5 for _ in ROWS],
    }


def webdataset_as_table():
    """`clip-benchmark/wds_flickr30k` once `datasets` has read it."""
    return {
        "jpg": [encoded(n, "JPEG", quality=95) for n in ROWS],
        "txt": ["\n".join(captions(n)) for n in ROWS],
        "__key__": [f"s{n:07d}" for n in ROWS],
        "image_id": list(ROWS),
        "sentids": [[5 * n + k for k in range(5)] for n in ROWS],
    }


def structs():
    """Karpathy's sentences as structs, with the ids inside."""
    return {
        "image": [encoded(n) for n in ROWS],
        "cocoid": list(ROWS),
        "sentences": [[{"raw": text, "sentid": 5 * n + k} for k, text in enumerate(captions(n))] for n in ROWS],
    }


LAYOUTS = {
    "flickr30k": flickr30k(),
    "fatima": multimodal_fatima(),
    "thai": thai_coco(),
    "wds": webdataset_as_table(),
    "structs": structs(),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_layouts_give_the_same_records(tmp_path, layout, streaming):
    columns = LAYOUTS[layout]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", columns, image="jpg" if "jpg" in columns else "image")
    records = list(load_pairs(tmp_path, split="test", streaming=streaming))
    assert [record["image_id"] for record in records] == list(ROWS)
    for number, record in zip(ROWS, records, strict=True):
        assert shows(record["image"], number)
        assert record["captions"] == captions(number)
        assert record["caption_ids"] == [5 * number + k for k in range(5)]
        assert record["split"] == "test"
        assert str(number) in record["filename"] or "/" in record["filename"]
        assert set(record) == {"image", "captions", "image_id", "caption_ids", "split", "filename"}


@pytest.mark.parametrize("streaming", [False, True])
def test_numbered_caption_columns_of_flickr8k(tmp_path, streaming):
    columns = {"image": [encoded(n) for n in ROWS]}
    columns |= {f"caption_{k}": [captions(n)[k] for n in ROWS] for k in (3, 0, 4, 1, 2)}
    write_parquet(tmp_path / "train.parquet", columns)
    records = list(load_pairs(tmp_path, streaming=streaming))
    assert [record["captions"] for record in records] == [captions(n) for n in ROWS]
    # no ids in the source: named by split and place, so that no two splits share an id
    assert [record["image_id"] for record in records] == ["train/000000", "train/000001", "train/000002"]
    assert records[1]["caption_ids"] == [f"train/000001#{k}" for k in range(5)]


def test_karpathy_table_without_images_reads_them_from_a_folder(tmp_path):
    """`yerevann/coco-karpathy` names its images, in a folder of their year."""
    names = [f"COCO_val2014_{n:012d}.jpg" for n in ROWS]
    table = {
        "filepath": ["val2014"] * 3,
        "sentids": [[5 * n + k for k in range(5)] for n in ROWS],
        "filename": names,
        "imgid": [0, 1, 2],
        "split": ["test"] * 3,
        "sentences": [captions(n) for n in ROWS],
        "cocoid": list(ROWS),
        "url": ["http://images.cocodataset.org/x.jpg"] * 3,
    }
    write_parquet(tmp_path / "data" / "test.parquet", table, image=None)
    for number, name in zip(ROWS, names, strict=True):
        (tmp_path / "coco" / "val2014").mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / "val2014" / name).write_bytes(encoded(number, "JPEG", quality=95))
    records = load_pairs(tmp_path / "data", image_root=tmp_path / "coco")
    assert records.image_ids == list(ROWS)
    assert all(shows(record["image"], record["image_id"]) for record in records)
    assert records.filenames[0] == f"val2014/{names[0]}"
    with pytest.raises(ValueError, match=r"no column of images.*'url'.*image_root"):
        load_pairs(tmp_path / "data")


@pytest.mark.parametrize("streaming", [False, True])
def test_one_split_of_everything_is_divided_by_karpathys_file(tmp_path, streaming):
    """`lmms-lab/flickr30k`: one split called test, of all 31,783 photographs, with text for ids."""
    table = flickr30k() | {"img_id": [str(n) for n in ROWS]}
    del table["split"]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", table)
    karpathy = {"images": [{"filename": "3.jpg", "split": "train"}, {"filename": "4.jpg", "split": "test"}]}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(karpathy))
    options = {"streaming": streaming, "split_file": tmp_path / "dataset_flickr30k.json"}
    for split, expected in (("train", "3"), ("test", "4")):
        records = list(load_pairs(tmp_path, split=split, **options))
        assert [(record["image_id"], record["split"]) for record in records] == [(expected, split)]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps([{"filename": "3.jpg"}]))
    with pytest.raises(ValueError, match=r"which split an image file belongs to; columns seen: \['filename'\]"):
        load_pairs(tmp_path, split="test", **options)


def test_unknown_layout_is_refused_with_the_columns_seen_and_can_be_named(tmp_path):
    table = {"photo": [encoded(n) for n in ROWS], "says": [captions(n) for n in ROWS], "key": list(ROWS)}
    write_parquet(tmp_path / "a.parquet", table, image="photo")
    with pytest.raises(ValueError, match=r"'photo', 'says', 'key'.*Understood: images in image, jpg.*columns="):
        load_pairs(tmp_path)
    records = load_pairs(tmp_path, columns={"image": "photo", "captions": "says", "image_id": "key"})
    assert records.image_ids == list(ROWS) and shows(records[0]["image"], 3)
    with pytest.raises(ValueError, match=r"'pictures'.*no such column"):
        load_pairs(tmp_path, columns={"image": "pictures"})
    with pytest.raises(ValueError, match=r"unknown role.*captions"):
        load_pairs(tmp_path, columns={"picture": "photo"})


def test_captions_in_two_places_are_not_chosen_silently(tmp_path):
    table = flickr30k() | {"caption_0": ["one"] * 3, "caption_1": ["two"] * 3}
    write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(ValueError, match=r"captions in 'caption' and in \['caption_0', 'caption_1'\]"):
        load_pairs(tmp_path)
    chosen = {"captions": ["caption_1", "caption_0"], "caption_ids": None}  # the ids belong to the other column
    assert load_pairs(tmp_path, columns=chosen).captions[0] == ["two", "one"]


def test_nothing_is_truncated_where_images_have_other_than_five_captions(tmp_path):
    counts = (7, 1, 5)
    table = flickr30k() | {"caption": [captions(n, count) for n, count in zip(ROWS, counts, strict=True)]}
    table["sentids"] = [list(range(count)) for count in counts]
    write_parquet(tmp_path / "a.parquet", table)
    records = load_pairs(tmp_path)
    assert [len(texts) for texts in records.captions] == list(counts)
    assert [len(ids) for ids in records.caption_ids] == list(counts)


def test_one_row_a_caption_becomes_one_record_an_image(tmp_path):
    rows = [(n, k) for k in range(2) for n in ROWS]
    table = {
        "image": [encoded(n) for n, _ in rows],
        "image_id": [n for n, _ in rows],
        "caption": [captions(n)[k] for n, k in rows],
    }
    write_parquet(tmp_path / "a.parquet", table)
    records = load_pairs(tmp_path)
    assert records.image_ids == list(ROWS)
    assert records.captions == [captions(n, 2) for n in ROWS]
    assert records.caption_ids[0] == ["3#0", "3#1"]  # ids made for captions stay unique


class TestSplits:
    @pytest.fixture
    def folder(self, tmp_path):
        for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
            table = flickr30k(split) | {"img_id": [f"{name}{n}" for n in ROWS]}
            write_parquet(tmp_path / f"{name}-00000-of-00001.parquet", table)
        return tmp_path

    @pytest.mark.parametrize("spelling", ["validation", "val", "dev"])
    def test_spellings_of_validation(self, folder, spelling):
        records = load_pairs(folder, split=spelling)
        assert records.image_ids == ["validation3", "validation1", "validation4"]
        assert records.splits == ["validation"] * 3

    def test_several_splits_and_none_chosen_is_refused(self, folder):
        with pytest.raises(ValueError, match=r"'test', 'train', 'validation' and none was chosen"):
            load_pairs(folder)
        with pytest.raises(ValueError, match=r"no split 'restval'; it has 'test'"):
            load_pairs(folder, split="train+restval")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_several_splits_on_request(self, folder, streaming):
        both = load_pairs(folder, split="val+test", streaming=streaming)
        assert [record["split"] for record in both] == ["validation"] * 3 + ["test"] * 3
        assert [record["image_id"] for record in both][3] == "test3"
        assert len(list(load_pairs(folder, split="all", streaming=streaming))) == 9

    def test_images_of_a_later_part_belong_to_its_rows(self, folder):
        both = load_pairs(folder, split="val+test")
        assert [shows(both[row]["image"], ROWS[row % 3]) for row in range(6)] == [True] * 6

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_tell_the_split_where_files_do_not(self, tmp_path, streaming):
        write_parquet(tmp_path / "photos.parquet", flickr30k() | {"split": ["train", "val", "restval"]})
        records = list(load_pairs(tmp_path, split="validation", streaming=streaming))
        assert [(record["image_id"], record["split"]) for record in records] == [(1, "validation")]
        assert [r["image_id"] for r in load_pairs(tmp_path, split="train+restval", streaming=streaming)] == [3, 4]
        with pytest.raises(ValueError, match=r"\['test'\]; its rows are of \['restval', 'train', 'validation'\]"):
            list(load_pairs(tmp_path, split="test", streaming=streaming))

    def test_mixed_rows_and_no_split_chosen_is_refused(self, tmp_path):
        write_parquet(tmp_path / "photos.parquet", flickr30k() | {"split": ["train", "val", "test"]})
        with pytest.raises(ValueError, match=r"\['test', 'train', 'validation'\]; pass split="):
            load_pairs(tmp_path)
        assert len(load_pairs(tmp_path, split="all")) == 3

    def test_a_file_of_training_rows_keeps_karpathys_restval(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", flickr30k() | {"split": ["train", "restval", "test"]})
        assert load_pairs(tmp_path, split="train").splits == ["train", "restval"]

    def test_a_split_that_nothing_names_is_refused(self, tmp_path):
        table = flickr30k()
        del table["split"]
        write_parquet(tmp_path / "photos.parquet", table)
        assert load_pairs(tmp_path).splits == ["all"] * 3
        with pytest.raises(ValueError, match=r"no record of the split \['test'\]"):
            load_pairs(tmp_path, split="test")


class TestHub:
    """The Hub's way through `datasets`, with local folders in the place of repositories."""

    @pytest.fixture
    def preset(self, tmp_path, monkeypatch):
        for split in ("train", "val", "test"):  # as umaru97's repository names its splits
            write_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", flickr30k(split))
        repositories = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "hub"))
        monkeypatch.setitem(PRESETS, "flickr30k", Preset(repositories, {"train": 3, "validation": 3, "test": 3}))

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_preset(self, preset, split, streaming):
        records = list(load_pairs("flickr30k", split=split, streaming=streaming))
        assert [record["image_id"] for record in records] == list(ROWS)
        assert {record["split"] for record in records} == {split}
        assert all(shows(record["image"], record["image_id"]) for record in records)

    def test_a_preset_whose_copy_has_changed_is_refused(self, preset, monkeypatch):
        changed = Preset(PRESETS["flickr30k"].repositories, {"train": 3, "validation": 3, "test": 1000})
        monkeypatch.setitem(PRESETS, "flickr30k", changed)
        with pytest.raises(ValueError, match="3 images and 0 left out, expected 1000"):
            load_pairs("flickr30k", split="test")
        with pytest.raises(ValueError, match="'train', 'validation', 'test' and none was chosen"):
            load_pairs("flickr30k")

    def test_left_out_images_are_not_a_change(self, tmp_path, monkeypatch):
        table = flickr30k()
        table["image"] = [table["image"][0], b"no image", table["image"][2]]
        write_parquet(tmp_path / "hub" / "test-00000-of-00001.parquet", table)
        monkeypatch.setitem(PRESETS, "flickr30k", Preset({"test": str(tmp_path / "hub")}, {"test": 3}))
        assert len(load_pairs("flickr30k", split="test")) == 2

    def test_coco_has_a_repository_for_each_split_whatever_it_calls_it(self, tmp_path, monkeypatch):
        table = multimodal_fatima()
        del table["split"]
        for split in ("train", "validation", "test"):
            write_parquet(tmp_path / split / "train-00000-of-00001.parquet", table)
        repositories = {split: str(tmp_path / split) for split in ("train", "validation", "test")}
        monkeypatch.setitem(PRESETS, "coco", Preset(repositories, dict.fromkeys(repositories, 3)))
        records = load_pairs("coco", split="val")
        assert records.image_ids == list(ROWS) and records.splits == ["validation"] * 3

    @pytest.mark.parametrize("streaming", [False, True])
    def test_webdataset_repository(self, tmp_path, monkeypatch, streaming):
        """`clip-benchmark/wds_flickr30k`, which `datasets` turns into a table."""
        for number, place in ((3, "test/0.tar"), (1, "test/1.tar"), (4, "train/0.tar")):
            members = {"s0.jpg": encoded(number, "JPEG", quality=95), "s0.txt": "\n".join(captions(number))}
            write_tar(tmp_path / place, members)
        monkeypatch.setitem(PRESETS, "coco", Preset(dict.fromkeys(("train", "test"), str(tmp_path)), {"test": 2}))
        records = list(load_pairs("coco", split="test", streaming=streaming))
        assert [record["captions"] for record in records] == [captions(3), captions(1)]
        assert shows(records[0]["image"], 3) and shows(records[1]["image"], 1)
        assert [record["image_id"] for record in records] == ["test/000000", "test/000001"]

    def test_published_presets(self):
        counts = {name: tuple(preset.images.values()) for name, preset in PRESETS.items()}
        assert counts["flickr30k"] == (29000, 1014, 1000)
        assert counts["coco"] == (113287, 5000, 5000)
        assert counts["flickr8k"] == (6000, 1000, 1000)

    def test_no_such_source_says_what_there_is(self):
        with pytest.raises(ValueError, match=r"'flicker30k' is no file.*flickr8k, flickr30k, coco, scenes"):
            load_pairs("flicker30k")
        with pytest.raises(ValueError, match=r"'nobody/nothing'.*Hub"):
            load_pairs("nobody/nothing")


def test_region_features_in_a_table(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 5, 7)).astype(np.float32)
    boxes = np.sort(rng.uniform(size=(3, 5, 2, 2)), axis=2).reshape(3, 5, 4).astype(np.float32)
    table = {"region_features": features.tolist(), "region_boxes": boxes.tolist(), "caption": ["one", "two", "three"]}
    write_parquet(tmp_path / "a.parquet", table, image=None)
    for streaming in (False, True):
        records = list(load_pairs(tmp_path, streaming=streaming))
        np.testing.assert_allclose(records[2]["region_features"], features[2], rtol=1e-6)
        np.testing.assert_allclose(records[2]["region_boxes"], boxes[2], rtol=1e-6)
        assert "image" not in records[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_extra_columns_stay_in_the_record(tmp_path, streaming):
    boxes = [[[0.0, 0.1, 0.5, 0.6]], [[0.0, 0.0, 1.0, 1.0]], [[0.2, 0.2, 0.4, 0.4]]]
    write_parquet(tmp_path / "a.parquet", flickr30k() | {"detections": boxes})
    records = list(load_pairs(tmp_path, streaming=streaming, extra_columns=["detections"]))
    assert [record["detections"] for record in records] == boxes
    with pytest.raises(ValueError, match=r"extra_columns='boxes'.*no such column; it has .*'detections'"):
        load_pairs(tmp_path, streaming=streaming, extra_columns=["boxes"])


def test_an_option_of_another_source_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", flickr30k())
    with pytest.raises(ValueError, match=r"no option captions_per_image; its options are columns, image_root"):
        load_pairs(tmp_path, captions_per_image=5)
    with pytest.raises(ValueError, match="verify='ful'"):
        load_pairs(tmp_path, verify="ful")


@pytest.mark.slow
def test_a_process_that_stops_in_mid_stream_ends_well(tmp_path):
    """The read-ahead threads of `datasets` abort it ("terminate called without an active exception")."""
    table = {"image": [encoded(n) for n in range(200)], "caption": [f"text {n}" for n in range(200)]}
    write_parquet(tmp_path / "a.parquet", table)
    code = (
        "import sys; from modeling_tvrn.data import load_pairs\n"
        "stream = iter(load_pairs(sys.argv[1], streaming=True)); next(stream)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_of_one_split_with_different_columns_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", flickr30k())
    write_parquet(tmp_path / "train-1.parquet", thai_coco())
    with pytest.raises(ValueError, match="differ in their columns"):
        load_pairs(tmp_path)


def test_rows_whose_ids_do_not_match_are_left_out_and_counted(tmp_path, caplog):
    table = flickr30k()
    table["sentids"] = [table["sentids"][0], [1, 2], table["sentids"][2]]
    write_parquet(tmp_path / "a.parquet", table)
    with caplog.at_level(logging.WARNING):
        records = load_pairs(tmp_path)
    assert records.image_ids == [3, 4]
    assert dict(records.skipped) == {"caption ids do not match the captions": 1}
    assert "1: 5 captions, 2 ids" in caplog.text


def test_local_folder_is_not_shadowed_by_a_presets_repository(tmp_path, monkeypatch):
    write_parquet(tmp_path / "coco" / "train.parquet", flickr30k("train"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "open_hub", lambda *_, **__: pytest.fail("asked the Hub"))
    assert len(load_pairs("./coco")) == 3
