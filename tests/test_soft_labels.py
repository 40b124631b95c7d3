"""CUSA against float64 loops written from its formulas, and the batches that would train it towards nothing."""

import logging
import math

import numpy as np
import pytest
import torch

from modeling_tvrn.losses import CUSA, cross_modal_soft_label_loss, soft_labels, uni_modal_soft_label_loss

N = 5
INPUTS = ("image_teacher_embeds", "text_teacher_embeds", "similarity", "image_embeds", "text_embeds")
SIZES = {"image_teacher_embeds": 7, "text_teacher_embeds": 3, "similarity": N, "image_embeds": 4, "text_embeds": 4}


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Teacher vectors of other sizes than the student's, cosine-like similarities; no two alike, no unit norms."""
    generator = np.random.default_rng(seed)
    given = {name: generator.normal(size=(N, SIZES[name])) for name in INPUTS}
    return {**given, "similarity": np.tanh(given["similarity"])}


def tensors(given: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in given.items()}


def softmax_row(row) -> list[float]:
    exponents = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponents) for value in exponents]


def cosine_rows(vectors: np.ndarray) -> list[list[float]]:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(a * a) * sum(b * b))

    return [[cosine(a, b) for b in vectors] for a in vectors]


def labels_oracle(cosines, temperature: float = 1.0) -> list[list[float]]:
    return [softmax_row([value / temperature for value in row]) for row in cosines]


def divergence_oracle(labels, similarity, temperature: float) -> float:
    total = 0.0
    for label, row in zip(labels, similarity, strict=True):
        student = softmax_row([value / temperature for value in row])
        total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(label, student, strict=True) if p > 0)
    return total / len(labels)


def about_mean(vectors: np.ndarray) -> np.ndarray:
    unit = np.array([vector / math.sqrt(sum(vector * vector)) for vector in vectors])
    return unit - sum(unit) / len(unit)


def without_self(rows) -> list[list[float]]:
    return [[value for column, value in enumerate(row) if column != number] for number, row in enumerate(rows)]


