"""mteb's retrieval tasks, run on models of the front door: their hit rates are this package's recalls."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from dual_encoder_makers import WORDS, save_dual_encoder
from hub_makers import pixel_model, save

from modeling_tvrn import load_model
from modeling_tvrn.evaluation import evaluate
from modeling_tvrn.mteb import MTEBModel

mteb = pytest.importorskip("mteb", reason='mteb comes with pip install ".[mteb]"')
from mteb_makers import tiny_task  # noqa: E402

pytestmark = pytest.mark.slow  # importing mteb takes seconds

IMAGES = [PIL.Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 50, 3), np.uint8)) for k in range(12)]
CAPTIONS = [[" ".join(np.random.default_rng(100 * k + j).choice(WORDS, 4)) for j in range(2)] for k in range(12)]
RECORDS = [
    {"image": image, "captions": own, "image_id": k}
    for k, (image, own) in enumerate(zip(IMAGES, CAPTIONS, strict=True))
]


@pytest.fixture(scope="module")
def tvrn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tvrn"), *pixel_model())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dual_encoder(tmp_path_factory.mktemp("clip"))


def scores(model: MTEBModel, category: str, **changes: Any) -> dict[str, Any]:
    task = tiny_task(category, changes.pop("images", IMAGES), changes.pop("captions", CAPTIONS), **changes)
    result = mteb.evaluate(model, task, cache=None, encode_kwargs={"batch_size": 5}, show_progress_bar=False)
    return result.task_results[0].scores["test"][0]


@pytest.mark.parametrize(("kind", "rerank"), [("clip", None), ("tvrn", None), ("tvrn", 10), ("tvrn", 100)])
def test_hit_rates_are_recalls_at_k(kind: str, rerank: int | None, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    report = evaluate(*load_model(folder), RECORDS, shortlist_size=min(rerank or 10, 24), exhaustive=False)
    expected = report.embedding_metrics if rerank is None else report.metrics
    for category, recalls in (("i2t", expected.image_to_text), ("t2i", expected.text_to_image)):
        found = scores(MTEBModel(folder, rerank=rerank), category)
        assert {k: found[f"hit_rate_at_{k}"] for k in recalls} == {k: round(recalls[k] / 100, 5) for k in recalls}
        assert 0 < found["hit_rate_at_5"] < 1 and found["hit_rate_at_100"] == 1, "also what a shortlist left behind"


def test_texts_without_a_word_find_nothing_and_are_counted(tvrn: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with_blank = scores(MTEBModel(tvrn), "t2i", extra=[" "])
    assert "1 of 25 queries of Tiny can't be read and are not found: 'x0'" in caplog.text
    alone = scores(MTEBModel(tvrn), "t2i")
    assert with_blank["hit_rate_at_10"] == pytest.approx(alone["hit_rate_at_10"] * 24 / 25, abs=2e-5)


@pytest.mark.parametrize("rerank", [None, 3])
def test_a_corpus_of_one(tvrn: Path, rerank: int | None) -> None:
    assert scores(MTEBModel(tvrn, rerank), "t2i", images=IMAGES[:1], captions=CAPTIONS[:1])["hit_rate_at_1"] == 1


def test_what_it_cannot_do_is_said(tvrn: Path, clip: Path) -> None:
    model = MTEBModel(tvrn)
    with pytest.raises(ValueError, match=r"Tiny is of the category 't2t'; expected 't2i'"):
        scores(model, "t2t")
    with pytest.raises(ValueError, match="rerank is 0; expected at least 1"):
        MTEBModel(tvrn, rerank=0)
    with pytest.raises(ValueError, match="rerank is 8, but the score of .* is that of its embeddings alone"):
        MTEBModel(clip, rerank=8)
    # mteb takes results of the same name and revision from its cache
    assert model.mteb_model_meta.revision != MTEBModel(clip).mteb_model_meta.revision
    assert model.mteb_model_meta.experiment_name != MTEBModel(tvrn, 8).mteb_model_meta.experiment_name
