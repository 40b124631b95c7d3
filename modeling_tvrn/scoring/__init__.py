"""Scores and exact ranks over encoded galleries: blocks, streamed ranks, shortlist and rerank, averaged models."""

from .best import BestCandidates
from .blocks import ScoringOptions, rank, rank_and_list, score_matrix
from .models import AveragedGallery, AveragedModel, EmbeddingScore, Gallery, PairModel, average
from .ragged import RaggedTexts
from .rerank import SearchCosts, SearchMetrics, mean_search, search_then_rerank

__all__ = [
    "AveragedGallery",
    "AveragedModel",
    "BestCandidates",
    "EmbeddingScore",
    "Gallery",
    "PairModel",
    "RaggedTexts",
    "ScoringOptions",
    "SearchCosts",
    "SearchMetrics",
    "average",
    "mean_search",
    "rank",
    "rank_and_list",
    "score_matrix",
    "search_then_rerank",
]
