"""A cheap check of a Gaussian posterior without full NUTS: many short chains started from its own draws (TADDAA).

A Markov chain that leaves the posterior invariant moves any other distribution towards it. So start B chains from the
Gaussian, run a few transitions of HMC for all of them at once, and see what has moved: a shift beyond Monte Carlo noise
is a lower bound on the Gaussian's error (Wang, Kasprzak and Huggins 2023, arXiv:2302.12419). Nothing having moved means
something only if the chains could move, so the correlation between start and end is reported beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from bayescam.posterior.draws import Draws
from bayescam.posterior.images import TrainingImages, check_images, whole_number
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.model import negative_log_joint
from bayescam.posterior.nuts_potential import whitening_basis

MAX_CORRELATION = math.sqrt(0.1)
_PILOT_TRANSITIONS = 12
_TARGET_ACCEPT = 0.8
_FAMILY_ERROR = 0.05


@dataclass(frozen=True, eq=False)
class ShortChains:
    """Where B chains began and where they ended; arrays are (K, D+1), of the centred [weight, bias].

    Args:
        start, end: draws (1, B, K, D): of the Gaussian, and after the transitions.
        mean_shift: (mean at the end - the Gaussian's mean) in its sds;  mean_noise: its standard error.
        log_sd_ratio: log (sd at the end / the Gaussian's sd);           sd_noise: its standard error.
        correlation: of start and end, over chains.
        acceptance_rate, step_size, num_transitions: of the transitions.
    """

    start: Draws
    end: Draws
    mean_shift: Tensor
    mean_noise: Tensor
    log_sd_ratio: Tensor
    sd_noise: Tensor
    correlation: Tensor
    acceptance_rate: float
    step_size: float
    num_transitions: int

    @property
    def reliable(self) -> bool:
        """Whether the chains moved far enough to have shown an error: median correlation^2 at most 0.1."""
        return float(self.correlation.abs().median()) <= MAX_CORRELATION

    @property
    def mean_error(self) -> Tensor:
        """Lower bounds on |error of the mean| in sds, at 95 % over all weights at once; 0 where noise explains it."""
        return (self.mean_shift.abs() - self._quantile() * self.mean_noise).clamp_min(0.0)

    @property
    def sd_error(self) -> Tensor:
        """Lower bounds on |log ratio of sds|, at 95 % over all weights at once; 0 where noise explains it."""
        return (self.log_sd_ratio.abs() - self._quantile() * self.sd_noise).clamp_min(0.0)

    def _quantile(self) -> float:
        return float(-ndtri(_FAMILY_ERROR / (2 * self.mean_shift.numel())))

    def __repr__(self) -> str:
        trust = "reliable" if self.reliable else "unreliable: too few transitions"
        return (
            f"ShortChains({self.start.num_samples} chains x {self.num_transitions} transitions, {trust}, mean wrong by "
            f"at least {float(self.mean_error.max()):.2f} sd, sd by at least {float(self.sd_error.exp().max()):.2f} x)"
        )


def short_chains(
    laplace: Laplace,
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    num_chains: int = 256,
    num_transitions: int = 10,
    seed: int = 0,
) -> ShortChains:
    """Run many short chains from the draws of ``laplace``, all in one batch.

    Each transition is HMC in contrast coordinates whitened by ``laplace``, of length pi/2 (a quarter period of a
    whitened Gaussian) times a draw from Uniform(.5, 1.5), so that no direction is met at half its period every time.
    The step size is set on pilot chains that are then thrown away.

    Args:
        laplace: the Gaussian to be checked; full or kron, so that its draws are those of its whitened coordinates.
        features, labels: phi (N, D) and (N,) of the training images.
        num_chains, num_transitions: B and the length of each chain.
        seed: of all random numbers.

    Raises:
        TypeError: a count or the seed is no whole number.
        ValueError: too few chains or transitions, a diagonal posterior, data of other shapes.
    """
    num_chains, seed = whole_number(num_chains, "num_chains", 8), whole_number(seed, "seed", 0)
    num_transitions = whole_number(num_transitions, "num_transitions", 1)
    if laplace.structure == "diag":
        raise ValueError("laplace has structure 'diag'; short chains check a 'full' or 'kron' posterior")
    images = check_images(features, labels, num_classes=laplace.num_classes, class_weights=laplace.class_weights)
    if images.num_features != laplace.num_features:
        raise ValueError(f"features has {images.num_features} columns; laplace was fitted on {laplace.num_features}")
    target = _Whitened(laplace, images)
    generator = torch.Generator(images.device).manual_seed(seed)
    step = _tuned_step(target, num_chains, generator)
    start = target.normal(num_chains, generator)
    end, accepted = start, 0.0
    for _ in range(num_transitions):
        end, rate = _transition(target, end, step, generator)
        accepted += rate / num_transitions
    return _measure(target, laplace, start, end, generator, accepted, step, num_transitions)


class _Whitened:
    """The potential of the contrast part for a batch z (B, M), through the one density of ``model``."""

    def __init__(self, laplace: Laplace, images: TrainingImages) -> None:
        self.images, self.tau = images, laplace.prior_precision
        self.mean = (laplace.theta_mean - laplace.theta_mean.mean(0)).to(images.device)
        self.basis = whitening_basis(laplace.covariance).to(self.mean)

    def theta(self, z: Tensor) -> Tensor:
        return self.mean + (z @ self.basis.T).unflatten(1, self.mean.shape)

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = negative_log_joint(self.theta(z), self.images, self.tau)
        return value, gradient.flatten(1) @ self.basis

    def normal(self, num: int, generator: torch.Generator) -> Tensor:
        options = {"dtype": self.mean.dtype, "device": self.mean.device, "generator": generator}
        return torch.randn(num, self.basis.shape[1], **options)  # type: ignore[call-overload]


def _transition(target: _Whitened, z: Tensor, step: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """One HMC transition of every chain; the new states and the mean acceptance probability."""
    momentum = target.normal(len(z), generator)
    value, gradient = target.value_and_gradient(z)
    energy = value + 0.5 * momentum.square().sum(1)
    position = z
    length = 0.5 * math.pi * (0.5 + torch.rand((), generator=generator, device=z.device).item())
    for _ in range(max(1, round(length / step))):
        momentum = momentum - 0.5 * step * gradient
        position = position + step * momentum
        value, gradient = target.value_and_gradient(position)
        momentum = momentum - 0.5 * step * gradient
    error = value + 0.5 * momentum.square().sum(1) - energy
    rate = torch.nan_to_num((-error).clamp(max=0.0).exp(), nan=0.0)
    accept = torch.rand(len(z), generator=generator, device=z.device, dtype=z.dtype) < rate
    return torch.where(accept.unsqueeze(1), position, z), float(rate.mean())


def _tuned_step(target: _Whitened, num_chains: int, generator: torch.Generator) -> float:
    """The step size that a short stochastic approximation brings to an acceptance of 0.8."""
    z = target.normal(max(8, num_chains // 8), generator)
    log_step = -0.25 * math.log(target.basis.shape[1])
    for i in range(_PILOT_TRANSITIONS):
        z, rate = _transition(target, z, math.exp(log_step), generator)
        log_step += 2.0 * (rate - _TARGET_ACCEPT) / (1 + i) ** 0.6
        log_step = min(max(log_step, math.log(0.01)), math.log(0.5 * math.pi))
    return math.exp(log_step)


def _measure(
    target: _Whitened,
    laplace: Laplace,
    start: Tensor,
    end: Tensor,
    generator: torch.Generator,
    accepted: float,
    step: float,
    num_transitions: int,
) -> ShortChains:
    before, after = target.theta(start), target.theta(end)
    k, width = target.mean.shape
    sd = target.basis.square().sum(1).sqrt().view(k, width)
    b, end_sd = len(end), after.std(0)
    centred_before, centred_after = before - before.mean(0), after - after.mean(0)
    correlation = (centred_before * centred_after).mean(0) / (before.std(0) * end_sd)
    # Var(log s) = (kurtosis - 1) / (4 B) for the sample sd s of B independent chains.
    kurtosis = centred_after.pow(4).mean(0) / centred_after.square().mean(0).square()
    noise = torch.randn(b, 1, width, generator=generator, dtype=sd.dtype, device=sd.device)
    shift = noise / math.sqrt(k * laplace.prior_precision)
    draws = [Draws(theta[None, ..., :-1], theta[None, ..., -1]) for theta in (before + shift, after + shift)]
    return ShortChains(
        start=draws[0],
        end=draws[1],
        mean_shift=(after.mean(0) - target.mean) / sd,
        mean_noise=end_sd / sd / math.sqrt(b),
        log_sd_ratio=(end_sd / sd).log(),
        sd_noise=((kurtosis - 1).clamp_min(0.0) / (4 * b)).sqrt(),
        correlation=correlation,
        acceptance_rate=accepted,
        step_size=step,
        num_transitions=num_transitions,
    )
