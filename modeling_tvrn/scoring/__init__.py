"""Scores and exact ranks over encoded galleries: blocks, streamed ranks, shortlist and rerank, averaged models."""

from .blocks import rank, score_matrix
from .models import AveragedGallery, AveragedModel, EmbeddingScore, Gallery, PairModel, average
from .ragged import RaggedTexts
from .rerank import SearchCosts, SearchMetrics, mean_search, search_then_rerank

__all__ = [
    "AveragedGallery",
    "AveragedModel",
    "EmbeddingScore",
    "Gallery",
    "PairModel",
    "RaggedTexts",
    "SearchCosts",
    "SearchMetrics",
    "average",
    "mean_search",
    "rank",
    "score_matrix",
    "search_then_rerank",
]
