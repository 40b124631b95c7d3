"""`explain`: its numbers give the model's score, whatever the variant, and its pictures show what it says."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoder_makers import save_dual_encoder
from model_makers import FEATURES, SIZES, overlapping_boxes, shake, tiny_model
from reference import Reference, softmax

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.explain import explain
from modeling_tvrn.layers_tvrn import grid_boxes

CAPTION = "Two dogs run, one <b>barks</b>"
CAPTIONS = [CAPTION, "a red kite over the sea"]


@pytest.fixture(scope="module")
def processor() -> TVRNProcessor:
    return TVRNProcessor.from_captions(CAPTIONS)


def record(count: int = 7, grid: tuple[int, int] | None = None) -> dict[str, Any]:
    """An image as a detector or a grid gives it, with its picture."""
    boxes = grid_boxes(*grid) if grid else overlapping_boxes(count).float()
    picture = np.random.default_rng(0).integers(0, 255, (31, 47, 3), dtype=np.uint8)
    return {"region_features": torch.randn(len(boxes), FEATURES), "region_boxes": boxes, "image": picture}


def score(model: Any, processor: Any, image: dict[str, Any], text: str) -> float:
    regions = {name: [image[name]] for name in ("region_features", "region_boxes", "region_mask") if name in image}
    with torch.no_grad():
        return float(model(**processor(**regions, text=text)).logits_per_image)


@pytest.mark.parametrize(
    "settings",
    [{}, {"refinement": "gru"}, {"similarity_head": "sgr"}, {"use_text_refinement": False}, {"use_reasoning": False}],
)
def test_a_word_has_one_number_what_the_score_loses_without_it(
    processor: TVRNProcessor, settings: dict[str, Any]
) -> None:
    """And with what no single word has the numbers add up to the model's logit, whatever its components."""
    model = tiny_model(**settings)
    found = explain(model, processor, image := record(), "two dogs run")
    assert found.logit == pytest.approx(score(model, processor, image, "two dogs run"), abs=1e-5)
    for word, rest in zip(found.words, ["dogs run", "two run", "two dogs"], strict=True):
        assert word.contribution == pytest.approx(found.logit - score(model, processor, image, rest), abs=1e-5)
    assert sum(word.contribution for word in found.words) + found.together == pytest.approx(found.logit, abs=1e-6)
    assert sum(found.components.values()) == pytest.approx(found.logit, abs=1e-5)
    alone = explain(model, processor, image, "dogs")
    assert alone.words[0].contribution == alone.logit and alone.together == 0


@pytest.mark.slow
def test_table_picture_and_page_show_the_same_numbers_which_add_up(processor: TVRNProcessor) -> None:
    found = explain(tiny_model(), processor, record(grid=(2, 3)), CAPTION)
    page = [float(number) for number in re.findall(r"<td>([+-][0-9.]+)</td>", found.to_html())]
    table = [float(re.search(r" ([+-][0-9.]+)", line)[1]) for line in found.table().splitlines()[1:-1]]
    picture = [float(text.get_text()) for text in found.figure().axes[0].texts]
    assert page == table == picture == [number for _, number in found.summands] + [found.total]
    assert sum(page[:-1]) == pytest.approx(page[-1], abs=1e-9)


@pytest.mark.parametrize("refinement", ["gate", "gru"])
def test_attention_and_saliencies_are_shares_of_the_valid_regions(processor: TVRNProcessor, refinement: str) -> None:
    model = tiny_model(refinement=refinement)
    image = record() | {"region_mask": torch.tensor([0, 1, 1, 0, 1, 1, 1])}
    found = explain(model, processor, image, CAPTION)
    assert found.attention.shape == (len(found.words), 5)
    np.testing.assert_allclose(found.attention.sum(axis=1), 1, atol=1e-6)
    assert found.region_saliency.sum() == pytest.approx(1, abs=1e-6)
    kept = image["region_boxes"][image["region_mask"].bool()]
    np.testing.assert_allclose(found.boxes, kept, atol=1e-6)
    saliency = [word.saliency for word in found.words]
    assert np.mean(saliency) == pytest.approx(1, abs=1e-5) and np.ptp(saliency) > 0