def cusa_oracle(
    given: dict[str, np.ndarray],
    teachers: str,
    temperature: float = 0.45,
    exclude_self: bool = False,
    center_teachers: bool = False,
) -> tuple[float, float]:
    vectors = [given[f"{side}_teacher_embeds"] for side in ("image", "text")]
    images, texts = (cosine_rows(about_mean(side) if center_teachers else side) for side in vectors)
    own = labels_oracle(images), labels_oracle(texts)
    cross = own
    if teachers != "own":
        combine = {"mean": lambda a, b: (a + b) / 2, "geometric_mean": lambda a, b: math.sqrt(max(0.0, a * b))}[
            teachers
        ]
        both = [[combine(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(images, texts, strict=True)]
        cross = labels_oracle(both), labels_oracle(both)
    similarity = given["similarity"]
    students = [similarity, similarity.T, *(cosine_rows(given[f"{side}_embeds"]) for side in ("image", "text"))]
    if exclude_self:
        # Rows are distributions over the others: the softmax runs over one entry less.
        students = [without_self(rows) for rows in students]
        cross, own = ([softmax_row_again(rows) for rows in pair] for pair in (cross, own))
    csa = [divergence_oracle(cross[k], students[k], temperature) for k in (0, 1)]
    usa = [divergence_oracle(own[k], students[2 + k], temperature) for k in (0, 1)]
    return sum(csa) / 2, sum(usa) / 2


def softmax_row_again(rows) -> list[list[float]]:
    """Distributions over the others alone: without the own share, and sums of 1 again."""
    return [[value / sum(row) for value in row] for row in without_self(rows)]


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_soft_labels_are_the_softmax_of_the_teachers_cosines(temperature: float) -> None:
    vectors = batch()["image_teacher_embeds"]
    labels = soft_labels(torch.tensor(vectors), temperature)
    np.testing.assert_allclose(labels.numpy(), labels_oracle(cosine_rows(vectors), temperature), atol=1e-12)
    torch.testing.assert_close(labels, soft_labels(torch.tensor(vectors * 37.0), temperature))
    assert (labels.argmax(dim=1) == torch.arange(N)).all()  # the diagonal is kept


def test_soft_labels_of_the_others_about_the_mean() -> None:
    vectors = batch()["image_teacher_embeds"]
    labels = soft_labels(torch.tensor(vectors), 0.3, exclude_self=True, center_teachers=True)
    others = labels_oracle(without_self(cosine_rows(about_mean(vectors))), 0.3)
    np.testing.assert_allclose(np.array(without_self(labels.numpy())), others, atol=1e-12)
    assert not labels.diagonal().any()
    with pytest.raises(ValueError, match="one item; with exclude_self expected at least two"):
        soft_labels(torch.tensor(vectors[:1]), exclude_self=True)


@pytest.mark.parametrize("variant", [{}, {"exclude_self": True}, {"center_teachers": True}])
@pytest.mark.parametrize("teachers", ["own", "mean", "geometric_mean"])
def test_cusa_equals_its_formulas(teachers: str, variant: dict[str, bool]) -> None:
    given = batch(1)
    csa, usa = cusa_oracle(given, teachers, **variant)
    result = CUSA(alpha=0.6, beta=0.3, teachers=teachers, **variant)(**tensors(given))
    assert result.cross_modal.item() == pytest.approx(csa, rel=1e-6)  # the learned temperatures are float32
    assert result.uni_modal.item() == pytest.approx(usa, rel=1e-6)
    assert result.loss.item() == pytest.approx(0.6 * csa + 0.3 * usa, rel=1e-6)


def test_the_functions_use_each_temperature_for_its_side() -> None:
    given = batch(2)
    labels = [soft_labels(torch.tensor(given[f"{side}_teacher_embeds"])) for side in ("image", "text")]
    students = [torch.tensor(cosine_rows(given[f"{side}_embeds"])) for side in ("image", "text")]
    got = uni_modal_soft_label_loss(*students, *labels, 0.2, 0.8)
    expected = [divergence_oracle(labels[k].tolist(), students[k].tolist(), (0.2, 0.8)[k]) for k in (0, 1)]
    assert got.item() == pytest.approx(sum(expected) / 2, abs=1e-12)
    similarity = given["similarity"]
    got = cross_modal_soft_label_loss(torch.tensor(similarity), *labels, 0.3)
    expected = [divergence_oracle(labels[k].tolist(), (similarity, similarity.T)[k], 0.3) for k in (0, 1)]
    assert got.item() == pytest.approx(sum(expected) / 2, abs=1e-12)


def test_a_student_that_agrees_with_its_teachers_has_no_loss_and_no_gradient() -> None:
    given = tensors(batch(3))
    cosines = torch.tensor(cosine_rows(given["image_teacher_embeds"].numpy()), requires_grad=True)
    labels = soft_labels(given["image_teacher_embeds"], 0.45)
    loss = cross_modal_soft_label_loss(cosines, labels, labels, 0.45)
    (gradient,) = torch.autograd.grad(loss, cosines)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    disagreeing = cross_modal_soft_label_loss(given["similarity"], labels, labels, 0.45)
    assert disagreeing > 0.01


@pytest.mark.parametrize("variant", [{}, {"exclude_self": True, "center_teachers": True}])
def test_gradients_are_exact_and_reach_embeddings_similarities_and_temperatures(variant: dict[str, bool]) -> None:
    cusa, given = CUSA(**variant).double(), tensors(batch(4))
    students = tuple(given[name].requires_grad_() for name in INPUTS[2:])
    teachers = [given[name] for name in INPUTS[:2]]
    assert torch.autograd.gradcheck(lambda *students: cusa(*teachers, *students).loss, students)
    cusa(**given).loss.backward()
    for parameter in cusa.parameters():
        step, value = 1e-6, parameter.detach().clone()
        losses = []
        for sign in (1, -1):
            parameter.data = value + sign * step
            losses.append(cusa(**given).loss.item())
        parameter.data = value
        assert parameter.grad.item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5)


def test_labels_of_the_others_say_nothing_of_the_item_itself() -> None:
    """However near an item's own similarity, or its own label: both are left out."""
    given = tensors(batch(11))
    labels = soft_labels(given["text_teacher_embeds"], 0.2, exclude_self=True)
    assert not labels.diagonal().any()
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(N, dtype=torch.float64))
    similarity = given["similarity"].requires_grad_()
    loss = cross_modal_soft_label_loss(similarity, labels, labels, 0.3, exclude_self=True)
    (gradient,) = torch.autograd.grad(loss, similarity)
    assert not gradient.diagonal().any()
    assert gradient[~torch.eye(N, dtype=torch.bool)].all()
    moved = cross_modal_soft_label_loss(similarity + 9 * torch.eye(N), labels, labels, 0.3, exclude_self=True)
    torch.testing.assert_close(moved, loss)
    with pytest.raises(ValueError, match=r"image_soft_labels gives items up to 0\.\d+ of their own row"):
        cross_modal_soft_label_loss(similarity, soft_labels(given["image_teacher_embeds"]), labels, 0.3, True)


