"""Losses on score matrices and embeddings, and CUSA's soft labels. Shipped.

Rows are images and columns are captions: scores are (I, T) and I may differ from T. `image_ids (I,)` and
`text_image_ids (T,)` are integers; a pair is positive where they are equal, so another caption of the same image is
never a negative and an image may stand in several rows. Every anchor needs a positive in the batch: one without has
no term in any of these formulas and in practice means ids of two different numberings, so it is refused.

CUSA (Huang, Nie, Wang, Shang, AAAI 2024) takes similarities of frozen uni-modal teachers as soft labels, for any model
that matches images and texts. There a batch is N pairs, one caption a row: an image that stands in the batch twice has
two rows. The paper keeps the diagonal on both sides; `exclude_self` leaves it out of both, so that a row says which
*other* items are near. With it, a row peaked enough to tell them apart puts most of its weight on the item itself,
which the contrastive loss teaches already. Labels carry no gradient.
"""

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

__all__ = [
    "CUSA",
    "CUSALoss",
    "check_score_spread",
    "contrastive_loss",
    "cross_modal_soft_label_loss",
    "distillation_loss",
    "hardest_negative_loss",
    "matching_loss",
    "matching_loss_floor",
    "positive_mask",
    "positives_cross_entropy",
    "sigmoid_contrastive_loss",
    "soft_labels",
    "uni_modal_soft_label_loss",
]

TEACHER_COMBINATIONS = ("own", "mean", "geometric_mean")
# Entropy of a teacher's rows, as a share of the largest possible, beyond which they tell no two items apart, or each
# only from itself.
UNIFORM, ONE_HOT = 0.999, 0.01


def at_least_float32(values: Tensor) -> Tensor:
    """Sums of exponentials in half precision lose their small terms."""
    return values if values.dtype == torch.float64 else values.float()


# -- positives by image id -------------------------------------------------------------------------------------------


def positive_mask(image_ids: Tensor, text_image_ids: Tensor) -> Tensor:
    """Which pairs are positive: (I, T) boolean, true where a caption's image id is the row's.

    Args:
        image_ids: (I,) integers.
        text_image_ids: (T,) integers, the image each caption belongs to.

    Raises:
        ValueError: On ids that are not one-dimensional integers, no ids at all, or an image or caption without a
            positive.
    """
    for name, ids in (("image_ids", image_ids), ("text_image_ids", text_image_ids)):
        if ids.ndim != 1 or ids.numel() == 0 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"{name} has shape {tuple(ids.shape)} and dtype {ids.dtype}; expected one integer for each item, at "
                "least one. Number string ids first, the same way on both sides (the collator does)."
            )
    # (I, 1) against (1, T).
    positives = image_ids[:, None] == text_image_ids.to(image_ids.device)[None, :]
    _refuse_lonely("image_ids", image_ids, positives.any(dim=1), "caption")
    _refuse_lonely("text_image_ids", text_image_ids, positives.any(dim=0), "image")
    return positives


def _refuse_lonely(name: str, ids: Tensor, matched: Tensor, other: str) -> None:
    if not matched.all():
        lonely = ids.to(matched.device)[~matched].tolist()
        raise ValueError(
            f"{len(lonely)} of {len(ids)} {name} have no {other} in the batch, among them {lonely[:5]}; every loss "
            "here needs a positive for each row and column. Check that image_ids and text_image_ids number images the "
            "same way, or drop those items."
        )


