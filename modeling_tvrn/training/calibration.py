"""Where the matching score crosses one half: the shift that a finished model's score adds to its logits.

Contrastive losses see differences of logits alone, so what a logit is as a number is left open, and its sigmoid may be
1 for every pair. Logits and rankings do not depend on the shift.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..evaluation import encode_dataset
from ..losses import positive_mask

if TYPE_CHECKING:
    from .validation import Validation

__all__ = ["balanced_shift", "calibrate", "calibrated"]

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 100
HALVINGS = 60


def balanced_shift(logits: Tensor, positives: Tensor) -> float:
    """The number b that minimises the cross-entropy of sigmoid(logits + b), matches and mismatches weighing the same.

    Args:
        logits: (I, T).
        positives: (I, T) bool, with at least one of either kind.

    Raises:
        ValueError: On NaN or infinite logits, or pairs of one kind only.
    """
    if not torch.isfinite(logits).all() or positives.all() or not positives.any():
        raise ValueError(
            f"balanced_shift got {int(positives.sum())} matches among {positives.numel()} pairs, logits finite: "
            f"{bool(torch.isfinite(logits).all())}; expected finite logits of matches and of mismatches."
        )
    values = logits.double()
    matches, others = values[positives], values[~positives]
    low, high = -float(values.max()) - 1.0, -float(values.min()) + 1.0
    for _ in range(HALVINGS):  # the derivative rises with b
        middle = (low + high) / 2
        slope = torch.sigmoid(others + middle).mean() - torch.sigmoid(-matches - middle).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return (low + high) / 2


@contextlib.contextmanager
def calibrated(model: Any, validation: Validation) -> Iterator[None]:
    """Calibrate the model for as long as it is saved: while it learns that is none of its state."""
    before = {name: value.clone() for name, value in model.named_buffers(recurse=False)}
    calibrate(model, validation.processor, validation.records)
    try:
        yield
    finally:
        for name, value in before.items():
            getattr(model, name).copy_(value)


@torch.no_grad()
def calibrate(model: Any, processor: Any, records: Any) -> float | None:
    """Set `calibration_shift` so that the score of a match is above one half, of most mismatches below.

    Args:
        model: a TVRNModel; one without its first stage in the logit learned on sigmoids and stays as it is.
        processor: its processor.
        records: validation records, of which the first are scored.

    Returns:
        The shift, or None.
    """
    if not model.config.use_first_stage:
        return None
    some = records.select(range(min(CALIBRATION_IMAGES, len(records))))
    images, texts, rows = encode_dataset(model, processor, some, progress=False)
    logits = model.match(images, texts)
    positives = positive_mask(torch.arange(len(images)), torch.as_tensor(rows))
    shift = balanced_shift(logits, positives.to(logits.device))
    model.calibration_scale.fill_(1.0)
    model.calibration_shift.fill_(shift)
    logger.info("calibrated on %d validation images: logits shifted by %.2f", len(images), shift)
    return shift
