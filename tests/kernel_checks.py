"""The fused programs compute what the plain pair stage computes. `test_kernels.py` runs this file in processes of its
own: in Triton's interpreter, which has to be chosen before Triton is imported, and on a CUDA device."""

from itertools import product
from typing import Any

import pytest
import torch
from model_makers import regions, tiny_model, words

from modeling_tvrn import TVRNModel, kernels
from modeling_tvrn.encoded_tvrn import EncodedImages, EncodedTexts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# D and S fill no tile, and D takes two.
SIZES = {"hidden_size": 48, "similarity_size": 24, "use_late_interaction": True, "refinement": "gate"}
VARIANTS = [
    {"similarity_head": head, "use_text_refinement": refined, "use_semantic_alignment": salient}
    for head, refined, salient in product(("saf", "sgr"), (True, False), (True, False))
]
# Of a tiny model's logits, which spread by about 0.1 over the pairs; the plain path errs as much.
TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 2e-2}


def model_and_items(**settings: Any) -> tuple[TVRNModel, EncodedImages, EncodedTexts]:
    """Three images of up to 11 regions and five captions of up to 7 words, ragged."""
    model = tiny_model(**SIZES | settings)
    with torch.no_grad():
        images, texts = model.encode_images(**regions(3, 11)), model.encode_texts(**words(5, 9)).trim()
    assert texts.word_mask is not None and not texts.word_mask.all()
    return model.to(DEVICE), images.to(DEVICE), texts.to(DEVICE)


def fail_loudly(model: TVRNModel) -> TVRNModel:
    """`model` with the programs enabled, and no plain path to hide a failure."""

    def give_up(name: str, error: Exception) -> None:
        raise error

    assert kernels.enable(model, least_pairs=1, dtypes=kernels.DTYPES)
    model.pair.fused._give_up = give_up
    return model


def fragment_scores(model: TVRNModel, images: EncodedImages, texts: EncodedTexts, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        components = model.unweighted_components(images, texts, **settings)
    return torch.stack([components["late_interaction"], components["reasoning"]])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_every_variant(variant):
    model, images, texts = model_and_items(**variant)
    plain = fragment_scores(model, images, texts)
    fused = fragment_scores(fail_loudly(model), images, texts)
    assert not torch.equal(plain, fused), "the plain path has answered"
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS[::4], ids=lambda variant: variant["similarity_head"])
def test_half_precision(dtype, variant):
    """As near to float32 as the plain path in that precision."""
    model, images, texts = model_and_items(**variant)
    exact = fragment_scores(model, images, texts)
    plain = fragment_scores(model.to(dtype), images, texts)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        with torch.no_grad(), pytest.raises(ValueError, match="interpreter"):
            kernels.fused_reasoning(model, images.to(dtype), texts.to(dtype))
        return
    fused = fragment_scores(fail_loudly(model), images, texts)
    assert fused.dtype == torch.float32 and not torch.equal(plain, fused)
    torch.testing.assert_close(fused, exact, rtol=0, atol=TOLERANCES[dtype])


def test_no_text_refinement_of_a_recurrent_model():
    """Its images have twice as many refined regions as regions."""
    model, images, texts = model_and_items(refinement="gru", use_text_refinement=False)
    plain = fragment_scores(model, images, texts)
    torch.testing.assert_close(fragment_scores(fail_loudly(model), images, texts), plain, rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_other_captions_and_images():
    """A caption alone, trimmed to its own length, and one among many that share its program."""
    model, images, texts = model_and_items()
    fail_loudly(model)
    together = fragment_scores(model, images, texts)
    for caption in range(len(texts)):
        alone = fragment_scores(model, images.select([1]), texts.select([caption]).trim())
        torch.testing.assert_close(alone[:, 0, 0], together[:, 1, caption], rtol=1e-5, atol=1e-6)
    many = texts.select([0, 4, 2, 1, 3] * 4)
    scores = fragment_scores(model, images, many, chunk_size=40)
    torch.testing.assert_close(scores[:, :, :5], together[:, :, [0, 4, 2, 1, 3]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores[:, :, -5:], scores[:, :, :5], rtol=1e-5, atol=1e-6)


def test_captions_of_ones_own():
    model, images, texts = model_and_items()
    rows = [0, 1, 2, 1, 3, 4]
    with torch.no_grad():
        plain = model.match_aligned(images, texts.select(rows))
        fused = fail_loudly(model).match_aligned(images, texts.select(rows))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_the_named_functions():
    model, images, texts = model_and_items()
    expected = fragment_scores(model, images, texts)
    with torch.no_grad():
        found = torch.stack(
            [kernels.fused_late_interaction(model, images, texts), kernels.fused_reasoning(model, images, texts)]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_fused_is_plain():
    """Gradients, float64 and a recurrence over a pair's words: the same bits as without the programs."""
    model, images, texts = model_and_items()
    plain = model.unweighted_components(images, texts)["reasoning"]
    fail_loudly(model)
    learning = model.unweighted_components(images, texts)["reasoning"]
    assert learning.requires_grad and torch.equal(learning, plain)
    with pytest.raises(ValueError, match="gradients"):
        kernels.fused_reasoning(model, images, texts)
    for settings, dtype in (({}, torch.float64), ({"refinement": "gru"}, torch.float32)):
        model, images, texts = model_and_items(**settings)
        plain = fragment_scores(model.to(dtype), images, texts)[1]
        assert torch.equal(fragment_scores(fail_loudly(model), images, texts)[1], plain)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes minutes")
@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCES], ids=str)
@pytest.mark.parametrize("head", ["saf", "sgr"])
def test_sizes_of_the_paper(head, dtype):
    """Against float32: not farther from it than three times the plain path."""
    model = tiny_model(similarity_head=head, **SIZES | {"hidden_size": 1024, "similarity_size": 256})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("word"):
                torch.nn.init.xavier_uniform_(weight)
        images, texts = model.encode_images(**regions(40, 36)), model.encode_texts(**words(70, 18))
    model, images, texts = model.to(DEVICE), images.to(DEVICE), texts.to(DEVICE)
    exact = fragment_scores(model, images, texts)
    plain = fragment_scores(model.to(dtype), images, texts)
    fused = fragment_scores(fail_loudly(model), images, texts)
    bound = 3 * (plain - exact).abs().amax(dim=(1, 2)) + 1e-4
    assert ((fused - exact).abs().amax(dim=(1, 2)) <= bound).all(), ((fused - exact).abs().amax(dim=(1, 2)), bound)
