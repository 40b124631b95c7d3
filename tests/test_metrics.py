"""Metrics against independent NumPy oracles that sort, on unequal captions, heavy ties and several positives."""

import doctest

import numpy as np
import pytest
import torch

import modeling_tvrn.metrics.retrieval
from modeling_tvrn.metrics import (
    RankCounter,
    chance_level,
    mean_metrics,
    paired_bootstrap,
    positive_pairs,
    recall_table,
    retrieval_metrics,
    unimodal_metrics,
)


def sorted_ranks(scores: np.ndarray, positives: list[set[int]]) -> list[int]:
    """By sorting: candidates in falling order, of equal ones the wrong first; the place of the first right one."""
    ranks = []
    for query, right in zip(scores, positives, strict=True):
        is_right = np.isin(np.arange(len(query)), list(right))
        ranks.append(1 + int(np.argmax(is_right[np.lexsort((is_right, -query))])))
    return ranks


def oracle(scores: np.ndarray, pairs: np.ndarray) -> tuple[dict[str, float], list[int], list[int]]:
    captions_of = [set(pairs[pairs[:, 0] == i, 1]) for i in range(scores.shape[0])]
    images_of = [set(pairs[pairs[:, 1] == t, 0]) for t in range(scores.shape[1])]
    found = {"image_to_text": sorted_ranks(scores, captions_of), "text_to_image": sorted_ranks(scores.T, images_of)}
    named = {}
    for way, ranks in found.items():
        for k in (1, 5, 10):
            named[f"{way}_R@{k}"] = 100 * sum(rank <= k for rank in ranks) / len(ranks)
    named["rsum"] = sum(named.values())
    for way, ranks in found.items():
        named[f"{way}_median_rank"], named[f"{way}_mean_rank"] = np.median(ranks), np.mean(ranks)
    return named, found["image_to_text"], found["text_to_image"]