def matching_loss(
    scores: Tensor, image_ids: Tensor, text_image_ids: Tensor, margin: float = 0.2, temperature: float = 0.05
) -> Tensor:
    """Smooth triplet loss over all negatives, rows and columns.

    For an anchor i and one of its positives +, log(1 + Σ_{k not positive} exp([margin + s_ik − s_i+]₊ / temperature));
    averaged over an anchor's positives, then over anchors, and summed over the two directions. A satisfied negative
    still adds exp(0): `matching_loss_floor` is what remains when all are. An anchor without a negative adds 0.

    Args:
        scores: (I, T) matching scores, sigmoid(logit); 0 and 1 are accepted since float32's sigmoid reaches them.
        image_ids, text_image_ids: (I,) and (T,) integers that decide positives.
        margin: In units of the score.
        temperature: Above 0; smaller weighs the worst negatives more.

    Returns:
        Scalar, float32 (float64 for float64 scores).

    Raises:
        ValueError: On scores outside [0, 1] or NaN, wrong lengths, an anchor without a positive, a bad margin or
            temperature.
    """
    _check_margin(margin)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0, such as 0.05.")
    scores, positives = _checked(scores, image_ids, text_image_ids, bounded=True)
    # Rows: images against captions; columns, by the transposes: captions against images.
    return _matching_rows(scores, positives, margin, temperature) + _matching_rows(
        scores.T, positives.T, margin, temperature
    )


def _matching_rows(scores: Tensor, positives: Tensor, margin: float, temperature: float) -> Tensor:
    # One row for each positive pair: its anchor's scores (pairs, T), less the score of the positive itself.
    anchors, matches = positives.nonzero(as_tuple=True)
    violations = F.relu(margin + scores[anchors] - scores[anchors, matches][:, None]) / temperature
    violations = violations.masked_fill(positives[anchors], -torch.inf)
    # The column of zeros is the formula's 1: logsumexp then neither overflows nor sees a row of -inf alone.
    terms = F.pad(violations, (1, 0)).logsumexp(dim=1)
    return _mean_over_anchors(terms, anchors, positives)


def _mean_over_anchors(terms: Tensor, anchors: Tensor, positives: Tensor) -> Tensor:
    """The mean over an anchor's positives, then over anchors, of one term (pairs,) for each positive pair."""
    # An image with five captions counts as much as one with a single caption.
    counts = positives.sum(dim=1)
    return (terms / counts[anchors]).sum() / len(counts)


def matching_loss_floor(image_ids: Tensor, text_image_ids: Tensor) -> Tensor:
    """The value of `matching_loss` when every negative is satisfied by the margin: log(1 + number of negatives),
    averaged and summed as there. Report the loss minus this floor; the floor depends on the batch's size, the
    difference goes to 0.

    Args:
        image_ids, text_image_ids: (I,) and (T,) integers that decide positives.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: As `positive_mask`.
    """
    negatives = (~positive_mask(image_ids, text_image_ids)).float()
    return negatives.sum(dim=1).log1p().mean() + negatives.sum(dim=0).log1p().mean()


def hardest_negative_loss(scores: Tensor, image_ids: Tensor, text_image_ids: Tensor, margin: float = 0.2) -> Tensor:
    """Hinge on each anchor's hardest negative, rows and columns (Faghri et al., VSE++, 2018).

    [margin + max_{k not positive} s_ik − s_i+]₊ averaged over an anchor's positives, then over anchors, and summed
    over the two directions: 2·margin where all scores are equal, which is where it stays when a small set starts from
    it. Warm up with `matching_loss` and watch `check_score_spread`. An anchor without a negative adds 0.

    Args:
        scores: (I, T) in [0, 1].
        image_ids, text_image_ids: (I,) and (T,) integers that decide positives.
        margin: In units of the score.

    Returns:
        Scalar, float32 (float64 for float64 scores).

    Raises:
        ValueError: On scores outside [0, 1] or NaN, wrong lengths, an anchor without a positive, or a negative margin.
    """
    _check_margin(margin)
    scores, positives = _checked(scores, image_ids, text_image_ids, bounded=True)
    return _hinge_rows(scores, positives, margin) + _hinge_rows(scores.T, positives.T, margin)


def _hinge_rows(scores: Tensor, positives: Tensor, margin: float) -> Tensor:
    anchors, matches = positives.nonzero(as_tuple=True)
    # −∞ where there is no negative: the hinge of −∞ is 0, and so is its gradient.
    hardest = scores.masked_fill(positives, -torch.inf).amax(dim=1)
    return _mean_over_anchors(F.relu(margin + hardest[anchors] - scores[anchors, matches]), anchors, positives)


