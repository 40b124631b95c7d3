"""A block dealt out to a CPU's cores, each of which scores its share on its own, in memory that is used again.

The tensors of a chunk are small, so that they stay in a core's cache; split over the cores operator by operator, each
part is too small to be worth the meeting at its end. One core a share meets once a block instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from .models import AveragedModel, PairModel, match

Item = TypeVar("Item")
LEAST_PAIRS = 2048  # a core: fewer are done before its thread is at work
MOST_THREADS = 16  # beyond, Python's own lock would keep them waiting
LEAST_IMAGES = 4  # a core, so that its chunks hold several
LARGEST_THRESHOLD = 32 * 2**20  # bytes; the C library (glibc) learns no larger one


def match_on_cores(model: PairModel, images: Any, texts: Any, chunk_size: int | None = None) -> Tensor:
    """`match`, (I, T), on as many cores as torch is set to use; the same scores, up to rounding.

    On another device than the CPU, for few pairs, or for a model that is no `torch.nn.Module` it is `match` itself.
    """
    count = min(cores_for(model, images, len(images) * len(texts)), len(texts))
    if count < 2:
        return match(model, images, texts, chunk_size)
    parts = list(each_on_a_core(lambda share: match(model, *share, chunk_size), _shares(images, texts, count), count))
    return torch.cat(parts, dim=0 if len(parts[0]) < len(images) else 1)


def cores_for(model: PairModel, images: Any, pairs: int) -> int:
    """On how many cores so many pairs are scored side by side; 1 where torch's own threads do better."""
    known = isinstance(model, torch.nn.Module | AveragedModel)
    if not known or images.embeds.device.type != "cpu" or torch.is_grad_enabled():
        return 1
    return max(1, min(torch.get_num_threads(), MOST_THREADS, pairs // LEAST_PAIRS))


def each_on_a_core(function: Callable[[Item], Tensor], items: Iterable[Item], count: int) -> Iterator[Tensor]:
    """`function` of each item, in their order, `count` at a time, each with one thread of torch's."""
    if count < 2:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    half, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run(item: Item) -> Tensor:
        torch.set_num_threads(1)  # of this thread
        # Both modes belong to a thread. Each would empty the other's cache of converted weights.
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=half, cache_enabled=False):
            return function(item)

    try:
        with ThreadPoolExecutor(count) as pool:
            yield from pool.map(run, items)
    finally:
        torch.set_num_threads(threads)  # what threads started from now on begin with


def _shares(images: Any, texts: Any, count: int) -> list[tuple[Any, Any]]:
    """Some of the images and all captions, or if there are few images all of these and some of the captions.

    Of more captions, those that are scored together differ less in length: less is padding.
    """
    whole = len(images) if len(images) >= LEAST_IMAGES * count else len(texts)
    rows = [slice(whole * k // count, whole * (k + 1) // count) for k in range(count)]
    if whole == len(images):
        return [(images.select(each), texts) for each in rows]
    return [(images, texts.select(each)) for each in rows]


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep what a chunk frees for the next one, up to 64 MiB a thread.

    It gives free memory beyond twice the largest block that was ever freed back to the system, and a chunk then gets
    it anew, page by page: that has taken 40 % of a chunk's time. So it is shown a large block, which is never written.
    """
    torch.empty(LARGEST_THRESHOLD - 2**16, dtype=torch.uint8, device="cpu")
