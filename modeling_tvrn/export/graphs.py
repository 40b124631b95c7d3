"""The three parts of a model as modules that can be exported: image side, text side, pair stage.

They call the model's own layers. What differs is said here: inputs are not checked (a graph cannot raise), no width
depends on the values in a mask, and recurrences run over padded sequences without looking at their lengths in Python.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from ..encoded_tvrn import EncodedImages, EncodedTexts
from ..layers_tvrn import Recurrence, masked_mean, normalize, take
from ..modeling_tvrn import TVRNModel
from .samples import reads_extents

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Graph:
    """A part of a model, ready to be exported.

    Attributes:
        module: Takes one dictionary of tensors and gives one.
        axes: Names of each input's dimensions; a number where it is fixed.
    """

    module: nn.Module
    axes: dict[str, tuple[str | int, ...]]

    def outputs(self, given: Tensors) -> dict[str, tuple[str | int, ...]]:
        """Names of the dimensions of what the module gave."""
        return {name: _axes(name, value) for name, value in given.items()}


def exportable(model: TVRNModel) -> TVRNModel:
    """A copy in evaluation mode whose recurrences can be exported."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for name in ("visual_refinement", "textual_refinement"):
        if isinstance(getattr(copied, name, None), Recurrence):
            setattr(copied, name, _ScannedRecurrence(getattr(copied, name)))
    return copied


def image_graph(model: TVRNModel, pixel_shape: tuple[int | str, ...] | None) -> Graph:
    """Images to `EncodedImages`: from pixels (3, H, W) of that shape, or from region features where it is None."""
    axes: dict[str, tuple[str | int, ...]]
    if pixel_shape is not None:
        # A detector looks at one picture at a time: with several it would have one shape for all, and some detectors'
        # code counts pictures in Python, which fixes their number anyway.
        images = "images" if model.detector is None else 1
        axes = {"pixel_values": (images, *pixel_shape)}
        if reads_extents(model):
            axes["pixel_extents"] = (images, 2)
        return Graph(_Pixels(model), axes)
    axes = {
        "region_features": ("images", "regions", model.config.region_feature_size),
        "region_boxes": ("images", "regions", 4),
        "region_mask": ("images", "regions"),
    }
    if not model.config.needs_boxes:
        del axes["region_boxes"]  # an input that nothing reads
    return Graph(_Regions(model), axes)


def text_graph(model: TVRNModel, text_length: int | None = None) -> Graph:
    """Token ids to `EncodedTexts`.

    Args:
        model: The model.
        text_length: Tokens that every caption is padded to, of a text side (SigLIP) that reads padding too and so has
            no attention mask; None: any number, with one.
    """
    names = ["input_ids"] + ["attention_mask"] * (text_length is None)
    if model.uses_fragments or model.word_encoder is not None:  # else an input that nothing reads
        names.append("word_mask")
    return Graph(_Words(model), dict.fromkeys(names, ("texts", text_length or "words")))


def pair_graph(model: TVRNModel, encoded: Tensors) -> Graph:
    """Both sides' tensors to logits (images, texts); what the other two graphs give, of which it reads some."""
    read = {f"images.{name}" for name in _read_of_images(model)} | {f"texts.{name}" for name in _read_of_texts(model)}
    given = {name: value for name, value in encoded.items() if name in read}
    return Graph(_Pairs(model), {name: _axes(name, value) for name, value in given.items()})


def _read_of_images(model: TVRNModel) -> list[str]:
    config, names = model.config, []
    if config.use_reasoning:
        names += ["refined_regions", "refined_region_mask", "global_vector"]
        names += ["refined_region_saliency", "refined_region_gram"]
    if model.textual_refinement is not None or config.use_late_interaction:
        names.append("region_mask")
    if config.use_reasoning and model.textual_refinement is not None:
        names += ["context_keys", "context_values", "context_gram"]
    names += ["regions"] * config.use_late_interaction
    return [*names, *["embeds"] * config.use_first_stage]


def _read_of_texts(model: TVRNModel) -> list[str]:
    names = ["words", "word_mask", "word_weights"] * (model.config.use_late_interaction or model.config.use_reasoning)
    names += ["context_queries", "gates", "recurrent_words", "recurrent_state"] * model.config.use_reasoning
    return [*names, *["embeds"] * model.config.use_first_stage]


# The fragments that an encoded tensor has dimensions of, beside the item and its own size.
_FRAGMENTS = {
    "refined": "refined_regions",
    "region": "regions",
    "context": "regions",
    "word": "words",
    "gates": "words",
}


def _axes(name: str, value: Tensor) -> tuple[str | int, ...]:
    if name == "logits":
        return ("images", "texts")
    side, field = name.split(".")
    if field in ("embeds", "global_vector", "recurrent_state"):
        return (side, int(value.shape[1]))
    if side == "texts":
        return (side, "words", *value.shape[2:])
    fragments = next(axis for start, axis in _FRAGMENTS.items() if field.startswith(start))
    return (side, fragments, fragments) if field.endswith("gram") else (side, fragments, *value.shape[2:])


