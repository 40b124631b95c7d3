"""`tvrn compare`: the rows are what `evaluate` finds, gains are paired by image, costs are those of that score."""

import json
import sys

import numpy as np
import pair_costs
import pytest
import torch
from dual_encoder_makers import save_dual_encoder
from test_evaluation import SCENES, checkpoints, processor, region_records, tiny  # noqa: F401 (fixtures)
from typer.testing import CliRunner

from modeling_tvrn import TVRNProcessor
from modeling_tvrn.cli.app import app
from modeling_tvrn.evaluation import compare, evaluate
from modeling_tvrn.metrics import paired_bootstrap


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws and timed queries that a test need not wait for."""
    module = sys.modules["modeling_tvrn.evaluation.compare"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "RESAMPLES", 50)
    monkeypatch.setattr(module, "TIMED_QUERIES", 2)


def tvrn(*arguments: object, code: int = 0):
    outcome = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert outcome.exit_code == code, f"{outcome.stdout}\n{outcome.stderr}\n{outcome.exception!r}"
    return outcome


@pytest.mark.parametrize("shortlist_size", [None, 3])
def test_a_row_is_what_evaluate_finds_and_its_gain_is_over_the_first(processor, shortlist_size) -> None:  # noqa: F811
    records, models = region_records(9, (1, 5)), [tiny(0), tiny(1, similarity_head="sgr")]
    settings = {"shortlist_size": shortlist_size, "progress": False}
    report = compare(models, [processor] * 2, records, ["a", "b"], **settings)
    assert [score.name for score in report.scores] == [
        "a, pair score",
        "a, embeddings",
        "b, pair score",
        "b, embeddings",
    ]
    single = [evaluate(model, processor, records, **settings) for model in models]
    expected = [metrics for each in single for metrics in (each.metrics, each.embedding_metrics)]
    assert [s.metrics.as_dict()["rsum"] for s in report.scores] == [each.as_dict()["rsum"] for each in expected]
    rows = single[0].caption_image_rows
    found = paired_bootstrap(expected[2], expected[0], report.scores[2].gain.resamples, caption_image_rows=rows)
    assert report.scores[2].gain == found and report.scores[0].gain is None
    assert report.gallery_fingerprint == single[0].gallery_fingerprint
    assert [model.sha256 for model in report.models] == [each.models[0].sha256 for each in single]


def test_costs_are_those_of_the_score(processor) -> None:  # noqa: F811
    """Captions and images of one size, so that the formula of the benchmark has no padding to leave out."""
    records = region_records(6, 2)
    for record in records:
        record["captions"] = ["a red dog runs near", "the small cat sits over"]
        record |= {name: record[name][:3] for name in ("region_features", "region_boxes")}
    report = compare([tiny(0), tiny(1)], [processor] * 2, records, ["a", "b"], progress=False)
    pair, embeddings, *_ = report.scores
    sizes = {"words": 5, "regions": 3, "hidden": 12, "similarity": 5, "projection": 7}
    variant = {"refinement": "gate", "similarity_head": "saf", "use_late_interaction": True}
    assert pair.operations_a_pair == pytest.approx(sum(pair_costs.operations(variant, sizes).values()))
    assert embeddings.operations_a_pair == 2 * 7
    assert embeddings.kilobytes_an_image == 7 * 4 / 1000
    images = tiny(0).encode_images(**{n: torch.from_numpy(np.stack([r[n] for r in records])) for n in (
        "region_features", "region_boxes")})  # fmt: skip
    kept = sum(value.nbytes for value in images.tensors().values()) / 6 / 1000
    assert pair.kilobytes_an_image == pytest.approx(kept)
    assert all(score.milliseconds_a_query > 0 for score in report.scores)


@pytest.mark.slow
def test_the_verb_compares_a_tvrn_with_a_dual_encoder(checkpoints, tmp_path) -> None:  # noqa: F811
    clip = save_dual_encoder(tmp_path / "clip")
    output = tmp_path / "deep" / "report.json"
    printed = tvrn(checkpoints[0], clip, *SCENES, "--output", output, "--json").stdout
    document = json.loads(printed)
    assert document["scores"][2]["score"] == "embeddings" and len(document["scores"]) == 3
    written = json.loads(output.read_text())
    assert written == document
    first, _, dual = document["scores"]
    assert dual["gain"]["difference"]["rsum"] == pytest.approx(dual["metrics"]["rsum"] - first["metrics"]["rsum"])
    assert dual["operations_a_pair"] == 2 * 20 < first["operations_a_pair"]
    table = tvrn(checkpoints[0], clip, *SCENES).stdout
    assert f"{clip}, embeddings" in table and f"{clip}, pair score" not in table and "kFLOP a pair" in table


@pytest.mark.slow
def test_what_cannot_be_compared_is_a_sentence(checkpoints, tmp_path) -> None:  # noqa: F811
    model = tiny()
    for part in (model, TVRNProcessor.from_captions(["a red dog"])):
        part.save_pretrained(tmp_path / "regions")
    for models, message in (
        ([checkpoints[0], f"{checkpoints[0]}/"], "comes twice"),
        (checkpoints[:1], "at least two"),
        ([checkpoints[0], tmp_path / "gone"], "there is no folder"),
        ([checkpoints[0], tmp_path / "regions"], "cannot read this gallery, which holds pictures"),
        ([*checkpoints, "--protocol", "cxc"], "further positives"),
        ([*checkpoints, "--protocol", "flickr8k-1k"], "1000 images"),
        ([*checkpoints, *["--regions", "x"] * 3], "3 caches for 2 models"),
    ):
        stderr = tvrn(*models, *SCENES, code=2).stderr
        assert message in stderr and len(stderr.splitlines()) == 1, stderr


def test_equal_weights_under_two_names_are_named(processor, caplog) -> None:  # noqa: F811
    compare([tiny(0), tiny(1), tiny(0)], [processor] * 3, region_records(4, 2), ["a", "b", "c"], progress=False)
    assert "a and c have the same weights" in caplog.text


def test_different_galleries_are_refused(processor) -> None:  # noqa: F811
    galleries = (region_records(6, 2), region_records(7, 2))
    with pytest.raises(ValueError, match="'a' and 'b' have different galleries: 6 images .* 7 with"):
        compare([tiny(0), tiny(1)], [processor] * 2, galleries, ["a", "b"], progress=False)
