"""Broken chains never read as converged, and the scalar that is worst is named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import bayescam as bc
from bayescam.diagnose.convergence import convergence, energy_fraction, probability_convergence, spread

C, S, K, D = 4, 60, 3, 5


@pytest.fixture
def draws():
    return np.random.default_rng(0).normal(size=(C, S, K, D))


def test_the_worst_scalar_is_named(draws):
    draws[1, :, 2, 3] += 4
    found = convergence(draws)
    assert found.rhat > 1.5
    assert found.rhat_at == found.ess_bulk_at == (2, 3)
    assert found.num_scalars == K * D
    assert convergence(draws[..., 0, 0]).rhat_at == ()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_draw_that_is_not_finite_is_a_failure(draws, value):
    draws[2, 7, 1, 4] = value
    found = convergence(draws)
    assert (found.rhat, found.ess_bulk, found.ess_tail) == (math.inf, 0, 0)
    assert found.rhat_at == found.ess_tail_at == (1, 4)
    assert found.num_not_finite == 1
    assert convergence(draws[:1, :6]).rhat == math.inf  # too few draws to cut in halves


def test_what_never_moves_is_left_out_by_its_bits(draws):
    draws[..., 0, 0] = 0.1  # whose sd in floating point may not be 0
    found = convergence(draws)
    assert found.num_scalars == K * D - 1
    assert found.rhat < 1.1
    assert convergence(np.ones((C, S, K))).rhat == math.inf


def test_energies_that_stand_still_or_are_not_finite_have_no_fraction():
    energy = np.random.default_rng(0).normal(size=(C, S))
    energy[1] = energy[1, 0]
    energy[3, 5] = np.nan
    fractions = energy_fraction(energy)
    assert np.isfinite(fractions).tolist() == [True, False, True, False]
    # numpy's mean of equal numbers can differ from them in the last bit
    assert math.isnan(energy_fraction(np.full((1, 7), 0.1))[0])


@pytest.mark.parametrize("num_images", [1, 5, 127, 128, 129, 200, 255, 256, 10_000])
def test_images_are_spread_over_all(num_images):
    rows = spread(num_images)
    assert len(set(rows)) == min(num_images, 128)
    assert (rows[0], rows[-1]) == (0, num_images - 1)
    assert np.diff(rows).max(initial=1) - np.diff(rows).min(initial=num_images) <= 1


@pytest.mark.slow
def test_the_last_image_is_looked_at():
    generator = torch.Generator().manual_seed(0)
    draws = bc.Draws(
        torch.randn(C, S, K, D, generator=generator, dtype=torch.float64), torch.zeros(C, S, K, dtype=torch.float64)
    )
    draws.weight[0, :, 1, -1] += 30
    features = torch.zeros(200, D, dtype=torch.float64)
    features[:, 0] = torch.linspace(0.5, 1, 200)
    assert probability_convergence(draws, features).rhat < 1.1
    features[-1, -1] = 1
    found = probability_convergence(draws, features)
    assert found.rhat > 1.5
    assert found.rhat_at[0] == 127
