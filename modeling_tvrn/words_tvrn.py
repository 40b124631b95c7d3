"""Captions made ready for a batch: checked, tokenized, padded, and which of their tokens are words to match."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN = "<pad>", "<unk>"
_LETTER = re.compile("[A-Za-z0-9]")


def check_captions(text: str | Iterable[str]) -> list[str]:
    """The captions as a list.

    Raises:
        ValueError: no captions, an empty one, or something that is no string (the message names its index).
    """
    captions = [text] if isinstance(text, str) else list(text)
    if not captions:
        raise ValueError("text holds zero captions: pass at least one")
    faults = {i: fault for i, caption in enumerate(captions) if (fault := _fault(caption)) is not None}
    if faults:
        i = next(iter(faults))
        raise ValueError(
            f"text[{i}] {faults[i]} ({len(faults)} of {len(captions)} captions cannot be used): drop it, and with it "
            "its pairing with an image"
        )
    return captions


def _fault(caption: Any) -> str | None:
    """What is wrong with a caption before it is tokenized."""
    if not isinstance(caption, str):
        return f"is {type(caption).__name__} {caption!r:.80}, expected a string a caption"
    if not caption.strip():
        return f"is an empty caption {caption!r:.80}"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return f"is no Unicode text, it holds lone surrogates: {caption!r:.80}"
    return None


def caption_problems(tokenizer: Any, captions: Sequence[Any], max_length: int) -> dict[int, str]:
    """Why captions cannot be used, by their place; good ones are not in it. Most are known without being tokenized."""
    found: dict[int, str] = {}
    unsure = []
    special = [str(token) for token in tokenizer.all_special_tokens]
    for i, caption in enumerate(captions):
        fault = _fault(caption)
        if fault is not None:
            found[i] = fault
        # a letter or digit becomes a word, or at least the unknown one, unless a special token is spelt with it
        elif tokenizer.unk_token is None or not _LETTER.search(caption) or any(token in caption for token in special):
            unsure.append(i)
    if unsure:
        inputs, _ = encode(tokenizer, [captions[i] for i in unsure], max_length)
        for i, count in zip(unsure, inputs["word_mask"].sum(axis=1).tolist(), strict=True):
            if not count:
                found[i] = f"{captions[i]!r:.80} has no word left after {type(tokenizer).__name__}"
    return dict(sorted(found.items()))


def tokenize(
    tokenizer: Any, captions: Sequence[str], max_length: int, text_padding: str = "longest"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Token ids of T captions and the lengths they would have uncut.

    Args:
        max_length: longest caption in tokens, special tokens included.
        text_padding: "longest", or "max_length": every caption to that length and without an attention mask, as a
            dual encoder wants it that pools the last position (SigLIP).

    Returns:
        `input_ids`, `attention_mask` and `word_mask (T, W)` int64, padded on the right; uncut lengths `(T,)`.

    Raises:
        ValueError: the tokenizer cannot pad, or leaves a caption without a single word.
    """
    inputs, lengths = encode(tokenizer, captions, max_length, text_padding)
    wordless = np.flatnonzero(inputs["word_mask"].sum(axis=1) == 0)
    if wordless.size:
        i = wordless[0]
        raise ValueError(f"text[{i}] {captions[i]!r:.80} has no word left after {type(tokenizer).__name__}: drop it")
    if text_padding == "max_length":
        del inputs["attention_mask"]
    return inputs, lengths


def encode(
    tokenizer: Any, captions: Sequence[str], max_length: int, text_padding: str = "longest"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """As `tokenize`, also where a caption has no word."""
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no padding token, which a batch of captions needs: set "
            "tokenizer.pad_token (tokenizer.eos_token will do)"
        )
    options = {"padding": True, "padding_side": "right", "return_tensors": "np", "return_attention_mask": True}
    # uncut at first: only so are the captions that get cut known, and few batches need the second call
    encoded = tokenizer(captions, truncation=False, verbose=False, **options)
    lengths = encoded["attention_mask"].sum(axis=1)
    if (lengths > max_length).any():
        encoded = tokenizer(captions, truncation=True, max_length=max_length, **options)
    if text_padding == "max_length":
        options["padding"] = "max_length"
        encoded = tokenizer(captions, truncation=True, max_length=max_length, **options)
    inputs = {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    inputs["word_mask"] = inputs["attention_mask"] * ~np.isin(inputs["input_ids"], special_ids(tokenizer))
    return inputs, lengths


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that are no words: all special ones but the unknown token, which stands for a word."""
    tokens = [token for role, token in tokenizer.special_tokens_map.items() if role != "unk_token"]
    flat = [one for token in tokens for one in (token if isinstance(token, (list, tuple)) else [token])]
    return sorted({tokenizer.convert_tokens_to_ids(str(token)) for token in flat})


def check_length(max_length: int, tokenizer: Any) -> int:
    """The longest caption in tokens that both the setting and the tokenizer allow.

    Raises:
        ValueError: it leaves no room for a word beside the special tokens.
    """
    special = 0 if tokenizer is None else tokenizer.num_special_tokens_to_add()
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= special:
        raise ValueError(
            f"max_text_length={max_length!r}: expected an integer above {special}, the tokenizer's special tokens"
        )
    return max_length if tokenizer is None else min(max_length, tokenizer.model_max_length)


def build_word_tokenizer(captions: Iterable[str], min_frequency: int = 1) -> PreTrainedTokenizerFast:
    """A lower-case word tokenizer, punctuation split off: `<pad>` 0, `<unk>` 1, then words by falling frequency.

    Raises:
        ValueError: no captions, an empty one, or no word seen `min_frequency` times.
    """
    if min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency}: expected at least 1")
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for caption in check_captions(captions):
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    words = sorted((word for word in counts if counts[word] >= min_frequency), key=lambda word: (-counts[word], word))
    if not words:
        raise ValueError(
            f"no word is seen min_frequency={min_frequency} times, at most {max(counts.values())}: lower it"
        )
    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN)
