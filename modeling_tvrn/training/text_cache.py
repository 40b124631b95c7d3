"""A frozen text tower's outputs, computed once a caption and kept in memory in half precision."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BatchFeature

logger = logging.getLogger(__name__)

__all__ = ["CachedTextProcessor"]


class CachedTextProcessor:
    """A processor whose text side returns the tower's stored outputs instead of token ids.

    It stands in for the processor wherever one is called with captions that were cached: collator and evaluation.
    Memory: 2 bytes a feature of every token; 30,000 captions of 14 tokens of 384 features take 320 MB.

    Args:
        processor: the processor that it stands in for; everything but text goes to it.
        features: (N, F) float16, the tokens of all captions one after another.
        words: (N,) bool, which of the tokens are words to match.
        spans: caption -> its first token and the one past its last.
        embeds: of a dual encoder, caption -> its embedding (P,).
    """

    def __init__(
        self,
        processor: Any,
        features: Tensor,
        words: Tensor,
        spans: dict[str, tuple[int, int]],
        embeds: dict[str, Tensor] | None = None,
    ) -> None:
        self.processor = processor
        self.features = features
        self.words = words
        self.spans = spans
        self.embeds = embeds or {}

    @classmethod
    def build(
        cls, model: Any, processor: Any, captions: Iterable[str], batch_size: int = 128, progress: bool = True
    ) -> CachedTextProcessor:
        """Run the model's text tower once over each different caption.

        Args:
            model: a TVRNModel whose text tower is frozen; its device and the ambient autocast are used.
            processor: its processor.
            captions: all captions that will be asked for; repeated ones are stored once.
            batch_size: captions a forward pass, of nearly equal length.

        Raises:
            ValueError: the tower is not frozen or not there, or a feature does not fit half precision.
        """
        tower, config = model.config.text_tower_config, model.config
        learns = not config.freeze_text or (model.dual_encoder is not None and not config.freeze_first_stage)
        if tower is None or learns:
            raise ValueError(
                "the text outputs to cache need a frozen text tower; this model has "
                f"{'none' if tower is None else 'one that learns'}: set text=… and model.freeze_text=true (over a "
                "dual encoder model.freeze_first_stage=true as well)"
            )
        different = sorted(set(captions), key=len)
        spans: dict[str, tuple[int, int]] = {}
        embeds: dict[str, Tensor] = {}
        features, words, end = [], [], 0
        for batch in _batches(different, batch_size, progress):
            hidden, attended, word_mask, embedded = _run_tower(model, processor, batch)
            if embedded is not None:
                embeds |= dict(zip(batch, embedded, strict=True))
            lengths = attended.sum(dim=1).tolist()
            features.append(hidden[attended])
            words.append(word_mask[attended])
            for caption, length in zip(batch, lengths, strict=True):
                spans[caption] = (end, end + length)
                end += length
        with torch.autocast("cpu", enabled=False):  # which knows no half precision to join
            stored = torch.cat(features)
        if not torch.isfinite(stored).all():
            raise ValueError("the text tower's outputs leave half precision's range; set cache_text_features=false")
        logger.info("cached the text tower's outputs of %d captions, %.0f MB", len(spans), stored.nbytes / 2**20)
        return cls(processor, stored, torch.cat(words), spans, embeds)

    def __call__(self, text: str | Sequence[str] | None = None, **inputs: Any) -> BatchFeature:
        """As the processor, with `text_features (T, W, F)`, of a dual encoder and `text_embeds`, for `input_ids`."""
        rest = {name: value for name, value in inputs.items() if value is not None and name != "return_tensors"}
        batch = self.processor(**inputs) if rest else BatchFeature()
        if text is not None:
            batch.update(self._stored([text] if isinstance(text, str) else text))
        return batch

    def _stored(self, captions: Sequence[str]) -> dict[str, Tensor]:
        missing = [caption for caption in captions if caption not in self.spans]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(captions)} captions are not in the cache of text features, the first is "
                f"{missing[0]!r}; build it over all captions of this run, or use the plain processor (`.processor`)"
            )
        spans = np.array([self.spans[caption] for caption in captions])
        lengths = spans[:, 1] - spans[:, 0]
        columns = np.arange(lengths.max())
        attended = columns < lengths[:, None]
        rows = torch.from_numpy(np.where(attended, spans[:, :1] + columns, 0))
        attention_mask = torch.from_numpy(attended)
        features = self.features[rows].masked_fill_(~attention_mask.unsqueeze(-1), 0.0)
        word_mask = self.words[rows] & attention_mask
        found = {"text_features": features, "attention_mask": attention_mask.long(), "word_mask": word_mask.long()}
        if self.embeds:
            found["text_embeds"] = torch.stack([self.embeds[caption] for caption in captions])
        return found

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # not set yet: while being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.processor, name)


def _batches(captions: list[str], batch_size: int, progress: bool) -> Iterator[list[str]]:
    starts = range(0, len(captions), batch_size)
    for start in tqdm(starts, desc="text features", disable=None if progress else True, leave=False):
        yield captions[start : start + batch_size]


@torch.no_grad()
def _run_tower(model: Any, processor: Any, captions: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states (T, W, F) float16, attended positions and words (T, W) bool, embeddings (T, P), on the CPU.

    Of a dual encoder, whose embeddings come apart, the words alone count as attended: SigLIP's captions are padding to
    three quarters.
    """
    inputs = processor(text=captions).to(model.device)
    found = model.extract_text_features(inputs["input_ids"], inputs.get("attention_mask"))
    hidden, embeds = found["text_features"].half().cpu(), found.get("text_embeds")
    word_mask = inputs["word_mask"].bool().cpu()
    if embeds is not None:
        return hidden, word_mask, word_mask, embeds.float().cpu()
    return hidden, inputs["attention_mask"].bool().cpu(), word_mask, None