def test_logits_have_the_models_own_scale_and_no_temperature_here() -> None:
    given = tensors(batch(13))
    cusa = CUSA(alpha=0.7, beta=0.0, on_logits=True)
    labels = [soft_labels(given[f"{side}_teacher_embeds"]) for side in ("image", "text")]
    expected = cross_modal_soft_label_loss(given["similarity"] * 7, *labels, 1.0)
    scale = torch.tensor(7.0, requires_grad=True)
    result = cusa(*(given[name] for name in INPUTS[:2]), similarity=given["similarity"] * scale)
    torch.testing.assert_close(result.loss, 0.7 * expected)
    result.loss.backward()
    assert scale.grad
    assert {name for name, _ in cusa.named_parameters()} == {"image_temperature", "text_temperature"}
    cusa.clamp_temperatures()


def test_features_of_one_sign_tell_items_apart_about_their_mean(caplog) -> None:
    """Pooled CNN maps are never negative: all cosines are near 1, and every row is uniform."""
    given = tensors(batch(12))
    given["image_teacher_embeds"] = 30.0 + given["image_teacher_embeds"]
    with caplog.at_level(logging.WARNING):
        CUSA(center_teachers=True)(**given)
        assert not caplog.records
        CUSA()(**given)
    assert "every row of the image teacher is uniform" in caplog.text


def test_teachers_never_receive_a_gradient() -> None:
    """A trainable teacher would collapse to whatever the student says."""
    given = {name: value.requires_grad_() for name, value in tensors(batch(5)).items()}
    CUSA(teachers="mean")(**given).loss.backward()
    assert given["image_teacher_embeds"].grad is None
    assert given["text_teacher_embeds"].grad is None
    assert given["similarity"].grad.any()
    labels = soft_labels(given["image_teacher_embeds"])
    assert not labels.requires_grad


def test_the_batch_order_does_not_matter() -> None:
    cusa, given = CUSA(), tensors(batch(6))
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {name: value[order] for name, value in given.items()}
    shuffled["similarity"] = shuffled["similarity"][:, order]
    torch.testing.assert_close(cusa(**shuffled).loss, cusa(**given).loss)


def test_labels_keep_their_differences_under_bfloat16_autocast() -> None:
    """Cosines of a teacher differ in the third digit; multiplied in bfloat16 they would all be equal."""
    given = batch(7)
    for side in ("image", "text"):
        given[f"{side}_teacher_embeds"] = 1.0 + 0.02 * given[f"{side}_teacher_embeds"]
    csa, usa = cusa_oracle(given, "own")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = CUSA()(**tensors(given, torch.float32))
        labels = soft_labels(torch.tensor(given["image_teacher_embeds"], dtype=torch.float32), 0.01)
    assert result.loss.dtype == torch.float32
    assert result.cross_modal.item() == pytest.approx(csa, rel=1e-5)
    assert result.uni_modal.item() == pytest.approx(usa, rel=1e-5)
    expected = labels_oracle(cosine_rows(given["image_teacher_embeds"]), 0.01)
    np.testing.assert_allclose(labels.numpy(), expected, atol=1e-4)


def test_temperatures_are_learned_and_kept_within_their_bounds() -> None:
    cusa, given = CUSA(temperature_bounds=(0.4, 0.5), uni_modal_temperature_bounds=(0.3, 0.46)), tensors(batch(8))
    optimizer = torch.optim.SGD(cusa.parameters(), lr=1e3)
    cusa(**given).loss.backward()
    before = {name: value.item() for name, value in cusa.named_parameters()}
    optimizer.step()
    assert all(value.item() != before[name] for name, value in cusa.named_parameters())
    with pytest.raises(ValueError, match=r"outside its bounds.*clamp_temperatures\(\)"):
        cusa(**given)
    cusa.clamp_temperatures()
    assert cusa(**given).loss.isfinite()
    for name, (low, high) in cusa.bounds.items():
        assert low - 1e-6 <= cusa.get_parameter(name).item() <= high + 1e-6


