"""The device, precision, processes and trackers of a run, by accelerate."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

from ..redaction import redacted, redacted_text

if TYPE_CHECKING:
    from .config import TrainingConfig

logger = logging.getLogger(__name__)

__all__ = ["check_trackers", "leave_group", "make_accelerator"]

PATIENCE = timedelta(hours=6)  # the other processes wait while the main one saves


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The device, precision and trackers of a run.

    Raises:
        ValueError: a tracker is not installed, the launcher's configuration asks for another way of dividing the model
            than this package's, or the device lacks the precision.
    """
    check_trackers(config.trackers)
    _refuse_other_sharding()
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        kwargs_handlers=[
            # A phase may train a part of the weights; frozen towers' statistics are the same everywhere.
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    _check_precision(accelerator)
    if config.trackers:
        _start_trackers(accelerator, config)
    return accelerator


def _start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere where there is no folder
    plain = (int, float, str)  # what a tracker takes
    settings = redacted(config.as_dict())
    keys = {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
    place = {"wandb": {"dir": config.output_dir, "name": Path(config.output_dir).name}}
    try:
        accelerator.init_trackers("tvrn", config=keys, init_kwargs=place)
    except Exception as error:  # each has errors of its own: no account, no network, a folder that is not writable
        problem = f"{type(error).__name__}: {redacted_text(str(error))}"
        raise ValueError(
            f"trackers = {config.trackers} could not be started ({problem}); log in with `wandb "
            "login`, or set WANDB_MODE=offline, if it is that; or drop trackers"
        ) from error
    if missing := set(config.trackers) - {tracker.name for tracker in accelerator.trackers}:
        # accelerate, which looked while it was imported, passes over it with a log line
        raise ValueError(f"accelerate does not find {', '.join(sorted(missing))}, named in trackers; install it again")


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: names one, and how to install it.
    """
    for tracker in trackers:
        found = importlib.util.find_spec(tracker)
        if found is None or found.origin is None:  # a folder of its name, as wandb leaves behind, is no package
            raise ValueError(f"trackers names {tracker!r}, which is not installed; pip install {tracker}")


def _refuse_other_sharding() -> None:
    """Refuse `accelerate launch` with FSDP, DeepSpeed or Megatron: on CPUs accelerate would pass over them in silence.

    Raises:
        ValueError: says which, and what divides the weights instead.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate's configuration asks for {name}, but every pair of a global batch is scored by methods "
                "of the model that its wrappers do not see; use `distributed_type: MULTI_GPU`, as in "
                "examples/configs/accelerate/, and shard=true, which divides weights and moments by FSDP2"
            )


def _check_precision(accelerator: Accelerator) -> None:
    """Refuse a precision that accelerate would pass over in silence.

    Raises:
        ValueError: fp16 on a CPU, which would be float32.
    """
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        raise ValueError(
            f"mixed_precision = {accelerator.mixed_precision!r} is not to be had on {accelerator.device.type}: use "
            "mixed_precision=bf16, or no"
        )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" and not _has_fast_bfloat16():
        logger.warning(
            "mixed_precision = 'bf16' on a CPU without instructions for bfloat16 (AVX-512 or AMX), where its products "
            "take up to 60 times as long as float32's: use mixed_precision=no"
        )


def _has_fast_bfloat16() -> bool:
    """Whether this CPU does; also where torch does not say."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is None or bool(asked())


def leave_group(accelerator: Accelerator) -> None:
    """End trackers and the group of processes; no wrapper of the model may be referred to any more.

    A wrapper (DistributedDataParallel's reducer) that outlives the group ends it when it is freed, and that hangs
    now and then: it waits for gloo's threads with Python's lock held, which they need to drop their tensors.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
