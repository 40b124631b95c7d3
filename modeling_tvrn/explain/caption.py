"""The words of a caption as a reader sees them, and which of the model's tokens stand for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class CaptionWord:
    """A word of the caption.

    Attributes:
        text: As written in the caption (or the token itself where the tokenizer keeps no offsets).
        span: First character and one past the last; None without offsets.
        positions: Of its tokens in `input_ids`.
    """

    text: str
    span: tuple[int, int] | None
    positions: tuple[int, ...]


def caption_words(tokenizer: Any, caption: str, input_ids: Tensor, word_mask: Tensor) -> list[CaptionWord]:
    """The matched words of one caption, in reading order; the pieces of a word are one.

    Args:
        tokenizer: The processor's.
        caption: As it was tokenized.
        input_ids: (W,) its ids.
        word_mask: (W,) 1 = a word to match.
    """
    ids = input_ids.tolist()
    matched = [position for position, kept in enumerate(word_mask.tolist()) if kept]
    encoding = _with_offsets(tokenizer, caption, ids)
    if encoding is None:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        return [CaptionWord(str(tokens[position]), None, (position,)) for position in matched]
    groups: dict[int, list[int]] = {}
    for position in matched:
        number = encoding.word_ids(0)[position]
        groups.setdefault(-position - 1 if number is None else number, []).append(position)
    offsets = encoding["offset_mapping"]
    return [_word(caption, offsets, positions) for positions in groups.values()]


def without_each_word(inputs: dict[str, Tensor], words: list[CaptionWord], pad_id: int) -> dict[str, Tensor]:
    """The caption once without each of its words, as a batch: the tokens are gone, not masked.

    Args:
        inputs: `input_ids`, `word_mask` and, unless captions are padded to one length, `attention_mask`, each (1, W).
        words: Of `caption_words`.
        pad_id: The tokenizer's, with which a caption that is padded to one length (SigLIP) stays as long as it was.
    """
    length = inputs["input_ids"].shape[1]
    rows = []
    for word in words:
        kept = torch.tensor([position for position in range(length) if position not in word.positions])
        rows.append({name: value[0, kept.to(value.device)] for name, value in inputs.items()})
    pad = torch.nn.utils.rnn.pad_sequence
    fill = {"input_ids": pad_id}
    found = {name: pad([row[name] for row in rows], True, fill.get(name, 0)) for name in inputs}
    if "attention_mask" in inputs:
        return found
    missing = length - found["input_ids"].shape[1]
    return {name: F.pad(value, (0, missing), value=fill.get(name, 0)) for name, value in found.items()}


def _with_offsets(tokenizer: Any, caption: str, ids: list[int]) -> Any:
    """The caption's encoding with offsets, or None of a tokenizer that keeps none."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoding = tokenizer(caption, return_offsets_mapping=True, truncation=False, verbose=False)
    if len(encoding["input_ids"]) != len(ids):  # cut, or padded to one length
        fitted: dict[str, Any] = {"truncation": True, "padding": "max_length", "max_length": len(ids)}
        encoding = tokenizer(caption, return_offsets_mapping=True, padding_side="right", **fitted)
    return encoding if encoding["input_ids"] == ids else None


def _word(caption: str, offsets: list[tuple[int, int]], positions: list[int]) -> CaptionWord:
    start = min(offsets[position][0] for position in positions)
    end = max(offsets[position][1] for position in positions)
    return CaptionWord(caption[start:end].strip(), (start, end), tuple(positions))
