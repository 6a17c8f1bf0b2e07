"""Pareto k-hat and KL of Gaussian posteriors against the model's density: information, never a gate.

In weight space k-hat condemns any realistic last layer long before its predictions are wrong, because it looks at all
P parameters jointly; so it is reported over batches and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp

from bayescam.diagnose.arviz_compat import psis
from bayescam.diagnose.density import log_weight
from bayescam.posterior.images import TrainingImages
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.model import negative_log_joint

_BATCH = 64


@dataclass(frozen=True)
class Importance:
    """r = log p(y, theta) - log q(theta) at draws from q, over the contrasts.

    Args:
        khat: Pareto shape of the importance weights e^r in each batch of draws; below ``good_khat`` they can be used.
        num_draws: of each batch.
        sd: of r.
        kl: KL(q || posterior) = log Z - E_q[r], in nats.
        kl_error: its Monte Carlo standard error.
        kl_is_lower_bound: whether ``kl`` is an "at least": log Z comes from draws whose own k-hat is not good, and the
            logarithm of a mean of weights is biased low.
        log_evidence: the log Z used, log p(y | tau).
        evidence_from: the Gaussian whose draws gave it.
        num_parameters: M = (K-1)(D+1), the dimension.
    """

    khat: tuple[float, ...]
    num_draws: int
    sd: float
    kl: float
    kl_error: float
    kl_is_lower_bound: bool
    log_evidence: float
    evidence_from: str
    num_parameters: int


def good_khat(num_draws: int) -> float:
    """The largest Pareto shape that can be trusted with so many draws, min(1 - 1 / log10 S, 0.7).

    Source: Vehtari et al. (2024), JMLR 25(72).
    """
    return min(1 - 1 / math.log10(num_draws), 0.7) if num_draws > 1 else -math.inf


def log_ratios(laplace: Laplace, images: TrainingImages, num_draws: int, *, seed: int) -> np.ndarray:
    """log p(y, eta) - log q(eta) at draws of the contrasts eta from q, (S,).

    The shift common to all classes is left out: the likelihood cannot see it, and its posterior is its prior.
    """
    mean, tau = laplace.theta_mean, laplace.prior_precision
    generator = torch.Generator(mean.device).manual_seed(seed)
    found = []
    for start in range(0, num_draws, _BATCH):
        theta = mean + laplace.covariance.sample(min(_BATCH, num_draws - start), generator)
        theta = theta - theta.mean(1, keepdim=True)
        log_joint = -negative_log_joint(theta.to(images.device), images, tau)[0].to(mean.device)
        found.append(log_weight(laplace, theta, log_joint))
    return torch.cat(found).cpu().numpy()


def importance(
    laplace: Laplace, images: TrainingImages, *, num_batches: int = 4, num_draws: int = 250, seed: int = 0
) -> Importance:
    """k-hat and KL of one Gaussian by its own draws; ``importances`` of several lets the best measure all."""
    found = importances({"laplace": laplace}, images, num_batches=num_batches, num_draws=num_draws, seed=seed)
    return found["laplace"]


def importances(
    gaussians: Mapping[str, Laplace],
    images: TrainingImages,
    *,
    num_batches: int = 4,
    num_draws: int = 250,
    seed: int = 0,
) -> dict[str, Importance]:
    """k-hat of each Gaussian over ``num_batches`` batches of ``num_draws`` draws (k-hat itself is noisy), and its KL.

    log Z = log E_q[e^r] is the same whatever q: of the Gaussians whose k-hat over all of their draws is good, it is
    taken from the one whose weights vary least. Where none is, every estimate is too small on the average, and the
    largest is taken.

    Args:
        gaussians: posteriors of one model and one prior precision, by name.
        images: the training images.
        num_batches, num_draws: how many draws of each.
        seed: of the draws.
    """
    total = num_batches * num_draws
    ratios = {name: log_ratios(one, images, total, seed=seed) for name, one in gaussians.items()}
    good = [name for name, values in ratios.items() if float(psis(values)[1]) <= good_khat(total)]
    evidences = {name: float(logsumexp(values)) - math.log(total) for name, values in ratios.items()}
    if good:
        source = min(good, key=lambda name: _relative_variance(ratios[name]))
    else:
        source = max(evidences, key=lambda name: evidences[name])
    return {
        name: Importance(
            khat=tuple(psis(values.reshape(num_batches, num_draws))[1].tolist()),
            num_draws=num_draws,
            sd=float(values.std(ddof=1)),
            kl=evidences[source] - float(values.mean()),
            kl_error=math.sqrt(float(values.var(ddof=1)) / total + _relative_variance(ratios[source])),
            kl_is_lower_bound=not good,
            log_evidence=evidences[source],
            evidence_from=source,
            num_parameters=(gaussians[name].num_classes - 1) * (gaussians[name].num_features + 1),
        )
        for name, values in ratios.items()
    }


def _relative_variance(ratios: np.ndarray) -> float:
    """Var(mean of weights) / mean^2, the squared standard error of its logarithm."""
    weights = np.exp(ratios - ratios.max())
    return float(weights.var(ddof=1) / weights.mean() ** 2 / len(weights))
