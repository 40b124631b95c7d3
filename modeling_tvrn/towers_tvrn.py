"""What is pretrained: vision and text towers, and dual encoders as first stage. Shipped.

A tower is any Hub model that gives a spatial map, a patch sequence or a word sequence. A dual encoder (CLIP, SigLIP,
…) is accepted by probing, not by name. TVRN owns the scale and the bias of its logit, with shape [1] (0-d parameters
break fully_shard): they are copied in, removed here, and written back by `plain_dual_encoder`, so that each has one
owner.
"""

import copy
import inspect
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
)

from .checks_tvrn import check_weights
from .configuration_tvrn import DETECTORS, NO_DETECTORS
from .trust_tvrn import MODEL_CODE, explained, without_code

# What a map or a word sequence does not depend on: poolers, and the token of masked-image training.
_UNUSED = re.compile(r"(^|\.)(pooler|mask_token|head\.(probe|attention|layernorm|mlp))(\.|$)")
_UNUSED_OF_TYPE = {"clip_vision_model": "post_layernorm.", "siglip_text_model": "head.", "siglip2_text_model": "head."}
_READS = {"vision_config": "pixel_values", "text_config": "input_ids"}
_SUCH_AS = {
    "vision_config": ", such as google/vit-base-patch16-224, facebook/dinov2-base or microsoft/resnet-50",
    "text_config": "",
}
# What a logit is made of beside the cosine; a model has one of the first two.
SCALE, TEMPERATURE, BIAS = "logit_scale", "temperature", "logit_bias"
PROBE_WORDS = 5
TOLERANCE = 1e-5  # of our logits against the model's own, relative


# -- towers of one side ----------------------------------------------------------------------------------------------


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
        if half == "vision_config" and config.model_type in {*DETECTORS, *NO_DETECTORS}:
            raise ValueError(f"it is a detector ({config.model_type!r}); give it as detector=….")
        tower = _tower_class(config).from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            **_without_pooler(config),
        )
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"No {half.removesuffix('_config')} tower at {str(path)!r}: "
            f"{explained(error, path, MODEL_CODE, trust_remote_code=trust_remote_code)} Expected a Hub model id or a "
            f"folder with config.json and weights{_SUCH_AS[half]}."
        ) from error
    if tower.main_input_name != _READS[half]:
        raise ValueError(
            f"{str(path)!r} holds a {type(tower).__name__}, which reads {tower.main_input_name}; expected a "
            f"{half.removesuffix('_config')} model, which reads {_READS[half]}{_SUCH_AS[half]}."
        )
    check_weights(tower, repr(os.fspath(path)))
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
    table = table / table.std()  # a new tensor: the tower keeps its own
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
    # (B, extra + h·w, C) -> (B, C, h, w): what is no patch comes first in every tower.
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
    # A class and a distillation token at most, beside the registers.
    most = 2 + (getattr(config, "num_register_tokens", 0) or 0)
    return (rows, columns) if rows * columns and 0 <= extra <= most else None


def _image_size(config: Any) -> tuple[int, int]:
    """(height, width) that a vision tower was made for; of one that does not say, the usual 224."""
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


@torch.no_grad()
def region_feature_size(tower: nn.Module) -> int:
    """Channels of a tower's map, found by running it once on an empty picture."""
    weight = next(tower.parameters())
    pixels = torch.zeros(1, getattr(tower.config, "num_channels", 3), *_image_size(tower.config)).to(weight)
    was_training = tower.training
    features = region_map(tower.eval()(pixel_values=pixels), pixels, tower.config)
    tower.train(was_training)
    return features.shape[1]


# -- dual encoders ---------------------------------------------------------------------------------------------------


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
    model = load_whole(name, config, AutoModel, "dual encoder", dtype=dtype or "auto", **hub)
    if os.path.isdir(path):  # a Hub id says where a model is from, a path only whose disk it was on
        model.config.name_or_path = os.path.basename(os.path.abspath(path))
    return model.eval()


def load_whole(name: str, config: PreTrainedConfig, auto_class: Any, kind: str, **options: Any) -> Any:
    """The model with every weight of the checkpoint; transformers would start one that lacks at random.

    Raises:
        ValueError: If its weights don't load, or one is missing or of another shape; says what `kind` of model it is.
    """
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = auto_class.from_pretrained(name, config=config, **options)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"No {kind} at {name!r}: its weights don't load ({reason}); expected whole safetensors files that "
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
    check_weights(model, repr(name))
    return model


def look(tower: Any, config: PreTrainedConfig, pixels: Tensor) -> Any:
    """A vision tower's output, or that of a dual encoder's `get_image_features`.

    Raises:
        ValueError: If it refuses pixels of that size, with the size it was made for.
    """
    try:
        return tower(pixel_values=pixels)
    except (ValueError, RuntimeError) as error:
        made_for, got = _image_size(config), tuple(pixels.shape[-2:])
        if got == made_for or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"The vision tower {config.model_type!r} refuses pixel_values of {got[0]}×{got[1]} "
            f"({str(error).splitlines()[0]}); expected {made_for[0]}×{made_for[1]}. Make them with the image "
            "processor of this checkpoint, or set image_size to what the tower was made for."
        ) from error


def float_dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in: the dtype of its weights, or in a quantised one of those that are not."""
    return next(weight.dtype for weight in model.parameters() if weight.is_floating_point())


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
    pixels, ids = pixels.to(weight.device, float_dtype(model)), ids.to(weight.device)
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
    slack = TOLERANCE if float_dtype(model) == torch.float32 else 2e-2
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
    # A copy: building a model writes into its configuration.
    model = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False).to(float_dtype(nested))
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
