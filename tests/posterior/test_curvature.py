"""Hessians against autodiff, the skipped rows against their bound, products against the matrix."""

from __future__ import annotations

import math

import pytest
import torch

from bayescam.errors import NotPositiveDefiniteError
from bayescam.posterior import curvature
from bayescam.posterior.covariance import contrast_basis
from bayescam.posterior.curvature import (
    check_full_fits,
    class_curvature,
    computed_once,
    diag_covariance,
    feature_gram,
    full_covariance,
    hessian_product,
    kron_covariance,
    pair_grams,
    pair_products,
    probabilities_at,
)
from bayescam.posterior.images import augment, check_images
from bayescam.posterior.map import whitening
from bayescam.posterior.model import negative_log_joint

N, D, K, TAU = 50, 4, 3, 0.3


@pytest.fixture(params=[None, [0.5, 1.0, 3.0]])
def images(request):
    phi = torch.randn(N, D, dtype=torch.float64)
    labels = torch.arange(N) % K
    return check_images(phi, labels, class_weights=None if request.param is None else torch.tensor(request.param))


def autodiff_hessian(images, theta):
    weights = torch.ones(N) if images.image_weights is None else images.image_weights

    def energy(flat):
        logits = augment(images.features) @ flat.reshape(K, D + 1).T
        picked = logits.log_softmax(1)[torch.arange(N), images.labels]
        return -(weights * picked).sum() + TAU / 2 * flat.square().sum()

    return torch.autograd.functional.hessian(energy, theta.flatten())


def full_at(images, theta):
    probabilities = probabilities_at(theta, images)
    return full_covariance(images, lambda span, phi: pair_products(probabilities(span, phi)), TAU)


def test_full_is_the_autodiff_hessian(images):
    theta = torch.randn(K, D + 1, dtype=torch.float64)
    hessian = autodiff_hessian(images, theta)
    wide = torch.kron(contrast_basis(K), torch.eye(D + 1, dtype=torch.float64))
    factor = full_at(images, theta).precision_cholesky
    torch.testing.assert_close(factor @ factor.T, wide.T @ hessian @ wide, rtol=1e-10, atol=1e-10)


