"""Everything that a run consists of, set up."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor

from ..data import PairCollator, with_words
from ..data.flips import FlippingCollator
from ..modeling_tvrn import TVRNModel
from ..storage.files import make_folder
from ..teachers import TeacherCache
from .batches import Phase
from .best_model import BestModel
from .build import build_model, build_processor, check_boxes, with_cached_regions
from .config import TrainingConfig
from .cusa import CUSATerms, TeacherCollator, open_teachers, tvrn_similarities
from .divergence import DivergenceGuard
from .interpolation import check_interpolated
from .interrupt import Interrupt
from .launch import leave_group, make_accelerator
from .loaders import make_loader, open_captions, pixel_format
from .objective import Objective
from .optim import WeightAverage, make_optimizer
from .pairs import data_hash, load_training_pairs, named_data
from .phases import LEVELS, learns
from .progress import Progress
from .sharding import WholeCopy, shard
from .snapshots import Snapshots
from .text_cache import with_cached_captions
from .validation import Validation
from .zero_shot import ZeroShot

logger = logging.getLogger(__name__)

__all__ = ["Run"]


class Run:
    """Data, processor, model, optimizer, what watches over them, and where the run is.

    Attributes:
        model: the TVRNModel in training; `best` tells which of its states the folder holds.
        about_data: what there is to say of the splits, as `TrainingPairs.about`.
        free: sizes of the weights that the model's own configuration lets learn, by name.
        trained_parameters: how many numbers learn in any phase.
        step: optimizer steps made.
        phase_number, phase_step, epoch, epoch_step: where the run is; `epoch` counts over all phases.
        fullest: as much of the pair score as any phase computes.
        progress: bar, logs and `history`.
    """

    def __init__(self, config: TrainingConfig, data: Any = None, model_class: type[TVRNModel] = TVRNModel) -> None:
        self.config = config = named_data(config, data)
        self.started = time.perf_counter()
        self.accelerator = make_accelerator(config)
        if self.accelerator.is_main_process:
            make_folder(Path(config.output_dir))
        pairs = load_training_pairs(config, data)
        self.train_records, self.validation_records, self.about_data = pairs.train, pairs.validation, pairs.about
        self.processor = build_processor(config, self.train_records)
        self.train_records = with_words(self.train_records, self.processor)
        self.validation_records = with_words(self.validation_records, self.processor)
        set_seed(config.seed)
        self.model = build_model(config, self.processor, self.train_records, model_class).to(self.accelerator.device)
        self.free = {name: weight.numel() for name, weight in self.model.named_parameters() if weight.requires_grad}
        if self.accelerator.num_processes > 1:
            set_seed(config.seed, device_specific=True)  # the weights are equal, what dropout leaves out is not
        self.zero_shot = ZeroShot.of(config, self.model, self.processor, self.accelerator.is_main_process)
        self._read_caches()
        self.captions = open_captions(config, self.train_records, self.accelerator)
        self.phases, self.image_names = self.captions.phases, self.captions.image_names
        self.total_steps = sum(phase.steps for phase in self.phases)
        self.fullest = max((phase.learning.computes for phase in self.phases), key=LEVELS.index)
        trained = set().union(*(self.learning_in(phase) for phase in self.phases))
        check_interpolated(config, trained)
        self.trained_parameters = sum(self.free[name] for name in trained)
        self.step, self.epoch, self.epoch_step = 0, 0, 0
        self.phase_number, self.phase_step = 0, 0
        self.waited = 0.0
        self._prepare()
        self.gradient_norm: Tensor | None = None
        self.validation = Validation(config, self.validation_records, self.input_processor)
        self.best = BestModel(config.output_dir, self.accelerator.is_main_process, model_class)
        self.guard = DivergenceGuard(self.image_names)
        self.progress = Progress(self.accelerator, self.total_steps, config.logging_steps)
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay is not None else None
        self.interrupt = Interrupt(self.accelerator.device)
        self.data_hash = data_hash(self.train_records)
        self.snapshots = Snapshots(Path(config.output_dir) / "checkpoints", config.keep_checkpoints)

    def learning_in(self, phase: Phase) -> set[str]:
        """The names of the weights that learn in a phase, of those that are free to."""
        return learns(self.free, self.model.config, phase.learning.components, phase.kept)

    def _read_caches(self) -> None:
        """Regions and the text tower's outputs from their caches, where the configuration names these."""
        config = self.config
        self.pictures = self.validation_records
        made_by = self.model, self.processor
        self.train_records = with_cached_regions(config, config.train_split, self.train_records, *made_by)
        self.validation_records = with_cached_regions(
            config, config.validation_split, self.validation_records, *made_by
        )
        check_boxes(config, self.model, self.train_records)
        records = () if config.text_features is None else (self.train_records, self.validation_records)
        captions = [caption for each in records for captions in each.captions for caption in captions]
        self.input_processor = with_cached_captions(config, captions, *made_by, self.accelerator)

    def _prepare(self) -> None:
        config = self.config
        self.cusa = CUSATerms(config, tvrn_similarities(self.model)) if config.cusa else None
        self.teachers: tuple[TeacherCache, ...] = ()
        self.collator: Any = PairCollator(self.input_processor)
        if config.flip_negatives:
            self.collator = FlippingCollator(self.collator, config.flip_negatives, len(self.train_records))
        if self.cusa is not None:
            self.cusa.to(self.accelerator.device)
            self.teachers = open_teachers(config, self.train_records)
            self.collator = TeacherCollator(self.collator, *self.teachers, check=config.streaming)
        objective = Objective(self.model, config.word_dropout, config.region_dropout, self.cusa)
        self.is_sharded = config.shard and self.accelerator.num_processes > 1
        if self.is_sharded:
            self.whole_copy = WholeCopy(self.model)
            shard(objective, self.accelerator.device)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.model, config, self.cusa))
        # The cached mode goes backwards several times a step and averages the gradients itself.
        wrapped = config.tower_batch_size is None and not self.is_sharded
        self.objective: Any = self.accelerator.prepare(objective) if wrapped else objective
        self.pixel_format = pixel_format(self.model)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.loaders = [
            make_loader(self.captions, phase.batches, self.collator, config, self.accelerator) for phase in self.phases
        ]

    def seconds(self) -> dict[str, float]:
        """Seconds of training without evaluations, the part of them spent waiting for data, and of evaluations."""
        return {**self.progress.seconds(), "waiting_for_data": self.waited}

    def leave_group(self) -> None:
        """End trackers and the group of processes; the run cannot go on afterwards."""
        self.objective = self.accelerator.unwrap_model(self.objective)
        leave_group(self.accelerator)
