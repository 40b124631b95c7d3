"""Real photographs: Flickr8k's splits where they are at hand."""

import itertools

import numpy as np
import pytest

from modeling_tvrn.data import data_fingerprint, load_pairs


@pytest.mark.slow
def test_both_splits(flickr8k):
    train, validation = (load_pairs(flickr8k, split=split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (6000, 1000)
    for data, split in ((train, "train"), (validation, "validation")):
        assert {len(texts) for texts in data.captions} == {5} and set(data.splits) == {split}
        assert len(set(data.image_ids)) == len(data) and not data.skipped
        record = data[len(data) // 2]
        assert record["image"].size == (224, 224) and record["image"].mode == "RGB"
        assert np.asarray(record["image"]).std() > 5
        # the public copies number captions by image
        assert record["caption_ids"] == [5 * record["image_id"] + k for k in range(5)]
        assert record["filename"].endswith(".jpg")
    assert not set(train.image_ids) & set(validation.image_ids)
    assert data_fingerprint(train) != data_fingerprint(validation)


@pytest.mark.slow
def test_streaming_reads_the_same(flickr8k):
    data = load_pairs(flickr8k, split="val")
    stream = load_pairs(flickr8k, split="val", streaming=True)
    for record, streamed in zip(data, itertools.islice(stream, 20), strict=False):
        assert np.array_equal(np.asarray(record.pop("image")), np.asarray(streamed.pop("image")))
        assert record == streamed
