"""Posterior predictive class probabilities, none of which can see the shift that softmax cannot see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayescam.posterior.draws import Draws
from bayescam.posterior.expectations import normal_rule
from bayescam.posterior.images import augment, check_rows

if TYPE_CHECKING:
    from bayescam.posterior.laplace import Laplace

_ELEMENTS = 1 << 23


def predict_proba(draws: Draws, features: Tensor | np.ndarray) -> Tensor:
    """p(y | phi) = mean over draws of softmax(weight phi + bias): features (N, D) -> (N, K).

    Args:
        draws: posterior draws, of any chain count.
        features: phi (N, D).

    Raises:
        TypeError, ValueError: what are no draws, or no features of the draws' D, or not finite.
    """
    if not isinstance(draws, Draws):
        raise TypeError(f"draws must be Draws (Laplace.sample, Nuts.draws), got {type(draws).__name__}")
    weight, bias = draws.flat()
    features = check_rows(features, draws.num_features, weight)
    s, k, d = weight.shape
    rows = max(1, _ELEMENTS // (s * k))
    chunks = []
    for phi in features.split(rows):
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
    rule = normal_rule(laplace.covariance.logit_rank, num_points)
    mean = rows @ laplace.theta_mean.T
    chunk = max(1, _ELEMENTS // (num_points * laplace.num_classes))
    points, weights = rule.points.to(rows), rule.weights.to(rows)
    return torch.cat(
        [
            (m.unsqueeze(-1) + laplace.covariance.perturb(laplace.covariance.logit_scale(x), points)).softmax(1)
            @ weights
            for x, m in zip(rows.split(chunk), mean.split(chunk), strict=True)
        ]
    )
