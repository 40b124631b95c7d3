"""A frozen text tower's outputs, computed once a caption, kept on disk in half precision, read by caption."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..storage.arrays import LENGTHS, ArrayStore, StoredCache, StoreWriter, check_space, finished_store
from ..storage.files import BUILD_LOCK, locked
from ..storage.fingerprints import module_fingerprint, tokenizer_digest
from .extraction import evaluating

logger = logging.getLogger(__name__)

FEATURES, WORDS, EMBEDS = "text_features", "word_mask", "text_embeds"
MEASURED = 64  # captions from which the size of a cache is told beforehand

Arrays = dict[str, np.ndarray | Sequence[np.ndarray]]


class CaptionCache(StoredCache):
    """Token outputs of captions, which of the tokens are words, and of a dual encoder the embeddings; memory-mapped.

    On disk 2 bytes a feature of every token: 30,000 captions of 14 tokens of 384 features take 320 MB. In memory 16
    bytes a caption.

    Attributes:
        fingerprint: What the outputs were made from, as `caption_fingerprint` gives it.
        info: How they were made; decides nothing.
    """

    def __init__(self, store: ArrayStore) -> None:
        if not {FEATURES, WORDS} <= store.layout.keys():
            raise ValueError(
                f"the store in {str(store.directory)!r} is no caption cache: it holds {sorted(store.layout)}, "
                f"expected {FEATURES} and {WORDS}; give another folder"
            )
        super().__init__(store)

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        captions: Iterable[str],
        directory: str | os.PathLike,
        *,
        batch_size: int = 128,
        shard_size: int = 4096,
        progress: bool = True,
    ) -> "CaptionCache":
        """Run the model's text tower once over each different caption that the folder's cache lacks.

        A build that was killed continues, a finished one is opened, one of fewer captions is extended. Only one
        process builds in a folder; others wait until it is done.

        Args:
            model: A TVRNModel whose text tower is frozen; its device and the ambient autocast are used.
            processor: Its processor.
            captions: All that will be asked for; repeated ones are stored once.
            directory: The cache's folder, made if need be.
            batch_size: Captions a forward pass, of nearly equal length.
            shard_size: Captions a file, and so the most that a kill loses.
            progress: Show a progress bar on a terminal.

        Raises:
            StaleStoreError: If the folder's cache was made from something else; with both values.
            ValueError: If the tower is not frozen or not there, or an output does not fit half precision.
            OSError: If the disk has no room for the cache.
        """
        _check_frozen(model)
        made_from = caption_fingerprint(model, processor)
        # Captions of nearly equal length share a batch, so that little of it is padding.
        wanted = sorted(set(captions), key=lambda caption: (len(caption), caption))
        with locked(Path(directory) / BUILD_LOCK, wait=True), evaluating(model):
            finished = finished_store(directory, made_from)
            if finished is not None:
                if not (missing := cls(finished).missing(wanted)):
                    return cls(finished)
                counts = f"{len(missing)} of this run's {len(wanted)} captions"
                logger.info("%s: the cache lacks %s, which are added", os.fspath(directory), counts)
            writer = StoreWriter(directory, made_from, shard_size)
            known = set(writer.ids)
            new = [caption for caption in wanted if caption not in known]
            _check_space(model, processor, new, directory)
            with tqdm(total=len(new), unit="caption", desc="caption cache", disable=None if progress else True) as bar:
                for start in range(0, len(new), batch_size):
                    batch = new[start : start + batch_size]
                    writer.append(batch, _outputs(model, processor, batch))
                    bar.update(len(batch))
            device = model.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
            computed_in = f"{str(dtype).removeprefix('torch.')} on {device}"
            return cls(writer.finish({"tower": _tower(model).config.name_or_path, "computed_in": computed_in}))

    def missing(self, captions: Sequence[str]) -> list[str]:
        """Those of the captions that are not in the cache."""
        return [captions[place] for place in np.flatnonzero(~self.store.has(captions)).tolist()]

    def __contains__(self, caption: object) -> bool:
        return isinstance(caption, str) and caption in self.store

    def __getitem__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What `encode_texts` takes in place of token ids, of T captions; only these are read.

        Returns:
            `text_features` (T, W, F) float16, `attention_mask` and `word_mask` (T, W), and of a dual encoder
            `text_embeds` (T, P) float32.

        Raises:
            KeyError: If a caption is not in the cache; the message names it.
        """
        found = self.store[captions]
        attended = np.arange(found[FEATURES].shape[1]) < found[FEATURES + LENGTHS][:, None]
        arrays = {FEATURES: found[FEATURES], "attention_mask": attended.astype(np.int64)}
        arrays[WORDS] = found[WORDS].astype(np.int64)
        if EMBEDS in found:
            arrays[EMBEDS] = found[EMBEDS]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def __repr__(self) -> str:
        [features] = self.store.layout[FEATURES][1]
        return f"CaptionCache({str(self.store.directory)!r}, captions={len(self)}, features={features})"


