"""Protocols, encoding and reports with tiny models, from records to printed numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil
from typer.testing import CliRunner, Result

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.cli.app import app
from modeling_tvrn.data import data_fingerprint, load_pairs
from modeling_tvrn.evaluation import PROTOCOLS, encode_dataset, evaluate
from modeling_tvrn.evaluation.captions import CaptionTable
from modeling_tvrn.evaluation.encoding import encode_captions
from modeling_tvrn.metrics import EVALUATE_FOLDER, chance_level, paired_bootstrap, retrieval_metrics
from modeling_tvrn.scoring import EmbeddingScore, search_then_rerank

WORDS = [*("a", "an", "the", "red", "blue", "small", "large", "dog", "cat"), *("runs", "sits", "over", "near", "snow")]


def region_records(count: int, captions: int | tuple[int, int] = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Records with 3 to 6 regions an image and captions of 3 to 9 words."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(count):
        regions = int(generator.integers(3, 7))
        corners = generator.random((regions, 2)) * 0.6
        texts = captions if isinstance(captions, int) else int(generator.integers(*captions))
        records.append(
            {
                "region_features": generator.standard_normal((regions, 17)).astype(np.float32),
                "region_boxes": np.concatenate([corners, corners + 0.3], axis=1).astype(np.float32),
                "captions": [" ".join(generator.choice(WORDS, generator.integers(3, 10))) for _ in range(texts)],
                "image_id": number,
                "caption_ids": [f"{number}-{text}" for text in range(texts)],
                "split": "test",
            }
        )
    return records


def tiny(seed: int = 0, **settings: Any) -> TVRNModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 12, "projection_size": 7, "similarity_size": 5, "word_embedding_size": 6}
    return TVRNModel(TVRNConfig(region_feature_size=17, vocab_size=len(WORDS) + 2, **sizes, **settings)).eval()


@pytest.fixture(scope="module")
def processor() -> TVRNProcessor:
    return TVRNProcessor.from_captions(WORDS, ViTImageProcessorPil(size={"height": 32, "width": 32}))


class Stream:
    """Records that can only be read in order, once a pass."""

    def __init__(self, records: list[dict[str, Any]]):
        self.records = records

    def __iter__(self):
        return iter(self.records)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_gallery_is_encoded_in_the_records_order(processor: TVRNProcessor, batch_size: int) -> None:
    """Whatever the batches, and although captions are sorted by length meanwhile: each item as if encoded alone."""
    records, model = region_records(9, (1, 5)), tiny()
    images, texts, rows = encode_dataset(model, processor, records, batch_size=batch_size, progress=False)
    assert rows.tolist() == [row for row, record in enumerate(records) for _ in record["captions"]]
    assert (len(images), len(texts)) == (9, len(rows))
    scores, place = model.match(images, texts), 0
    for row, record in enumerate(records):
        for caption in record["captions"]:
            regions = {name: [record[name]] for name in ("region_features", "region_boxes")}
            alone = model(**processor(text=[caption], **regions)).logits_per_image
            torch.testing.assert_close(scores[row, place], alone[0, 0], atol=1e-5, rtol=1e-5)
            place += 1


def test_captions_are_encoded_at_a_steady_rate_and_with_little_padding(processor: TVRNProcessor) -> None:
    """Whatever their order, a stretch of batches has its share of the words, and a batch captions of one length."""
    captions = [" ".join(["dog"] * (1 + number // 40)) for number in range(400)]
    words = []

    class Recorded:
        tokenizer = processor.tokenizer

        def __call__(self, **inputs: Any) -> Any:
            words.append(sum(len(text.split()) for text in inputs["text"]))
            found = processor(**inputs)
            assert found["attention_mask"].float().mean() > 0.9
            return found

    encode_captions(tiny(), Recorded(), captions, batch_size=10, progress=False)
    stretches = np.array(words).reshape(4, 10).sum(axis=1)
    assert max(stretches) < 1.6 * min(stretches), "in their own order they differ sixfold"


def test_streams_give_the_same_report(processor: TVRNProcessor) -> None:
    records, model = region_records(7, (1, 4)), tiny()
    one, two = (evaluate(model, processor, data, progress=False) for data in (records, Stream(records)))
    assert one.metrics == two.metrics and one.gallery_fingerprint == two.gallery_fingerprint
    assert one.embedding_metrics == two.embedding_metrics and one.caption_count == two.caption_count


def test_the_report_holds_what_ranking_the_matrix_gives(processor: TVRNProcessor) -> None:
    """Pair score, embeddings, chance, two-stage search: each equal to its own computation by hand."""
    records, model = region_records(11, (1, 6)), tiny().train()
    report = evaluate(
        model, processor, records, shortlist_size=4, exhaustive=True, seeds=[3], batch_size=4, progress=False
    )
    assert model.training
    model.eval()
    images, texts, rows = encode_dataset(model, processor, records, progress=False)
    assert report.metrics == retrieval_metrics(model.match(images, texts), rows)
    assert report.embedding_metrics == retrieval_metrics(images.embeds @ texts.embeds.T, rows)
    assert report.gain == paired_bootstrap(report.metrics, report.embedding_metrics, 2000, caption_image_rows=rows)
    assert report.gain.difference["rsum"] == pytest.approx(report.metrics.rsum - report.embedding_metrics.rsum)
    assert f"Pair score over its embeddings, rSum: {report.gain.in_words()}" in report.table()
    assert report.chance == chance_level(11, len(rows), rows)
    by_hand = search_then_rerank(model, images, texts, rows, shortlist_size=4, progress=False)
    assert report.search is not None and report.search.rsum == by_hand.rsum
    assert report.search.costs.pairs_scored == by_hand.costs.pairs_scored < report.search.costs.pairs_total
    only_search = evaluate(model, processor, records, shortlist_size=4, embeddings=False, progress=False)
    assert (
        only_search.metrics.rsum == by_hand.rsum and only_search.embedding_metrics is None and only_search.gain is None
    )


def test_the_report_says_where_its_numbers_come_from(processor: TVRNProcessor, tmp_path: Path) -> None:
    """Everything evaluation.md asks for is printed, and the JSON says the same."""
    records, model = region_records(6, 5), tiny()
    report = evaluate(model, processor, records, data="made-up", seeds=[7], progress=False)
    found = json.loads(report.to_json(tmp_path / "report.json"))
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert found["metrics"]["image_to_text_R@1"] == report.metrics.image_to_text[1]
    assert (found["unit"], found["seeds"], found["split"], found["image_count"]) == ("percent", [7], "test", 6)
    assert found["gallery_fingerprint"] == data_fingerprint(CaptionTable.of(records))
    table = report.table()
    for printed in ("validation", "made-up", "split test", "6 images", "30 captions", "percent", "Seeds 7"):
        assert printed in table
    for printed in (found["gallery_fingerprint"], found["models"][0]["sha256"], found["command"], "Ties", "chance"):
        assert printed in table
    other = evaluate(tiny(1), processor, records, progress=False)
    assert other.models[0].sha256 != report.models[0].sha256
    same = tiny()
    same.calibration_scale.fill_(3.0)
    assert evaluate(same, processor, records, progress=False).models[0].sha256 == report.models[0].sha256


def test_the_fingerprint_follows_ids_and_their_order(processor: TVRNProcessor) -> None:
    records, model = region_records(5, 2), tiny()

    def fingerprint(changed: list[dict[str, Any]]) -> str:
        return evaluate(model, processor, changed, embeddings=False, progress=False).gallery_fingerprint

    first = fingerprint(records)
    swapped = [{**records[0], "caption_ids": records[0]["caption_ids"][::-1]}, *records[1:]]
    assert len({first, fingerprint(records[::-1]), fingerprint(swapped), fingerprint(records[:4])}) == 4


def test_several_models_are_averaged_and_each_is_reported(processor: TVRNProcessor) -> None:
    records, models = region_records(10, 3), [tiny(0), tiny(1, similarity_head="sgr")]
    report = evaluate(models, processor, records, progress=False)
    encoded = [encode_dataset(model, processor, records, progress=False) for model in models]
    scores = [model.scores(model.match(*each[:2]).double()) for model, each in zip(models, encoded, strict=True)]
    assert report.metrics == retrieval_metrics((scores[0] + scores[1]) / 2, encoded[0][2])
    for described, each in zip(report.models, scores, strict=True):
        assert described.metrics == retrieval_metrics(each, encoded[0][2])
    assert list(report.systems()) == ["mean of 2 models", "model 1", "model 2", "embeddings alone", "chance"]
    separate = evaluate(models, [processor, processor], (records, Stream(records)), progress=False)
    assert separate.metrics == report.metrics
    with pytest.raises(ValueError, match="data sets differ"):
        evaluate(models, processor, (records, records[::-1]), progress=False)
    with pytest.raises(ValueError, match="2 models, 1 processors"):
        evaluate(models, [processor], records, progress=False)


def miniature(monkeypatch, name: str) -> int:
    """The protocol with a hundredth of its images."""
    protocol = PROTOCOLS[name]
    count = protocol.image_count // 100
    monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(protocol, image_count=count))
    return count


@pytest.mark.slow
def test_coco_takes_the_first_five_captions(processor: TVRNProcessor, monkeypatch) -> None:
    """COCO's 5K test has 25,010 captions; the protocol has 25,000."""
    count, model = miniature(monkeypatch, "coco-5k"), tiny()
    records = region_records(count, (5, 8))
    report = evaluate(model, processor, records, "coco-5k", progress=False)
    first_five = [{**each, **{k: each[k][:5] for k in ("captions", "caption_ids")}} for each in records]
    assert (report.image_count, report.caption_count) == (count, 5 * count)
    assert report.metrics == evaluate(model, processor, first_five, progress=False).metrics
    assert report.gallery_fingerprint == evaluate(model, processor, first_five, progress=False).gallery_fingerprint


