"""Pareto k-hat and a KL estimate of a Gaussian posterior against the model's density: information, never a gate.

In weight space k-hat condemns any realistic last layer long before its predictions are wrong, because it looks at all
P parameters jointly; so it is reported over batches and decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from bayescam.diagnose.arviz_compat import psis
from bayescam.posterior.covariance import DiagCovariance
from bayescam.posterior.images import TrainingImages
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.model import log_prior, negative_log_joint
from bayescam.posterior.nuts_potential import whitening_basis

_BATCH = 64


@dataclass(frozen=True)
class Importance:
    """log p(y, theta) - log q(theta) at draws from q.

    Args:
        khat: Pareto shape of the importance weights in each batch of draws; below 0.7 they can be used.
        kl: 1/2 Var_q(log p - log q), an estimate of KL(q || posterior) in nats (Dehaene 2019, arXiv:1904.02505).
        sd: sd of the log ratio.
        num_draws: of each batch.
    """

    khat: tuple[float, ...]
    kl: float
    sd: float
    num_draws: int


def log_ratios(laplace: Laplace, images: TrainingImages, num_draws: int, *, seed: int) -> np.ndarray:
    """log p(y, theta_s) - log q(theta_s) at draws from a full or kron posterior q, (S,), float64.

    The common shift of all rows has the same density under both and cancels, so both are taken on the contrasts,
    theta = m + A z with z ~ Normal(0, I): log q = -|z|^2/2 - M/2 log 2 pi + 1/2 log det of the contrasts' precision.

    Raises:
        ValueError: a diagonal posterior, whose contrasts and shift are not independent.
    """
    if isinstance(laplace.covariance, DiagCovariance):
        raise ValueError("laplace has structure 'diag'; importance ratios need 'full' or 'kron'")
    mean, tau = laplace.theta_mean - laplace.theta_mean.mean(0), laplace.prior_precision
    basis = whitening_basis(laplace.covariance)
    generator = torch.Generator(mean.device).manual_seed(seed)
    z = torch.randn(num_draws, basis.shape[1], generator=generator, dtype=mean.dtype, device=mean.device)
    theta = mean + (z @ basis.T).unflatten(1, mean.shape)
    parts = theta.to(images.device).split(_BATCH)
    log_joint = -torch.cat([negative_log_joint(part, images, tau)[0] for part in parts]).to(mean.device)
    at_no_shift = log_prior(mean.new_zeros(mean.shape[1]), tau)
    log_det = laplace.covariance.log_det_precision() - mean.shape[1] * math.log(tau)
    log_q = -0.5 * z.square().sum(1) + 0.5 * (log_det - z.shape[1] * math.log(2 * math.pi))
    return (log_joint - at_no_shift - log_q).cpu().numpy()


def importance(
    laplace: Laplace, images: TrainingImages, *, num_batches: int = 4, num_draws: int = 250, seed: int = 0
) -> Importance:
    """k-hat over ``num_batches`` batches of ``num_draws`` draws (k-hat itself is noisy), and the KL estimate."""
    ratios = log_ratios(laplace, images, num_batches * num_draws, seed=seed)
    khat = tuple(psis(ratios.reshape(num_batches, num_draws))[1].tolist())
    return Importance(khat, 0.5 * float(ratios.var(ddof=1)), float(ratios.std(ddof=1)), num_draws)
