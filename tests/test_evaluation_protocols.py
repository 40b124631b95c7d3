"""Protocols beyond R@K: human grades, ECCV Caption and CxC, against the packages and formulas they come from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import processor, region_records, tiny  # noqa: F401 (a fixture)

from modeling_tvrn.evaluation import GradedPairs, encode_dataset, evaluate, evaluate_graded
from modeling_tvrn.evaluation import coco_positives as coco
from modeling_tvrn.evaluation.captions import CaptionTable
from modeling_tvrn.metrics import graded_metrics, kendall_tau_c, retrieval_metrics, spearman
from modeling_tvrn.scoring import BestCandidates, ScoringOptions, rank_and_list


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 4, 50])
def test_best_candidates_are_those_of_a_sort(seed: int, size: int) -> None:
    """Heavy ties, blocks in any order: the lists of a stable sort of the whole matrix, by score, then by number."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(-3, 4, (13, 29)).astype(np.float32)
    scores[generator.random(scores.shape) < 0.1] = -np.inf
    best = BestCandidates(13, 29, size)
    columns = generator.permutation(29)
    blocks = [(rows, part) for rows in np.split(np.arange(13), [5, 9]) for part in np.split(columns, [4, 20])]
    for place in generator.permutation(len(blocks)):
        rows, part = blocks[place]
        best.add(torch.from_numpy(scores[np.ix_(rows, part)]), rows, part)
    assert np.array_equal(best.captions, np.argsort(-scores, axis=1, kind="stable")[:, :size])
    assert np.array_equal(best.images, np.argsort(-scores.T, axis=1, kind="stable")[:, :size])


def test_ranks_and_lists_come_out_of_one_pass(processor) -> None:  # noqa: F811
    model, records = tiny(), region_records(9, (1, 5))
    images, texts, rows = encode_dataset(model, processor, records, progress=False)
    scores = model.match(images, texts).detach()
    metrics, best = rank_and_list(model, images, texts, rows, 6, ScoringOptions(memory_budget=1e-5, progress=False))
    assert metrics.image_to_text_ranks.tolist() == retrieval_metrics(scores, rows).image_to_text_ranks.tolist()
    assert np.array_equal(best.captions, np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :6])
    with pytest.raises(ValueError, match="size is 0"):
        rank_and_list(model, images, texts, rows, 0)