@pytest.mark.slow
def test_coco_1k_is_the_mean_of_five_consecutive_folds(processor: TVRNProcessor, monkeypatch) -> None:
    count, model = miniature(monkeypatch, "coco-1k"), tiny()
    records = region_records(count, 5)
    report = evaluate(model, processor, records, "coco-1k", shortlist_size=6, exhaustive=True, progress=False)
    size = count // 5
    folds = [evaluate(model, processor, records[k * size : (k + 1) * size], progress=False) for k in range(5)]
    for name in ("image_to_text_R@5", "text_to_image_R@1", "rsum", "text_to_image_mean_rank"):
        assert report.metrics.as_dict()[name] == pytest.approx(np.mean([f.metrics.as_dict()[name] for f in folds]))
    assert report.embedding_metrics.rsum == pytest.approx(np.mean([fold.embedding_metrics.rsum for fold in folds]))
    assert report.chance == folds[0].chance and report.fold_count == 5
    assert report.search.costs.pairs_total == 5 * size * 5 * size
    assert "5 consecutive folds" in report.table()


@pytest.mark.parametrize("protocol", ["flickr8k-1k", "flickr30k-1k", "coco-5k", "coco-1k"])
def test_a_gallery_of_the_wrong_size_is_refused_before_encoding(protocol: str) -> None:
    """Both sizes are named; no model is needed to find out."""
    expected = PROTOCOLS[protocol].image_count
    message = (
        rf"'{protocol}' is measured on {expected} images .*{5 * expected} captions.* has 12 images and 60 captions"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(None, None, region_records(12), protocol)


def test_captions_are_counted_for_every_image(monkeypatch) -> None:
    """1000 images with 5000 captions, but one image with 6 and one with 4."""
    count = miniature(monkeypatch, "flickr30k-1k")
    records = region_records(count)
    records[3]["captions"].append("a dog")
    records[3]["caption_ids"].append("3-5")
    records[7]["captions"].pop()
    records[7]["caption_ids"].pop()
    with pytest.raises(ValueError, match=r"Image 3 has 6 captions"):
        evaluate(None, None, records, "flickr30k-1k")
    miniature_count = miniature(monkeypatch, "coco-5k")
    records = region_records(miniature_count)
    records[7]["captions"].pop()
    records[7]["caption_ids"].pop()
    with pytest.raises(ValueError, match=r"Image 7 has 4 captions"):
        evaluate(None, None, records, "coco-5k")


def test_bad_galleries_are_refused(processor: TVRNProcessor) -> None:
    records = region_records(4, 2)
    with pytest.raises(ValueError, match="Image id '0' occurs more than once"):
        evaluate(None, None, [*records, records[0]])
    with pytest.raises(ValueError, match="Caption id '1 / x' occurs more than once"):
        evaluate(None, None, [records[0], {**records[1], "caption_ids": ["x", "x"]}])
    with pytest.raises(ValueError, match="1 of 2 images have no caption .the first is 1"):
        evaluate(None, None, [records[0], {**records[1], "captions": [], "caption_ids": []}])
    with pytest.raises(ValueError, match="holds no images"):
        evaluate(None, None, [])
    with pytest.raises(ValueError, match="no images"):
        evaluate(tiny(), processor, Stream([]), progress=False)
    with pytest.raises(ValueError, match="no protocol 'flickr'; expected one of 'validation'"):
        evaluate(None, None, records, "flickr")
    with pytest.raises(ValueError, match="leaves nothing to measure"):
        evaluate(tiny(), processor, records, exhaustive=False, progress=False)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(tiny(), processor, records, batch_size=0, progress=False)


def test_cut_captions_are_reported(processor: TVRNProcessor) -> None:
    short = TVRNProcessor(tokenizer=processor.tokenizer, max_text_length=4)
    records = region_records(5, 3)
    expected = sum(len(caption.split()) > 4 for record in records for caption in record["captions"])
    report = evaluate(tiny(), short, records, progress=False)
    assert report.truncated_captions == expected > 0
    assert f"length limit: {expected}" in report.table()


def test_pictures_are_encoded_like_in_a_forward_pass(processor: TVRNProcessor) -> None:
    """Pictures through the tower, also decoded by worker processes."""
    generator = np.random.default_rng(0)
    records = [
        {**{k: v for k, v in record.items() if not k.startswith("region")}, "image": picture}
        for record in region_records(5, 2)
        for picture in [Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8))]
    ]
    tower = {"model_type": "vit", "image_size": 32, "patch_size": 16, "hidden_size": 17, "num_hidden_layers": 1}
    model = tiny(vision_config=tower | {"num_attention_heads": 1, "intermediate_size": 19})
    images, texts, _ = encode_dataset(model, processor, records, batch_size=2, progress=False)
    captions = [caption for record in records for caption in record["captions"]]
    whole = model(**processor(images=[record["image"] for record in records], text=captions))
    torch.testing.assert_close(model.match(images, texts), whole.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(EmbeddingScore().match(images, texts), whole.image_embeds @ whole.text_embeds.T)
    parallel, _, _ = encode_dataset(model, processor, records, batch_size=2, num_workers=2, progress=False)
    torch.testing.assert_close(parallel.refined_regions, images.refined_regions)


def run(*arguments: str, code: int = 0) -> Result:
    """`tvrn evaluate` in this process."""
    outcome = CliRunner().invoke(app, ["evaluate", *arguments])
    assert outcome.exit_code == code, f"{outcome.stdout}\n{outcome.stderr}\n{outcome.exception!r}"
    return outcome


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    """Two model folders for generated scenes."""
    records = load_pairs("scenes", split="validation", count=12)
    captions = [caption for texts in records.captions for caption in texts]
    words = TVRNProcessor.from_captions(captions, ViTImageProcessorPil(size={"height": 32, "width": 32}))
    tower = {"model_type": "vit", "image_size": 32, "patch_size": 16, "hidden_size": 17, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 1, "intermediate_size": 19}
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 12, "projection_size": 7, "similarity_size": 5, "word_embedding_size": 6}
        config = TVRNConfig(vision_config=tower, vocab_size=len(words.tokenizer), region_feature_size=17, **sizes)
        folder = tmp_path_factory.mktemp(f"model{seed}")
        TVRNModel(config).save_pretrained(folder)
        words.save_pretrained(folder)
        (folder / "results.json").write_text(json.dumps({"seed": seed + 40}))
        folders.append(str(folder))
    return folders


