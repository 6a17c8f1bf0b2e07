"""The Kronecker-factored Gaussian nearest in KL: its least-squares factors against dense matrices, its optimum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bayescam as bc
from bayescam.posterior.covariance import contrast_basis
from bayescam.posterior.curvature import full_covariance
from bayescam.posterior.expectations import expected_loss, logit_rule, logit_scales, moments
from bayescam.posterior.images import augment, check_images
from bayescam.posterior.kronecker import covariance_of, projected_factors
from bayescam.posterior.refine import elbo, maximise_mean

TAU = 0.3


@pytest.fixture(params=[None, [2.0, 1.0, 0.5]], ids=["plain", "class weights"])
def fitted(request):
    generator = torch.Generator().manual_seed(2)
    phi = torch.randn(60, 3, dtype=torch.float64, generator=generator)
    noise = torch.rand(60, 3, dtype=torch.float64, generator=generator)
    labels = (2 * phi - (-noise.log()).log()).argmax(1)
    weights = None if request.param is None else torch.tensor(request.param)
    fit = bc.fit_laplace(phi, labels, prior_precision=TAU, structure="kron", class_weights=weights)
    return check_images(phi, labels, class_weights=weights), fit, phi, labels


def split(factors, k, width):
    return factors[: k * k].reshape(k, k), factors[k * k :].reshape(width, width)


def test_each_factor_is_the_least_squares_one(fitted):
    """H - B' (x) A is orthogonal to every dB (x) A in tr(Sigma X Sigma Y), and with A' likewise; on the contrasts."""
    images, fit, *_ = fitted
    rule = logit_rule(images, fit.theta_mean, fit.covariance, 64, 0)
    scales = logit_scales(images, fit.covariance)
    products = moments(images, fit.theta_mean, fit.covariance, scales, rule).products
    factor = full_covariance(images, lambda span, _: products[span], TAU).precision_cholesky
    hessian = factor @ factor.T - TAU * torch.eye(len(factor), dtype=torch.float64)
    basis, c = contrast_basis(3), fit.covariance
    b = basis.T @ c.class_vectors @ torch.diag(c.class_values) @ c.class_vectors.T @ basis
    a = c.feature_vectors @ torch.diag(c.feature_values) @ c.feature_vectors.T
    sigma = torch.linalg.inv(torch.kron(b, a) + TAU * torch.eye(len(hessian), dtype=torch.float64))

    def inner(x, y):
        return float((sigma @ x @ sigma * y).sum())

    def units(n):
        unit = torch.eye(n * n, dtype=torch.float64).reshape(-1, n, n)
        return unit + unit.mT

    own = torch.kron(b, a)
    scale = inner(hessian, own) / inner(own, own)
    found_b, found_a = split(projected_factors(images, c, products), 3, 4)
    left_b = hessian - torch.kron(basis.T @ found_b @ basis, a)
    left_a = hessian - scale * torch.kron(b, found_a)
    size = inner(hessian, hessian) ** 0.5
    for unit in units(2):
        along = torch.kron(unit, a)
        assert abs(inner(left_b, along)) < 1e-9 * size * inner(along, along) ** 0.5
    for unit in units(4):
        along = torch.kron(b, unit)
        assert abs(inner(left_a, along)) < 1e-9 * size * inner(along, along) ** 0.5


def test_signs_and_order_of_eigenvectors_move_no_point(fitted):
    """Else the rule's error would jump from step to step, and no step would raise the ELBO any more."""
    _, fit, phi, _ = fitted
    c, z = fit.covariance, torch.randn(5, 2, dtype=torch.float64)
    turned = replace(c, class_vectors=-c.class_vectors.flip(1), class_values=c.class_values.flip(0))
    points = [one.perturb(one.logit_scale(augment(phi)), z) for one in (c, turned)]
    torch.testing.assert_close(points[0], points[1])


@pytest.mark.slow
def test_no_other_factors_have_a_larger_elbo(fitted):
    """Each direction of B and A, the mean the best for it: the ELBO falls both ways."""
    images, fit, phi, labels = fitted
    refined = fit.refine(phi, labels, num_points=256)
    assert refined.refinement.converged
    rule = logit_rule(images, fit.theta_mean, fit.covariance, 256, 0)
    c = refined.covariance
    b = c.class_vectors @ torch.diag(c.class_values) @ c.class_vectors.T
    a = c.feature_vectors @ torch.diag(c.feature_values) @ c.feature_vectors.T

    def bound(factors):
        covariance = covariance_of(factors, 3, TAU)
        scales = logit_scales(images, covariance)
        theta = maximise_mean(images, refined.theta_mean, covariance, scales, rule, TAU)
        loss, _ = expected_loss(images, theta, covariance, scales, rule)
        return elbo(images, theta, covariance, loss, TAU)

    best = bound(torch.cat([b.flatten(), a.flatten()]))
    assert best == pytest.approx(refined.elbo, abs=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        left, right = (torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (3, 4))
        for sign in (-0.3, 0.3):
            turned_b = torch.linalg.matrix_exp(sign * left) @ b @ torch.linalg.matrix_exp(sign * left.T)
            turned_a = torch.linalg.matrix_exp(sign * right) @ a @ torch.linalg.matrix_exp(sign * right.T)
            assert bound(torch.cat([turned_b.flatten(), a.flatten()])) < best + 0.01
            assert bound(torch.cat([b.flatten(), turned_a.flatten()])) < best + 0.01