class TestGrades:
    @pytest.mark.parametrize("levels", [2, 4, 1000])
    def test_kendall_is_scipys(self, levels: int) -> None:
        stats = pytest.importorskip("scipy.stats", reason='τ_c is compared with scipy: pip install ".[eval]"')
        generator = np.random.default_rng(levels)
        grades = generator.integers(0, levels, 200)
        scores = np.round(grades * 0.3 + generator.standard_normal(200), 1)
        assert kendall_tau_c(scores, grades) == pytest.approx(100 * stats.kendalltau(scores, grades, variant="c")[0])

    def test_kendall_by_counting_pairs(self) -> None:
        """The definition: agreeing minus disagreeing pairs, over those a table of m levels could have."""
        scores, grades = [0.1, 0.4, 0.4, 0.9, -1.0], [1, 2, 1, 4, 2]
        balance = sum(np.sign((a - b) * (x - y)) for a, x in zip(scores, grades, strict=True)
                      for b, y in zip(scores, grades, strict=True)) / 2  # fmt: skip
        assert kendall_tau_c(scores, grades) == pytest.approx(100 * 2 * balance / (25 * (3 - 1) / 3))

    def test_judgements_count_one_by_one_and_as_means(self) -> None:
        scores, grades = [0.3, 0.1, 0.8, 0.5], [[1, 2, 1], [1], [4, 4, 3], [2, 2]]
        found = graded_metrics(scores, grades)
        single = np.repeat(scores, [3, 1, 3, 2]), np.concatenate(grades)
        means = [4 / 3, 1, 11 / 3, 2]
        assert found.spearman == spearman(*single) and found.kendall_tau_c == kendall_tau_c(*single)
        assert found.spearman_of_mean == spearman(scores, means) == pytest.approx(100)
        assert found.kendall_tau_c_of_mean == kendall_tau_c(scores, means)
        assert (found.pair_count, found.judgement_count) == (4, 9)

    def test_bad_grades_are_refused(self) -> None:
        with pytest.raises(ValueError, match="2 scores and grades for 2 pairs, 1 of them without any"):
            graded_metrics([0.1, 0.2], [[1], []])
        with pytest.raises(ValueError, match="all equal|are equal"):
            kendall_tau_c([1.0, 2.0], [3, 3])
        with pytest.raises(ValueError, match="NaN"):
            kendall_tau_c([1.0, np.nan], [3, 4])

    def annotations(self, tmp_path: Path, records: list[dict]) -> Path:
        lines = [f"{i}.jpg\t{t}.jpg#{n}\t{1 + (i + t) % 4}\t{1 + (i * t) % 4}\t{1 + n}" for i in range(6)
                 for t, n in ((i, 1), ((i + 1) % 6, 0), ((i + 3) % 6, 1))]  # fmt: skip
        path = tmp_path / "ExpertAnnotations.txt"
        path.write_text("\n".join(lines) + "\n\n")
        return path

    def test_a_file_of_grades_against_the_matrix(self, processor, tmp_path: Path) -> None:  # noqa: F811
        """The pairs found by file name, an image's own captions left out, scores those of the whole matrix."""
        records = [record | {"filename": f"{row}.jpg"} for row, record in enumerate(region_records(6, 2))]
        pairs, model = GradedPairs.read(self.annotations(tmp_path, records)), tiny()
        assert len(pairs.images) == 18 and pairs.grades[1] == [2.0, 1.0, 1.0]
        report = evaluate_graded(model, processor, records, pairs, progress=False)
        images, texts, _ = encode_dataset(model, processor, records, progress=False)
        scores, cosines = model.match(images, texts).detach(), (images.embeds @ texts.embeds.T).detach()
        others = [(i, 2 * t + n) for i in range(6) for t, n in (((i + 1) % 6, 0), ((i + 3) % 6, 1))]
        grades = [grade for place, grade in enumerate(pairs.grades) if place % 3]
        expected = graded_metrics([float(scores[pair]) for pair in others], grades)
        assert report.metrics.as_dict() == pytest.approx(expected.as_dict())
        of_cosines = graded_metrics([float(cosines[pair]) for pair in others], grades)
        assert report.embedding_metrics.as_dict() == pytest.approx(of_cosines.as_dict())
        assert (report.own_captions_left_out, report.image_count) == (6, 6)
        assert json.loads(json.dumps(report.as_dict()))["protocol"] == "graded"
        assert "12 pairs" in report.table() and "6 pairs of an image with its own caption" in report.table()
        everything = evaluate_graded(model, processor, records, pairs, keep_own_captions=True, progress=False)
        assert everything.metrics.pair_count == 18

    def test_what_cannot_be_found_is_named(self, processor, tmp_path: Path) -> None:  # noqa: F811
        records = [record | {"filename": f"{row}.jpg"} for row, record in enumerate(region_records(5, 2))]
        pairs = GradedPairs.read(self.annotations(tmp_path, records))
        with pytest.raises(ValueError, match=r"1 graded images are not in the data set, the first is '5.jpg'"):
            evaluate_graded(tiny(), processor, records, pairs, progress=False)
        bad = tmp_path / "bad.txt"
        for line in ("a.jpg b.jpg#1 3", "a.jpg\tb.jpg#1\tgood", "a.jpg\tb.jpg\t3", "a.jpg\tb.jpg#0"):
            bad.write_text(f"a.jpg\tb.jpg#1\t3\n{line}\n")
            with pytest.raises(ValueError, match="Line 2 of .*expected an image"):
                GradedPairs.read(bad)
        bad.write_text("\n")
        with pytest.raises(ValueError, match="no graded pair"):
            GradedPairs.read(bad)


