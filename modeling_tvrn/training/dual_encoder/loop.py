"""The loop of a dual encoder's training."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...data import CaptionDataset, load_pairs
from ...redaction import redacted
from ...teachers.teacher import PADDED_TO_THE_FULL
from ..cusa import CUSATerms, TeacherCollator, open_teachers
from ..launch import check_precision, leave_group, refuse_other_sharding
from .config import DualEncoderConfig
from .data import DifferentImages, DualEncoderCollator
from .evaluation import evaluate_dual_encoder
from .model import DualObjective, UnimodalHeads, features, load_dual_encoder, save_dual_encoder

logger = logging.getLogger(__name__)

__all__ = ["DualEncoderTraining", "train_dual_encoder"]


def train_dual_encoder(config: DualEncoderConfig) -> dict[str, Any]:
    """Train a dual encoder as configured; its folder then holds the best state by validation rSum.

    Returns:
        What `results.json` holds: recalls in percent, text→text R@1 of the embeddings and of the heads, history,
        seconds.

    Raises:
        ValueError: for a checkpoint that is no dual encoder, or data, caches and keys that do not fit together.
    """
    return DualEncoderTraining(config).fit()


class DualEncoderTraining:
    """One run, set up."""

    def __init__(self, config: DualEncoderConfig) -> None:
        self.config = config
        refuse_other_sharding()
        self.accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
        )
        check_precision(self.accelerator)
        set_seed(config.seed)
        self.model, self.processor = load_dual_encoder(config.checkpoint, config.trust_remote_code)
        self.collator = DualEncoderCollator(self.processor, self.model.config.model_type in PADDED_TO_THE_FULL)
        self.records = load_pairs(config.data, split=config.train_split, **config.data_options)
        self.validation_records = load_pairs(config.data, split=config.validation_split, **config.data_options)
        self.heads, self.cusa = self._soft_labels()
        self.teachers = open_teachers(config, self.records) if config.cusa else ()
        objective = DualObjective(self.model, self.heads, self.cusa).to(self.accelerator.device)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.model, self.heads, self.cusa, config))
        self.objective = self.accelerator.prepare(objective)
        captions = CaptionDataset(self.records)
        self.batches = DifferentImages(
            captions.image_rows, config.batch_size, config.seed, self.accelerator.process_index,
            self.accelerator.num_processes,
        )  # fmt: skip
        self.loader = DataLoader(
            captions, batch_sampler=self.batches, collate_fn=self._collate(), num_workers=config.num_workers
        )
        self.total = config.max_steps or config.epochs * len(self.batches)
        self.step, self.best, self.history = 0, -math.inf, []  # type: ignore[var-annotated]
        self.training_seconds = 0.0

    def _soft_labels(self) -> tuple[UnimodalHeads | None, CUSATerms | None]:
        config = self.config
        if not config.cusa:
            return None, None
        if config.cusa_on_logits and not hasattr(self.model, "logit_scale"):
            raise ValueError(
                f"cusa_on_logits = True, but {type(self.model).__name__} has no logit_scale; expected a model whose "
                "logits are cosines times exp(logit_scale), or set cusa_on_logits=false"
            )
        size = projection_size(self.model, self.collator, self.records[0])
        heads = UnimodalHeads(size) if config.cusa_beta and config.cusa_heads else None
        return heads, CUSATerms(config)

    def _collate(self) -> Any:
        if self.cusa is None:
            return self.collator
        return TeacherCollator(self.collator, *self.teachers)

    def fit(self) -> dict[str, Any]:
        """Run all steps; evaluate, and keep the best, at the end of each epoch.

        Returns:
            The content of results.json; empty in the processes beside the main one.
        """
        bar = tqdm(total=self.total, desc="training", unit="step", disable=None)
        while self.step < self.total:
            self.objective.train()
            started = time.perf_counter()
            for batch in self.loader:
                self._step(self.accelerator.state.device, batch)
                bar.update()
                if self.step == self.total:
                    break
            self.training_seconds += time.perf_counter() - started
            self.batches.epoch += 1
            if self.accelerator.is_main_process:
                self._evaluate()
            self.accelerator.wait_for_everyone()
        bar.close()
        results = self._write_results() if self.accelerator.is_main_process else {}
        self.objective = self.accelerator.unwrap_model(self.objective)
        leave_group(self.accelerator)
        return results

    def _write_results(self) -> dict[str, Any]:
        config = self.config
        results = {
            "metrics": max(self.history, key=lambda event: event.get("rsum", -math.inf)),
            "history": self.history,
            "seconds": {"training": self.training_seconds},
            "config": redacted(asdict(config)),
            "teachers": {cache.modality: cache.source for cache in self.teachers},
        }
        path = Path(config.output_dir) / "results.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        return results

    def _step(self, device: torch.device, batch: dict[str, Any]) -> None:
        factor = rate_factor(self.step, self.total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest_rate"] * factor
        loss, parts = self.objective({name: value.to(device) for name, value in batch.items()})
        if not loss.isfinite():
            raise ValueError(
                f"the loss is {loss.item()} at step {self.step + 1}; lower learning_rate, or use bf16 instead of fp16"
            )
        self.accelerator.backward(loss)
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.cusa is not None:
            self.cusa.clamp_temperatures()
        self.step += 1
        if self.step % self.config.logging_steps == 0 or self.step in (1, self.total):
            shown = {"loss": loss.item()} | {f"{name}_loss": value.item() for name, value in parts.items()}
            self.history.append({"step": self.step, **shown})
            logger.info("step %d/%d %s", self.step, self.total, {name: round(v, 4) for name, v in shown.items()})

    def _evaluate(self) -> None:
        found = evaluate_dual_encoder(
            self.model, self.collator, self.validation_records, self.heads, self.config.evaluation_batch_size
        )
        self.history.append({"step": self.step, **found})
        logger.info("step %d: validation rSum %.1f, text→text R@1 %.1f", self.step, found["rsum"], found["text_R@1"])
        if found["rsum"] > self.best:
            self.best = found["rsum"]
            save_dual_encoder(self.config.output_dir, self.model, self.processor, self.heads)


@torch.no_grad()
def projection_size(model: Any, collator: DualEncoderCollator, record: dict[str, Any]) -> int:
    """P, the size of both embeddings, found by one picture: configurations call it by many names."""
    return int(features(model.eval(), "image", collator.images([record["image"]])).shape[-1])


def make_optimizer(
    model: nn.Module, heads: nn.Module | None, cusa: nn.Module | None, config: DualEncoderConfig
) -> torch.optim.AdamW:
    """AdamW; the model's own weights at their rate, what is new at another; only matrices are decayed."""
    groups = []
    for module, rate in (
        (model, config.learning_rate),
        (heads, config.new_learning_rate),
        (cusa, config.new_learning_rate),
    ):
        for matrices in (True, False):
            parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
            chosen = [parameter for parameter in parameters if (parameter.ndim >= 2) == matrices]
            if chosen:
                decay = config.weight_decay if matrices else 0.0
                groups.append({"params": chosen, "lr": rate, "highest_rate": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def rate_factor(step: int, total: int, config: DualEncoderConfig) -> float:
    """What the rates are multiplied by at a step: a linear rise, then a half cosine down to `final_rate`."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    half = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    return config.final_rate + (1.0 - config.final_rate) * half
