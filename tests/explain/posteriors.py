"""Small posteriors whose covariance is also written out densely, (P, P), class-major, the bias last in every class."""

from __future__ import annotations

import torch
from torch import Tensor

from bayescam.posterior.covariance import DiagCovariance, FullCovariance, KronCovariance, contrast_basis
from bayescam.posterior.laplace import Laplace

K, D, TAU = 4, 6, 0.7
E = D + 1
STRUCTURES = ("full", "kron", "diag")


def _spd(size: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
    return root @ root.T / size


def make(structure: str, *, seed: int = 0, num_classes: int = K, num_features: int = D) -> tuple[Laplace, Tensor]:
    """A Laplace object and its dense covariance."""
    generator = torch.Generator().manual_seed(seed)
    k, e = num_classes, num_features + 1
    mean = torch.randn(k, e, generator=generator, dtype=torch.float64)
    basis, eye = contrast_basis(k), torch.eye(e, dtype=torch.float64)
    shift = torch.kron(torch.full((k, k), 1 / k, dtype=torch.float64), eye / TAU)
    if structure == "full":
        precision = _spd((k - 1) * e, generator) + TAU * torch.eye((k - 1) * e, dtype=torch.float64)
        covariance = FullCovariance(torch.linalg.cholesky(precision), TAU, k)
        lift = torch.kron(basis, eye)
        dense = lift @ torch.linalg.inv(precision) @ lift.T + shift
    elif structure == "kron":
        small, features = _spd(k - 1, generator), _spd(e, generator)
        values, vectors = torch.linalg.eigh(small)
        feature_values, feature_vectors = torch.linalg.eigh(features)
        covariance = KronCovariance(basis @ vectors, values, feature_vectors, feature_values, TAU)
        classes = basis @ small @ basis.T
        dense = torch.linalg.inv(torch.kron(classes, features) + TAU * torch.eye(k * e, dtype=torch.float64))
    else:
        precision = TAU + torch.rand(k, e, generator=generator, dtype=torch.float64)
        covariance = DiagCovariance(precision, TAU)
        dense = torch.diag(1 / precision.flatten())
    return Laplace(mean[:, :-1].contiguous(), mean[:, -1].contiguous(), covariance, TAU, 0.0, 50, 0.0, 0.0), dense


def random_maps(num: int = 3, *, size: tuple[int, int] = (2, 3), num_features: int = D, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, num_features, *size, generator=generator, dtype=torch.float64)


def block(dense: Tensor, direction: Tensor, num_classes: int = K) -> Tensor:
    """Sigma(a, a) = sum_kl a_k a_l Sigma_kl, (E, E), read off the dense covariance."""
    e = len(dense) // num_classes
    return torch.einsum("k,kelf,l->ef", direction, dense.reshape(num_classes, e, num_classes, e), direction)


def centre(num_classes: int = K) -> Tensor:
    return torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
