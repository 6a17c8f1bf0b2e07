from __future__ import annotations

import math

import pytest
import torch

from bayescam.posterior.temperature import fit_temperature


def test_the_temperature_of_simulated_logits_is_found():
    logits = 2 * torch.randn(20_000, 3, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert fit_temperature(3 * logits, labels) == pytest.approx(3.0, rel=0.05)


def test_it_is_a_minimum_and_shift_free():
    logits, labels = torch.randn(200, 3), torch.randint(0, 3, (200,))
    logits[torch.arange(200), labels] += 1.0
    found = fit_temperature(logits, labels)
    loss = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in (found * 0.99, found, found * 1.01)]
    assert loss[1] <= min(loss) + 1e-7
    assert fit_temperature(logits + 5.0, labels) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3), "labels"),
        (torch.zeros(0, 3), torch.zeros(0), "labels"),
        (torch.full((1, 3), math.nan), torch.zeros(1), "NaN"),
        (torch.zeros(1, 3), torch.tensor([3]), "outside 0..2"),
    ],
)
def test_bad_arguments_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)
