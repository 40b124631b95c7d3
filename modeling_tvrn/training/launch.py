"""The device, precision, processes and trackers of a run, by accelerate."""

from __future__ import annotations

import gc
import importlib.util
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["leave_group", "make_accelerator"]

PATIENCE = timedelta(hours=6)  # the other processes wait while the main one saves


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The device, precision and trackers of a run.

    Raises:
        ValueError: a tracker is not installed.
    """
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"trackers names {tracker!r}, which is not installed; pip install {tracker}")
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        kwargs_handlers=[
            # The head start trains a part of the weights; frozen towers' statistics are the same everywhere.
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if config.trackers:
        accelerator.init_trackers("tvrn", config={name: _flat(value) for name, value in config.as_dict().items()})
    return accelerator


def leave_group(accelerator: Accelerator) -> None:
    """End trackers and the group of processes; no wrapper of the model may be referred to any more.

    A wrapper (DistributedDataParallel's reducer) that outlives the group ends it when it is freed, and that hangs
    now and then: it waits for gloo's threads with Python's lock held, which they need to drop their tensors.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def _flat(value: Any) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else str(value)
