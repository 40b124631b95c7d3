"""Exported graphs under onnxruntime beside the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..encoded_tvrn import EncodedImages, EncodedTexts
from ..modeling_tvrn import TVRNModel
from .report import Parity
from .samples import sample_images, sample_texts
from .tvrn_onnx import Arrays, OnnxModel

# (images, regions, texts, words): one of each, fewer and more than traced, none of the traced sizes.
SIZES = ((1, 1, 1, 1), (2, 9, 6, 3), (5, 4, 1, 12), (1, 36, 9, 2))


@torch.no_grad()
def compare(
    model: TVRNModel, pixel_shape: tuple[int | str, ...] | None, text_length: int | None, exported: OnnxModel
) -> tuple[Parity, ...]:
    """The largest differences at each of `SIZES`, on random inputs with holes in their masks."""
    generator = torch.Generator().manual_seed(1)
    training = model.training
    model.eval()
    try:
        return tuple(_compare(model, pixel_shape, text_length, exported, size, generator) for size in SIZES)
    finally:
        model.train(training)


def _compare(
    model: TVRNModel,
    pixel_shape: tuple[int | str, ...] | None,
    text_length: int | None,
    exported: OnnxModel,
    size: tuple[int, int, int, int],
    generator: torch.Generator,
) -> Parity:
    images, regions, texts, words = size
    words = min(words, text_length or words)
    device = next(model.parameters()).device
    image_inputs: dict[str, Any] = sample_images(model, pixel_shape, images, regions, generator)
    text_inputs: dict[str, Any] = sample_texts(model, texts, words, generator, text_length)
    on_device = {name: value.to(device) for name, value in {**image_inputs, **text_inputs}.items()}
    ours = model.encode_images(**{name: on_device[name] for name in image_inputs})
    our_texts = model.encode_texts(**{name: on_device[name] for name in text_inputs})
    theirs, their_texts = (
        exported.encode_images(**_arrays(image_inputs)),
        exported.encode_texts(**_arrays({name: text_inputs[name] for name in exported.inputs("text")})),
    )
    logits = model.match(ours, our_texts).cpu().numpy()
    pairs = [
        _difference("images", ours, theirs),
        _difference("texts", our_texts, their_texts),
        (float(np.abs(exported.match(theirs, their_texts) - logits).max()), float(np.abs(logits).max())),
    ]
    (image_error, text_error, logit_error), (image_largest, text_largest, logit_largest) = zip(*pairs, strict=True)
    return Parity(
        images=images,
        regions=None if pixel_shape is not None else regions,
        texts=texts,
        words=words,
        image_error=image_error,
        text_error=text_error,
        logit_error=logit_error,
        largest=(image_largest, text_largest, logit_largest),
    )


def _arrays(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


def _difference(side: str, ours: EncodedImages | EncodedTexts, theirs: Arrays) -> tuple[float, float]:
    """Largest absolute difference of any valid entry, and the largest absolute value."""
    errors, values = [], []
    for name, tensor in ours.tensors().items():
        if f"{side}.{name}" not in theirs:
            continue
        wanted, found = tensor.cpu().double().numpy(), theirs[f"{side}.{name}"].astype(np.float64)
        if isinstance(ours, EncodedTexts) and ours.word_mask is not None and name not in ("embeds", "recurrent_state"):
            # The model drops columns that are padding in every text; at padding the two may differ.
            assert ours.word_mask is not None
            mask = ours.word_mask.cpu().numpy()
            wanted, found = wanted[mask], found[:, : mask.shape[1]][mask]
        errors.append(np.abs(wanted - found).max())
        values.append(np.abs(wanted).max())
    return float(max(errors)), float(max(values))
