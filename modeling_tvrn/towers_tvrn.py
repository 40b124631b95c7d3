"""Vision and text towers: any Hub model that gives a spatial map, a patch sequence or a word sequence. Shipped."""

import inspect
import os
import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
)

from .trust_tvrn import MODEL_CODE, explained, without_code

# What a map or a word sequence does not depend on: poolers, and the token of masked-image training.
_UNUSED = re.compile(r"(^|\.)(pooler|mask_token|head\.(probe|attention|layernorm|mlp))(\.|$)")
_UNUSED_OF_TYPE = {"clip_vision_model": "post_layernorm.", "siglip_text_model": "head.", "siglip2_text_model": "head."}
_READS = {"vision_config": "pixel_values", "text_config": "input_ids"}


def build_tower(config: PreTrainedConfig) -> nn.Module:
    """A randomly initialised tower; without the pooling head that a matching model would leave untrained.

    Raises:
        ValueError: If transformers has no encoder for such a config.
    """
    model_class = _tower_class(config)
    if hasattr(model_class, "from_config"):
        return model_class.from_config(config, trust_remote_code=False, **_without_pooler(config))
    return model_class._from_config(config, **_without_pooler(config))


def load_tower(path: str | os.PathLike, half: str, trust_remote_code: bool = False) -> nn.Module:
    """A pretrained tower in float32; of a two-tower checkpoint (CLIP, SigLIP, …) the half named `half`.

    Raises:
        ValueError: If nothing that transformers can load as a tower is found there.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        config = config if trust_remote_code else without_code(config)
        config = getattr(config, half, None) or config
        tower = _tower_class(config).from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            **_without_pooler(config),
        )
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"No {half.removesuffix('_config')} tower at {str(path)!r}: "
            f"{explained(error, path, MODEL_CODE, trust_remote_code=trust_remote_code)} Expected a Hub model id or a "
            "folder with config.json and weights."
        ) from error
    if tower.main_input_name != _READS[half]:
        raise ValueError(
            f"{str(path)!r} holds a {type(tower).__name__}, which reads {tower.main_input_name}; expected a "
            f"{half.removesuffix('_config')} model, which reads {_READS[half]}."
        )
    # Saved with the checkpoint: a Hub id says where a tower is from, a path only whose disk it was on.
    if os.path.isdir(path):
        tower.config.name_or_path = os.path.basename(os.path.abspath(path))
    return tower


def load_word_embeddings(path: str | os.PathLike, trust_remote_code: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """A text model's input embeddings (V, E), of variance 1 and 0 for padding, and the config's fields that follow.

    Raises:
        ValueError: As `load_tower`.
    """
    tower: Any = load_tower(path, "text_config", trust_remote_code)
    table = tower.get_input_embeddings().weight.detach()
    pad = getattr(tower.config, "pad_token_id", None)
    table = table / table.std()
    if pad is not None:
        table[pad] = 0.0
    return table, {"vocab_size": table.shape[0], "word_embedding_size": table.shape[1], "pad_token_id": pad}


def _tower_class(config: PreTrainedConfig) -> Any:
    """The class that encodes images or texts: of an encoder–decoder its encoder, of a two-tower model the half.

    Raises:
        ValueError: If transformers has none.
    """
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type!r} is an encoder–decoder whose encoder transformers does not load alone; use an "
            "encoder (BERT, MiniLM, T5, …)."
        )
    if type(config) in MODEL_MAPPING or getattr(config, "auto_map", None):
        return AutoModel
    # SigLIP's text half, among others, is in no Auto mapping.
    model_class = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    if model_class is None:
        raise ValueError(f"transformers has no base model for a {type(config).__name__} ({config.model_type!r}).")
    return model_class


def _without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    model_class = MODEL_MAPPING.get(type(config), None)
    accepts = model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if accepts else {}


def freeze_unused(tower: nn.Module) -> None:
    """Take the parameters that regions and words do not depend on out of training: without a gradient they would stop
    a distributed run."""
    unused = _UNUSED_OF_TYPE.get(getattr(tower.config, "model_type", ""), "\0")
    for name, parameter in tower.named_parameters():
        if _UNUSED.search(name) or name.startswith(unused):
            parameter.requires_grad_(False)


def region_map(output: Any, pixel_values: Tensor, config: PreTrainedConfig) -> Tensor:
    """A vision tower's output as a map (B, C, h, w): a CNN's as it is, patches without class and register tokens.

    Raises:
        ValueError: If the output is not spatial.
    """
    maps = getattr(output, "feature_maps", None)
    hidden = maps[-1] if maps else getattr(output, "last_hidden_state", None)
    if hidden is not None and hidden.ndim == 4:
        return hidden
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    grid = _patch_grid(hidden.shape[1], size, config) if hidden is not None and hidden.ndim == 3 else None
    if hidden is None or grid is None:
        got = "no last_hidden_state" if hidden is None else f"an output of shape {tuple(hidden.shape)}"
        raise ValueError(
            f"The vision tower {config.model_type!r} gave {got} for {size[0]}×{size[1]} pixels and patches of "
            f"{getattr(config, 'patch_size', None)}; expected a map (B, C, h, w) or one token a patch. Use a tower "
            "with a spatial output."
        )
    rows, columns = grid
    patches = hidden[:, hidden.shape[1] - rows * columns :]
    return patches.transpose(1, 2).reshape(hidden.shape[0], -1, rows, columns)


def _patch_grid(tokens: int, size: tuple[int, int], config: PreTrainedConfig) -> tuple[int, int] | None:
    """Rows and columns of patches among that many tokens; the class, distillation and register tokens come first."""
    patch = getattr(config, "patch_size", None)
    if not patch:
        return None
    patches = patch if isinstance(patch, list | tuple) else (patch, patch)
    # Hierarchical towers (Swin, …) pad what does not divide and halve the grid at every stage; no class token there.
    for halvings in range(6):
        rows, columns = (-(-length // (side << halvings)) for length, side in zip(size, patches, strict=True))
        if tokens == rows * columns:
            return rows, columns
    # Plain patch towers cut off what does not divide.
    rows, columns = (length // side for length, side in zip(size, patches, strict=True))
    extra = tokens - rows * columns
    return (rows, columns) if rows * columns and 0 <= extra <= 2 + _registers(config) else None


def _registers(config: PreTrainedConfig) -> int:
    return getattr(config, "num_register_tokens", 0) or 0


@torch.no_grad()
def region_feature_size(tower: nn.Module) -> int:
    """Channels of a tower's map, found by running it once on an empty picture."""
    size = getattr(tower.config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    weight = next(tower.parameters())
    pixels = torch.zeros(1, getattr(tower.config, "num_channels", 3), height, width).to(weight)
    was_training = tower.training
    features = region_map(tower.eval()(pixel_values=pixels), pixels, tower.config)
    tower.train(was_training)
    return features.shape[1]
