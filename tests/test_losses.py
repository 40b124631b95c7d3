"""Losses against float64 loops written from the formulas of tvrn.md §6, and the mistakes of a batch they must
survive."""

import math

import numpy as np
import pytest
import torch

from modeling_tvrn.losses import (
    check_score_spread,
    contrastive_loss,
    distillation_loss,
    hardest_negative_loss,
    matching_loss,
    matching_loss_floor,
    positive_mask,
    positives_cross_entropy,
)

# Image 7 stands in two rows, image 3 has three captions, and there are fewer images than captions.
IMAGE_IDS = [7, 3, 11, 7, 5]
TEXT_IMAGE_IDS = [3, 7, 3, 5, 11, 3, 5]
SCORE_LOSSES = {"matching": matching_loss, "hardest_negative": hardest_negative_loss}


def ids(values: list[int]) -> torch.Tensor:
    return torch.tensor(values)


def random_scores(seed: int = 0, rows: int = 5, columns: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.02, 0.98, (rows, columns))


def both_directions(scores: np.ndarray, image_ids: list[int], text_image_ids: list[int], of_anchor) -> float:
    """The mean over rows plus the mean over columns of `of_anchor(scores of positives, scores of negatives)`."""
    total = 0.0
    for matrix, anchors, candidates in (
        (scores, image_ids, text_image_ids),
        (scores.T, text_image_ids, image_ids),
    ):
        values = []
        for a, anchor in enumerate(anchors):
            positives = [matrix[a, k] for k, candidate in enumerate(candidates) if candidate == anchor]
            negatives = [matrix[a, k] for k, candidate in enumerate(candidates) if candidate != anchor]
            values.append(of_anchor(positives, negatives))
        total += sum(values) / len(values)
    return total


def matching_oracle(scores, image_ids, text_image_ids, margin=0.2, temperature=0.05) -> float:
    def of_anchor(positives: list[float], negatives: list[float]) -> float:
        terms = []
        for positive in positives:
            inside = 1.0
            for negative in negatives:
                inside += math.exp(max(0.0, margin + negative - positive) / temperature)
            terms.append(math.log(inside))
        return sum(terms) / len(terms)

    return both_directions(scores, image_ids, text_image_ids, of_anchor)


def hinge_oracle(scores, image_ids, text_image_ids, margin=0.2) -> float:
    def of_anchor(positives: list[float], negatives: list[float]) -> float:
        hardest = max(negatives, default=-math.inf)
        return sum(max(0.0, margin + hardest - positive) for positive in positives) / len(positives)

    return both_directions(scores, image_ids, text_image_ids, of_anchor)


def cross_entropy_oracle(logits, image_ids, text_image_ids) -> float:
    def of_anchor(positives: list[float], negatives: list[float]) -> float:
        peak = max(positives + negatives)
        total = math.log(sum(math.exp(value - peak) for value in positives + negatives)) + peak
        return sum(total - value for value in positives) / len(positives)

    return both_directions(logits, image_ids, text_image_ids, of_anchor) / 2


ORACLES = {"matching": matching_oracle, "hardest_negative": hinge_oracle}
BATCHES = [
    (IMAGE_IDS, TEXT_IMAGE_IDS),
    ([4, 9, 2], [9, 2, 4]),
    ([1, 1, 2], [2, 1, 2, 1]),
    ([6, 8], [8, 6, 6, 6, 6]),
]


@pytest.mark.parametrize("name", SCORE_LOSSES)
@pytest.mark.parametrize(("image_ids", "text_image_ids"), BATCHES)
def test_a_loss_on_scores_equals_a_loop_over_anchors(
    name: str, image_ids: list[int], text_image_ids: list[int]
) -> None:
    scores = random_scores(len(image_ids), len(image_ids), len(text_image_ids))
    got = SCORE_LOSSES[name](torch.tensor(scores), ids(image_ids), ids(text_image_ids))
    assert got.item() == pytest.approx(ORACLES[name](scores, image_ids, text_image_ids), abs=1e-12)


@pytest.mark.parametrize(("margin", "temperature"), [(0.0, 0.05), (0.35, 0.01), (1.0, 1.0)])
def test_margin_and_temperature_reach_the_formula(margin: float, temperature: float) -> None:
    scores = random_scores()
    expected = matching_oracle(scores, IMAGE_IDS, TEXT_IMAGE_IDS, margin, temperature)
    got = matching_loss(torch.tensor(scores), ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS), margin, temperature)
    assert got.item() == pytest.approx(expected, abs=1e-12)
    hinge = hardest_negative_loss(torch.tensor(scores), ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS), margin)
    assert hinge.item() == pytest.approx(hinge_oracle(scores, IMAGE_IDS, TEXT_IMAGE_IDS, margin), abs=1e-12)


