"""L-BFGS on convex functions: scipy's minimum, its stops, and a value too noisy to descend."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize

from bayescam.posterior.lbfgs import minimise


def convex(size=40):
    """log-sum-exp of random planes plus a badly scaled quadratic."""
    planes = torch.randn(90, size, dtype=torch.float64)
    scale = torch.logspace(-2, 2, size, dtype=torch.float64)

    def objective(z):
        logits = planes @ z
        return float(logits.logsumexp(0) + (scale * z * z).sum() / 2), planes.T @ logits.softmax(0) + scale * z

    return objective


def test_finds_scipys_minimum():
    objective = convex()
    found = minimise(objective, torch.ones(40, dtype=torch.float64), near=lambda norm: norm < 1e-6, evaluations=500)
    theirs = minimize(
        lambda z: tuple(np.asarray(part) for part in objective(torch.from_numpy(z))), np.ones(40), jac=True, tol=1e-12
    )
    torch.testing.assert_close(found, torch.from_numpy(theirs.x), rtol=1e-4, atol=1e-5)
    assert float(objective(found)[1].norm()) < 1e-6


def test_preconditioning_walks_as_in_whitened_coordinates():
    """With P = R R^T and z = R^-1 x the iterates are R times those of z -> f(R z) without one."""
    objective, root = convex(), torch.randn(40, 40, dtype=torch.float64) / 6 + torch.eye(40, dtype=torch.float64)
    start = torch.ones(40, dtype=torch.float64)

    def whitened(z):
        value, gradient = objective(root @ z)
        return value, root.T @ gradient

    norms = {"whitened": [], "preconditioned": []}

    def near(name):
        return lambda norm: norms[name].append(norm) or False

    minimise(whitened, torch.linalg.solve(root, start), near=near("whitened"), evaluations=40)
    minimise(objective, start, precondition=lambda g: root @ (root.T @ g), near=near("preconditioned"), evaluations=40)
    assert len(norms["whitened"]) > 20
    np.testing.assert_allclose(norms["preconditioned"][:20], norms["whitened"][:20], rtol=1e-6)


def test_stops_where_it_is_near_and_after_its_evaluations():
    objective, calls = convex(), []

    def counted(z):
        calls.append(z)
        return objective(z)

    start = torch.ones(40, dtype=torch.float64)
    assert minimise(counted, start, near=lambda norm: True, evaluations=50) is start
    assert len(calls) == 1
    calls.clear()
    minimise(counted, start, near=lambda norm: False, evaluations=7)
    assert len(calls) == 7


def test_noise_ends_the_descent():
    objective, calls = convex(), []

    def noisy(z):
        calls.append(z)
        value, gradient = objective(z)
        return value + 1e-3 * np.random.default_rng(len(calls)).normal(), gradient

    found = minimise(noisy, torch.ones(40, dtype=torch.float64), near=lambda norm: norm < 1e-12, evaluations=10_000)
    assert len(calls) < 1000
    assert float(objective(found)[1].norm()) < 1.0
