"""Low-rank adapters in the towers (Hu et al., "LoRA", 2021) through peft, an optional dependency.

A tower's own weights stay as they are and small matrices beside them learn. What is saved is an ordinary model: the
adapters are added to the weights they stand beside, so that it loads without peft.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["add_adapters", "merged_state"]

BASE, LOW_RANK = ".base_layer.", ".lora_"


def add_adapters(model: Any, config: TrainingConfig) -> int:
    """Put adapters into the towers for which a rank is configured; how many layers got one.

    Raises:
        ValueError: peft is not installed, or there is no such tower, or no linear layer in it.
    """
    count = 0
    for side, rank in (("vision", config.vision_lora_rank), ("text", config.text_lora_rank)):
        if rank is None:
            continue
        key, tower = f"{side}_lora_rank", model.tower(side)
        if tower is None:
            raise ValueError(f"{key} = {rank}, but this model has no {side}_model; name a tower, or set {key}=null")
        if importlib.util.find_spec("peft") is None:
            raise ValueError(f"{key} = {rank} needs peft, which is not installed; pip install peft")
        from peft import LoraConfig, inject_adapter_in_model

        linear = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"{key} = {rank}, but the {side}_model has no linear layer to adapt; set {key}=null")
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
        inject_adapter_in_model(adapter, tower)  # which also freezes the tower's own weights
        count += len(_adapted(tower))
    return count


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The weights of the ordinary model that this one with adapters amounts to; None for one without adapters.

    The model itself stays as it is, to the bit: nothing is added to its weights and subtracted again.
    """
    layers = _adapted(model)
    if not layers:
        return None
    state = {name.replace(BASE, "."): value for name, value in model.state_dict().items() if LOW_RANK not in name}
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            delta = layer.get_delta_weight(adapter)
            state[f"{name}.weight"] = state[f"{name}.weight"] + delta.to(state[f"{name}.weight"].dtype)
    return state
