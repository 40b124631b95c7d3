"""Regions from a cache are the regions of the pixels; a cache of anything else is refused."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from dual_encoder_makers import save_dual_encoder
from hub_makers import pixel_model, region_model, save
from test_cli import tvrn
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessorPil,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    MobileNetV2Config,
    MobileNetV2Model,
    ViTImageProcessorPil,
)

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.data import CaptionDataset, PairCollator, load_pairs
from modeling_tvrn.front_door import load_region_model
from modeling_tvrn.teachers import (
    RegionCache,
    StaleStoreError,
    pool_boxes,
    region_fingerprint,
    resize_only,
    with_checked_regions,
    with_regions,
)
from modeling_tvrn.towers_tvrn import region_map

COUNT = 7
BOXES = [[[2, 3, 40, 30], [0, 0, 61, 45]], [[10, 5.5, 20, 44]], [[1, 2, 3, 4], [30, 20, 60, 45], [0, 0, 9, 9]]]

TOWERS = {
    "cnn": lambda: MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.05, image_size=97, finegrained_output=True)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[6, 11], depths=[1, 1], patch_size=8)),
    "patches": lambda: Dinov2WithRegistersModel(  # a class token and three registers to drop
        Dinov2WithRegistersConfig(
            hidden_size=14, num_attention_heads=2, num_hidden_layers=2, mlp_ratio=2, image_size=42, patch_size=7,
            num_register_tokens=3,
        )
    ),
}  # fmt: skip
PIXELS = {"cnn": 97, "convnext": 64, "patches": 42}


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> Path:
    """Tiny towers with random weights and their image processors, saved as the Hub has them."""
    folder = tmp_path_factory.mktemp("region-towers")
    torch.manual_seed(3)
    for name, make in TOWERS.items():
        tower = make()
        for weights in tower.parameters():
            weights.data += 0.2 * torch.randn_like(weights)
        tower.save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": PIXELS[name], "width": PIXELS[name]}).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of images and a table of captions, with detector boxes."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(1)
    rows = []
    for number in range(COUNT):
        noise = random.integers(0, 256, (11, 15, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(noise).resize((61, 45), PIL.Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
        captions = [f"a dog number {word}" for word in ("one", "two", "three")[: 1 + number % 3]]
        boxes = BOXES[number % 3]
        rows.append({"image": f"{number}.png", "image_id": 50 + 3 * number, "captions": captions, "boxes": boxes})
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def records(photographs):
    return load_pairs(photographs)


def make(towers: Path, name: str = "cnn", **config) -> tuple[TVRNModel, TVRNProcessor]:
    torch.manual_seed(11)
    sizes = {"hidden_size": 12, "projection_size": 10, "similarity_size": 7, "word_embedding_size": 9}
    config = {"freeze_vision": True, "vocab_size": 20} | sizes | config
    model = TVRNModel.from_backbones(vision=towers / name, **config).eval()
    words = ["a dog number one", "two three"]
    image_processor = TVRNProcessor.from_backbones(towers / name).image_processor
    return model, TVRNProcessor.from_captions(words, image_processor)


def build(towers: Path, records, folder: Path, name: str = "cnn", **settings) -> RegionCache:
    config = {key: settings.pop(key) for key in ("vision_grid_size",) if key in settings}
    model, processor = make(towers, name, **config)
    return RegionCache.build(model, processor, records, folder, batch_size=3, progress=False, **settings)


def all_pixels(records, processor) -> torch.Tensor:
    return processor(images=[record["image"] for record in records])["pixel_values"]


# -- the same regions -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("grid_size", [None, 2])
@pytest.mark.parametrize("name", TOWERS)
def test_scores_from_the_cache_are_scores_from_the_pixels(towers, records, tmp_path, name, grid_size):
    model, processor = make(towers, name, vision_grid_size=grid_size)
    collate, every = PairCollator(processor, return_loss=False), range(13)
    with torch.no_grad():
        pixels = collate(CaptionDataset(records).__getitems__(every))
        expected = model(**pixels).logits_per_image
        spread = expected.std().item()  # the scores differ, so equal ones mean something
        assert spread > 0.02
        for dtype, tolerance in (("float32", 1e-5), ("float16", 0.01 * spread)):
            settings = {"dtype": dtype, "progress": False, "batch_size": 3, "shard_size": 2}
            cache = RegionCache.build(model, processor, records, tmp_path / dtype, **settings)
            inputs = collate(CaptionDataset(with_regions(records, cache)).__getitems__(every))
            assert "pixel_values" not in inputs
            torch.testing.assert_close(model(**inputs).logits_per_image, expected, atol=tolerance, rtol=0)
            _, boxes, mask = model.extract_regions(pixels["pixel_values"])
            stored = cache[records.image_ids]
            assert stored["region_features"].dtype == getattr(torch, dtype)
            torch.testing.assert_close(stored["region_boxes"], boxes, atol=0, rtol=0)  # boxes stay precise
            assert stored["region_mask"].all() and mask.all()


def test_regions_are_looked_up_by_image_id(towers, records, tmp_path):
    cache = build(towers, records, tmp_path)
    whole, some = cache[records.image_ids], cache[[68, 50, 68]]
    for name, array in some.items():
        assert torch.equal(array, whole[name][[6, 0, 6]])
    assert list(cache.ids) == records.image_ids and 50 in cache and len(cache) == COUNT
    with pytest.raises(KeyError, match="51"):
        cache[[50, 51]]


@pytest.mark.slow
def test_workers_and_streams_give_the_same_cache(towers, photographs, records, tmp_path):
    expected = build(towers, records, tmp_path / "map")
    workers = build(towers, records, tmp_path / "workers", num_workers=2)
    stream = build(towers, load_pairs(photographs, streaming=True), tmp_path / "stream")
    for other in (workers, stream):
        assert other.ids == expected.ids and other.fingerprint == expected.fingerprint
        for name, array in other[expected.ids].items():
            assert torch.equal(array, expected[expected.ids][name])
    with pytest.raises(ValueError, match="num_workers is 2, but a stream"):
        build(towers, load_pairs(photographs, streaming=True), tmp_path / "wrong", num_workers=2)


class Noisy(nn.Module):
    """A tower whose output is random in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels):
        means = self.dropout(self.scale * pixels.flatten(2).mean(-1)).unsqueeze(1)
        mask = torch.ones(len(pixels), 1, dtype=torch.bool)
        return means, torch.tensor([0.0, 0, 1, 1]).expand(len(pixels), 1, 4), mask


