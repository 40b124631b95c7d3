"""A pretrained dual encoder of the Hub (CLIP, SigLIP, …) as first stage: accepted by probing, not by name. Shipped.

TVRN owns the scale and the bias of its logit, with shape [1] (0-d parameters break fully_shard): they are copied in,
removed here, and written back by `plain_dual_encoder`, so that each has one owner.
"""

import copy
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from .towers_tvrn import region_map
from .trust_tvrn import MODEL_CODE, explained, without_code

# What a logit is made of beside the cosine; a model has one of the first two.
SCALE, TEMPERATURE, BIAS = "logit_scale", "temperature", "logit_bias"
PROBE_WORDS = 5
TOLERANCE = 1e-5  # of our logits against the model's own, relative


@dataclass
class ProbedSizes:
    """What a probe found.

    Attributes:
        projection_size: of the embeddings.
        region_feature_size: channels of the map of patches.
        word_feature_size: of a token's last hidden state.
        logit_scale: log of the logit's scale.
        logit_bias: added to it; None where there is none.
    """

    projection_size: int
    region_feature_size: int
    word_feature_size: int
    logit_scale: float
    logit_bias: float | None

    def config(self) -> dict[str, Any]:
        """The fields of TVRNConfig that follow."""
        return {
            "projection_size": self.projection_size,
            "region_feature_size": self.region_feature_size,
            "word_embedding_size": self.word_feature_size,
            "use_logit_bias": self.logit_bias is not None,
        }


def build_dual_encoder(config: PreTrainedConfig) -> nn.Module:
    """A randomly initialised dual encoder without the scale and bias of its logit, which TVRN owns."""
    return without_scale(AutoModel.from_config(config, trust_remote_code=False))


def without_scale(model: nn.Module) -> nn.Module:
    """The model itself, its scale (or temperature) and bias removed."""
    for name in (SCALE, TEMPERATURE, BIAS):
        if isinstance(getattr(model, name, None), Tensor):
            delattr(model, name)
    return model


def load_dual_encoder(path: str | os.PathLike, dtype: Any = None, **hub: Any) -> nn.Module:
    """A pretrained dual encoder in evaluation mode, in its own dtype unless another is given.

    Raises:
        ValueError: If nothing that transformers can load is found there, or it is no dual encoder.
    """
    name = os.fspath(path)
    # Nested in a TVRN checkpoint a model has transformers' own class: code of its repository is never run.
    hub = {**hub, "trust_remote_code": False}
    try:
        config = without_code(AutoConfig.from_pretrained(path, **hub))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"No dual encoder at {name!r}: {explained(error, path, MODEL_CODE, **hub)}") from error
    if getattr(config, "vision_config", None) is None or getattr(config, "text_config", None) is None:
        raise ValueError(
            f"{name!r} holds a model of type {config.model_type!r}, without a vision and a text tower; expected a "
            "dual encoder (CLIP, SigLIP, …). Towers of one side go to TVRNModel.from_backbones."
        )
    model = _load_whole(name, config, dtype=dtype or "auto", **hub)
    if os.path.isdir(path):  # a Hub id says where a model is from, a path only whose disk it was on
        model.config.name_or_path = os.path.basename(os.path.abspath(path))
    return model.eval()


def _load_whole(name: str, config: PreTrainedConfig, **options: Any) -> Any:
    """The model with every weight of the checkpoint; transformers would start one that lacks at random."""
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = AutoModel.from_pretrained(name, config=config, **options)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"No dual encoder at {name!r}: its weights don't load ({reason}); expected whole safetensors files that "
            f"belong to its config.json, a {config.model_type!r}. Fetch the checkpoint again."
        ) from error
    missing = [f"{weight!r} is missing" for weight in sorted(info["missing_keys"])]
    shapes = [
        f"{weight!r} has shape {tuple(found)}, not {tuple(wanted)}"
        for weight, found, wanted in sorted(info["mismatched_keys"])
    ]
    if faults := [*missing, *shapes]:
        raise ValueError(
            f"The checkpoint {name!r} does not hold a whole {type(model).__name__}: {faults[0]} ({len(faults)} such "
            "weights); expected all that its config.json says. Fetch it again, or look whether that file was changed."
        )
    return model


def image_features(model: Any, pixels: Tensor) -> Any:
    """`get_image_features` of a dual encoder.

    Raises:
        ValueError: If its tower refuses pixels of that size, with the size it was made for.
    """
    try:
        return model.get_image_features(pixel_values=pixels)
    except (ValueError, RuntimeError) as error:
        made_for, got = _image_size(model.config.vision_config), tuple(pixels.shape[-2:])
        if got == made_for or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"The vision tower {model.config.vision_config.model_type!r} refuses pixel_values of {got[0]}×{got[1]} "
            f"({str(error).splitlines()[0]}); expected {made_for[0]}×{made_for[1]}. Make them with the image "
            "processor of this checkpoint."
        ) from error


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


