"""Training from a stream: batches of captions as they come, and where each process is in its order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..data import RawItem, ShuffledStream
from .batches import PaddingCollator, Phase, make_phases
from .distributed import gather_bytes
from .phases import PhaseConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import TrainingConfig

__all__ = ["ImageNames", "StreamBatches", "StreamCollator", "gather_positions", "stream_phases"]

KEPT_NAMES = 100_000


class StreamBatches(Sampler[list[RawItem]]):
    """One process's share of each batch of a phase of a stream; all its passes over the data count as one epoch.

    The raw items are read here, in the main process, and decoded in the loader's workers, so that the order does not
    depend on the number of workers.

    Args:
        stream: this process's shards, shuffled.
        batch_size: captions of a batch for this process.
        batches: batches of the phase.
    """

    def __init__(self, stream: ShuffledStream, batch_size: int, batches: int) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.batches = batches
        self.start = 0
        self._positions: dict[int, Sequence[int]] = {0: (0, 0, 0)}
        self._shards: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose how many batches to pass over; the position there must be known (`restore`)."""
        self.start = start

    def __iter__(self) -> Iterator[list[RawItem]]:
        items = self.stream.items(self._positions[self.start])
        for number in range(self.start, self.batches):
            batch = [next(items) for _ in range(self.batch_size)]
            self._positions[number + 1] = batch[-1][1]
            self._shards[number] = sorted({item.shard for item, _ in batch})
            yield [item for item, _ in batch]

    def forget_before(self, number: int) -> None:
        """So many batches were trained on: where the stream was before them is of no use any more."""
        for former in itertools.takewhile(lambda known: known < number, list(self._positions)):
            del self._positions[former]
            self._shards.pop(former, None)

    def position(self, number: int) -> Sequence[int]:
        """Where the stream is after so many batches."""
        return self._positions[number]

    def restore(self, number: int, position: Sequence[int]) -> None:
        """Say where the stream was after so many batches of an earlier process."""
        self._positions = {number: position}

    def follow(self, former: StreamBatches) -> None:
        """Begin where another phase's batches ended."""
        self.restore(0, former.position(former.batches))

    def shards_in_work(self) -> list[str]:
        """The shards of the batches that were read and perhaps not yet trained on."""
        return sorted({name for names in self._shards.values() for name in names})


class StreamCollator(PaddingCollator):
    """Also hands on the images' ids as they are, for messages."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate one process's share of a batch."""
        names = list(dict.fromkeys(str(item["record"]["image_id"]) for item in items))
        return {**super().__call__(items), "image_names": names}


class ImageNames(Mapping[int, str]):
    """The ids of a stream's images by the numbers that batches carry, of the last batches of this process."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def add(self, numbers: Tensor, names: Sequence[str]) -> None:
        """Learn a batch's."""
        if len(self._names) > KEPT_NAMES:
            self._names.clear()
        self._names |= dict(zip(numbers.tolist(), names, strict=True))

    def __getitem__(self, number: int) -> str:
        return self._names.get(number, f"number {number}, of another process")

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stream_phases(config: TrainingConfig, records: Any, accelerator: Accelerator) -> list[Phase]:
    """The phases of a run over a stream, each of which goes on where the one before it ended.

    Raises:
        ValueError: there are more processes than captions in a batch.
    """
    process, processes = accelerator.process_index, accelerator.num_processes
    stream = ShuffledStream(
        records, config.seed, process, processes, config.stream_shards_at_once, config.stream_rows_at_once
    )

    def batches_of(phase: PhaseConfig) -> StreamBatches:
        if phase.batch_size < processes:
            raise ValueError(
                f"batch_size = {phase.batch_size} of the phase that trains {', '.join(phase.train)} leaves some of "
                f"{processes} processes nothing; raise it"
            )
        first, end = (phase.batch_size * number // processes for number in (process, process + 1))
        return StreamBatches(stream, end - first, (phase.steps or 1) * config.gradient_accumulation_steps)

    return make_phases(config, batches_of)


def gather_positions(batches: StreamBatches, number: int, device: torch.device) -> list[list[int]]:
    """Where the streams of all processes are after so many batches."""
    text = json.dumps(list(batches.position(number))).encode()
    found = gather_bytes(torch.frombuffer(bytearray(text), dtype=torch.uint8), device)
    return [json.loads(bytes(each.tolist()).decode()) for each in found]
