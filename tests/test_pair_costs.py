"""The benchmark's count of operations is what runs: a formula that drifts from the code predicts nothing."""

import pair_costs
import pytest
import torch


@torch.inference_mode()
def test_every_variants_operations_are_counted_exactly() -> None:
    for variant in pair_costs.VARIANTS:
        found = pair_costs.count(variant, pair_costs.SMALL)
        assert found["formula"] == pytest.approx(found["counted"], rel=1e-9), variant
        assert found["operator_bytes"] > found["fewest_bytes"]


def test_the_fit_recovers_a_line_and_says_how_far_it_is_off(capsys) -> None:
    pairs = torch.tensor([1e3, 1e4, 1e5], dtype=torch.float64).numpy()
    found = pair_costs._predict("seconds", pairs, 0.5 + 2e-4 * pairs, search=1e-9)
    assert found["of_a_pair"] == pytest.approx(2e-4) and found["start"] == pytest.approx(0.5)
    assert found["coco_5k"] == pytest.approx(25000.5) and found["largest_relative_error"] < 1e-9
    bent = pair_costs._predict("seconds", pairs, (0.5 + 2e-4 * pairs) * [1, 1.5, 1], search=1e-9)
    assert bent["largest_relative_error"] > 0.1
    assert "COCO 5K, every pair: 417 minutes" in capsys.readouterr().out