def test_the_backbone_runs_in_evaluation_mode_and_without_gradient(towers, records, tmp_path):
    tower, (_, processor) = Noisy().train(), make(towers)
    cache = RegionCache.build(tower, processor, records, tmp_path, dtype="float32", progress=False)
    assert tower.training and tower.dropout.training
    expected = all_pixels(records, processor).flatten(2).mean(-1).unsqueeze(1)
    torch.testing.assert_close(cache[records.image_ids]["region_features"], expected)


def test_bfloat16_computes_in_bfloat16_and_says_so(towers, records, tmp_path):
    exact = build(towers, records, tmp_path / "exact", "convnext")
    rough = build(towers, records, tmp_path / "rough", "convnext", compute_dtype="bfloat16")
    first, second = (cache[records.image_ids]["region_features"].float() for cache in (exact, rough))
    assert 0 < (first - second).norm() / first.norm() < 0.1
    with pytest.raises(StaleStoreError, match=r"numbers.compute_dtype: stored 'bfloat16', expected 'float32'"):
        RegionCache.load(tmp_path / "rough", exact.fingerprint)


# -- stale ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_the_same_tower_finds_its_cache(towers, records, tmp_path):
    """Saved and loaded again, in half precision even: it is the same tower."""
    cache = build(towers, records, tmp_path / "cache", vision_grid_size=2)
    model, processor = make(towers, vision_grid_size=2)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = TVRNModel.from_pretrained(tmp_path / "model")
    expected = region_fingerprint(loaded, TVRNProcessor.from_pretrained(tmp_path / "model"), records)
    assert expected == cache.fingerprint
    assert RegionCache.load(tmp_path / "cache", expected).ids == cache.ids