SCENES = ["--data", "scenes", "--split", "validation", "--data-option", "count=12", "--device", "cpu"]


@pytest.mark.slow
def test_the_script_evaluates_searches_and_compares(checkpoints, tmp_path) -> None:
    """One command: an average of two models against one of them, with a shortlist, as a table and as JSON."""
    output = tmp_path / "deep" / "report.json"
    arguments = [*checkpoints, *SCENES, "--shortlist-size", "5", "--exhaustive", "--compare", checkpoints[0]]
    printed = run(*arguments, "--output", str(output)).stdout
    written = json.loads(output.read_text())
    assert written["seeds"] == [40, 41] and written["baseline"]["seeds"] == [40]
    assert "Paired bootstrap over images" in printed and "search 5, rerank" in printed
    models = [TVRNModel.from_pretrained(folder) for folder in checkpoints]
    processor = TVRNProcessor.from_pretrained(checkpoints[0])
    records = load_pairs("scenes", split="validation", count=12)
    both, one = (evaluate(each, processor, records, progress=False) for each in (models, models[0]))
    assert written["metrics"] == both.metrics.as_dict() and written["baseline"]["metrics"] == one.metrics.as_dict()
    expected = paired_bootstrap(both.metrics, one.metrics, caption_image_rows=both.caption_image_rows)
    assert written["comparison"]["p_value"] == expected.p_value
    assert [model["sha256"] for model in written["models"]] == [model.sha256 for model in both.models]


