"""A scheduler's wish that the run ends: noticed between two steps, by all processes at the same one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Interrupt", "watching_signals"]

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


_noted: list[str] = []  # signals are sent to a process: whoever watches in it has one list


@contextlib.contextmanager
def watching_signals(set_up: bool = False) -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1, which schedulers send some time before they kill, do not end the process.

    They are noted for `Interrupt`, in the main thread alone.

    Args:
        set_up: nothing is trained yet, so that a process without others, which would wait for it, leaves at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    alone = set_up and os.environ.get("WORLD_SIZE", "1") == "1"
    former = {number: signal.signal(number, _leave if alone else _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(signal.Signals(number).name)


def _leave(number: int, frame: FrameType | None) -> None:
    _note(number, frame)
    logger.info("%s: left before the first step", _noted[0])
    raise SystemExit(0)


class Interrupt:
    """What came of the signals that were noted since the process began to set up its run.

    Args:
        device: where the processes' agreement is reached.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._asked: tuple[torch.Tensor, Any] | None = None

    @property
    def received(self) -> str | None:
        """The first signal's name; None where this process got none."""
        return _noted[0] if _noted else None

    def forget(self) -> None:
        """What was noted is another run's no more."""
        _noted.clear()

    def agreed_before_the_first_step(self) -> bool:
        """Whether not to begin: any process was told to stop while the run was set up."""
        self.agreed()
        return self.agreed()  # the answer to the question before

    def agreed(self) -> bool:
        """Whether to stop after this step: any process was told to.

        Among several processes the answer comes one step late, so that no step waits for it.
        """
        import torch
        import torch.distributed as dist

        from .distributed import processes

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
