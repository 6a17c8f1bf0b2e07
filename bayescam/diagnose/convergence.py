"""R-hat and effective sample sizes of what a reader looks at: weights, the log joint, predicted probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bayescam.diagnose.arviz_compat import ess, rhat
from bayescam.posterior.draws import Draws

NUM_IMAGES = 128


@dataclass(frozen=True)
class Convergence:
    """The worst R-hat and the smallest bulk and tail ESS among some scalars of the posterior."""

    rhat: float
    ess_bulk: float
    ess_tail: float
    num_scalars: int


def convergence(draws: np.ndarray) -> Convergence:
    """Worst numbers over the scalars of ``draws`` (C, S, ...).

    Rank-normalised split R-hat, bulk and tail ESS (Vehtari et al. 2021, Bayesian Analysis 16(2)). A single chain is cut
    in two, so that R-hat exists. Scalars that never move (a probability that is 1 to the last bit) are left out; if
    none moves, R-hat is infinite and ESS 0: a chain that stands still has not converged.
    """
    values = np.asarray(draws, dtype=float).reshape(*draws.shape[:2], -1)
    if values.shape[0] == 1:
        half = values.shape[1] // 2
        values = values[0, : 2 * half].reshape(2, half, -1)
    moving = values.std((0, 1)) > 0
    if values.shape[1] < 4 or not moving.any():
        return Convergence(float("inf"), 0.0, 0.0, 0)
    values = values[..., moving]
    return Convergence(
        float(rhat(values).max()),
        float(ess(values, "bulk").min()),
        float(ess(values, "tail").min()),
        int(moving.sum()),
    )


def probability_convergence(draws: Draws, features: Tensor, num_images: int = NUM_IMAGES) -> Convergence:
    """Convergence of the predicted probabilities of at most ``num_images`` of the images (N, D), spread evenly."""
    step = max(1, -(-len(features) // num_images))
    phi = features[::step].to(draws.weight)
    logits = draws.weight @ phi.T + draws.bias.unsqueeze(-1)
    return convergence(logits.softmax(2).cpu().numpy())


def energy_fraction(energy: np.ndarray) -> list[float]:
    """E-BFMI of each chain, sum_s (E_s - E_{s-1})^2 / sum_s (E_s - mean E)^2 for energies (C, S); below 0.3 is low.

    Source: Betancourt (2016), arXiv:1604.00695.
    """
    centred = energy - energy.mean(1, keepdims=True)
    return [float(x) for x in np.square(np.diff(energy, axis=1)).sum(1) / np.square(centred).sum(1)]
