"""The model computes its equations: in float64 it agrees with loops in NumPy that know no batch, mask or chunk."""

import numpy as np
import pytest
import torch
from model_makers import (
    FEATURES,
    HEADS,
    SIZES,
    SWITCHES,
    VARIANTS,
    name,
    overlapping_boxes,
    regions,
    tiny_model,
    words,
)
from reference import Reference
from transformers import BertConfig, ResNetConfig

from modeling_tvrn import TVRNModel
from modeling_tvrn.layers_tvrn import grid_boxes

BERT = {"hidden_size": 22, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 41, "vocab_size": 31}


def double_model(**settings) -> tuple[TVRNModel, Reference]:
    model = tiny_model(**settings).double()
    return model, Reference({k: v.numpy() for k, v in model.state_dict().items()}, model.config)


def reference_images(reference: Reference, inputs: dict[str, torch.Tensor]) -> list:
    arrays = [inputs[f"region_{kind}"].numpy() for kind in ("features", "boxes", "mask")]
    return [reference.image(features[mask], boxes[mask]) for features, boxes, mask in zip(*arrays, strict=True)]


def reference_texts(reference: Reference, inputs: dict[str, torch.Tensor]) -> list:
    kept = zip(inputs["input_ids"], inputs["word_mask"].bool(), strict=True)
    return [reference.text(ids[mask].tolist()) for ids, mask in kept]


def assert_agrees(model: TVRNModel, reference: Reference, image_inputs, text_inputs, texts) -> None:
    """Logits, embeddings and what the global vectors are made of, to 1e-9."""
    with torch.no_grad():
        output = model(**image_inputs, **text_inputs)
        unified = model.encode_images(**image_inputs)
    images = reference_images(reference, image_inputs)
    scores = [[reference.pair(image, text) for text in texts] for image in images]
    for ours, expected in (
        (output.logits_per_image, scores),
        (output.logits_per_text.T, scores),
        (output.image_embeds, [image.embedding for image in images]),
        (output.text_embeds, [text.embedding for text in texts]),
        (unified.global_vector, [image.overall for image in images]),
    ):
        np.testing.assert_allclose(ours.numpy(), np.array(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_every_variant(variant):
    """Ragged regions and words, with holes in the masks and other numbers behind them."""
    model, reference = double_model(**variant)
    images, captions = regions(3, 5, torch.float64), words(3, 6)
    texts = reference_texts(reference, captions)
    assert_agrees(model, reference, images, captions, texts)


@pytest.mark.parametrize("variant", HEADS, ids=name)
def test_a_hub_text_tower(variant):
    """Special tokens are not matched, but are part of the mean that the embedding sees."""
    model, reference = double_model(text_config=BertConfig(**BERT), **variant)
    images, captions = regions(2, 4, torch.float64), words(4, 7)
    with torch.no_grad():
        hidden = model.extract_words(captions["input_ids"], captions["attention_mask"]).numpy()
    attended, word = (captions[key].bool().numpy() for key in ("attention_mask", "word_mask"))
    texts = [reference.text(features=h[a], is_word=w[a]) for h, a, w in zip(hidden, attended, word, strict=True)]
    assert_agrees(model, reference, images, captions, texts)
    del captions["input_ids"]
    assert_agrees(model, reference, images, captions | {"text_features": torch.from_numpy(hidden)}, texts)


@pytest.mark.slow
@pytest.mark.parametrize("variant", HEADS, ids=name)
@pytest.mark.parametrize("grid", [None, 2])
def test_pixels(variant, grid):
    """A tower's map row by row, and for boxes the cell with the eight around it."""
    tower = ResNetConfig(embedding_size=8, hidden_sizes=[10], depths=[1], layer_type="basic")
    model, reference = double_model(
        vision_config=tower, region_feature_size=10, vision_grid_size=grid, iou_threshold=0.5, **variant
    )
    pixels, captions = torch.randn(2, 3, 32, 48, dtype=torch.float64), words(2, 5)
    with torch.no_grad():
        maps = model.vision_model(pixels).last_hidden_state
        maps = torch.nn.functional.adaptive_avg_pool2d(maps, grid) if grid else maps
        ours = model(pixel_values=pixels, **captions)
    rows, columns = maps.shape[2:]
    boxes = [
        [max(x - 1, 0) / columns, max(y - 1, 0) / rows, min(x + 2, columns) / columns, min(y + 2, rows) / rows]
        for y in range(rows)
        for x in range(columns)
    ]
    for i, k in np.ndindex(2, 2):
        cells = np.array([maps[i, :, y, x].numpy() for y in range(rows) for x in range(columns)])
        ids = captions["input_ids"][k, captions["word_mask"][k].bool()].tolist()
        score = reference.score(cells, np.array(boxes), ids=ids)
        np.testing.assert_allclose(ours.logits_per_image[i, k].item(), score, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_pooled_features": False},
        {"use_refined_features": False},
        {"pooled_hidden_size": 0},
        {"iou_threshold": 0.0},
        {"attention_scale": 3},
        {"leaky_slope": 0.3},
    ],
)
def test_other_settings(settings):
    model, reference = double_model(**settings)
    images, captions = regions(2, 6, torch.float64), words(2, 5)
    texts = reference_texts(reference, captions)
    assert_agrees(model, reference, images, captions, texts)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_a_threshold_that_the_grid_hits_exactly(threshold):
    """IoUs of grid cells are 0.2 and 0.5 up to rounding; every pair on the threshold is a pair of neighbours."""
    model, reference = double_model(iou_threshold=threshold)
    boxes = grid_boxes(5, 7)
    features = torch.randn(1, 35, FEATURES, dtype=torch.float64)
    ids = [3, 7, 9]
    score = reference.score(features[0].numpy(), boxes.double().numpy(), ids=ids)
    with torch.no_grad():
        # float32 boxes in a float64 model: rounding must not decide who is a neighbour
        logit = model(
            region_features=features, region_boxes=boxes[None], input_ids=torch.tensor([ids])
        ).logits_per_image
    assert logit.item() == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("refinement", ["gate", "gru"])
def test_every_switch_changes_the_score(refinement):
    """Agreement would mean nothing where a part had no influence."""
    everything = {"refinement": refinement, "use_box_positions": True, "use_relative_geometry": True}
    weights = tiny_model(**everything).double().state_dict()
    features, boxes = np.random.default_rng(2).normal(size=(9, FEATURES)), overlapping_boxes(9).numpy()
    scores = []
    for off in (None, *SWITCHES, "use_pooled_features", "use_box_positions", "use_relative_geometry"):
        belongs = {"use_relative_geometry": False} if off == "use_geometric_context" else {}
        config = tiny_model(**everything | belongs | ({} if off is None else {off: False})).config
        scores.append(
            Reference({k: v.numpy() for k, v in weights.items()}, config).score(features, boxes, ids=[4, 8, 2])
        )
    differences = np.abs(np.subtract.outer(scores, scores)) + np.eye(len(scores))
    assert differences.min() > 1e-4, scores


def test_sizes_expose_a_transpose():
    assert len({FEATURES, *SIZES.values()}) == 1 + len(SIZES)
