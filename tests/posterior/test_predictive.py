"""Predictives: blind to the shift, exact where exactness is possible, right in the known limits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

import bayescam as bc
from bayescam.posterior.expectations import logistic_mean
from bayescam.posterior.laplace import STRUCTURES
from bayescam.posterior.predictive import METHODS, laplace_bridge, pairwise_probit

N, D, K = 80, 3, 4


@pytest.fixture(params=STRUCTURES)
def fit(request):
    phi = torch.randn(N, D, dtype=torch.float64)
    return bc.fit_laplace(phi, torch.arange(N) % K, prior_precision=0.5, structure=request.param)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_probabilities_and_shifting_all_classes_changes_nothing(fit, method):
    phi = torch.randn(9, D, dtype=torch.float64)
    proba = fit.predict_proba(phi, method=method)
    torch.testing.assert_close(proba.sum(1), torch.ones(9, dtype=torch.float64))
    shift = 50 * torch.randn(D, dtype=torch.float64)
    moved = replace(fit, weight_mean=fit.weight_mean + shift, bias_mean=fit.bias_mean + 7.0)
    torch.testing.assert_close(moved.predict_proba(phi, method=method), proba)


@pytest.mark.parametrize("function", [pairwise_probit, laplace_bridge])
def test_a_shift_in_mean_or_covariance_is_not_seen(function):
    """On centred moments c 1 and c 11^T vanish; pairs of classes cannot see them at all."""
    mean, root = torch.randn(6, K, dtype=torch.float64), torch.randn(6, K, K, dtype=torch.float64)
    covariance = root @ root.mT
    moved_mean, moved = mean + 3.0, covariance + 40.0
    if function is laplace_bridge:
        centre = torch.eye(K, dtype=torch.float64) - 1 / K
        mean, moved_mean = mean @ centre, moved_mean @ centre
        covariance, moved = centre @ covariance @ centre, centre @ moved @ centre
    torch.testing.assert_close(function(moved_mean, moved), function(mean, covariance))


def test_logit_moments_are_those_of_centred_draws(fit):
    phi = torch.randn(5, D, dtype=torch.float64)
    mean, covariance = fit.logit_moments(phi)
    draws = fit.sample(50_000, seed=0).centred()
    logits = torch.einsum("skd,nd->snk", draws.weight[0], phi) + draws.bias[0][:, None]
    sd = covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert float(((logits.mean(0) - mean) / sd).abs().max()) < 5 / 50_000**0.5
    assert float((logits.std(0) / sd - 1).abs().max()) < 0.02


def test_monte_carlo_over_draws_and_the_rule_agree(fit):
    phi = torch.randn(5, D, dtype=torch.float64)
    sampled = bc.predict_proba(fit.sample(40_000, seed=0), phi)
    assert float((fit.predict_proba(phi, method="mc") - sampled).abs().max()) < 5 * 0.5 / 200


@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_classes_are_exact(structure):
    phi = torch.randn(30, 2, dtype=torch.float64)
    labels = (phi[:, 0] + 0.5 * torch.randn(30) > 0).long()
    fit = bc.fit_laplace(phi, labels, prior_precision=0.1, structure=structure)
    mean, covariance = fit.logit_moments(phi[:4])
    margin = mean[:, 1] - mean[:, 0]
    sd = (covariance[:, 1, 1] + covariance[:, 0, 0] - 2 * covariance[:, 0, 1]).sqrt()
    for method in ("mc", "pairwise", "bridge"):
        found = fit.predict_proba(phi[:4], method=method)[:, 1]
        for m, s, p in zip(margin.tolist(), sd.tolist(), found.tolist(), strict=True):
            exact, _ = quad(lambda z, m=m, s=s: math.exp(-z * z / 2) / (1 + math.exp(-m - s * z)), -9, 9, epsabs=1e-11)
            assert p == pytest.approx(exact / math.sqrt(2 * math.pi), abs=1e-6)


def log_mean_of_the_logistic(mean, variance):
    """log E[s(x)], x ~ Normal(mean, variance), by the trapezoidal rule about the integrand's mode."""
    if variance == 0:
        return -np.logaddexp(0, -mean)
    sd = math.sqrt(variance)
    mode = brentq(lambda x: expit(-x) - (x - mean) / variance, mean - 1, mean + variance + 1)
    x = mode + sd * np.linspace(-12, 12, 4001)
    log = -np.logaddexp(0, -x) - 0.5 * ((x - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))
    return log.max() + math.log(np.exp(log - log.max()).sum() * (x[1] - x[0]))


@pytest.mark.parametrize(
    ("mean", "variance"),
    [(-80, 0), (-80, 25), (-300, 4), (-30, 400), (-100, 100), (-700, 1), (-5, 5), (0, 9), (2, 0.1), (37, 1), (60, 400)],
)
def test_the_mean_of_the_logistic_is_right_however_small(mean, variance):
    found = logistic_mean(*(torch.tensor(float(value), dtype=torch.float64) for value in (mean, variance)))
    assert float(found.log()) == pytest.approx(log_mean_of_the_logistic(mean, variance), abs=1e-6)


