"""Half precision: float16 and bfloat16 give what float32 gives, up to their rounding, whatever the model's variant."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hub_makers import VIT, pixel_model, region_model, save
from model_makers import FEATURES, HEADS, SWITCHES, VARIANTS, name, one, overlapping_boxes, regions, tiny_model, words
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from transformers import AutoModel, BertConfig, MobileNetV2Config, ViTConfig

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.index import ImageTextIndex
from modeling_tvrn.layers_tvrn import normalize
from modeling_tvrn.losses import (
    CUSA,
    contrastive_loss,
    cross_modal_soft_label_loss,
    distillation_loss,
    hardest_negative_loss,
    matching_loss,
    soft_labels,
)
from modeling_tvrn.scoring import rank, score_matrix, search_then_rerank
from modeling_tvrn.teachers import pool_boxes

# What rounding may move: embeddings have unit norm; the tiny models' logits spread over several units; gradients are
# compared as one vector, relative to its length.
EMBEDS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LOGITS = {torch.float16: 0.04, torch.bfloat16: 0.3}
# The reasoning's own loss sees its logits unscaled, next to equal for all pairs of a tiny model: their digits count.
GRADIENTS = {torch.float16: 0.25, torch.bfloat16: 0.65}
DTYPES = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=["float16", "bfloat16"]
)
CNN = MobileNetV2Config(depth_multiplier=0.05, image_size=32, finegrained_output=True)
BERT = BertConfig(vocab_size=31, hidden_size=10, num_attention_heads=2, num_hidden_layers=1, intermediate_size=17)
# The usual start of 0.02 leaves all patches of a tiny tower alike: the gradient is then made of their last digits.
SPREAD_VIT = ViTConfig(**VIT.to_dict() | {"initializer_range": 0.5})
LOSSES = ("matching", "pair_contrastive", "hardest_negative", "contrastive", "late_interaction", "distillation")
# The hinge of the matching loss has kinks: on the other side of one, the gradient is another.
SMOOTH = {"matching_loss_weight": 0.0, "pair_contrastive_loss_weight": 1.0}
OTHERS: dict[str, dict[str, Any]] = {
    "no_refined_features": {"use_refined_features": False},
    "no_pooled_features": {"use_pooled_features": False},
    "vit": {"vision_config": SPREAD_VIT, "region_feature_size": VIT.hidden_size},
    "cnn": {"vision_config": CNN, "region_feature_size": 1280, "vision_grid_size": 2},
    "bert": {"text_config": BERT},
    "no_reasoning": {"use_reasoning": False},
    "every_loss": {f"{loss}_loss_weight": 1.0 for loss in LOSSES},
}
# All parts, all but one, and none: half precision is slow on a CPU, and what it breaks rarely hangs on two of them.
SOME = [variant for variant in VARIANTS if sum(map(variant.get, SWITCHES)) in (0, 3, 4)]
MODELS = pytest.mark.parametrize("settings", [*SOME, *OTHERS.values()], ids=[*map(name, SOME), *OTHERS])


def batch(model: TVRNModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Ragged images and texts; one image and one text are padding but for a single fragment."""
    images, texts = regions(4), words(4)
    images["region_mask"][2], texts["word_mask"][1] = False, 0
    images["region_mask"][2, 3], texts["word_mask"][1, 1] = True, 1
    if model.vision_model is not None:
        side = 35 if model.config.vision_config.model_type == "vit" else 64
        images = {"pixel_values": torch.randn(4, 3, side, side)}
    return images, texts


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.isfinite().all()
    assert (found.float() - expected.float()).abs().max() <= tolerance


