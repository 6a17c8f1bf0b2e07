"""Simulation-based calibration: parameters from the prior, data from the parameters, and the rank of the truth.

If theta ~ prior, y ~ p(y | theta) and theta_1..theta_L ~ p(theta | y) exactly, the rank of q(theta) among q(theta_1)..
q(theta_L) is uniform on 0..L for every quantity q (Talts et al. 2018, arXiv:1804.06788), of the data as well: with the
log-likelihood among them, a posterior that ignores the data is caught too (Modrak et al. 2023, Bayesian Analysis).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bayescam.posterior.draws import Draws

Sampler = Callable[[Tensor, Tensor, int], Draws]


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks of the truth: one array (R,) of whole numbers in 0..``num_draws`` for each test quantity."""

    ranks: Mapping[str, np.ndarray]
    num_draws: int


@dataclass(frozen=True, eq=False)
class EcdfDifference:
    """ECDF of the normalised ranks minus the uniform CDF, with a simultaneous band around 0; arrays (T,)."""

    points: np.ndarray
    difference: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @property
    def inside(self) -> bool:
        return bool(((self.difference >= self.lower) & (self.difference <= self.upper)).all())


def quantities(draws: Draws, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Test quantities that softmax can see, each (S,) over all draws of all chains.

    Two centred weights, a centred bias, the squared norm of the centred weights, and the log-likelihood
    sum_n log p(y_n | theta).
    """
    weight, bias = draws.centred().flat()
    logits = weight @ features.to(weight).T + bias.unsqueeze(-1)
    rows = torch.arange(len(labels), device=labels.device)
    return {
        "weight[0,0]": weight[:, 0, 0],
        "weight[1,-1]": weight[:, 1, -1],
        "bias[0]": bias[:, 0],
        "squared_norm": weight.square().sum((1, 2)),
        "log_likelihood": logits.log_softmax(1)[:, labels, rows].sum(1),
    }


def simulate_ranks(
    features: Tensor,
    num_classes: int,
    prior_precision: float,
    samplers: Mapping[str, Sampler],
    *,
    num_simulations: int,
    seed: int,
    progress: bool = True,
) -> dict[str, Ranks]:
    """Ranks of ``num_simulations`` truths under each sampler.

    Args:
        features: phi (N, D), the same in every simulation.
        num_classes, prior_precision: K and tau of the model.
        samplers: name -> function of (features, labels, seed) that returns independent posterior draws, always as
            many.
        num_simulations: R.
        seed: of truths and labels; simulation r gives its samplers the seed ``seed + r``.
        progress: show a bar on a terminal.
    """
    generator = torch.Generator().manual_seed(seed)
    d = features.shape[1]
    found: dict[str, list[dict[str, int]]] = {name: [] for name in samplers}
    sizes: dict[str, int] = {}
    for r in tqdm(range(num_simulations), desc="SBC", disable=None if progress else True):
        theta = torch.randn(1, 1, num_classes, d + 1, generator=generator, dtype=torch.float64) / prior_precision**0.5
        truth = Draws(theta[..., :-1], theta[..., -1])
        proba = (features.double() @ theta[0, 0, :, :-1].T + theta[0, 0, :, -1]).softmax(1)
        labels = torch.multinomial(proba, 1, generator=generator)[:, 0]
        true = quantities(truth, features, labels)
        for name, sampler in samplers.items():
            drawn = quantities(sampler(features, labels, seed + r), features, labels)
            found[name].append({q: int((values < true[q]).sum()) for q, values in drawn.items()})
            sizes[name] = len(drawn["log_likelihood"])
    return {
        name: Ranks({q: np.array([row[q] for row in rows]) for q in rows[0]}, sizes[name])
        for name, rows in found.items()
    }


def ecdf_difference(
    ranks: np.ndarray, num_draws: int, *, coverage: float = 0.95, num_points: int = 50
) -> EcdfDifference:
    """ECDF-difference of ranks (R,) in 0..num_draws with a band that holds with probability ``coverage`` at once.

    Source: Saeilynoja, Buerkner and Vehtari (2022), Statistics and Computing 32; the band's pointwise level is found by
    simulating uniform ranks.
    """
    lower, upper = _band(len(ranks), num_draws, coverage, num_points)
    points = _points(num_draws, num_points)
    uniform = (np.floor(points * num_draws) + 1) / (num_draws + 1)
    ecdf = (ranks[:, None] <= np.floor(points * num_draws)).mean(0)
    return EcdfDifference(points, ecdf - uniform, lower - uniform, upper - uniform)


def _points(num_draws: int, num_points: int) -> np.ndarray:
    return np.arange(1, num_points) / num_points if num_draws >= num_points else np.arange(num_draws) / num_draws


@cache
def _band(num: int, num_draws: int, coverage: float, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Simultaneous lower and upper bounds of the ECDF of ``num`` uniform ranks at the points."""
    edges = np.floor(_points(num_draws, num_points) * num_draws)
    uniform = np.random.default_rng(0).integers(0, num_draws + 1, (4000, num))
    counts = np.stack([(uniform <= edge).sum(1) for edge in edges], 1)
    order = np.sort(counts, axis=0)
    # The pointwise tail probability of each simulated curve's worst point; its quantile is the level wanted.
    below = np.stack([np.searchsorted(order[:, j], counts[:, j], "right") for j in range(len(edges))], 1)
    above = len(counts) - np.stack([np.searchsorted(order[:, j], counts[:, j], "left") for j in range(len(edges))], 1)
    worst = np.minimum(below, above).min(1)
    level = int(np.quantile(worst, 1 - coverage, method="lower"))
    keep = max(level - 1, 0)
    return order[keep] / num, order[len(order) - 1 - keep] / num
