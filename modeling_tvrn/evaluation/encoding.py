"""From records to encoded galleries: every image and every caption through the model once."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from ..data.training_pairs import image_inputs
from ..encoded_tvrn import EncodedImages, EncodedTexts
from ..scoring.models import evaluating
from ..scoring.ragged import RaggedTexts
from .captions import CaptionTable


def encode_dataset(
    model: Any, processor: Any, records: Any, batch_size: int = 64, num_workers: int = 0, progress: bool = True
) -> tuple[EncodedImages, EncodedTexts, np.ndarray]:
    """Encode every image and every caption of some records once.

    Args:
        model: A `TVRNModel`; dropout is off while it encodes.
        processor: Its processor.
        records: Of `load_pairs`, map-style or a stream, with pictures or with region features; or a list of records.
        batch_size: Images, and captions, encoded at a time.
        num_workers: Processes that decode pictures (of map-style records).
        progress: Show a progress bar with the time left, if it takes longer than a moment.

    Returns:
        I encoded images, T encoded texts (captions image by image), and (T,) the row of each caption's image.

    Raises:
        ValueError: If there are no images, an image has no caption, or an id occurs twice.
    """
    table = CaptionTable.of(records)
    if table is not None:
        table.check()
    images, read = encode_images(model, processor, records, batch_size, num_workers, progress)
    table = table if table is not None else read
    table.check()
    texts = encode_captions(model, processor, table.flat_captions, batch_size, progress)
    return images, texts.select(slice(None)), table.caption_image_rows


def encode_images(
    model: Any, processor: Any, records: Any, batch_size: int = 64, num_workers: int = 0, progress: bool = True
) -> tuple[EncodedImages, CaptionTable]:
    """Encode the images of some records in one pass; the table of their captions comes out of the same pass."""
    count = len(records) if hasattr(records, "__len__") else None
    table, parts = CaptionTable(), []
    with evaluating(model), _bar(count, "images", progress) as bar:
        for batch in _batches(records, batch_size, num_workers, _Prepare(processor)):
            parts.append(model.encode_images(**to_device(batch.inputs, model)))
            table.extend(batch.texts)
            bar.update(len(batch.texts))
    table.check()
    return EncodedImages.cat(parts), table


def encode_captions(
    model: Any,
    processor: Any,
    captions: Sequence[str],
    batch_size: int = 64,
    progress: bool = True,
    truncation: bool | None = None,
) -> RaggedTexts:
    """Encode captions, in their order and without padding: one long caption does not widen all others.

    With `truncation=True` nobody is told of those that are cut: of made-up texts.
    """
    with evaluating(model), _bar(len(captions), "captions", progress) as bar:
        return RaggedTexts.collect(_encoded_captions(model, processor, captions, batch_size, truncation, bar))


def _encoded_captions(
    model: Any, processor: Any, captions: Sequence[str], batch_size: int, truncation: bool | None, bar: Any
) -> Iterator[tuple[EncodedTexts, list[int]]]:
    # Captions of one length together, so that little of a batch is padding; long and short batches mixed, so that the
    # rate is the same from the first to the last, and the bar's time left is right.
    lengths = _lengths(processor, captions)
    places = sorted(range(len(captions)), key=lengths.__getitem__)
    batches = [places[first : first + batch_size] for first in range(0, len(places), batch_size)]
    random.Random(0).shuffle(batches)
    for numbers in batches:
        inputs = processor(text=[captions[place] for place in numbers], truncation=truncation, return_tensors="pt")
        yield model.encode_texts(**to_device(inputs, model)), numbers
        bar.update(len(numbers))


def _lengths(processor: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption; characters, which leave a fifth of a batch to padding, where they can't be counted."""
    try:
        return [len(ids) for ids in processor.tokenizer(list(captions), padding=False, verbose=False)["input_ids"]]
    except (AttributeError, IndexError, TypeError, ValueError):  # what is wrong with a caption its own batch says
        return [len(caption) for caption in captions]


class _Batch:
    """A batch of processed images, and the same records without them."""

    def __init__(self, inputs: Mapping[str, Any], texts: list[dict[str, Any]]):
        self.inputs, self.texts = inputs, texts


class _Prepare:
    """Decoded records to model inputs; where workers decode, it runs there."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, records: list[Mapping[str, Any]]) -> _Batch:
        inputs = self.processor(**image_inputs(records), return_tensors="pt")  # type: ignore[arg-type]
        names = ("captions", "image_id", "caption_ids", "split")
        return _Batch(dict(inputs), [{name: record[name] for name in names if name in record} for record in records])


class _Stream(IterableDataset):
    """Any iterable of records, for a data loader."""

    def __init__(self, records: Iterable[Mapping[str, Any]]):
        self.records = records

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.records)


def _batches(records: Any, batch_size: int, num_workers: int, prepare: _Prepare) -> Iterator[_Batch]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    map_style = hasattr(records, "__len__") and hasattr(records, "__getitem__")
    # Workers of a stream would each read it whole, or return it in another order.
    loader: DataLoader = DataLoader(
        records if map_style else _Stream(records),
        batch_size=batch_size,
        num_workers=num_workers if map_style else 0,
        collate_fn=prepare,
    )
    return iter(loader)


def to_device(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A processor's output where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def _bar(total: int | None, what: str, progress: bool) -> contextlib.AbstractContextManager[tqdm]:
    return tqdm(total=total, desc=what, unit=f" {what}", delay=2.0, leave=False, disable=None if progress else True)