def test_the_shift_has_the_prior_precision_exactly(images):
    hessian = autodiff_hessian(images, torch.randn(K, D + 1, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(hessian)
    torch.testing.assert_close(eigenvalues[: D + 1], torch.full((D + 1,), TAU, dtype=torch.float64))


def test_diag_is_the_hessian_s_diagonal(images):
    theta = torch.randn(K, D + 1, dtype=torch.float64)
    found = diag_covariance(images, probabilities_at(theta, images), TAU)
    torch.testing.assert_close(found.precision.flatten(), autodiff_hessian(images, theta).diagonal())


def test_product_is_hessian_times_vector(images):
    theta, vector = torch.randn(2, K, D + 1, dtype=torch.float64)
    expected = autodiff_hessian(images, theta) @ vector.flatten()
    found = hessian_product(probabilities_at(theta, images), vector, images, TAU)
    torch.testing.assert_close(found.flatten(), expected)


def test_probabilities_are_computed_once_where_they_take_little_memory(images, monkeypatch):
    asked = []

    def counted(span, phi):
        asked.append(span)
        return torch.full((len(phi), K), span.start + 0.5)

    monkeypatch.setattr(curvature, "_KEPT_ELEMENTS", N * K)
    kept = computed_once(counted, images)
    for _ in range(2):
        for span, phi in images.chunks(7):
            assert bool((kept(span, phi) == span.start + 0.5).all())
            assert len(kept(span, phi)) == len(phi)
    assert len(asked) == math.ceil(N / 7)
    monkeypatch.setattr(curvature, "_KEPT_ELEMENTS", N * K - 1)
    assert computed_once(counted, images) is counted


def test_metric_of_the_descent_is_the_kronecker_curvature_at_zero(images):
    zero = torch.zeros(K, D + 1, dtype=torch.float64)
    curved = class_curvature(images, probabilities_at(zero, images))
    expected = kron_covariance(feature_gram(images), curved, 1.0, images.weight())
    rows = torch.randn(5, D + 1, dtype=torch.float64)
    torch.testing.assert_close(whitening(images).logit_covariance(rows), expected.logit_covariance(rows))


def test_kron_is_the_product_of_mean_curvature_and_gram(images):
    theta = torch.randn(K, D + 1, dtype=torch.float64)
    weights = torch.ones(N) if images.image_weights is None else images.image_weights
    proba = probabilities_at(theta, images)(slice(0, N), images.features)
    b = torch.diag((weights[:, None] * proba).sum(0)) - (weights[:, None] * proba).T @ proba
    a = augment(images.features).T @ (weights[:, None] * augment(images.features))
    dense = torch.kron(b / weights.sum(), a) + TAU * torch.eye(K * (D + 1), dtype=torch.float64)
    from bayescam.posterior.laplace import curvature_at

    found = curvature_at(images, theta, whitening(images), TAU, "kron")
    torch.testing.assert_close(found.diagonal().flatten(), torch.linalg.inv(dense).diagonal())


def test_chunks_change_nothing(images, monkeypatch):
    theta = torch.randn(K, D + 1, dtype=torch.float64)
    whole = full_at(images, theta).precision_cholesky
    value, gradient = negative_log_joint(theta, images, TAU)
    monkeypatch.setattr(curvature, "_GRAM_ROWS", 7)
    monkeypatch.setattr("bayescam.posterior.images._CHUNK_ELEMENTS", 40)
    torch.testing.assert_close(full_at(images, theta).precision_cholesky, whole)
    again = negative_log_joint(theta, images, TAU)
    torch.testing.assert_close(again[0], value)
    torch.testing.assert_close(again[1], gradient)


def test_rows_left_out_change_no_block_by_a_millionth():
    """Confident rows over many magnitudes: many are skipped, every block stays within 1e-6 of its norm."""
    phi = torch.relu(torch.randn(3000, 12)) + 0.1
    images = check_images(phi, torch.arange(3000) % 4)
    logits = torch.randn(3000, 4) * torch.logspace(-1, 1.5, 3000)[:, None]
    weights = pair_products(logits.softmax(1))
    rows = augment(phi)
    kept = curvature._kept(rows, weights, torch.nn.functional.normalize(rows.mean(0), dim=0), 1e9)
    assert 0.05 < float(kept.float().mean()) < 0.95
    wide = check_images(phi.double(), torch.arange(3000) % 4)
    exact = pair_grams(wide, lambda span, _: weights[span].double(), 1e9)
    thinned = pair_grams(wide, lambda span, _: (weights * kept)[span].double(), 1e9)
    norms = torch.linalg.matrix_norm(exact)
    assert float((torch.linalg.matrix_norm(exact - thinned) / norms).max()) < 1e-6
    found = pair_grams(images, lambda span, _: weights[span], 1e9)
    assert float((torch.linalg.matrix_norm(exact - found) / norms).max()) < 2e-6


def test_rows_left_out_are_small_beside_the_prior():
    """A thousand long rows of one class of pictures hide a few short ones, which alone speak for the second feature."""
    phi = torch.zeros(1500, 2)
    phi[:1000, 0], phi[1000:, 1] = 1000 * torch.rand(1000), 1.0
    images, wide = (check_images(rows, torch.arange(1500) % 2) for rows in (phi, phi.double()))
    weights = torch.full((1500, 1), 0.1)
    weights[1000:] = 0.01
    lost = pair_grams(wide, lambda span, _: weights[span].double(), 0.1) - pair_grams(
        images, lambda span, _: weights[span], 0.1
    )
    assert float(lost[0, 1, 1].abs()) < 1e-3 * 0.1 / 2
    scaled = pair_grams(images, lambda span, _: weights[span], 1e12)
    assert float(scaled[0, 1, 1]) < 0.1  # what a bound by the block's norm alone would let go


def test_what_float64_cannot_hold_raises_with_the_number():
    phi = torch.randn(50, 2, dtype=torch.float64)
    repeated = check_images(torch.cat([phi, 10 * phi], dim=1), torch.arange(50) % 3)
    with pytest.raises(NotPositiveDefiniteError, match=r"prior_precision 1e-13; standardise the features"):
        full_covariance(repeated, lambda span, _: torch.full((len(repeated.labels[span]), 3), 0.1), 1e-13)
    far = full_covariance(repeated, lambda span, _: torch.full((len(repeated.labels[span]), 3), 0.1), 1e-6)
    assert bool(torch.isfinite(far.precision_cholesky).all())


def test_a_hessian_that_no_memory_holds_is_refused_before_anything_is_computed(monkeypatch):
    images = check_images(torch.randn(4, 2048), torch.tensor([0, 1, 2, 999]))
    monkeypatch.setattr(curvature, "memory", lambda _: 24 * 2.0**30)
    with pytest.raises(ValueError, match=r"'full' needs .* GiB for 1000 classes of 2048 features.*'kron' or 'diag'"):
        check_full_fits(images)
    check_full_fits(check_images(torch.randn(4, 2048), torch.tensor([0, 1, 2, 6])))
