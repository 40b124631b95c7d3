"""How a frozen network's output becomes one vector an item: which pooling a model wants, and the arithmetic."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

POOLINGS = ("features", "pooler", "cls", "mean", "max", "last")

# What the authors of a model compare its images or texts by. Anything else is pooled by its mean.
_IMAGE_POOLING = {
    "clip_vision_model": "pooler",
    "convnext": "pooler",  # a norm with weights of its own comes after the mean
    "convnextv2": "pooler",
    "deit": "cls",
    "dinov2": "cls",
    "dinov2_with_registers": "cls",
    "dinov3_convnext": "pooler",
    "dinov3_vit": "cls",
    "siglip2_vision_model": "pooler",
    "siglip_vision_model": "pooler",
    "vit": "cls",  # its pooler is missing from most checkpoints, and random then
    "vit_mae": "cls",
}
_TEXT_POOLING = {"clip_text_model": "pooler", "siglip2_text_model": "pooler", "siglip_text_model": "pooler"}
# As sentence-transformers names them in 1_Pooling/config.json; dividing by √length does not change a cosine.
_SENTENCE_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_SENTENCE_NAMES = {"cls": "cls", "mean": "mean", "max": "max", "mean_sqrt_len_tokens": "mean", "lasttoken": "last"}
# Modules of sentence-transformers that a vector's direction depends on no further than through the pooling.
_HARMLESS_MODULES = ("Transformer", "Pooling", "Normalize", "Dropout")

ReadFile = Callable[[str], str | None]  # a file of the model's repository, None where there is none


def choose_pooling(model: Any, modality: str, read_file: ReadFile) -> str:
    """The pooling that a model was trained for: from its sentence-transformers files, its methods or its type.

    Args:
        model: of transformers.
        modality: "image" or "text".
        read_file: reads a small file of the model's repository.

    Raises:
        ValueError: the repository describes a pooling that is none of ours.
    """
    if modality == "text" and (stated := sentence_pooling(read_file)) is not None:
        return stated
    if hasattr(model, f"get_{modality}_features"):
        return "features"
    known = _IMAGE_POOLING if modality == "image" else _TEXT_POOLING
    return known.get(getattr(model.config, "model_type", ""), "mean")


def sentence_pooling(read_file: ReadFile) -> str | None:
    """The pooling that sentence-transformers' files describe; None where there are no such files.

    Raises:
        ValueError: they describe another module than a pooling, or a pooling that is none of ours.
    """
    listed = read_file("modules.json")
    if listed is None:
        return None
    modules = json.loads(listed)
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if strange := [kind for kind in kinds if kind not in _HARMLESS_MODULES]:
        raise ValueError(
            f"modules.json lists {', '.join(strange)}, expected only {', '.join(_HARMLESS_MODULES)}: such a layer is "
            "not applied here; give pooling= to use the transformer's own states, or take another teacher"
        )
    folder = next((module["path"] for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), None)
    written = None if folder is None else read_file(f"{folder}/config.json")
    return None if written is None else _read_modes(json.loads(written))


def _read_modes(settings: dict[str, Any]) -> str:
    if isinstance(settings.get("pooling_mode"), str):
        modes = [settings["pooling_mode"]]
        found = [_SENTENCE_NAMES[mode] for mode in modes if mode in _SENTENCE_NAMES]
    else:
        modes = [name for name, on in settings.items() if name.startswith("pooling_mode") and on]
        found = [_SENTENCE_MODES[name] for name in modes if name in _SENTENCE_MODES]
    if len(modes) != 1 or not found:
        raise ValueError(
            f"the model's pooling file asks for {modes}, expected exactly one of {', '.join(_SENTENCE_MODES)}: give "
            f"pooling= one of {', '.join(POOLINGS)}"
        )
    return found[0]


def pool(output: Any, pooling: str, mask: Tensor | None = None, prefix: int = 0) -> Tensor:
    """One vector an item from a network's output.

    Args:
        output: with `last_hidden_state` (n, L, D) or, of a CNN, (n, D, h, w); for "pooler" with `pooler_output`.
        pooling: "pooler", "cls" (the first token), "mean" or "max" over the tokens or the map, "last" token.
        mask: (n, L) of texts, 1 = a token that counts.
        prefix: tokens before an image's patches, which "mean" and "max" leave out.

    Returns:
        (n, D).

    Raises:
        ValueError: the output has no such thing.
    """
    if pooling == "pooler":
        found = getattr(output, "pooler_output", None)
        if found is None:
            raise ValueError("pooling is 'pooler', but the model gives no pooler_output; use 'mean' or 'cls'")
        return found.flatten(1)
    states = output.last_hidden_state
    if states.ndim == 4:
        states = states.flatten(2).transpose(1, 2)
        if pooling in ("cls", "last"):
            raise ValueError(f"pooling is {pooling!r}, but the model gives a map without tokens; use 'mean' or 'max'")
    if pooling == "cls":
        return states[:, 0]
    if mask is None:
        states = states[:, prefix:] if pooling != "last" else states
        mask = states.new_ones(states.shape[:2])
    return _masked(states, mask.bool(), pooling)


def _masked(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        last = places.masked_fill(~mask, -1).argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), last]
    if pooling == "max":
        return states.masked_fill(~mask.unsqueeze(-1), torch.finfo(states.dtype).min).amax(dim=1)
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)


def prefix_tokens(tokens: int, pixel_values: Tensor, config: Any) -> int:
    """Tokens before an image's patches (class, registers), by the number of patches; 0 where that is not known."""
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int) or pixel_values.ndim != 4:
        return 0
    patches = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
    extra = tokens - patches
    return extra if 0 <= extra <= 2 + (getattr(config, "num_register_tokens", 0) or 0) else 0
