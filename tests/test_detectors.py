"""Detectors of the Hub inside the model, on tiny random checkpoints of every class."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from detector_makers import CONFIGS, PROCESSORS, QUERIES, SIDE, VIT, detector_config, make_detector
from dual_encoder_makers import dual_encoder, save_dual_encoder
from torch import Tensor
from torch.testing import assert_close
from training_makers import tiny_config, write_images
from transformers import (
    AutoModelForObjectDetection,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
    ViTConfig,
    ViTModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # see processing_tvrn
from typer.testing import CliRunner

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.cli.app import app
from modeling_tvrn.detectors_tvrn import detect, non_maximum_suppression
from modeling_tvrn.explain import explain
from modeling_tvrn.front_door import load_model
from modeling_tvrn.hub import doctor
from modeling_tvrn.index import ImageTextIndex
from modeling_tvrn.layers_tvrn import pool_boxes
from modeling_tvrn.teachers import StaleStoreError
from modeling_tvrn.towers_tvrn import region_map
from modeling_tvrn.training.loop import Training

SIZES: dict[str, Any] = {"hidden_size": 8, "projection_size": 6, "similarity_size": 5, "max_regions": 6}
# Hybrid detectors have hundreds of layers however small they are: seconds to build and load.
QUICK_FIRST = [kind if kind in PROCESSORS else pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS]
CAPTIONS = ["a red square left of a circle", "two blue circles"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("hub")
    return lambda kind: folder / kind if (folder / kind).exists() else make_detector(folder / kind, kind)


@pytest.fixture(scope="module")
def pictures() -> list[PIL.Image.Image]:
    """A wide, a square and a tall one."""
    random = np.random.default_rng(0)
    sizes = ((40, 80, 3), (60, 60, 3), (90, 50, 3))
    return [PIL.Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def made(hub: Callable[[str], Path]) -> Callable[[str], tuple[TVRNModel, TVRNProcessor]]:
    """One model of each class for the tests that leave it as it is: building these takes longer than running them."""
    return functools.cache(lambda kind: on(hub(kind)))


def tvrn(*arguments: object, code: int = 0) -> Any:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code == code, f"{outcome.stdout}\n{outcome.stderr}\n{outcome.exception!r}"
    return outcome


def on(detector: Path, **config: Any) -> tuple[TVRNModel, TVRNProcessor]:
    torch.manual_seed(1)
    processor = TVRNProcessor.from_captions(CAPTIONS)
    seeing = TVRNProcessor.from_backbones(detector=detector)
    processor.image_processor = seeing.image_processor
    model = TVRNModel.from_backbones(detector=detector, vocab_size=20, **{**SIZES, **config})
    return model.eval(), processor


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pictures_regions_are_its_own_whatever_shares_its_batch(
    kind: str, made: Callable[[str], tuple[TVRNModel, TVRNProcessor]], pictures: list[PIL.Image.Image]
) -> None:
    model, processor = made(kind)
    with torch.no_grad():
        features, boxes, mask = model.extract_regions(**processor(images=pictures))
        alone = [model.extract_regions(**processor(images=picture)) for picture in pictures]
    assert boxes.shape == (3, 6, 4) and mask.shape == (3, 6) and mask.any(dim=1).all()
    assert ((boxes >= 0) & (boxes <= 1)).all() and (boxes[mask][:, 2:] > boxes[mask][:, :2]).all()
    assert features.std() > 0.01 and features.shape[-1] == model.config.region_feature_size
    for row, found in enumerate(alone):
        for mine, whole in zip(found, (features, boxes, mask), strict=True):
            assert_close(mine[0], whole[row], atol=5e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [each for each in QUICK_FIRST if each != "owlv2"])
def test_the_boxes_are_those_of_transformers_own_post_processing(
    kind: str, hub: Callable[[str], Path], pictures: list[PIL.Image.Image]
) -> None:
    """In pixels of the user's picture, whatever its aspect ratio, and in the order of their scores."""
    model, processor = on(hub(kind), max_regions=QUERIES)
    picture = pictures[0]
    with torch.no_grad():
        _, boxes, mask = model.extract_regions(**processor(images=picture))
        own = AutoModelForObjectDetection.from_pretrained(hub(kind)).eval()
        image_processor = AutoImageProcessor.from_pretrained(hub(kind), backend="pil")
        output = own(pixel_values=image_processor(images=picture, return_tensors="pt")["pixel_values"])
    sizes = [(picture.height, picture.width)]
    found = image_processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)[0]
    size = torch.tensor([picture.width, picture.height]).repeat(2)
    inside = (found["boxes"] / size).clamp(0, 1)
    order = found["scores"].argsort(descending=True, stable=True)
    expected = [box for box in inside[order] if (box[2:] > box[:2]).all()]
    best = {tuple(box.round(decimals=4).tolist()) for box in boxes[0][mask[0]]}
    # Focal detectors' post-processing may name a box once a class.
    assert best == {tuple(box.round(decimals=4).tolist()) for box in expected} or kind not in PROCESSORS
    assert_close(boxes[0, 0], expected[0], atol=1e-4, rtol=1e-4)


