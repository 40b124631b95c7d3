"""Encoded galleries: every tensor goes with its item, whatever is done to the gallery."""

import copy
import dataclasses

import pytest
import torch
from model_makers import HEADS, name, regions, shake, tiny_model, words
from safetensors.torch import save_file

from modeling_tvrn import TVRNModel
from modeling_tvrn.encoded_tvrn import EncodedImages, EncodedTexts


@torch.no_grad()
def galleries(**settings) -> tuple[TVRNModel, EncodedImages, EncodedTexts]:
    model = tiny_model(**settings)
    return model, model.encode_images(**regions(4)), model.encode_texts(**words(6))


def assert_equal(a: EncodedImages | EncodedTexts, b: EncodedImages | EncodedTexts) -> None:
    assert type(a) is type(b)
    assert a.tensors().keys() == b.tensors().keys()
    for key, value in a.tensors().items():
        assert value.dtype == b.tensors()[key].dtype, key
        assert torch.equal(value, b.tensors()[key]), key
    assert a.model_fingerprint == b.model_fingerprint


@pytest.mark.parametrize("variant", HEADS, ids=name)
class TestEveryVariant:
    def test_the_first_dimension_is_the_item(self, variant):
        _, images, texts = galleries(**variant)
        for side, count in ((images, 4), (texts, 6)):
            assert len(side) == count
            assert all(len(value) == count for value in side.tensors().values())

    @pytest.mark.parametrize(
        "rows", [slice(1, 3), [3, 0, 3], torch.tensor([2]), torch.tensor([True, False, True, False])]
    )
    def test_select(self, variant, rows):
        """Every tensor is selected, so that the selection scores as its items did."""
        model, images, texts = galleries(**variant)
        for key, value in images.select(rows).tensors().items():
            assert torch.equal(value, images.tensors()[key][rows]), key
        with torch.no_grad():
            expected = model.match(images, texts)[rows]
            torch.testing.assert_close(model.match(images.select(rows), texts), expected, rtol=0, atol=1e-5)

    def test_the_reasonings_part_comes_of_the_regions_alone(self, variant):
        model, given = tiny_model(**variant), regions(4)
        with torch.no_grad():
            slim = model.encode_images(**given, level="late_interaction")
            assert slim.refined_regions is None
            assert_equal(model.complete_images(slim), model.encode_images(**given))

    def test_cat_pads_again(self, variant):
        """Galleries encoded apart, each as wide as its longest item, score as one encoded together."""
        model, images, texts = galleries(**variant)
        expected = model.match(images, texts)
        parts = [regions(4, 7)]
        images = [model.encode_images(**{k: v[:2] for k, v in parts[0].items()}), model.encode_images(**regions(3, 5))]
        texts = [
            model.encode_texts(**words(2, 8)),
            model.encode_texts(**words(5, 6)),
            model.encode_texts(**words(1, 4)),
        ]
        assert len({side.words.shape[1] for side in texts}) > 1
        apart = torch.cat([torch.cat([model.match(i, t) for t in texts], dim=1) for i in images])
        together = model.match(EncodedImages.cat(images), EncodedTexts.cat(texts))
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
        assert expected.shape == (4, 6)

    def test_save_and_load(self, variant, tmp_path):
        _, images, texts = galleries(**variant)
        for side in (images, texts, images.select([2]), texts.select(slice(1, 3))):
            side.save(tmp_path / "gallery.safetensors")
            assert_equal(type(side).load(tmp_path / "gallery.safetensors"), side)

    def test_padding_may_be_dropped(self, variant):
        model, _, texts = galleries(**variant)
        longest = int(texts.word_mask.sum(dim=1).max())
        wide = EncodedTexts.cat([texts, model.encode_texts(**words(1, 12))]).select(range(6))
        assert wide.words.shape[1] > longest
        assert_equal(wide.trim(), texts)
        assert texts.trim() is texts


def test_select_nothing_and_rows_that_are_not_there():
    _, images, _ = galleries()
    assert len(images.select([])) == 0
    with pytest.raises(IndexError):
        images.select([4])


def test_cat_refuses_nothing_and_other_variants():
    _, images, _ = galleries()
    _, others, _ = galleries(use_text_refinement=False)
    with pytest.raises(ValueError, match="at least one"):
        EncodedImages.cat([])
    with pytest.raises(ValueError, match="different model variants"):
        EncodedImages.cat([images, others])


