"""Within one modality: image→image and text→text recall by a shared id or label; rank correlation with grades."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .retrieval import RECALL_AT


@dataclass(frozen=True)
class UnimodalMetrics:
    """Retrieval within one modality; every item is a query and never its own answer.

    Attributes:
        recall: K → share of queries with another item of the same label among the first K, in percent.
        median_rank: Median 1-based rank of a query's first right item.
        mean_rank: Mean of the same.
        ties: Negatives that score exactly as much as the positive they are compared with.
        query_count: Items that share their label with another.
        lonely_count: Items that do not, which are candidates but not queries.
        ranks: (query_count,) the ranks themselves.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    ties: int
    query_count: int
    lonely_count: int
    ranks: np.ndarray = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, float]:
        """Flat names, such as `R@1`."""
        named: dict[str, float] = {f"R@{k}": value for k, value in self.recall.items()}
        names = ("median_rank", "mean_rank", "ties", "query_count", "lonely_count")
        return named | {name: getattr(self, name) for name in names}


def unimodal_metrics(
    embeds: Tensor | np.ndarray, labels: Sequence[int | str], block_size: int = 1024
) -> UnimodalMetrics:
    """R@K of nearest neighbours by cosine within one modality, by shared id or label; ties count against the query.

    Args:
        embeds: (N, P) embeddings, of any length but zero.
        labels: (N,) an id or a label each: items with the same one are positives of each other.
        block_size: Queries compared with all N at once; memory is O(block_size · N).

    Raises:
        ValueError: On NaN, a zero embedding, another number of labels, or if no two items share a label.
    """
    vectors = torch.as_tensor(embeds).detach()
    if vectors.ndim != 2 or len(vectors) != len(labels):
        raise ValueError(f"embeds has shape {tuple(vectors.shape)}, with {len(labels)} labels; expected (N, P) and N.")
    vectors = vectors if vectors.dtype in (torch.float32, torch.float64) else vectors.float()
    norms = vectors.norm(dim=1, keepdim=True)
    wrong = (~norms.isfinite() | (norms == 0)).flatten().nonzero().flatten()
    if len(wrong):
        raise ValueError(f"Embedding {int(wrong[0])} is zero or not finite ({len(wrong)} such); it has no cosine.")
    codes = torch.from_numpy(_label_codes(labels)).to(vectors.device)
    ranks, ties = _neighbour_ranks(vectors / norms, codes, block_size)
    lonely = len(labels) - len(ranks)
    return UnimodalMetrics(
        recall={k: 100.0 * float(np.mean(ranks <= k)) for k in RECALL_AT},
        median_rank=float(np.median(ranks)),
        mean_rank=float(np.mean(ranks)),
        ties=ties,
        query_count=len(ranks),
        lonely_count=lonely,
        ranks=ranks,
    )


def _label_codes(labels: Sequence[int | str]) -> np.ndarray:
    # By equality of the labels themselves: NumPy would turn the int 1 and the string "1" into the same text.
    numbers: dict[int | str, int] = {}
    items = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    codes = np.array([numbers.setdefault(label, len(numbers)) for label in items], dtype=np.int64)
    if len(codes) == 0 or np.bincount(codes).max() < 2:
        raise ValueError(f"None of {len(codes)} items shares its label with another: there is nothing to retrieve.")
    return codes


def _neighbour_ranks(vectors: Tensor, codes: Tensor, block_size: int) -> tuple[np.ndarray, int]:
    ranks, ties = [], 0
    for start in range(0, len(vectors), block_size):
        rows = torch.arange(start, min(start + block_size, len(vectors)), device=vectors.device)
        scores = vectors[rows] @ vectors.T
        same = codes[rows][:, None] == codes[None, :]
        itself = rows[:, None] == torch.arange(len(vectors), device=vectors.device)
        positive = same & ~itself
        best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        asked = positive.any(dim=1)
        ranks.append(((scores >= best) & ~same).sum(dim=1)[asked].cpu().numpy() + 1)
        ties += int(((scores == best) & ~same)[asked].sum())
    return np.concatenate(ranks), ties


def spearman(values: Sequence[float] | np.ndarray, grades: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation ×100: Pearson's of the ranks, equal values at their mean rank.

    Args:
        values, grades: (n,) what is compared, such as cosines with human grades of similarity.

    Raises:
        ValueError: On NaN, other lengths, fewer than two pairs, or a side without any difference.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (values, grades)]
    if sides[0].ndim != 1 or sides[0].shape != sides[1].shape or len(sides[0]) < 2:
        raise ValueError(
            f"values and grades have shapes {[side.shape for side in sides]}; expected (n,) both, n >= 2."
        )
    if not all(np.isfinite(side).all() for side in sides):
        raise ValueError("values or grades hold NaN or infinity; a rank needs a number.")
    ranks = [_mean_ranks(side) for side in sides]
    if any(np.ptp(side) == 0 for side in ranks):
        raise ValueError("all values, or all grades, are equal: there is no order to correlate.")
    return 100.0 * float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]