@pytest.mark.slow
def test_the_script_reads_a_region_cache(checkpoints, tmp_path) -> None:
    """Cached regions in place of pictures give the same recalls; those of another tower are refused."""
    from modeling_tvrn.teachers import RegionCache

    records = load_pairs("scenes", split="validation", count=12)
    processor = TVRNProcessor.from_pretrained(checkpoints[0])
    for number, folder in enumerate(checkpoints):
        model = TVRNModel.from_pretrained(folder)
        RegionCache.build(model, processor, records, tmp_path / f"cache{number}", dtype="float32", progress=False)
    found = []
    for extra in (
        [],
        ["--regions", str(tmp_path / "cache0")],
        ["--dtype", "bfloat16", "--regions", str(tmp_path / "cache0")],
    ):
        run(checkpoints[0], *SCENES, *extra, "--output", str(tmp_path / "report.json"))
        found.append(json.loads((tmp_path / "report.json").read_text()))
    assert found[0]["metrics"] == found[1]["metrics"] and found[2]["models"][0]["dtype"] == "bfloat16"
    assert "cache1" in run(checkpoints[0], *SCENES, "--regions", str(tmp_path / "cache1"), code=2).stderr


@pytest.mark.slow
def test_the_script_grades_pairs_and_keeps_finished_blocks(checkpoints, tmp_path) -> None:
    """Human grades by a file; a second run of an evaluation reads its blocks instead of scoring."""
    records = load_pairs("scenes", split="validation", count=12)
    lines = [f"{a}\t{b}#0\t{1 + n % 4}\t{1 + n % 3}" for n, (a, b) in enumerate(zip(
        records.image_ids, records.image_ids[1:], strict=False))]  # fmt: skip
    grades, output = tmp_path / "ExpertAnnotations.txt", tmp_path / "report.json"
    grades.write_text("\n".join(lines) + "\n")
    graded = ["--protocol", "graded", "--grades", str(grades), "--output", str(output)]
    assert "Kendall" in run(checkpoints[0], *SCENES, *graded).stdout
    written = json.loads(output.read_text())
    assert written[0]["protocol"] == "graded" and written[0]["metrics"]["pair_count"] == 11
    kept = ["--blocks", str(tmp_path / "blocks"), "--memory-budget", "0.5", "--output", str(output)]
    found = []
    for _ in range(2):
        run(checkpoints[0], *SCENES, *kept, "--no-embeddings")
        found.append(json.loads(output.read_text())["metrics"])
    assert found[0] == found[1] and len(list((tmp_path / "blocks").rglob("block-*.safetensors"))) == 1
    for wrong, message in (
        (["--protocol", "graded"], "--grades FILE go together"),
        (["--cxc", "x"], "--cxc goes with"),
    ):
        assert message in run(checkpoints[0], *SCENES, *wrong, code=2).stderr


