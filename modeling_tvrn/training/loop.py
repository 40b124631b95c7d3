"""The training loop: pairs in, a model folder out."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..modeling_tvrn import TVRNModel
from .batches import Phase
from .config import TrainingConfig
from .distributed import average_gradients, broadcast_json, everywhere
from .divergence import TrainingStopped
from .interrupt import watching_signals
from .loaders import named_shards, to_device
from .optim import rate_factor
from .output import write_results
from .phases import COMPONENT_WEIGHTS
from .run import Run
from .sharding import change_trained, own_part, whole
from .state import capture, resume
from .streams import StreamBatches
from .validation import flat_recalls, summary

logger = logging.getLogger(__name__)

__all__ = ["Training", "train"]


def train(config: TrainingConfig, data: Any = None, model_class: type[TVRNModel] = TVRNModel) -> dict[str, Any]:
    """Train a model as configured and write its folder: weights, processor, card, results, curve.

    Args:
        config: the run. Its `output_dir` holds the best model by validation rSum from the first evaluation on.
        data: what to train on in place of `config.data`: records of `load_pairs`, a `datasets.Dataset`, or several by
            split. Where they have no validation split, one is set aside by image.
        model_class: what to train in place of a TVRNModel: a subclass of it, such as one with another pair stage (see
            examples/baselines/peers.py). The folder then loads with that class.

    Returns:
        What `results.json` holds (`metrics` in percent, `history`, `seconds`, …), and `table`, the recalls in words.

    Raises:
        ValueError: for a configuration, data or towers that do not fit together; the message says what and what to do.
        TrainingStopped: the loss became NaN or infinite or the scores collapsed; names the step and the image ids.
        SystemExit: with code 0, when SIGTERM or SIGUSR1 came and the run's state is saved.
    """
    with watching_signals(set_up=True):  # while data and towers are read
        run = Training(config, data, model_class)
        run.fit()
    result = write_results(run)
    if run.accelerator.num_processes > 1:
        result = broadcast_json(result, run.accelerator.device)
    run.leave_group()
    return result


class Training(Run):
    """A run's loop: batches, steps, evaluations and checkpoints; taken up again where the run is to be."""

    def __init__(self, config: TrainingConfig, data: Any = None, model_class: type[TVRNModel] = TVRNModel) -> None:
        super().__init__(config, data, model_class)
        if resume(self):
            return
        self.best.warn()
        if steps := self.snapshots.steps():
            logger.warning(
                "%s holds checkpoints of a former run, up to step %d; they go at this run's first checkpoint "
                "(resume=auto goes on with them instead)",
                self.snapshots.folder,
                steps[-1],
            )

    def fit(self) -> None:
        """Run all steps and evaluations; the best model lies in the output folder afterwards.

        Raises:
            TrainingStopped: see `train`.
        """
        try:
            with watching_signals():
                if self.interrupt.agreed_before_the_first_step():
                    self._leave_unbegun()
                while self.step < self.total_steps:
                    self._run_phase(self.phases[self.phase_number], self.loaders[self.phase_number])
                if not self.best.step:  # nothing was left to do of a checkpoint from another folder
                    self._evaluate()
            self.guard.check()
        except TrainingStopped:
            if self.best.step:
                logger.error("stopped; the best model so far, of step %d, is in %s", self.best.step, self.best.folder)
            if self.snapshots.own:
                kept = self.snapshots.path(self.snapshots.own[-1])
                logger.error("the last good checkpoint is %s (resume=auto goes on from it)", kept)
            raise
        finally:
            self.interrupt.forget()
            self.progress.close()

    def _run_phase(self, phase: Phase, loader: DataLoader[Any]) -> None:
        """A phase's steps, what is left of them."""
        self._set_rates(phase)
        self._enter(phase)
        while self.phase_step < phase.steps:
            self._run_epoch(phase, loader)
        if phase is self.phases[-1]:
            return
        if self.epoch_step:  # the phase ended within an epoch; the next one begins with an order of its own
            self.epoch, self.epoch_step = self.epoch + 1, 0
        self.phase_number, self.phase_step = self.phase_number + 1, 0
        following = self.phases[self.phase_number].batches
        if isinstance(phase.batches, StreamBatches) and isinstance(following, StreamBatches):
            following.follow(phase.batches)

    def _enter(self, phase: Phase) -> None:
        """Let learn what the phase trains, and keep the rest as it is."""
        self.accelerator.unwrap_model(self.objective).enter(phase.config)
        learning = self.learning_in(phase)

        def let_learn() -> None:
            for name, weight in self.model.named_parameters():
                weight.requires_grad_(name in learning)

        if any(weight.requires_grad != (name in learning) for name, weight in self.model.named_parameters()):
            change_trained(self.objective, let_learn)
        if len(self.phases) > 1:
            place, named = (self.phase_number + 1, len(self.phases)), ", ".join(phase.config.train)
            size = phase.config.batch_size
            self.progress.say("phase %d of %d trains %s: %d steps of %d captions", *place, named, phase.steps, size)

    def _run_epoch(self, phase: Phase, loader: DataLoader[Any]) -> None:
        """The batches of an epoch that are left, in groups that make a step each."""
        group = phase.accumulation
        start = self.epoch_step * group
        phase.batches.set_epoch(self.epoch, start)
        self.objective.train()
        last = len(phase.batches) - 1
        for number, batch in enumerate(self._timed(loader), start):
            size = min(group, last + 1 - number // group * group)
            complete = (number + 1) % group == 0 or number == last
            self._run_batch(batch, size, complete)
            if complete:
                self._finish_step(phase)
                if self.phase_step == phase.steps:
                    return

    def _timed(self, loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches on the device, counting the time that the loop waits for them."""
        asked = time.perf_counter()
        batches = iter(loader)
        while True:
            with named_shards(self.phases[self.phase_number].batches, self.step):
                batch = next(batches, None)
            if batch is None:
                return
            if "image_names" in batch:
                self.captions.names.add(batch["image_ids"], batch.pop("image_names"))
            batch = to_device(batch, self.accelerator.device, self.pixel_format)
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def _run_batch(self, batch: dict[str, Any], group: int = 1, complete: bool = True) -> None:
        """Forward, backward and, where the step's group of batches is complete, the optimizer's step."""
        try:
            output = self._forward_backward(batch, group, complete)
        except ValueError as error:  # the model refuses the batch, or its scores are NaN already
            shown = self.guard.shown(batch["image_ids"])
            raise TrainingStopped(f"{error} (at step {self.step + 1}; {shown})") from error
        self.gradient_norm = self._update() if complete else None
        loss, parts, images = output["loss"].detach(), output["parts"], output["image_ids"]
        # fp16's scaler skips steps with infinite gradients by itself
        seen_norm = None if self.config.mixed_precision == "fp16" else self.gradient_norm
        self.guard.see(self.step + 1, images, loss, parts, seen_norm, output["logits"])
        self.progress.batch(loss, parts, len(images), len(output["text_image_ids"]))

    def _forward_backward(self, batch: dict[str, Any], group: int, complete: bool) -> dict[str, Any]:
        """Add the gradients of one batch of a step's group; after the last one they are those of all processes."""

        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss / group)

        size = self.config.tower_batch_size
        if size is not None:
            with self.accelerator.autocast():
                output: dict[str, Any] = self.objective.cached_backward(batch, size, backward)
            if complete:
                average_gradients([weight for weight in self.objective.parameters() if weight.requires_grad])
            return output
        if self.is_sharded:
            self.objective.set_requires_gradient_sync(complete)
            with self.accelerator.autocast():
                output = self.objective(batch)
            backward(output["loss"])
            return output
        with contextlib.nullcontext() if complete else self.accelerator.no_sync(self.objective):
            output = self.objective(batch)
            backward(output["loss"])
        return output

    def _update(self) -> Tensor | None:
        """Clip the gradients and move the weights; the gradient's norm where it is known."""
        norm = None
        if self.config.max_grad_norm is not None:
            # A component's weight has a gradient of many logits' size, which would shrink all others'.
            named = self.objective.named_parameters()
            weights = [weight for name, weight in named if not name.endswith(COMPONENT_WEIGHTS)]
            norm = self.accelerator.clip_grad_norm_(weights, self.config.max_grad_norm)
            norm = whole(norm) if norm is not None else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.cusa is not None:
            self.cusa.clamp_temperatures()
        return norm

    def _finish_step(self, phase: Phase) -> None:
        """Count an optimizer step, move the rates, and evaluate and save where it is time to."""
        self.step += 1
        self.epoch_step += 1
        self.phase_step += 1
        if isinstance(phase.batches, StreamBatches):
            phase.batches.forget_before(self.phase_step * phase.accumulation)
        if self.average is not None:
            self.average.update()
        values: dict[str, float | Tensor] = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        if self.gradient_norm is not None:
            values["gradient_norm"] = self.gradient_norm
        self.progress.step(self.step, self.epoch + self.epoch_step / phase.steps_per_epoch, **values)
        self._set_rates(phase)
        if self.epoch_step == phase.steps_per_epoch:
            self.epoch, self.epoch_step = self.epoch + 1, 0
        ended = self.epoch_step == 0 or self.phase_step == phase.steps
        # before the phases that compute as much of the score as any of the run, it would be that of untrained weights
        evaluated = phase.learning.computes == self.fullest
        if self._is_due(ended and evaluated, self.config.evaluation_steps if evaluated else None):
            self._evaluate()
        saved = self._is_due(ended, self.config.save_steps) and self._save()
        if self.interrupt.agreed() and self.step < self.total_steps:
            self._leave(saved)

    def _is_due(self, ended: bool, every: int | None) -> bool:
        """At the last step, and every so many steps, or where no number is given at the end of an epoch."""
        return self.step == self.total_steps or (ended if every is None else self.step % every == 0)

    def _save(self) -> bool:
        """Write a checkpoint, of good weights only; whether there is one now."""
        self.guard.check()
        # The step before this one may have broken the weights unseen.
        finite = torch.stack([own_part(weight).isfinite().all() for weight in self.model.parameters()]).all()
        if not everywhere(finite):
            raise TrainingStopped(
                f"weights are NaN or infinite after step {self.step}; lower the learning rate, or set max_grad_norm"
            )
        state, tensors = capture(self)
        saved = not self.accelerator.is_main_process or self.snapshots.save(self.step, state, tensors)
        return bool(broadcast_json(saved, self.accelerator.device))

    def _leave(self, saved: bool) -> None:
        """End the run as its scheduler asked, with everything saved.

        Raises:
            SystemExit: always; code 0, or 1 where the state could not be saved.
        """
        name = self.interrupt.received or "another process's signal"
        if saved or self._save():
            self.progress.say("%s: saved after step %d; resume=auto goes on", name, self.step)
            self.leave_group()
            raise SystemExit(0)
        logger.error("%s: stopped after step %d without a checkpoint of it", name, self.step)
        raise SystemExit(1)

    def _leave_unbegun(self) -> None:
        """End the run as its scheduler asked while it was set up; a checkpoint that it was to go on from stays.

        Raises:
            SystemExit: always; code 0.
        """
        name = self.interrupt.received or "another process's signal"
        self.progress.say("%s: left before the first step of this run; the same command starts it again", name)
        self.leave_group()
        raise SystemExit(0)

    def _set_rates(self, phase: Phase) -> None:
        own = phase.steps, phase.steps_per_epoch
        factor = phase.rate * rate_factor(self.phase_step, *own, self.config, phase.config.warmup_ratio)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _evaluate(self) -> None:
        """Validate, all processes together, and keep the model if it is the best so far."""
        self.guard.check()
        started = time.perf_counter()
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            # the random state comes back: how often a run is evaluated does not change what it learns
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            model = self.whole_copy.of(self.model) if self.is_sharded else self.model
            with self.accelerator.autocast(), torch.random.fork_rng(devices):
                report = self.validation.run(model)
            better = self.best.offer(self.step, report, model, self.processor, self.validation)
        self.objective.train()
        seconds = time.perf_counter() - started
        epoch = self.epoch + self.epoch_step / self.phases[self.phase_number].steps_per_epoch
        self.progress.evaluated(self.step, epoch, flat_recalls(report), seconds)
        kept = ", best so far" if better else ""
        self.progress.say("step %d: validation %s%s", self.step, summary(report), kept)
