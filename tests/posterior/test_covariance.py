"""Every structure's methods against the dense covariance they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bayescam.posterior.covariance import (
    DiagCovariance,
    FullCovariance,
    KronCovariance,
    centring,
    contrast_basis,
    square_root,
)

K, D, TAU = 4, 3, 0.7
E = D + 1


def random_precision(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T / size + torch.eye(size, dtype=torch.float64)


def make(structure):
    if structure == "full":
        return FullCovariance(torch.linalg.cholesky(random_precision((K - 1) * E)), TAU, K)
    if structure == "kron":
        vectors = torch.linalg.eigh(random_precision(E))[1]
        return KronCovariance(
            contrast_basis(K),
            torch.rand(K - 1, dtype=torch.float64),
            vectors,
            torch.rand(E, dtype=torch.float64) * 5,
            TAU,
        )
    return DiagCovariance(torch.rand(K, E, dtype=torch.float64) + TAU, TAU)


def dense(covariance):
    """Sigma (K*E, K*E), class-major, written out from the definition."""
    if isinstance(covariance, DiagCovariance):
        return torch.diag(1 / covariance.precision.flatten())
    basis = contrast_basis(K)
    shift = torch.kron(torch.full((K, K), 1 / K, dtype=torch.float64), torch.eye(E, dtype=torch.float64) / TAU)
    if isinstance(covariance, FullCovariance):
        wide = torch.kron(basis, torch.eye(E, dtype=torch.float64))
        factor = covariance.precision_cholesky
        return wide @ torch.linalg.inv(factor @ factor.T) @ wide.T + shift
    b = covariance.class_vectors @ torch.diag(covariance.class_values) @ covariance.class_vectors.T
    a = covariance.feature_vectors @ torch.diag(covariance.feature_values) @ covariance.feature_vectors.T
    return torch.linalg.inv(torch.kron(b, a) + TAU * torch.eye(K * E, dtype=torch.float64))


@pytest.fixture(params=["full", "kron", "diag"])
def covariance(request):
    return make(request.param)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_contrasts_are_orthonormal_and_blind_to_the_shift(num_classes):
    basis = contrast_basis(num_classes)
    torch.testing.assert_close(basis.T @ basis, torch.eye(num_classes - 1, dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.T, centring(num_classes))


def test_bilinear_is_x_sigma_y(covariance):
    sigma = dense(covariance).reshape(K, E, K, E)
    a, b = torch.randn(2, K, dtype=torch.float64)
    x, y = torch.randn(2, 5, E, dtype=torch.float64), torch.randn(2, 6, E, dtype=torch.float64)
    expected = torch.einsum("k,nme,kelf,l,npf->nmp", a, x, sigma, b, y)
    torch.testing.assert_close(covariance.bilinear(a, b, x, y), expected)


def test_logit_covariance_is_the_dense_one(covariance):
    x = torch.randn(2, 5, E, dtype=torch.float64)
    expected = torch.einsum("...e,kelf,...f->...kl", x, dense(covariance).reshape(K, E, K, E), x)
    torch.testing.assert_close(covariance.logit_covariance(x), expected)


def test_variance_is_the_quadratic_form(covariance):
    x, directions = torch.randn(5, E, dtype=torch.float64), torch.randn(3, K, dtype=torch.float64)
    expected = torch.einsum("rk,nkl,rl->nr", directions, covariance.logit_covariance(x), directions)
    torch.testing.assert_close(covariance.variance(x, directions), expected)


def test_diagonal_and_log_determinant(covariance):
    sigma = dense(covariance)
    torch.testing.assert_close(covariance.diagonal().flatten(), sigma.diagonal())
    assert covariance.log_det_precision() == pytest.approx(-float(torch.logdet(sigma)), rel=1e-10)


def test_sample_has_mean_zero_and_covariance_sigma(covariance):
    count = 100_000
    draws = covariance.sample(count, torch.Generator().manual_seed(1)).flatten(1)
    sigma = dense(covariance)
    sd = sigma.diagonal().sqrt()
    assert float((draws.mean(0) / sd).abs().max()) < 5 / count**0.5
    error = (draws.T @ draws / count - sigma) / sd[:, None] / sd
    assert float(error.abs().max()) < 5 * (2 / count) ** 0.5


def test_unwhiten_has_covariance_sigma_apart_from_the_shift(covariance):
    size = covariance.whiten_gradient(torch.zeros(K, E, dtype=torch.float64)).numel()
    columns = torch.stack([covariance.unwhiten(z).flatten() for z in torch.eye(size, dtype=torch.float64)], 1)
    expected = dense(covariance)
    if covariance.structure != "diag":
        centre = torch.kron(centring(K), torch.eye(E, dtype=torch.float64))
        expected = centre @ expected @ centre
    torch.testing.assert_close(columns @ columns.T, expected)
    gradient = torch.randn(K, E, dtype=torch.float64)
    for fresh in (covariance, replace(covariance)):  # with and without the inverse factor at hand
        torch.testing.assert_close(fresh.whiten_gradient(gradient), columns.T @ gradient.flatten())


def test_perturbations_have_the_centred_logit_covariance(covariance):
    x = torch.randn(3, E, dtype=torch.float64)
    z = torch.eye(covariance.logit_rank, dtype=torch.float64)
    columns = covariance.perturb(covariance.logit_scale(x), z)
    expected = centring(K) @ covariance.logit_covariance(x) @ centring(K)
    torch.testing.assert_close(columns @ columns.mT, expected)


def test_relative_variance_is_that_of_the_difference(covariance):
    x, label = torch.randn(5, E, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    difference = torch.eye(K, dtype=torch.float64) - torch.eye(K, dtype=torch.float64)[label][:, None]
    expected = torch.einsum("nrk,nkl,nrl->nr", difference, covariance.logit_covariance(x), difference)
    torch.testing.assert_close(covariance.relative_variance(covariance.logit_scale(x), label), expected)


def test_distance_is_the_length_in_posterior_sds(covariance):
    theta = torch.randn(K, E, dtype=torch.float64)
    theta -= theta.mean(0)
    flat = theta.flatten()
    assert covariance.distance(theta) == pytest.approx(float(flat @ torch.linalg.solve(dense(covariance), flat)) ** 0.5)


def test_two_classes_of_diag_need_one_dimension():
    covariance = DiagCovariance(torch.rand(2, E, dtype=torch.float64) + 1, TAU)
    x = torch.randn(3, E, dtype=torch.float64)
    columns = covariance.perturb(covariance.logit_scale(x), torch.ones(1, 1, dtype=torch.float64))
    expected = centring(2) @ covariance.logit_covariance(x) @ centring(2)
    torch.testing.assert_close(columns @ columns.mT, expected)


def test_float32_copy_agrees(covariance):
    x = torch.randn(5, E, dtype=torch.float64)
    narrow = covariance.to(torch.float32).logit_covariance(x)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), covariance.logit_covariance(x), rtol=1e-4, atol=1e-5)


def test_square_root_of_a_singular_matrix():
    root = torch.randn(2, 3, 2, dtype=torch.float64)
    singular = root @ root.mT - 1e-17 * torch.eye(3, dtype=torch.float64)
    found = square_root(singular)
    torch.testing.assert_close(found @ found.mT, singular)


def test_whiten_is_mean_plus_inverse_transposed_cholesky():
    covariance = make("full")
    z = torch.randn(5, (K - 1) * E, dtype=torch.float64)
    expected = 2.0 + z @ torch.linalg.inv(covariance.precision_cholesky)
    torch.testing.assert_close(covariance.whiten(z, 2.0), expected)