@pytest.mark.parametrize(("image_ids", "text_image_ids"), BATCHES)
def test_contrastive_loss_spreads_its_target_over_the_positives(
    image_ids: list[int], text_image_ids: list[int]
) -> None:
    generator = np.random.default_rng(3)
    images, texts = (generator.normal(size=(len(each), 6)) for each in (image_ids, text_image_ids))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    expected = cross_entropy_oracle(14.0 * images @ texts.T, image_ids, text_image_ids)
    got = contrastive_loss(
        torch.tensor(images), torch.tensor(texts), torch.tensor([math.log(14.0)]), ids(image_ids), ids(text_image_ids)
    )
    assert got.ndim == 0
    assert got.item() == pytest.approx(expected, rel=1e-6)  # logit_scale is float32, as a parameter is
    logits = torch.tensor(14.0 * images @ texts.T)
    assert positives_cross_entropy(logits, ids(image_ids), ids(text_image_ids)).item() == pytest.approx(expected)


def test_positives_are_decided_by_image_id_in_rows_and_columns() -> None:
    mask = positive_mask(ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[image == text for text in TEXT_IMAGE_IDS] for image in IMAGE_IDS]


@pytest.mark.parametrize("name", SCORE_LOSSES)
@pytest.mark.parametrize("twice", ["caption", "image"])
def test_another_caption_or_copy_of_the_same_image_is_never_a_negative(name: str, twice: str) -> None:
    """The first image's second positive scores far above its first: nothing to learn from that."""
    scores = torch.tensor([[0.6, 0.99, 0.1], [0.1, 0.1, 0.9]])
    sides = ids([1, 2]), ids([1, 1, 2])
    if twice == "image":
        scores, sides = scores.T, sides[::-1]
    satisfied = 0.0 if name == "hardest_negative" else matching_loss_floor(*sides).item()
    assert SCORE_LOSSES[name](scores, *sides).item() == pytest.approx(satisfied, abs=1e-6)


@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_the_batch_order_does_not_matter(name: str) -> None:
    scores, generator = torch.tensor(random_scores()), torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(5, generator=generator), torch.randperm(7, generator=generator)
    loss = SCORE_LOSSES[name]
    shuffled = loss(scores[rows][:, columns], ids(IMAGE_IDS)[rows], ids(TEXT_IMAGE_IDS)[columns])
    torch.testing.assert_close(shuffled, loss(scores, ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS)))
    transposed = loss(scores.T, ids(TEXT_IMAGE_IDS), ids(IMAGE_IDS))
    torch.testing.assert_close(transposed, loss(scores, ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS)))


def test_ids_matter_only_by_equality() -> None:
    """Row numbers, dataset ids and negative ids of the same images train the same way."""
    scores = torch.tensor(random_scores())
    renamed = {7: -4, 3: 10**12, 11: 0, 5: 2**40}
    expected = matching_loss(scores, ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS))
    got = matching_loss(scores, *(ids([renamed[each] for each in side]) for side in (IMAGE_IDS, TEXT_IMAGE_IDS)))
    torch.testing.assert_close(got, expected)


def test_the_matching_loss_reaches_its_floor_and_not_below() -> None:
    image_ids, text_image_ids = ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS)
    separated = positive_mask(image_ids, text_image_ids).double() * 0.8 + 0.1
    floor = matching_loss_floor(image_ids, text_image_ids)
    rows = np.mean([math.log(1 + sum(t != i for t in TEXT_IMAGE_IDS)) for i in IMAGE_IDS])
    columns = np.mean([math.log(1 + sum(t != i for i in IMAGE_IDS)) for t in TEXT_IMAGE_IDS])
    assert floor.item() == pytest.approx(rows + columns, abs=1e-6)
    assert matching_loss(separated, image_ids, text_image_ids).item() == pytest.approx(floor.item(), abs=1e-6)
    for seed in range(5):
        assert matching_loss(torch.tensor(random_scores(seed)), image_ids, text_image_ids) > floor


@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_gradients_of_a_loss_on_scores_are_exact(name: str) -> None:
    scores = torch.tensor(random_scores(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: SCORE_LOSSES[name](s, ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS)), (scores,))


