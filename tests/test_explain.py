"""`explain`: its numbers give the model's score, whatever the variant, and its pictures show what it says."""

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

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.explain import Explanation, explain
from modeling_tvrn.explain.picture import bar_rows
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


@pytest.mark.parametrize("refinement", ["gate", "gru"])
@pytest.mark.parametrize("switches", [{}, {"use_semantic_alignment": False}, {"use_text_refinement": False}])
def test_the_words_and_the_other_parts_add_up_to_the_score(
    processor: TVRNProcessor, refinement: str, switches: dict[str, bool]
) -> None:
    model = tiny_model(refinement=refinement, **switches)
    found = explain(model, processor, image := record(), CAPTION)
    assert found.logit == pytest.approx(score(model, processor, image, CAPTION), abs=1e-5)
    assert sum(found.parts.values()) == pytest.approx(found.logit, abs=1e-5)
    whole = sum(word.contribution for word in found.words)
    others = sum(value for name, value in found.parts.items() if name not in ("words", "late interaction"))
    assert whole + others == pytest.approx(found.logit, abs=1e-5)
    assert sum(value for _, value in bar_rows(found)) == pytest.approx(found.logit, abs=1e-5), "no part is drawn twice"
    for word in found.words:
        assert word.contribution == pytest.approx(word.reasoning + word.late_interaction, abs=1e-9)
    assert len({round(word.contribution, 6) for word in found.words}) == len(found.words), "each word has its own part"
    assert 0 < sum(word.weight for word in found.words) < 1, "the global vector has a share too"


def test_a_graph_does_not_come_apart_but_says_what_leaving_a_word_out_costs(processor: TVRNProcessor) -> None:
    model = tiny_model(similarity_head="sgr")
    found = explain(model, processor, image := record(), "two dogs run")
    assert [word.contribution for word in found.words] == [None] * 3
    assert sum(found.parts.values()) == pytest.approx(found.logit, abs=1e-5)
    assert set(found.parts) == {"graph", "late interaction", "first stage"}
    for word, rest in zip(found.words, ["dogs run", "two run", "two dogs"], strict=True):
        assert word.without == pytest.approx(found.logit - score(model, processor, image, rest), abs=1e-5)


@pytest.mark.parametrize("refinement", ["gate", "gru"])
def test_attention_and_saliencies_are_shares_of_the_valid_regions(processor: TVRNProcessor, refinement: str) -> None:
    model = tiny_model(refinement=refinement)
    image = record() | {"region_mask": torch.tensor([0, 1, 1, 0, 1, 1, 1])}
    found = explain(model, processor, image, CAPTION)
    assert found.attention.shape == (len(found.words), 5)
    np.testing.assert_allclose(found.attention.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose([found.region_saliency.sum(), found.region_weight.sum()], 1, atol=1e-6)
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


def test_what_the_score_loses_without_a_region(processor: TVRNProcessor) -> None:
    model, image = tiny_model(), record() | {"region_mask": torch.tensor([1, 0, 1, 1, 0, 1, 1])}
    found = explain(model, processor, image, CAPTION)
    for place, region in enumerate(image["region_mask"].nonzero().flatten().tolist()):
        mask = image["region_mask"].clone()
        mask[region] = 0
        rest = score(model, processor, image | {"region_mask": mask}, CAPTION)
        assert found.region_without[place] == pytest.approx(found.logit - rest, abs=1e-5)
    assert found.region == found.region_without.argmax() and len(set(found.region_without.round(5))) == 5
    assert explain(model, processor, image, CAPTION, leave_out=False).region_without is None


@pytest.mark.slow
def test_pieces_of_a_word_are_one_word(minilm: Path) -> None:
    processor = TVRNProcessor.from_backbones(text=minilm)
    model = TVRNModel.from_backbones(text=minilm, **{"region_feature_size": FEATURES, **SIZES})
    caption = "A snowboarder's jump, unbelievably high"
    found = explain(shake(model), processor, record(), caption, leave_out=False)
    assert [word.text for word in found.words] == re.findall(r"\w+|[^\w\s]", caption)
    assert [caption[slice(*word.span)] for word in found.words] == [word.text for word in found.words]
    assert sum(found.parts.values()) == pytest.approx(found.logit, rel=1e-5)


def test_a_photograph_is_shown_as_the_model_saw_it(mobilenet: Path) -> None:
    """A centre crop moves every box: drawn on the whole photograph they would lie beside what they name."""
    processor = TVRNProcessor.from_backbones(vision=mobilenet)
    processor.tokenizer = TVRNProcessor.from_captions(CAPTIONS).tokenizer
    pixels = processor.image_processor
    pixels.size, pixels.crop_size, pixels.do_center_crop = {"shortest_edge": 256}, {"height": 224, "width": 224}, True
    model = TVRNModel.from_backbones(vision=mobilenet, vision_grid_size=3, freeze_vision=True, **SIZES).eval()
    photograph = np.zeros((300, 600, 3), dtype=np.uint8)
    photograph[:, :150, 0] = 255  # red, left of the crop
    photograph[:, 300:, 2] = 255
    found = explain(model, processor, photograph, "two dogs run", leave_out=False)
    seen = np.asarray(found.picture)
    assert found.grid == (3, 3) and found.picture.size == (224, 224)
    assert seen[..., 0].max() < 40 and seen[:, 130:, 2].min() > 200, "only the middle square is there"


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
    assert len(opacities) == len(found.words) + 2 and {len(each) for each in opacities} == {regions}
    loaded = json.loads(json.dumps(found.as_dict()))
    assert loaded["words"][0]["attention"] == pytest.approx(found.words[0].attention.tolist())
    assert all(word.text in found.table() for word in found.words)


def test_without_boxes_or_picture_the_numbers_are_still_there(processor: TVRNProcessor, tmp_path: Path) -> None:
    model = tiny_model(use_geometric_context=False)
    found = explain(model, processor, {"region_features": torch.randn(5, FEATURES)}, "dogs")
    assert found.boxes is None and found.picture is None and found.words[0].without is None
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
    before = explain(model, processor, image, CAPTION, leave_out=False)
    model.calibration_scale.fill_(0.5)
    model.calibration_shift.fill_(-2.0)
    found = explain(model, processor, image, CAPTION, leave_out=False)
    assert (found.logit, found.parts) == (before.logit, before.parts) and found.score != before.score
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
    assert len(set(found.region_without.round(5))) == 4


def test_a_score_without_reasoning_is_refused(processor: TVRNProcessor) -> None:
    with pytest.raises(ValueError, match=r"\['first_stage', 'late_interaction'\] and no reasoning"):
        explain(tiny_model(use_reasoning=False), processor, record(), CAPTION)


def test_a_component_that_explain_does_not_know_is_no_silent_error(processor: TVRNProcessor) -> None:
    model = tiny_model()
    known = model.match
    model.match = lambda *arguments, **options: known(*arguments, **options) + 1.0
    with pytest.raises(RuntimeError, match="does not know"):
        explain(model, processor, record(), CAPTION)


def test_a_score_is_a_probability_however_large_the_logit() -> None:
    empty = {"caption": "", "picture": None, "words": (), "boxes": None, "grid": None, "head": "saf", "cosine": 0.0}
    empty["region_without"] = None
    made = [Explanation(**empty, region_saliency=np.ones(1), logit=x, parts={}) for x in (-900.0, 0.0, 900.0)]
    assert [each.score for each in made] == [0.0, 0.5, 1.0]
    assert TVRNConfig.model_type == "tvrn"
