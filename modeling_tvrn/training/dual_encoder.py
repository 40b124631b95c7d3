"""Training of any dual encoder of transformers (CLIP, SigLIP, ALIGN, ...) by its own loss, with CUSA beside it.

The model is used as it is: its forward pass with `return_loss=True` gives the loss and both embeddings. A batch has N
different images with one caption each, which is what such losses expect. What CUSA learns beside the model, its
uni-modal heads, is saved in a file of its own next to the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from ..data import CaptionDataset, load_pairs
from ..layers_tvrn import UnimodalHead
from ..metrics import RetrievalMetrics, retrieval_metrics, unimodal_metrics
from .config import check_cusa, like
from .cusa import CUSATerms, TeacherCollator, open_teachers, take_teachers
from .exchange import gather_rows
from .launch import leave_group
from .settings import build, read_overrides, read_yaml, validate

logger = logging.getLogger(__name__)

__all__ = ["DualEncoderConfig", "UnimodalHeads", "train_dual_encoder"]

HEADS_FILE = "unimodal_heads.safetensors"
# Trained on captions padded to the full length; see `teachers.teacher`.
_PADDED_TO_THE_FULL = ("siglip", "siglip2")


def _key(default: Any, section: str, help: str, **limits: Any) -> Any:
    from .config import _key as key

    return key(default, section, help, **limits)


@dataclass
class DualEncoderConfig:
    """Every key of a run; `examples/train_dual_encoder.py --help` prints them all.

    Raises:
        ValueError: for a value of the wrong type or out of range, or keys that contradict one another.
    """

    checkpoint: str = _key("openai/clip-vit-base-patch32", "model", "Hub id or path of the dual encoder")
    data: str = like("data")
    data_options: dict[str, Any] = like("data_options")
    train_split: str = like("train_split")
    validation_split: str = like("validation_split")
    num_workers: int = like("num_workers")

    epochs: int = _key(10, "schedule", "times that every caption is seen", minimum=1)
    max_steps: int | None = like("max_steps")
    batch_size: int = _key(128, "schedule", "pairs a batch, each of another image, over all processes", minimum=2)

    learning_rate: float = _key(1e-5, "optimizer", "highest rate of the model's own weights", above=0.0)
    new_learning_rate: float = _key(1e-3, "optimizer", "highest rate of heads and temperatures of CUSA", above=0.0)
    final_rate: float = _key(
        0.1, "optimizer", "share of the highest rates at which the cosine ends", minimum=0.0, maximum=1.0
    )
    warmup_ratio: float = like("warmup_ratio")
    weight_decay: float = _key(1e-4, "optimizer", "AdamW's, on matrices only", minimum=0.0)
    max_grad_norm: float | None = like("max_grad_norm")

    cusa: bool = like("cusa")
    cusa_image_teacher: str | None = like("cusa_image_teacher")
    cusa_text_teacher: str | None = like("cusa_text_teacher")
    cusa_alpha: float = _key(0.1, "cusa", "weight of the cross-modal soft labels (0: off)", minimum=0.0)
    cusa_beta: float = _key(0.5, "cusa", "weight of the uni-modal soft labels (0: off)", minimum=0.0)
    cusa_heads: bool = _key(True, "cusa", "uni-modal heads for the uni-modal part (false: on the embeddings)")
    cusa_teacher_temperature: float = like("cusa_teacher_temperature")
    cusa_student_temperature: float = like("cusa_student_temperature")
    cusa_lowest_temperature: float = like("cusa_lowest_temperature")
    cusa_teachers: str = like("cusa_teachers")

    evaluation_batch_size: int = like("evaluation_batch_size")
    output_dir: str = _key("runs/dual-encoder", "run", "folder of the model: checkpoint, processor, heads, results")
    seed: int = like("seed")
    mixed_precision: str = like("mixed_precision")
    cpu: bool = like("cpu")
    logging_steps: int = like("logging_steps")

    def __post_init__(self) -> None:
        validate(self)
        check_cusa(self)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> DualEncoderConfig:
        """A configuration from keys and values; an unknown key is refused with the nearest known ones."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> DualEncoderConfig:
        """A configuration from a YAML file and `key=value` overrides, which win."""
        return build(cls, read_overrides(overrides, read_yaml(path) if path is not None else {}))


