"""A block's captions dealt out to a CPU's cores, each of which scores its share on its own.

The tensors of a chunk are small, so that they stay in a core's cache; split over the cores operator by operator, each
part is too small to be worth the meeting at its end. One core a share meets once a block instead.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .models import AveragedModel, PairModel, match

LEAST_PAIRS = 2048  # a core: fewer are done before its thread is at work
MOST_THREADS = 16  # beyond, Python's own lock would keep them waiting


def match_on_cores(model: PairModel, images: Any, texts: Any, chunk_size: int | None = None) -> Tensor:
    """`match`, (I, T), on as many cores as torch is set to use; the same scores, up to rounding.

    On another device than the CPU, for few pairs, or for a model that is no `torch.nn.Module` it is `match` itself.
    """
    threads = torch.get_num_threads()
    count = min(threads, MOST_THREADS, len(texts), len(images) * len(texts) // LEAST_PAIRS)
    known = isinstance(model, torch.nn.Module | AveragedModel)
    if count < 2 or not known or images.embeds.device.type != "cpu" or torch.is_grad_enabled():
        return match(model, images, texts, chunk_size)
    shares = [torch.arange(start, len(texts), count) for start in range(count)]
    half, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def score(share: Tensor) -> Tensor:
        torch.set_num_threads(1)  # of this thread
        # Both modes belong to a thread. Each would empty the other's cache of converted weights.
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=half, cache_enabled=False):
            return match(model, images, texts.select(share), chunk_size)

    try:
        with ThreadPoolExecutor(count) as pool:
            parts = list(pool.map(score, shares))
    finally:
        torch.set_num_threads(threads)  # what threads started from now on begin with
    scores = parts[0].new_empty(len(images), len(texts))
    for share, part in zip(shares, parts, strict=True):
        scores[:, share] = part
    return scores
