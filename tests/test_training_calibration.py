"""A probability that something fits means what it says: fitted, kept with the model, searched and refused by."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoder_makers import save_dual_encoder
from PIL import Image

from modeling_tvrn import TVRNModel, load_model
from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation import evaluate_fits
from modeling_tvrn.evaluation.fits import gibberish, phrases
from modeling_tvrn.index import ImageTextIndex
from modeling_tvrn.plots import plot_calibration
from modeling_tvrn.training.calibration import calibrate_and_measure, fit_probability, fit_query_reader


def test_scale_and_shift_are_found_again_whatever_the_gallery_and_junk() -> None:
    random = torch.Generator().manual_seed(3)
    best = torch.randn(60_000, generator=random) * 3 + 40
    readable = 0.5 + 0.5 * torch.rand(len(best), generator=random).double()
    fits = readable * torch.sigmoid(0.7 * best.double() - 25 - math.log(50))
    right = torch.rand(len(best), generator=random).double() < fits
    scale, shift = fit_probability(best, right, readable, 50)
    assert scale == pytest.approx(0.7, rel=0.05) and shift == pytest.approx(-25, rel=0.05)


@pytest.mark.parametrize("right", [torch.zeros(40, dtype=torch.bool), torch.arange(40) < 5])
def test_a_model_that_is_never_right_still_ranks_by_its_logits(right: torch.Tensor) -> None:
    best = torch.linspace(3, -3, 40).flip(0)  # in the second case the lowest are right
    scale, shift = fit_probability(best, right, torch.ones(40).double(), 20)
    assert scale > 0 and math.isfinite(shift)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_probability(torch.full((40,), math.nan), right, torch.ones(40).double(), 20)


def test_junk_is_told_by_its_embedding() -> None:
    random = np.random.default_rng(0)
    queries, junk = random.normal(size=(2, 400, 30)) + np.array([[[0.0] * 30], [[1.0] * 2 + [0.0] * 28]])
    embeds = torch.nn.functional.normalize(torch.from_numpy(np.concatenate([queries, junk])), dim=1)
    shuffled = torch.from_numpy(random.permutation(800))
    seen, unseen = shuffled[:600], shuffled[600:]
    reader = fit_query_reader(embeds[seen], seen < 400)
    told = (embeds[unseen] @ reader[:-1] + reader[-1] > 0) == (unseen < 400)
    assert told.double().mean() > 0.7


def test_gibberish_is_as_long_as_what_it_stands_for_and_phrases_have_words() -> None:
    queries = ["two dogs run", "a"]
    assert [list(map(len, text.split())) for text in gibberish(queries)] == [[3, 4, 3], [1]]
    assert gibberish(queries) == gibberish(queries) != gibberish(queries, seed=1)
    assert all(text in "two dogs run" for text in phrases(["two dogs run"] * 20)) and phrases([" . ", "!"]) == []


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    lines = ["image,caption"]
    for number, words in enumerate(["a dog", "a cat", "a man runs", "red car", "snow", "a ball", "two dogs", "grass"]):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{words}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def calibrated(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A dual encoder, its processor, and what was measured of its probabilities."""
    model, processor = load_model(save_dual_encoder(tmp_path_factory.mktemp("models") / "clip"), device="cpu")
    return model, processor, calibrate_and_measure(model, processor, load_pairs(photos / "captions.csv"))


@pytest.mark.slow
def test_a_dual_encoder_is_calibrated_and_measured(calibrated: Any, photos: Path, tmp_path: Path) -> None:
    model, processor, report = calibrated
    assert model.has_probabilities and model.is_calibrated and model.calibration_query[:-1].abs().sum() > 0
    assert (report.gallery_size, report.queries, sum(count for *_, count in report.bins)) == (2, 4, 4)
    with Image.open(plot_calibration(report.bins, tmp_path / "calibration.png")) as picture:
        assert picture.size > (500, 200)
    with pytest.raises(ValueError, match="there are 2 images; expected at least 3"):
        evaluate_fits(model, processor, load_pairs(photos / "captions.csv").select(range(2)))


def test_it_stays_with_the_model_and_older_checkpoints_load(calibrated: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = calibrated[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(TVRNModel.from_pretrained(tmp_path).calibration_query, model.calibration_query)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["calibration_query"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    older = TVRNModel.from_pretrained(tmp_path)
    logits = torch.tensor([[0.5]])
    texts = model.encode_texts(**calibrated[1](text=["zqx"]))
    assert torch.equal(older.fits(logits, 1, texts), older.scores(logits)), "no query is junk to it"


@pytest.fixture(scope="module")
def index(calibrated: Any, photos: Path) -> ImageTextIndex:
    return ImageTextIndex.build(*calibrated[:2], photos, progress=False)


def test_hits_end_at_a_probability(index: ImageTextIndex) -> None:
    model, processor = index.model, index.processor
    every = index.search("a dog")
    scores = [hit.score for hit in every]
    assert scores == sorted(scores, reverse=True) and not every.ending
    some = index.search("a dog", min_score=scores[3])
    assert [hit.id for hit in some] == [hit.id for hit in every[:4]]
    assert some.ending.startswith("No more fit: the next has") and f"{scores[4]:.3f}" in some.ending
    none = index.search("a dog", min_score=1)
    assert none == [] and none.ending == f"Nothing fits: the best has a probability of {scores[0]:.3f}, below 1."
    with torch.no_grad():
        texts = model.encode_texts(**processor(text=["a dog"]))
    logit = torch.tensor([[every[0].logit]])
    alone, among = (float(model.fits(logit, size, texts)) for size in (1, len(index)))
    assert among == pytest.approx(scores[0], abs=1e-6) and among < alone <= float(model.scores(logit))
    [only] = index.search("a dog", where={"id": every[0].id}, min_score=0)
    assert only.score == scores[0], "the pair's and the index's, whatever else is listed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_score": 1.5}, "min_score is 1.5; expected a probability from 0 to 1"),
        ({"min_score": math.nan}, "min_score is nan; expected"),
        ({"min_score": "0.5"}, "min_score is '0.5'; expected"),
        ({"min_score": 0.5, "rerank": False}, "this search is by embeddings alone"),
        ({"min_score": 0.5, "calibrated": False}, r"not calibrated.*tvrn calibrate MODEL"),
        ({"min_score": 0.5, "text": " "}, "word|blank|empty"),
    ],
)
def test_a_threshold_without_meaning_is_a_sentence(
    index: ImageTextIndex, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    if not options.get("calibrated", True):
        monkeypatch.setattr(index, "model", TVRNModel(index.model.config).eval())
    with pytest.raises(ValueError, match=said):
        index.search(**{"text": "a dog"} | {name: value for name, value in options.items() if name != "calibrated"})
