"""Expectations over the logits of each image under a Gaussian posterior: E_q[log p], E_q[p], E_q[p p^T].

Under q the centred logits of image n are a Gaussian in K-1 dimensions, whatever D is. One rule for the standard
normal serves all
images: Gauss-Hermite for K = 2, where the softmax is a function of one variable; else Sobol points, each with
its mirror image, so that odd moments are exact. ``refine`` measures the rule's error against a rule of other
points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayescam.posterior.covariance import Covariance
from bayescam.posterior.images import TrainingImages, augment

_ELEMENTS = 1 << 21
_HERMITE_POINTS = 96


@dataclass(frozen=True, eq=False)
class NormalRule:
    """sum_t weights_t f(points_t) ~ E[f(z)], z standard normal: points (T, dimension), weights (T,), float64."""

    points: Tensor
    weights: Tensor


def normal_rule(dimension: int, num_points: int, *, seed: int = 0) -> NormalRule:
    """Gauss-Hermite in one dimension; in more, scrambled Sobol points and their mirror images.

    Args:
        dimension: of z.
        num_points: T >= 2, even; Gauss-Hermite uses 96 whatever is asked.
        seed: of the scramble.
    """
    if dimension == 1:
        nodes, weights = np.polynomial.hermite_e.hermegauss(_HERMITE_POINTS)
        return NormalRule(torch.from_numpy(nodes)[:, None], torch.from_numpy(weights / weights.sum()))
    if num_points < 2 or num_points % 2:
        raise ValueError(f"num_points is {num_points}; give an even number (points come with their mirror images)")
    sobol = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)
    half = torch.special.ndtri(sobol.draw(num_points // 2, dtype=torch.float64).clamp(1e-9, 1 - 1e-9))
    points = torch.cat([half, -half])
    return NormalRule(points, torch.full((num_points,), 1 / num_points, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Moments:
    """The first two moments of each image's class probabilities under q, this rank's images.

    Args:
        mean: E[p_n], (N, K).
        square: E[p_nk^2], (N, K).
        products: E[p_na p_nb] for a < b, (N, K(K-1)/2), where the structure is "full".
        summed_products: sum_n w_n E[p_na p_nb] for a < b, (K(K-1)/2,) over all ranks, where it is "kron".
    """

    mean: Tensor
    square: Tensor
    products: Tensor | None
    summed_products: Tensor | None

    @property
    def spread(self) -> Tensor:
        """E[tr Lambda_n] = 1 - sum_k E[p_nk^2], (N,)."""
        return (1 - self.square.sum(1)).clamp(min=0)


def logit_scales(images: TrainingImages, covariance: Covariance) -> Tensor:
    """``covariance.logit_scale`` at every image of this rank, in the images' type."""
    local = covariance.to(images.dtype)
    return torch.cat([local.logit_scale(augment(phi)) for _, phi in images.chunks(2048)])


def expected_loss(
    images: TrainingImages, theta: Tensor, covariance: Covariance, scales: Tensor, rule: NormalRule
) -> tuple[float, Tensor]:
    """sum_n w_n E_q[-log p(y_n)] and its gradient in the mean, sum_n w_n (E[p_n] - y_n) phi~_n^T, (K, D+1)."""
    loss = torch.zeros(1, dtype=torch.float64, device=images.device)
    gradient = torch.zeros_like(theta)
    local, weights = covariance.to(images.dtype), rule.weights.to(scales)
    for span, phi in images.chunks(_rows(images, rule)):
        x, label = augment(phi), images.labels[span, None]
        log_proba = _log_probabilities(x, theta, local, scales[span], rule)
        hit = log_proba.gather(1, label.unsqueeze(-1).expand(-1, 1, len(weights))).squeeze(1) @ weights
        residual = (log_proba.exp_() @ weights).scatter_add_(1, label, -torch.ones_like(hit)[:, None])
        if images.image_weights is not None:
            hit, residual = hit * images.image_weights[span].to(x), residual * images.image_weights[span, None].to(x)
        loss -= hit.sum(dtype=torch.float64)
        gradient += (residual.T @ x).double()
    sums = images.total(torch.cat([loss, gradient.flatten()]))
    return float(sums[0]), sums[1:].reshape(gradient.shape)


def moments(images: TrainingImages, theta: Tensor, covariance: Covariance, scales: Tensor, rule: NormalRule) -> Moments:
    """E_q of p and p p^T at every image, as far as the structure of the covariance needs them."""
    k, structure = images.num_classes, covariance.structure
    a, b = torch.triu_indices(k, k, 1, device=images.device)
    local, weights = covariance.to(images.dtype), rule.weights.to(scales)
    means, squares, products = [], [], []
    summed = torch.zeros(k, k, dtype=torch.float64, device=images.device)
    for span, phi in images.chunks(_rows(images, rule)):
        proba = _log_probabilities(augment(phi), theta, local, scales[span], rule).exp_()
        weighted = proba * weights
        means.append(weighted.sum(-1))
        squares.append((proba * weighted).sum(-1))
        if structure == "full":
            products.append((proba @ weighted.mT)[:, a, b])
        elif structure == "kron":
            if images.image_weights is not None:
                weighted = weighted * images.image_weights[span, None, None].to(weighted)
            summed += (proba.transpose(0, 1).flatten(1) @ weighted.transpose(0, 1).flatten(1).T).double()
    return Moments(
        torch.cat(means),
        torch.cat(squares),
        torch.cat(products) if structure == "full" else None,
        images.total(summed)[a, b] if structure == "kron" else None,
    )


def _log_probabilities(x: Tensor, theta: Tensor, covariance: Covariance, scales: Tensor, rule: NormalRule) -> Tensor:
    """log softmax of the logits at every point of the rule: rows x (n, D+1) -> (n, K, T)."""
    return ((x @ theta.to(x).T).unsqueeze(-1) + covariance.perturb(scales, rule.points)).log_softmax(1)


def _rows(images: TrainingImages, rule: NormalRule) -> int:
    return max(1, _ELEMENTS // (len(rule.weights) * images.num_classes))
