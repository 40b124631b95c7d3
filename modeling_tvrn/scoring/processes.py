"""Work shared by the processes of torch.distributed, where it is initialised; one process alone otherwise."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


class Processes:
    """This process among those that share a piece of work. Each of them must come by every method that says "all".

    Args:
        share: False keeps the work of this call to this process, as where one of many processes evaluates alone.
    """

    def __init__(self, share: bool = True):
        self.shared = share and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if self.shared else (0, 1)

    def mine(self, items: Iterable[Item]) -> Iterator[Item]:
        """This process's share of some items; together the processes have each item once."""
        return itertools.islice(items, self.rank, None, self.count)

    def sum(self, values: Tensor) -> Tensor:
        """All: the sum over the processes, on the device of `values`."""
        return self._reduce(values, dist.ReduceOp.SUM) if self.shared else values

    def max(self, values: Tensor) -> Tensor:
        """All: the largest over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX) if self.shared else values

    def check_same(self, what: str, text: str) -> None:
        """All: refuse processes that were not given the same.

        Raises:
            ValueError: In every process, if `text` differs in any.
        """
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        ends = self.max(torch.tensor([number, -number], dtype=torch.int64))
        if int(ends[0]) != -int(ends[1]):
            raise ValueError(
                f"The {self.count} processes were given different {what} (this one, {self.rank}: {text}); expected"
                " the same in all of them: they share one matrix."
            )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All: if the work inside fails in one process, it fails in every one, instead of leaving them to wait.

        Raises:
            RuntimeError: In the processes whose own work was fine.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            # With an exception on its way this still has to be told to the others.
            anywhere = bool(self.max(torch.tensor([float(failed)]))[0])
        if anywhere:
            raise RuntimeError(f"Another process failed while process {self.rank} was scoring; see its own message.")

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        moved = values.to(device, copy=True).contiguous()
        dist.all_reduce(moved, operation)
        return moved.to(values.device)
