"""Within one modality: whose captions are near each other, and whether cosines follow human grades."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from training_makers import tiny_config, write_scan
from typer.testing import CliRunner

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.cli.app import app
from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation import SentencePairs, evaluate_unimodal, read_image_labels
from modeling_tvrn.metrics import spearman

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [
    ("red circle", "circle red", 4.5),
    ("a blue star", "a green square", 0.5),
    ("left", "left of", 3.0),
    ("right", "star", 0.5),
    ("green", "green square", 2.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model with heads and one without, saved with their processor, and sentence pairs."""
    folder = tmp_path_factory.mktemp("unimodal")
    (folder / "data").mkdir()
    write_scan(folder / "data")
    records = load_pairs(folder / "data", "validation", captions_per_image=2)
    processor = TVRNProcessor.from_captions([*flat(records), *(text for pair in PAIRS for text in pair[:2])])
    sizes = tiny_config(folder, folder / "none").model
    for name in ("plain", "heads"):
        torch.manual_seed(3)
        fields = {
            "region_feature_size": 5,
            "vocab_size": len(processor.tokenizer),
            "use_unimodal_heads": name == "heads",
        }
        model = TVRNModel.from_backbones(**sizes, **fields)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    first, second, scores = zip(*PAIRS, strict=True)
    columns = {"sentence1": first, "sentence2": second, "score": scores}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "sts.parquet")
    return folder


def flat(records) -> list[str]:
    return [caption for captions in records.captions for caption in captions]


def mean_ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


