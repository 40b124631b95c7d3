"""What training makes of records: one item a caption, batches that encode an image once, an order to resume."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from data_makers import captions, encoded, shows, write_parquet
from torch.utils.data import DataLoader

from modeling_tvrn.data import (
    CaptionDataset,
    CaptionStream,
    EpochShuffledSampler,
    PairCollator,
    data_fingerprint,
    load_pairs,
)

COUNTS = (1, 5, 2, 3)


class WordProcessor:
    """A processor of the agreed interface that shows what it was given: image colours and caption lengths."""

    def __call__(self, text, return_tensors, images=None, region_features=None, region_boxes=None, region_mask=None):
        inputs = {"input_ids": torch.tensor([[len(caption)] for caption in text])}
        if images is not None:
            inputs["pixel_values"] = torch.tensor(np.stack([np.asarray(image, np.float32) for image in images]))
        else:
            inputs["region_features"] = torch.tensor(np.stack(region_features))
            if region_boxes is not None:
                inputs["region_boxes"] = torch.tensor(np.stack(region_boxes))
        return inputs


@pytest.fixture
def data(tmp_path):
    write_parquet(
        tmp_path / "train.parquet",
        {
            "image": [encoded(n) for n in range(4)],
            "caption": [captions(n, count) for n, count in enumerate(COUNTS)],
            "img_id": [f"id{n}" for n in range(4)],
        },
    )
    return load_pairs(tmp_path)


class TestCaptionDataset:
    def test_every_caption_once(self, data):
        items = CaptionDataset(data)
        assert len(items) == sum(COUNTS)
        read = [items[index] for index in range(len(items))]
        assert [item["caption"] for item in read] == [text for texts in data.captions for text in texts]
        for item in read:
            assert shows(item["record"]["image"], int(item["record"]["image_id"][2:]))
            assert item["caption"] == item["record"]["captions"][item["caption_number"]]
            assert data.image_ids[item["row"]] == item["record"]["image_id"]
        assert items.image_rows.tolist() == [item["row"] for item in read]
        assert items[-1]["caption"] == items[10]["caption"]
        with pytest.raises(IndexError):
            items[11]

    def test_an_image_is_decoded_once_a_batch(self, data):
        class Counting:
            image_ids, captions = data.image_ids, data.captions

            def __init__(self):
                self.reads = Counter()

            def __len__(self):
                return len(data)

            def __getitem__(self, row):
                self.reads[row] += 1
                return data[row]

        counting = Counting()
        batches = list(DataLoader(CaptionDataset(counting), batch_size=11, collate_fn=list))
        assert len(batches) == 1 and counting.reads == dict.fromkeys(range(4), 1)

    def test_equal_image_ids_have_one_row_number(self):
        class Records(list):
            image_ids, captions = ["a", "b", "a"], [["x"], ["y"], ["z"]]

        records = Records(
            {"image_id": i, "captions": c} for i, c in zip(Records.image_ids, Records.captions, strict=True)
        )
        assert [item["row"] for item in CaptionDataset(records)] == [0, 1, 0]

    def test_no_captions_is_an_error(self):
        class Records(list):
            image_ids, captions = [], []

        with pytest.raises(ValueError, match="no captions in 0 records"):
            CaptionDataset(Records())


class TestPairCollator:
    def test_images_once_and_ids_as_row_numbers(self, data):
        items = CaptionDataset(data)
        order = [6, 2, 0, 4, 7, 10]  # images 2, 1, 0, 1, 2, 3
        batch = PairCollator(WordProcessor())([items[index] for index in order])
        assert batch["image_ids"].dtype == batch["text_image_ids"].dtype == torch.int64
        assert batch["image_ids"].tolist() == [2, 1, 0, 3]
        assert batch["text_image_ids"].tolist() == [2, 1, 0, 1, 2, 3]
        assert [shows_tensor(pixels) for pixels in batch["pixel_values"]] == [2, 1, 0, 3]
        assert batch["input_ids"].flatten().tolist() == [len(items[index]["caption"]) for index in order]
        assert batch["return_loss"] is True
        assert "return_loss" not in PairCollator(WordProcessor(), return_loss=False)([items[0]])

    def test_whole_records_bring_all_their_captions(self, data):
        batch = PairCollator(WordProcessor())([data[1], data[3]])
        assert len(batch["pixel_values"]) == 2 and len(batch["input_ids"]) == 8
        assert (batch["text_image_ids"] == batch["image_ids"].repeat_interleave(torch.tensor([5, 3]))).all()

    def test_a_streams_numbers_depend_on_the_id_alone(self, data):
        """Two processes, or two batches, must not call different images the same."""
        collate = PairCollator(WordProcessor())
        stream = list(CaptionStream(iter(data)))
        assert [item["caption"] for item in stream] == [text for texts in data.captions for text in texts]
        one, other = collate(stream[1:8]), collate(stream[7:])
        assert one["image_ids"][1] == other["image_ids"][0] and len({*one["image_ids"].tolist()}) == 2
        assert not {*one["image_ids"].tolist()} & {*other["image_ids"][1:].tolist()}
        assert (one["image_ids"] >= 0).all()

    def test_region_features(self):
        rng = np.random.default_rng(0)
        record = {"image_id": 1, "captions": ["a", "bc"], "region_features": rng.normal(size=(3, 4))}
        boxed = record | {"image_id": 2, "region_boxes": rng.uniform(size=(3, 4))}
        batch = PairCollator(WordProcessor())([record, record | {"image_id": 9}])
        assert batch["region_features"].shape == (2, 3, 4) and "region_boxes" not in batch
        assert PairCollator(WordProcessor())([boxed])["region_boxes"].shape == (1, 3, 4)
        with pytest.raises(
            ValueError, match=r"hold \[\('region_features',\), \('region_features', 'region_boxes'\)\]"
        ):
            PairCollator(WordProcessor())([record, boxed])
        with pytest.raises(ValueError, match=r"expected in all of them either 'image', or 'region_features'"):
            PairCollator(WordProcessor())([{"image_id": 1, "captions": ["a"]}])

    def test_what_trainer_leaves_of_items_is_refused_with_the_remedy(self):
        with pytest.raises(ValueError, match=r"keys \['row'\].*remove_unused_columns=False"):
            PairCollator(WordProcessor())([{"row": 1}])

    def test_an_empty_batch_is_refused(self):
        with pytest.raises(ValueError, match="a batch of 0 items holds no caption"):
            PairCollator(WordProcessor())([])

    def test_with_the_real_processor(self, data):
        transformers = pytest.importorskip("transformers")
        from modeling_tvrn import TVRNProcessor

        pixels = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
        processor = TVRNProcessor.from_captions([text for texts in data.captions for text in texts], pixels)
        batch = PairCollator(pickle.loads(pickle.dumps(processor)))([data[1], data[0]])  # noqa: S301 - our own bytes
        assert batch["pixel_values"].shape == (2, 3, 8, 8)
        assert batch["input_ids"].shape == batch["word_mask"].shape == (6, 6)

    def test_in_workers(self, data):
        items = CaptionDataset(data)
        loader = DataLoader(
            items,
            batch_size=4,
            sampler=EpochShuffledSampler(len(items), seed=1),
            collate_fn=PairCollator(WordProcessor()),
            num_workers=2,
        )
        rows = torch.cat([batch["text_image_ids"] for batch in loader])
        assert rows.bincount().tolist() == list(COUNTS)


def shows_tensor(pixels):
    """Which of the four images a tensor of pixels is."""
    import PIL.Image

    image = PIL.Image.fromarray(pixels.numpy().astype(np.uint8))
    return next(number for number in range(4) if shows(image, number))


class TestEpochShuffledSampler:
    def test_every_item_once_in_an_order_of_seed_and_epoch_alone(self):
        sampler = EpochShuffledSampler(50, seed=3)
        first = list(sampler)
        assert sorted(first) == list(range(50)) and first != sorted(first)
        torch.manual_seed(99)
        assert list(sampler) == first == list(EpochShuffledSampler(50, seed=3))
        sampler.set_epoch(1)
        second = list(sampler)
        assert sorted(second) == list(range(50)) and second != first
        assert list(EpochShuffledSampler(50, seed=4)) != first
        sampler.set_epoch(0)
        assert list(sampler) == first

    def test_resuming_reads_the_rest_and_the_next_epoch_is_whole(self):
        sampler = EpochShuffledSampler(50, seed=3)
        sampler.set_epoch(2)
        whole = list(sampler)
        resumed = EpochShuffledSampler(50, seed=3)
        resumed.set_epoch(2, start=32)
        assert len(resumed) == 18 and list(resumed) == whole[32:]
        resumed.set_epoch(3)
        assert len(resumed) == len(list(resumed)) == 50

    def test_mistakes(self):
        with pytest.raises(ValueError, match="length=0"):
            EpochShuffledSampler(0)
        with pytest.raises(ValueError, match="0 <= start <= 5"):
            EpochShuffledSampler(5).set_epoch(0, start=6)


class TestFingerprint:
    def test_depends_on_ids_and_order(self, data):
        whole = data_fingerprint(data)
        assert whole == data_fingerprint(data[:]) and len(whole) == 64
        assert len({whole, data_fingerprint(data[1:]), data_fingerprint(data[::-1])}) == 3
        assert data_fingerprint(data, with_captions=False) != whole

    def test_an_id_moved_to_the_next_image_is_seen(self):
        class Ids:
            def __init__(self, image_ids, caption_ids):
                self.image_ids, self.caption_ids = image_ids, caption_ids

        one = Ids([1, 2], [[10, 11], [12]])
        assert data_fingerprint(one) == data_fingerprint(Ids(["1", "2"], [["10", "11"], ["12"]]))
        for other in (Ids([1, 2], [[10], [11, 12]]), Ids([1, 2], [[11, 10], [12]]), Ids([1, 2], [[1011], [12]])):
            assert data_fingerprint(other) != data_fingerprint(one)
        assert data_fingerprint(one, with_captions=False) == data_fingerprint(
            Ids([1, 2], [[5], [6]]), with_captions=False
        )

    def test_a_stream_has_none(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", {"image": [encoded(0)], "caption": ["x"]})
        with pytest.raises(ValueError, match="PairStream has no image_ids.*streaming=False"):
            data_fingerprint(load_pairs(tmp_path, streaming=True))
