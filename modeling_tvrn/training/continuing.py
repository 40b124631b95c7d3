"""Going on from a finished TVRN: what a run may change of it, and what it may not."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..front_door import check_exists, is_dual_encoder, kind_of, read_config
from ..modeling_tvrn import TVRNModel

__all__ = ["check_finished", "continued"]

# Fields that change neither the weights nor what they were trained to mean.
FREE_ENDINGS = ("_dropout", "_loss_weight")
FREE_FIELDS = frozenset(
    [
        *("freeze_vision", "freeze_text", "freeze_first_stage", "freeze_word_embeddings", "freeze_detector"),
        "dropout",
        *("label_smoothing", "margin", "matching_temperature", "distillation_temperature"),
        *("pair_chunk_size", "checkpoint_pair_chunks"),
    ]
)
HEADS = "use_unimodal_heads"  # stand beside the model: CUSA may add them


def check_finished(path: str) -> None:
    """Refuse what is no finished TVRN.

    Raises:
        ValueError: nothing is there (with near matches among local folders), or it is a model of another kind.
    """
    expected = "expected a finished TVRN"
    check_exists(path, expected=expected)
    config = read_config(path, {"trust_remote_code": False}, expected)
    if config.model_type != "tvrn":
        hint = f"; for a dual encoder write dual_encoder={path}" if is_dual_encoder(config) else ""
        raise ValueError(f"start_from = {path!r} holds a {kind_of(config)}; {expected}{hint}")


def continued(
    path: str, fields: dict[str, Any], trust_remote_code: bool = False, model_class: type[TVRNModel] = TVRNModel
) -> TVRNModel:
    """A finished TVRN in float32, to be trained on.

    Args:
        path: Hub id or folder.
        fields: of its configuration, as the run gives them.
        trust_remote_code: as of `from_pretrained`.
        model_class: what to read it as.

    Raises:
        ValueError: a field is none that a run may change; says what the model has.
    """
    model: TVRNModel = model_class.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    changed = {name: value for name, value in fields.items() if not _same(value, getattr(model.config, name))}
    for name, value in changed.items():
        if name in FREE_FIELDS or name.endswith(FREE_ENDINGS) or (name == HEADS and value):
            continue
        own = getattr(model.config, name)
        shown = f"a {own.model_type}" if hasattr(own, "model_type") else repr(own)
        raise ValueError(
            f"model.{name} = {value!r}, but start_from = {path!r} was trained with {shown}: its parts, sizes and "
            f"words are settled. Leave model.{name} out; a run may change what is frozen, dropouts, losses, rates and "
            "phases"
        )
    return _with_fields(model, changed) if changed else model


def _same(given: Any, own: Any) -> bool:
    """Whether a field is given as the model has it; a tower's configuration by what is given of it."""
    if isinstance(given, dict) and hasattr(own, "to_dict"):
        mine = own.to_dict()
        return all(mine.get(name) == value for name, value in given.items())
    return bool(given == own)


def _with_fields(model: TVRNModel, changed: dict[str, Any]) -> TVRNModel:
    """The same weights under a configuration with these fields; uni-modal heads that it lacked are drawn anew."""
    config = copy.deepcopy(model.config)
    for name, value in changed.items():
        setattr(config, name, value)
    config.check()
    new = type(model)(config)
    missing, unexpected = new.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("unimodal_") for name in missing), (missing, unexpected)
    return new.eval()
