"""``Draws``: what are no draws is refused by name, so that nobody downstream has to ask."""

from __future__ import annotations

import pytest
import torch

import bayescam as bc

C, S, K, D = 2, 3, 4, 5
WEIGHT, BIAS = torch.zeros(C, S, K, D), torch.zeros(C, S, K)


def broken(value, at, number):
    value = value.clone()
    value[at] = number
    return value


def test_the_properties_are_the_shape():
    draws = bc.Draws(WEIGHT, BIAS)
    assert (draws.num_chains, draws.num_samples, draws.num_classes, draws.num_features) == (C, S, K, D)


@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        (WEIGHT.numpy(), BIAS.numpy(), TypeError, "weight must be a torch tensor, got ndarray; give torch.as_tensor"),
        (WEIGHT, BIAS.tolist(), TypeError, "bias must be a torch tensor, got list"),
        (WEIGHT.long(), BIAS, TypeError, "weight must be floating-point numbers, got torch.int64"),
        (WEIGHT.double(), BIAS, TypeError, "weight is torch.float64 and bias torch.float32"),
        (WEIGHT[0], BIAS[0], ValueError, r"weight must be \(C, S, K, D\), got shape \(3, 4, 5\)"),
        (WEIGHT, BIAS[:, :2], ValueError, r"bias must be \(C, S, K\) = \(2, 3, 4\), got \(2, 2, 4\)"),
        (WEIGHT[:, :0], BIAS[:, :0], ValueError, r"weight holds no draw: \(C, S, K, D\) is \(2, 0, 4, 5\)"),
        (broken(WEIGHT, (1, 2, 0, 4), torch.nan), BIAS, ValueError, r"weight\[1, 2, 0, 4\] is nan"),
        (WEIGHT, broken(BIAS, (0, 1, 3), torch.inf), ValueError, r"bias\[0, 1, 3\] is inf"),
    ],
)
def test_what_are_no_draws_is_refused_by_name(weight, bias, error, message):
    with pytest.raises(error, match=message):
        bc.Draws(weight, bias)
