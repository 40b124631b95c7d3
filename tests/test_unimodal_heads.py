"""The uni-modal heads: what they compute, that they are saved, and that models without them are as before."""

from pathlib import Path

import pytest
import torch
from model_makers import regions, tiny_model, words
from torch.nn import functional as F

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.training.phases import learns


@pytest.fixture
def model() -> TVRNModel:
    return tiny_model(use_unimodal_heads=True)


def test_a_head_is_a_norm_and_a_linear_map_of_the_embedding(model: TVRNModel) -> None:
    """Written out in float64; images and texts have heads of their own."""
    for name, inputs in (("image", regions()), ("text", words())):
        ask = getattr(model, f"get_{name}_features")
        embeds, found = ask(**inputs).pooler_output.double(), ask(**inputs, unimodal=True).pooler_output
        head = getattr(model, f"unimodal_{name}_head").double()
        centred = embeds - embeds.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + head.norm.eps).sqrt()
        mapped = (scaled * head.norm.weight + head.norm.bias) @ head.linear.weight.T + head.linear.bias
        torch.testing.assert_close(found, F.normalize(mapped, dim=1).float(), atol=1e-5, rtol=1e-4)
        assert (found - embeds.float()).abs().max() > 0.05


def test_heads_keep_small_differences_under_bfloat16_autocast(model: TVRNModel) -> None:
    embeds = F.normalize(torch.randn(5, 23), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.unimodal_text_embeds(embeds)
    torch.testing.assert_close(found, model.unimodal_text_embeds(embeds), atol=1e-6, rtol=1e-5)


def test_heads_are_saved_with_the_model(model: TVRNModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = TVRNModel.from_pretrained(tmp_path)
    inputs = words()
    expected = model.get_text_features(**inputs, unimodal=True).pooler_output
    torch.testing.assert_close(loaded.get_text_features(**inputs, unimodal=True).pooler_output, expected)


def test_the_pair_score_does_not_see_the_heads(model: TVRNModel) -> None:
    inputs = {**regions(), **words()}
    before = model(**inputs)
    with torch.no_grad():
        for weight in (*model.unimodal_image_head.parameters(), *model.unimodal_text_head.parameters()):
            weight += 1.0
    torch.testing.assert_close(model(**inputs).logits_per_image, before.logits_per_image, atol=0, rtol=0)


def test_a_model_without_heads_has_none_and_says_so(tmp_path: Path) -> None:
    """Checkpoints from before the heads load: the switch is off by default."""
    plain = tiny_model()
    assert not TVRNConfig().use_unimodal_heads
    assert not [name for name in plain.state_dict() if "unimodal" in name]
    with pytest.raises(ValueError, match="no uni-modal heads.*use_unimodal_heads=True"):
        plain.get_image_features(**regions(), unimodal=True)


def test_heads_stay_as_they_are_where_the_embeddings_do() -> None:
    """In a pair phase that keeps the embeddings nothing trains the heads: left alone they would drift by decay."""
    for refined in (True, False):
        model = tiny_model(use_unimodal_heads=True, use_refined_features=refined, use_late_interaction=False)
        named = [name for name, _ in model.named_parameters()]
        learning = learns(named, model.config, frozenset({"reasoning"}), frozenset({"embeddings"}))
        assert learning and not any(name.startswith("unimodal") for name in learning)
