"""AdamW with separate rates for towers and new parts, the rate's course, and a running mean of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .sharding import own_part, part_like

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["PRETRAINED", "WeightAverage", "make_optimizer", "parameter_groups", "rate_factor"]

PRETRAINED = ("vision_model.", "text_model.", "dual_encoder.", "detector.")


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """The trainable parameters by rate and weight decay; each group carries its `name`, `lr` and `weight_decay`.

    Biases, norms and temperatures are the parameters with fewer than two dimensions: they are not decayed.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith(PRETRAINED), parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "name": ("tower" if tower else "new") + ("" if decayed else "_no_decay"),
            "params": parameters,
            "lr": config.tower_learning_rate if tower else config.learning_rate,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (tower, decayed), parameters in groups.items()
    ]


def make_optimizer(
    model: nn.Module, config: TrainingConfig, temperatures: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; one fused kernel where the device has it.

    Args:
        temperatures: a module beside the model whose parameters are learned at its rate, without decay.
    """
    device = next(model.parameters()).device.type
    groups = parameter_groups(model, config)
    if temperatures is not None:
        learned = [parameter for parameter in temperatures.parameters() if parameter.requires_grad]
        groups.append({"name": "temperatures", "params": learned, "lr": config.learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        betas=(0.9, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device in ("cpu", "cuda"),
    )


def rate_factor(
    step: int, total_steps: int, steps_per_epoch: int, config: TrainingConfig, warmup_ratio: float | None = None
) -> float:
    """What every learning rate is multiplied by at an optimizer step (counted from 0).

    Linear from near 0 to 1 over the warm-up, then the cosine's half wave down to 0 at `total_steps`, steps down at the
    ends of `decay_epochs`, or constant. Steps are those of one phase, which may have a warm-up of its own.
    """
    warmup_steps = math.ceil((config.warmup_ratio if warmup_ratio is None else warmup_ratio) * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.scheduler == "cosine":
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    if config.scheduler == "step":
        return config.decay_factor ** sum(step >= epoch * steps_per_epoch for epoch in config.decay_epochs)
    return 1.0


class WeightAverage:
    """An exponential running mean of a model's trainable parameters, evaluated and saved in their place.

    The decay starts low and rises to its full value, so that the mean leaves the initial weights behind quickly.

    Args:
        model: whose trainable parameters are followed.
        decay: share of the old mean that a step keeps, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._weights = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
        self._means = [weight.clone() for weight in self._weights]

    def means(self) -> dict[str, torch.Tensor]:
        """The means, numbered as the trainable parameters are."""
        return {str(number): mean for number, mean in enumerate(self._means)}

    @torch.no_grad()
    def restore(self, means: dict[str, torch.Tensor], steps: int) -> None:
        """Go on from what `means` gave after so many steps."""
        self.steps = steps
        for number, mean in enumerate(self._means):
            mean.copy_(part_like(means[str(number)], mean))

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        own = [own_part(mean) for mean in self._means], [own_part(weight) for weight in self._weights]
        torch._foreach_lerp_(*own, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the means; afterwards its own weights again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, mean in zip(self._weights, self._means, strict=True):
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)
