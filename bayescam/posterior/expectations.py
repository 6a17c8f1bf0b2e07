"""Expectations over the logits of each image under a Gaussian posterior: E_q[log p], E_q[p], E_q[p p^T].

Under q the centred logits of image n are a Gaussian in K-1 dimensions, whatever D is. With x_k = f_k - f_y, the
logits seen from the label's own,

    -log p_y = log sum_k exp(x_k) = beta sum_{k != y} log(1 + exp x_k) + remainder.

The sum over pairs has closed forms (``logistic_moments``), and holds the rare errors of a confident image: a rival
that overtakes the label with a probability of a thousandth, by ten logits. A rule of points for the standard normal,
the same for all images, integrates the remainder, which is nought where only one rival is near and for K = 2. It does
so for the loss, its gradient E[p] - y and its curvature E[p p^T] alike, so that the three fit together. beta_n is the
constant at which the gradients in f_y of loss and pairs agree at the start: 1 for a confident image, 2/K where all
classes are equally likely (a control variate with a fixed coefficient). ``refine`` measures the rule's error against
a rule of other points.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayescam.posterior.covariance import Covariance
from bayescam.posterior.images import TrainingImages, augment

_ELEMENTS = 1 << 18
_MIXTURE_POINTS = 24
_MIXTURE_RANGE = (0.12, 4.5)
_SERIES = 40


@dataclass(frozen=True, eq=False)
class NormalRule:
    """sum_t weights_t f(points_t) ~ E[f(z)], z standard normal: points (T, dimension), weights (T,), float64."""

    points: Tensor
    weights: Tensor


def normal_rule(dimension: int, num_points: int, *, seed: int = 0, tails: bool = False) -> NormalRule:
    """Scrambled Sobol points and their mirror images, whitened.

    Odd moments are exact, and with 4 points a dimension the second moments too.

    Args:
        dimension: of z.
        num_points: T >= 2, even.
        seed: of the scramble.
        tails: spread the points out as Normal(0, c^2), with the variance v of weights that this costs,
            (c^2 / sqrt(2 c^2 - 1))^dimension = 1 + v. Rare events meet more points of less weight. v = 1, in
            more than 4 dimensions 4 / dimension: normalised weights bias by v / T, the more the more dimensions.

    Raises:
        ValueError: num_points is odd or below 2.
    """
    if num_points < 2 or num_points % 2:
        raise ValueError(f"num_points is {num_points}; give an even number (points come with their mirror images)")
    sobol = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)
    half = torch.special.ndtri(sobol.draw(num_points // 2, dtype=torch.float64).clamp(1e-9, 1 - 1e-9))
    points = torch.cat([half, -half])
    weights = torch.full((num_points,), 1 / num_points, dtype=torch.float64)
    if tails:
        excess = (1 + min(1.0, 4 / dimension)) ** (2 / dimension) - 1
        stretch = 1 + excess + math.sqrt(excess * (1 + excess))
        weights = (-0.5 * (stretch - 1) * points.square().sum(1)).softmax(0)
        points = math.sqrt(stretch) * points
    if num_points >= 4 * dimension:
        second = torch.linalg.cholesky(points.T @ (weights[:, None] * points))
        points = torch.linalg.solve_triangular(second, points.T, upper=False).T
    return NormalRule(points, weights)


@functools.cache
def _logistic_mixture() -> tuple[tuple[float, float], ...]:
    """Sds and weights of normals whose mixture is the logistic distribution, to 1e-11 in its cdf.

    A logistic variable is 2 kappa z with z standard normal and kappa of Kolmogorov's distribution (Andrews and
    Mallows 1974), whose density, by whichever of its two series converges, is summed by the trapezoidal rule in
    log kappa.
    """
    kappa = np.geomspace(*_MIXTURE_RANGE, _MIXTURE_POINTS)
    j = np.arange(1, _SERIES)[:, None]
    above = (8 * kappa * (-1.0) ** (j - 1) * j**2 * np.exp(-2 * (j * kappa) ** 2)).sum(0)
    odd = (2 * j - 1) ** 2 * math.pi**2 / 8
    below = math.sqrt(2 * math.pi) * ((2 * odd / kappa**4 - 1 / kappa**2) * np.exp(-odd / kappa**2)).sum(0)
    weights = np.where(kappa > 0.6, above, below) * kappa
    return tuple(zip((2 * kappa).tolist(), (weights / weights.sum()).tolist(), strict=True))


def logistic_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E[log(1 + e^x)], E[s(x)] and E[s'(x)], s the logistic function, of x ~ Normal(mean, variance), any one shape.

    With the logistic distribution a mixture of Normal(0, sigma_j^2) of weights w_j, r_j^2 = sigma_j^2 + variance
    and t_j = mean / r_j: sum_j w_j (mean Phi(t_j) + r_j phi(t_j)), sum_j w_j Phi(t_j) and sum_j w_j phi(t_j) / r_j.
    """
    soft, step, slope = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)
    for sd, weight in _logistic_mixture():
        spread = (variance + sd**2).sqrt()
        t = mean / spread
        density = (-0.5 * t * t).exp() * (weight / math.sqrt(2 * math.pi))
        below = torch.special.erfc(-math.sqrt(0.5) * t) * (weight / 2)
        soft += mean * below + spread * density
        step += below
        slope += density / spread
    return soft, step, slope


