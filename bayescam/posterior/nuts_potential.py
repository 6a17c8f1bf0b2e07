"""The potential energy that NUTS walks on: the negative log joint in whitened contrast coordinates, with its gradient.

Softmax cannot see a common shift of all class rows, so theta (K, D+1), biases last, splits orthogonally into
Q eta (eta (K-1, D+1), Q the contrast basis) and a shift whose posterior *is* its prior. Only eta is walked on; the
shift is drawn independently. Whitening by a Gaussian with mean m and precision L L^T: Q eta = m + A z, where
A = (Q (x) I) L^-T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bayescam.parallel import memory
from bayescam.posterior.covariance import DiagCovariance, KronCovariance, contrast_basis
from bayescam.posterior.images import TrainingImages
from bayescam.posterior.model import negative_log_likelihood, one_hot

if TYPE_CHECKING:
    from bayescam.posterior.covariance import Covariance


_SHARE = 0.5
_Chunk = tuple[Tensor, Tensor, Tensor | None]


class Potential(Protocol):
    """What a kernel needs from a target over z (M,)."""

    dimension: int
    device: torch.device

    def value_and_gradient(self, z: Tensor) -> tuple[float, Tensor]:
        """U(z) and dU/dz (M,) in z's dtype."""

    def __call__(self, params: dict[str, Tensor]) -> Tensor:
        """U(params["z"]) as a 0-dim tensor that autograd can follow, as Pyro asks."""

    def unpack(self, z: Tensor, potential: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (S, M) and U there (S,) -> contrast part of theta (S, K, D+1), tau (S,), its log joint (S,)."""


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
    """``model.negative_log_likelihood`` of one theta over all images.

    Their chunks are made ready once for many calls where they take less than half of the memory, and read anew at each
    call where they do not. With a group rank 0 asks and the others ``serve``: theta goes out, the sums come back, and
    every decision of a walk is taken on one rank.

    Args:
        images: the training images.
    """

    def __init__(self, images: TrainingImages) -> None:
        self.images = images
        numbers = len(images.labels) * (images.num_features + images.num_classes)
        fits = numbers * torch.finfo(images.dtype).bits // 8 < _SHARE * memory(images.device)
        self._held = list(self._read()) if fits else None

    def _read(self) -> Iterable[_Chunk]:
        return (self._prepare(span, phi) for span, phi in self.images.chunks())

    def _prepare(self, span: slice, phi: Tensor) -> _Chunk:
        weights = self.images.image_weights
        truth = one_hot(self.images.labels[span], self.images.num_classes, phi.dtype)
        return phi, truth, None if weights is None else weights[span].to(phi)

    def value_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """theta (K, D+1) in the images' type -> (float, (K, D+1)); with a group of rank 0 alone."""
        if self.images.group is None:
            value, gradient = self._own(theta)
            return value.item(), gradient
        self._tell(theta)
        both = self._summed(theta)
        return both[0].item(), both[1:].view_as(theta).to(theta.dtype)

    def _own(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        chunks = iter(self._held or self._read())
        value, gradient = negative_log_likelihood(theta[None], *next(chunks))
        for chunk in chunks:
            more, slope = negative_log_likelihood(theta[None], *chunk)
            value, gradient = value + more, gradient.add_(slope)
        return value, gradient[0]

    def _summed(self, theta: Tensor) -> Tensor:
        """Value and gradient over all ranks' images, [1 + K(D+1)] float64."""
        value, gradient = self._own(theta)
        return self.images.total(torch.cat([value, gradient.flatten().double()]))

    def _tell(self, theta: Tensor | None) -> Tensor:
        """Rank 0's message on every rank: 1 and theta, or 0 and nothing to do any more."""
        k, width = self.images.num_classes, self.images.num_features + 1
        message = torch.zeros(1 + k * width, dtype=torch.float64, device=self.images.device)
        if theta is not None:
            message[0] = 1.0
            message[1:] = theta.flatten()
        return self.images.agreed(message)

    def serve(self) -> None:
        """Answer rank 0 until it says that it is done."""
        k, width = self.images.num_classes, self.images.num_features + 1
        while bool((message := self._tell(None))[0]):
            self._summed(message[1:].view(k, width).to(self.images.dtype))

    def release(self) -> None:
        """Let the ranks that ``serve`` go on."""
        self._tell(None)


class WhitenedPotential:
    """U(z) = -log p(y | m + A z) - log Normal(m + A z; 0, 1/tau), over the (K-1)(D+1) contrast coordinates.

    No Jacobian: A is constant. The walk's state z is float64; A and the products take the features' dtype.

    Args:
        likelihood: the data term.
        mean: m, (K, D+1), its columns summing to zero over classes.
        basis: A, (K(D+1), M), class-major.
        prior_precision: tau.
    """

    def __init__(self, likelihood: SoftmaxLikelihood, *, mean: Tensor, basis: Tensor, prior_precision: float) -> None:
        self.likelihood = likelihood
        self.prior_precision = prior_precision
        self.dimension = basis.shape[1]
        self.device = mean.device
        self._mean = mean.double()
        self._mean_low = mean.to(likelihood.images.dtype).flatten()
        self._basis = basis.to(likelihood.images.dtype).contiguous()
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

    def unpack(self, z: Tensor, potential: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta = self._mean + (z.double() @ self._basis.double().T).unflatten(-1, self._mean.shape)
        return theta, torch.full_like(potential, self.prior_precision), -potential


def _square_sum(theta: Tensor) -> float:
    return theta.double().square().sum().item()


def whitening_basis(covariance: Covariance) -> Tensor:
    """A (K(D+1), M), class-major, with A A^T the covariance of the contrast part; M = (K-1)(D+1).

    full: (Q (x) I) L^-T;  kron: (V (x) U) (b (x) a + tau)^-1/2;  diag: (Q (x) I) with each contrast's own sd.
    """
    k, width = covariance.num_classes, covariance.num_features + 1
    if isinstance(covariance, KronCovariance):
        vectors = torch.kron(covariance.class_vectors.contiguous(), covariance.feature_vectors.contiguous())
        return vectors * covariance.eigenvalues.flatten().rsqrt()
    if isinstance(covariance, DiagCovariance):
        contrast = contrast_basis(k, like=covariance.precision)
        sd = (contrast.T.square() @ covariance.precision.reciprocal()).sqrt().flatten()
        return torch.kron(contrast, torch.eye(width).to(contrast)) * sd
    factor = covariance.precision_cholesky
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    blocks = torch.linalg.solve_triangular(factor.mT, identity, upper=True).view(k - 1, width, -1)
    return torch.einsum("ki,idm->kdm", covariance.basis, blocks).reshape(k * width, -1)