def gradient(model: TVRNModel, *inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the loss, every weight's in one vector."""
    model.zero_grad()
    model(**inputs[0], **inputs[1], return_loss=True).loss.backward()
    found = torch.cat([weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None])
    assert found.isfinite().all()
    return found


@pytest.mark.slow
@DTYPES
@MODELS
def test_scores_and_losses(settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(**SMOOTH | settings)
    half = copy.deepcopy(model).to(dtype)
    images, texts = batch(model)
    expected, found = (each(**images, **texts, return_loss=True) for each in (model, half))
    assert_close(found.logits_per_image, expected.logits_per_image, LOGITS[dtype])
    assert_close(found.image_embeds, expected.image_embeds, EMBEDS[dtype])
    assert_close(found.text_embeds, expected.text_embeds, EMBEDS[dtype])
    assert_close(found.loss, expected.loss, 2 * LOGITS[dtype] * len(expected.loss_parts))


@pytest.mark.slow
@DTYPES
@MODELS
def test_gradients(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Near a zero affinity a gradient hangs on the last digit in float32 too: the middle of five batches counts."""
    model = tiny_model(**SMOOTH | settings)
    half = copy.deepcopy(model).to(dtype)
    differences = []
    for _ in range(5):
        inputs = batch(model)
        expected = gradient(model, *inputs)
        differences.append((gradient(half, *inputs) - expected).norm() / expected.norm())
    assert sorted(differences)[2] <= GRADIENTS[dtype]


FLOAT32_ON_GPUS = {
    *("sum", "prod", "cumsum", "softmax", "log_softmax", "logsumexp", "exp", "log", "pow", "rsqrt", "reciprocal"),
    *("norm", "vector_norm", "layer_norm", "cosine_similarity", "softplus", "nll_loss", "cross_entropy"),
}


class AutocastOfCuda(TorchFunctionMode):
    """What a GPU's autocast computes in float32 and a CPU's does not, as torch documents it: with it a CPU's behaves
    like a GPU's, and a product of what the two leave in different dtypes fails here as it does there."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if torch.is_autocast_enabled("cpu") and (resolve_name(function) or "").split(".")[-1] in FLOAT32_ON_GPUS:
            arguments = [
                each.float() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
                for each in arguments
            ]
        return function(*arguments, **(keywords or {}))


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("settings", [*HEADS, *OTHERS.values()], ids=[*map(name, HEADS), *OTHERS])
def test_a_gpus_autocast(settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(**SMOOTH | settings)
    images, texts = batch(model)
    expected = model(**images, **texts, return_loss=True)
    with torch.autocast("cpu", dtype), AutocastOfCuda():
        found = model(**images, **texts, return_loss=True)
        found.loss.backward()
        ids = torch.arange(4)
        encoded = model.encode_images(**images), model.encode_texts(**texts)
        ranked = rank(model, *encoded, ids)
        assert search_then_rerank(model, *encoded, ids, shortlist_size=4).rsum == ranked.rsum
    assert_close(found.logits_per_image, expected.logits_per_image, LOGITS[dtype])
    assert_close(found.image_embeds, expected.image_embeds, EMBEDS[dtype])
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("settings", HEADS, ids=name)
def test_a_pair_alone_scores_as_in_a_padded_batch(settings: dict[str, Any], dtype: torch.dtype) -> None:
    half = tiny_model(**settings).to(dtype)
    images, texts = batch(half)
    with torch.no_grad():
        together = half(**images, **texts).logits_per_image
        alone = [[half(**one(images, i), **one(texts, t)).logits_per_image for t in range(4)] for i in range(4)]
    assert_close(torch.cat([torch.cat(row, dim=1) for row in alone]), together, LOGITS[dtype])


@DTYPES
@pytest.mark.parametrize("cast", ["weights", "autocast"])
@pytest.mark.parametrize("settings", HEADS, ids=name)
def test_regions_of_zeros(settings: dict[str, Any], cast: str, dtype: torch.dtype) -> None:
    """A new model has no biases yet, so such a region has no direction, nor has an image of nothing else."""
    model = TVRNModel(TVRNConfig(region_feature_size=FEATURES, hidden_size=64, projection_size=32, **settings)).eval()
    images, texts = batch(model)
    images["region_features"][2], images["region_features"][1, 3] = 0.0, 0.0
    with torch.no_grad():
        expected = model(**images, **texts).logits_per_image
        half = model.to(dtype) if cast == "weights" else model
        with torch.autocast("cpu", dtype, enabled=cast == "autocast"):
            assert_close(half(**images, **texts).logits_per_image, expected, LOGITS[dtype])


@DTYPES
def test_unimodal_embeddings(dtype: torch.dtype) -> None:
    model = tiny_model(use_unimodal_heads=True)
    half = copy.deepcopy(model).to(dtype)
    images, texts = batch(model)
    expected, found = ((each.get_image_features(**images, unimodal=True).pooler_output) for each in (model, half))
    assert_close(found, expected, EMBEDS[dtype])
    expected, found = ((each.get_text_features(**texts, unimodal=True).pooler_output) for each in (model, half))
    assert_close(found, expected, EMBEDS[dtype])


@DTYPES
def test_loaded_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """As its users load it: captions shorter than the longest of their batch."""
    model, processor = region_model()
    save(tmp_path, model, processor)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
    rows = {"region_features": torch.randn(2, 3, 13), "region_boxes": overlapping_boxes(2, 3).float()}
    inputs = dict(processor(text=["snow", "a dog runs in the snow , the cat sleeps"])) | rows
    with torch.no_grad():
        assert_close(half(**inputs).logits_per_image, model(**inputs).logits_per_image, LOGITS[dtype])


class TestNormalize:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_zeros_stay_zeros(self, dtype: torch.dtype) -> None:
        x = torch.zeros(2, 5, dtype=dtype)
        x[1, 2] = 3.0
        x.requires_grad_()
        unit = normalize(x)
        unit[1].sum().backward()
        assert unit.tolist() == [[0.0] * 5, [0.0, 0.0, 1.0, 0.0, 0.0]]
        assert x.grad is not None and x.grad.isfinite().all()

    @pytest.mark.parametrize("size", [1e-5, 1.0, 6e4])
    def test_short_and_long_vectors_in_float16(self, size: float) -> None:
        """The norm of the long one is no float16, nor is the square of a number of the short one."""
        x = torch.full((1, 1024), size, dtype=torch.float16)
        torch.testing.assert_close(normalize(x), torch.full_like(x, 1 / 32))


@DTYPES
class TestLosses:
    """Of half-precision inputs, against the same numbers in float32; the arithmetic is float32 either way."""

    def test_of_scores_and_embeddings(self, dtype: torch.dtype) -> None:
        ids = torch.arange(6) // 2
        images, texts = (F.normalize(torch.randn(6, 8), dim=1).to(dtype) for _ in range(2))
        logits = (3 * images.float() @ texts.float().T).to(dtype)
        scale = torch.tensor(4.6).to(dtype)
        for loss in (
            lambda cast: matching_loss(cast(logits).sigmoid(), ids, ids),
            lambda cast: hardest_negative_loss(cast(logits).sigmoid(), ids, ids),
            lambda cast: contrastive_loss(cast(images), cast(texts), cast(scale), ids, ids),
            lambda cast: distillation_loss(cast(images), cast(texts), cast(scale), cast(logits)),
        ):
            assert_close(loss(lambda x: x), loss(torch.Tensor.float), 5e-2)

    @pytest.mark.parametrize("size", [1e-4, 1.0, 3e3])
    @pytest.mark.parametrize("teachers", ["own", "mean", "geometric_mean"])
    def test_cusa_of_teachers_of_any_length(self, teachers: str, size: float, dtype: torch.dtype) -> None:
        """3000 times the square root of 768 is beyond float16, whose numbers it is the norm of."""
        vectors = [(size * torch.randn(5, 768)).to(dtype) for _ in range(2)]
        embeds = [F.normalize(torch.randn(5, 16), dim=1).to(dtype).requires_grad_() for _ in range(2)]
        cusa = CUSA(teachers=teachers, teacher_temperature=0.1)
        losses = []
        for cast in (lambda x: x, torch.Tensor.float):
            images, texts = (cast(each) for each in embeds)
            given = {"similarity": images @ texts.T, "image_embeds": images, "text_embeds": texts}
            losses.append(cusa.to(images.dtype)(*map(cast, vectors), **given).loss)
        assert_close(losses[0], losses[1], 1e-2)
        losses[0].backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in embeds)

    def test_labels(self, dtype: torch.dtype) -> None:
        """Rounded rows sum to 1 up to their rounding, and are labels all the same."""
        labels = soft_labels(torch.randn(7, 12), 0.2)
        similarity = torch.randn(7, 7)
        expected = cross_modal_soft_label_loss(similarity, labels, labels, 0.3)
        found = cross_modal_soft_label_loss(similarity.to(dtype), labels.to(dtype), labels.to(dtype), 0.3)
        assert_close(found, expected, 5e-2)


@DTYPES
class TestGalleries:
    def test_encoded_in_full_precision_and_scored_in_half(self, dtype: torch.dtype) -> None:
        model = tiny_model()
        images, texts = batch(model)
        with torch.no_grad():
            encoded = model.encode_images(**images), model.encode_texts(**texts)
            expected = model.match(*encoded)
            for side in encoded:
                side.model_fingerprint = None
            assert_close(copy.deepcopy(model).to(dtype).match(*encoded), expected, LOGITS[dtype])
            assert_close(model.match(*(side.to(dtype) for side in encoded)), expected, LOGITS[dtype])

    def test_scored_in_blocks_and_reranked(self, dtype: torch.dtype) -> None:
        model = tiny_model()
        half = copy.deepcopy(model).to(dtype)
        images, texts = batch(model)
        with torch.no_grad():
            encoded, full = ((each.encode_images(**images), each.encode_texts(**texts)) for each in (half, model))
            assert_close(score_matrix(half, *encoded, chunk_size=3), model.match(*full), LOGITS[dtype])
        found = search_then_rerank(half, *encoded, torch.arange(4), shortlist_size=4)
        assert found.rsum == rank(half, *encoded, torch.arange(4)).rsum

    def test_an_index_searched_and_reranked(self, dtype: torch.dtype, tmp_path: Path) -> None:
        model, processor = pixel_model()
        (tmp_path / "photos").mkdir()
        for number in range(3):
            pixels = np.random.randint(0, 256, (40, 50, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        scores = []
        for each in (model, copy.deepcopy(model).to(dtype)):
            index = ImageTextIndex.build(each, processor, tmp_path / "photos", tmp_path / str(each.dtype))
            scores.append({hit.path: hit.logit for hit in index.search("a dog in the snow")})
        assert scores[0].keys() == scores[1].keys()
        assert all(abs(scores[0][path] - scores[1][path]) < LOGITS[dtype] for path in scores[0])

    def test_boxes_pooled_from_a_map(self, dtype: torch.dtype) -> None:
        """A box whose corners were rounded would take in another cell; one without area gives zeros."""
        feature_map, boxes = torch.randn(1, 4, 30, 30), overlapping_boxes(1, 5).float()
        boxes[0, 0, 2:] = boxes[0, 0, :2]
        found = pool_boxes(feature_map.to(dtype), boxes)
        assert found.dtype == dtype and not found[0, 0].any()
        assert_close(found, pool_boxes(feature_map, boxes), EMBEDS[dtype])


def test_what_float16_cannot_hold_is_refused() -> None:
    model = tiny_model()
    images = regions()
    images["region_features"][1, 3, 5] = 7e4
    assert model.encode_images(**images).embeds.isfinite().all()
    with pytest.raises(ValueError, match=r"Region features go up to 70000; expected at most 65504.*bfloat16"):
        model.half().encode_images(**images)
    assert model.bfloat16().encode_images(**images).embeds.isfinite().all()