def check_score_spread(scores: Tensor, minimum: float = 1e-4) -> float:
    """The standard deviation of a batch's scores; training that has collapsed to one score for every pair is stopped
    here.

    Args:
        scores: (I, T), more than one pair.
        minimum: The least spread that still counts as training; random initialisation gives some 0.005.

    Raises:
        RuntimeError: If the spread is below `minimum` or NaN.
    """
    spread = at_least_float32(scores.detach()).std().item()
    if not spread >= minimum:
        raise RuntimeError(
            f"The scores' standard deviation is {spread:.1e} over {tuple(scores.shape)} pairs; expected at least "
            f"{minimum:.1e}. Training has collapsed: every pair scores the same, and the hardest-negative hinge "
            "cannot leave that point. Start again with matching_loss or contrastive_loss (all negatives) as a "
            "warm-up, or with a lower learning rate."
        )
    return spread


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor,
    text_image_ids: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE on embeddings, the target spread uniformly over an anchor's positives (van den Oord et al., 2018; CLIP).

    Args:
        image_embeds: (I, P), unit norm.
        text_embeds: (T, P), unit norm.
        logit_scale: Log of the factor on the cosine, as CLIP's parameter; one number.
        image_ids, text_image_ids: (I,) and (T,) integers that decide positives.
        label_smoothing: Share of the target spread over all candidates, in [0, 1).

    Returns:
        Scalar, the mean of the two directions; float32 (float64 for float64 embeddings).

    Raises:
        ValueError: On embeddings of different widths or with NaN, wrong lengths, or an anchor without a positive.
    """
    logits = _scaled_cosines(image_embeds, text_embeds, logit_scale)
    return positives_cross_entropy(logits, image_ids, text_image_ids, label_smoothing)


def sigmoid_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids: Tensor,
    text_image_ids: Tensor,
) -> Tensor:
    """Each pair a question of its own: −Σ log σ(±(exp(logit_scale)·cos + logit_bias)) (Zhai et al., 2023).

    Args:
        image_embeds, text_embeds: (I, P) and (T, P), unit norm.
        logit_scale, logit_bias: Log of the factor on the cosine, and what is added to it; one number each.
        image_ids, text_image_ids: (I,) and (T,) integers that decide positives.

    Returns:
        Scalar, the sum over a text's images, averaged over texts, as transformers' SigLIP has it.

    Raises:
        ValueError: As `contrastive_loss`.
    """
    logits = _scaled_cosines(image_embeds, text_embeds, logit_scale)
    logits = logits + torch.as_tensor(logit_bias, device=logits.device).to(logits.dtype)
    logits, positives = _checked(logits, image_ids, text_image_ids, bounded=False)
    # log σ itself: the log of a sigmoid is −∞ from a logit of −104 on in float32.
    signs = 2.0 * positives.to(logits.dtype) - 1.0
    return -F.logsigmoid(signs * logits).sum(dim=0).mean()


def _scaled_cosines(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    """(I, T) cosines times exp(logit_scale), in at least float32."""
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"image_embeds has shape {tuple(image_embeds.shape)} and text_embeds {tuple(text_embeds.shape)}; expected "
            "(images, P) and (texts, P) of the same space."
        )
    scale = torch.as_tensor(logit_scale, device=image_embeds.device)
    # Autocast would multiply in bfloat16, whose step near 1 times a scale of 100 is half a unit of the logit.
    with torch.autocast(image_embeds.device.type, enabled=False):
        similarity = at_least_float32(image_embeds) @ at_least_float32(text_embeds).T
        return similarity * at_least_float32(scale).exp()


def distillation_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    pair_logits: Tensor,
    temperature: float = 2.0,
) -> Tensor:
    """What the embeddings have yet to learn from a better score of the same pairs: KL(score ‖ embeddings).

    Over each row and each column, between the softmax of the score's logits, divided by the temperature, and that of
    the scaled cosines; no gradient reaches the score. Soft targets: Hinton et al., "Distilling the knowledge in a
    neural network", 2015; from a score of pairs to embeddings: Miech et al., "Thinking fast and slow", CVPR 2021.

    Args:
        image_embeds: (I, P), unit norm.
        text_embeds: (T, P), unit norm.
        logit_scale: Log of the factor on the cosine, as in `contrastive_loss`.
        pair_logits: (I, T), of the score that teaches; any finite values.
        temperature: Above 0; larger spreads the targets over more candidates.

    Returns:
        Scalar, the mean of the two directions, 0 where both agree; float32 (float64 for float64 embeddings).

    Raises:
        ValueError: On embeddings of different widths, logits of another shape, NaN or infinite, or a bad temperature.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0, such as 2.")
    logits = _scaled_cosines(image_embeds, text_embeds, logit_scale)
    if pair_logits.shape != logits.shape or not pair_logits.isfinite().all():
        raise ValueError(
            f"pair_logits has shape {tuple(pair_logits.shape)}, {int((~pair_logits.isfinite()).sum())} of them NaN or "
            f"infinite; expected a finite number for each of {tuple(logits.shape)} pairs."
        )
    # The temperature softens the targets alone: the scale of the cosines is learned, and would undo it.
    targets = pair_logits.detach().to(logits.dtype) / temperature
    return (_divergence_rows(targets, logits) + _divergence_rows(targets.T, logits.T)) / 2


