"""Dual encoders of somebody else (CLIP, SigLIP, …): they are searched with, and not published again as one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .files import read_json

__all__ = ["check_own_folder", "check_trained"]

INSTEAD = "train heads over it (tvrn train dual_encoder=…), and share what comes of that"


def check_own_folder(folder: str | os.PathLike[str], verb: str) -> None:
    """Refuse a folder that holds a model of another class, such as a plain CLIP.

    Args:
        folder: a folder; one without config.json is left to whoever reads on.
        verb: what is refused, in its past form.

    Raises:
        ValueError: with the class that it holds.
    """
    config = read_json(Path(folder) / "config.json")
    kind = config.get("model_type")
    if kind in (None, "tvrn"):
        return
    name = (config.get("architectures") or [kind])[0]
    raise ValueError(
        f"{os.fspath(folder)!r} is not {verb}: it holds a {name}, expected a TVRN. A dual encoder of somebody else "
        f"has a repository and a card of its own; {INSTEAD}. One that you fine-tuned is shared by its own push_to_hub"
    )


def check_trained(model: Any, trained: bool) -> None:
    """Refuse a TVRN that scores as an unmodified dual encoder of somebody else does.

    Args:
        model: a `TVRNModel`.
        trained: whether results of a training run come with it.

    Raises:
        ValueError: if it is frozen over a dual encoder, and no other component has a weight in its logit.
    """
    config = model.config
    if trained or config.dual_encoder_config is None:
        return
    frozen = config.keeps("vision") and config.keeps("text")
    with torch.no_grad():
        heads = [name for name in config.components if name != "first_stage" and float(model.pair.weight(name)) > 0]
    if frozen and not heads:
        own = config.dual_encoder_config
        raise ValueError(
            f"not pushed: this model's score is that of the dual encoder {own.name_or_path or own.model_type!r}, "
            f"unmodified, and that is somebody else's; {INSTEAD}"
        )
