"""Image–text retrieval metrics: exact ranks, R@K and rSum in percent, chance, uni-modal recall, paired bootstrap."""

from pathlib import Path

from .accuracy import Accuracy, accuracy_table
from .bootstrap import BootstrapComparison, paired_bootstrap
from .graded import GradedMetrics, graded_metrics, kendall_tau_c
from .ranking import RankCounter, positive_pairs, shortlist_ranks
from .retrieval import (
    RECALL_AT,
    Recalls,
    RetrievalMetrics,
    chance_level,
    mean_metrics,
    recall_table,
    retrieval_metrics,
)
from .unimodal import UnimodalMetrics, spearman, unimodal_metrics

EVALUATE_FOLDER = str(Path(__file__).with_name("retrieval_metric"))  # evaluate.load(EVALUATE_FOLDER)

__all__ = [
    "EVALUATE_FOLDER",
    "RECALL_AT",
    "Accuracy",
    "BootstrapComparison",
    "GradedMetrics",
    "RankCounter",
    "Recalls",
    "RetrievalMetrics",
    "UnimodalMetrics",
    "accuracy_table",
    "chance_level",
    "graded_metrics",
    "kendall_tau_c",
    "mean_metrics",
    "paired_bootstrap",
    "positive_pairs",
    "recall_table",
    "retrieval_metrics",
    "shortlist_ranks",
    "spearman",
    "unimodal_metrics",
]