def test_gradients_of_the_contrastive_loss_are_exact() -> None:
    generator = torch.Generator().manual_seed(4)
    images, texts = (torch.randn(n, 3, dtype=torch.float64, generator=generator, requires_grad=True) for n in (5, 7))
    scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *given: contrastive_loss(*given, ids(IMAGE_IDS), ids(TEXT_IMAGE_IDS)), (images, texts, scale)
    )


@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_a_batch_of_one_image_has_no_negative_and_no_gradient(name: str) -> None:
    """All captions of a batch may belong to one image: no NaN from the empty maximum or sum."""
    scores = torch.tensor([[0.3, 0.7, 0.5]], requires_grad=True)
    loss = SCORE_LOSSES[name](scores, ids([4]), ids([4, 4, 4]))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None and not scores.grad.any()


@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_bfloat16_scores_under_autocast_lose_no_small_terms(name: str) -> None:
    """Summed in bfloat16, log(1 + hundreds of ones) would be off by percents; the loss works in float32."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(64, 64, generator=generator).bfloat16()
    rows = torch.arange(64)
    expected = ORACLES[name](scores.double().numpy(), list(range(64)), list(range(64)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = SCORE_LOSSES[name](scores, rows, rows)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected, rel=2e-6)


def test_the_contrastive_loss_multiplies_embeddings_in_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(48, 33, generator=generator)) for _ in range(2))
    rows, scale = torch.arange(48), torch.tensor([math.log(100.0)])
    expected = cross_entropy_oracle(
        100.0 * images.double().numpy() @ texts.double().numpy().T, [*range(48)], [*range(48)]
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = contrastive_loss(images, texts, scale, rows, rows)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_extreme_scores_and_scales_stay_finite_in_float32() -> None:
    """Saturated sigmoids (exactly 0 and 1), a small temperature and a large logit scale: exp alone would overflow."""
    worst = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    rows = ids([0, 1])
    loss = matching_loss(worst, rows, rows, margin=1.0, temperature=0.005)
    loss.backward()
    assert loss.item() == pytest.approx(2 * (1.0 + 1.0) / 0.005)
    assert worst.grad is not None and worst.grad.isfinite().all() and worst.grad.any()
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert contrastive_loss(apart, -apart, math.log(500.0), rows, rows).item() == pytest.approx(1000.0)


def test_scores_that_have_collapsed_stop_training_with_a_message() -> None:
    """Hardest negatives from the start leave every pair with one score; the hinge then stays at 2·margin."""
    rows = torch.arange(6)
    collapsed = torch.full((6, 6), 0.5) + 1e-6 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    assert hardest_negative_loss(collapsed, rows, rows).item() == pytest.approx(0.4, abs=1e-4)
    with pytest.raises(RuntimeError, match="collapsed.*matching_loss"):
        check_score_spread(collapsed)
    with pytest.raises(RuntimeError, match="collapsed"):
        check_score_spread(torch.full((2, 2), torch.nan))
    scores = random_scores()
    assert check_score_spread(torch.tensor(scores)) == pytest.approx(scores.std(ddof=1))
    assert check_score_spread(0.5 + 0.002 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))) < 0.005


@pytest.mark.parametrize("name", SCORE_LOSSES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(2, 3) * 9}, r"sigmoid\(logits\), not logits"),
        ({"scores": torch.tensor([[0.2, 0.3, torch.nan], [0.1, 0.2, 0.3]])}, "first is nan"),
        ({"scores": torch.full((3, 2), 0.5)}, r"\(3, 2\).*2 image_ids and 3 text_image_ids"),
        ({"scores": torch.full((3,), 0.5)}, r"shape \(3,\)"),
        ({"image_ids": ids([1, 2, 3])}, "3 image_ids"),
        ({"text_image_ids": ids([1, 2])}, "2 text_image_ids"),
        ({"image_ids": torch.tensor([1.0, 2.0])}, "image_ids.*float32.*integer"),
        ({"text_image_ids": torch.tensor([True, False, True])}, "text_image_ids.*bool.*integer"),
        ({"image_ids": ids([1, 5])}, r"1 of 2 image_ids have no caption in the batch, among them \[5\]"),
        ({"text_image_ids": ids([1, 2, 9])}, r"1 of 3 text_image_ids have no image in the batch, among them \[9\]"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"margin": math.nan}, "margin is nan"),
    ],
)
def test_input_that_cannot_train_is_refused_with_what_came_and_the_fix(name: str, change: dict, message: str) -> None:
    given = {"scores": torch.full((2, 3), 0.5), "image_ids": ids([1, 2]), "text_image_ids": ids([1, 2, 2])}
    SCORE_LOSSES[name](**given)
    with pytest.raises(ValueError, match=message):
        SCORE_LOSSES[name](**{**given, **change})


def test_bad_temperature_embeddings_and_logits_are_refused() -> None:
    rows, scores = ids([1, 2]), torch.eye(2)
    for temperature in (0.0, -0.05, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            matching_loss(scores, rows, rows, temperature=temperature)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*same space"):
        contrastive_loss(torch.ones(2, 3), torch.ones(2, 4), 0.0, rows, rows)
    with pytest.raises(ValueError, match="finite numbers"):
        contrastive_loss(torch.ones(2, 3), torch.full((2, 3), torch.inf), 0.0, rows, rows)
    with pytest.raises(ValueError, match="finite numbers"):
        positives_cross_entropy(torch.full((2, 2), torch.nan), rows, rows)
    with pytest.raises(ValueError, match="at least one"):
        matching_loss(torch.zeros(0, 0), ids([]).long(), ids([]).long())


def test_label_smoothing_spreads_a_share_of_the_target_in_both_cross_entropies() -> None:
    """A keyword that one of the two swallows would train without it and say nothing."""
    images, texts = unit_rows(4, 5), unit_rows(6, 5, seed=1)
    ids = torch.tensor([3, 1, 4, 9]), torch.tensor([3, 1, 4, 9, 1, 3])
    logits = 2.0 * images @ texts.T
    targets = (ids[0][:, None] == ids[1]).double()
    expected = 0.0
    for values, positives in ((logits, targets), (logits.T, targets.T)):
        smooth = 0.9 * positives / positives.sum(1, keepdim=True) + 0.1 / positives.shape[1]
        expected -= (smooth * values.double().log_softmax(1)).sum(1).mean().item() / 2
    scale = torch.tensor([2.0]).log()
    smoothed = contrastive_loss(images, texts, scale, *ids, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(expected, abs=1e-6)
    assert positives_cross_entropy(logits, *ids, label_smoothing=0.1).item() == pytest.approx(expected, abs=1e-6)


def unit_rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def distillation_oracle(images: np.ndarray, texts: np.ndarray, scale: float, taught: np.ndarray, t: float) -> float:
    """KL of the teaching rows and columns from the embeddings', one anchor after the other."""
    total = 0.0
    for logits, targets in ((images @ texts.T, taught), (texts @ images.T, taught.T)):
        for row, target in zip(math.exp(scale) * logits, targets / t, strict=True):
            p, q = np.exp(target) / np.exp(target).sum(), np.exp(row) / np.exp(row).sum()
            total += (p * (np.log(p) - np.log(q))).sum() / len(logits)
    return total / 2


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_distillation_is_the_divergence_from_the_pair_logits(temperature: float) -> None:
    images, texts = unit_rows(5, 6, 1).double().numpy(), unit_rows(7, 6, 2).double().numpy()
    taught = np.random.default_rng(3).normal(0, 3, (5, 7))
    expected = distillation_oracle(images, texts, 1.5, taught, temperature)
    found = distillation_loss(*map(torch.tensor, (images, texts, np.float64(1.5), taught)), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_distillation_ends_where_the_embeddings_agree_and_leaves_the_score_alone() -> None:
    images, texts = (unit_rows(rows, 6).double().requires_grad_() for rows in (5, 7))
    agreed = math.exp(2.0) * images.detach() @ texts.detach().T
    assert distillation_loss(images, texts, 2.0, 3 * agreed + 5, 3.0).item() == pytest.approx(0, abs=1e-12)
    taught = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    distillation_loss(images, texts, 2.0, taught).backward()
    assert taught.grad is None and images.grad.abs().sum() > 0 and texts.grad.abs().sum() > 0
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: distillation_loss(*given, taught), (images, texts, scale))


def test_distillation_refuses_what_cannot_teach() -> None:
    images, texts = torch.eye(3, 4), torch.eye(2, 4)
    with pytest.raises(ValueError, match=r"temperature is 0.*above 0"):
        distillation_loss(images, texts, 1.0, torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*\(3, 2\) pairs"):
        distillation_loss(images, texts, 1.0, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="1 of them NaN"):
        distillation_loss(images, texts, 1.0, torch.tensor([[0, 1], [math.nan, 0], [0, 0]]))