@pytest.mark.parametrize("way", [(torch.bfloat16,), ("cpu", torch.bfloat16)])
def test_to_halves_what_is_large(way):
    """Cosines of embeddings in bfloat16 move ranks; fragments, which are nearly all of a gallery, do not."""
    model, images, texts = galleries()
    half = images.to(*way)
    kept = {"embeds", "refined_region_saliency", "refined_region_gram", "context_gram", "region_boxes"}
    for key, value in half.tensors().items():
        original = images.tensors()[key]
        wanted = torch.bfloat16 if original.is_floating_point() and key not in kept else original.dtype
        assert value.dtype == wanted, key
    assert_equal(images.to("cpu"), images)
    assert_equal(images.to(dtype=torch.bfloat16), half)
    assert texts.to(*way).embeds.dtype == torch.float32
    assert torch.equal(model.match(images.to(torch.float32), texts), model.match(images, texts))


def test_load_refuses_another_file(tmp_path):
    _, images, texts = galleries()
    texts.save(tmp_path / "texts.safetensors")
    with pytest.raises(ValueError, match=r"texts\.safetensors holds EncodedTexts; expected EncodedImages"):
        EncodedImages.load(tmp_path / "texts.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors holds no encoded gallery; expected EncodedImages"):
        EncodedImages.load(tmp_path / "weights.safetensors")
    (tmp_path / "text.txt").write_text("neither")
    with pytest.raises(ValueError, match=r"text\.txt is no safetensors file"):
        EncodedImages.load(tmp_path / "text.txt")
    images.save(tmp_path / "images.safetensors")
    assert len(EncodedImages.load(tmp_path / "images.safetensors")) == 4


def test_plain_dataclasses():
    """`len` and indexing of a ModelOutput mean its fields; these count items."""
    assert dataclasses.is_dataclass(EncodedImages) and dataclasses.is_dataclass(EncodedTexts)
    _, _, texts = galleries()
    assert not hasattr(texts, "keys")
    assert {field.name for field in dataclasses.fields(texts)} >= texts.tensors().keys()
    positions = texts.word_positions[texts.word_mask]
    assert torch.equal(positions, torch.cat([mask.nonzero().flatten() for mask in words(6)["word_mask"]]))


def test_a_gallery_knows_its_model_whatever_is_done_to_it(tmp_path):
    """Known through select, cat, to, trim, save and load; the same in half precision, another after one more step."""
    model, images, texts = galleries()
    mark = images.model_fingerprint
    assert (
        mark is not None
        and mark == texts.model_fingerprint == copy.deepcopy(model).encode_texts(**words(2)).trim().model_fingerprint
    )
    images.select([1]).to(torch.bfloat16).save(tmp_path / "images.safetensors")
    loaded = EncodedImages.load(tmp_path / "images.safetensors")
    assert EncodedImages.cat([loaded, images]).model_fingerprint == mark
    with torch.no_grad():
        half = copy.deepcopy(model).to(torch.bfloat16).encode_texts(**words(2))
        model.region_projection.bias[0] += 0.1
    assert half.model_fingerprint == mark
    assert model.encode_texts(**words(2)).model_fingerprint != mark
    assert model.train().encode_texts(**words(2)).model_fingerprint is None


def test_galleries_of_two_models_are_refused():
    model, images, texts = galleries()
    other = shake(copy.deepcopy(model), seed=12)
    foreign = other.encode_texts(**words(6))
    marks = sorted([images.model_fingerprint[:12], foreign.model_fingerprint[:12]])
    for mix in (lambda: EncodedTexts.cat([texts, foreign]), lambda: model.match(images, foreign)):
        with pytest.raises(ValueError, match=f"2 different models .fingerprints {marks[0]}, {marks[1]}"):
            mix()
    foreign.model_fingerprint = None  # as a gallery built by hand: nothing is known, nothing is refused
    assert EncodedTexts.cat([texts, foreign]).model_fingerprint is None


def test_a_gallery_stays_the_models_when_it_is_calibrated():
    model, texts = tiny_model(), words(4)
    with torch.no_grad():
        gallery = model.encode_images(**regions(3))
        before = model.match(gallery, model.encode_texts(**texts))
        model.calibration_shift.fill_(-3.0)
        after = model.match(gallery, model.encode_texts(**texts))
    assert torch.equal(after, before)
    assert not torch.equal(model.scores(after), before.sigmoid())
