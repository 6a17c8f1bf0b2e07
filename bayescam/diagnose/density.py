"""The density of a Gaussian posterior: over all of theta, and over the contrasts, which are all that softmax sees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayescam.posterior.covariance import Covariance, DiagCovariance, FullCovariance, contrast_basis
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.model import log_prior

_LOG_2PI = math.log(2 * math.pi)


def log_density(laplace: Laplace, theta: Tensor) -> Tensor:
    """log q(theta) of a Gaussian posterior, constants included: theta (S, K, D+1) -> (S,).

    log q = -|z|^2 / 2 - P/2 log 2 pi + 1/2 log det Sigma^-1, with z = Sigma^-1/2 (theta - mean).
    """
    delta = theta - laplace.theta_mean
    size = delta.shape[1] * delta.shape[2]
    square = _mahalanobis(laplace.covariance, delta)
    return -0.5 * square - 0.5 * size * _LOG_2PI + 0.5 * laplace.covariance.log_det_precision()


def log_weight(laplace: Laplace, theta: Tensor, log_joint: Tensor) -> Tensor:
    """log p(y, eta) - log q(eta) over the contrasts eta = Q^T theta of draws theta (S, K, D+1) -> (S,).

    The weights of everything that depends on logits up to a common shift. The shift's posterior is its prior, so that
    p(y, eta) = p(y, theta) / Normal(shift; 0, 1/tau). Under "full" and "kron" that is so under q too, and the weights
    are those of theta; under "diag" they vary less than those.

    Args:
        laplace: q.
        theta: the draws.
        log_joint: log p(y, theta) of each, (S,).
    """
    shift = theta.sum(1) / math.sqrt(theta.shape[1])
    return log_joint - log_prior(shift, laplace.prior_precision) - _log_contrast_density(laplace, theta)


def _log_contrast_density(laplace: Laplace, theta: Tensor) -> Tensor:
    """log q(eta), of M = (K-1)(D+1) dimensions.

    "full" and "kron" keep the shift apart; under "diag" the contrasts of each column of theta have the covariance
    Q^T diag(variances) Q.
    """
    delta = theta - laplace.theta_mean
    delta = delta - delta.mean(1, keepdim=True)
    k, width = laplace.theta_mean.shape
    constant = -0.5 * (k - 1) * width * _LOG_2PI
    if not isinstance(laplace.covariance, DiagCovariance):
        half_log_det = 0.5 * (laplace.covariance.log_det_precision() - width * math.log(laplace.prior_precision))
        return constant + half_log_det - 0.5 * _mahalanobis(laplace.covariance, delta)
    basis = contrast_basis(k, like=delta)
    factor = torch.linalg.cholesky(torch.einsum("ki,ke,kj->eij", basis, laplace.covariance.diagonal(), basis))
    z = torch.linalg.solve_triangular(factor, torch.einsum("ki,ske->sei", basis, delta)[..., None], upper=False)
    half_log_det = -float(factor.diagonal(dim1=1, dim2=2).log().sum())
    return constant + half_log_det - 0.5 * z.square().flatten(1).sum(1)


def _mahalanobis(covariance: Covariance, delta: Tensor) -> Tensor:
    """(theta - mean)^T Sigma^-1 (theta - mean) of each (S, K, D+1) -> (S,)."""
    if isinstance(covariance, DiagCovariance):
        return (delta.square() * covariance.precision).flatten(1).sum(1)
    shift = delta.sum(1).square().sum(1) * covariance.prior_precision / covariance.num_classes
    if isinstance(covariance, FullCovariance):
        contrasts = torch.einsum("kj,ske->sje", covariance.basis, delta).flatten(1)
        return (contrasts @ covariance.precision_cholesky).square().sum(1) + shift
    rotated = torch.einsum("kj,ske,ef->sjf", covariance.class_vectors, delta, covariance.feature_vectors)
    return (rotated.square() * covariance.eigenvalues).flatten(1).sum(1) + shift
