"""Posterior predictive class probabilities, none of which can see the shift that softmax cannot see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayescam.posterior.draws import Draws
from bayescam.posterior.images import augment

if TYPE_CHECKING:
    from bayescam.posterior.laplace import Laplace

_ELEMENTS = 1 << 23


def predict_proba(draws: Draws, features: Tensor) -> Tensor:
    """p(y | phi) = mean over draws of softmax(weight phi + bias): features (N, D) -> (N, K).

    Args:
        draws: posterior draws, of any chain count.
        features: phi (N, D), on the device of the draws.
    """
    weight, bias = draws.flat()
    if features.dim() != 2 or features.shape[1] != draws.num_features:
        raise ValueError(f"features must be (N, {draws.num_features}), got {tuple(features.shape)}")
    s, k, d = weight.shape
    rows = max(1, _ELEMENTS // (s * k))
    chunks = []
    for phi in features.to(weight).split(rows):
        logits = torch.addmm(bias.reshape(-1), phi, weight.reshape(-1, d).T)
        chunks.append(logits.unflatten(1, (s, k)).softmax(-1).mean(1))
    return torch.cat(chunks) if chunks else features.new_empty(0, k)


METHODS = ("mc",)
DEFAULT_METHOD = "mc"


def gaussian_predict_proba(laplace: Laplace, features: Tensor, *, method: str, num_points: int = 1024) -> Tensor:
    """Class probabilities under a Gaussian posterior, by one of ``METHODS``; features (N, D) -> (N, K)."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    rows = augment(features)
    z = normal_points(num_points, laplace.covariance.logit_rank)
    mean = rows @ laplace.theta_mean.T
    chunk = max(1, _ELEMENTS // (num_points * laplace.num_classes))
    return torch.cat(
        [
            (m.unsqueeze(1) + laplace.covariance.logit_perturbations(x, z.to(x))).softmax(-1).mean(1)
            for x, m in zip(rows.split(chunk), mean.split(chunk), strict=True)
        ]
    )


def normal_points(num_points: int, dimension: int) -> Tensor:
    """A quasi-Monte Carlo rule for the standard normal: Sobol points, scrambled with a fixed seed, (T, dimension)."""
    uniform = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=0).draw(num_points, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
