"""The potential energy that NUTS walks on: the negative log joint in whitened contrast coordinates, with its gradient.

Softmax cannot see a common shift of all class rows, so theta (K, D+1), biases last, splits orthogonally into
Q eta (eta (K-1, D+1), Q the contrast basis) and a shift whose posterior *is* its prior. Only eta is walked on; the shift
is drawn independently. Whitening by a Gaussian with mean m and precision L L^T: Q eta = m + A z, A = (Q (x) I) L^-T.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Potential(Protocol):
    """What a kernel needs from a target over z (M,)."""

    dimension: int

    def value_and_gradient(self, z: Tensor) -> tuple[float, Tensor]:
        """U(z) and dU/dz (M,) in z's dtype."""

    def __call__(self, params: dict[str, Tensor]) -> Tensor:
        """U(params["z"]) as a 0-dim tensor that autograd can follow, as Pyro asks."""

    def unpack(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(S, M) -> contrast part of theta (S, K, D+1), prior precision (S,), log joint of that part (S,)."""


class _ClosedForm(torch.autograd.Function):
    """U with its closed-form gradient: one evaluation gives both."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, potential: Potential) -> Tensor:
        value, gradient = potential.value_and_gradient(z)
        ctx.save_for_backward(gradient)
        return z.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0] * gradient, None


def differentiable(potential: Potential, z: Tensor) -> Tensor:
    """U(z) as a node of autograd's graph whose backward is the closed form."""
    return _ClosedForm.apply(z, potential)


class SoftmaxLikelihood:
    """-log p(y | theta) = -sum_n a_n log softmax(theta phi~_n)_{y_n} and its gradient, class-major.

    Two matrix products with the features and one softmax along the class axis of a (K, N) array, which is many times
    faster than along the short last axis of (N, K). Products are in the features' dtype, sums over images in float64.

    Args:
        features: (N, D), float32 or float64.
        labels: (N,) int64 in 0..K-1.
        num_classes: K.
        class_weights: (K,) weights of a generalised likelihood, a_n = class_weights[y_n], or None for a_n = 1.
        group: a torch.distributed process group; features and labels are then this rank's shard.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        class_weights: Tensor | None = None,
        group: Any = None,
    ) -> None:
        n = features.shape[0]
        self.features = features.contiguous()
        self.one_hot = features.new_zeros(num_classes, n)
        self.one_hot[labels, torch.arange(n, device=labels.device)] = 1
        self.true_cells = labels * n + torch.arange(n, device=labels.device)
        self.row_weights = None if class_weights is None else class_weights.to(features)[labels]
        self.group = group

    def value_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """theta (K, D+1) in the features' dtype -> (float, (K, D+1))."""
        weight, bias = theta[:, :-1], theta[:, -1:]
        log_probs = torch.log_softmax(torch.addmm(bias, weight, self.features.T), 0)
        picked = log_probs.take(self.true_cells)
        residual = log_probs.exp_().sub_(self.one_hot)
        if self.row_weights is not None:
            picked, residual = picked * self.row_weights, residual * self.row_weights
        gradient = torch.cat([residual @ self.features, residual.sum(1, keepdim=True)], 1)
        value = -picked.sum(dtype=torch.float64)
        if self.group is None:
            return value.item(), gradient
        both = torch.cat([value[None], gradient.flatten().double()])
        dist.all_reduce(both, group=self.group)
        return both[0].item(), both[1:].view_as(gradient).to(gradient.dtype)

    def values(self, theta: Tensor) -> Tensor:
        """-log p(y | theta) for each of many theta (S, K, D+1) -> (S,), in float64, one at a time in memory."""
        out = [self.value_and_gradient(one.to(self.features))[0] for one in theta]
        return torch.tensor(out, dtype=torch.float64, device=theta.device)


class WhitenedPotential:
    """U(z) = -log p(y | m + A z) - log Normal(m + A z; 0, 1/tau), over the (K-1)(D+1) contrast coordinates.

    No Jacobian: A is constant. The walk's state z is float64; A and the products take the features' dtype.

    Args:
        likelihood: the data term.
        mean: m, (K, D+1), its columns summing to zero over classes.
        basis: A, (K(D+1), M), class-major.
        prior_precision: tau.
    """

    def __init__(
        self, likelihood: SoftmaxLikelihood, *, mean: Tensor, basis: Tensor, prior_precision: float
    ) -> None:
        self.likelihood = likelihood
        self.prior_precision = prior_precision
        self.dimension = basis.shape[1]
        self._mean = mean.double()
        self._mean_low = mean.to(likelihood.features).flatten()
        self._basis = basis.to(likelihood.features).contiguous()
        self._log_norm = 0.5 * self.dimension * math.log(prior_precision / (2 * math.pi))

    def value_and_gradient(self, z: Tensor) -> tuple[float, Tensor]:
        tau = self.prior_precision
        theta = torch.addmv(self._mean_low, self._basis, z.to(self._basis.dtype))
        nll, gradient = self.likelihood.value_and_gradient(theta.view_as(self._mean))
        squared = torch.dot(theta, theta).item() if theta.dtype == torch.float64 else _square_sum(theta)
        gradient = gradient.view(-1).add_(theta, alpha=tau)
        return nll + 0.5 * tau * squared - self._log_norm, (self._basis.T @ gradient).to(z.dtype)

    def __call__(self, params: dict[str, Tensor]) -> Tensor:
        return differentiable(self, params["z"])

    def unpack(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta = self._mean + (z.double() @ self._basis.double().T).unflatten(-1, self._mean.shape)
        tau = z.new_full(z.shape[:1], self.prior_precision, dtype=torch.float64)
        return theta, tau, -self.energies(z)

    def energies(self, z: Tensor) -> Tensor:
        """U at each of many z (S, M) -> (S,)."""
        return torch.tensor([self.value_and_gradient(row)[0] for row in z], dtype=torch.float64)


def _square_sum(theta: Tensor) -> float:
    return theta.double().square().sum().item()


def whitening_basis(contrast: Tensor, precision_cholesky: Tensor | None, num_inputs: int) -> Tensor:
    """A = (Q (x) I) L^-T, (K(D+1), (K-1)(D+1)); L None gives the orthonormal, unwhitened A = Q (x) I.

    Args:
        contrast: Q, (K, K-1).
        precision_cholesky: L, lower, of the contrast-basis precision, class-contrast-major.
        num_inputs: D+1.
    """
    size = contrast.shape[1] * num_inputs
    identity = torch.eye(size, dtype=contrast.dtype, device=contrast.device)
    if precision_cholesky is not None:
        identity = torch.linalg.solve_triangular(precision_cholesky.mT.to(contrast), identity, upper=True)
    blocks = identity.view(contrast.shape[1], num_inputs, size)
    return torch.einsum("ki,idm->kdm", contrast, blocks).reshape(-1, size)