def _divergence_rows(targets: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(targets) ‖ softmax(logits))."""
    # "batchmean": torch's default divides by the number of entries, not of rows.
    return F.kl_div(logits.log_softmax(dim=1), targets.log_softmax(dim=1), reduction="batchmean", log_target=True)


def positives_cross_entropy(
    logits: Tensor, image_ids: Tensor, text_image_ids: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy over each row and each column of logits, the target spread uniformly over the anchor's positives.

    Args:
        logits: (I, T), any finite values.
        image_ids, text_image_ids: (I,) and (T,) integers that decide positives.
        label_smoothing: Share of the target spread over all candidates, in [0, 1).

    Returns:
        Scalar, the mean of the two directions; float32 (float64 for float64 logits).

    Raises:
        ValueError: On NaN or infinite logits, wrong lengths, or an anchor without a positive.
    """
    logits, positives = _checked(logits, image_ids, text_image_ids, bounded=False)
    rows = _cross_entropy_rows(logits, positives, label_smoothing)
    return (rows + _cross_entropy_rows(logits.T, positives.T, label_smoothing)) / 2


def _cross_entropy_rows(logits: Tensor, positives: Tensor, label_smoothing: float) -> Tensor:
    # Probabilities as targets, 1/n on each of an anchor's n positives.
    targets = positives.to(logits.dtype)
    return F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True), label_smoothing=label_smoothing)


