from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayescam.posterior.temperature import TEMPERATURES, fit_temperature


def test_the_temperature_of_simulated_logits_is_found():
    logits = 2 * torch.randn(20_000, 3, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert fit_temperature(3 * logits, labels) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("scale", [0.03, 30.0])
def test_logits_thirty_times_too_small_or_too_large_are_mended(scale):
    logits = 2 * torch.randn(2000, 3, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.2)


@pytest.mark.parametrize("size", [1e-3, 5.0, 500.0])
def test_where_the_loss_has_no_minimum_the_temperature_is_the_bound(size):
    """Right on every image: the colder the better, even where the loss is nought to the last bit. Wrong: warmer."""
    labels = torch.arange(50) % 3
    right = size * torch.nn.functional.one_hot(labels, 3).double()
    assert fit_temperature(right, labels) == TEMPERATURES[0] == 0.01
    assert fit_temperature(-right, labels) == TEMPERATURES[1] == 100.0


def test_logits_that_say_nothing_need_no_temperature():
    assert fit_temperature(torch.full((4, 3), 7.0), torch.tensor([0, 1, 2, 0])) == 1.0


@pytest.mark.filterwarnings("error")
def test_every_kind_of_array_gives_the_same_temperature():
    logits, labels = torch.randn(60, 3, dtype=torch.float64).numpy(), torch.randint(0, 3, (60,)).numpy()
    logits[np.arange(60), labels] += 1
    expected = fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels))
    frozen = logits.copy()
    frozen.flags.writeable = False
    for kind in (frozen, logits[::-1].copy()[::-1], logits.astype(">f8"), logits.tolist()):
        assert fit_temperature(kind, labels) == pytest.approx(expected, rel=1e-9)
    assert fit_temperature(logits, labels.astype(">i4")) == fit_temperature(logits, labels.tolist())


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
        (torch.zeros(1, 3), torch.tensor([0.7]), r"labels\[0\] is 0.7, not a whole number"),
        (torch.zeros(1, 3), torch.tensor([math.nan]), r"labels\[0\] is nan"),
        (torch.zeros(2, 1), torch.zeros(2), "logits must be .* K >= 2, got K = 1"),
    ],
)
def test_bad_arguments_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(1, 3, dtype=torch.complex64), torch.zeros(1), "logits must be dense real numbers"),
        (None, torch.zeros(1), "logits must be .* got None"),
        ("abc", torch.zeros(1), "logits must be .* got 'abc'"),
        (torch.zeros(1, 3), torch.tensor([True]), "labels must be whole numbers"),
        (torch.zeros(1, 3), ["hand"], "labels must be .* number the classes 0..K-1"),
    ],
)
def test_what_are_no_numbers_is_named(logits, labels, message):
    with pytest.raises(TypeError, match=message):
        fit_temperature(logits, labels)
