"""Predictives: blind to the shift, exact where exactness is possible, right in the known limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad

import bayescam as bc
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


def test_pairwise_of_the_design_s_example():
    """K = 2, N(1.5, 16): exact .635; the pairwise probit is within .01, the centred probit says .718."""
    mean = torch.tensor([[0.75, -0.75]], dtype=torch.float64)
    covariance = torch.tensor([[[4.0, -4.0], [-4.0, 4.0]]], dtype=torch.float64)
    assert float(pairwise_probit(mean, covariance)[0, 0]) == pytest.approx(0.635, abs=0.01)


def test_without_uncertainty_pairwise_is_the_softmax():
    mean = torch.randn(6, K, dtype=torch.float64)
    torch.testing.assert_close(pairwise_probit(mean, torch.zeros(6, K, K, dtype=torch.float64)), mean.softmax(1))


def test_bridge_has_the_dirichlet_of_its_definition():
    mean = torch.randn(6, K, dtype=torch.float64)
    mean -= mean.mean(1, keepdim=True)
    variance = torch.rand(6, K, dtype=torch.float64) + 0.5
    alpha = (1 - 2 / K + mean.exp() / K**2 * (-mean).exp().sum(1, keepdim=True)) / variance
    torch.testing.assert_close(laplace_bridge(mean, torch.diag_embed(variance)), alpha / alpha.sum(1, keepdim=True))


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
    with pytest.raises(ValueError, match="num_samples is 0"):
        fit.sample(0, seed=0)
    assert fit.predict_proba(phi[:0]).shape == (0, K)
