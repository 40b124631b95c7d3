"""Map-style records and streams as users handle them: slices, ids without images, workers, generated scenes."""

import pickle

import numpy as np
import pytest
import torch.utils.data
from data_makers import captions, encoded, shows, write_parquet

from modeling_tvrn.data import PairDataset, load_pairs, records


@pytest.fixture
def folder(tmp_path):
    write_parquet(
        tmp_path / "train.parquet",
        {
            "image": [encoded(n) for n in range(7)],
            "caption": [captions(n, 1 + n % 3) for n in range(7)],
            "img_id": [f"id{n}" for n in range(7)],
        },
    )
    return tmp_path


def test_ids_and_captions_without_decoding(folder, monkeypatch):
    data = load_pairs(folder)
    monkeypatch.setattr(records, "decode_content", lambda *_: pytest.fail("decoded an image"))
    assert len(data) == 7 and data.image_ids[6] == "id6" and data.splits == ["train"] * 7
    assert data.captions[2] == captions(2, 3) and data.caption_ids[2] == ["id2#0", "id2#1", "id2#2"]
    assert "images=7, captions=13" in repr(data)


def test_slices_and_selections_keep_images_with_their_captions(folder):
    data = load_pairs(folder)
    for chosen, expected in (
        (data[2:5], [2, 3, 4]),
        (data[::-3], [6, 3, 0]),
        (data.select([5, 0, -1]), [5, 0, 6]),
        (data[2:].select([1, 0]), [3, 2]),
        (data.select(np.array([4, 1])), [4, 1]),
    ):
        assert isinstance(chosen, PairDataset) and chosen.image_ids == [f"id{n}" for n in expected]
        for number, record in zip(expected, chosen, strict=True):
            assert shows(record["image"], number) and record["captions"] == captions(number, 1 + number % 3)
    assert len(data) == 7
    for wrong in (7, -8):
        with pytest.raises(IndexError):
            data[wrong]
    with pytest.raises(IndexError):
        data.select([7])


def test_a_changed_record_does_not_change_the_data(folder):
    data = load_pairs(folder)
    data[0]["captions"].append("mine")
    data[0]["caption_ids"].clear()
    assert data[0]["captions"] == captions(0, 1) and data[0]["caption_ids"] == ["id0#0"]


def numbers_of(batch):
    return [record["image_id"] for record in batch]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_record_once_with_workers(folder, streaming, workers):
    data = load_pairs(folder, streaming=streaming)
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=workers, collate_fn=numbers_of)
    for _ in range(2):
        assert sorted(image_id for batch in loader for image_id in batch) == [f"id{n}" for n in range(7)]


def test_records_travel_to_other_processes(folder):
    data = pickle.loads(pickle.dumps(load_pairs(folder)[3:]))  # noqa: S301 - our own bytes
    assert shows(data[0]["image"], 3)


class TestScenes:
    def test_records(self):
        data = load_pairs("scenes", split="val", count=6, seed=2, image_size=48)
        again = load_pairs("scenes", split="validation", count=6, seed=2, image_size=48)
        assert len(data) == 6 and len(set(data.image_ids)) == 6
        record = data[4]
        assert record["image"].size == (48, 48) and record["split"] == "validation"
        assert record["captions"] == data.captions[4] and record["image_id"] == data.image_ids[4]
        assert len(record["caption_ids"]) == len(record["captions"])
        assert record["boxes"].shape[1] == 4  # beside the common fields
        assert np.array_equal(np.asarray(record["image"]), np.asarray(again[4]["image"]))

    def test_a_record_is_what_the_generator_makes(self):
        from modeling_tvrn.data.scenes import generate_scenes

        expected, record = generate_scenes("test", count=3)[1], load_pairs("scenes", split="test", count=3)[1]
        assert record.keys() == expected.keys()
        for name in ("captions", "image_id", "caption_ids", "split", "filename"):
            assert record[name] == expected[name]
        assert np.array_equal(np.asarray(record["image"]), np.asarray(expected["image"]))

    def test_stream(self):
        stream = load_pairs("scenes", split="train", streaming=True, count=5)
        assert [r["image_id"] for r in stream] == load_pairs("scenes", split="train", count=5).image_ids

    def test_mistakes(self):
        with pytest.raises(ValueError, match="'train', 'validation', 'test' and none was chosen"):
            load_pairs("scenes")
        with pytest.raises(ValueError, match=r"no option size; its options are count, seed, image_size"):
            load_pairs("scenes", split="train", size=48)
