"""What a model knew before a run and what it still knows after it: zero-shot accuracy on labelled images."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from ..evaluation import LabelledImages, zero_shot_accuracy

if TYPE_CHECKING:
    from .config import TrainingConfig

logger = logging.getLogger(__name__)

__all__ = ["ZeroShot"]


class ZeroShot:
    """Accuracy of the model that a run starts with, and later of the one that it keeps.

    Attributes:
        before: percent, of the start.
    """

    def __init__(self, config: TrainingConfig, model: Any, processor: Any) -> None:
        self.prompt = config.zero_shot_prompt
        self.images = LabelledImages.of_folder(str(config.zero_shot))
        self.before = self._measured(model, processor)
        logger.info("zero-shot accuracy on %s before the training: %.1f %%", config.zero_shot, self.before)

    @classmethod
    def of(cls, config: TrainingConfig, model: Any, processor: Any, measures: bool) -> ZeroShot | None:
        """Of a run's start; None where it is not asked for, or another process measures.

        Raises:
            ValueError: the folder has no labelled images, or the model reads no pixels.
        """
        if config.zero_shot is None:
            return None
        if not model.config.looks:
            raise ValueError(
                f"zero_shot = {config.zero_shot!r} is a folder of images, but this model reads region features; "
                "leave it out"
            )
        return cls(config, model, processor) if measures else None

    def after(self, model: Any, processor: Any) -> dict[str, Any]:
        """For results.json: accuracies in percent, and of what."""
        after = self._measured(model, processor)
        logger.info("zero-shot accuracy: %.1f %% before, %.1f %% after the training", self.before, after)
        return {
            "before": self.before,
            "after": after,
            "labels": len(self.images.labels),
            "images": len(self.images.paths) - self.images.skipped.total,
            "prompt": self.prompt,
        }

    def _measured(self, model: Any, processor: Any) -> float:
        return zero_shot_accuracy(model, processor, self.images, self.prompt, progress=sys.stderr.isatty())
