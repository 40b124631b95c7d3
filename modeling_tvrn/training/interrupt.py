"""A scheduler's wish that the run ends: noticed between two steps, by all processes at the same one."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .distributed import processes

logger = logging.getLogger(__name__)

__all__ = ["Interrupt"]

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupt:
    """Takes note of SIGTERM and SIGUSR1, which schedulers send some time before they kill.

    Args:
        device: where the processes' agreement is reached.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.received: str | None = None
        self._asked: tuple[torch.Tensor, Any] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the signals are noted instead of ending the process (in the main thread alone)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether to stop after this step: any process was told to.

        Among several processes the answer comes one step late, so that no step waits for it.
        """
        if processes() == 1:
            return self.received is not None
        answer = False
        if self._asked is not None:
            flag, work = self._asked
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([self.received is not None], dtype=torch.int32, device=self.device)
        self._asked = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        return answer