@torch.no_grad()
def probe(model: Any) -> ProbedSizes:
    """Run one image and one caption through a dual encoder, both ways, and compare.

    Raises:
        ValueError: With the test that failed: embeddings of one size on both sides, a scalar scale, patches that form
            a grid, tokens, and a logit that is scale·cosine + bias.
    """
    kind = type(model).__name__
    pixels, ids = _probe_inputs(model.config, kind)
    weight = next(model.parameters())
    pixels, ids = pixels.to(weight), ids.to(weight.device)
    try:
        image, text = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=ids)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise _refused(
            kind, f"get_image_features(pixel_values) and get_text_features(input_ids) fail: {error}"
        ) from error
    shapes = [tuple(getattr(getattr(side, "pooler_output", None), "shape", ())) for side in (image, text)]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        raise _refused(
            kind, f"pooler_output has shape {shapes[0]} for an image and {shapes[1]} for a text, not one (1, P)"
        )
    scale, bias = _logit_scale(model, kind), getattr(model, BIAS, None)
    try:
        grid = region_map(image, pixels, model.config.vision_config)
    except ValueError as error:
        raise _refused(kind, f"its patches form no grid: {error}") from error
    hidden = getattr(text, "last_hidden_state", None)
    if hidden is None or hidden.ndim != 3 or hidden.shape[1] != ids.shape[1]:
        raise _refused(kind, f"last_hidden_state of a text is {getattr(hidden, 'shape', None)}, not one state a token")
    image_embeds, text_embeds = (nn.functional.normalize(side.pooler_output.float(), dim=-1) for side in (image, text))
    ours = math.exp(scale) * (image_embeds @ text_embeds.T) + (0.0 if bias is None else float(bias))
    own = model(pixel_values=pixels, input_ids=ids).logits_per_image.float()
    slack = TOLERANCE if next(model.parameters()).dtype == torch.float32 else 2e-2
    if own.shape != ours.shape or not (own - ours).abs().max() <= slack * max(1.0, math.exp(scale)):
        raise _refused(kind, f"its logit of the probe is {own.tolist()}, scale·cosine + bias is {ours.tolist()}")
    return ProbedSizes(shapes[0][1], grid.shape[1], hidden.shape[2], scale, None if bias is None else float(bias))


def _probe_inputs(config: Any, kind: str) -> tuple[Tensor, Tensor]:
    vision, text = config.vision_config, config.text_config
    if not hasattr(vision, "image_size") and hasattr(vision, "num_patches"):
        raise _refused(
            kind, "it wants patches of any resolution (pixel_attention_mask, spatial_shapes), not images of one size"
        )
    height, width = _image_size(vision)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, getattr(vision, "num_channels", 3) or 3, height, width, generator=generator) * 2 - 1
    # Below every special token that ends a caption: which positions a text side pools is then the same both ways.
    ids = torch.arange(3, 3 + PROBE_WORDS).remainder(text.vocab_size).unsqueeze(0)
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[0, -1] = end
    return pixels, ids


def _logit_scale(model: Any, kind: str) -> float:
    """The log of the scale, of a model with a scale or a temperature."""
    for name, sign in ((SCALE, 1.0), (TEMPERATURE, -1.0)):
        value = getattr(model, name, None)
        if isinstance(value, Tensor) and value.numel() == 1 and (sign > 0 or value > 0):
            return float(value) if sign > 0 else -math.log(float(value))
    raise _refused(kind, "it has neither a scalar logit_scale nor a temperature")


def _refused(kind: str, reason: str) -> ValueError:
    return ValueError(
        f"{kind} can't be the first stage: {reason}. Expected a dual encoder such as CLIP, MetaCLIP 2, SigLIP or a "
        "VisionTextDualEncoder."
    )


def plain_dual_encoder(config: PreTrainedConfig, nested: nn.Module, scale: Tensor, bias: Tensor | None) -> Any:
    """The dual encoder as a model of its original class, with the scale and bias that TVRN trained."""
    model = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False).to(next(nested.parameters()).dtype)
    state = dict(nested.state_dict())
    for name, value in (
        (SCALE, scale.detach()),
        (TEMPERATURE, scale.detach().neg().exp()),
        (BIAS, bias.detach() if bias is not None else None),
    ):
        own = getattr(model, name, None)
        if isinstance(own, Tensor) and value is not None:
            state[name] = value.reshape(own.shape).to(own.dtype)
    model.load_state_dict(state)
    return model.eval()
