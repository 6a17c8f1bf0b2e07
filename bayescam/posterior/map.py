"""The MAP of the last layer: a convex problem, solved by L-BFGS preconditioned by the Kronecker curvature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayescam.errors import ConvergenceError
from bayescam.posterior.covariance import KronCovariance, centring
from bayescam.posterior.curvature import (
    class_curvature,
    feature_gram,
    hessian_product,
    kron_covariance,
    probabilities_at,
)
from bayescam.posterior.images import TrainingImages
from bayescam.posterior.lbfgs import minimise
from bayescam.posterior.model import negative_log_joint

_LBFGS_EVALUATIONS = 1000
_LBFGS_TOLERANCE = 0.01
_FEW_PARAMETERS = 4000
_NEWTON_STEPS = 30
_CG_STEPS = 200
_CG_SHARE = 1e-4
_CG_TOLERANCE = 0.2
_FLOAT32_SPREAD = 1e4


@dataclass(frozen=True, eq=False)
class MapEstimate:
    """The mode.

    Args:
        theta: [weight, bias], (K, D+1) float64; its rows sum to zero.
        value: -log joint there.
        gradient: (K, D+1).
        decrement: the Newton decrement sqrt(g^T H^-1 g): the distance left to the mode, in posterior sds.
    """

    theta: Tensor
    value: float
    gradient: Tensor
    decrement: float


def whitening(images: TrainingImages) -> KronCovariance:
    """The Kronecker curvature at theta = 0, Lambda_n = (I - 11^T/K) / K, with tau = 1: the solver's metric."""
    gram, k = feature_gram(images), images.num_classes
    return kron_covariance(gram, centring(k, like=gram) / k, 1.0, 1.0)


def descend(
    images: TrainingImages, whitener: KronCovariance, start: Tensor, prior_precision: float, tolerance: float
) -> Tensor:
    """L-BFGS from ``start``, preconditioned by ``whitener``, until sqrt(g . Sigma g) is below ``tolerance``; (K, D+1).

    In the coordinates of the Kronecker curvature the Hessian is near the identity, so that a few dozen evaluations do.
    """
    solve = origin_solver(whitener)

    def objective(theta: Tensor) -> tuple[float, Tensor]:
        value, gradient = negative_log_joint(theta.view_as(start), images, prior_precision)
        return float(value), gradient.flatten()

    found = minimise(
        objective,
        start.flatten(),
        precondition=lambda gradient: solve(gradient.view_as(start)).flatten(),
        near=lambda norm: norm < tolerance,
        evaluations=_LBFGS_EVALUATIONS,
    )
    return found.view_as(start)


def origin_solver(whitener: KronCovariance) -> Callable[[Tensor], Tensor]:
    """g (K, D+1) -> Sigma g for the curvature at theta = 0: all contrasts have the same one, so one product does.

    Sigma g = C g (b A + tau I)^-1, C centring over the classes.
    """
    values, vectors = whitener.eigenvalues[0], whitener.feature_vectors
    inverse = ((vectors / values) @ vectors.T).to(_product_type(whitener.eigenvalues))
    return lambda gradient: _centred((gradient.to(inverse) @ inverse).to(gradient))


def _centred(theta: Tensor) -> Tensor:
    """Without the shift common to all classes, (K, D+1): at the mode there is none."""
    return theta - theta.mean(0)


def _product_type(eigenvalues: Tensor) -> torch.dtype:
    """The type in which a preconditioner may be applied: float32 where its rounding, some 1e-7 of its largest value,
    stays small beside its smallest."""
    spread = float(eigenvalues.max() / eigenvalues.min())
    return torch.float32 if spread < _FLOAT32_SPREAD else torch.float64


def newton_direction(
    theta: Tensor, gradient: Tensor, images: TrainingImages, whitener: KronCovariance, tolerance: float
) -> tuple[Tensor, float]:
    """H^-1 g by conjugate gradients, preconditioned by the Kronecker curvature, and sqrt(g^T H^-1 g).

    Solved until the squared decrement's last increment is below 1e-4 of it, or below (tolerance / 5)^2.
    """
    low = whitener.to(_product_type(whitener.eigenvalues))
    step, residual = torch.zeros_like(gradient), gradient.clone()
    solved = low.solve(residual)
    direction, squared, rho = solved, 0.0, float((residual * solved).sum())
    for _ in range(_CG_STEPS):
        if rho <= 0.0:
            break
        product = hessian_product(theta, direction, images, whitener.prior_precision)
        length = rho / float((direction * product).sum())
        step += length * direction
        residual -= length * product
        squared += length * rho
        solved = low.solve(residual)
        rho, previous = float((residual * solved).sum()), rho
        if length * rho < max(_CG_SHARE * squared, (_CG_TOLERANCE * tolerance) ** 2):
            break
        direction = solved + (rho / previous) * direction
    return _centred(step), math.sqrt(squared)


def find_map(
    images: TrainingImages,
    prior_precision: float,
    whitener: KronCovariance,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-3,
) -> MapEstimate:
    """The mode of the posterior, to a Newton decrement below ``tolerance`` posterior sds.

    L-BFGS comes near; Newton steps by conjugate gradients, halved while -log joint rises, finish. Where float32
    products hide the rest of the way, so that a step no longer halves the decrement, the last steps use float64.

    Args:
        images: the training images.
        prior_precision: tau.
        whitener: the metric to solve in, from ``whitening``; its prior precision is replaced.
        start: theta to begin at, (K, D+1); zero without it.
        tolerance: on the Newton decrement.

    Raises:
        ConvergenceError: the decrement is still above the tolerance after the last step.
    """
    whitener = replace(whitener, prior_precision=prior_precision)
    zero = torch.zeros(images.num_classes, images.num_features + 1, dtype=torch.float64, device=images.device)
    coarse = _LBFGS_TOLERANCE * max(1.0, math.sqrt(zero.numel() / _FEW_PARAMETERS))
    theta = descend(images, whitener, zero if start is None else start, prior_precision, coarse)
    previous = math.inf
    for _ in range(_NEWTON_STEPS):
        value, gradient = negative_log_joint(theta, images, prior_precision)
        curvature = class_curvature(images, probabilities_at(theta, images))
        local = whitener.with_classes(curvature, images.weight())
        step, decrement = newton_direction(theta, gradient, images, local, tolerance)
        if decrement < tolerance:
            return MapEstimate(theta, float(value), gradient, decrement)
        if decrement > previous / 2 and images.dtype != torch.float64:
            images, previous = replace(images, widened=True), math.inf
            continue
        previous = decrement
        theta = theta - _step_length(theta, step, float(value), images, prior_precision) * step
    raise ConvergenceError(
        f"the MAP is still {decrement:.3g} posterior sds away after {_NEWTON_STEPS} Newton steps, above "
        f"{tolerance:.3g}; standardise the features, or raise prior_precision"
    )


def _step_length(theta: Tensor, step: Tensor, value: float, images: TrainingImages, prior_precision: float) -> float:
    """1, or the first half of it at which -log joint does not rise beyond the rounding of its sum."""
    length, slack = 1.0, float(torch.finfo(images.dtype).eps) * abs(value)
    while length > 1e-6:
        trial = float(negative_log_joint(theta - length * step, images, prior_precision)[0])
        if trial <= value + slack:
            return length
        length /= 2
    raise ConvergenceError(
        f"no step along Newton's direction lowers -log joint = {value:.6g}; "
        "pass float64 features or raise prior_precision"
    )
