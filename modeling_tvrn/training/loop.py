"""The training loop: pairs in, a model folder out."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import CaptionDataset, PairCollator
from .batches import CaptionBatches, Phase, phases
from .build import build_model, build_processor, load_records, with_cached_regions
from .checkpoint import BestModel
from .config import TrainingConfig
from .objective import Objective
from .optim import WeightAverage, make_optimizer, rate_factor
from .output import write_results
from .progress import Progress
from .text_cache import CachedTextProcessor
from .validation import Validation, flat_recalls, summary
from .watch import TrainingStopped, Watch

logger = logging.getLogger(__name__)

__all__ = ["Training", "train"]


def train(config: TrainingConfig) -> dict[str, Any]:
    """Train a model as configured and write its folder: weights, processor, card, results, curve.

    Args:
        config: the run. Its `output_dir` holds the best model by validation rSum from the first evaluation on.

    Returns:
        What `results.json` holds (`metrics` in percent, `history`, `seconds`, …), and `table`, the recalls in words.

    Raises:
        ValueError: for a configuration, data or towers that do not fit together; the message says what and what to do.
        TrainingStopped: the loss became NaN or infinite or the scores collapsed; names the step and the image ids.
    """
    run = Training(config)
    run.fit()
    return write_results(run)


class Training:
    """One run, set up: data, processor, model, optimizer and what watches over them.

    Attributes:
        model: the TVRNModel in training; `best` tells which of its states the folder holds.
        step: optimizer steps made.
        progress: bar, logs and `history`.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.started = time.perf_counter()
        self.accelerator = make_accelerator(config)
        self.train_records = load_records(config, config.train_split)
        self.validation_records = load_records(config, config.validation_split)
        self.processor = build_processor(config, self.train_records)
        set_seed(config.seed)
        self.model = build_model(config, self.processor, self.train_records).to(self.accelerator.device)
        self.trained_parameters = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        self._read_caches()
        image_rows = [row for row, captions in enumerate(self.train_records.captions) for _ in captions]
        self.phases = phases(config, image_rows)
        self.total_steps = config.max_steps or sum(p.epochs * p.steps_per_epoch for p in self.phases)
        self.epoch, self.epoch_step, self.phase_step = 0, 0, 0
        self._prepare()
        self.step, self.waited = 0, 0.0
        self.gradient_norm: Tensor | None = None
        self.validation = Validation(config, self.validation_records, self.input_processor)
        self.best = BestModel(config.output_dir)
        self.watch = Watch(self.train_records.image_ids)
        self.progress = Progress(self.accelerator, self.total_steps, config.logging_steps)
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay is not None else None

    def _read_caches(self) -> None:
        """Regions from their cache and, if asked for, the text tower's outputs in memory."""
        config = self.config
        self.pictures = self.validation_records
        made_by = self.model, self.processor
        self.train_records = with_cached_regions(config, config.train_split, self.train_records, *made_by)
        self.validation_records = with_cached_regions(
            config, config.validation_split, self.validation_records, *made_by
        )
        self.input_processor: Any = self.processor
        if config.cache_text_features:
            everything = [*self.train_records.captions, *self.validation_records.captions]
            with self.accelerator.autocast():
                self.input_processor = CachedTextProcessor.build(
                    self.model.eval(), self.processor, (caption for captions in everything for caption in captions)
                )

    def _prepare(self) -> None:
        config = self.config
        loaders = [self._loader(phase.batches) for phase in self.phases]
        objective = Objective(self.model, config.word_dropout, config.region_dropout)
        self.objective, self.optimizer, *self.loaders = self.accelerator.prepare(
            objective, make_optimizer(self.model, config), *loaders
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def _loader(self, batches: CaptionBatches) -> DataLoader[Any]:
        workers = self.config.num_workers
        return DataLoader(
            CaptionDataset(self.train_records),
            batch_sampler=batches,
            collate_fn=PairCollator(self.input_processor),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def seconds(self) -> dict[str, float]:
        """Seconds of training without evaluations, the part of them spent waiting for data, and of evaluations."""
        return {**self.progress.seconds(), "waiting_for_data": self.waited}

    # -- the loop -----------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Run all steps and evaluations; the best model lies in the output folder afterwards.

        Raises:
            TrainingStopped: see `train`.
        """
        try:
            for phase, loader in zip(self.phases, self.loaders, strict=True):
                self._run_phase(phase, loader)
            self.watch.check()
        except TrainingStopped:
            if self.best.step:
                logger.error("stopped; the best model so far, of step %d, is in %s", self.best.step, self.best.folder)
            raise
        finally:
            self.progress.close()

    def _run_phase(self, phase: Phase, loader: Iterable[dict[str, Any]]) -> None:
        """A phase's epochs; `max_steps` beyond the last phase's epochs goes on with more of them."""
        last, done, self.phase_step = phase is self.phases[-1], 0, 0
        self._set_rates(phase)
        if phase.with_pairs and self.config.keep_head_start:
            self.model.freeze_embeddings()
        while self.step < self.total_steps and (last or done < phase.epochs):
            self._run_epoch(phase, loader)
            self.epoch, self.epoch_step, done = self.epoch + 1, 0, done + 1
            if phase.with_pairs and not self.config.evaluation_steps and self.step < self.total_steps:
                self._evaluate()

    def _run_epoch(self, phase: Phase, loader: Iterable[dict[str, Any]]) -> None:
        phase.batches.set_epoch(self.epoch)
        self.objective.train()
        for batch in self._timed(loader):
            with self.accelerator.accumulate(self.objective):
                self._run_batch(batch, phase.with_pairs)
            if self.accelerator.sync_gradients:
                self._finish_step(phase)
                if self.step == self.total_steps:
                    return

    def _timed(self, loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, counting the time that the loop waits for them."""
        asked = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def _run_batch(self, batch: dict[str, Any], with_pairs: bool) -> None:
        """Forward, backward and, where gradients are complete, the optimizer's step."""
        with self._named_batch(batch):
            output = self.objective(batch, with_pairs=with_pairs)
        self.accelerator.backward(output["loss"])
        norm = None
        if self.accelerator.sync_gradients and self.config.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, parts = output["loss"].detach(), output["parts"]
        self.gradient_norm = norm
        # fp16's scaler skips steps with infinite gradients by itself
        seen_norm = None if self.config.mixed_precision == "fp16" else norm
        self.watch.see(self.step + 1, batch["image_ids"], loss, parts, seen_norm, output["logits"])
        self.progress.batch(loss, parts, len(batch["image_ids"]), len(batch["text_image_ids"]))

    @contextlib.contextmanager
    def _named_batch(self, batch: dict[str, Any]) -> Iterator[None]:
        """Say the step and the images where the model refuses a batch, or its scores are NaN already."""
        try:
            yield
        except ValueError as error:
            shown = self.watch.shown(batch["image_ids"])
            raise TrainingStopped(f"{error} (at step {self.step + 1}; {shown})") from error

    def _finish_step(self, phase: Phase) -> None:
        """Count an optimizer step, move the rates, and evaluate where it is time to."""
        self.step += 1
        self.epoch_step += 1
        self.phase_step += 1
        if self.average is not None:
            self.average.update()
        values: dict[str, float | Tensor] = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        if self.gradient_norm is not None:
            values["gradient_norm"] = self.gradient_norm
        self.progress.step(self.step, self.epoch + self.epoch_step / phase.steps_per_epoch, **values)
        self._set_rates(phase)
        every = self.config.evaluation_steps
        if self.step == self.total_steps or (every and phase.with_pairs and self.step % every == 0):
            self._evaluate()

    def _set_rates(self, phase: Phase) -> None:
        last = phase is self.phases[-1]
        steps = self.total_steps - (self.step - self.phase_step) if last else phase.epochs * phase.steps_per_epoch
        factor = phase.rate * rate_factor(self.phase_step, steps, phase.steps_per_epoch, self.config)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _evaluate(self) -> None:
        """Validate, and keep the model if it is the best so far."""
        self.watch.check()
        started = time.perf_counter()
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            # the random state comes back: how often a run is evaluated does not change what it learns
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            with self.accelerator.autocast(), torch.random.fork_rng(devices):
                report = self.validation.run(self.model)
            better = self.best.offer(self.step, report, self.model, self.processor)
        self.objective.train()
        seconds = time.perf_counter() - started
        epoch = self.epoch + self.epoch_step / self.phases[-1].steps_per_epoch
        self.progress.evaluated(self.step, epoch, flat_recalls(report), seconds)
        kept = ", best so far" if better else ""
        self.progress.say("step %d: validation %s%s", self.step, summary(report), kept)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The device, precision and trackers of a run.

    Raises:
        ValueError: several processes were launched, or a tracker is not installed.
    """
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"trackers names {tracker!r}, which is not installed; pip install {tracker}")
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    if accelerator.num_processes > 1:
        raise ValueError(
            f"launched as {accelerator.num_processes} processes; this version trains in one, since negatives "
            "come from the whole batch: launch with --num_processes 1"
        )
    if config.trackers:
        accelerator.init_trackers("tvrn", config={name: _flat(value) for name, value in config.as_dict().items()})
    return accelerator


def _flat(value: Any) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else str(value)
