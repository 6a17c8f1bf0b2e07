"""The posterior covariance of the last layer in three structures, all with the same methods.

Rows are augmented throughout: x is (..., D+1), features with a last entry 1 (logits) or 0 (a CAM cell without its
bias). E = D+1. Parameters are the (K, E) matrix [weight, bias], class-major.

Softmax cannot see a shift common to all classes. With Q (K, K-1) orthonormal and Q^T 1 = 0
(``contrast_basis``), theta = Q eta + 1 s / sqrt(K): the likelihood sees eta alone, so the posterior of s is its
prior, Normal(0, 1/tau), exactly. ``FullCovariance`` and ``KronCovariance`` keep the two parts apart, which is
what makes them exact in float32 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

_SelfT = TypeVar("_SelfT", bound="_Movable")


def contrast_basis(num_classes: int, *, like: Tensor | None = None) -> Tensor:
    """Helmert's orthonormal contrasts: Q (K, K-1) with Q^T Q = I, Q^T 1 = 0, Q Q^T = I - 11^T/K.

    Args:
        num_classes: K >= 2.
        like: a tensor whose dtype and device the basis takes; float64 on the CPU without it.
    """
    k = num_classes
    column = torch.arange(1, k, dtype=torch.float64)
    basis = torch.ones(k, k - 1, dtype=torch.float64).triu()
    basis[torch.arange(1, k), torch.arange(k - 1)] = -column
    basis /= (column * (column + 1)).sqrt()
    return basis if like is None else basis.to(like)


def centring(num_classes: int, *, like: Tensor | None = None) -> Tensor:
    """C = I - 11^T/K, (K, K): what is left of the logits when their common shift is taken out."""
    eye = torch.eye(num_classes, dtype=torch.float64)
    centre = eye - 1.0 / num_classes
    return centre if like is None else centre.to(like)


class _Movable:
    """Dataclasses of tensors that follow ``.to``."""

    def to(self: _SelfT, target: torch.device | torch.dtype | str) -> _SelfT:
        """The same covariance on another device or in another floating-point type."""
        return self.mapped(lambda value: value.to(target))

    def mapped(self: _SelfT, change: Callable[[Tensor], Tensor]) -> _SelfT:
        """The same with every tensor changed."""
        tensors = {
            field.name: change(value)
            for field in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class FullCovariance(_Movable):
    """Sigma = (Q (x) I) (L L^T)^-1 (Q (x) I)^T + 11^T/K (x) I/tau.

    Args:
        precision_cholesky: L (M, M), lower, M = (K-1)(D+1), contrast-major: the Cholesky factor of the Hessian of
            -log joint in the contrast basis.
        prior_precision: tau.
        num_classes: K.
    """

    precision_cholesky: Tensor
    prior_precision: float
    num_classes: int
    structure: ClassVar[str] = "full"

    def to(self, target: torch.device | torch.dtype | str) -> FullCovariance:
        """The same covariance on another device or in another type; L^-1 is taken in the wider one."""
        moved = super().to(target)
        moved.__dict__["inverse_cholesky"] = self.inverse_cholesky.to(target)
        return moved

    @property
    def num_features(self) -> int:
        return self.precision_cholesky.shape[0] // (self.num_classes - 1) - 1

    @property
    def logit_rank(self) -> int:
        """How many standard normals ``perturb`` turns into one draw of centred logits."""
        return self.num_classes - 1

    @cached_property
    def basis(self) -> Tensor:
        return contrast_basis(self.num_classes, like=self.precision_cholesky)

    @cached_property
    def inverse_cholesky(self) -> Tensor:
        """L^-1 seen as (M, K-1, D+1); it is lower triangular, so columns of contrast j start at row j(D+1)."""
        factor, width = self.precision_cholesky, self.num_features + 1
        inverse = torch.zeros_like(factor)
        for start in range(0, len(factor), width):
            inverse[start:, start : start + width].diagonal().fill_(1)
            columns = slice(start, start + width)
            inverse[start:, columns] = torch.linalg.solve_triangular(
                factor[start:, start:], inverse[start:, columns], upper=False
            )
        return inverse.unflatten(1, (self.num_classes - 1, width))

    def whiten(self, z: Tensor, mean: Tensor | float = 0.0) -> Tensor:
        """eta = mean + L^-T z for standard normal z; z and eta (..., M)."""
        return mean + torch.linalg.solve_triangular(self.precision_cholesky.T, z.unsqueeze(-1), upper=True).squeeze(-1)

    def bilinear(self, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x Sigma(a, b) y^T with Sigma(a, b) = sum_kl a_k b_l Sigma_kl; x (..., M, D+1), y (..., M2, D+1)."""
        between = self.between(a, b)
        return x.to(between) @ between @ y.to(between).mT

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """Sigma(a, b) = Cov(a^T theta, b^T theta) of two directions over the classes, (K,) each: (D+1, D+1)."""
        left = self._whitened(a)
        found = left.T @ (left if a is b else self._whitened(b))
        shift = a.sum() * b.sum() / (self.num_classes * self.prior_precision)
        found.diagonal().add_(shift)
        return found

    def _whitened(self, direction: Tensor) -> Tensor:
        """W (M, D+1) with W^T W = Sigma(a, a), the shift apart, of a = direction (K,)."""
        inverse, width = self.inverse_cholesky, self.num_features + 1
        found = inverse.new_zeros(len(inverse), width)
        for j, share in enumerate(direction.to(self.basis) @ self.basis):
            found[j * width :].addcmul_(inverse[j * width :, j], share)
        return found

    def contrast_covariance(self, x: Tensor) -> Tensor:
        """Covariance of Q^T f at each row: x (..., D+1) -> (..., K-1, K-1)."""
        rows = x.to(self.precision_cholesky).reshape(-1, x.shape[-1])
        m, contrasts, width = self.inverse_cholesky.shape
        out = rows.new_empty(len(rows), contrasts, contrasts)
        chunk = max(16, (1 << 21) // (m * contrasts))
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            whitened = part.new_zeros(len(part), contrasts, m)
            for j in range(contrasts):
                whitened[:, j, j * width :] = part @ self.inverse_cholesky[j * width :, j].T
            out[start : start + chunk] = whitened @ whitened.mT
        return out.reshape(*x.shape[:-1], contrasts, contrasts)

    def logit_covariance(self, x: Tensor) -> Tensor:
        """Cov of the raw logits weight phi + bias at each row, shift included: (..., D+1) -> (..., K, K)."""
        shift = x.to(self.precision_cholesky).square().sum(-1) / (self.num_classes * self.prior_precision)
        return self.basis @ self.contrast_covariance(x) @ self.basis.T + shift[..., None, None]

    def variance(self, x: Tensor, directions: Tensor) -> Tensor:
        """Var(direction . f) at each row: x (..., D+1), directions (R, K) -> (..., R)."""
        directions = directions.to(self.precision_cholesky)
        return _quadratic(self.logit_covariance(x), directions)

    def logit_scale(self, x: Tensor) -> Tensor:
        """R (n, K-1, K-1) with R R^T the covariance of Q^T f: all that ``perturb`` needs of x (n, D+1)."""
        return square_root(self.contrast_covariance(x))

    def perturb(self, scale: Tensor, z: Tensor) -> Tensor:
        """Centred logits minus their mean, from ``logit_scale`` and standard normals z (T, K-1): (n, K, T)."""
        return self.basis.to(scale) @ scale @ z.to(scale).T

    def relative_variance(self, scale: Tensor, label: Tensor) -> Tensor:
        """Var(f_k - f_label) from ``logit_scale``, label (n,): (n, K)."""
        rows = self.basis.to(scale) @ scale
        return (rows - rows[torch.arange(len(label), device=label.device), label].unsqueeze(1)).square().sum(-1)

    def unwhiten(self, z: Tensor) -> Tensor:
        """theta = (Q (x) I) L^-T z, of covariance Sigma (the shift apart) for standard normal z: (M,) -> (K, D+1)."""
        return self.basis @ self.whiten(z).unflatten(0, (-1, self.num_features + 1))

    def whiten_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient in z of a function whose gradient in theta is (K, D+1): the transpose of ``unwhiten``."""
        seen = (self.basis.T @ gradient).reshape(-1, 1)
        return torch.linalg.solve_triangular(self.precision_cholesky, seen, upper=False).squeeze(1)

    def distance(self, theta: Tensor) -> float:
        """sqrt(theta^T Sigma^-1 theta) of a (K, D+1) that sums to nought over classes: its length in posterior sds."""
        return float((self.precision_cholesky.T @ (self.basis.T @ theta).flatten()).norm())

    def diagonal(self) -> Tensor:
        """The variances of [weight, bias], (K, D+1)."""
        classes = torch.eye(self.num_classes).to(self.precision_cholesky)
        variances = torch.stack([self._whitened(one).square_().sum(0) for one in classes])
        return variances + 1.0 / (self.num_classes * self.prior_precision)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Zero-mean draws of [weight, bias]: (S, K, D+1)."""
        factor = self.precision_cholesky
        width = self.num_features + 1
        z = torch.randn(num_samples, len(factor), generator=generator, dtype=factor.dtype, device=factor.device)
        s = torch.randn(num_samples, 1, width, generator=generator, dtype=factor.dtype, device=factor.device)
        eta = torch.linalg.solve_triangular(factor.T, z.T, upper=True).T.unflatten(1, (-1, width))
        return self.basis @ eta + s / (self.num_classes * self.prior_precision) ** 0.5

    def log_det_precision(self) -> float:
        """log det Sigma^-1, over all K(D+1) parameters."""
        seen = 2 * self.precision_cholesky.diagonal().double().log().sum()
        return float(seen) + (self.num_features + 1) * math.log(self.prior_precision)


@dataclass(frozen=True, eq=False)
class KronCovariance(_Movable):
    """Sigma = (B (x) A + tau I)^-1, never formed: B (K, K) over classes, A (D+1, D+1) over features.

    B annihilates 1, so B = V diag(b) V^T with V (K, K-1) orthonormal contrasts, and the shift keeps precision tau.

    Args:
        class_vectors: V (K, K-1).        class_values: b (K-1,) >= 0.
        feature_vectors: U (D+1, D+1).    feature_values: a (D+1,) >= 0, A = U diag(a) U^T.
        prior_precision: tau.
    """

    class_vectors: Tensor
    class_values: Tensor
    feature_vectors: Tensor
    feature_values: Tensor
    prior_precision: float
    structure: ClassVar[str] = "kron"

    @property
    def num_classes(self) -> int:
        return self.class_vectors.shape[0]

    @property
    def num_features(self) -> int:
        return self.feature_vectors.shape[0] - 1

    @property
    def logit_rank(self) -> int:
        """How many standard normals ``perturb`` turns into one draw of centred logits."""
        return self.num_classes - 1

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The precisions b_i a_e + tau along the eigenvectors, (K-1, D+1); the shift's D+1 are tau."""
        return self.class_values[:, None] * self.feature_values + self.prior_precision

    def bilinear(self, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x Sigma(a, b) y^T with Sigma(a, b) = sum_kl a_k b_l Sigma_kl; x (..., M, D+1), y (..., M2, D+1)."""
        a, b, x, y = (value.to(self.class_vectors) for value in (a, b, x, y))
        along = ((a @ self.class_vectors) * (b @ self.class_vectors)) @ self.eigenvalues.reciprocal()
        along = along + a.sum() * b.sum() / (self.num_classes * self.prior_precision)
        return (x @ self.feature_vectors * along) @ (y @ self.feature_vectors).mT

    def with_classes(self, class_curvature: Tensor, num_images: float) -> KronCovariance:
        """The same feature factor A with B = class_curvature / num_images, (K, K), projected onto the contrasts."""
        basis = contrast_basis(self.num_classes, like=self.class_vectors)
        values, vectors = torch.linalg.eigh(basis.T @ class_curvature.to(basis) @ basis / num_images)
        return replace(self, class_vectors=basis @ vectors, class_values=values.clamp(min=0))

    def solve(self, gradient: Tensor) -> Tensor:
        """Sigma g for the part of g that likelihoods see; g (K, D+1) with rows summing to zero -> (K, D+1)."""
        rotated = self.class_vectors.T @ gradient.to(self.class_vectors) @ self.feature_vectors
        return (self.class_vectors @ (rotated / self.eigenvalues) @ self.feature_vectors.T).to(gradient)

    def class_variance(self, x: Tensor) -> Tensor:
        """Variances of V^T f, which are independent: x (..., D+1) -> (..., K-1)."""
        return (x.to(self.class_vectors) @ self.feature_vectors).square() @ self.eigenvalues.reciprocal().T

    def logit_covariance(self, x: Tensor) -> Tensor:
        """Cov of the raw logits weight phi + bias at each row, shift included: (..., D+1) -> (..., K, K)."""
        seen = (self.class_vectors * self.class_variance(x).unsqueeze(-2)) @ self.class_vectors.T
        return seen + self._shift(x)[..., None, None]

    def variance(self, x: Tensor, directions: Tensor) -> Tensor:
        """Var(direction . f) at each row: x (..., D+1), directions (R, K) -> (..., R)."""
        directions = directions.to(self.class_vectors)
        seen = self.class_variance(x) @ (directions @ self.class_vectors).square().T
        return seen + self._shift(x).unsqueeze(-1) * directions.sum(-1).square()

    def _shift(self, x: Tensor) -> Tensor:
        return x.to(self.class_vectors).square().sum(-1) / (self.num_classes * self.prior_precision)

    def logit_scale(self, x: Tensor) -> Tensor:
        """Sds of V^T f, (n, K-1): all that ``perturb`` needs of x (n, D+1)."""
        return self.class_variance(x).sqrt()

    def perturb(self, scale: Tensor, z: Tensor) -> Tensor:
        """Centred logits minus their mean, from ``logit_scale`` and standard normals z (T, K-1): (n, K, T).

        By the symmetric square root, which no sign or order of the eigenvectors changes.
        """
        turned = self._turn.to(scale) @ z.to(scale).T
        return self.class_vectors.to(scale) @ (scale.unsqueeze(-1) * turned)

    @cached_property
    def _turn(self) -> Tensor:
        """V^T Q, (K-1, K-1): from Helmert's contrasts to the eigenvectors."""
        return self.class_vectors.T @ contrast_basis(self.num_classes, like=self.class_vectors)

    def relative_variance(self, scale: Tensor, label: Tensor) -> Tensor:
        """Var(f_k - f_label) from ``logit_scale``, label (n,): (n, K)."""
        vectors, variance = self.class_vectors.to(scale), scale.square()
        own = vectors[label]
        cross = (variance * own) @ vectors.T
        total = variance @ vectors.square().T + (variance * own.square()).sum(1, keepdim=True)
        return (total - 2 * cross).clamp(min=0)

    def unwhiten(self, z: Tensor) -> Tensor:
        """theta = V (z / sqrt(b a + tau)) U^T, of covariance Sigma (the shift apart): ((K-1)(D+1),) -> (K, D+1)."""
        scaled = z.reshape(self.eigenvalues.shape) * self.eigenvalues.rsqrt()
        return self.class_vectors @ scaled @ self.feature_vectors.T

    def whiten_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient in z of a function whose gradient in theta is (K, D+1): the transpose of ``unwhiten``."""
        rotated = self.class_vectors.T @ gradient @ self.feature_vectors
        return (rotated * self.eigenvalues.rsqrt()).flatten()

    def distance(self, theta: Tensor) -> float:
        """sqrt(theta^T Sigma^-1 theta) of a (K, D+1) that sums to nought over classes: its length in posterior sds."""
        rotated = self.class_vectors.T @ theta @ self.feature_vectors
        return float((self.eigenvalues * rotated.square()).sum().sqrt())

    def diagonal(self) -> Tensor:
        """The variances of [weight, bias], (K, D+1)."""
        seen = self.class_vectors.square() @ self.eigenvalues.reciprocal() @ self.feature_vectors.square().T
        return seen + 1.0 / (self.num_classes * self.prior_precision)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Zero-mean draws of [weight, bias]: (S, K, D+1)."""
        like = {"dtype": self.class_vectors.dtype, "device": self.class_vectors.device, "generator": generator}
        z = torch.randn(num_samples, *self.eigenvalues.shape, **like)  # type: ignore[call-overload]
        s = torch.randn(num_samples, 1, self.num_features + 1, **like)  # type: ignore[call-overload]
        eta = self.class_vectors @ (z * self.eigenvalues.rsqrt()) @ self.feature_vectors.T
        return eta + s / (self.num_classes * self.prior_precision) ** 0.5

    def log_det_precision(self) -> float:
        """log det Sigma^-1, over all K(D+1) parameters."""
        seen = self.eigenvalues.double().log().sum()
        return float(seen) + (self.num_features + 1) * math.log(self.prior_precision)


@dataclass(frozen=True, eq=False)
class DiagCovariance(_Movable):
    """Sigma = diag(1 / precision).

    Args:
        precision: (K, D+1), of [weight, bias].
        prior_precision: tau.
    """

    precision: Tensor
    prior_precision: float
    structure: ClassVar[str] = "diag"

    @property
    def num_classes(self) -> int:
        return self.precision.shape[0]

    @property
    def num_features(self) -> int:
        return self.precision.shape[1] - 1

    @property
    def logit_rank(self) -> int:
        """How many standard normals ``perturb`` turns into one draw of centred logits."""
        return 1 if self.num_classes == 2 else self.num_classes

    def bilinear(self, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x Sigma(a, b) y^T with Sigma(a, b) = sum_kl a_k b_l Sigma_kl; x (..., M, D+1), y (..., M2, D+1)."""
        a, b, x, y = (value.to(self.precision) for value in (a, b, x, y))
        return (x * ((a * b) @ self.precision.reciprocal())) @ y.mT

    def class_variance(self, x: Tensor) -> Tensor:
        """Variances of the raw logits, which are independent: x (..., D+1) -> (..., K)."""
        return x.to(self.precision).square() @ self.precision.reciprocal().T

    def logit_covariance(self, x: Tensor) -> Tensor:
        """Cov of the raw logits weight phi + bias at each row, shift included: (..., D+1) -> (..., K, K)."""
        return torch.diag_embed(self.class_variance(x))

    def variance(self, x: Tensor, directions: Tensor) -> Tensor:
        """Var(direction . f) at each row: x (..., D+1), directions (R, K) -> (..., R)."""
        return self.class_variance(x) @ directions.to(self.precision).square().T

    def logit_scale(self, x: Tensor) -> Tensor:
        """Sds of the raw logits, (n, K): all that ``perturb`` needs of x (n, D+1)."""
        return self.class_variance(x).sqrt()

    def perturb(self, scale: Tensor, z: Tensor) -> Tensor:
        """Centred logits minus their mean, from ``logit_scale`` and standard normals z (T, logit_rank): (n, K, T)."""
        z = z.to(scale).T
        if self.num_classes == 2:
            contrast = scale.square().mean(-1).sqrt()
            return contrast_basis(2, like=z) * (contrast[:, None, None] * z)
        raw = scale.unsqueeze(-1) * z
        return raw - raw.mean(-2, keepdim=True)

    def relative_variance(self, scale: Tensor, label: Tensor) -> Tensor:
        """Var(f_k - f_label) from ``logit_scale``, label (n,): (n, K)."""
        variance = scale.square()
        both = variance + variance.gather(1, label[:, None])
        return both.scatter(1, label[:, None], 0.0)

    def unwhiten(self, z: Tensor) -> Tensor:
        """theta = z / sqrt(precision), of covariance Sigma for standard normal z: (K(D+1),) -> (K, D+1)."""
        return z.reshape(self.precision.shape) * self.precision.rsqrt()

    def whiten_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient in z of a function whose gradient in theta is (K, D+1): the transpose of ``unwhiten``."""
        return (gradient * self.precision.rsqrt()).flatten()

    def distance(self, theta: Tensor) -> float:
        """sqrt(theta^T Sigma^-1 theta) of a (K, D+1): its length in posterior sds."""
        return float((self.precision * theta.square()).sum().sqrt())

    def diagonal(self) -> Tensor:
        """The variances of [weight, bias], (K, D+1)."""
        return self.precision.reciprocal()

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Zero-mean draws of [weight, bias]: (S, K, D+1)."""
        z = torch.randn(
            num_samples,
            *self.precision.shape,
            generator=generator,
            dtype=self.precision.dtype,
            device=self.precision.device,
        )
        return z * self.precision.rsqrt()

    def log_det_precision(self) -> float:
        """log det Sigma^-1, over all K(D+1) parameters."""
        return float(self.precision.double().log().sum())


Covariance = FullCovariance | KronCovariance | DiagCovariance


def square_root(covariance: Tensor) -> Tensor:
    """R with R R^T the covariance, (..., r, r): Cholesky's, or eigenvectors' where it is only semi-definite."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool((failed > 0).any()):
        values, vectors = torch.linalg.eigh(covariance[failed > 0])
        factor[failed > 0] = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return factor


def _quadratic(covariance: Tensor, directions: Tensor) -> Tensor:
    return torch.einsum("rk,...kl,rl->...r", directions, covariance, directions)
