"""Simulation-based calibration: right posteriors pass, wrong ones do not, and the band has its coverage."""

import numpy as np
import pytest
import torch

from bayescam.diagnose.sbc import ecdf_difference, quantities, simulate_ranks
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts

K, D, N, TAU = 3, 2, 40, 1.0


def features():
    torch.manual_seed(0)
    return torch.randn(N, D, dtype=torch.float64)


def nuts(phi, labels, seed):
    laplace = fit_laplace(phi, labels, num_classes=K, prior_precision=TAU)
    run = sample_nuts(laplace, phi, labels, num_chains=1, num_samples=80, num_warmup=50, seed=seed, progress=False)
    return Draws(run.draws.weight[:, ::2], run.draws.bias[:, ::2])


def prior(phi, labels, seed):
    generator = torch.Generator().manual_seed(10_000 + seed)
    theta = torch.randn(1, 60, K, D + 1, generator=generator, dtype=torch.float64) / TAU**0.5
    return Draws(theta[..., :-1], theta[..., -1])


def test_posterior_that_ignores_the_data_passes_but_for_the_log_likelihood():
    found = simulate_ranks(features(), K, TAU, {"prior": prior}, num_simulations=200, seed=1, progress=False)["prior"]
    assert found.num_draws == 60
    inside = {name: ecdf_difference(ranks, 60, coverage=0.999).inside for name, ranks in found.ranks.items()}
    assert not inside.pop("log_likelihood")
    assert all(inside.values())


@pytest.mark.slow
def test_nuts_is_calibrated_and_an_overconfident_posterior_is_not():
    kept = {}

    def honest(phi, labels, seed):
        kept[0] = nuts(phi, labels, seed)
        return kept[0]

    def overconfident(phi, labels, seed):
        draws = kept[0]
        mean = draws.weight.mean(1, keepdim=True)
        return Draws(mean + 0.4 * (draws.weight - mean), draws.bias)

    found = simulate_ranks(
        features(), K, TAU, {"nuts": honest, "narrow": overconfident}, num_simulations=80, seed=3, progress=False
    )
    # Five quantities at 99.9 % simultaneous coverage each: a false alarm has a probability below .005.
    for name, ranks in found["nuts"].ranks.items():
        assert ecdf_difference(ranks, 40, coverage=0.999).inside, name
    assert not ecdf_difference(found["narrow"].ranks["weight[0,0]"], 40, coverage=0.999).inside


@pytest.mark.parametrize("num_draws", [20, 99])
def test_band_holds_with_its_coverage(num_draws):
    generator = np.random.default_rng(5)
    inside = [
        ecdf_difference(generator.integers(0, num_draws + 1, 80), num_draws, coverage=0.9).inside for _ in range(1000)
    ]
    # 1,000 trials at .9: sd .0095; the discreteness of ranks may only widen the band.
    assert np.mean(inside) > 0.9 - 0.04
    assert np.mean(inside) < 0.96


def test_difference_by_hand():
    found = ecdf_difference(np.array([0, 0, 4, 4]), 4)
    np.testing.assert_allclose(found.points, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(found.difference, [0.5 - 0.2, 0.5 - 0.4, 0.5 - 0.6, 0.5 - 0.8])
    assert (found.lower <= 0).all()
    assert (found.upper >= 0).all()


def test_quantities_do_not_see_the_shift():
    torch.manual_seed(0)
    phi, labels = features(), torch.arange(N) % K
    draws = Draws(torch.randn(1, 5, K, D).double(), torch.randn(1, 5, K).double())
    shifted = Draws(draws.weight + torch.randn(1, 5, 1, D).double(), draws.bias + torch.randn(1, 5, 1).double())
    for name, values in quantities(draws, phi, labels).items():
        torch.testing.assert_close(values, quantities(shifted, phi, labels)[name])
    weight, bias = draws.flat()
    by_hand = torch.stack(
        [
            -torch.nn.functional.cross_entropy(phi @ w.T + b, labels, reduction="sum")
            for w, b in zip(weight, bias, strict=True)
        ]
    )
    torch.testing.assert_close(quantities(draws, phi, labels)["log_likelihood"], by_hand)
