"""The MAP of the last layer: a convex problem, solved by L-BFGS preconditioned by the Kronecker curvature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from bayescam.errors import ConvergenceError
from bayescam.posterior.covariance import KronCovariance
from bayescam.posterior.curvature import (
    Probabilities,
    class_curvature,
    computed_once,
    feature_covariance,
    feature_gram,
    hessian_product,
    probabilities_at,
)
from bayescam.posterior.images import TrainingImages
from bayescam.posterior.lbfgs import minimise
from bayescam.posterior.model import negative_log_joint

_LBFGS_EVALUATIONS = 1000
_LBFGS_TOLERANCE = 0.01
_FEW_PARAMETERS = 4000
NEWTON_STEPS = 30
TOLERANCE = 1e-3
_CG_STEPS = 200
_CG_SHARE = 1e-4
_CG_SHARE_FAR = 1e-2
_CG_TOLERANCE = 0.2
_LOGIT_CHANGE = 0.01
_FLOAT32_SPREAD = 1e4


@dataclass(frozen=True, eq=False)
class MapEstimate:
    """The mode.

    Args:
        theta: [weight, bias], (K, D+1) float64; its rows sum to zero.
        value: -log joint there.
        gradient: (K, D+1).
        decrement: the Newton decrement sqrt(g^T H^-1 g): to first order the distance left to the mode, in posterior
            sds; by conjugate gradients.
    """

    theta: Tensor
    value: float
    gradient: Tensor
    decrement: float


def whitening(images: TrainingImages, *, exact: bool = False) -> KronCovariance:
    """The Kronecker curvature at theta = 0, Lambda_n = (I - 11^T/K) / K, with tau = 1: the solver's metric.

    ``exact`` takes the features' Gram matrix in float64: the posterior's own factor, where that is Kronecker's.
    """
    gram, k = feature_gram(replace(images, widened=True) if exact else images), images.num_classes
    bare = feature_covariance(gram, k, 1.0)
    return replace(bare, class_values=bare.class_values / k)


def descend(
    images: TrainingImages, whitener: KronCovariance, start: Tensor, prior_precision: float, tolerance: float
) -> Tensor:
    """L-BFGS from ``start``, preconditioned by ``whitener``, until sqrt(g . Sigma g) is below ``tolerance``; (K, D+1).

    In the coordinates of the Kronecker curvature the Hessian is near the identity, so that a few dozen evaluations do.
    """
    solve = origin_solver(whitener)

    def objective(theta: Tensor) -> tuple[float, Tensor]:
        value, gradient = negative_log_joint(images.agreed(theta).view_as(start), images, prior_precision)
        return float(value), gradient.flatten()

    found = minimise(
        objective,
        start.flatten(),
        precondition=lambda gradient: solve(gradient.view_as(start)).flatten(),
        near=lambda norm: norm < tolerance,
        evaluations=_LBFGS_EVALUATIONS,
        agree=images.agreed_number,
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
    probabilities: Probabilities, gradient: Tensor, images: TrainingImages, whitener: KronCovariance, tolerance: float
) -> tuple[Tensor, float]:
    """H^-1 g by conjugate gradients, preconditioned by the Kronecker curvature P, and sqrt(g^T H^-1 g).

    With r the residual after some steps, r^T H^-1 r is what the squared decrement still lacks. It is at most
    r^T P^-1 r / l, l the smallest eigenvalue of P^-1 H, of which the steps tell: it is near the smallest one of
    Lanczos's matrix (Golub and Meurant 2010). Solved until that is below 1e-4 of the squared decrement, below 1e-2 of
    one above (100 tolerance)^2, after which another step is due anyway, or below (tolerance / 5)^2. The decrement is
    NaN where the rounding of the products hides that H is positive definite.
    """
    low = whitener.to(_product_type(whitener.eigenvalues))
    step, residual = torch.zeros_like(gradient), gradient.clone()
    solved = low.solve(residual)
    direction, squared, rho = solved, 0.0, images.agreed_number(float((residual * solved).sum()))
    lanczos = _Lanczos()
    for _ in range(_CG_STEPS):
        if rho <= 0.0:
            break
        direction = images.agreed(direction)
        product = hessian_product(probabilities, direction, images, whitener.prior_precision)
        bend = images.agreed_number(float((direction * product).sum()))
        if not 0.0 < bend < math.inf:
            return _centred(step), math.nan
        length = rho / bend
        step += length * direction
        residual -= length * product
        squared += length * rho
        solved = low.solve(residual)
        rho, previous = images.agreed_number(float((residual * solved).sum())), rho
        lanczos.add(length, rho / previous)
        share = _CG_SHARE if _CG_SHARE * squared < tolerance**2 else _CG_SHARE_FAR
        if rho / images.agreed_number(lanczos.smallest()) < max(share * squared, (_CG_TOLERANCE * tolerance) ** 2):
            break
        direction = solved + (rho / previous) * direction
    return _centred(step), math.sqrt(squared)


class _Lanczos:
    """Lanczos's tridiagonal matrix, from the lengths of the conjugate-gradient steps and the ratios of rho."""

    def __init__(self) -> None:
        self.diagonal: list[float] = []
        self.beside: list[float] = []
        self.length, self.ratio = math.inf, 0.0

    def add(self, length: float, ratio: float) -> None:
        if self.diagonal:
            self.beside.append(math.sqrt(max(self.ratio, 0.0)) / self.length)
        self.diagonal.append(1 / length + self.ratio / self.length)
        self.length, self.ratio = length, ratio

    def smallest(self) -> float:
        """Its smallest eigenvalue."""
        first = eigvalsh_tridiagonal(self.diagonal, self.beside, select="i", select_range=(0, 0))[0]
        return max(float(first), 1e-12 * max(self.diagonal))