def caption_fingerprint(model: Any, processor: Any) -> dict[str, Any]:
    """What a caption cache for this model and processor must have been made from.

    How the numbers were computed is left open: half precision holds less than float32 and bfloat16 differ by.
    """
    tokenizer = processor.tokenizer
    return {
        # A dual encoder's vision side may learn, or have adapters, beside a text side that is frozen.
        "tower": module_fingerprint(_tower(model), without=("vision_model.", "visual_projection.")),
        "tokens": {
            "tokenizer_sha256": tokenizer_digest(tokenizer),
            "special_tokens": {role: str(token) for role, token in tokenizer.special_tokens_map.items()},
            "max_length": min(processor.max_text_length, tokenizer.model_max_length),
            "padding": processor.text_padding,
        },
        # Of a dual encoder the words alone: SigLIP's captions are padding to three quarters.
        "computed": "words and embedding" if model.dual_encoder is not None else "attended tokens",
    }


def _tower(model: Any) -> Any:
    return model.text_model if model.dual_encoder is None else model.dual_encoder


def _check_frozen(model: Any) -> None:
    tower = model.config.text_tower_config
    if tower is None or not model.config.keeps("text"):
        raise ValueError(
            "the text outputs to cache need a frozen text tower; this model has "
            f"{'none' if tower is None else 'one that learns'}: set text=… and model.freeze_text=true (over a "
            "dual encoder model.freeze_first_stage=true as well)"
        )


def _check_space(model: Any, processor: Any, captions: Sequence[str], directory: str | os.PathLike) -> None:
    """Refuse a cache that its disk has no room for, by the size of some captions of every length."""
    if not captions:
        return
    some = captions[:: -(-len(captions) // MEASURED)]
    # A list of ragged items and an array both iterate over items.
    size = sum(item.nbytes for array in _outputs(model, processor, some).values() for item in array)
    check_space(directory, size * len(captions) / len(some))


@torch.no_grad()
def _outputs(model: Any, processor: Any, captions: Sequence[str]) -> Arrays:
    """What is stored of T captions: ragged features (W, F) and words (W,) of their attended tokens, embeddings (T, P).

    Raises:
        ValueError: If a feature does not fit half precision; names its caption.
    """
    inputs = processor(text=list(captions)).to(model.device)
    found = model.extract_text_features(inputs["input_ids"], inputs.get("attention_mask"))
    features, words = found[FEATURES].half().cpu(), inputs["word_mask"].bool().cpu()
    attended = words if EMBEDS in found else inputs["attention_mask"].bool().cpu()
    wrong = ~(torch.isfinite(features).all(dim=2) | ~attended).all(dim=1)
    if wrong.any():
        raise ValueError(
            f"the text tower's outputs of {captions[int(wrong.nonzero()[0])]!r:.80} leave half precision's range; run "
            "the tower live (text_features=null)"
        )
    kept = list(attended)
    arrays: Arrays = {
        FEATURES: [values[mask].numpy() for values, mask in zip(features, kept, strict=True)],
        WORDS: [values[mask].numpy() for values, mask in zip(words, kept, strict=True)],
    }
    return arrays | ({EMBEDS: found[EMBEDS].float().cpu().numpy()} if EMBEDS in found else {})
