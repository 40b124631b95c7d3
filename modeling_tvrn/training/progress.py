"""What a run says while it goes: a progress bar on a terminal, log lines, tracked values and the history."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

__all__ = ["Progress"]


class Progress:
    """Means of what happened since the last report, said every `logging_steps` by the main process.

    Attributes:
        history: one mapping an event, `step` in each: losses and rates, or the metrics of an evaluation.
    """

    def __init__(self, accelerator: Accelerator, total_steps: int, logging_steps: int) -> None:
        self.accelerator = accelerator
        self.total_steps = total_steps
        self.logging_steps = logging_steps
        self.history: list[dict[str, Any]] = []
        # disable=None: off where the output is not a terminal; the log lines remain
        off = None if accelerator.is_main_process else True
        self._bar = tqdm(total=total_steps, desc="training", unit="step", disable=off, dynamic_ncols=True)
        self._started = time.perf_counter()
        self._paused, self._ended = 0.0, 0.0
        self._forget()

    def _forget(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # of batches: the parts of the loss change over a run
        self._pairs = self._captions = 0
        self._since, self._paused_since = time.perf_counter(), self._paused

    def batch(self, loss: Tensor, parts: dict[str, Tensor], images: int, captions: int) -> None:
        """Count one batch; nothing is read back from the device here."""
        for name, value in {"loss": loss, **{f"{part}_loss": value for part, value in parts.items()}}.items():
            detached = value.detach().float()
            self._sums[name] = self._sums[name] + detached if name in self._sums else detached
            self._counts[name] = self._counts.get(name, 0) + 1
        self._captions += captions
        self._pairs += images * captions

    def step(self, number: int, epoch: float, **values: float | Tensor) -> None:
        """Count one optimizer step, and report where it is time to.

        Args:
            number: the step just made, from 1.
            epoch: how far the run is, in epochs.
            values: what else to log, such as the learning rate.
        """
        self._bar.update()
        if number % self.logging_steps == 0 or number == self.total_steps or number == 1:
            self._report(number, epoch, {name: float(value) for name, value in values.items()})

    def _report(self, number: int, epoch: float, values: dict[str, float]) -> None:
        seconds = max(time.perf_counter() - self._since - (self._paused - self._paused_since), 1e-9)
        means = {name: total.item() / self._counts[name] for name, total in self._sums.items()}
        event = {
            "step": number, "epoch": round(epoch, 4), **means, **values,
            "pairs_per_second": self._pairs / seconds, "captions_per_second": self._captions / seconds,
        }  # fmt: skip
        self._forget()
        self.history.append(event)
        self.track(number, event)
        if not self.accelerator.is_main_process:
            return
        shown = {name.removesuffix("_loss"): f"{value:.3f}" for name, value in means.items()}
        shown |= {"rate": f"{values.get('learning_rate', 0.0):.1e}", "pairs/s": f"{event['pairs_per_second']:,.0f}"}
        if self._bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = self.seconds()["training"] / number * (self.total_steps - number)
            eta = tqdm.format_interval(left)
            logger.info("step %d/%d  epoch %.2f  %s  ETA %s", number, self.total_steps, epoch, text, eta)
        else:
            self._bar.set_postfix(shown, refresh=False)

    def evaluated(self, number: int, epoch: float, metrics: dict[str, float], seconds: float) -> None:
        """Add an evaluation to history and trackers; its time does not count as training."""
        self._paused += seconds
        event = {"step": number, "epoch": round(epoch, 4), **metrics, "evaluation_seconds": seconds}
        self.history.append(event)
        self.track(number, event)

    def say(self, message: str, *arguments: Any) -> None:
        """Log a line without tearing the progress bar."""
        if not self.accelerator.is_main_process:
            return
        if self._bar.disable:
            logger.info(message, *arguments)
        else:
            self._bar.write(message % arguments)

    def track(self, number: int, event: dict[str, Any]) -> None:
        """Send an event's numbers to the trackers, if there are any."""
        self.accelerator.log({name: value for name, value in event.items() if name != "step"}, step=number)

    def seconds(self) -> dict[str, float]:
        """Seconds of training so far without the evaluations, and of these."""
        end = self._ended or time.perf_counter()
        return {"training": end - self._started - self._paused, "evaluation": self._paused}

    def state(self) -> dict[str, Any]:
        """History, clocks and the sums since the last report, as JSON values."""
        return {
            "history": self.history,
            "seconds": self.seconds(),
            "sums": {name: total.item() for name, total in self._sums.items()},
            "counts": self._counts,
            "pairs": self._pairs,
            "captions": self._captions,
            "since": time.perf_counter() - self._since - (self._paused - self._paused_since),
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on from `state` as if the time between had not passed."""
        now = time.perf_counter()
        self.history = list(state["history"])
        self._paused = state["seconds"]["evaluation"]
        self._started = now - state["seconds"]["training"] - self._paused
        self._since, self._paused_since = now - state["since"], self._paused
        device = self.accelerator.device
        # float64 holds the float32 sums exactly, and the sums go on in float32 as before
        self._sums = {
            name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in state["sums"].items()
        }
        self._counts = dict(state["counts"])
        self._pairs, self._captions = state["pairs"], state["captions"]
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Finish the bar and stop the clock."""
        self._ended = time.perf_counter()
        self._bar.close()
