"""The mean of a fine-tuned model's weights and those that it started from, which forgets less.

Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), 2022.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..modeling_tvrn import TVRNModel
from ..towers_tvrn import load_tower
from .continuing import continued
from .optim import PRETRAINED

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["check_interpolated", "interpolate", "starting_weights"]


def check_interpolated(config: TrainingConfig, trained: Iterable[str]) -> None:
    """Refuse a mean with weights that stay as they are.

    Args:
        config: the run.
        trained: names of the weights that learn.

    Raises:
        ValueError: nothing that was pretrained learns.
    """
    if config.weight_interpolation is None or config.start_from is not None:
        return
    if not any(name.startswith(PRETRAINED) for name in trained):
        raise ValueError(
            f"weight_interpolation = {config.weight_interpolation}, but nothing that was pretrained learns in this "
            "run: there is no mean to take; let a tower or a first stage learn (model.freeze_…=false), or leave it out"
        )


@torch.no_grad()
def interpolate(model: Any, start: dict[str, Tensor], share: float) -> None:
    """Replace weights by (1 - share) * start + share * their own, in place; what did not start from any stays.

    Args:
        model: after its training.
        start: name -> the weight that it started from.
        share: of the trained weights, in (0, 1).
    """
    for name, weight in model.named_parameters():
        if name in start:
            weight.copy_(torch.lerp(start[name].to(weight), weight, share))


def starting_weights(config: TrainingConfig, model_class: type[TVRNModel]) -> dict[str, Tensor]:
    """The pretrained weights of a run's start, by their names in the model, read again from where they came."""
    if config.start_from is not None:
        return dict(continued(config.start_from, {}, config.trust_remote_code, model_class).state_dict())
    if config.dual_encoder is not None:
        plain = TVRNModel.from_dual_encoder(config.dual_encoder, use_late_interaction=False, use_reasoning=False)
        return {
            name: value for name, value in plain.state_dict().items() if name.startswith(("dual_encoder.", "logit_"))
        }
    found: dict[str, Tensor] = {}
    for side in ("vision", "text"):
        if (path := getattr(config, side)) is not None:
            tower = load_tower(path, f"{side}_config", config.trust_remote_code)
            found |= {f"{side}_model.{name}": value for name, value in tower.state_dict().items()}
    return found
