"""R-hat and effective sample sizes of what a reader looks at: weights, the log joint, predicted probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bayescam.diagnose.arviz_compat import ess, rhat
from bayescam.posterior.draws import Draws

NUM_IMAGES = 128
_FEWEST_DRAWS = 4

Place = tuple[int, ...]


@dataclass(frozen=True)
class Convergence:
    """The worst R-hat and the smallest bulk and tail ESS among some scalars of the posterior.

    Args:
        rhat, ess_bulk, ess_tail: infinite, 0 and 0 where a draw is not finite, no scalar moves, or draws are too few.
        num_scalars: how many moved and were looked at.
        num_not_finite: scalars with a draw that is NaN or infinite.
        rhat_at, ess_bulk_at, ess_tail_at: which scalar has it, indices into what follows chain and draw; None where
            there is none to name.
    """

    rhat: float
    ess_bulk: float
    ess_tail: float
    num_scalars: int
    num_not_finite: int = 0
    rhat_at: Place | None = None
    ess_bulk_at: Place | None = None
    ess_tail_at: Place | None = None


def convergence(draws: np.ndarray) -> Convergence:
    """Worst numbers over the scalars of ``draws`` (C, S, ...).

    Rank-normalised split R-hat, bulk and tail ESS (Vehtari et al. 2021, Bayesian Analysis 16(2)). A single chain is cut
    in two, so that R-hat exists. Scalars that never move (a probability that is 1 to the last bit) are left out; if
    none moves, R-hat is infinite and ESS 0: a chain that stands still has not converged, and neither has one with a
    draw that is NaN or infinite.
    """
    values = np.asarray(draws, dtype=float).reshape(*draws.shape[:2], -1)
    shape = draws.shape[2:]
    broken = np.flatnonzero(~np.isfinite(values).all((0, 1)))
    if len(broken):
        place = _place(broken[0], shape)
        return Convergence(float("inf"), 0.0, 0.0, 0, len(broken), place, place, place)
    if values.shape[0] == 1:
        half = values.shape[1] // 2
        values = values[0, : 2 * half].reshape(2, half, -1)
    if values.shape[1] < _FEWEST_DRAWS:
        return Convergence(float("inf"), 0.0, 0.0, 0)
    moving = np.flatnonzero(np.ptp(values, (0, 1)) > 0)
    if not len(moving):
        return Convergence(float("inf"), 0.0, 0.0, 0)
    values = values[..., moving]
    shrink = np.nan_to_num(rhat(values), nan=np.inf)
    bulk, tail = (np.nan_to_num(ess(values, method), nan=0.0) for method in ("bulk", "tail"))
    worst = shrink.argmax(), bulk.argmin(), tail.argmin()
    return Convergence(
        float(shrink[worst[0]]),
        float(bulk[worst[1]]),
        float(tail[worst[2]]),
        len(moving),
        0,
        *(_place(moving[one], shape) for one in worst),
    )


def _place(index: np.integer, shape: tuple[int, ...]) -> Place:
    return tuple(int(i) for i in np.unravel_index(index, shape)) if shape else ()


def spread(num_images: int, most: int = NUM_IMAGES) -> np.ndarray:
    """Indices of at most ``most`` of the images, spread evenly over all of them."""
    return np.linspace(0, num_images - 1, min(num_images, most)).round().astype(int)


def probability_convergence(draws: Draws, features: Tensor, num_images: int = NUM_IMAGES) -> Convergence:
    """Convergence of the predicted probabilities of at most ``num_images`` of the images (N, D), spread evenly."""
    return convergence(probabilities(draws.weight, draws.bias, features[spread(len(features), num_images)]))


def probabilities(weight: Tensor, bias: Tensor, features: Tensor) -> np.ndarray:
    """Class probabilities of draws (C, S, K, D) and (C, S, K) at features (N, D): (C, S, N, K)."""
    logits = features.to(weight) @ weight.mT + bias.unsqueeze(-2)
    return logits.softmax(-1).cpu().numpy()


def energy_fraction(energy: np.ndarray) -> list[float]:
    """E-BFMI of each chain, sum_s (E_s - E_{s-1})^2 / sum_s (E_s - mean E)^2 for energies (C, S); below 0.3 is low.

    NaN for a chain whose energies are not finite, or do not move.

    Source: Betancourt (2016), arXiv:1604.00695.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        centred = energy - energy.mean(1, keepdims=True)
        fractions = np.square(np.diff(energy, axis=1)).sum(1) / np.square(centred).sum(1)
    still = np.ptp(energy, axis=1) == 0
    return [float("nan") if same else float(x) for x, same in zip(fractions, still, strict=True)]
