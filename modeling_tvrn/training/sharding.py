"""Weights, gradients and moments divided among the processes (FSDP), and whole again where a run needs them so.

Every process holds a part of each tensor. The layers of a tower are gathered one after another as a step comes to
them; TVRN's own weights, which every pair is scored with, are whole from the forward to the backward pass. The
arithmetic is that of one process: nothing is cast, and gradients are means over the processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["WholeCopy", "change_trained", "own_part", "part_like", "shard", "whole", "whole_tensors"]

OWN_GROUP = 2**18  # weights from which on a tower's layer is gathered by itself: smaller ones are not worth a message


def shard(objective: nn.Module, device: torch.device) -> None:
    """Divide an objective's weights among all processes, in place; an optimizer is made of them afterwards.

    Args:
        objective: an `Objective`, on its device.
        device: of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in _tower_layers(objective):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The rest as one: parts of it are used by the model's methods, not by calling them, so nothing would gather them.
    fully_shard(objective, mesh=mesh, reshard_after_forward=False)


def _tower_layers(objective: nn.Module) -> list[nn.Module]:
    """The repeated layers of both towers that are large enough, inner ones first."""
    model: Any = objective.model
    found = [
        layer
        for tower, _ in model.towers()
        for stack in tower.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
        if sum(weight.numel() for weight in layer.parameters()) >= OWN_GROUP
    ]
    return found[::-1]


class WholeCopy:
    """A model's twin without weights, to be filled with whole ones where a run evaluates and saves.

    Calling parts of the sharded model itself would make processes wait for each other at every call, and they evaluate
    different shares.

    Args:
        model: before it is sharded.
    """

    def __init__(self, model: Any) -> None:
        self._empty = copy.deepcopy(model).to("meta")

    def of(self, model: Any) -> Any:
        """The model as it is now, with whole weights, on its device; every process has to ask."""
        twin = copy.deepcopy(self._empty)
        for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            owner, _, last = name.rpartition(".")
            module, full = twin.get_submodule(owner), whole(value.detach())
            if isinstance(value, nn.Parameter):
                module.register_parameter(last, nn.Parameter(full, value.requires_grad))
            else:
                module.register_buffer(last, full, last not in module._non_persistent_buffers_set)
        return twin


def change_trained(objective: nn.Module, change: Callable[[], None]) -> None:
    """Do something that sets `requires_grad` of the objective's parameters, to the whole ones of a step as well.

    A step computes with whole weights that were made at the first one, and lets them have gradients as it was then.
    """
    change()
    for module in _sharded_modules(objective):
        module.unshard()
    change()
    for module in _sharded_modules(objective):
        module.reshard()


def _sharded_modules(objective: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in objective.modules() if isinstance(module, FSDPModule)]


def whole(value: Tensor) -> Tensor:
    """All processes' parts of a tensor put together; every process has to ask. One that is whole comes as it is."""
    return cast(Any, value).full_tensor() if _is_part(value) else value


def whole_tensors(named: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """`whole` of each tensor, one after another and onto the CPU; empty where this process does not `keep` them."""
    kept = {}
    for name, value in named.items():
        full = whole(value)
        if keep:
            kept[name] = full.cpu() if _is_part(value) else full
    return kept


def own_part(value: Tensor) -> Tensor:
    """This process's part of a tensor, the same memory; all of one that is whole."""
    return cast(Any, value).to_local() if _is_part(value) else value


def part_like(full: Tensor, value: Any) -> Tensor:
    """A whole tensor divided as `value` is; as it is where `value` is whole."""
    if not _is_part(value):
        return full
    from torch.distributed.tensor import distribute_tensor

    # None: every process has the whole tensor already, so nobody has to send it.
    return distribute_tensor(full.to(value.device), value.device_mesh, value.placements, src_data_rank=None)


def _is_part(value: Any) -> bool:
    return hasattr(value, "full_tensor")
