"""Losses on score matrices and embeddings; every one decides positives by image id, in both directions. Shipped.

Rows are images and columns are captions: scores are (I, T) and I may differ from T. `image_ids (I,)` and
`text_image_ids (T,)` are integers; a pair is positive where they are equal, so another caption of the same image is
never a negative and an image may stand in several rows. Every anchor needs a positive in the batch: one without has
no term in any of these formulas and in practice means ids of two different numberings, so it is refused.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .soft_labels_tvrn import (
    CUSA,
    CUSALoss,
    at_least_float32,
    cross_modal_soft_label_loss,
    soft_labels,
    uni_modal_soft_label_loss,
)

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
    return _matching_rows(scores, positives, margin, temperature) + _matching_rows(
        scores.T, positives.T, margin, temperature
    )


def _matching_rows(scores: Tensor, positives: Tensor, margin: float, temperature: float) -> Tensor:
    anchors, matches = positives.nonzero(as_tuple=True)
    violations = F.relu(margin + scores[anchors] - scores[anchors, matches][:, None]) / temperature
    violations = violations.masked_fill(positives[anchors], -torch.inf)
    # The column of zeros is the formula's 1: logsumexp then neither overflows nor sees a row of -inf alone.
    terms = F.pad(violations, (1, 0)).logsumexp(dim=1)
    return _mean_over_anchors(terms, anchors, positives)


def _mean_over_anchors(terms: Tensor, anchors: Tensor, positives: Tensor) -> Tensor:
    """The mean over an anchor's positives, then over anchors, of one term (pairs,) for each positive pair."""
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
    targets = pair_logits.detach().to(logits.dtype) / temperature
    return (_divergence_rows(targets, logits) + _divergence_rows(targets.T, logits.T)) / 2


def _divergence_rows(targets: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(targets) ‖ softmax(logits))."""
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
