"""Scores of chosen pairs: gathered so that the arithmetic stays as dense as that of whole blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..metrics.ranking import check_scores
from .models import AveragedModel, Gallery, PairModel, at_hand, match, models_of
from .processes import Processes
from .threads import cores_for, each_on_a_core

LENGTH_RATIO = 1.25  # captions gathered together differ in length by at most this: what is wasted on padding


@dataclass(frozen=True)
class ChosenPairs:
    """Some of the pairs of two galleries, image by image.

    Attributes:
        rows: (n,) image rows, ascending.
        columns: (n,) caption numbers.
    """

    rows: np.ndarray
    columns: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _Batch:
    """Images that are scored with as many captions of their own each; the last caption of a list fills it up.

    Attributes:
        rows: (b,) image rows.
        places: (b, m) places in the list of pairs.
        real: (b, m) False where a place only fills up.
    """

    rows: np.ndarray
    places: np.ndarray
    real: np.ndarray


def score_pairs(
    model: PairModel,
    images: Gallery,
    texts: Gallery,
    pairs: ChosenPairs,
    chunk_size: int | None,
    dtype: torch.dtype | None,
    processes: Processes,
    bar: tqdm,
) -> Tensor:
    """(n,) scores of the chosen pairs, on the CPU, in float32 or float64.

    A model with `match_aligned` gets batches of images with as many captions of their own each, of about one length:
    full chunks whatever the size of a shortlist. Another one gets one image with all of its captions at a time.

    Raises:
        ValueError: If a score is NaN or +inf.
    """
    found = np.full(len(pairs), -np.inf)
    doubled = False
    with processes.together():
        if all(hasattr(each, "match_aligned") for each in models_of(model)):
            blocks = _aligned(model, images, texts, pairs, chunk_size, dtype, processes)
        else:
            blocks = _image_by_image(model, images, texts, pairs, chunk_size, processes)
        for places, scores in blocks:
            doubled |= scores.dtype == torch.float64
            _check(scores, pairs, places)
            found[places] = scores.double().cpu().numpy()
            bar.update(len(places))
    # Exactly one process has each score; the others have −inf.
    whole = processes.max(torch.from_numpy(found))
    return whole if bool(processes.max(torch.tensor([float(doubled)]))[0]) else whole.float()


def _check(scores: Tensor, pairs: ChosenPairs, places: np.ndarray) -> None:
    wrong = scores.isnan() | (scores == torch.inf)
    if wrong.any():
        place = places[int(wrong.nonzero()[0, 0])]
        check_scores(scores[wrong][:1, None], pairs.rows[[place]], pairs.columns[[place]])


def _image_by_image(
    model: PairModel,
    images: Gallery,
    texts: Gallery,
    pairs: ChosenPairs,
    chunk_size: int | None,
    processes: Processes,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    rows, starts = np.unique(pairs.rows, return_index=True)
    ends = np.append(starts[1:], len(pairs))
    for row, start, end in processes.mine(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)):
        captions = texts.select(torch.from_numpy(pairs.columns[start:end]))
        image = images.select(slice(row, row + 1))
        yield np.arange(start, end), match(model, image, captions, chunk_size)[0]


def _aligned(
    model: PairModel,
    images: Gallery,
    texts: Gallery,
    pairs: ChosenPairs,
    chunk_size: int | None,
    dtype: torch.dtype | None,
    processes: Processes,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Batches by the captions' length: those of one bucket are taken out of the gallery, without padding, once."""
    buckets = length_buckets(caption_lengths(texts))
    of_pair = buckets[pairs.columns]
    for bucket in np.unique(of_pair).tolist():
        places = np.flatnonzero(of_pair == bucket)
        captions, local = np.unique(pairs.columns[places], return_inverse=True)
        part = at_hand(model, _trim(texts.select(torch.from_numpy(captions))), dtype)
        most = chunk_size or _pairs_at_once(model, part)
        column_of = np.zeros(len(pairs), dtype=np.int64)
        column_of[places] = local
        score = partial(_score_batch, model, images, part, column_of, dtype)
        own = list(processes.mine(batches(pairs.rows, places, most)))
        cores = cores_for(model, images, sum(int(batch.real.sum()) for batch in own))
        for batch, scores in zip(own, each_on_a_core(score, own, cores), strict=True):
            yield batch.places[batch.real], scores


def _score_batch(
    model: PairModel, images: Gallery, texts: Any, column_of: np.ndarray, dtype: torch.dtype | None, batch: _Batch
) -> Tensor:
    """Scores of a batch's own pairs, without what fills it up; `column_of` tells a pair's row in `texts`."""
    block = at_hand(model, images.select(torch.from_numpy(batch.rows)), dtype)
    scores = _match_aligned(model, block, texts.select(torch.from_numpy(column_of[batch.places].ravel())))
    return scores[torch.from_numpy(batch.real).to(scores.device)]


def batches(rows: np.ndarray, places: np.ndarray, most: int) -> Iterator[_Batch]:
    """Pairs packed into batches of at most `most`, images with equally many captions together.

    Args:
        rows: (n,) image rows of all pairs, ascending.
        places: The pairs to pack, ascending.
        most: Pairs of a batch, what fills it up included.
    """
    changes = np.flatnonzero(np.diff(rows[places])) + 1
    runs = [run[start : start + most] for run in np.split(places, changes) for start in range(0, len(run), most)]
    runs.sort(key=len)
    start = 0
    while start < len(runs):
        end = start + 1
        # Runs come shortest first: the newest one decides how wide the batch is.
        while end < len(runs) and (end + 1 - start) * len(runs[end]) <= most:
            end += 1
        chosen, width = runs[start:end], len(runs[end - 1])
        lengths = np.array([len(run) for run in chosen])
        steps = np.minimum(np.arange(width)[None, :], lengths[:, None] - 1)
        packed = np.stack([run[step] for run, step in zip(chosen, steps, strict=True)])
        yield _Batch(rows[packed[:, 0]], packed, np.arange(width)[None, :] < lengths[:, None])
        start = end


def length_buckets(lengths: np.ndarray) -> np.ndarray:
    """(T,) number of each caption's bucket: lengths within one differ by at most `LENGTH_RATIO`."""
    return np.floor(np.log(np.maximum(lengths, 1)) / math.log(LENGTH_RATIO) + 1e-9).astype(np.int64)


def caption_lengths(texts: Any) -> np.ndarray:
    """(T,) words of each caption; of several models' the first one's."""
    while hasattr(texts, "parts") and not hasattr(texts, "lengths"):
        texts = texts.parts[0]
    lengths = texts.lengths if hasattr(texts, "lengths") else texts.word_mask.sum(dim=1).cpu().numpy()
    return np.asarray(lengths)


def _trim(texts: Any) -> Any:
    if hasattr(texts, "parts"):
        return type(texts)([_trim(part) for part in texts.parts])
    return texts.trim()


def _pairs_at_once(model: Any, texts: Any) -> int:
    if isinstance(model, AveragedModel):
        return min(_pairs_at_once(*each) for each in zip(model.models, texts.parts, strict=True))
    return int(model.pairs_at_once(texts))


def _match_aligned(model: Any, images: Any, texts: Any) -> Tensor:
    if isinstance(model, AveragedModel):
        parts = zip(model.models, images.parts, texts.parts, strict=True)
        return model.mean(_match_aligned(*each) for each in parts)
    scores: Tensor = model.match_aligned(at_hand(model, images), at_hand(model, texts))
    return scores