def test_half_precision_weights_on_disk_are_the_same_weights(towers, tmp_path):
    model, processor = make(towers)
    model.vision_model.half().save_pretrained(tmp_path)
    fingerprints = []
    for dtype in (torch.float16, torch.float32):
        model.vision_model = MobileNetV2Model.from_pretrained(tmp_path, dtype=dtype)
        fingerprints.append(region_fingerprint(model, processor))
    assert fingerprints[0] == fingerprints[1]


def other_weights(model, processor, settings):
    next(model.vision_model.parameters()).data.view(-1)[0] += 1e-3


def other_statistics(model, processor, settings):
    next(model.vision_model.buffers()).data.view(-1)[0] += 1e-3


def other_activation(model, processor, settings):
    model.vision_model.config.hidden_act = "gelu"


def other_mean(model, processor, settings):
    processor.image_processor.image_mean = [0.5, 0.5, 0.4]


def other_size(model, processor, settings):
    processor.image_processor.size = {"height": 96, "width": 97}


def other_grid(model, processor, settings):
    model.config.vision_grid_size = 3


def other_dtype(model, processor, settings):
    settings["dtype"] = "float32"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "field"),
    [
        (other_weights, r"backbone.weights_sha256: stored '\w+', expected '\w+'"),
        (other_statistics, r"backbone.weights_sha256: stored '\w+', expected '\w+'"),
        (other_activation, r"backbone.config.hidden_act: stored 'relu6', expected 'gelu'"),
        (other_mean, r"preprocessing.image_mean: stored \[0.5, 0.5, 0.5\], expected \[0.5, 0.5, 0.4\]"),
        (other_size, r"preprocessing.size.height: stored 97, expected 96"),
        (other_grid, r"regions.grid_size: stored 2, expected 3"),
        (other_dtype, r"numbers.dtype: stored 'float16', expected 'float32'"),
    ],
)
def test_a_stale_cache_is_refused_naming_what_changed(towers, records, tmp_path, change, field):
    build(towers, records, tmp_path, vision_grid_size=2)
    (model, processor), settings = make(towers, vision_grid_size=2), {}
    change(model, processor, settings)
    with pytest.raises(StaleStoreError, match=field) as caught:
        RegionCache.load(tmp_path, region_fingerprint(model, processor, records, **settings))
    assert str(caught.value).count("stored") == 1
    with pytest.raises(StaleStoreError, match=field):
        RegionCache.build(model, processor, records, tmp_path, progress=False, **settings)


def test_other_images_or_another_order_are_other_data(towers, records, tmp_path):
    build(towers, records, tmp_path)
    model, processor = make(towers)
    for rows in ([0, 1, 2], [1, 0, *range(2, COUNT)]):
        with pytest.raises(StaleStoreError, match="data.ids_sha256"):
            RegionCache.load(tmp_path, region_fingerprint(model, processor, records.select(rows)))
    assert len(RegionCache.load(tmp_path, region_fingerprint(model, processor))) == COUNT


def test_a_bare_function_needs_a_fingerprint_of_its_own(towers, records, tmp_path):
    model, processor = make(towers)

    def extract(pixels):
        return model.extract_regions(pixels)

    with pytest.raises(ValueError, match="pass a model or nn.Module, or fingerprint="):
        RegionCache.build(extract, processor, records, tmp_path, progress=False)
    cache = RegionCache.build(extract, processor, records, tmp_path, fingerprint={"me": 1}, progress=False)
    assert cache.fingerprint.keys() == {"me", "data"}


# -- killed -----------------------------------------------------------------------------------------------------------


class Counted:
    """Records that remember which were decoded, and fail at one of them."""

    def __init__(self, records, fail_at: int | None = None) -> None:
        self.records, self.image_ids, self.fail_at, self.decoded = records, records.image_ids, fail_at, []

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row):
        if row == self.fail_at:
            raise KeyboardInterrupt
        self.decoded.append(row)
        return self.records[row]