@pytest.fixture(scope="module")
def eccv():
    pytest.importorskip("eccv_caption", reason='ECCV Caption and CxC come with pip install ".[eval]"')
    return coco.load_eccv()


@pytest.fixture(scope="module")
def coco_test(eccv) -> CaptionTable:
    """COCO's test split by its ids, images shuffled."""
    images = np.random.default_rng(0).permutation(sorted(eccv.coco_gts["i2t"])).tolist()
    ids = [list(eccv.coco_gts["i2t"][image]) for image in images]
    return CaptionTable(images, [["a dog"] * 5 for _ in images], ids, ["test"] * 5000)


def random_lists(eccv, ids: coco.CocoIds) -> tuple[np.ndarray, np.ndarray]:
    """Lists of 50 in which about every other query finds something."""
    generator = np.random.default_rng(1)
    captions_of = np.stack([generator.choice(25000, 50, replace=False) for _ in range(5000)])
    images_of = np.stack([generator.choice(5000, 50, replace=False) for _ in range(25000)])
    rows = np.repeat(np.arange(5000), 5)
    captions_of[::2, 3] = 5 * np.arange(0, 5000, 2) + 1
    images_of[::3, 0] = rows[::3]
    return captions_of, images_of


@pytest.mark.slow
def test_eccv_caption_and_cxc_are_the_packages_own_numbers(eccv, coco_test: CaptionTable) -> None:
    ids = coco.coco_ids(coco_test, eccv)
    captions_of, images_of = random_lists(eccv, ids)
    by_image = {image: [coco_test.caption_ids[k // 5][k % 5] for k in captions_of[row]]
                for row, image in enumerate(coco_test.image_ids)}  # fmt: skip
    by_caption = {coco_test.caption_ids[k // 5][k % 5]: [coco_test.image_ids[row] for row in images_of[k]]
                  for k in range(25000)}  # fmt: skip
    names = ("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls")
    expected = eccv.compute_all_metrics(by_image, by_caption, target_metrics=names, Ks=(1, 5, 10), verbose=False)
    found = coco.eccv_metrics(ids, captions_of, images_of, eccv)
    for ours, theirs in (("mAP@R", "eccv_map_at_r"), ("R-Precision", "eccv_rprecision"), ("R@1", "eccv_r1")):
        assert found[f"image_to_text_{ours}"] == 100 * expected[theirs]["i2t"]
        assert found[f"text_to_image_{ours}"] == 100 * expected[theirs]["t2i"] > 0
    cxc = coco.cxc_metrics(ids, captions_of, images_of, eccv)
    assert cxc == {f"{way}_R@{k}": 100 * expected[f"cxc_r{k}"][short] for short, way in
                   (("i2t", "image_to_text"), ("t2i", "text_to_image")) for k in (1, 5, 10)}  # fmt: skip


def test_the_gallery_is_matched_with_cocos_ids_or_refused(eccv, coco_test: CaptionTable) -> None:
    ids = coco.coco_ids(coco_test, eccv)
    files = [f"COCO_val2014_{image:012d}.jpg" for image in coco_test.image_ids]
    order = {}
    for caption in eccv.coco_ids.tolist():
        order.setdefault(eccv.coco_gts["t2i"][caption][0], []).append(caption)
    unnamed = CaptionTable(files, coco_test.captions, [[f"{n}" for n in "abcde"]] * 5000, coco_test.splits)
    found = coco.coco_ids(unnamed, eccv)
    assert np.array_equal(found.images, ids.images)
    assert found.captions[:5].tolist() == order[coco_test.image_ids[0]]
    short = CaptionTable(
        *(getattr(coco_test, name)[1:] for name in ("image_ids", "captions", "caption_ids", "splits"))
    )
    with pytest.raises(ValueError, match="4999 images, 0 of them not in COCO's test split of 5000"):
        coco.coco_ids(short, eccv)
    other = CaptionTable([-5, *coco_test.image_ids[1:]], coco_test.captions, coco_test.caption_ids, coco_test.splits)
    with pytest.raises(ValueError, match=r"1 of them not in COCO's test split of 5000 \(for example -5\)"):
        coco.coco_ids(other, eccv)
    mixed = [[*coco_test.caption_ids[0][:4], coco_test.caption_ids[1][0]], *coco_test.caption_ids[1:]]
    with pytest.raises(ValueError, match="has the caption ids"):
        coco.coco_ids(CaptionTable(coco_test.image_ids, coco_test.captions, mixed, coco_test.splits), eccv)


def test_cxc_within_modalities_by_hand(tmp_path: Path) -> None:
    """Four images with two captions each: positives by grade, both ways, and captions of one image."""
    ids = coco.CocoIds(np.array([11, 12, 13, 14]), np.arange(21, 29))
    rows = np.repeat(np.arange(4), 2)
    angles = torch.tensor([0.0, 0.3, 1.0, 2.5])
    images = torch.stack([angles.cos(), angles.sin()], dim=1)
    texts = images.repeat_interleave(2, dim=0) + torch.tensor([[0.0, 0.0], [0.01, 0.02]]).repeat(4, 1)
    (tmp_path / "sis_test.csv").write_text(
        "image1,image2,agg_score,sampling_method\nCOCO_val2014_000000000011.jpg,COCO_val2014_000000000013.jpg,3.0,x\n"
        "COCO_val2014_000000000012.jpg,COCO_val2014_000000000014.jpg,2.9,x\n"
        "COCO_val2014_000000000012.jpg,COCO_val2014_000000000099.jpg,5.0,x\n"
    )
    found = coco.cxc_within_modalities(ids, images, texts, rows, tmp_path)
    # Image 11 finds 13 behind 12; 13 finds 11 behind 12: rank 2 both.
    assert found == {
        "image_to_image_R@1": 0, "image_to_image_R@5": 100, "image_to_image_R@10": 100, "image_to_image_queries": 2,
    }  # fmt: skip
    (tmp_path / "sts_test.csv").write_text(
        "caption1,caption2,agg_score,sampling_method\nCOCO_val2014:sentid:21,COCO_val2014:sentid:23,4,x\n"
    )
    found = coco.cxc_within_modalities(ids, images, texts, rows, tmp_path)
    assert found["text_to_text_R@1"] == 100 and found["text_to_text_queries"] == 8
    with pytest.raises(ValueError, match="holds none of"):
        coco.cxc_within_modalities(ids, images, texts, rows, tmp_path / "nothing")
    (tmp_path / "sts_test.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected CxC's columns"):
        coco.cxc_within_modalities(ids, images, texts, rows, tmp_path)


def test_protocols_of_coco_refuse_other_galleries(processor) -> None:  # noqa: F811
    for name in ("eccv-caption", "cxc"):
        with pytest.raises(ValueError, match=f"Protocol '{name}' is measured on 5000 images"):
            evaluate(tiny(), processor, region_records(6, 5), protocol=name, progress=False)


def test_evaluation_goes_on_where_it_stopped(processor, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    """A second call of the same evaluation scores no pair again: neither the average's nor the single models'."""
    models, records = [tiny(0), tiny(1)], region_records(7, (1, 4))
    first = evaluate(models, processor, records, folder=tmp_path, embeddings=False, progress=False)
    for model in models:
        monkeypatch.setattr(model, "match", None)
    again = evaluate(models, processor, records, folder=tmp_path, embeddings=False, progress=False)
    assert again.metrics == first.metrics
    assert [each.metrics for each in again.models] == [each.metrics for each in first.models]