def test_boxes_of_owlv2_are_fractions_of_the_picture_not_of_the_padded_square(
    hub: Callable[[str], Path], pictures: list[PIL.Image.Image]
) -> None:
    model, processor = on(hub("owlv2"), nms_iou=1.0)
    inputs = processor(images=pictures)
    assert_close(inputs["pixel_extents"], torch.tensor([[0.5, 1.0], [1.0, 1.0], [1.0, 50 / 90]]))
    detector: Any = model.detector
    with torch.no_grad():
        _, boxes, _ = model.extract_regions(**inputs)
        grid, _ = detector.image_embedder(pixel_values=inputs["pixel_values"])
        tokens = grid.flatten(1, 2)
        raw, scores = detector.box_predictor(tokens, grid), detector.objectness_predictor(tokens)
    corners = torch.cat([raw[..., :2] - raw[..., 2:] / 2, raw[..., :2] + raw[..., 2:] / 2], dim=-1)
    corners = (corners * torch.tensor([[[1.0, 2, 1, 2]], [[1, 1, 1, 1]], [[1.8, 1, 1.8, 1]]])).clamp(0, 1)
    seen = (corners[..., 2:] > corners[..., :2]).all(dim=-1)
    best = scores.masked_fill(~seen, -torch.inf).argmax(dim=1)
    assert_close(boxes[:, 0], corners[torch.arange(3), best])


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK_FIRST)
def test_a_saved_model_scores_as_before_and_its_detector_stays_as_it_is(
    kind: str, made: Callable[[str], tuple[TVRNModel, TVRNProcessor]], pictures: list[PIL.Image.Image], tmp_path: Path
) -> None:
    model, processor = made(kind)
    inputs = processor(images=pictures, text=CAPTIONS)
    before = model(**inputs).logits_per_image
    model.train()
    assert model.detector is not None and not any(module.training for module in model.detector.modules())
    loss = model(**processor(images=pictures[:2], text=CAPTIONS), return_loss=True).loss
    assert loss is not None
    loss.backward()
    model.eval()
    assert all(weight.grad is None for weight in model.detector.parameters())
    assert model.region_projection.weight.grad is not None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reading = TVRNModel.from_pretrained(tmp_path).eval(), TVRNProcessor.from_pretrained(tmp_path)
    assert_close(again(**reading(images=pictures, text=CAPTIONS)).logits_per_image, before, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK_FIRST)
def test_of_an_unfrozen_detector_everything_learns_that_features_depend_on(
    kind: str, hub: Callable[[str], Path], pictures: list[PIL.Image.Image]
) -> None:
    model, processor = on(hub(kind), freeze_detector=False)
    model.train()
    loss = model(**processor(images=pictures[:2], text=CAPTIONS), return_loss=True).loss
    assert loss is not None and model.detector is not None
    loss.backward()
    learning = {name: weight for name, weight in model.detector.named_parameters() if weight.requires_grad}
    assert learning and [name for name, weight in learning.items() if weight.grad is None] == []


