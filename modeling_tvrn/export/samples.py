"""Random inputs of a model's two sides, ragged as real ones: to trace it with, and to compare what came of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling_tvrn import TVRNModel


def sample_images(
    model: TVRNModel, pixel_shape: tuple[int | str, ...] | None, images: int, regions: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Pixels of that shape, or where it is None region features with boxes and a mask with holes."""
    if pixel_shape is not None:
        # Height and width that are open: two that differ, as neither is to be taken for the other.
        sides = iter((32 * (torch.randperm(6, generator=generator) + 2)).tolist())
        shape = [size if isinstance(size, int) else next(sides) for size in pixel_shape]
        inputs = {"pixel_values": torch.randn(images, *shape, generator=generator)}
        if reads_extents(model):
            inputs["pixel_extents"] = 1 - torch.rand(images, 2, generator=generator) / 2
        return inputs
    corners = torch.rand(images, regions, 2, 2, generator=generator).sort(dim=2).values
    features = torch.randn(images, regions, model.config.region_feature_size, generator=generator).abs()
    inputs = {"region_features": features, "region_boxes": corners.flatten(2)}
    if not model.config.needs_boxes:
        del inputs["region_boxes"]
    return {**inputs, "region_mask": _mask(images, regions, generator)}


def sample_texts(
    model: TVRNModel, texts: int, words: int, generator: torch.Generator, text_length: int | None = None
) -> dict[str, Tensor]:
    """Token ids; each text attends to its first tokens, the first of all to every one, and some are no words.

    With a `text_length` all have so many tokens and no attention mask, and at most `words` of them are words.
    """
    lengths = torch.randint(1, words + 1, (texts, 1), generator=generator)
    lengths[0] = words
    attended = torch.arange(words) < lengths
    word = _mask(texts, words, generator) & attended
    word[torch.arange(texts), lengths.squeeze(1) - 1] = True
    ids = torch.randint(1, vocabulary_size(model), (texts, text_length or words), generator=generator)
    if text_length is not None:
        return {"input_ids": ids, "word_mask": F.pad(word, (0, text_length - words)).long()}
    return {"input_ids": ids, "attention_mask": attended.long(), "word_mask": word.long()}


def reads_extents(model: TVRNModel) -> bool:
    """Whether a picture's pixels are padded to a square, of which the detector has to know what the picture is."""
    detector: Any = model.config.detector_config
    return detector is not None and detector.model_type == "owlv2"


def vocabulary_size(model: TVRNModel) -> int:
    """Token ids are below it."""
    return int(getattr(model.config.text_tower_config, "vocab_size", model.config.vocab_size))


def _mask(items: int, fragments: int, generator: torch.Generator) -> Tensor:
    """Each item keeps some fragments, the first item all of them."""
    mask = torch.rand(items, fragments, generator=generator) < 0.7
    mask[0], mask[:, fragments // 2] = True, True
    return mask