def random_gallery(seed: int, most_images: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Scores with heavy ties and some unscored, and a caption-to-image map with 1 to 7 captions an image, shuffled."""
    generator = np.random.default_rng(seed)
    images = int(generator.integers(1, most_images))
    rows = generator.permutation(np.repeat(np.arange(images), generator.integers(1, 8, size=images)))
    levels = int(generator.choice([2, 5, 1000]))
    scores = generator.integers(0, levels, size=(images, len(rows))).astype(np.float64)
    scores[np.arange(images)[:, None] == rows] += generator.integers(0, 3) * levels // 4
    if seed % 4 == 0:
        scores[generator.random(scores.shape) < 0.3] = -np.inf
    return scores, rows


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(start, start + 50) for start in range(0, 200, 50)])
def test_equals_sorting_on_random_matrices(seeds: range) -> None:
    """Ties, unequal captions, captions in any order and unscored pairs: the ranks of an implementation that sorts."""
    for seed in seeds:
        scores, rows = random_gallery(seed)
        expected, by_image, by_caption = oracle(scores, np.stack([rows, np.arange(len(rows))], axis=1))
        found = retrieval_metrics(scores, rows)
        assert found.image_to_text_ranks.tolist() == by_image and found.text_to_image_ranks.tolist() == by_caption
        named = found.as_dict()
        assert {name: named[name] for name in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(start, start + 50) for start in range(0, 200, 50)])
def test_several_images_a_caption(seeds: range) -> None:
    """ECCV's and CxC's form: 1 to 5 positives a query in both directions."""
    for seed in seeds:
        generator = np.random.default_rng(1000 + seed)
        scores, rows = random_gallery(seed)
        pairs = np.stack([rows, np.arange(len(rows))], axis=1)
        more = np.stack([generator.integers(0, scores.shape[0], 40), generator.integers(0, len(rows), 40)], axis=1)
        pairs = np.concatenate([pairs, more, more[:3]])  # pairs given twice count once
        expected, by_image, by_caption = oracle(scores, pairs)
        found = retrieval_metrics(torch.from_numpy(scores), positives=pairs)
        assert found.image_to_text_ranks.tolist() == by_image and found.text_to_image_ranks.tolist() == by_caption
        assert found.rsum == pytest.approx(expected["rsum"])


def test_the_fields_own_recall_functions_agree() -> None:
    """VSE++'s i2t and t2i, restated: five captions an image, ranks by argsort, no ties."""
    generator = np.random.default_rng(3)
    images = 57
    scores = generator.standard_normal((images, 5 * images)) + 2 * np.repeat(np.eye(images), 5, axis=1)
    first = [min(np.where(np.argsort(row)[::-1] == 5 * i + j)[0][0] for j in range(5)) for i, row in enumerate(scores)]
    by_caption = [np.where(np.argsort(scores[:, t])[::-1] == t // 5)[0][0] for t in range(5 * images)]
    found = retrieval_metrics(scores.astype(np.float32), np.arange(5 * images) // 5)
    for k in (1, 5, 10):
        assert found.image_to_text[k] == pytest.approx(100 * np.mean(np.array(first) < k))
        assert found.text_to_image[k] == pytest.approx(100 * np.mean(np.array(by_caption) < k))
    assert np.floor(found.image_to_text_median_rank) == np.floor(np.median(first)) + 1


def test_a_collapsed_model_does_not_look_perfect() -> None:
    """All scores equal: every wrong candidate is counted as better, and as a tie."""
    rows = np.repeat(np.arange(20), 5)
    found = retrieval_metrics(np.full((20, 100), 0.25), rows)
    assert found.rsum == 0 and found.ties == 20 * 95 + 100 * 19
    assert found.image_to_text_median_rank == 96 and found.text_to_image_median_rank == 20


def test_a_perfect_model_whose_positives_tie_is_perfect() -> None:
    """Equal scores of two captions of the same image are no tie against it."""
    rows = np.repeat(np.arange(12), 3)
    found = retrieval_metrics((rows == np.arange(12)[:, None]).astype(float), rows)
    assert found.rsum == 600 and found.ties == 0


def test_captions_without_an_image_are_candidates_and_no_queries() -> None:
    scores, rows = random_gallery(5)
    distractors = np.random.default_rng(5).integers(0, 30, (len(scores), 4)) / 8
    pairs = np.stack([rows, np.arange(len(rows))], axis=1)
    both = np.concatenate([scores, distractors], axis=1)
    found, plain = retrieval_metrics(both, positives=pairs, distractors=True), retrieval_metrics(scores, rows)
    assert found.text_to_image_ranks.tolist() == plain.text_to_image_ranks.tolist()
    best = [max(scores[image, rows == image]) for image in range(len(scores))]
    above = [int((distractors[image] >= best[image]).sum()) for image in range(len(scores))]
    assert (found.image_to_text_ranks - plain.image_to_text_ranks).tolist() == above and sum(above)
    assert (found.caption_count, found.text_to_image_unscored) == (len(rows), plain.text_to_image_unscored)
    with pytest.raises(ValueError, match="4 of .* captions have no image"):
        retrieval_metrics(both, positives=pairs)


def test_unscored_positives_come_last_and_are_counted() -> None:
    scores = np.array([[1.0, -np.inf, -np.inf], [0.5, -np.inf, 0.1], [-np.inf, 0.2, -np.inf]])
    found = retrieval_metrics(scores, [0, 1, 2])
    assert found.image_to_text_ranks.tolist() == [1, 3, 3] and found.text_to_image_ranks.tolist() == [1, 3, 3]
    assert (found.image_to_text_unscored, found.text_to_image_unscored, found.ties) == (2, 2, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_are_compared_in_their_own_precision(dtype: torch.dtype) -> None:
    """Two scores that differ in the last bit are no tie, whatever the precision."""
    base = torch.tensor([[1.0, 1.0]], dtype=dtype)
    above = base.clone()
    above[0, 0] = 1 + torch.finfo(dtype).eps
    scores = torch.cat([above, above.flip(1)])
    assert retrieval_metrics(scores, [0, 1]).rsum == 600
    assert retrieval_metrics(scores, [0, 1]).ties == 0


def test_layout_and_kind_of_the_matrix_do_not_matter() -> None:
    scores, rows = random_gallery(7)
    expected = retrieval_metrics(scores, rows)
    read_only = scores.copy()
    read_only.setflags(write=False)
    variants = [scores.tolist(), scores[:, ::-1][:, ::-1], np.asfortranarray(scores), scores.astype(">f8"), read_only]
    for variant in [*variants, scores.astype(np.int64), torch.tensor(scores, requires_grad=True)]:
        assert retrieval_metrics(variant, torch.tensor(rows)) == expected


@pytest.mark.parametrize("seed", range(12))
def test_ranks_do_not_depend_on_how_the_matrix_is_cut(seed: int) -> None:
    """Any blocks, in any order, of any images and captions, give the ranks of the whole matrix."""
    generator = np.random.default_rng(seed)
    scores, rows = random_gallery(seed, most_images=8)
    expected = retrieval_metrics(scores, rows)
    counter = RankCounter(*scores.shape, positive_pairs(*scores.shape, rows))

    def cut(count: int) -> list[np.ndarray]:
        return np.array_split(generator.permutation(count), int(generator.integers(1, count + 1)))

    for add in (counter.add_positives, counter.add):
        columns_of = cut(scores.shape[1])
        blocks = [(r, c) for r in cut(scores.shape[0]) for c in columns_of]
        for number in generator.permutation(len(blocks)):
            r, c = blocks[number]
            add(torch.from_numpy(scores[np.ix_(r, c)]), r, c)
    ranks = counter.ranks()
    assert ranks.image_to_text.tolist() == expected.image_to_text_ranks.tolist()
    assert ranks.text_to_image.tolist() == expected.text_to_image_ranks.tolist()
    assert ranks.ties == expected.ties


def test_a_counter_refuses_a_partial_count() -> None:
    """A forgotten block would make every rank too good."""
    scores, pairs = torch.rand(3, 4), positive_pairs(3, 4, [0, 1, 2, 2])
    counter = RankCounter(3, 4, pairs)
    with pytest.raises(ValueError, match="add_positives before the first add"):
        counter.add(scores, np.arange(3), np.arange(4))
    counter.add_positives(scores, np.arange(3), np.arange(4))
    counter.add(scores[:2], np.arange(2), np.arange(4))
    with pytest.raises(ValueError, match=r"8 pairs were counted; expected 12"):
        counter.ranks()


@pytest.mark.parametrize(
    ("scores", "arguments", "message"),
    [
        ([[0.1, np.nan], [0.2, 0.3]], {"caption_image_rows": [0, 1]}, r"image 0 and caption 1 is nan"),
        ([[0.1, 0.5], [np.inf, 0.3]], {"caption_image_rows": [0, 1]}, r"image 1 and caption 0 is inf"),
        ([0.1, 0.2], {"caption_image_rows": [0, 1]}, r"shape \(2,\); expected \(images, captions\)"),
        (np.ones((4, 2)), {"caption_image_rows": [0, 0, 1, 1]}, "needs a transpose"),
        (np.ones((2, 3)), {"caption_image_rows": [0, 1, 2]}, "names image 2; expected 0 to 1"),
        (np.ones((2, 3)), {"caption_image_rows": [0, 1, -1]}, "names image -1"),
        (np.ones((2, 3)), {"caption_image_rows": [0.0, 1.0, 1.0]}, "expected integers"),
        (np.ones((3, 3)), {"caption_image_rows": [0, 2, 2]}, "1 of 3 images have no caption .the first is image 1"),
        (np.ones((2, 3)), {"positives": [[0, 0], [1, 1]]}, "1 of 3 captions have no image .the first is caption 2"),
        (np.ones((2, 2)), {"positives": [0, 1]}, r"expected \(n, 2\)"),
        (np.ones((2, 2)), {}, "and not both"),
        (np.ones((2, 2)), {"caption_image_rows": [0, 1], "positives": [[0, 0], [1, 1]]}, "and not both"),
        (np.ones((0, 0)), {"caption_image_rows": []}, "0 images"),
        (np.ones((2, 2), dtype=complex), {"caption_image_rows": [0, 1]}, "real numbers"),
    ],
)
def test_bad_input_is_refused_with_its_values(scores, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(scores, **arguments)


def test_chance_is_what_random_scores_reach_on_average() -> None:
    generator = np.random.default_rng(0)
    rows = np.repeat(np.arange(15), generator.integers(1, 5, size=15))
    drawn = [retrieval_metrics(generator.random((15, len(rows))), rows).as_dict() for _ in range(400)]
    for name, value in chance_level(15, len(rows), rows).as_dict().items():
        sample = [each[name] for each in drawn]
        assert value == pytest.approx(np.mean(sample), abs=4 * np.std(sample) / np.sqrt(len(sample)))


def test_chance_of_the_usual_test_split() -> None:
    """The figures everyone prints for 1000 × 5."""
    chance = chance_level(1000, 5000, np.repeat(np.arange(1000), 5))
    assert list(chance.text_to_image.values()) == pytest.approx([0.1, 0.5, 1.0])
    assert list(chance.image_to_text.values()) == pytest.approx([0.1, 0.499, 0.996], abs=1e-3)
    assert chance_level(2, 3, [0, 1, 1]).image_to_text[10] == 100


def test_folds_are_averaged() -> None:
    generator = np.random.default_rng(0)
    folds = [retrieval_metrics(generator.random((10, 20)), np.repeat(np.arange(10), 2)) for _ in range(3)]
    mean = mean_metrics(folds)
    for name in ("rsum", "image_to_text_R@5", "text_to_image_median_rank", "image_to_text_mean_rank"):
        assert mean.as_dict()[name] == pytest.approx(np.mean([fold.as_dict()[name] for fold in folds]))
    assert mean.image_count == 30


def unimodal_oracle(vectors: np.ndarray, labels: list) -> list[int]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ranks = []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        right = {j for j in others if labels[j] == label}
        if right:
            order = sorted(others, key=lambda j: (-float(unit[i] @ unit[j]), j in right))
            ranks.append(1 + next(place for place, j in enumerate(order) if j in right))
    return ranks


@pytest.mark.parametrize("seed", range(10))
def test_unimodal_recall_equals_sorting(seed: int) -> None:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((37, 5))
    labels = [int(label) for label in generator.integers(0, 25, size=37)]
    expected = unimodal_oracle(vectors, labels)
    for block_size in (1, 7, 64):
        found = unimodal_metrics(vectors, labels, block_size=block_size)
        assert found.ranks.tolist() == expected
        assert (found.query_count, found.lonely_count) == (len(expected), 37 - len(expected))
        assert found.recall[5] == pytest.approx(100 * np.mean(np.array(expected) <= 5))


def test_unimodal_collapse_and_labels() -> None:
    """Equal embeddings rank last; the number 1 and the text "1" are different labels."""
    same = unimodal_metrics(np.ones((6, 3)), ["a", "a", "b", "b", "c", "c"])
    assert same.recall[1] == 0 and same.ranks.tolist() == [5] * 6 and same.ties == 24
    with pytest.raises(ValueError, match="None of 2 items"):
        unimodal_metrics(np.eye(2), [1, "1"])
    with pytest.raises(ValueError, match="Embedding 1 is zero"):
        unimodal_metrics(np.array([[1.0, 0.0], [0.0, 0.0]]), [1, 1])
    with pytest.raises(ValueError, match="with 3 labels"):
        unimodal_metrics(np.eye(2), [1, 1, 1])


def test_bootstrap_of_a_system_with_itself_finds_nothing() -> None:
    scores, rows = random_gallery(1)
    metrics = retrieval_metrics(scores, rows)
    found = paired_bootstrap(metrics, metrics, resamples=100)
    assert set(found.difference.values()) == {0.0} and set(found.p_value.values()) == {1.0}


@pytest.mark.slow
def test_bootstrap_agrees_with_drawing_the_queries_one_by_one() -> None:
    """The interval of the plain algorithm: draw queries with replacement, recompute, take the difference."""
    generator = np.random.default_rng(5)
    rows = np.repeat(np.arange(40), 3)
    right = rows == np.arange(40)[:, None]
    better, worse = (
        retrieval_metrics(generator.standard_normal(right.shape) + gain * right, rows) for gain in (3, 1.5)
    )
    found = paired_bootstrap(better, worse, resamples=20_000)
    draws = []
    for _ in range(4000):
        total = 0.0
        for way in ("image_to_text_ranks", "text_to_image_ranks"):
            left, other = getattr(better, way), getattr(worse, way)
            chosen = generator.integers(0, len(left), len(left))
            total += sum(100 * (np.mean(left[chosen] <= k) - np.mean(other[chosen] <= k)) for k in (1, 5, 10))
        draws.append(total)
    assert found.difference["rsum"] == pytest.approx(better.rsum - worse.rsum)
    width = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
    assert found.low["rsum"] == pytest.approx(np.quantile(draws, 0.025), abs=0.06 * width)
    assert found.high["rsum"] == pytest.approx(np.quantile(draws, 0.975), abs=0.06 * width)
    assert found.p_value["rsum"] < 0.01 and "rsum" in found.table()


@pytest.mark.slow
def test_bootstrap_by_image_agrees_with_drawing_images_one_by_one() -> None:
    """An image is drawn with its captions, whose number differs; their ranks go together, so the interval is wider."""
    generator = np.random.default_rng(5)
    rows = np.repeat(np.arange(40), generator.integers(1, 7, 40))
    right = rows == np.arange(40)[:, None]
    easy = generator.standard_normal((40, 1)) * right  # some images are found by all of their captions
    better, worse = (
        retrieval_metrics(generator.standard_normal(right.shape) + gain * right + 2 * easy * gain, rows)
        for gain in (2.5, 1.2)
    )
    found = paired_bootstrap(better, worse, resamples=20_000, caption_image_rows=rows)
    draws = []
    for _ in range(4000):
        images = generator.integers(0, 40, 40)
        captions = np.concatenate([np.flatnonzero(rows == image) for image in images])
        total = 0.0
        for way, chosen in (("image_to_text_ranks", images), ("text_to_image_ranks", captions)):
            left, other = getattr(better, way)[chosen], getattr(worse, way)[chosen]
            total += sum(100 * (np.mean(left <= k) - np.mean(other <= k)) for k in (1, 5, 10))
        draws.append(total)
    assert found.difference["rsum"] == pytest.approx(better.rsum - worse.rsum)
    width = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
    assert found.low["rsum"] == pytest.approx(np.quantile(draws, 0.025), abs=0.06 * width)
    assert found.high["rsum"] == pytest.approx(np.quantile(draws, 0.975), abs=0.06 * width)
    assert f"{found.difference['rsum']:+.1f} (95 %: " in found.in_words()
    with pytest.raises(ValueError, match="expected the image of each of the"):
        paired_bootstrap(better, worse, caption_image_rows=rows[1:])


def test_bootstrap_refuses_different_galleries() -> None:
    one, two = (retrieval_metrics(np.eye(size), np.arange(size)) for size in (3, 4))
    with pytest.raises(ValueError, match="3 and 4"):
        paired_bootstrap(one, two)
    with pytest.raises(ValueError, match="resamples is 0"):
        paired_bootstrap(one, one, resamples=0)


def test_the_table_shows_every_recall() -> None:
    metrics = retrieval_metrics(np.eye(3), np.arange(3))
    lines = recall_table({"a model": metrics, "chance": chance_level(3, 3, np.arange(3))}, "three").splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].startswith("| three")
    assert lines[2].split("|")[-2].strip() == "600.0" and lines[3].split("|")[2].strip() == "33.3"


def test_the_documented_example_holds() -> None:
    assert doctest.testmod(modeling_tvrn.metrics.retrieval).failed == 0