def naive_suppression(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    def overlap(one: Tensor, other: Tensor) -> float:
        low, high = torch.maximum(one[:2], other[:2]), torch.minimum(one[2:], other[2:])
        shared = float((high - low).clamp_min(0).prod())
        return shared / float((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared)

    kept: list[int] = []
    for place in scores.argsort(descending=True).tolist():
        if scores[place] > -torch.inf and all(overlap(boxes[place], boxes[other]) <= threshold for other in kept):
            kept.append(place)
    return kept


@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0])
def test_suppression_keeps_what_a_naive_one_keeps(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(4, 40, 2, generator=generator) * 0.6
    boxes = torch.cat([low, low + 0.05 + 0.35 * torch.rand(4, 40, 2, generator=generator)], dim=-1)
    scores = torch.randn(4, 40, generator=generator)
    scores[0, ::3] = -torch.inf
    found, places = non_maximum_suppression(boxes, scores, threshold, 40)
    for row in range(4):
        expected = naive_suppression(boxes[row], scores[row], threshold)
        assert places[row][found[row] > -torch.inf].tolist() == expected
    fewer, first = non_maximum_suppression(boxes, scores, threshold, 3)
    assert torch.equal(fewer, found[:, :3]) and torch.equal(first, places[:, :3])


def test_a_picture_where_nothing_is_found_is_one_region(
    hub: Callable[[str], Path], pictures: list[PIL.Image.Image]
) -> None:
    model, processor = on(hub("detr"))
    detector: Any = model.detector
    head = detector.bbox_predictor.layers[-1]
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.0, 0.0, -200.0, -200.0])  # boxes without width and height
    with torch.no_grad():
        _, boxes, mask = model.extract_regions(**processor(images=pictures))
    assert mask.tolist() == [[True] + [False] * 5] * 3
    assert boxes[:, 0].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 3 and not boxes[:, 1:].any()
    assert torch.isfinite(model(**processor(images=pictures, text=CAPTIONS)).logits_per_image).all()


# -- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_regions": 13}, "max_regions is 13, but the detector ('yolos') finds 12 boxes in an image"),
        ({"max_regions": 0}, "max_regions is 0; expected a whole number of at least 1"),
        ({"nms_iou": 1.5}, "nms_iou is 1.5; expected None or a number above 0"),
        ({"region_source": "boxes"}, "region_source is 'boxes'; expected one of 'hidden_state', 'pooled_map'"),
        ({"region_source": "pooled_map"}, "no vision tower or dual encoder with a map to pool"),
        ({"region_feature_size": 17}, "region_feature_size is 17, but the hidden size of the detector ('yolos')"),
        ({"vision_grid_size": 3}, "vision_grid_size is 3, but the regions are the detector's boxes"),
        ({"vision_config": VIT | {"model_type": "vit"}}, "so nothing reads the vision tower ('vit')"),
        ({"detector_config": None, "region_source": "pooled_map"}, "there is no detector; set detector_config"),
        ({"detector_config": {"model_type": "owlvit"}}, "'owlvit' can't be the detector: without a text"),
        ({"detector_config": {"model_type": "detr"}}, "its backbone is one of timm"),
        ({"detector_config": {"model_type": "bert"}}, "'bert' can't be the detector: no detector"),
    ],
)
def test_a_configuration_that_contradicts_its_detector_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"detector_config": detector_config("yolos"), "region_feature_size": 16, "max_regions": 6}
    TVRNConfig(**fields)
    with pytest.raises(ValueError) as caught:
        TVRNConfig(**(fields | changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["vision", "text", "detector"])
def test_a_tower_named_by_id_and_by_configuration_is_refused(name: str) -> None:
    message = f"{name} is 'some/model', whose configuration is its own, but {name}_config came too"
    with pytest.raises(ValueError, match=message):
        TVRNModel.from_backbones(**{name: "some/model", f"{name}_config": {"model_type": "vit"}})


def test_a_detector_given_as_vision_tower_is_told_where_it_goes(hub: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"it is a detector \('yolos'\); give it as detector=….*google/vit-base"):
        TVRNModel.from_backbones(vision=hub("yolos"))


@pytest.mark.parametrize("kind", ["rf_detr", "owlvit", "vit"])
def test_a_checkpoint_that_cannot_be_the_detector_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    reason = {"rf_detr": "needs torchvision", "owlvit": "OWLv2 does", "vit": "a vision model goes to vision="}[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for part in (TVRNModel, TVRNProcessor):
        with pytest.raises(ValueError, match=f"'{kind}' can't be the detector.*{reason}.*Expected one of d_fine"):
            part.from_backbones(detector=tmp_path)


def test_an_image_processor_that_crops_is_refused(hub: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(hub("yolos"), tmp_path / "crops")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"do_center_crop": True}))
    with pytest.raises(ValueError, match="YolosImageProcessorPil of .* crops"):
        TVRNProcessor.from_backbones(detector=folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pixel_extents": torch.ones(2, 3)}, r"pixel_extents has shape \(2, 3\)"),
        ({"pixel_extents": torch.tensor([[1.0, 0.0], [1, 1]])}, "above 0 and up to 1"),
        ({"detector_pixel_values": torch.zeros(2, 3, 48, 48)}, "only a model with region_source='pooled_map' reads"),
        ({"region_boxes": torch.zeros(2, 6, 4)}, "the tower's own grid or the detector's boxes"),
    ],
)
def test_inputs_that_this_detector_does_not_take_are_refused(
    given: dict[str, Any], message: str, made: Callable[[str], tuple[TVRNModel, TVRNProcessor]]
) -> None:
    model, _ = made("yolos")
    with pytest.raises(ValueError, match=message):
        model.encode_images(torch.zeros(2, 3, 48, 48), **given)


