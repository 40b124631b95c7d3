"""Vision and text towers: any Hub model that gives a spatial map, a patch sequence or a word sequence. Shipped."""

import inspect
import os

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig


def build_tower(config: PreTrainedConfig) -> nn.Module:
    """A randomly initialised tower; without the pooling head that a matching model would leave untrained."""
    return AutoModel.from_config(config, **_without_pooler(config))


def load_tower(path: str | os.PathLike, half: str, trust_remote_code: bool = False) -> nn.Module:
    """A pretrained tower in float32; of a two-tower checkpoint (CLIP, SigLIP, …) the half named `half`.

    Raises:
        ValueError: If nothing that transformers can load is found there.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        config = getattr(config, half, None) or config
        tower = AutoModel.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            **_without_pooler(config),
        )
    except (OSError, KeyError) as error:
        raise ValueError(
            f"No {half.removesuffix('_config')} tower at {str(path)!r}: {error} Expected a Hub model id or a folder with "
            "config.json and weights."
        ) from error
    if os.path.isdir(path):  # saved with the checkpoint: a Hub id says where a tower is from, a path only whose disk it was on
        tower.config.name_or_path = os.path.basename(os.path.abspath(path))
    return tower


def _without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    model_class = MODEL_MAPPING.get(type(config), None)
    accepts = model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if accepts else {}


def region_map(output, pixel_values: Tensor, config: PreTrainedConfig) -> Tensor:
    """A vision tower's output as a map (B, C, h, w): a CNN's as it is, patches without class and register tokens.

    Raises:
        ValueError: If the output is not spatial.
    """
    maps = getattr(output, "feature_maps", None)
    hidden = maps[-1] if maps else output.last_hidden_state
    if hidden.ndim == 4:
        return hidden
    height, width = pixel_values.shape[-2:]
    patch = getattr(config, "patch_size", None)
    patch_height, patch_width = patch if isinstance(patch, list | tuple) else (patch, patch)
    tokens = hidden.shape[1]
    # Hierarchical towers (Swin, …) halve the grid at every stage after the patches.
    for halvings in range(6) if patch else ():
        rows, columns = height // patch_height >> halvings, width // patch_width >> halvings
        if 0 < rows * columns <= tokens:
            patches = hidden[:, tokens - rows * columns :]
            return patches.transpose(1, 2).reshape(len(hidden), -1, rows, columns)
    raise ValueError(
        f"The vision tower {config.model_type!r} gave {tokens} tokens for {height}×{width} pixels and patches of "
        f"{patch}; expected a map (B, C, h, w) or one token a patch. Use a tower with a spatial output."
    )


@torch.no_grad()
def region_feature_size(tower: nn.Module) -> int:
    """Channels of a tower's map, found by running it once on an empty picture."""
    size = getattr(tower.config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    pixels = torch.zeros(1, getattr(tower.config, "num_channels", 3), height, width)
    was_training = tower.training
    features = region_map(tower.eval()(pixel_values=pixels), pixels, tower.config)
    tower.train(was_training)
    return features.shape[1]