@pytest.mark.parametrize("tau", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("stretch", [0.1, 3.0, 300.0])
def test_both_of_two_classes_keep_their_tail(stretch, tau):
    """Margins of hundreds: neither probability is nought, each is the integral, and they add up to one."""
    phi = torch.randn(30, 2, dtype=torch.float64)
    fit = bc.fit_laplace(phi, (phi[:, 0] > 0).long(), prior_precision=tau)
    fit = replace(fit, weight_mean=fit.weight_mean + stretch * torch.tensor([[-1.0, 0], [1, 0]]))
    mean, covariance = fit.logit_moments(phi[:6])
    margin, variance = mean[:, 1] - mean[:, 0], covariance[:, 1, 1] + covariance[:, 0, 0] - 2 * covariance[:, 0, 1]
    proba = fit.predict_proba(phi[:6])
    torch.testing.assert_close(proba.sum(1), torch.ones(6, dtype=torch.float64))
    exact = [
        [log_mean_of_the_logistic(sign * m, v) for sign in (-1, 1)]
        for m, v in zip(margin.tolist(), variance.tolist(), strict=True)
    ]
    held = torch.tensor(exact, dtype=torch.float64) > -700
    torch.testing.assert_close(proba.log()[held], torch.tensor(exact, dtype=torch.float64)[held], rtol=0, atol=1e-3)
    assert bool((proba[held] > 0).all())


def test_pairwise_of_two_classes_is_mackay_s_probit():
    """s(x) ~ Phi(l x) of the same slope at 0, and E[Phi(l x)] = Phi(l m / sqrt(1 + l^2 v)): l^2 = pi/8, no other."""
    mean, variance, slope = 1.5, 16.0, math.sqrt(2 * math.pi) / 4
    half = torch.tensor([[mean / 2, -mean / 2]], dtype=torch.float64)
    covariance = variance / 4 * torch.tensor([[[1.0, -1], [-1, 1]]], dtype=torch.float64)
    proba = pairwise_probit(half, covariance)[0]
    exact, _ = quad(lambda z: norm.pdf(z) * norm.cdf(slope * (mean + math.sqrt(variance) * z)), -12, 12, epsabs=1e-13)
    assert norm.cdf(slope * float((proba[0] / proba[1]).log())) == pytest.approx(exact, abs=1e-10)


def test_pairwise_of_the_design_s_example():
    """K = 2, N(1.5, 16): exact .635; the pairwise probit is within .01, the centred probit says .718."""
    mean = torch.tensor([[0.75, -0.75]], dtype=torch.float64)
    covariance = torch.tensor([[[4.0, -4.0], [-4.0, 4.0]]], dtype=torch.float64)
    assert float(pairwise_probit(mean, covariance)[0, 0]) == pytest.approx(0.635, abs=0.01)


def test_without_uncertainty_pairwise_is_the_softmax():
    mean = torch.randn(6, K, dtype=torch.float64)
    torch.testing.assert_close(pairwise_probit(mean, torch.zeros(6, K, K, dtype=torch.float64)), mean.softmax(1))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_bridge_takes_the_laplace_approximation_of_a_dirichlet_back_to_it(classes):
    """Over inputs x of the softmax, sum x = 0, Dirichlet(alpha) has the density prod_k p_k^alpha_k."""
    alpha = 20 * torch.rand(classes, dtype=torch.float64) + 0.2
    mode = alpha.log() - alpha.log().mean()
    curvature = torch.autograd.functional.hessian(lambda x: -(alpha * x.log_softmax(0)).sum(), mode)
    covariance = torch.linalg.pinv(curvature, hermitian=True)
    torch.testing.assert_close(laplace_bridge(mode[None], covariance[None])[0], alpha / alpha.sum())


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_thousands_make_no_nan(fit, method):
    phi = 1e5 * torch.randn(5, D, dtype=torch.float64)
    proba = replace(fit, weight_mean=10 * fit.weight_mean).predict_proba(phi, method=method)
    torch.testing.assert_close(proba.sum(1), torch.ones(5, dtype=torch.float64))


def test_wrong_arguments_are_named(fit):
    phi = torch.randn(2, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="method is 'probit'"):
        fit.predict_proba(phi, method="probit")
    with pytest.raises(ValueError, match=r"features must be \(N, 3\)"):
        fit.predict_proba(torch.randn(2, 4))
    for number in (4.0, "8", True, None):
        if number is not None:
            with pytest.raises(TypeError, match=f"num_points must be a whole number, got {number!r}"):
                fit.predict_proba(phi, num_points=number)
        with pytest.raises(TypeError, match=f"num_samples must be a whole number, got {number!r}"):
            fit.sample(number, seed=0)
        with pytest.raises(TypeError, match=f"seed must be a whole number, got {number!r}"):
            fit.sample(1, seed=number)
    with pytest.raises(ValueError, match="num_points is 7; give an even number"):
        fit.predict_proba(phi, num_points=7)
    with pytest.raises(ValueError, match="num_points is 8, but method 'pairwise' takes no points"):
        fit.predict_proba(phi, method="pairwise", num_points=8)
    with pytest.raises(TypeError, match=r"Laplace.predict_proba\(\) got an unexpected keyword argument 'points'"):
        fit.predict_proba(phi, points=8)
    for number, words in ((-1, "seed is -1; it must be at least 0"), (2**64, "seed must be below 2.64")):
        with pytest.raises(ValueError, match=words):
            fit.sample(1, seed=number)
    with pytest.raises(ValueError, match="num_samples is 0; it must be at least 1"):
        fit.sample(0, seed=0)
    whole = np.int64(3), torch.tensor(3)
    assert all(
        fit.sample(n, seed=n).num_samples == fit.predict_proba(phi, num_points=n + 1).shape[0] + 1 for n in whole
    )
    assert fit.predict_proba(phi[:0]).shape == (0, K)