def _checked(scores: Tensor, image_ids: Tensor, text_image_ids: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    """Scores in at least float32 and the mask of positives on their device, or a message."""
    if scores.ndim != 2 or scores.shape != (len(image_ids), len(text_image_ids)):
        raise ValueError(
            f"The scores have shape {tuple(scores.shape)} but there are {len(image_ids)} image_ids and "
            f"{len(text_image_ids)} text_image_ids; expected (images, texts), rows for images. Transpose the matrix "
            "or pass the ids of this batch."
        )
    # Comparisons with NaN are false, so one pass (and one wait for the device) finds both mistakes.
    accepted = (scores >= 0) & (scores <= 1) if bounded else scores.isfinite()
    if not accepted.all():
        wrong = scores.detach()[~accepted][0].item()
        expected = "[0, 1]; pass sigmoid(logits), not logits" if bounded else "finite numbers"
        raise ValueError(
            f"{int((~accepted).sum())} of {scores.numel()} scores are out of range, the first is {wrong}; expected "
            f"{expected}. NaN means the model or its input is broken: look for NaN features or lower the learning "
            "rate."
        )
    return at_least_float32(scores), positive_mask(image_ids.to(scores.device), text_image_ids.to(scores.device))


def _check_margin(margin: float) -> None:
    if not margin >= 0:
        raise ValueError(f"margin is {margin}; expected a number of at least 0, such as 0.2.")


# -- CUSA ------------------------------------------------------------------------------------------------------------


def soft_labels(
    teacher_embeds: Tensor, teacher_temperature: float = 1.0, exclude_self: bool = False, center_teachers: bool = False
) -> Tensor:
    """Each item's distribution over the batch by its teacher: softmax of the cosines over the temperature.

    Args:
        teacher_embeds: (N, D), any norm above 0.
        teacher_temperature: Above 0.
        exclude_self: Over the other items alone: 0 on the diagonal.
        center_teachers: Cosines about the batch's mean vector.

    Returns:
        (N, N) rows that sum to 1, without gradient; float32 (float64 for float64 vectors).

    Raises:
        ValueError: On another shape, NaN, a vector of zeros, a bad temperature, or one item alone with `exclude_self`.
    """
    _check_temperature("teacher_temperature", teacher_temperature)
    cosines = _cosines("teacher_embeds", teacher_embeds.detach(), center_teachers)
    if exclude_self and len(cosines) < 2:
        raise ValueError("teacher_embeds holds one item; with exclude_self expected at least two, the others.")
    return _rows(cosines, teacher_temperature, exclude_self)


def cross_modal_soft_label_loss(
    similarity: Tensor,
    image_soft_labels: Tensor,
    text_soft_labels: Tensor,
    student_temperature: Tensor | float,
    exclude_self: bool = False,
) -> Tensor:
    """CSA: ½ KL(image labels ‖ softmax(similarity / τ)) + ½ KL(text labels ‖ softmax(similarityᵀ / τ)).

    Args:
        similarity: (N, N), rows images, columns texts: cosines of a dual encoder, or matching scores of TVRN.
        image_soft_labels, text_soft_labels: (N, N), rows that sum to 1; of images for rows, of texts for columns.
        student_temperature: τ, above 0.
        exclude_self: The student's rows leave out the pair itself, as the labels must.

    Returns:
        Scalar; KL summed over a row, averaged over rows; float32 (float64 for float64 similarities).

    Raises:
        ValueError: On shapes that differ, NaN, labels that are no distributions, or a bad temperature.
    """
    student = student_temperature, exclude_self
    image_part = _divergence("image_soft_labels", image_soft_labels, similarity, *student)
    text_part = _divergence("text_soft_labels", text_soft_labels, similarity.T, *student)
    return (image_part + text_part) / 2


def uni_modal_soft_label_loss(
    image_similarity: Tensor,
    text_similarity: Tensor,
    image_soft_labels: Tensor,
    text_soft_labels: Tensor,
    image_temperature: Tensor | float,
    text_temperature: Tensor | float,
    exclude_self: bool = False,
) -> Tensor:
    """USA: ½ KL(image labels ‖ softmax(image similarity / τ_I)) + ½ KL(text labels ‖ softmax(text similarity / τ_T)).

    Args:
        image_similarity, text_similarity: (N, N) cosines within one modality, of the student's uni-modal embeddings.
        image_soft_labels, text_soft_labels: (N, N), rows that sum to 1.
        image_temperature, text_temperature: τ_I and τ_T, above 0.
        exclude_self: The student's rows leave out the item itself, as the labels must.

    Returns:
        Scalar; KL summed over a row, averaged over rows; float32 (float64 for float64 similarities).

    Raises:
        ValueError: On shapes that differ, NaN, labels that are no distributions, or a bad temperature.
    """
    images, texts = (image_similarity, image_temperature), (text_similarity, text_temperature)
    image_part = _divergence("image_soft_labels", image_soft_labels, *images, exclude_self)
    text_part = _divergence("text_soft_labels", text_soft_labels, *texts, exclude_self)
    return (image_part + text_part) / 2


class CUSALoss(NamedTuple):
    """What `CUSA` adds to a model's own loss: the weighted sum, and its parts unweighted and detached (None if
    off)."""

    loss: Tensor
    cross_modal: Tensor | None
    uni_modal: Tensor | None


class CUSA(nn.Module):
    """α·CSA + β·USA with learned temperatures, from any model's similarities and embeddings.

    The temperatures are learned as they are: call `clamp_temperatures()` after every optimizer step.

    Args:
        alpha, beta: Weights of the cross-modal and the uni-modal part, at least 0; 0 leaves the part out.
        student_temperature: Where the three learned temperatures start.
        temperature_bounds: Of the cross-modal temperature.
        uni_modal_temperature_bounds: Of the other two.
        teacher_temperature: Of both teachers, fixed.
        teachers: Whose cosines label the cross-modal part. `"own"`: images' for rows, texts' for columns. `"mean"` and
            `"geometric_mean"` (the square root of the product, negative products clipped to 0) of both, for both.
        exclude_self: Labels and students over the other items alone (the paper keeps the diagonal).
        center_teachers: Cosines about the batch's mean vector. Features that are never negative, such as pooled CNN
            maps, all point one way; without their mean they tell items apart.
        on_logits: The cross-modal similarities are logits, with the scale that the model's own loss learns, and get no
            temperature here (the paper: cosines or scores, with one).

    Raises:
        ValueError: On a negative weight, both weights 0, a temperature outside its bounds, or an unknown combination.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.75,
        student_temperature: float = 0.45,
        temperature_bounds: tuple[float, float] = (0.10, 0.99),
        uni_modal_temperature_bounds: tuple[float, float] = (0.10, 1.00),
        teacher_temperature: float = 1.0,
        teachers: str = "own",
        exclude_self: bool = False,
        center_teachers: bool = False,
        on_logits: bool = False,
    ) -> None:
        super().__init__()
        if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
            raise ValueError(f"alpha is {alpha} and beta is {beta}; expected both at least 0 and one above it.")
        if teachers not in TEACHER_COMBINATIONS:
            raise ValueError(f"teachers is {teachers!r}; expected one of {', '.join(TEACHER_COMBINATIONS)}.")
        _check_temperature("teacher_temperature", teacher_temperature)
        self.alpha, self.beta, self.teachers = alpha, beta, teachers
        self.teacher_temperature = teacher_temperature
        self.exclude_self, self.center_teachers, self.on_logits = exclude_self, center_teachers, on_logits
        # Those that are learned; with `on_logits` the cross-modal one is not there at all.
        uni_modal = dict.fromkeys(("image_temperature", "text_temperature"), uni_modal_temperature_bounds)
        cross_modal = {} if on_logits else {"student_temperature": temperature_bounds}
        self.bounds: Mapping[str, tuple[float, float]] = cross_modal | uni_modal
        for name, (low, high) in self.bounds.items():
            if not 0 < low <= student_temperature <= high:
                raise ValueError(
                    f"student_temperature is {student_temperature}, outside the bounds ({low}, {high}) of {name}; "
                    "expected 0 < lower bound <= student_temperature <= upper bound."
                )
        self.looks_at_entropy = True  # at the next batch's labels, once
        for name in self.bounds:
            # Shape (1,): parameters without dimensions cannot be sharded.
            self.register_parameter(name, nn.Parameter(torch.tensor([float(student_temperature)])))

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """Bring the learned temperatures back into their bounds."""
        # After the step, not in `forward`: a clamped temperature has no gradient, and would never come back.
        for name, (low, high) in self.bounds.items():
            self.get_parameter(name).clamp_(low, high)

    def forward(
        self,
        image_teacher_embeds: Tensor,
        text_teacher_embeds: Tensor,
        similarity: Tensor | None = None,
        image_embeds: Tensor | None = None,
        text_embeds: Tensor | None = None,
    ) -> CUSALoss:
        """The term to add to the model's own loss.

        Args:
            image_teacher_embeds, text_teacher_embeds: (N, any) each, of frozen teachers.
            similarity: (N, N) cosines or scores, or logits with `on_logits`, rows images; needed if alpha > 0.
            image_embeds, text_embeds: (N, any) each, the student's uni-modal embeddings; needed if beta > 0.

        Raises:
            ValueError: On a part without its input, wrong shapes, fewer than two pairs, NaN, or temperatures outside
                their bounds.
        """
        self._check_bounds()
        given = {"similarity": similarity, "image_embeds": image_embeds, "text_embeds": text_embeds}
        needed = [*(["similarity"] if self.alpha else []), *(["image_embeds", "text_embeds"] if self.beta else [])]
        if missing := [name for name in needed if given[name] is None]:
            raise ValueError(
                f"CUSA with alpha={self.alpha} and beta={self.beta} came without {', '.join(missing)}; pass it, or "
                "set the weight of the part that needs it (alpha: similarity, beta: embeddings) to 0."
            )
        _check_pairs(image_teacher_embeds, text_teacher_embeds, least=3 if self.exclude_self else 2)
        with torch.no_grad():
            cosines = (
                _cosines("image_teacher_embeds", image_teacher_embeds, self.center_teachers),
                _cosines("text_teacher_embeds", text_teacher_embeds, self.center_teachers),
            )
        labels = self._labels(*cosines)
        self._look_at_entropy(*labels)
        parts: dict[str, Tensor] = {}
        if similarity is not None and self.alpha:
            # Logits have a learned scale already: a second temperature would only trade with it.
            crossed = labels if self.teachers == "own" else self._labels(*self._combined(*cosines))
            temperature = 1.0 if self.on_logits else self.get_parameter("student_temperature")
            parts["cross_modal"] = cross_modal_soft_label_loss(similarity, *crossed, temperature, self.exclude_self)
        if image_embeds is not None and text_embeds is not None and self.beta:
            students = _cosines("image_embeds", image_embeds), _cosines("text_embeds", text_embeds)
            temperatures = self.get_parameter("image_temperature"), self.get_parameter("text_temperature")
            parts["uni_modal"] = uni_modal_soft_label_loss(*students, *labels, *temperatures, self.exclude_self)
        # `parts` has what was computed: a part of weight 0 is left out, not multiplied, and its input may be missing.
        weights = {"cross_modal": self.alpha, "uni_modal": self.beta}
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        detached = {name: part.detach() for name, part in parts.items()}
        return CUSALoss(loss, detached.get("cross_modal"), detached.get("uni_modal"))

    @torch.no_grad()
    def _look_at_entropy(self, *labels: Tensor) -> None:
        """At the first batch, warn of rows that teach nothing: all of them uniform, or all of them one-hot."""
        if not self.looks_at_entropy:
            return
        self.looks_at_entropy = False
        # As a share of log N: of log (N − 1) where a row leaves the item itself out. `entr` gives 0 at p = 0.
        for side, rows in zip(("image", "text"), labels, strict=True):
            entropies = torch.special.entr(rows).sum(dim=1) / math.log(len(rows) - self.exclude_self)
            low, high = entropies.min().item(), entropies.max().item()
            if low > UNIFORM or high < ONE_HOT:
                logger.warning(
                    "at teacher_temperature=%s every row of the %s teacher is %s: entropy %.4f to %.4f of the largest "
                    "possible over a batch of %d; a %s temperature would tell items apart",
                    *(self.teacher_temperature, side, "uniform" if low > UNIFORM else "one-hot", low, high, len(rows)),
                    "lower" if low > UNIFORM else "higher",
                )

    def _combined(self, image_cosines: Tensor, text_cosines: Tensor) -> tuple[Tensor, Tensor]:
        """What labels both directions alike."""
        if self.teachers == "mean":
            both = (image_cosines + text_cosines) / 2
        else:
            both = (image_cosines * text_cosines).clamp(min=0).sqrt()
        return both, both

    def _labels(self, image_cosines: Tensor, text_cosines: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.teacher_temperature, self.exclude_self
        return _rows(image_cosines, *settings), _rows(text_cosines, *settings)

    def _check_bounds(self) -> None:
        for name, (low, high) in self.bounds.items():
            temperature = self.get_parameter(name).detach()
            if not torch.equal(temperature, temperature.clamp(low, high)):
                raise ValueError(
                    f"{name} is {temperature.item()}, outside its bounds ({low}, {high}); call clamp_temperatures() "
                    "after every optimizer step."
                )


def _check_pairs(image_teacher_embeds: Tensor, text_teacher_embeds: Tensor, least: int) -> None:
    if len(image_teacher_embeds) != len(text_teacher_embeds):
        raise ValueError(
            f"There are {len(image_teacher_embeds)} image and {len(text_teacher_embeds)} text teacher vectors; "
            "expected one of each for every pair of the batch: repeat an image's vector for each of its captions."
        )
    if len(image_teacher_embeds) < least:
        found = {1: "one pair", 2: "two pairs"}.get(len(image_teacher_embeds), "no pairs")
        raise ValueError(
            f"CUSA got a batch of {found}, expected at least {'three with exclude_self' if least == 3 else 'two'}: "
            "with fewer, the loss is 0 whatever the model says. Use a larger batch."
        )


def _rows(cosines: Tensor, temperature: float, exclude_self: bool) -> Tensor:
    """(N, N) distributions over the batch, or over the others of it."""
    scores = cosines / temperature
    return (_without_self(scores) if exclude_self else scores).softmax(dim=1)


def _without_self(scores: Tensor) -> Tensor:
    """(N, N) with a diagonal so low that a softmax gives it 0; finite, as 0 · -inf of a divergence is NaN."""
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return scores.masked_fill(own, torch.finfo(scores.dtype).min)


def _cosines(name: str, embeds: Tensor, about_mean: bool = False) -> Tensor:
    """(N, N) cosines of (N, D) vectors, in float32 at least; of what is left without their mean direction."""
    if embeds.ndim != 2 or 0 in embeds.shape:
        raise ValueError(f"{name} has shape {tuple(embeds.shape)}; expected (items, size), neither of them 0.")
    # A norm is finite and above 0 only where every value is finite and one is not 0.
    norms = at_least_float32(embeds.detach()).norm(dim=1)
    usable = norms.isfinite() & (norms > 0)
    if not usable.all():
        raise ValueError(
            f"{name} holds NaN, infinity or a vector of zeros in the rows "
            f"{(~usable).nonzero().flatten().tolist()[:10]}; expected vectors with a direction. Compute those items "
            "again, or drop them."
        )
    # Autocast would multiply in bfloat16, whose step near 1 is the size of the differences that labels are made of.
    with torch.autocast(embeds.device.type, enabled=False):
        unit = F.normalize(at_least_float32(embeds), dim=1)
        if about_mean:
            # The mean of the unit vectors: of the vectors as they came, a few long ones would decide it.
            unit = F.normalize(unit - unit.mean(dim=0), dim=1)
        return unit @ unit.T


def _divergence(
    name: str, labels: Tensor, similarity: Tensor, temperature: Tensor | float, exclude_self: bool
) -> Tensor:
    """KL(labels ‖ softmax(similarity / temperature)), summed over a row and averaged over rows."""
    _check_temperature("temperature", temperature)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or labels.shape != similarity.shape:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)} and its similarity {tuple(similarity.shape)}; expected both to "
            "be (N, N), one row and one column for each pair of the batch. A narrower label would broadcast and teach "
            "nothing."
        )
    # What the sum of a row's labels may be off by, in the dtype in which they came.
    rounding = 2e-2 if labels.dtype in (torch.float16, torch.bfloat16) else 1e-3
    labels, similarity = at_least_float32(labels.detach()), at_least_float32(similarity)
    # One condition, so that a GPU is waited for once.
    distributions = (labels >= 0).all() & ((labels.sum(dim=1) - 1).abs() < rounding).all()
    if not (distributions & similarity.isfinite().all()):
        raise ValueError(
            f"{name} must have rows that sum to 1 (sums from {labels.sum(dim=1).min().item():.4g} to "
            f"{labels.sum(dim=1).max().item():.4g}, least entry {labels.min().item():.4g}), and its similarity must "
            "be finite; make labels with soft_labels(), and look for NaN in the embeddings."
        )
    scores = similarity / temperature
    if exclude_self:
        if labels.diagonal().any():
            raise ValueError(
                f"{name} gives items up to {labels.diagonal().max().item():.4g} of their own row, but exclude_self "
                "leaves them out of it; make the labels with soft_labels(…, exclude_self=True)."
            )
        scores = _without_self(scores)
    return F.kl_div(scores.log_softmax(dim=1), labels, reduction="batchmean")


def _check_temperature(name: str, temperature: Tensor | float) -> None:
    value = temperature.item() if isinstance(temperature, Tensor) else temperature
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; expected a number above 0, such as 0.45.")
