"""From records to a loader of batches, map-style or streamed, each process its share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader

from ..data import CaptionDataset, StreamItems, keep_image_memory
from .batches import Batches, CaptionBatches, DistributedBatchSampler, PaddedItems, PaddingCollator, Phase, phases
from .divergence import TrainingStopped
from .streams import ImageNames, StreamBatches, StreamCollator, stream_phases

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import TrainingConfig

__all__ = ["Captions", "make_loader", "named_shards", "open_captions", "pixel_format", "to_device"]


@dataclass
class Captions:
    """What batches are made of.

    Attributes:
        items: a caption data set, or what decodes a stream's items.
        phases: of the run, each with its batches.
        image_names: the id of an image by the number that batches carry.
        names: of a stream, those of the last batches.
    """

    items: Any
    phases: list[Phase]
    image_names: Any
    names: ImageNames = field(default_factory=ImageNames)


def open_captions(config: TrainingConfig, records: Any, accelerator: Accelerator) -> Captions:
    """Items and phases of a run over these records."""
    if config.streaming:
        names = ImageNames()
        return Captions(StreamItems(records), stream_phases(config, records, accelerator), names, names)
    captions = CaptionDataset(records)
    return Captions(captions, phases(config, captions.image_rows.tolist()), records.image_ids)


def make_loader(
    captions: Captions,
    batches: Batches,
    collator: Any,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """A loader of this process's share of each batch."""
    workers = config.num_workers
    if not workers:
        keep_image_memory()  # this process decodes
    if isinstance(batches, StreamBatches):
        parts: tuple[Any, Any, Any] = captions.items, batches, StreamCollator(collator)
    else:
        assert isinstance(batches, CaptionBatches), batches  # there are no others
        own = DistributedBatchSampler(batches, accelerator.process_index, accelerator.num_processes)
        parts = PaddedItems(captions.items), own, PaddingCollator(collator)
    return DataLoader(
        parts[0],
        batch_sampler=parts[1],
        collate_fn=parts[2],
        num_workers=workers,
        worker_init_fn=keep_image_memory,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        # The loader draws a seed for its workers at each pass; from the global generator, that would make what is
        # drawn afterwards depend on how often the run was resumed.
        generator=torch.Generator().manual_seed(config.seed),
    )


def pixel_format(model: Any) -> torch.memory_format:
    """How pixels lie in memory for the model's vision tower: a convolutional one is faster with the channels last."""
    tower = model.tower("vision")
    layers = tower.modules() if tower is not None else ()
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in layers)
    return torch.channels_last if convolutions > 1 else torch.contiguous_format  # a transformer has one, of patches


def to_device(batch: dict[str, Any], device: torch.device, pixels: torch.memory_format) -> dict[str, Any]:
    """A batch on the device, its pixels in that memory format."""
    batch = send_to_device(batch, device, non_blocking=True)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=pixels)
    return batch


@contextlib.contextmanager
def named_shards(batches: Any, step: int) -> Iterator[None]:
    """Say the step and the shards where a process that loads data dies."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        shards = batches.shards_in_work() if isinstance(batches, StreamBatches) else []
        raise TrainingStopped(
            f"{error} While loading the batches after step {step}{', of ' if shards else ''}{'; '.join(shards)}. "
            "Often its memory ran out: lower num_workers, or read with num_workers=0 to see the error itself"
        ) from error
