"""Validation while training: what chooses the model, and what is published of the one that was chosen."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ..evaluation import EvaluationReport, evaluate
from ..metrics import Recalls

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["Validation", "flat_recalls", "summary"]


class Validation:
    """Evaluates a model on the validation split, or while training on the first images of it.

    Args:
        config: the run.
        records: the validation records.
        processor: what prepares them; it may hold cached text features.
    """

    def __init__(self, config: TrainingConfig, records: Any, processor: Any) -> None:
        self.config = config
        self.records = records
        self.processor = processor
        few = config.evaluation_images
        self.is_whole = few is None or few >= len(records)
        self.subset = records if self.is_whole else records.select(range(few or 0))

    def run(self, model: Any) -> EvaluationReport:
        """Evaluate while training."""
        return self._evaluate(model, self.subset)

    def final(self, model: Any) -> EvaluationReport:
        """Evaluate on the whole split."""
        return self._evaluate(model, self.records)

    def _evaluate(self, model: Any, records: Any) -> EvaluationReport:
        return evaluate(
            model,
            self.processor,
            records,
            protocol="validation",
            batch_size=self.config.evaluation_batch_size,
            embeddings=True,
            data=self.config.data,
            split=self.config.validation_split,
            seeds=[self.config.seed],
            progress=sys.stderr.isatty(),
        )


def flat_recalls(report: EvaluationReport) -> dict[str, float]:
    """Recalls and rSum in percent, by name; those of the embeddings alone with a prefix."""
    found = Recalls.as_dict(report.metrics)
    if report.embedding_metrics is not None:
        found |= {f"embeddings_{name}": value for name, value in Recalls.as_dict(report.embedding_metrics).items()}
    return found


def summary(report: EvaluationReport) -> str:
    """One line for the log."""
    first = report.metrics.image_to_text[1], report.metrics.text_to_image[1]
    text = f"rSum {report.metrics.rsum:.1f}, R@1 image→text {first[0]:.1f}, text→image {first[1]:.1f}"
    own = report.embedding_metrics
    return text + (f", embeddings alone {own.rsum:.1f}" if own is not None else "")
