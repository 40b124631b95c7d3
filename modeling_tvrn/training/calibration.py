"""What makes a probability of a logit: scale, shift, and what tells a query from junk, fitted on validation images.

Contrastive losses see differences of logits alone, so what a logit is as a number is left open, and its sigmoid may be
1 for every pair. Logits and rankings do not depend on any of this.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..evaluation import FitsReport, encode_dataset, evaluate_fits
from ..evaluation.encoding import encode_captions
from ..evaluation.fits import SMALLEST, check_size, gibberish, phrases

__all__ = ["calibrate", "calibrate_and_measure", "calibrated", "fit_probability", "fit_query_reader"]

logger = logging.getLogger(__name__)

IMAGES = 100  # that are calibrated on
MEASURED_IMAGES = 200  # of the rest
QUERIES = 250  # captions, a phrase of each, and as many strings of gibberish
RIDGE = 5e-4  # an embedding has more numbers than there are queries
ITERATIONS = 200


@contextlib.contextmanager
def calibrated(model: Any, processor: Any, records: Any) -> Iterator[None]:
    """Calibrate the model for as long as it is saved: while it learns that is none of its state.

    With fewer records than that takes, it is saved as it is.
    """
    before = {name: value.clone() for name, value in model.named_buffers(recurse=False)}
    if len(records) >= SMALLEST:
        calibrate(model, processor, records)
    try:
        yield
    finally:
        for name, value in before.items():
            getattr(model, name).copy_(value)


def calibrate_and_measure(model: Any, processor: Any, records: Any, progress: bool = False) -> FitsReport | None:
    """`calibrate`, and `evaluate_fits` on the images that follow; None where too few of these are left."""
    used = calibrate(model, processor, records)
    rest = range(used, min(len(records), used + MEASURED_IMAGES))
    try:
        return evaluate_fits(model, processor, records.select(rest), progress=progress)
    except ValueError as error:
        logger.warning("the probabilities were not measured: %s", error)
        return None


@torch.no_grad()
def calibrate(model: Any, processor: Any, records: Any) -> int:
    """Set the buffers that `TVRNModel.scores` and `TVRNModel.fits` read.

    Every caption of some images asks for its own; half of these are taken out of the gallery. What tells a query from
    junk sees captions and phrases of them against random letters.

    Args:
        model: a TVRNModel, with or without heads over its first stage.
        processor: its processor.
        records: validation records, map-style.

    Returns:
        How many of the records, the first ones, it was calibrated on: `IMAGES`, or half of fewer.

    Raises:
        ValueError: there are too few images, or logits are NaN or infinite.
    """
    check_size(records)
    some = records.select(range(min(IMAGES, max(len(records) // 2, 3))))
    images, texts, rows = encode_dataset(model, processor, some, progress=False)
    kept = torch.arange(0, len(images), 2)
    best = model.match(images.select(kept), texts).max(dim=0)
    right = kept[best.indices.cpu()] == torch.as_tensor(rows)

    captions = [caption for each in some.captions for caption in each]
    queries = captions[:: max(1, len(captions) // QUERIES)]
    queries += phrases(queries)
    problems = processor.caption_problems(queries)  # of a phrase that is a number sign
    queries = [query for place, query in enumerate(queries) if place not in problems]
    junk = gibberish(queries)
    read = encode_captions(model, processor, queries + junk, progress=False, truncation=True).select(slice(None))
    reader = fit_query_reader(read.embeds.cpu(), torch.arange(len(read)) < len(queries))
    readable = torch.sigmoid(texts.embeds.cpu().double() @ reader[:-1] + reader[-1])

    scale, shift = fit_probability(best.values.cpu(), right, readable, len(kept))
    model.calibration_scale.fill_(scale)
    model.calibration_shift.fill_(shift)
    model.calibration_query.copy_(reader)
    logger.info(
        "calibrated on %d validation images: scores are the sigmoid of %.3f·logit %+.2f", len(some), scale, shift
    )
    return len(some)


def fit_probability(best: Tensor, right: Tensor, readable: Tensor, gallery_size: int) -> tuple[float, float]:
    """Scale, above 0, and shift with which `fits` of the best hits has the lowest cross-entropy (Platt).

    Args:
        best: (T,) the highest logit of each query.
        right: (T,) bool, whether that hit is what the query asks for.
        readable: (T,) the probability that the query is no junk.
        gallery_size: Items searched.

    Raises:
        ValueError: On NaN or infinite logits.
    """
    if not torch.isfinite(best).all():
        raise ValueError("the logits hold NaN or infinite values; expected a model whose validation is finite")
    middle, spread = best.double().mean(), best.double().std().clamp_min(1e-6)
    logits, targets = (best.double() - middle) / spread, _smooth(right)

    def loss(found: Tensor) -> Tensor:
        fits = readable * torch.sigmoid(found[0].exp() * logits + found[1] - math.log(gallery_size))
        return F.binary_cross_entropy(fits, targets)

    found = _minimise(loss, torch.tensor([0.0, math.log(gallery_size)]))
    scale = float(found[0].exp() / spread)
    return scale, float(found[1]) - scale * float(middle)


def fit_query_reader(embeds: Tensor, is_query: Tensor) -> Tensor:
    """Weights and bias (P + 1,) of a logistic regression that tells queries from junk by their embeddings (T, P)."""
    middle = embeds.double().mean(dim=0)
    values, targets = embeds.double() - middle, _smooth(is_query)

    def loss(found: Tensor) -> Tensor:
        entropy = F.binary_cross_entropy_with_logits(values @ found[:-1] + found[-1], targets)
        return entropy + RIDGE * found[:-1].square().sum()

    found = _minimise(loss, torch.zeros(values.shape[1] + 1))
    return torch.cat([found[:-1], found[-1:] - found[:-1] @ middle])


def _smooth(answers: Tensor) -> Tensor:
    """Targets as Platt's, a little inside of 0 and 1: kinds that don't overlap have a finite best fit, too."""
    count = int(answers.sum())
    return torch.where(answers, (count + 1) / (count + 2), 1 / (len(answers) - count + 2)).double()


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    found = start.double().requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(found)
        value.backward()
        return value

    optimizer.step(closure)
    return found.detach()