# -- boxes of a detector, features of a vision tower ----------------------------------------------------------------


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory, hub: Callable[[str], Path]) -> dict[str, tuple[Any, Any]]:
    """A ViT whose own image processor crops, and a SigLIP that only resizes, both beside YOLOS: models, processors."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(2)
    ViTModel(ViTConfig(**VIT)).save_pretrained(folder / "vit")
    crops = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True}
    CLIPImageProcessorPil(**crops).save_pretrained(folder / "vit")
    save_dual_encoder(folder / "siglip", "siglip")
    side = dual_encoder("siglip").config.vision_config.image_size
    settings = SiglipImageProcessorPil(size={"height": side, "width": side})
    settings.save_pretrained(folder / "siglip")
    (folder / "siglip" / "processor_config.json").unlink(missing_ok=True)
    yolos = hub("yolos")
    processor = TVRNProcessor.from_backbones(folder / "vit", detector=yolos)
    processor.tokenizer = TVRNProcessor.from_captions(CAPTIONS).tokenizer
    vit = TVRNModel.from_backbones(folder / "vit", detector=yolos, vocab_size=20, freeze_vision=True, **SIZES)
    sizes = {name: size for name, size in SIZES.items() if name != "projection_size"}
    siglip = TVRNModel.from_dual_encoder(folder / "siglip", detector=yolos, component_weight_init_value=0.5, **sizes)
    return {
        "vit": (vit.eval(), processor),
        "siglip": (siglip.eval(), TVRNProcessor.from_dual_encoder(folder / "siglip", detector=yolos)),
    }


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_a_detectors_boxes_are_pooled_out_of_the_map_beside_it(
    kind: str, beside: dict[str, tuple[Any, Any]], pictures: list[PIL.Image.Image], tmp_path: Path
) -> None:
    model, processor = beside[kind]
    inputs = processor(images=pictures)
    assert set(inputs) == {"pixel_values", "detector_pixel_values", "pixel_extents"}
    assert set(inputs) <= set(processor.model_input_names)
    with torch.no_grad():
        features, boxes, mask = model.extract_regions(**inputs)
        _, found, _ = detect(model.detector, inputs["detector_pixel_values"], inputs["pixel_extents"], 6, None)
        tower = model.tower("vision")
        grid = region_map(tower(inputs["pixel_values"]), inputs["pixel_values"], model.config.vision_tower_config)
        logits = model(**processor(images=pictures, text=CAPTIONS)).logits_per_image
    assert torch.equal(boxes, found) and mask.all()
    assert_close(features, pool_boxes(grid, boxes))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reading = TVRNModel.from_pretrained(tmp_path).eval(), TVRNProcessor.from_pretrained(tmp_path)
    assert type(reading.detector_image_processor) is type(processor.detector_image_processor)
    assert_close(again(**reading(images=pictures, text=CAPTIONS)).logits_per_image, logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="without detector_pixel_values"):
        model.encode_images(inputs["pixel_values"])


def test_a_dual_encoder_that_crops_is_refused_beside_a_detector(tmp_path: Path, hub: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="crops or pads pictures, so its map and a detector's boxes"):
        TVRNProcessor.from_dual_encoder(save_dual_encoder(tmp_path, "clip"), detector=hub("yolos"))


# -- what is made with it -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["yolos", "vit"])
def test_an_explanation_shows_the_boxes_on_the_users_own_picture(
    kind: str,
    made: Callable[[str], tuple[TVRNModel, TVRNProcessor]],
    beside: dict[str, tuple[Any, Any]],
    pictures: list[PIL.Image.Image],
    tmp_path: Path,
) -> None:
    model, processor = beside[kind] if kind in beside else made(kind)
    found = explain(model, processor, pictures[0], CAPTIONS[0])
    assert found.picture is not None and found.picture.size == pictures[0].size and found.grid is None
    with torch.no_grad():
        boxes = model.extract_regions(**processor(images=pictures[0]))[1]
    assert found.boxes is not None
    np.testing.assert_allclose(found.boxes, boxes[0], atol=1e-5)
    assert found.save_picture(tmp_path / "explained.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_verb_stores_what_the_model_sees_and_training_reads_it(hub: Callable[[str], Path], tmp_path: Path) -> None:
    data, detector = write_images(tmp_path / "data"), hub("yolos")
    arguments = ["regions", data, "--detector", detector, "--max-regions", 5, "--device", "cpu", "--dtype", "float32"]
    keys: dict[str, Any] = {"detector": str(detector), "model": {"max_regions": 5, "dropout": 0.0}, "data_options": {}}
    regions = str(tmp_path / "regions" / "{split}")
    with pytest.raises(ValueError, match=f"tvrn regions .* --detector {detector} --split train"):
        Training(tiny_config(data, tmp_path / "run", **keys, regions=regions))
    for split in ("train", "validation"):
        tvrn(*arguments, "--split", split, "--output", regions.replace("{split}", split))
    live = Training(tiny_config(data, tmp_path / "live", **keys))
    cached = Training(tiny_config(data, tmp_path / "cached", **keys, regions=regions))
    assert cached.train_records[0]["region_features"].shape == (5, 16)
    losses = []
    for run in (live, cached):
        run.fit()
        losses.append([event["loss"] for event in run.progress.history if "loss" in event])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    other = tiny_config(data, tmp_path / "other", **keys | {"model": {"max_regions": 4}}, regions=regions)
    with pytest.raises(StaleStoreError, match="max_regions"):
        Training(other)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        PIL.Image.new("RGB", (30 + number, 20), (80 * number, 9, 9)).save(tmp_path / "photos" / f"{number}.png")
    index = ImageTextIndex.build(*load_model(tmp_path / "live"), tmp_path / "photos", progress=False)
    assert {Path(hit.id).name for hit in index.search(text="red")} == {"0.png", "1.png", "2.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --features MODEL, --detector ID, or both"),
        (["--detector", "some/detector", "--boxes-column", "boxes"], "--boxes-column needs --features"),
        (
            ["--detector", "some/detector", "--grid-size", 3],
            "--grid-size and --detector are two ways to choose",
        ),
    ],
)
def test_the_verb_takes_one_way_to_choose_regions(options: list[Any], message: str, tmp_path: Path) -> None:
    assert message in tvrn("regions", "scenes", *options, "--output", tmp_path / "cache", code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["yolos", "detr", "d_fine", "rt_detr", "owlv2"])
def test_an_export_finds_in_pixels_what_the_model_finds(
    kind: str,
    made: Callable[[str], tuple[TVRNModel, TVRNProcessor]],
    pictures: list[PIL.Image.Image],
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxscript")
    from modeling_tvrn.export import OnnxModel, export_onnx
    from modeling_tvrn.export.tvrn_onnx import cat

    model, processor = made(kind)
    report = export_onnx(model, processor, tmp_path / "onnx")
    assert report.reads_images == (kind not in PROCESSORS)
    runner = OnnxModel(tmp_path / "onnx", threads=1)
    alone = [dict(processor(images=picture)) for picture in pictures]
    if kind == "owlv2":  # whose processor says nothing of a square
        alone = [{"pixel_extents": torch.ones(1, 2), **inputs} for inputs in alone]
    images = cat([runner.encode_images(**{key: each.numpy() for key, each in inputs.items()}) for inputs in alone])
    with torch.no_grad():
        wanted = model(**processor(images=pictures, text=CAPTIONS)).logits_per_image
    np.testing.assert_allclose(runner.match(images, runner.encode_texts(CAPTIONS)), wanted.numpy(), atol=1e-4)
    if report.reads_images:
        np.testing.assert_allclose(runner.encode_images(pictures)["images.embeds"], images["images.embeds"], atol=1e-6)


def test_an_export_that_would_need_two_sets_of_pixels_is_refused(
    beside: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    from modeling_tvrn.export import export_onnx

    with pytest.raises(ValueError, match="two sets of pixels"):
        export_onnx(*beside["vit"], tmp_path / "onnx")


@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong(beside: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    model, processor = beside["vit"]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    report = doctor(tmp_path, trust_remote_code=True)
    assert report.ok, report
