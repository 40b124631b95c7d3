"""How well scores of image–caption pairs follow human grades: rank correlations ×100."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .unimodal import spearman


@dataclass(frozen=True)
class GradedMetrics:
    """Scores against human grades, ×100.

    Attributes:
        spearman: Spearman's correlation with the single judgements.
        kendall_tau_c: Kendall's τ_c with the single judgements: what the papers on Flickr8k-Expert print.
        spearman_of_mean: Spearman's correlation with each pair's mean grade.
        kendall_tau_c_of_mean: Kendall's τ_c with the same.
        pair_count: Pairs graded.
        judgement_count: Grades of all of them.
    """

    spearman: float
    kendall_tau_c: float
    spearman_of_mean: float
    kendall_tau_c_of_mean: float
    pair_count: int
    judgement_count: int

    def as_dict(self) -> dict[str, float]:
        """All attributes by name."""
        return dict(vars(self))


def graded_metrics(scores: Sequence[float] | np.ndarray, grades: Sequence[Sequence[float]]) -> GradedMetrics:
    """Rank correlations of pair scores with human grades, each judgement by itself and each pair's mean.

    Args:
        scores: (n,) score of each pair.
        grades: For each pair its grades, one or more.

    Raises:
        ValueError: If the lengths differ, a pair has no grade, a value is NaN, or nothing differs.
    """
    values = np.asarray(scores, dtype=np.float64)
    empty = [number for number, each in enumerate(grades) if not len(each)]
    if len(values) != len(grades) or empty:
        raise ValueError(
            f"There are {len(values)} scores and grades for {len(grades)} pairs, {len(empty)} of them without any;"
            " expected at least one grade for each score."
        )
    counts = [len(each) for each in grades]
    single = np.concatenate([np.asarray(each, dtype=np.float64) for each in grades])
    means = np.array([float(np.mean(each)) for each in grades])
    repeated = np.repeat(values, counts)
    return GradedMetrics(
        spearman=spearman(repeated, single),
        kendall_tau_c=kendall_tau_c(repeated, single),
        spearman_of_mean=spearman(values, means),
        kendall_tau_c_of_mean=kendall_tau_c(values, means),
        pair_count=len(values),
        judgement_count=len(single),
    )


def kendall_tau_c(values: Sequence[float] | np.ndarray, grades: Sequence[float] | np.ndarray) -> float:
    """Kendall's τ_c ×100 (Stuart): 2 (C − D) / (n² (m − 1) / m), m the fewer distinct values of the two sides.

    Args:
        values: (n,) scores.
        grades: (n,) grades, of few levels: the time is levels × n log n.

    Raises:
        ValueError: On other lengths, NaN, or a side without any difference.
    """
    left, right = np.asarray(values, dtype=np.float64), np.asarray(grades, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(f"values and grades have shapes {left.shape} and {right.shape}; expected (n,) both.")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("values or grades hold NaN or infinity; a rank needs a number.")
    levels, level_of = np.unique(right, return_inverse=True)
    fewest = min(len(levels), len(np.unique(left)))
    if fewest < 2:
        raise ValueError("all values, or all grades, are equal: there is no order to correlate.")
    balance, lower = 0, np.empty(0)
    for level in range(len(levels)):
        own = left[level_of == level]
        # Of the pairs with a lower grade: those with a lower score agree, those with a higher one do not.
        agree = np.searchsorted(lower, own, side="left").sum()
        balance += int(agree) - int((len(lower) - np.searchsorted(lower, own, side="right")).sum())
        lower = np.sort(np.concatenate([lower, own]))
    return 100.0 * 2 * balance / (len(left) ** 2 * (fewest - 1) / fewest)
