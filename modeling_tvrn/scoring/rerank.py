"""Two stages: a shortlist by embeddings, reranked by the pair score; its recalls and what they cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..metrics import RetrievalMetrics, mean_metrics, positive_pairs, shortlist_ranks
from ..metrics.ranking import Ranks
from .blocks import check_galleries, pair_bar
from .gathered import ChosenPairs, score_pairs
from .models import Gallery, PairModel, evaluating, model_device, precision, wide
from .plan import DEFAULT_MEMORY_BUDGET
from .processes import Processes
from .threads import keep_freed_memory

SHORTLIST_QUERIES = 1024  # queries whose cosines with the whole gallery are held at once, if the memory budget allows
COSINE_BYTES = 24  # a cosine in float32, and what finding the largest of them takes


@dataclass(frozen=True)
class SearchCosts:
    """What a search cost, and what its first stage lost.

    Attributes:
        shortlist_size: Candidates of each query that the pair score sees.
        image_to_text_shortlist_recall: Share of images with any of their captions in the shortlist, percent: what
            reranking can't repair.
        text_to_image_shortlist_recall: The same for captions.
        shortlist_seconds: Wall time of the embeddings' search, both directions.
        rerank_seconds: Wall time of scoring the shortlists.
        pairs_scored: Different pairs scored; one in both directions' shortlists counts once.
        pairs_total: Images × captions, what exhaustive scoring computes.
    """

    shortlist_size: int
    image_to_text_shortlist_recall: float
    text_to_image_shortlist_recall: float
    shortlist_seconds: float
    rerank_seconds: float
    pairs_scored: int
    pairs_total: int

    @property
    def seconds(self) -> float:
        """Wall time of both stages."""
        return self.shortlist_seconds + self.rerank_seconds

    def as_dict(self) -> dict[str, float]:
        """All attributes by name, and `seconds`."""
        return dataclasses.asdict(self) | {"seconds": self.seconds}


@dataclass(frozen=True)
class SearchMetrics(RetrievalMetrics):
    """`RetrievalMetrics` of a two-stage search, with its costs."""

    costs: SearchCosts

    def as_dict(self) -> dict[str, float]:
        """The metrics' names and the costs'."""
        return super().as_dict() | self.costs.as_dict()


def search_then_rerank(
    model: PairModel,
    images: Gallery,
    texts: Gallery,
    caption_image_rows: Sequence[int] | np.ndarray | Tensor,
    shortlist_size: int = 128,
    chunk_size: int | None = None,
    progress: bool = True,
    *,
    memory_budget: float = DEFAULT_MEMORY_BUDGET,
    dtype: torch.dtype | None = None,
    share: bool = True,
) -> SearchMetrics:
    """Each query's `shortlist_size` nearest candidates by cosine of the embeddings, ranked by the pair score.

    Both directions: captions among images and images among captions; a pair in both shortlists is scored once. Each
    query is ranked within its own shortlist, as a search would; one whose shortlist holds nothing right comes after
    every wrong candidate of the gallery. Where torch.distributed is initialised its processes share both stages out.

    Args:
        model: With `match`; see `average` for several.
        images: I encoded images with `embeds`.
        texts: T encoded texts with `embeds`.
        caption_image_rows: (T,) row of each caption's image.
        shortlist_size: Candidates a query; where one side is smaller than that, all of it.
        chunk_size: Pairs scored at a time (default: the model's own).
        progress: Show a progress bar with the time left, if it takes longer than a moment.
        memory_budget: Gigabytes for the cosines held at once.
        dtype: Of the pair scores: `torch.float32`, `torch.bfloat16` (autocast), or None for the model's own.
        share: False where one of several processes searches alone.

    Returns:
        `SearchMetrics`: `RetrievalMetrics` with `costs`.

    Raises:
        ValueError: If `shortlist_size` is below 1 or beyond both galleries, or as `rank`.
    """
    check_galleries(model, images, texts, chunk_size)
    pairs = positive_pairs(len(images), len(texts), caption_image_rows)
    if not 1 <= shortlist_size <= max(len(images), len(texts)):
        raise ValueError(
            f"shortlist_size is {shortlist_size}; expected at least 1 and at most the larger gallery"
            f" ({len(images)} images, {len(texts)} captions)."
        )
    processes = Processes(share)
    processes.check_same("galleries or settings", f"{len(images)} × {len(texts)}, shortlist of {shortlist_size}")
    device = model_device(model) or images.embeds.device
    started = time.perf_counter()
    keep_freed_memory()
    with evaluating(model), precision(model, dtype, device):
        left, right = images.embeds, texts.embeds
        captions_of = _nearest(left, right, shortlist_size, memory_budget, processes)
        images_of = _nearest(right, left, shortlist_size, memory_budget, processes)
        searched = time.perf_counter()
        lists = _Shortlists(captions_of, images_of)
        chosen = ChosenPairs(lists.codes // len(texts), lists.codes % len(texts))
        with pair_bar(len(chosen) // processes.count, progress and processes.rank == 0) as bar:
            scores = score_pairs(model, images, texts, chosen, chunk_size, dtype, processes, bar)
    finished = time.perf_counter()
    ranks, found = lists.ranks(scores, pairs)
    costs = SearchCosts(
        shortlist_size=shortlist_size,
        image_to_text_shortlist_recall=found[0],
        text_to_image_shortlist_recall=found[1],
        shortlist_seconds=searched - started,
        rerank_seconds=finished - searched,
        pairs_scored=len(scores),
        pairs_total=len(images) * len(texts),
    )
    return SearchMetrics.from_ranks(ranks, costs=costs)


def _nearest(queries: Tensor, candidates: Tensor, size: int, memory_budget: float, processes: Processes) -> np.ndarray:
    """(Q, K) numbers of each query's nearest candidates, nearest first."""
    size = min(size, len(candidates))
    step = int(max(1, min(SHORTLIST_QUERIES, memory_budget * 1e9 // (COSINE_BYTES * len(candidates)))))
    nearest = torch.zeros(len(queries), size, dtype=torch.int64)
    right = wide(candidates).T
    with processes.together(), torch.autocast(queries.device.type, enabled=False):
        for start in processes.mine(range(0, len(queries), step)):
            cosines = wide(queries[start : start + step]) @ right.to(queries.device)
            if not cosines.isfinite().all():
                raise ValueError("An embedding is NaN or infinite; look for a NaN in the model's inputs.")
            nearest[start : start + step] = cosines.topk(size, dim=1).indices.cpu()
    return processes.sum(nearest).numpy()


class _Shortlists:
    """Both directions' shortlists, (I, K) captions and (T, K') images, and the different pairs in them."""

    def __init__(self, captions_of: np.ndarray, images_of: np.ndarray):
        self.captions_of, self.images_of = captions_of, images_of
        self.image_count, self.caption_count = len(captions_of), len(images_of)
        left = np.arange(self.image_count)[:, None] * self.caption_count + captions_of
        right = images_of * self.caption_count + np.arange(self.caption_count)[:, None]
        self.codes, places = np.unique(np.concatenate([left.ravel(), right.ravel()]), return_inverse=True)
        self.image_places = places[: left.size].reshape(left.shape)
        self.caption_places = places[left.size :].reshape(right.shape)

    def ranks(self, scores: Tensor, pairs: np.ndarray) -> tuple[Ranks, tuple[float, float]]:
        """Ranks both ways, and the shortlists' own recall in percent."""
        caption_counts = torch.from_numpy(np.bincount(pairs[:, 0], minlength=self.image_count))
        image_of = np.empty(self.caption_count, dtype=np.int64)
        image_of[pairs[:, 1]] = pairs[:, 0]
        scores = scores.cpu()
        right_captions = torch.from_numpy(image_of[self.captions_of] == np.arange(self.image_count)[:, None])
        right_images = torch.from_numpy(self.images_of == image_of[:, None])
        by_image = shortlist_ranks(scores[self.image_places], right_captions, self.caption_count, caption_counts)
        ones = torch.ones(self.caption_count, dtype=torch.int64)
        by_caption = shortlist_ranks(scores[self.caption_places], right_images, self.image_count, ones)
        both = Ranks(
            image_to_text=by_image.image_to_text,
            text_to_image=by_caption.text_to_image,
            ties=by_image.ties + by_caption.ties,
            image_to_text_unscored=by_image.image_to_text_unscored,
            text_to_image_unscored=by_caption.text_to_image_unscored,
        )
        return both, (_percent(right_captions), _percent(right_images))


def _percent(right: Tensor) -> float:
    return 100.0 * float(right.any(dim=1).double().mean())


def mean_search(parts: Sequence[SearchMetrics]) -> SearchMetrics:
    """The mean of several galleries' searches (COCO 1K's folds): recalls averaged, costs summed."""
    mean, costs = mean_metrics(parts), [part.costs for part in parts]
    total = SearchCosts(
        shortlist_size=costs[0].shortlist_size,
        image_to_text_shortlist_recall=float(np.mean([each.image_to_text_shortlist_recall for each in costs])),
        text_to_image_shortlist_recall=float(np.mean([each.text_to_image_shortlist_recall for each in costs])),
        shortlist_seconds=sum(each.shortlist_seconds for each in costs),
        rerank_seconds=sum(each.rerank_seconds for each in costs),
        pairs_scored=sum(each.pairs_scored for each in costs),
        pairs_total=sum(each.pairs_total for each in costs),
    )
    return SearchMetrics(**{name: getattr(mean, name) for name in RetrievalMetrics.__dataclass_fields__}, costs=total)
