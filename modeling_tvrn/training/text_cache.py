"""A processor whose text side reads a caption cache in place of running the tower."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import BatchFeature

from ..teachers import CaptionCache, StaleStoreError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import TrainingConfig

logger = logging.getLogger(__name__)

__all__ = ["CachedTextProcessor", "with_cached_captions"]


class CachedTextProcessor:
    """A processor whose text side returns the tower's stored outputs instead of token ids.

    It stands in for the processor wherever one is called with captions that were cached: collator and evaluation.

    Args:
        processor: the processor that it stands in for; everything but text goes to it.
        cache: of all captions that will be asked for.
    """

    def __init__(self, processor: Any, cache: CaptionCache) -> None:
        self.processor = processor
        self.cache = cache

    def __call__(self, text: str | Sequence[str] | None = None, **inputs: Any) -> BatchFeature:
        """As the processor, with `text_features (T, W, F)`, of a dual encoder and `text_embeds`, for `input_ids`."""
        rest = {name: value for name, value in inputs.items() if value is not None and name != "return_tensors"}
        batch = self.processor(**inputs) if rest else BatchFeature()
        if text is not None:
            captions = [text] if isinstance(text, str) else list(text)
            batch.update(self._stored(captions))
        return batch

    def _stored(self, captions: Sequence[str]) -> dict[str, Tensor]:
        try:
            return self.cache[captions]
        except KeyError as error:
            missing = self.cache.missing(captions)
            raise ValueError(
                f"{len(missing)} of {len(captions)} captions are not in the cache of text features, the first is "
                f"{missing[0]!r}; build it over all captions of this run, or use the plain processor (`.processor`)"
            ) from error

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # not set yet: while being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.processor, name)


def with_cached_captions(
    config: TrainingConfig, captions: Sequence[str], model: Any, processor: Any, accelerator: Accelerator
) -> Any:
    """The processor over the configured caption cache, built where captions are missing; as it is where none is named.

    Of several processes the main one builds; what it finds wrong the others then find as well.

    Raises:
        ValueError: the cache was made by another tower or tokenizer: names what differs.
        OSError: the disk has no room for it.
    """
    if config.text_features is None:
        return processor
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    # A CPU without bfloat16 instructions computes it at a fraction of the speed of float32, which is exact besides.
    on_cpu = accelerator.device.type == "cpu"
    try:
        with contextlib.nullcontext() if on_cpu else accelerator.autocast():
            cache = CaptionCache.build(
                model, processor, captions, config.text_features, progress=accelerator.is_local_main_process
            )
    except StaleStoreError as error:
        raise ValueError(f"text_features = {config.text_features!r}: {error}") from error
    finally:
        if accelerator.is_main_process:
            accelerator.wait_for_everyone()
    logger.info("text features of %d captions from %s", len(cache), config.text_features)
    return CachedTextProcessor(processor, cache)
