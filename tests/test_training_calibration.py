"""A finished model's matching score means something: one half lies between matches and mismatches."""

import numpy as np
import pytest
import torch

from modeling_tvrn.training.calibration import balanced_shift


def test_the_shift_minimises_the_balanced_cross_entropy() -> None:
    rng = np.random.default_rng(3)
    positives = np.eye(7, 21, dtype=bool) | (rng.random((7, 21)) < 0.1)
    logits = rng.normal(size=(7, 21)) * 3 + 40 + 5 * positives

    def loss(b: float) -> float:
        matches, others = logits[positives] + b, logits[~positives] + b
        return float(np.log1p(np.exp(-matches)).mean() + np.log1p(np.exp(others)).mean())

    found = balanced_shift(torch.from_numpy(logits).float(), torch.from_numpy(positives))
    grid = np.linspace(-60, -20, 8001)
    assert abs(found - grid[np.argmin([loss(b) for b in grid])]) < 0.01


@pytest.mark.parametrize("positives", [torch.ones(2, 3), torch.zeros(2, 3)])
def test_pairs_of_one_kind_are_refused(positives: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="matches among 6 pairs"):
        balanced_shift(torch.zeros(2, 3), positives.bool())


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="logits finite: False"):
        balanced_shift(torch.tensor([[0.0, float("nan")]]), torch.tensor([[True, False]]))
