"""Posterior predictive class probabilities, none of which can see the shift that softmax cannot see."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayescam.posterior.draws import Draws
from bayescam.posterior.expectations import NormalRule, logistic_mean, normal_rule
from bayescam.posterior.images import augment, check_rows, whole_number

if TYPE_CHECKING:
    from bayescam.posterior.laplace import Laplace

_ELEMENTS = 1 << 23
_NUM_POINTS = 1024


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


METHODS = ("mc", "pairwise", "bridge", "map")
DEFAULT_METHOD = "mc"


def gaussian_predict_proba(laplace: Laplace, features: Tensor, *, method: str, num_points: int | None = None) -> Tensor:
    """Class probabilities under a Gaussian posterior: features (N, D) -> (N, K).

    No method can see the shift common to all logits. For K = 2 all but "map" are the integral itself, by
    ``logistic_mean``, in both tails.

    "mc" is the default: it is the Gaussian's own predictive, what draws of it give, and of the refined posterior the
    nearest to NUTS (``scripts/predictives.py``, over training sizes, tau, clean and shifted images: a geometric mean of
    the total variation of .013; "pairwise", nearer only under shift at weak priors, .028; "bridge" .052). Around the
    MAP no method mends a Gaussian that is wrong there: "map", no uncertainty at all, and "bridge", which divides the
    variances out, are nearer (.023, .034) than "mc" and "pairwise" (.22). Refine it.

    Args:
        laplace: the posterior.
        features: phi, (N, D).
        method: "mc", quasi-Monte Carlo in the K-dimensional space of the centred logits; "pairwise", MacKay's probit
            on every pair of classes; "bridge", the Laplace bridge; "map", the softmax at the mean, no uncertainty at
            all.
        num_points: T of the "mc" rule, even; 1,024 without it.

    Raises:
        TypeError: num_points is no whole number.
        ValueError: no such method, or num_points is odd, below 2 or given with another method than "mc".

    Sources: MacKay (1992), Neural Computation 4; Lu, Ie and Sha (2020), arXiv:2006.07584, for "pairwise". MacKay
    (1998), Machine Learning 33; Hobbhahn, Kristiadi and Hennig (2022), arXiv:2003.01227, for "bridge".
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    if num_points is not None and method != "mc":
        raise ValueError(
            f"num_points is {num_points!r}, but method {method!r} takes no points; leave it out, or use 'mc'"
        )
    points = _NUM_POINTS if num_points is None else whole_number(num_points, "num_points", 2)
    if len(features) == 0:
        return features.new_empty(0, laplace.num_classes)
    rows = augment(features)
    mean = rows @ laplace.theta_mean.T
    mean = mean - mean.mean(1, keepdim=True)
    if method == "map":
        return mean.softmax(1)
    if laplace.num_classes == 2:
        margin = laplace.covariance.variance(rows, rows.new_tensor([[-1.0, 1.0]]))[:, 0]
        lead = mean[:, 1] - mean[:, 0]
        proba = torch.stack([logistic_mean(-lead, margin), logistic_mean(lead, margin)], dim=1)
        return proba / proba.sum(1, keepdim=True)
    if method == "mc":
        return _by_rule(laplace, rows, mean, normal_rule(laplace.covariance.logit_rank, points))
    approximate = pairwise_probit if method == "pairwise" else laplace_bridge
    chunk = max(1, _ELEMENTS // laplace.num_classes**2)
    parts = zip(rows.split(chunk), mean.split(chunk), strict=True)
    return torch.cat([approximate(m, _centred(laplace.covariance.logit_covariance(x))) for x, m in parts])


def _by_rule(laplace: Laplace, rows: Tensor, mean: Tensor, rule: NormalRule) -> Tensor:
    points, weights = rule.points.to(rows), rule.weights.to(rows)
    chunk = max(1, _ELEMENTS // (len(weights) * laplace.num_classes))
    proba = []
    for x, m in zip(rows.split(chunk), mean.split(chunk), strict=True):
        logits = m.unsqueeze(-1) + laplace.covariance.perturb(laplace.covariance.logit_scale(x), points)
        proba.append(logits.softmax(1) @ weights)
    return torch.cat(proba)


def _centred(covariance: Tensor) -> Tensor:
    """C V C with C = I - 11^T/K: (n, K, K)."""
    covariance = covariance - covariance.mean(-1, keepdim=True)
    return covariance - covariance.mean(-2, keepdim=True)


def pairwise_probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """p_k ~ 1 / (1 + sum_{j != k} exp(-D_kj / sqrt(1 + pi/8 Var D_kj))), D_kj = f_k - f_j, normalised.

    (MacKay 1992; Lu, Ie and Sha 2020.) Differences of logits cannot see a common shift.

    Args:
        mean: of the logits, (n, K).
        covariance: of the logits, (n, K, K).
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    spread = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance
    margin = (mean.unsqueeze(-1) - mean.unsqueeze(-2)) / (1 + math.pi / 8 * spread.clamp(min=0)).sqrt()
    return (-torch.logsumexp(-margin, dim=-1)).softmax(-1)


def laplace_bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """The Dirichlet whose density over softmax inputs has these moments (MacKay 1998; Hobbhahn, Kristiadi and
    Hennig 2022).

    alpha_k = (1 - 2/K + exp(m_k) / K^2 sum_j exp(-m_j)) / V_kk on the centred moments; p = alpha / sum alpha.

    Args:
        mean: of the centred logits, (n, K).
        covariance: of the centred logits, (n, K, K).
    """
    k = mean.shape[-1]
    log_ratio = mean + torch.logsumexp(-mean, dim=-1, keepdim=True) - 2 * math.log(k)
    log_first = mean.new_tensor(1 - 2 / k).log()
    return (torch.logaddexp(log_first, log_ratio) - covariance.diagonal(dim1=-2, dim2=-1).log()).softmax(-1)