class _Pixels(nn.Module):
    def __init__(self, model: TVRNModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> Tensors:
        seen = self.model._seen_regions(inputs["pixel_values"], None, inputs.get("pixel_extents"))
        return _tensors("images", self.model._encode_regions(*seen))


class _Regions(nn.Module):
    def __init__(self, model: TVRNModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> Tensors:
        order = _valid_first(inputs["region_mask"])
        features, mask = take(inputs["region_features"], order), take(inputs["region_mask"], order)
        boxes = take(inputs["region_boxes"], order) if "region_boxes" in inputs else None
        return _tensors("images", self.model._encode_regions(features, boxes, mask, None))


class _Words(nn.Module):
    def __init__(self, model: TVRNModel):
        super().__init__()
        self.model = model
        self.recurrence = _RaggedGRU(model.word_encoder.gru) if model.word_encoder is not None else None

    def forward(self, inputs: Tensors) -> Tensors:
        model = self.model
        attention_mask = inputs.get("attention_mask")
        attended = (torch.ones_like(inputs["input_ids"]) if attention_mask is None else attention_mask).bool()
        mask = inputs["word_mask"].bool() & attended if "word_mask" in inputs else attended
        order = _valid_first(mask)
        mask = take(mask, order)
        if self.recurrence is not None and model.word_encoder is not None:
            embedded = model.word_encoder.embeddings(take(inputs["input_ids"], order))
            words, pooled = normalize(self.recurrence(embedded, mask)), masked_mean(embedded, mask)
        else:
            hidden, embeds = model._read(inputs["input_ids"], attention_mask)
            words = model._words(take(hidden, order), mask) if model.uses_fragments else hidden
            pooled = masked_mean(hidden, attended) if embeds is None else embeds
        if not model.uses_fragments:
            return {"texts.embeds": model._text_embeds(None, mask, pooled)}
        return _tensors("texts", model._encode_words(words, mask, order, pooled))


class _Pairs(nn.Module):
    def __init__(self, model: TVRNModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> Tensors:
        images = EncodedImages(**_fields("images", inputs, EncodedImages))
        texts = EncodedTexts(**_fields("texts", inputs, EncodedTexts))
        return {"logits": self.model._block_logits(images, texts)}


def _tensors(side: str, encoded: EncodedImages | EncodedTexts) -> Tensors:
    """What a side's graph gives: all that a search or the pair stage reads."""
    left_out = ("region_boxes", "word_positions")
    return {f"{side}.{name}": value for name, value in encoded.tensors().items() if name not in left_out}


def _fields(side: str, inputs: Tensors, kind: type) -> dict[str, Any]:
    """Arguments of a dataclass of encoded items; None for what the pair stage does not read."""
    names = [name for name in kind.__dataclass_fields__ if name != "model_fingerprint"]  # type: ignore[attr-defined]
    return {name: inputs.get(f"{side}.{name}") for name in names}


def _valid_first(mask: Tensor) -> Tensor:
    """As `layers_tvrn.valid_first`; with keys that differ no stable sort is needed, which ONNX has none of."""
    count = mask.shape[1]
    return (mask.logical_not().long() * count + torch.arange(count)).argsort(dim=1)


class _ScannedGRU(nn.Module):
    """One direction of a GRU layer whose loop stays a loop: a traced `nn.GRU` keeps the length it was traced at."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, gru: nn.GRU, suffix: str = ""):
        super().__init__()
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            setattr(self, name, getattr(gru, name + suffix))

    def forward(self, values: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `nn.GRU` with `batch_first`: (B, N, E), (1, B, D) -> (B, N, D), (1, B, D)."""
        first = values.new_zeros(values.shape[0], self.weight_hh_l0.shape[1]) if state is None else state.squeeze(0)
        outputs = self.steps(F.linear(values, self.weight_ih_l0, self.bias_ih_l0), first)
        return outputs, outputs[:, -1].unsqueeze(0)

    def steps(self, gates: Tensor, state: Tensor) -> Tensor:
        """The recurrence over input gates (B, N, 3D), their bias included, from `state` (B, D) -> (B, N, D)."""
        weight, bias = self.weight_hh_l0, self.bias_hh_l0

        def step(state: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
            reset_in, update_in, new_in = gates.chunk(3, dim=-1)
            reset_state, update_state, new_state = F.linear(state, weight, bias).chunk(3, dim=-1)
            update = torch.sigmoid(update_in + update_state)
            new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_state) * new_state)
            state = new + update * (state - new)
            return state, state.clone()

        _, outputs = scan(step, state, gates.transpose(0, 1))
        return outputs.transpose(0, 1)


class _ScannedRecurrence(Recurrence):
    def __init__(self, recurrence: Recurrence):
        nn.Module.__init__(self)
        self.gru = _ScannedGRU(recurrence.gru)  # type: ignore[assignment]

    def steps(self, input_gates: Tensor, state: Tensor) -> Tensor:
        return cast(_ScannedGRU, self.gru).steps(input_gates + cast(Tensor, self.gru.bias_ih_l0), state)


class _RaggedGRU(nn.Module):
    """A bidirectional GRU over sequences of different lengths, directions averaged, without packing them."""

    def __init__(self, gru: nn.GRU):
        super().__init__()
        self.onwards, self.backwards = _ScannedGRU(gru), _ScannedGRU(gru, "_reverse")

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """(T, W, E), (T, W) with the valid words first -> (T, W, D)."""
        lengths, places = mask.sum(dim=1, keepdim=True), torch.arange(mask.shape[1]).expand(mask.shape)
        mirrored = torch.where(mask, lengths - 1 - places, places)
        onwards, _ = self.onwards(values)
        backwards, _ = self.backwards(take(values, mirrored))
        return (onwards + take(backwards, mirrored)) / 2
