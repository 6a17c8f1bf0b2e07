"""The MAP's preconditioners: they are the inverse curvatures that their docstrings say, in either type."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bayescam.posterior import map as posterior_map
from bayescam.posterior.curvature import feature_gram, full_covariance, pair_products, probabilities_at
from bayescam.posterior.images import check_images
from bayescam.posterior.map import find_map, origin_solver, whitening
from bayescam.posterior.model import negative_log_joint

K, D = 4, 6


@pytest.fixture
def images():
    phi = torch.randn(50, D, dtype=torch.float64)
    return check_images(phi, torch.arange(50) % K, class_weights=torch.tensor([1.0, 2.0, 0.5, 1.5]))


@pytest.mark.parametrize(("limit", "rtol"), [(0.0, 1e-10), (float("inf"), 1e-4)], ids=["float64", "float32"])
def test_origin_solver_is_the_inverse_hessian_at_zero(images, limit, rtol, monkeypatch):
    """At theta = 0 every p is 1/K, so the Hessian is C/K (x) sum_n w_n phi~ phi~^T + tau I."""
    monkeypatch.setattr(posterior_map, "_FLOAT32_SPREAD", limit)
    tau, gradient = 0.7, torch.randn(K, D + 1, dtype=torch.float64)
    gradient -= gradient.mean(0)
    centre = torch.eye(K, dtype=torch.float64) - 1 / K
    hessian = torch.kron(centre / K, feature_gram(images)) + tau * torch.eye(K * (D + 1), dtype=torch.float64)
    expected = torch.linalg.solve(hessian, gradient.flatten()).view_as(gradient)
    whitener = replace(whitening(images), prior_precision=tau)
    for solve in (origin_solver(whitener), whitener.solve):
        found = solve(gradient)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
    assert float(origin_solver(whitener)(gradient).sum(0).abs().max()) < 1e-12


def test_where_float32_hides_the_mode_the_last_steps_are_taken_in_float64():
    """Far below what float32 products can tell, the mode is still found."""
    phi, labels, tolerance = torch.randn(300, D), torch.arange(300) % K, 1e-9
    low, wide = check_images(phi, labels), check_images(phi.double(), labels)
    theta = find_map(low, 1.0, whitening(low), tolerance=tolerance).theta
    proba = probabilities_at(theta, wide)
    covariance = full_covariance(wide, lambda span, x: pair_products(proba(span, x)), 1.0)

    def decrement(images):
        return float(covariance.whiten_gradient(negative_log_joint(theta, images, 1.0)[1]).norm())

    assert decrement(wide) < 1.2 * tolerance
    assert decrement(low) > 100 * tolerance
