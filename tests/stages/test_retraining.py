"""How far trainings differ, from networks made up to differ by known amounts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayescam.stages.retraining import _spread

N, K, H, W = 6, 3, 2, 4
PATIENTS = np.arange(N) // 2


def _one(cams, accuracy=0.5):
    return {"accuracy": accuracy, "nll": 1.0, "predicted": torch.arange(N) % K, "cams": cams}


def test_the_same_network_again_moves_nothing():
    cams = torch.randn(N, K, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _spread(_one(cams), [_one(cams), _one(cams)], torch.ones_like(cams), PATIENTS)
    assert found["num_trainings"] == 3
    assert found["same_class"] == 1
    assert found["map_correlation"] == pytest.approx(1)
    assert found["map_sd_ratio"] == 0


def test_the_spread_is_measured_in_the_class_of_the_runs_own_network():
    cams = torch.randn(N, K, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = cams.clone()
    rows, classes = torch.arange(N), torch.arange(N) % K
    other[rows, classes] += 3
    turned = cams.clone()
    turned[rows, (classes + 1) % K] = 99
    assert _spread(_one(cams), [_one(turned)], torch.ones_like(cams), PATIENTS)["map_sd_ratio"] == 0
    found = _spread(_one(cams, 0.5), [_one(other, 0.7)], torch.full_like(cams, 2.0), PATIENTS)
    assert found["map_correlation"] == pytest.approx(1)
    assert found["map_sd_between"] == pytest.approx(3 / 2**0.5)
    assert found["map_sd_ratio"] == pytest.approx(3 / 2**0.5 / 2)
    assert found["accuracy"] == [0.5, 0.7]
    assert _spread(_one(cams), [_one(-cams)], torch.ones_like(cams), PATIENTS)["map_correlation"] == pytest.approx(-1)


def test_the_spread_has_intervals_over_patients():
    generator = torch.Generator().manual_seed(2)
    one, other = (torch.randn(N, K, H, W, generator=generator, dtype=torch.float64) for _ in range(2))
    found = _spread(_one(one), [_one(other)], torch.rand(N, K, H, W, generator=generator), PATIENTS)
    for name, bounds in found["intervals"].items():
        assert bounds["value"] == found[name]
        assert bounds["low"] <= found[name] <= bounds["high"]
    assert found["intervals"]["map_sd_ratio"]["low"] < found["intervals"]["map_sd_ratio"]["high"]