def test_a_part_of_weight_zero_needs_no_input() -> None:
    given = tensors(batch(9))
    teachers = [given.pop(name) for name in INPUTS[:2]]
    csa, usa = cusa_oracle(batch(9), "own")
    only_csa = CUSA(alpha=1.0, beta=0.0)(*teachers, similarity=given["similarity"])
    assert only_csa.loss.item() == pytest.approx(csa, rel=1e-6)
    assert only_csa.uni_modal is None
    only_usa = CUSA(alpha=0.0, beta=1.0)(
        *teachers, image_embeds=given["image_embeds"], text_embeds=given["text_embeds"]
    )
    assert only_usa.loss.item() == pytest.approx(usa, rel=1e-6)
    with pytest.raises(ValueError, match="without image_embeds, text_embeds"):
        CUSA()(*teachers, similarity=given["similarity"])
    with pytest.raises(ValueError, match="without similarity"):
        CUSA()(*teachers, image_embeds=given["image_embeds"], text_embeds=given["text_embeds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": 0.0, "beta": 0.0}, "one above it"),
        ({"student_temperature": 0.05}, "0.05, outside the bounds"),
        ({"temperature_bounds": (0.5, 0.9)}, r"0.45, outside the bounds \(0.5, 0.9\) of student_temperature"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0"),
        ({"teachers": "best"}, "'best'.*own, mean, geometric_mean"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CUSA(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_teacher_embeds", torch.zeros(N, 7), "image_teacher_embeds holds .* zeros"),
        ("image_teacher_embeds", torch.ones(N - 1, 7), "4 image and 5 text teacher vectors"),
        ("text_teacher_embeds", torch.full((N, 3), torch.nan), "text_teacher_embeds holds NaN"),
        ("text_teacher_embeds", torch.ones(N), r"text_teacher_embeds has shape \(5,\)"),
        ("similarity", torch.ones(N, N + 1), r"its similarity \(5, 6\)"),
        ("similarity", torch.full((N, N), torch.inf), "must be finite"),
        ("image_teacher_embeds", torch.full((N, 7), torch.inf), "image_teacher_embeds holds NaN, infinity"),
        ("image_embeds", torch.ones(N + 1, 4), r"\(5, 5\) and its similarity \(6, 6\)"),
    ],
)
def test_a_batch_that_cannot_train_is_refused(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CUSA()(**{**tensors(batch()), name: value})


def test_labels_that_are_no_distributions_are_refused() -> None:
    """A narrower label broadcasts and trains towards uniform at a plausible-looking loss; raw cosines do not sum to
    1."""
    similarity, labels = torch.randn(N, N), torch.full((N, N), 1 / N)
    cross_modal_soft_label_loss(similarity, labels, labels, 0.5)
    for wrong in (labels[:, :1], labels[:1], labels * 2, labels - torch.eye(N) + torch.eye(N)[:, [1, 2, 3, 4, 0]]):
        with pytest.raises(ValueError, match="text_soft_labels"):
            cross_modal_soft_label_loss(similarity, labels, wrong, 0.5)
    for temperature in (0.0, -1.0, math.nan, torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="temperature is"):
            cross_modal_soft_label_loss(similarity, labels, labels, temperature)


def test_a_batch_of_one_is_refused() -> None:
    """Its labels are 1 and its loss 0, whatever the model says."""
    with pytest.raises(ValueError, match="batch of one pair, expected at least two"):
        CUSA()(**{name: value[:1] for name, value in tensors(batch()).items()})
    with pytest.raises(ValueError, match="batch of two pairs, expected at least three with exclude_self"):
        CUSA(exclude_self=True)(**{name: value[:2] for name, value in tensors(batch()).items()})


@pytest.mark.parametrize(("temperature", "word"), [(50.0, "uniform"), (0.002, "one-hot")])
def test_a_teacher_temperature_that_teaches_nothing_is_said_once(temperature, word, caplog) -> None:
    cusa, given = CUSA(teacher_temperature=temperature), tensors(batch(10))
    with caplog.at_level(logging.WARNING):
        cusa(**given), cusa(**given)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2 and all(f"teacher is {word}: entropy" in message for message in said)
        assert {"image teacher" in message for message in said} == {True, False}
        caplog.clear()
        CUSA(teacher_temperature=0.3)(**given)
        assert not caplog.records