class UnimodalHeads(nn.Module):
    """Heads on a dual encoder's embeddings, for comparing items of one modality; kept beside its checkpoint."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.image = UnimodalHead(size)
        self.text = UnimodalHead(size)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """(I, P) and (T, P) cross-modal embeddings -> the same of each modality alone, unit norm."""
        return self.image(image_embeds), self.text(text_embeds)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the heads beside a checkpoint."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, Path(folder) / HEADS_FILE)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> UnimodalHeads:
        """Read the heads that lie beside a checkpoint.

        Raises:
            FileNotFoundError: there are none.
        """
        path = Path(folder) / HEADS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no {HEADS_FILE} in {os.fspath(folder)!r}: the model was trained without heads")
        tensors = load_file(path)
        heads = cls(len(tensors["image.norm.weight"]))
        heads.load_state_dict(tensors)
        return heads.eval()


class DifferentImages(Sampler[list[int]]):
    """Batches of captions of different images: an epoch is one round for each caption of the images that have most.

    Every caption comes once, but for rounds in which fewer than two images a process have one left. Of several
    processes each gets its own part of every batch.
    """

    def __init__(self, image_rows: np.ndarray, size: int, seed: int = 0, process: int = 0, processes: int = 1) -> None:
        self.captions = [np.flatnonzero(image_rows == row) for row in np.unique(image_rows)]
        if min(size, len(self.captions)) < 2 * processes:
            raise ValueError(
                f"batches of {size} of {len(self.captions)} images leave {processes} processes with less than two "
                "pairs each, so without negatives; expected more images, or a larger batch_size"
            )
        self.size, self.seed, self.process, self.processes = size, seed, process, processes
        self.rounds = max(map(len, self.captions))
        self.epoch = 0

    def _batches(self, count: int) -> int:
        """Batches of a round; what does not divide joins the last one, or is one where it is large enough."""
        least = 2 * self.processes
        return max(count // self.size + (count % self.size >= least), 1) if count >= least else 0

    def __len__(self) -> int:
        return sum(self._batches(sum(len(own) > number for own in self.captions)) for number in range(self.rounds))

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        orders = [rng.permutation(own) for own in self.captions]
        for number in range(self.rounds):
            captions = rng.permutation([own[number] for own in orders if len(own) > number])
            last = self._batches(len(captions)) - 1
            for cut in range(last + 1):
                end = (cut + 1) * self.size if cut < last else len(captions)
                yield np.array_split(captions[cut * self.size : end], self.processes)[self.process].tolist()


class DualEncoderCollator:
    """Pictures and captions of items of `CaptionDataset` as the model's inputs, with `text_image_ids`."""

    def __init__(self, processor: Any, full_length: bool) -> None:
        self.processor = processor
        self.full_length = full_length

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """N items of different images -> the processor's inputs of N pairs."""
        inputs = self.texts([item["caption"] for item in items])
        inputs |= self.images([item["record"]["image"] for item in items])
        return inputs | {"text_image_ids": torch.tensor([item["row"] for item in items], dtype=torch.int64)}

    def texts(self, captions: list[str]) -> dict[str, Any]:
        """Token ids, padded as the model was trained."""
        padding = "max_length" if self.full_length else True
        return dict(self.processor(text=captions, padding=padding, truncation=True, return_tensors="pt"))

    def images(self, images: list[Any]) -> dict[str, Any]:
        """Pixel values."""
        return dict(self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt"))


class DualObjective(nn.Module):
    """The model's own loss on a process's pairs, and CUSA's on those of all processes."""

    def __init__(self, model: Any, heads: UnimodalHeads | None, cusa: CUSATerms | None) -> None:
        super().__init__()
        self.model, self.heads, self.cusa = model, heads, cusa

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts, detached, of what the collators make."""
        inputs = dict(batch)
        teachers, ids = take_teachers(inputs), inputs.pop("text_image_ids")
        output = self.model(**inputs, return_loss=True)
        parts = {"own": output.loss.detach()}
        if self.cusa is None:
            return output.loss, parts
        images, texts = (
            gather_rows(nn.functional.normalize(value.float(), dim=-1))
            for value in (output.image_embeds, output.text_embeds)
        )
        teachers, ids = {name: gather_rows(value) for name, value in teachers.items()}, gather_rows(ids)
        unimodal = self.heads(images, texts) if self.heads is not None else None
        extra, extra_parts = self.cusa(teachers, images, texts, ids, ids, unimodal)
        return output.loss + extra, parts | extra_parts


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
        self.accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
        )
        set_seed(config.seed)
        self.model, self.processor = load_dual_encoder(config.checkpoint)
        self.collator = DualEncoderCollator(self.processor, self.model.config.model_type in _PADDED_TO_THE_FULL)
        self.records = load_pairs(config.data, split=config.train_split, **config.data_options)
        self.validation_records = load_pairs(config.data, split=config.validation_split, **config.data_options)
        self.heads, self.cusa = self._soft_labels()
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
        size = projection_size(self.model, self.collator, self.records[0])
        heads = UnimodalHeads(size) if config.cusa_beta and config.cusa_heads else None
        return heads, CUSATerms(config)

    def _collate(self) -> Any:
        if self.cusa is None:
            return self.collator
        return TeacherCollator(self.collator, *open_teachers(self.config, self.records))

    def fit(self) -> dict[str, Any]:
        """Run all steps; evaluate, and keep the best, at the end of each epoch."""
        config, bar = self.config, tqdm(total=self.total, desc="training", unit="step", disable=None)
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
        results = {
            "metrics": max(self.history, key=lambda event: event.get("rsum", -math.inf)),
            "history": self.history,
            "seconds": {"training": self.training_seconds},
            "config": asdict(config),
        }
        if self.accelerator.is_main_process:
            path = Path(config.output_dir) / "results.json"
            path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        self.objective = self.accelerator.unwrap_model(self.objective)
        leave_group(self.accelerator)
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


def load_dual_encoder(checkpoint: str) -> tuple[Any, Any]:
    """Model in float32 and processor.

    Raises:
        ValueError: nothing loads there, or it is no dual encoder.
    """
    try:
        model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(checkpoint)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"no dual encoder at {checkpoint!r}: {error}") from error
    methods = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if methods:
        raise ValueError(
            f"{checkpoint!r} is a {type(model).__name__} without {' and '.join(methods)}; expected a dual encoder "
            "such as CLIP or SigLIP"
        )
    return model, processor


def save_dual_encoder(folder: str | os.PathLike[str], model: Any, processor: Any, heads: UnimodalHeads | None) -> None:
    """Write the model as it came, its processor, and the heads beside it."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if heads is not None:
        heads.save(folder)


@torch.no_grad()
def projection_size(model: Any, collator: DualEncoderCollator, record: dict[str, Any]) -> int:
    """P, the size of both embeddings, found by one picture: configurations call it by many names."""
    return int(_features(model.eval(), "image", collator.images([record["image"]])).shape[-1])


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


@torch.no_grad()
def evaluate_dual_encoder(
    model: Any, collator: DualEncoderCollator, records: Any, heads: UnimodalHeads | None = None, batch_size: int = 64
) -> dict[str, float]:
    """Recalls across modalities, and of captions of the same image, in percent.

    Returns:
        The names of `RetrievalMetrics.as_dict`, `text_R@1` of the embeddings and, with heads, `text_heads_R@1`.
    """
    training = model.training
    model.eval()
    captions = [caption for of_image in records.captions for caption in of_image]
    rows = np.repeat(np.arange(len(records)), [len(of_image) for of_image in records.captions])
    images = torch.cat(
        [
            _features(model, "image", collator.images([records[row]["image"] for row in part]))
            for part in _parts(len(records), batch_size)
        ]
    )
    texts = torch.cat(
        [
            _features(model, "text", collator.texts([captions[row] for row in part]))
            for part in _parts(len(captions), batch_size)
        ]
    )
    metrics: RetrievalMetrics = retrieval_metrics(images @ texts.T, rows)
    found = {**metrics.as_dict(), "text_R@1": unimodal_metrics(texts, rows.tolist()).recall[1]}
    if heads is not None:
        device = next(heads.parameters()).device
        found["text_heads_R@1"] = unimodal_metrics(heads.text(texts.to(device)).cpu(), rows.tolist()).recall[1]
    model.train(training)
    return {name: float(value) for name, value in found.items()}


def _parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _features(model: Any, side: str, inputs: dict[str, Any]) -> Tensor:
    """Unit-norm embeddings of one side, on the CPU."""
    device = next(model.parameters()).device
    with contextlib.nullcontext() if device.type == "cpu" else torch.autocast(device.type, enabled=False):
        found = getattr(model, f"get_{side}_features")(**{name: value.to(device) for name, value in inputs.items()})
    found = found if isinstance(found, Tensor) else found.pooler_output  # an output since transformers 5
    return nn.functional.normalize(found.float(), dim=-1).cpu()