def test_spearman_is_pearsons_correlation_of_the_mean_ranks() -> None:
    random = np.random.default_rng(2)
    values, grades = random.normal(size=31).round(1), random.integers(0, 6, size=31) / 2
    ranks = np.array([mean_ranks(side.tolist()) for side in (values, grades)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    expected = 100 * (centred[0] * centred[1]).sum() / np.sqrt((centred**2).sum(axis=1).prod())
    assert spearman(values, grades) == pytest.approx(expected, abs=1e-9)
    assert spearman(values, -values) == pytest.approx(-100)
    assert spearman([1.0, 2.0, 9.0], [1.0, 2.0, 3.0]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("values", "grades", "message"),
    [
        ([1.0, float("nan")], [1.0, 2.0], "NaN"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"\(2,\), \(3,\)"),
        ([1.0, 1.0], [1.0, 2.0], "no order to correlate"),
    ],
)
def test_a_correlation_that_means_nothing_is_refused(values: list, grades: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spearman(values, grades)


def test_recall_of_captions_of_the_same_image(folder: Path) -> None:
    model, processor = (
        TVRNModel.from_pretrained(folder / "heads").eval(),
        TVRNProcessor.from_pretrained(folder / "heads"),
    )
    records = load_pairs(folder / "data", "validation", captions_per_image=2)
    labels = {image_id: row % 2 for row, image_id in enumerate(records.image_ids)}
    report = evaluate_unimodal(model, processor, records, labels, progress=False)
    captions = flat(records)
    with torch.inference_mode():
        texts = torch.cat([model.encode_texts(**processor(text=[caption])).embeds for caption in captions])
        kinds = {"cross-modal embeddings": texts, "uni-modal heads": model.unimodal_text_embeds(texts)}
    assert set(report.text_to_text) == set(report.image_to_image) == set(kinds)
    for kind, embeds in kinds.items():
        cosines = (embeds @ embeds.T).tolist()
        hits = []
        for query, row in enumerate(cosines):
            others = sorted((other for other in range(len(row)) if other != query), key=lambda other: -row[other])
            hits.append(others[0] // 2 == query // 2)
        assert report.text_to_text[kind].recall[1] == pytest.approx(100 * np.mean(hits))
    assert (report.texts, report.images) == (12, 6)
    assert "| text→text (12), uni-modal heads |" in report.table()


def test_sentence_pairs_of_a_model_without_heads(folder: Path) -> None:
    model, processor = (
        TVRNModel.from_pretrained(folder / "plain").eval(),
        TVRNProcessor.from_pretrained(folder / "plain"),
    )
    report = evaluate_unimodal(
        model, processor, sentence_pairs=SentencePairs.read(folder / "sts.parquet"), progress=False
    )
    cosines = []
    with torch.inference_mode():
        for first, second, _ in PAIRS:
            one, other = (model.encode_texts(**processor(text=[text])).embeds[0] for text in (first, second))
            cosines.append(float(one @ other))
    assert report.sts == {"cross-modal embeddings": pytest.approx(spearman(cosines, [pair[2] for pair in PAIRS]))}
    assert report.pairs == report.known_pairs == 5 and not report.text_to_text
    assert report.unknown_words == 0 and not report.sts_known_words and "unknown words" not in report.table()


def test_sentences_with_words_that_the_vocabulary_lacks_are_told_apart(folder: Path) -> None:
    model, processor = (part.from_pretrained(folder / "plain") for part in (TVRNModel, TVRNProcessor))
    strange = [("a zebra", "green zebra zebra", 1.0), ("red", "the parliament", 4.0)]
    first, second, scores = ([pair[side] for pair in [*PAIRS, *strange]] for side in range(3))
    pairs = SentencePairs(first, second, np.array(scores))
    report = evaluate_unimodal(model, processor, sentence_pairs=pairs, progress=False)
    of_known = evaluate_unimodal(
        model, processor, sentence_pairs=SentencePairs.read(folder / "sts.parquet"), progress=False
    )
    assert report.sts_known_words == pytest.approx(of_known.sts) and report.sts != report.sts_known_words
    assert (report.pairs, report.known_pairs) == (7, 5)
    words = [word for pair in [*PAIRS, *strange] for text in pair[:2] for word in text.split()]
    unknown = [word for word in words if word in ("zebra", "parliament", "the")]
    assert report.unknown_words == pytest.approx(len(unknown) / len(words))
    assert f"those without unknown words (5; {report.unknown_words:.1%} of words unknown)" in report.table()


def test_what_cannot_be_measured_is_refused(folder: Path, tmp_path: Path) -> None:
    model, processor = (
        TVRNModel.from_pretrained(folder / "plain").eval(),
        TVRNProcessor.from_pretrained(folder / "plain"),
    )
    records = load_pairs(folder / "data", "validation", captions_per_image=2)
    with pytest.raises(ValueError, match="neither records nor sentence pairs"):
        evaluate_unimodal(model, processor)
    with pytest.raises(ValueError, match="5 of 6 images have no label"):
        evaluate_unimodal(model, processor, records, {records.image_ids[0]: 1}, progress=False)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="missing.*'sentence1'"):
        SentencePairs.read(tmp_path / "bad.csv")


def test_labels_are_read_by_id(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image_id,label\n7,cat\na.jpg,dog\n")
    assert read_image_labels(tmp_path / "labels.csv") == {7: "cat", "a.jpg": "dog"}
    (tmp_path / "labels.json").write_text('{"7": "cat", "a.jpg": 2}')
    assert read_image_labels(tmp_path / "labels.json") == {7: "cat", "a.jpg": 2}


def test_the_script_measures_each_model(folder: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(folder / "heads"), str(folder / "plain"), "--protocol", "unimodal", "--device", "cpu"]
    data = ["--data", str(folder / "data"), "--split", "validation", "--data-option", "captions_per_image=2"]
    output = ["--sentence-pairs", str(folder / "sts.parquet"), "--output", str(tmp_path / "report.json")]
    outcome = CliRunner().invoke(app, [*command, *data, *output])
    assert outcome.exit_code == 0, outcome.stderr
    first, second = json.loads((tmp_path / "report.json").read_text())
    assert set(first["sts"]) == {"cross-modal embeddings", "uni-modal heads"} > set(second["sts"])
    assert "R@1" in first["text_to_text"]["uni-modal heads"]
    assert outcome.stdout.count("sentence pairs (5), cross-modal embeddings") == 2
    assert CliRunner().invoke(app, [*command, *output]).exit_code == 0  # sentence pairs alone
    wrong = CliRunner().invoke(app, ["evaluate", str(folder / "heads"), "--data", str(folder), *output])
    assert wrong.exit_code == 2 and "--sentence-pairs goes with --protocol unimodal" in wrong.stderr