def find_map(
    images: TrainingImages,
    prior_precision: float,
    whitener: KronCovariance,
    *,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> MapEstimate:
    """The mode of the posterior, to a Newton decrement below ``tolerance`` posterior sds.

    L-BFGS comes near; Newton steps by conjugate gradients, halved while -log joint rises, finish. At the end no
    training image's logit moves by more than .01 in one more of them: under a weak prior that is less than a thousandth
    of an sd, and the Hessian hangs on the logits. Where float32 products hide the rest of the way, so that a step does
    not halve the decrement or none lowers -log joint, the last steps use float64. Of float64 features the decrement
    goes on to a hundredth of the tolerance, as far as it halves, so that other sums' rounding finds the same mode.

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
    theta = images.agreed(descend(images, whitener, zero if start is None else start, prior_precision, coarse))
    aim = tolerance / 100 if wide(images) else tolerance
    previous, needed = math.inf, aim
    for _ in range(NEWTON_STEPS):
        value, gradient = negative_log_joint(theta, images, prior_precision)
        probabilities = computed_once(probabilities_at(theta, images), images)
        local = whitener.with_classes(class_curvature(images, probabilities), images.weight())
        step, decrement = newton_direction(probabilities, gradient, images, local, needed)
        if decrement < tolerance:
            moved = largest_change(images, step)
            if moved < _LOGIT_CHANGE and (decrement < aim or decrement > previous / 2):
                return MapEstimate(theta, float(value), gradient, decrement)
            if moved >= _LOGIT_CHANGE:
                needed = min(needed, decrement * _LOGIT_CHANGE / moved)
        halved = decrement <= previous / 2
        length = step_length(theta, step, float(value), images, prior_precision) if halved or wide(images) else 0.0
        if length == 0.0 and not wide(images):
            images, previous = replace(images, widened=True), math.inf
            continue
        if length == 0.0:
            break
        previous = decrement
        theta = images.agreed(theta - length * step)
    raise not_found(decrement, float(value), tolerance)


def not_found(decrement: float, value: float, tolerance: float = TOLERANCE) -> ConvergenceError:
    """What to say where the descent ends above the tolerance."""
    how_far = f"its Newton decrement is {decrement:.3g} posterior sds (allowed {tolerance:.3g})"
    if math.isnan(decrement):
        how_far = "rounding hides the curvature"
    elif decrement < tolerance:
        how_far = f"{decrement:.3g} posterior sds from it the logits still move by more than {_LOGIT_CHANGE:g}"
    return ConvergenceError(
        f"the MAP cannot be found: {how_far}, where -log joint = {value:.6g}; standardise the features, or raise "
        "prior_precision"
    )


def newton_step(mode: MapEstimate, step: Tensor, images: TrainingImages, prior_precision: float) -> MapEstimate:
    """The mode after a step H^-1 g (K, D+1) from it, shortened while -log joint rises; its decrement is not known yet.

    Raises:
        ConvergenceError: no length of the step lowers -log joint.
    """
    value = float(negative_log_joint(mode.theta, images, prior_precision)[0])
    length = step_length(mode.theta, step, value, images, prior_precision)
    if length == 0.0:
        raise not_found(mode.decrement, value)
    theta = images.agreed(mode.theta - length * step)
    lowered, gradient = negative_log_joint(theta, images, prior_precision)
    return MapEstimate(theta, float(lowered), gradient, math.nan)


def wide(images: TrainingImages) -> bool:
    """Whether products over features are taken in float64."""
    return images.dtype == torch.float64


def largest_change(images: TrainingImages, step: Tensor) -> float:
    """max over images and classes of |step phi~_n|: how far a step (K, D+1) moves a logit."""
    largest = torch.zeros((), dtype=images.dtype, device=images.device)
    low = images.agreed(step.to(images.dtype))
    for _, phi in images.chunks():
        largest = torch.maximum(largest, torch.addmm(low[:, -1:], low[:, :-1], phi.T).abs().max())
    return float(images.largest(largest))


def step_length(theta: Tensor, step: Tensor, value: float, images: TrainingImages, prior_precision: float) -> float:
    """1, or the first half of it at which -log joint does not rise beyond the rounding of its sum; 0 if there is none.

    Args:
        theta, step: (K, D+1); theta - length * step is tried.
        value: -log joint at theta.
    """
    length, slack = 1.0, float(torch.finfo(images.dtype).eps) * abs(value)
    while length > 1e-6:
        trial = float(negative_log_joint(images.agreed(theta - length * step), images, prior_precision)[0])
        if trial <= value + slack:
            return length
        length /= 2
    return 0.0
