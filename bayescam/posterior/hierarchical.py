"""A prior on the prior: tau ~ Gamma(shape, rate) sampled with the weights, so that no answer hangs on one tau.

Let the whitening Gaussian at tau_0 have mean m and precision V diag(h + tau_0) V^T on the contrasts, h >= 0 what the
data say. If the likelihood were Gaussian, its posterior at another tau would be

    theta(z, tau) = V [ c (h + tau_0) / (h + tau) + z / sqrt(h + tau) ],   c = V^T m,   z ~ Normal(0, I),

and that is the map used: where the data say nothing (h = 0) it is the non-centred form z / sqrt(tau), where they say
much it leaves theta alone, and between the two z stays nearly independent of tau (Papaspiliopoulos, Roberts and Skold
2007 on partial non-centring). log tau = log tau_0 + scale * v, and (z, v) is what NUTS walks on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayescam.posterior.nuts_potential import SoftmaxLikelihood, differentiable


class HierarchicalPotential:
    """U(z, v) = -log p(y | theta) - log Normal(theta; 0, 1/tau) - log Gamma(tau; shape, rate) - log Jacobian.

    The Jacobian of (z, v) -> (theta, tau) is prod (h + tau)^-1/2 times tau; its constant factor is left out.

    Args:
        likelihood: the data term.
        mean: m, (K, D+1), its columns summing to zero over classes.
        basis: A, (K(D+1), M), with A A^T the covariance at tau_0.
        prior_precision: tau_0.
        tau_prior: (shape, rate).
    """

    def __init__(
        self,
        likelihood: SoftmaxLikelihood,
        *,
        mean: Tensor,
        basis: Tensor,
        prior_precision: float,
        tau_prior: tuple[float, float],
    ) -> None:
        vectors, values, _ = torch.linalg.svd(basis.double(), full_matrices=False)
        self.likelihood = likelihood
        self.tau_prior = tau_prior
        self.dimension = basis.shape[1] + 1
        self.device = mean.device
        self._shape = mean.shape
        self._vectors = vectors.to(likelihood.images.dtype)
        self._tau_0 = prior_precision
        # Rounding can leave an eigenvalue of A A^T a hair above 1/tau_0, where h is zero.
        self._data_precision = (values.square().reciprocal() - prior_precision).clamp_min(0.0)
        self._linear = (vectors.T @ mean.double().flatten()) * (self._data_precision + prior_precision)
        told = (self._data_precision / (self._data_precision + prior_precision)).sum().item()
        self._scale = math.sqrt(2.0 / (told + 2.0 * tau_prior[0]))

    def _tau(self, v: Tensor) -> Tensor:
        return self._tau_0 * (self._scale * v).exp()

    def _coordinates(self, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """V^T theta and h + tau, both (..., M)."""
        precision = self._data_precision + tau.unsqueeze(-1)
        return self._linear / precision + z * precision.rsqrt(), precision

    def value_and_gradient(self, z: Tensor) -> tuple[float, Tensor]:
        """U(z) and dU/dz, (M+1,): the whitened weights, then the standardised log tau."""
        shape, rate = self.tau_prior
        inner, tau = z[:-1], self._tau(z[-1])
        coordinates, precision = self._coordinates(inner, tau)
        m = len(inner)
        theta = (self._vectors @ coordinates.to(self._vectors.dtype)).view(self._shape)
        nll, slope = self.likelihood.value_and_gradient(theta)
        squared = coordinates.dot(coordinates)
        log_tau = tau.log()
        rest = (
            0.5 * tau * squared
            - 0.5 * m * (log_tau - math.log(2 * math.pi))
            + 0.5 * precision.log().sum()
            - (shape * log_tau - rate * tau + shape * math.log(rate) - math.lgamma(shape))
        )
        down = (self._vectors.T @ slope.flatten()).to(z.dtype) + tau * coordinates
        along_tau = -(self._linear / precision + 0.5 * inner * precision.rsqrt()) / precision
        by_log_tau = tau * (0.5 * squared + down.dot(along_tau) + 0.5 * precision.reciprocal().sum() + rate)
        by_log_tau = by_log_tau - 0.5 * m - shape
        gradient = torch.cat([down * precision.rsqrt(), (self._scale * by_log_tau).reshape(1)])
        return nll + rest.item(), gradient

    def __call__(self, params: dict[str, Tensor]) -> Tensor:
        return differentiable(self, params["z"])

    def unpack(self, z: Tensor, potential: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tau = self._tau(z[:, -1])
        coordinates, precision = self._coordinates(z[:, :-1], tau)
        theta = (coordinates @ self._vectors.double().T).unflatten(-1, self._shape)
        return theta, tau, -potential + 0.5 * precision.log().sum(-1) - tau.log()
