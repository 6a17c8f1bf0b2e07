"""Sampled tau against quadrature over everything."""

import math

import numpy as np
import pytest
import torch

from bayescam.diagnose.arviz_compat import ess
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts

SHAPE, RATE = 1.0, 0.1


def tau_by_quadrature(features, labels):
    """K = 2, D = 1: the contrast part of theta is (eta_1, eta_2); p(tau | y) on a grid of log tau."""
    grid = torch.linspace(-14, 14, 281, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    sign = torch.where(labels == 0, 1.0, -1.0).double()
    # f_0 - f_1 = sqrt(2) (eta_1 phi + eta_2)
    log_likelihood = torch.zeros_like(a)
    for phi, s in zip(features[:, 0], sign, strict=True):
        log_likelihood += torch.nn.functional.logsigmoid(s * math.sqrt(2) * (a * phi + b))
    log_tau = torch.linspace(-7, 7, 141, dtype=torch.float64)
    tau = log_tau.exp()
    square = a.square() + b.square()
    log_evidence = torch.stack(
        [torch.logsumexp((log_likelihood - 0.5 * t * square).flatten(), 0) + (t / (2 * math.pi)).log() for t in tau]
    )
    log_density = log_evidence + SHAPE * log_tau - RATE * tau
    weights = (log_density - log_density.max()).exp()
    return log_tau.numpy(), (weights / weights.sum()).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "kron"])
def test_tau_equals_quadrature(structure):
    torch.manual_seed(1)
    features = torch.randn(25, 1, dtype=torch.float64)
    labels = (torch.sigmoid(1.5 * features[:, 0] - 0.5) > torch.rand(25)).long()
    log_tau, weights = tau_by_quadrature(features, labels)
    laplace = fit_laplace(features, labels, num_classes=2, prior_precision=1.0, structure=structure)
    nuts = sample_nuts(
        laplace, features, labels, num_samples=400, num_warmup=150, tau_prior=(SHAPE, RATE), seed=2, progress=False
    )
    drawn = nuts.tau.log().numpy()
    mean = (weights * log_tau).sum()
    variance = (weights * (log_tau - mean) ** 2).sum()
    effective = float(ess(drawn, "mean"))
    assert effective > 100
    # Five standard errors: a false alarm has a probability below 1e-6 under the normal law.
    assert abs(drawn.mean() - mean) < 5 * math.sqrt(variance / effective)
    squares = (drawn - mean) ** 2
    assert abs(squares.mean() - variance) < 5 * squares.std() / math.sqrt(float(ess(squares, "mean")))


@pytest.mark.slow
def test_answer_does_not_hang_on_the_tau_it_was_whitened_at():
    torch.manual_seed(3)
    features = torch.randn(80, 3, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=features @ torch.randn(3, 4).double() * 2).sample()
    found = []
    for tau in (0.1, 3.0):
        laplace = fit_laplace(features, labels, num_classes=4, prior_precision=tau)
        run = sample_nuts(
            laplace, features, labels, num_samples=300, num_warmup=100, tau_prior="gamma", seed=1, progress=False
        )
        log_tau = run.tau.log().numpy()
        found.append((log_tau.mean(), log_tau.std() / np.sqrt(float(ess(log_tau, "mean")))))
        assert run.num_divergent == 0
    (a, a_error), (b, b_error) = found
    assert abs(a - b) < 5 * math.hypot(a_error, b_error)