def logistic_mean(mean: Tensor, variance: Tensor) -> Tensor:
    """E[s(x)] of x ~ Normal(mean, variance), any one shape: to a millionth of its value, where that is above 1e-60.

    s(x) = e^x s(-x), and e^x Normal(x; m, v) = e^{m + v/2} Normal(x; m + v, v). So E[s(x)] = e^{m + v/2} E[s(y)] with
    y ~ Normal(-m - v, v), which leaves the far tail, m < -v, to the exponential and E[s(y)] > 1/2 to the mixture of
    ``logistic_moments``.
    """
    tail = mean < -variance
    centre = torch.where(tail, -mean - variance, mean)
    step = torch.zeros_like(mean)
    for sd, weight in _logistic_mixture():
        step += weight / 2 * torch.erfc(-centre / (2 * (variance + sd**2)).sqrt())
    return torch.where(tail, (mean + variance / 2).exp() * step, step)


@dataclass(frozen=True, eq=False)
class LogitRule:
    """How each image's expectations are taken: the pairs of classes exactly, the remainder by points.

    Args:
        normal: the points, in the covariance's ``logit_rank`` dimensions.
        shares: beta_n, (N,), of this rank's images.
    """

    normal: NormalRule
    shares: Tensor


def logit_rule(images: TrainingImages, theta: Tensor, covariance: Covariance, num_points: int, seed: int) -> LogitRule:
    """The rule for these images, with beta_n = sum_{k != y} p_nk / sum_{k != y} s(f_nk - f_ny) at theta (K, D+1)."""
    shares = []
    for span, phi in images.chunks():
        logits = augment(phi) @ theta.to(phi).T
        relative, label = relative_to(logits, images.labels[span]), images.labels[span, None]
        rivals, pairs = (p.scatter(1, label, 0.0).sum(1) for p in (relative.softmax(1), relative.sigmoid()))
        shares.append(torch.where(pairs > 1e-20, rivals / pairs, 1.0))
    if images.num_classes == 2:
        normal = NormalRule(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    else:
        normal = normal_rule(covariance.logit_rank, num_points, seed=seed, tails=True)
    return LogitRule(normal, torch.cat(shares))


@dataclass(frozen=True, eq=False)
class Moments:
    """What E_q[p p^T] says of the curvature, this rank's images.

    Args:
        variances: E[p_nk (1 - p_nk)], (N, K).
        products: E[p_na p_nb] >= 0 for a < b, (N, K(K-1)/2); None where the structure is "diag".
    """

    variances: Tensor
    products: Tensor | None


def logit_scales(images: TrainingImages, covariance: Covariance) -> Tensor:
    """``covariance.logit_scale`` at every image of this rank, in the images' type."""
    local = covariance.to(images.dtype)
    return torch.cat([local.logit_scale(augment(phi)) for _, phi in images.chunks(2048)])


def expected_loss(
    images: TrainingImages, theta: Tensor, covariance: Covariance, scales: Tensor, rule: LogitRule
) -> tuple[float, Tensor]:
    """sum_n w_n E_q[-log p(y_n)] and its gradient in the mean, sum_n w_n (E[p_n] - y_n) phi~_n^T, (K, D+1)."""
    loss = torch.zeros(1, dtype=torch.float64, device=images.device)
    gradient = torch.zeros_like(theta)
    for span, x, part in _parts(images, theta, covariance, scales, rule):
        soft, step, _ = part.pairs()
        largest = part.relative.amax(1)
        proba = (part.relative - largest.unsqueeze(1)).exp_()
        total = proba.sum(1)
        logistic = part.relative.sigmoid()
        softplus = part.relative.clamp(min=0) - torch.maximum(logistic, 1 - logistic).log_()
        soft -= part.but_label(softplus @ part.weights)
        step -= part.but_label(logistic @ part.weights)
        value = (largest + total.log()) @ part.weights + part.share * soft.sum(1)
        residual = (proba / total.unsqueeze(1)) @ part.weights + part.share[:, None] * step
        residual = part.but_label(residual)
        residual -= part.at_label(residual.sum(1))
        if images.image_weights is not None:
            own = images.image_weights[span].to(x)
            value, residual = value * own, residual * own[:, None]
        loss += value.sum(dtype=torch.float64)
        gradient += (residual.T @ x).double()
    sums = images.total(torch.cat([loss, gradient.flatten()]))
    return float(sums[0]), sums[1:].reshape(gradient.shape)


def moments(images: TrainingImages, theta: Tensor, covariance: Covariance, scales: Tensor, rule: LogitRule) -> Moments:
    """E_q of p p^T at every image, as far as the structure of the covariance needs it."""
    k, in_pairs = images.num_classes, covariance.structure != "diag"
    a, b = torch.triu_indices(k, k, 1, device=images.device)
    variances, products = [], []
    for _, _, part in _parts(images, theta, covariance, scales, rule):
        proba = part.relative.softmax(1)
        step = part.relative.sigmoid()
        added = part.share[:, None] * (part.pairs()[2] - part.but_label((step * (1 - step)) @ part.weights))
        weighted = proba * part.weights
        variances.append(((1 - proba) * weighted).sum(-1) + added + part.at_label(added.sum(1)))
        if in_pairs:
            square = proba @ weighted.mT
            row = torch.arange(len(added), device=added.device)
            square[row, part.label] += added
            square[row, :, part.label] += added
            products.append(square[:, a, b].clamp(min=0))
    return Moments(torch.cat(variances), torch.cat(products) if in_pairs else None)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some images at all points: relative (n, K, T), x_k = f_k - f_y; the rule's weights (T,), in the images' type.

    Also the mean (n, K) and variance (n, K) of x, the label (n,) and share = beta (n,).
    """

    relative: Tensor
    weights: Tensor
    mean: Tensor
    variance: Tensor
    label: Tensor
    share: Tensor

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """``logistic_moments`` of x, each (n, K) and nought at the label."""
        soft, step, slope = (self.but_label(part) for part in logistic_moments(self.mean, self.variance))
        return soft, step, slope

    def but_label(self, values: Tensor) -> Tensor:
        """values (n, K) with nought at the label."""
        return values.scatter(1, self.label[:, None], 0.0)

    def at_label(self, values: Tensor) -> Tensor:
        """values (n,) at the label and nought elsewhere, (n, K)."""
        return torch.zeros_like(self.mean).scatter_(1, self.label[:, None], values[:, None])


def _parts(
    images: TrainingImages, theta: Tensor, covariance: Covariance, scales: Tensor, rule: LogitRule
) -> Iterator[tuple[slice, Tensor, _Part]]:
    """The images in pieces that fit the processor's cache: rows, phi~ (n, D+1), and the logits at every point."""
    points, weights = rule.normal.points.to(scales), rule.normal.weights.to(scales)
    mean = theta.to(scales).T
    for span, phi in images.chunks(max(16, _ELEMENTS // (len(weights) * images.num_classes))):
        x, label, scale = augment(phi), images.labels[span], scales[span]
        logits = x @ mean
        relative = relative_to(logits.unsqueeze(-1) + covariance.perturb(scale, points), label)
        variance = covariance.relative_variance(scale, label)
        part = _Part(relative, weights, relative_to(logits, label), variance, label, rule.shares[span])
        yield span, x, part


def relative_to(logits: Tensor, label: Tensor) -> Tensor:
    """f_k - f_y: logits (n, K, ...), label (n,)."""
    return logits - logits[torch.arange(len(label), device=label.device), label].unsqueeze(1)