def test_where_each_word_looks_is_what_the_equations_say(processor: TVRNProcessor) -> None:
    """Against the float64 NumPy reference: affinity over words, softmax over regions with their saliency (§4)."""
    model, image = tiny_model(), record()
    found = explain(model, processor, image, "two dogs run")
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    reference = Reference(weights, model.config)
    seen = reference.image(image["region_features"].double().numpy(), image["region_boxes"].double().numpy())
    text = reference.text(processor(text="two dogs run")["input_ids"][0].tolist())
    tokens = reference.refine("textual_refinement", text.words, reference.attend(text.contexts, seen.contexts))
    affinity = np.array([[reference.leaky(word @ region) for region in seen.tokens] for word in tokens])
    affinity /= np.linalg.norm(affinity, axis=0)
    looks = np.array([softmax(model.config.attention_scale * row + np.log(seen.saliency)) for row in affinity])
    np.testing.assert_allclose(found.attention, looks, atol=1e-5)
    np.testing.assert_allclose(found.region_saliency, seen.saliency, atol=1e-5)
    wanted = reference.word_weights(seen, tokens)
    np.testing.assert_allclose([word.saliency for word in found.words], wanted, atol=1e-5)
    assert found.logit == pytest.approx(reference.pair(seen, text), abs=1e-4)
    assert np.ptp(looks, axis=0).max() > 0.02


def test_what_the_score_and_each_word_lose_without_a_region(processor: TVRNProcessor) -> None:
    model, image = tiny_model(), record() | {"region_mask": torch.tensor([1, 0, 1, 1, 0, 1, 1])}
    found = explain(model, processor, image, "two dogs")
    for place, region in enumerate(image["region_mask"].nonzero().flatten().tolist()):
        mask = image["region_mask"].clone()
        mask[region] = 0
        rest, rest_of_dogs = (
            score(model, processor, image | {"region_mask": mask}, text) for text in ("two dogs", "two")
        )
        assert found.by_region[place] == pytest.approx(found.logit - rest, abs=1e-5)
        kept = rest - rest_of_dogs
        assert found.words[1].by_region[place] == pytest.approx(found.words[1].contribution - kept, abs=1e-5)
    assert len(set(found.by_region.round(5))) == 5
    assert explain(model, processor, image, CAPTION, leave_out_regions=False).by_region is None


@pytest.mark.slow
def test_pieces_of_a_word_are_one_word(minilm: Path) -> None:
    processor = TVRNProcessor.from_backbones(text=minilm)
    model = TVRNModel.from_backbones(text=minilm, **{"region_feature_size": FEATURES, **SIZES})
    caption = "A snowboarder's jump, unbelievably high"
    found = explain(shake(model), processor, record(), caption, leave_out_regions=False)
    assert [word.text for word in found.words] == re.findall(r"\w+|[^\w\s]", caption)
    assert [caption[slice(*word.span)] for word in found.words] == [word.text for word in found.words]