@pytest.mark.slow
def test_mistakes_are_explained_before_a_model_is_loaded(checkpoints) -> None:
    assert "1000 images" in run(checkpoints[0], *SCENES, "--protocol", "flickr8k-1k", code=2).stderr
    assert "no/such/model" in run("no/such/model", *SCENES, code=2).stderr
    for wrong, message in (
        (["--exhaustive"], "goes with --shortlist-size"),
        (["--regions", "a", "--regions", "b"], "2 caches for 1 models"),
        (["--protocol", "coco"], "expected one of"),
        (["--protocol", "contrast", "--compare", "x"], "--compare goes with protocols of recall"),
        (["--images", "x"], "--images goes with --protocol contrast"),
        (["--protocol", "contrast", "--images", "x"], "goes with a file of contrast rows"),
    ):
        assert message in run("x", *SCENES, *wrong, code=2).stderr
    assert "--data is needed" in run("x", code=2).stderr


def test_the_example_is_the_same_command(run_python) -> None:
    path = Path(__file__).resolve().parents[1] / "examples" / "evaluate_retrieval.py"
    code = (
        f"import runpy, sys; sys.argv = [{str(path)!r}, '--help']; runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    assert "--shortlist-size K" in run_python(code)


def test_the_metric_for_the_evaluate_library(monkeypatch) -> None:
    """`evaluate.load` takes the folder offline; multi-positive R@K and rSum are those of retrieval_metrics."""
    import evaluate as evaluate_library

    metric = evaluate_library.load(EVALUATE_FOLDER)
    generator = np.random.default_rng(0)
    for _ in range(5):
        rows = np.sort(generator.integers(0, 9, 40))
        rows[:9] = np.arange(9)
        scores = generator.integers(0, 30, (9, 40)) / 8 + (rows == np.arange(9)[:, None])
        positives = [[*np.flatnonzero(rows == image), 3] for image in range(9)]
        pairs = [(image, caption) for image, captions in enumerate(positives) for caption in captions]
        for start in range(0, 9, 4):  # images come in batches, as from a loop over a gallery
            metric.add_batch(predictions=scores[start : start + 4], references=positives[start : start + 4])
        assert metric.compute() == retrieval_metrics(scores, positives=pairs).as_dict()
    distracted = metric.compute(predictions=[[0.9, 0.1, 1.0], [0.3, 0.7, 0.2]], references=[[0], [1]])
    assert (distracted["image_to_text_R@1"], distracted["text_to_image_R@1"]) == (50.0, 100.0)
    with pytest.raises(ValueError, match=r"\[2, 3\] scores"):
        metric.compute(predictions=[[0.1, 0.2], [0.3, 0.4, 0.5]], references=[[0], [1]])