@pytest.mark.slow
def test_an_interrupted_extraction_goes_on_where_its_shards_end(towers, records, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(towers, Counted(records, fail_at=6), tmp_path / "cut", shard_size=2)
    with pytest.raises(ValueError, match="is unfinished: "):
        RegionCache.load(tmp_path / "cut")
    again = Counted(records)
    cache = build(towers, again, tmp_path / "cut", shard_size=2)
    assert again.decoded == [6] and cache.info["resumed_after"] == 6
    whole = build(towers, records, tmp_path / "whole")
    assert cache.fingerprint == whole.fingerprint
    for name, array in whole[whole.ids].items():
        torch.testing.assert_close(cache[whole.ids][name], array)
    third = Counted(records)
    build(towers, third, tmp_path / "cut")
    assert third.decoded == []


def test_an_interrupted_stream_goes_on_too(towers, photographs, records, tmp_path):
    class Cut:
        def __iter__(self):
            yield from (records[row] for row in range(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(towers, Cut(), tmp_path, shard_size=2)
    cache = build(towers, load_pairs(photographs, streaming=True), tmp_path, shard_size=2)
    assert list(cache.ids) == records.image_ids and cache.info["resumed_after"] == 2


@pytest.mark.slow
def test_unfinished_work_is_not_continued_with_other_data(towers, records, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(towers, Counted(records, fail_at=6), tmp_path, shard_size=2)
    others = records.select([0, 1, 2, 5, 6])
    for data in (others, iter(list(others))):
        with pytest.raises(ValueError, match=r"has image 59 at place 3 where the data have 65"):
            build(towers, data, tmp_path, shard_size=2)
    with pytest.raises(ValueError, match=r"has image 53 at place 1 where the data have nothing more"):
        build(towers, records.select([0]), tmp_path, shard_size=2)
    # one that turned out to be corrupt, left out behind what is stored
    assert len(build(towers, records.select([*range(6)]), tmp_path, shard_size=2)) == 6


def test_a_shard_damaged_later_is_extracted_again(towers, records, tmp_path):
    build(towers, records, tmp_path, shard_size=2)
    shard = tmp_path / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="shard-00002.safetensors is damaged, half-written"):
        RegionCache.load(tmp_path)
    again = Counted(records)
    build(towers, again, tmp_path, shard_size=2)
    assert again.decoded == [4, 5, 6]


# -- bad input --------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """A tower that gives one value for the image whose pixels are those."""

    def __init__(self, pixels, value: float) -> None:
        super().__init__()
        self.register_buffer("pixels", pixels)
        self.value = value

    def forward(self, pixels):
        features = pixels.flatten(2).mean(-1).unsqueeze(1).repeat(1, 2, 1)
        features[(pixels == self.pixels).flatten(1).all(1), 1, 2] = self.value
        boxes = torch.tensor([0.0, 0, 1, 1]).expand(len(pixels), 2, 4)
        return features, boxes, torch.ones(len(pixels), 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (float("nan"), "image 62 are NaN or infinite"),
        (float("-inf"), "image 62 are NaN or infinite"),
        (7e4, r"image 62 are too large for float16 \(up to 7e\+04\): use dtype='float32'"),
    ],
)
def test_features_that_are_no_numbers_stop_with_the_image(towers, records, tmp_path, value, match):
    _, processor = make(towers)
    tower = Broken(all_pixels(records.select([4]), processor), value)
    with pytest.raises(ValueError, match=match):
        RegionCache.build(tower, processor, records, tmp_path / "half", batch_size=3, progress=False)
    if value == 7e4:
        cache = RegionCache.build(tower, processor, records, tmp_path, dtype="float32", progress=False)
        assert cache[[62]]["region_features"][0, 1, 2] == 7e4


@pytest.mark.slow
def test_settings_that_cannot_be_are_refused(towers, records, tmp_path):
    for settings, match in (
        ({"dtype": "int8"}, "dtype is 'int8', expected one of"),
        ({"compute_dtype": "float8"}, "compute_dtype is 'float8'"),
        ({"boxes_column": "boxes"}, "expected both or neither"),
    ):
        with pytest.raises(ValueError, match=match):
            build(towers, records, tmp_path, **settings)
    model, processor = make(towers)
    with pytest.raises(ValueError, match="batch_size is 0"):
        RegionCache.build(model, processor, records, tmp_path, batch_size=0)
    cached = with_regions(records, build(towers, records, tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"image 50 has no image but .*region_features"):
        build(towers, cached, tmp_path / "again")


# -- boxes ------------------------------------------------------------------------------------------------------------


def test_pooling_in_a_box_is_the_mean_over_its_area():
    """Against a fine grid of points, each with the value of the cell it lies in."""
    random = np.random.default_rng(4)
    feature_map = random.normal(size=(2, 5, 3, 4))
    low = random.uniform(0, 0.6, size=(2, 6, 2))
    boxes = np.concatenate([low, low + random.uniform(0.05, 0.4, size=low.shape)], axis=-1)
    steps = (np.arange(400) + 0.5) / 400
    expected = np.empty((2, 6, 5))
    for image, region in np.ndindex(2, 6):
        x1, y1, x2, y2 = boxes[image, region]
        columns = ((x1 + (x2 - x1) * steps) * 4).astype(int)
        rows = ((y1 + (y2 - y1) * steps) * 3).astype(int)
        expected[image, region] = feature_map[image][:, rows][:, :, columns].mean(axis=(1, 2))
    found = pool_boxes(torch.tensor(feature_map), torch.tensor(boxes))
    np.testing.assert_allclose(found, expected, atol=2e-2)
    whole = pool_boxes(torch.tensor(feature_map), torch.tensor([[[0.0, 0, 1, 1]]] * 2))
    np.testing.assert_allclose(whole[:, 0], feature_map.mean(axis=(2, 3)), atol=1e-12)
    inside = pool_boxes(torch.tensor(feature_map), torch.tensor([[[0.51, 0.7, 0.74, 0.9]]] * 2))
    np.testing.assert_allclose(inside[:, 0], feature_map[:, :, 2, 2], atol=1e-12)


def with_boxes(towers: Path, photographs: Path, folder: Path, records=None, **settings) -> RegionCache:
    model, processor = make(towers)
    tower = model.vision_model

    def feature_map(pixels):
        return region_map(tower(pixel_values=pixels), pixels, tower.config)

    records = load_pairs(photographs, extra_columns=["boxes"]) if records is None else records
    settings = {"boxes_column": "boxes", "max_regions": 4, "feature_map": feature_map, "progress": False} | settings
    return RegionCache.build(model, processor, records, folder, **settings)


@pytest.mark.slow
def test_a_column_of_boxes_makes_the_regions(towers, photographs, records, tmp_path):
    cache = with_boxes(towers, photographs, tmp_path, dtype="float32")
    stored = cache[[53, 56]]
    assert stored["region_mask"].tolist() == [[True, False, False, False], [True, True, True, False]]
    fractions = np.array(BOXES[2], dtype=np.float64) / [61, 45, 61, 45]
    np.testing.assert_allclose(stored["region_boxes"][1, :3], fractions, atol=1e-7)
    model, processor = make(towers)
    with torch.no_grad():
        pixels = all_pixels(records.select([2]), processor)
        grid = region_map(model.vision_model(pixel_values=pixels), pixels, model.vision_model.config)
    expected = pool_boxes(grid, torch.tensor(fractions[None], dtype=torch.float32))[0]
    torch.testing.assert_close(stored["region_features"][1, :3], expected)
    assert not stored["region_features"][0, 1:].any() and not stored["region_boxes"][0, 1:].any()
    record = with_regions(records, cache)[1]
    assert record["region_features"].shape[0] == 1 and record["region_boxes"].shape == (1, 4)
    assert "image" not in record and record["captions"] == records.captions[1]


@pytest.mark.slow
def test_fractions_and_pixels_are_the_same_boxes(towers, photographs, tmp_path):
    pixels = with_boxes(towers, photographs, tmp_path / "pixels")
    relative = [dict(record) for record in load_pairs(photographs, extra_columns=["boxes"])]
    for record in relative:
        record["boxes"] = np.array(record["boxes"]) / [61, 45, 61, 45]
    fractions = with_boxes(towers, photographs, tmp_path / "fractions", relative)
    for name, array in pixels[pixels.ids].items():
        torch.testing.assert_close(fractions[pixels.ids][name], array, atol=1e-6, rtol=1e-3)


def test_boxes_past_the_limit_are_left_out_and_counted(towers, photographs, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="modeling_tvrn"):
        cache = with_boxes(towers, photographs, tmp_path, max_regions=2)
    assert "2 images have more than 2 boxes" in caplog.text
    assert cache.info["images_with_boxes_cut"] == 2 and cache[[56]]["region_mask"].all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("boxes", "match"),
    [
        ([], r"boxes of image 50 have shape \(0,\)"),
        ([[1, 2, 3]], r"have shape \(1, 3\), expected \(at least 1, 4\)"),
        ([[0, 0, 9, 9], [5, 5, 5, 9]], r"box 1 of image 50 is \[5, 5, 5, 9\]"),
        ([[20, 10, 4, 12]], "expected x1 < x2 and y1 < y2 inside the image of 61 x 45 pixels"),
        ([[0, 0, 64, 30]], "inside the image"),
        ([[-0.2, 0, 0.5, 0.5]], "inside the image"),
        ([[0, 0, float("nan"), 3]], "box 0 of image 50"),
    ],
)
def test_bad_boxes_stop_with_the_image(towers, photographs, tmp_path, boxes, match):
    record = {**load_pairs(photographs)[0], "boxes": boxes}
    with pytest.raises(ValueError, match=match):
        with_boxes(towers, photographs, tmp_path, [record])


def test_a_box_one_pixel_over_the_edge_is_clipped(towers, photographs, tmp_path):
    record = {**load_pairs(photographs)[0], "boxes": [[-0.6, 0, 61.4, 45]]}
    cache = with_boxes(towers, photographs, tmp_path, [record])
    assert cache[[50]]["region_boxes"][0, 0].tolist() == [0, 0, 1, 1]


def test_boxes_need_pixels_of_the_whole_photograph(towers, records, tmp_path):
    model, processor = make(towers)
    image_processor = processor.image_processor
    image_processor.do_center_crop, image_processor.crop_size = True, {"height": 35, "width": 33}
    settings = {"boxes_column": "boxes", "feature_map": lambda pixels: pixels}
    with pytest.raises(ValueError, match="do_center_crop=True, so boxes of the photograph would not fit"):
        RegionCache.build(model, processor, records, tmp_path, **settings)
    resize_only(image_processor)
    assert all_pixels(records, processor).shape == (COUNT, 3, 35, 33)
    with pytest.raises(ValueError, match="has no 'boxes'"):
        RegionCache.build(model, processor, records, tmp_path, progress=False, **settings)


# -- records ----------------------------------------------------------------------------------------------------------


def test_records_with_regions_decode_no_image(towers, photographs, records, tmp_path):
    cache = build(towers, records, tmp_path)
    wrapped = with_regions(load_pairs(photographs, verify=False), cache)
    for path in photographs.glob("*.png"):
        path.rename(path.with_suffix(".hidden"))
    try:
        record = wrapped[-1]
        assert [found["image_id"] for found in wrapped] == records.image_ids
    finally:
        for path in photographs.glob("*.hidden"):
            path.rename(path.with_suffix(".png"))
    original = records[-1]
    for name in original.keys() - {"image"}:
        assert record[name] == original[name]
    assert record.keys() - original.keys() == {"region_features", "region_boxes"} and "image" not in record


def test_records_with_regions_offer_what_the_records_offer(towers, records, tmp_path):
    wrapped = with_regions(records, build(towers, records, tmp_path))
    assert len(wrapped) == COUNT
    assert wrapped.image_ids == records.image_ids and wrapped.captions == records.captions
    assert wrapped.skipped is records.skipped
    part = wrapped[1:6:2]
    assert part.image_ids == [53, 59, 65] and len(part) == 3
    np.testing.assert_array_equal(part[1]["region_features"], wrapped[3]["region_features"])
    with pytest.raises(IndexError):
        wrapped[COUNT]
    with pytest.raises(AttributeError):
        wrapped.no_such_thing  # noqa: B018


def test_an_image_without_regions_is_named_before_training_starts(towers, records, tmp_path):
    cache = build(towers, records.select([0, 1, 2, 3]), tmp_path)
    assert len(with_regions(records.select([3, 1]), cache)) == 2
    with pytest.raises(KeyError, match=r"3 of 7 ids are not in the store .* the first is 62"):
        with_regions(records, cache)


def test_streams_get_regions_as_they_come(towers, photographs, records, tmp_path):
    cache = build(towers, records, tmp_path)
    stream = with_regions(load_pairs(photographs, streaming=True), cache)
    for found, expected in zip(stream, with_regions(records, cache), strict=True):
        assert "image" not in found and found["image_id"] == expected["image_id"]
        np.testing.assert_array_equal(found["region_features"], expected["region_features"])
    assert stream.skipped.total == 0


# -- the verb ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_verb_makes_the_cache_that_the_model_expects(towers, photographs, records, tmp_path, caplog):
    arguments = ["regions", photographs, "--features", towers / "patches", "--batch-size", 4, "--device", "cpu"]
    made = tvrn(*arguments, "--grid-size", 2, "--output", tmp_path)
    assert f"images={COUNT}, regions=4, features=14" in made.stdout and "kB to write, " in caplog.text
    model, processor = make(towers, "patches", vision_grid_size=2)
    cache = RegionCache.load(tmp_path, region_fingerprint(model, processor, records))
    assert list(cache.ids) == records.image_ids and cache.info["backbone"] == str(towers / "patches")
    again = json.loads(tvrn(*arguments, "--grid-size", 2, "--output", tmp_path, "--json").stdout)
    assert again == {
        "cache": str(tmp_path), "items": COUNT, "bytes": cache.store.bytes, "seconds": cache.info["seconds"]
    }  # fmt: skip
    stale = tvrn(*arguments, "--grid-size", 3, "--output", tmp_path, code=2).stderr
    assert "regions.grid_size: stored 2, expected 3" in stale and "--overwrite" in stale and "Traceback" not in stale
    tvrn(*arguments, "--grid-size", 3, "--output", tmp_path, "--overwrite")
    assert RegionCache.load(tmp_path).store.layout["region_features"][1] == (9, 14)


def test_the_verb_pools_in_boxes(towers, photographs, tmp_path):
    arguments = ["regions", photographs, "--features", towers / "cnn", "--boxes-column", "boxes", "--device", "cpu"]
    tvrn(*arguments, "--max-regions", 3, "--output", tmp_path / "verb")
    expected = with_boxes(towers, photographs, tmp_path / "here", max_regions=3)
    cache = RegionCache.load(tmp_path / "verb")
    for name, array in expected[expected.ids].items():
        assert torch.equal(cache[expected.ids][name], array)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_a_dual_encoder_the_verb_keeps_embeddings_too(photographs, records, tmp_path, kind):
    save_dual_encoder(tmp_path / kind, kind)
    tvrn("regions", photographs, "--features", tmp_path / kind, "--grid-size", 2, "-o", tmp_path / "cache")
    model, processor = load_region_model(tmp_path / kind, grid_size=2, device="cpu")
    wrapped = with_checked_regions(records, tmp_path / "cache", model, processor)
    own = processor(images=[record["image"] for record in records])["pixel_values"]
    with torch.no_grad():
        embeds = model.extract_image_features(own)["image_embeds"]
    found = torch.stack([torch.from_numpy(record["image_embeds"]) for record in wrapped])
    torch.testing.assert_close(found, embeds, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_of_a_tvrn_the_verb_keeps_what_its_own_tower_sees(photographs, records, tmp_path):
    folder = save(tmp_path / "tvrn", *pixel_model(vision_grid_size=2))
    arguments = ["regions", photographs, "--features", folder, "-o", tmp_path / "cache", "--device", "cpu"]
    tvrn(*arguments)
    wrapped = with_checked_regions(records, tmp_path / "cache", *pixel_model(vision_grid_size=2))
    assert wrapped[0]["region_features"].shape == (4, 14)
    assert "was trained with 2; leave it out" in tvrn(*arguments, "--grid-size", 3, code=2).stderr
    assert "has its own; leave it out" in tvrn(*arguments, "--image-size", 64, code=2).stderr
    arguments[3] = save(tmp_path / "blind", *region_model())
    assert "has no vision tower: it was trained on region features" in tvrn(*arguments, code=2).stderr


def test_boxes_of_a_dual_encoder_that_only_resizes_come_with_embeddings(photographs, tmp_path):
    folder = save_dual_encoder(tmp_path / "siglip", "siglip")
    arguments = ["regions", photographs, "--features", folder, "--boxes-column", "boxes", "-o", tmp_path / "cache"]
    refused = tvrn(*arguments, code=2).stderr
    assert "crops or pads photographs" in refused and "take a dual encoder that only resizes" in refused
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    (folder / "processor_config.json").unlink()
    tvrn(*arguments)
    layout = RegionCache.load(tmp_path / "cache").store.layout
    assert layout["image_embeds"][1] == (36,) and layout["region_features"][1] == (36, 36)


def test_of_two_towers_that_are_no_dual_encoder_the_verb_takes_the_regions_and_says_so(
    photographs, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise ValueError("CLIPModel can't be the first stage: its logit is another one.")

    monkeypatch.setattr(TVRNModel, "from_dual_encoder", refuse)
    save_dual_encoder(tmp_path / "clip", "clip")
    said = tvrn("regions", photographs, "--features", tmp_path / "clip", "-o", tmp_path / "cache")
    assert "image_embeds" not in RegionCache.load(tmp_path / "cache").store.layout, said.stderr


@pytest.mark.slow
def test_mistakes_are_one_sentence_and_code_2(towers, photographs, tmp_path):
    cnn = ["--features", towers / "cnn", "-o", tmp_path / "cache", "--device", "cpu"]
    text = tmp_path / "text"
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9)
    ).save_pretrained(text)
    wrong = {
        "'nowhere'": ["nowhere", *cnn],
        "no folder": [photographs, "--features", tmp_path / "nothing", "-o", tmp_path / "cache"],
        "expected a vision model": [photographs, "--features", text, "-o", tmp_path / "cache"],
        "'box'": [photographs, *cnn, "--boxes-column", "box"],
        "ways to choose regions": [photographs, *cnn, "--boxes-column", "boxes", "--grid-size", 2],
        "--dtype is 'int8'; expected one of float16, float32": [photographs, *cnn, "--dtype", "int8"],
        "--verify is 'half'": [photographs, *cnn, "--verify", "half"],
        "Missing option '--output'": [photographs, "--features", towers / "cnn"],
        "device 'tpu'": [photographs, "--features", towers / "cnn", "-o", tmp_path / "cache", "--device", "tpu"],
    }
    for message, arguments in wrong.items():
        said = tvrn("regions", *arguments, code=2)
        assert message in said.stderr and said.stdout == "" and "Traceback" not in said.stderr, said.stderr
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(towers, records, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=900))
    with pytest.raises(OSError, match="no room for a cache of .* free: free some"):
        build(towers, records, tmp_path)
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.slow
def test_real_photographs_and_a_real_tower(flickr8k, mobilenet, tmp_path):
    """Half precision loses a hundredth of what a difference between images is."""
    records = load_pairs(flickr8k, "validation", cache_dir=str(tmp_path / "datasets")).select(range(10))
    sizes = {"hidden_size": 12, "projection_size": 10, "similarity_size": 7}
    model = TVRNModel.from_backbones(vision=mobilenet, freeze_vision=True, vision_grid_size=6, **sizes).eval()
    processor = TVRNProcessor.from_captions(
        (caption for captions in records.captions for caption in captions),
        TVRNProcessor.from_backbones(mobilenet).image_processor,
    )
    cache = RegionCache.build(model, processor, records, tmp_path / "cache", batch_size=4, progress=False)
    with torch.no_grad():
        images = model.encode_images(pixel_values=all_pixels(records, processor))
        cached = model.encode_images(**cache[records.image_ids])
    torch.testing.assert_close(cached.embeds, images.embeds, atol=1e-3, rtol=0)
    assert (images.embeds[0] - images.embeds[1]).norm() > 0.05
