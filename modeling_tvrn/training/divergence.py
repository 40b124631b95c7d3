"""Stopping a run that is lost: a loss that is not a number, or scores that have become all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses import check_score_spread

__all__ = ["DivergenceGuard", "TrainingStopped"]

LEAST_SPREAD = 1e-4  # standard deviation of the scores; a model that learns has 0.005 from the start
PATIENCE = 20  # steps in a row below it: one batch may be alike by chance
SHOWN_IDS = 16


def _scores(logits: Tensor) -> Tensor:
    """Scores about one half: the sigmoid of a dual encoder's own logits is 1 for every pair, learning or not."""
    return (logits.float() - logits.float().mean()).sigmoid()


class TrainingStopped(RuntimeError):
    """A run that cannot go on; the message names the step and the images of its batch."""


@dataclass
class _Step:
    number: int
    image_rows: Tensor
    parts: Mapping[str, Tensor]
    numbers: Tensor  # (3,) loss, gradient norm, spread of the scores
    logits: Tensor | None


class DivergenceGuard:
    """Looks at each step's loss, gradient norm and scores one step late, so that no step waits for the device.

    Args:
        image_ids: the id of each training image, for the messages.
    """

    def __init__(self, image_ids: Sequence[Any]) -> None:
        self.image_ids = image_ids
        self._last: _Step | None = None
        self._collapsed = 0

    def state(self) -> dict[str, Any]:
        """What the next checks depend on, once `check` was called."""
        return {"collapsed": self._collapsed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._collapsed = state["collapsed"]

    def see(
        self,
        number: int,
        image_rows: Tensor,
        loss: Tensor,
        parts: Mapping[str, Tensor],
        gradient_norm: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:
        """Take note of a step, and check the one before it.

        Args:
            number: the step, from 1.
            image_rows: (I,) rows of the batch's images among `image_ids`.
            loss: scalar.
            parts: the loss's parts by name.
            gradient_norm: scalar, where it is known and has to be finite.
            logits: (I, T) pair logits, where pairs were scored.

        Raises:
            TrainingStopped: as `check`.
        """
        self.check()
        spread = _scores(logits).std() if logits is not None and logits.numel() > 1 else loss.new_ones(())
        norm = gradient_norm if gradient_norm is not None else loss.new_zeros(())
        numbers = torch.stack([value.detach().float() for value in (loss, norm, spread)])
        self._last = _Step(number, image_rows, parts, numbers, logits)

    def check(self) -> None:
        """Check the last step seen.

        Raises:
            TrainingStopped: its loss or gradient is NaN or infinite, or its scores have long been all the same.
        """
        step, self._last = self._last, None
        if step is None:
            return
        loss, norm, spread = step.numbers.tolist()
        finite = torch.isfinite(step.numbers)
        if not finite[:2].all():
            what = f"the loss is {loss}" if not finite[0] else f"the gradient's norm is {norm} (loss {loss:.4g})"
            parts = ", ".join(f"{name} {value.item():.4g}" for name, value in step.parts.items())
            raise TrainingStopped(
                f"{what} at step {step.number}; parts: {parts}; {self.shown(step.image_rows)}. Lower the learning "
                "rate or max_grad_norm, use bf16 instead of fp16, or look for broken inputs among these images."
            )
        self._collapsed = self._collapsed + 1 if spread < LEAST_SPREAD else 0
        if self._collapsed >= PATIENCE and step.logits is not None:
            try:
                check_score_spread(_scores(step.logits), LEAST_SPREAD)
            except RuntimeError as error:
                when = f"Seen at step {step.number} and the {PATIENCE - 1} before it"
                raise TrainingStopped(f"{error} {when}; {self.shown(step.image_rows)}.") from error

    def shown(self, image_rows: Tensor) -> str:
        """The images of a batch in words, the first few by id."""
        rows = image_rows.tolist()
        if isinstance(self.image_ids, Sequence):
            rows = [row % len(self.image_ids) for row in rows]  # flipped twins are counted on behind the last image
        ids = [self.image_ids[row] for row in rows]
        more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
        return f"images of the batch: {', '.join(map(repr, ids[:SHOWN_IDS]))}{more}"