@pytest.mark.slow
@pytest.mark.parametrize(("crop", "seen"), [(True, (0.28125, 0.0625, 0.71875, 0.9375)), (False, (0.0, 0.0, 1.0, 1.0))])
def test_a_photograph_keeps_its_shape_and_its_boxes_lie_on_what_the_model_saw(
    mobilenet: Path, crop: bool, seen: tuple[float, ...]
) -> None:
    processor = TVRNProcessor.from_backbones(vision=mobilenet)
    processor.tokenizer = TVRNProcessor.from_captions(CAPTIONS).tokenizer
    pixels = processor.image_processor
    pixels.size, pixels.do_center_crop = {"shortest_edge": 256} if crop else {"height": 224, "width": 224}, crop
    pixels.crop_size = {"height": 224, "width": 224}
    model = TVRNModel.from_backbones(vision=mobilenet, vision_grid_size=3, freeze_vision=True, **SIZES).eval()
    photograph = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
    found = explain(model, processor, photograph, "two dogs run", leave_out_regions=False)
    assert found.grid == (3, 3) and found.picture.size == (600, 300)
    np.testing.assert_allclose([*found.cells[0, :2], *found.cells[-1, 2:]], seen, atol=0.005)
    middle = [seen[0] + (seen[2] - seen[0]) / 3, seen[1] + (seen[3] - seen[1]) / 3]
    np.testing.assert_allclose(found.cells[4, :2], middle, atol=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_picture_page_and_json_need_nothing_else(processor: TVRNProcessor, tmp_path: Path, grid: Any) -> None:
    found = explain(tiny_model(), processor, record(grid=grid), CAPTION)
    assert found.grid == grid
    assert found.save_picture(tmp_path / "new" / "e.png").read_bytes().startswith(b"\x89PNG")
    page = found.save_html(tmp_path / "e.html").read_text("utf-8")
    assert "<b>barks" not in page and "&lt;b" in page, "a caption is text, never markup"
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "http" not in page, "nothing is fetched"
    regions = len(found.boxes)
    assert page.count('class="region"') == regions
    opacities = [json.loads(value) for value in re.findall(r'data-opacity="([^"]+)"', page)]
    assert len(opacities) == len(found.words) + 1 and {len(each) for each in opacities} == {regions}
    loaded = json.loads(json.dumps(found.as_dict()))
    assert loaded["words"][0]["attention"] == pytest.approx(found.words[0].attention.tolist())
    assert all(word.text in found.table() for word in found.words)


@pytest.mark.slow
def test_without_boxes_or_picture_the_numbers_are_still_there(processor: TVRNProcessor, tmp_path: Path) -> None:
    model = tiny_model(use_geometric_context=False)
    found = explain(model, processor, {"region_features": torch.randn(5, FEATURES)}, "dogs")
    assert found.boxes is None and found.picture is None and found.words[0].contribution == found.logit
    assert found.save_picture(tmp_path / "e.png").stat().st_size > 0 and "<svg" in found.to_html()


def test_a_model_in_training_comes_back_to_it_and_its_dropout_is_off(processor: TVRNProcessor) -> None:
    model = tiny_model(dropout=0.5).train()
    image = record()
    first, second = (explain(model, processor, image, CAPTION).logit for _ in range(2))
    assert first == second and model.training


def test_wrong_input_is_refused_with_what_was_expected(processor: TVRNProcessor) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="one caption"):
        explain(model, processor, record(), ["two", "captions"])
    with pytest.raises(ValueError, match="expected a PIL image"):
        explain(model, processor, 3, CAPTION)
    with pytest.raises(ValueError, match="columns is 0"):
        explain(model, processor, record(), CAPTION).figure(columns=0)


def test_the_score_is_the_models_calibrated_one(processor: TVRNProcessor) -> None:
    model, image = tiny_model(), record()
    before = explain(model, processor, image, CAPTION, leave_out_regions=False)
    model.calibration_scale.fill_(0.5)
    model.calibration_shift.fill_(-2.0)
    found = explain(model, processor, image, CAPTION, leave_out_regions=False)
    assert (found.logit, found.summands) == (before.logit, before.summands) and found.score != before.score
    assert found.score == pytest.approx(float(model.scores(torch.tensor(found.logit))), abs=1e-6)


def test_a_photograph_scored_over_a_dual_encoder(tmp_path: Path) -> None:
    """Its regions and its embedding are of one pass, so leaving a region out leaves the first stage as it is."""
    folder = save_dual_encoder(tmp_path / "clip")
    sizes = {"hidden_size": 24, "similarity_size": 12, "vision_grid_size": 2, "component_weight_init_value": 0.5}
    model, clip = TVRNModel.from_dual_encoder(folder, **sizes), TVRNProcessor.from_dual_encoder(folder)
    photograph = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    found = explain(model, clip, photograph, "a dog runs in snow")
    with torch.no_grad():
        wanted = model.eval()(**clip(images=[photograph], text="a dog runs in snow"))
    assert found.logit == pytest.approx(float(wanted.logits_per_image), abs=1e-4)
    assert [word.text for word in found.words] == ["a", "dog", "runs", "in", "snow"] and found.grid == (2, 2)
    assert len(set(found.by_region.round(5))) == 4


def test_regions_that_do_nothing_for_a_word_are_not_drawn(processor: TVRNProcessor) -> None:
    found = explain(tiny_model(), processor, record(grid=(2, 2)), "two dogs run")
    flat = dataclasses.replace(found.words[0], by_region=np.zeros(4))
    even = dataclasses.replace(found, words=(flat, *found.words[1:]))
    assert even.strength(flat.by_region) is None and "no one region speaks for it" in even.to_html()
    assert found.strength(np.array([2.0, -1.0, 1.0, 0.0])).tolist() == [1.0, 0.0, 0.5, 0.0]
    assert even.strength(even.by_region * 0 - 1) is None, "what speaks against it only"
