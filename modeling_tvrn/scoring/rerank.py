"""Two stages: a shortlist by embeddings, reranked by the pair score; its recalls and what they cost."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..metrics import RetrievalMetrics, mean_metrics, positive_pairs, shortlist_ranks
from ..metrics.ranking import Ranks, check_scores
from .blocks import check_galleries, pair_bar
from .models import Gallery, PairModel, evaluating, match, wide

SHORTLIST_QUERIES = 1024  # queries whose cosines with the whole gallery are held at once


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
) -> SearchMetrics:
    """Each query's `shortlist_size` nearest candidates by cosine of the embeddings, ranked by the pair score.

    Both directions: captions among images and images among captions; a pair in both shortlists is scored once. Each
    query is ranked within its own shortlist, as a search would; one whose shortlist holds nothing right comes after
    every wrong candidate of the gallery.

    Args:
        model: With `match`; see `average` for several.
        images: I encoded images with `embeds`.
        texts: T encoded texts with `embeds`.
        caption_image_rows: (T,) row of each caption's image.
        shortlist_size: Candidates a query; where one side is smaller than that, all of it.
        chunk_size: Pairs scored at a time (default: the model's own).
        progress: Show a progress bar with the time left, if it takes longer than a moment.

    Returns:
        `SearchMetrics`: `RetrievalMetrics` with `costs`.

    Raises:
        ValueError: If `shortlist_size` is below 1 or beyond both galleries, or as `rank`.
    """
    check_galleries(images, texts, chunk_size)
    pairs = positive_pairs(len(images), len(texts), caption_image_rows)
    if not 1 <= shortlist_size <= max(len(images), len(texts)):
        raise ValueError(
            f"shortlist_size is {shortlist_size}; expected at least 1 and at most the larger gallery"
            f" ({len(images)} images, {len(texts)} captions)."
        )
    started = time.perf_counter()
    with evaluating(model):
        left, right = images.embeds, texts.embeds
        captions_of = _nearest(left, right, shortlist_size)
        images_of = _nearest(right, left, shortlist_size)
        searched = time.perf_counter()
        lists = _Shortlists(captions_of, images_of)
        scores = lists.score(model, images, texts, chunk_size, progress)
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


def _nearest(queries: Tensor, candidates: Tensor, size: int) -> np.ndarray:
    """(Q, K) numbers of each query's nearest candidates, nearest first."""
    found = []
    for block in queries.split(SHORTLIST_QUERIES):
        cosines = wide(block) @ wide(candidates).T
        if not cosines.isfinite().all():
            raise ValueError("An embedding is NaN or infinite; look for a NaN in the model's inputs.")
        found.append(cosines.topk(min(size, len(candidates)), dim=1).indices.cpu())
    return torch.cat(found).numpy()


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

    def score(
        self, model: PairModel, images: Gallery, texts: Gallery, chunk_size: int | None, progress: bool
    ) -> Tensor:
        """(n,) scores of the different pairs, image by image: one image with all of its captions is a dense block."""
        bounds = np.searchsorted(self.codes, np.arange(self.image_count + 1) * self.caption_count)
        parts = []
        with pair_bar(len(self.codes), progress) as bar:
            for row, (start, end) in enumerate(itertools.pairwise(bounds)):
                captions = self.codes[start:end] % self.caption_count
                image = images.select(torch.tensor([row]))
                scores = match(model, image, texts.select(torch.from_numpy(captions)), chunk_size)
                check_scores(scores, np.array([row]), captions)
                parts.append(scores[0])
                bar.update(end - start)
        return torch.cat(parts)

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
