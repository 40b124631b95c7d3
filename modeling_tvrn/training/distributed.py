"""Tensors of several processes put together, with gradients: what lets every pair of the global batch be scored.

One rule keeps the gradients right. Every process computes the loss of the whole global batch; a tensor that was
gathered hands the *sum* of all processes' gradients back to the process it came from; and gradients of parameters
are *averaged* over the processes, as DistributedDataParallel does. Say the global loss is L and there are n
processes. A part of the graph that every process repeats (the loss on the gathered scores) then yields dL on each, and
a mean of dL. A part that is done once (a process's own features, its own rows of scores) is reached through a gathered
tensor, and so yields n·dL there and nothing elsewhere: again dL in the mean. Nothing has to be divided by hand.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..encoded_tvrn import EncodedItems

__all__ = [
    "average_gradients",
    "broadcast_json",
    "everywhere",
    "gather_bytes",
    "gather_counts",
    "gather_items",
    "gather_rows",
    "processes",
]

Items = TypeVar("Items", bound=EncodedItems)
BUCKET = 2**23  # elements that are averaged at once: many small reductions are slow, one huge one needs the memory


def processes() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_counts(*own: int, device: torch.device) -> list[list[int]]:
    """For each of these numbers those of all processes, for `gather_rows`; one exchange for all of them."""
    if processes() == 1:
        return [[number] for number in own]
    return _all_gather(torch.tensor([own], dtype=torch.int64, device=device)).T.tolist()


def gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """The rows of all processes, in the order of their ranks: (n_own, ...) -> (n_all, ...), with gradients.

    The number of rows may differ, also be 0; the other sizes may not (`gather_items` pads them).

    Args:
        rows: this process's.
        counts: how many each process has, as `gather_counts` tells; None asks them.
    """
    if processes() == 1:
        return rows
    return _Gather.apply(rows, counts or gather_counts(len(rows), device=rows.device)[0])


def gather_items(items: Items, counts: list[int]) -> Items:
    """Encoded images or texts of all processes, regions and words padded to the longest, with gradients.

    Args:
        items: this process's.
        counts: how many each process has.
    """
    if processes() == 1:
        return items
    tensors = items.tensors()
    widths = torch.tensor([size for value in tensors.values() for size in value.shape[1:]], dtype=torch.int64)
    device = next(iter(tensors.values())).device
    most = _all_gather(widths.to(device)[None]).amax(dim=0).tolist()
    gathered = {}
    for name, value in tensors.items():
        shape = [most.pop(0) for _ in range(value.ndim - 1)]
        pads = [
            pad
            for size, own in zip(reversed(shape), reversed(value.shape[1:]), strict=True)
            for pad in (0, size - own)
        ]
        gathered[name] = _Gather.apply(F.pad(value, pads) if any(pads) else value, counts)
    return type(items)(**gathered)


class _Gather(torch.autograd.Function):
    """All processes' rows forwards; backwards each process's rows get the sum of what all processes hand back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        most = max(sizes)
        whole = _all_gather(_lengthened(rows.detach(), most))
        if min(sizes) == most:
            return whole
        return torch.cat([part[:size] for part, size in zip(whole.split(most), sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        most, own = max(ctx.sizes), ctx.sizes[dist.get_rank()]
        parts = gradient.split(ctx.sizes)
        return _reduce_scatter(torch.cat([_lengthened(part, most) for part in parts]))[:own], None


def _lengthened(rows: Tensor, length: int) -> Tensor:
    return rows if len(rows) == length else torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def _all_gather(rows: Tensor) -> Tensor:
    """(n, ...) of every process, n the same -> (processes·n, ...)."""
    whole = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    # torch 2.13 renames the function, and warns of the old name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, rows.contiguous())
    return whole


def _reduce_scatter(rows: Tensor) -> Tensor:
    """(processes·n, ...) -> (n, ...): this process's share of the sum over all."""
    own = rows.new_empty(len(rows) // dist.get_world_size(), *rows.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own, rows.contiguous())
    return own


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, where no wrapper does so.

    A parameter without a gradient here may have one elsewhere; it counts as 0, unless no process has one.
    """
    if processes() == 1 or not parameters:
        return
    device = parameters[0].device
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    chosen = [parameter for parameter, flag in zip(parameters, used.tolist(), strict=True) if flag]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in chosen if parameter.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Gradients of one dtype that are averaged together."""
    buckets: list[list[Tensor]] = []
    filled = BUCKET
    for gradient in sorted(gradients, key=lambda value: str(value.dtype)):
        if filled >= BUCKET or gradient.dtype != buckets[-1][0].dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(gradient)
        filled += gradient.numel()
    return buckets


def gather_bytes(own: Tensor, device: torch.device) -> list[Tensor]:
    """uint8 (n,) of every process, n of its own, in the order of their ranks; on the CPU."""
    if processes() == 1:
        return [own]
    [sizes] = gather_counts(len(own), device=device)
    return list(_Gather.apply(own.to(device), sizes).cpu().split(sizes))


def everywhere(flag: Tensor) -> bool:
    """Whether a flag () is true in all processes."""
    if processes() == 1:
        return bool(flag)
    least = flag.to(torch.int32)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return bool(least)


def broadcast_json(value: Any, device: torch.device) -> Any:
    """The main process's value, on every process."""
    if processes() == 1:
        return value
    text = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    own = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
    return json.loads(bytes(gather_bytes(own, device)[0].tolist()).decode())
