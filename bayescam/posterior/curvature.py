"""The Hessian of -log joint over the last layer, in three structures, from sums over images.

Per image Lambda = diag p - p p^T = sum_{a<b} p_a p_b (e_a - e_b)(e_a - e_b)^T: a graph Laplacian over the
classes. So the full Hessian is sum_{a<b} (e_a - e_b)(e_a - e_b)^T (x) G_ab + tau I with the K(K-1)/2 weighted
Gram matrices

    G_ab = sum_n w_n p_na p_nb phi~_n phi~_n^T,    symmetric and positive semi-definite,

each made by a symmetric rank-n product (little more than half the arithmetic of a matrix product), and their
sum in the contrast basis has no cancellation. Everywhere ``pair_weights`` (n, K(K-1)/2), pairs in the order of
``torch.triu_indices(K, K, 1)``, may as well be an expectation E_q[p_a p_b]: that is how refinement builds E_q[H].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bayescam.errors import NotPositiveDefiniteError
from bayescam.parallel import memory, size
from bayescam.posterior.covariance import DiagCovariance, FullCovariance, KronCovariance, contrast_basis
from bayescam.posterior.images import TrainingImages, augment

_SKIPPED_SHARE = 1e-6
_SKIPPED_OF_PRIOR = 1e-3
_LOST_DIGITS = 1e-3
_DOUBLINGS = 10
_GRAM_ROWS = 8192
_STRIP = 128
_KEPT_ELEMENTS = 1 << 24
Probabilities = Callable[[slice, Tensor], Tensor]


def probabilities_at(theta: Tensor, images: TrainingImages) -> Probabilities:
    """p_n = softmax(weight phi_n + bias) for a chunk of images: (n, K), a class's in a row of memory."""
    low = theta.to(images.dtype)

    def probabilities(_: slice, phi: Tensor) -> Tensor:
        here = low if phi.dtype == low.dtype else theta.to(phi)
        return torch.addmm(here[:, -1:], here[:, :-1], phi.T).softmax(0).T

    return probabilities


def computed_once(probabilities: Probabilities, images: TrainingImages) -> Probabilities:
    """The same for sums that read the same chunks again, each chunk's kept where all take at most 64 MiB in float32."""
    if len(images.labels) * images.num_classes > _KEPT_ELEMENTS:
        return probabilities
    kept: dict[tuple[int, int], Tensor] = {}

    def found(span: slice, phi: Tensor) -> Tensor:
        chunk = (span.start, span.stop)
        if chunk not in kept:
            kept[chunk] = probabilities(span, phi)
        return kept[chunk]

    return found


def pair_products(proba: Tensor) -> Tensor:
    """p_a p_b for a < b: (n, K) -> (n, K(K-1)/2)."""
    a, b = torch.triu_indices(proba.shape[-1], proba.shape[-1], 1, device=proba.device)
    return proba[:, a] * proba[:, b]


def weighted_gram(rows: Tensor) -> Tensor:
    """The lower triangle of rows^T rows, (n, E) -> (E, E) float64, in strips: .6 of a product's arithmetic."""
    width = rows.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    for start in range(0, width, _STRIP):
        end = min(start + _STRIP, width)
        gram[start:end, :end] = rows[:, start:end].T @ rows[:, :end]
    return gram


def feature_gram(images: TrainingImages, weights: Tensor | None = None) -> Tensor:
    """A = sum_n w_n phi~_n phi~_n^T, (D+1, D+1) float64; ``weights`` (N,) >= 0, if given, multiply the images' own."""
    width = images.num_features + 1
    gram = torch.zeros(width, width, dtype=torch.float64, device=images.device)
    for span, phi in images.chunks(_GRAM_ROWS):
        rows = augment(phi)
        for weight in (images.image_weights, weights):
            if weight is not None:
                rows *= weight[span, None].sqrt().to(rows)
        gram += weighted_gram(rows)
    return _mirror(images.total(gram))


def pair_grams(
    images: TrainingImages, pair_weights: Callable[[slice, Tensor], Tensor], prior_precision: float
) -> Tensor:
    """G_ab for all pairs a < b: (K(K-1)/2, D+1, D+1) float64.

    In float32, images whose weight cannot matter are left out: with v a fixed unit vector, ||G_ab|| >= sum_n
    w_n (v . phi~_n)^2, so leaving out the images whose w_n |phi~_n|^2 sum to at most 1e-6 of that changes G_ab
    by less than 1e-6 of its norm. That sum is kept below 1e-3 tau / K as well: the largest eigenvalue of sum_{a<b}
    q_ab q_ab^T is K, so that the Hessian loses less than a thousandth of its smallest eigenvalue.
    """
    k, width = images.num_classes, images.num_features + 1
    enough = _SKIPPED_OF_PRIOR * prior_precision / (k * len(images.labels) * size(images.group))
    grams = torch.zeros(k * (k - 1) // 2, width, width, dtype=torch.float64, device=images.device)
    direction = None
    for span, phi in images.chunks(_GRAM_ROWS):
        rows = augment(phi)
        weights = pair_weights(span, phi)
        if images.image_weights is not None:
            weights = weights * images.image_weights[span, None].to(weights)
        if direction is None:
            direction = torch.nn.functional.normalize(rows.mean(0), dim=0)
        keep = _kept(rows, weights, direction, enough * len(rows)) if images.dtype == torch.float32 else None
        for pair, weight in enumerate(weights.sqrt().T):
            if keep is None:
                grams[pair] += weighted_gram(rows * weight[:, None])
            else:
                chosen = keep[:, pair].nonzero().squeeze(-1)
                weighted = rows.index_select(0, chosen).mul_(weight.index_select(0, chosen)[:, None])
                grams[pair] += weighted_gram(weighted)
    return _mirror(images.total(grams))


def _kept(rows: Tensor, weights: Tensor, direction: Tensor, enough: float) -> Tensor:
    """Which images count for which pair, (n, pairs): all but small ones whose norms sum to at most 1e-6 of the
    block's, and to at most ``enough``.

    The limit below which an image is left out starts at its even share of that and doubles while the sum allows it.
    """
    share = weights * rows.square().sum(-1, keepdim=True)
    allowed = _SKIPPED_SHARE * (weights * (rows @ direction).square()[:, None]).sum(0)
    allowed = allowed.clamp(max=enough)
    limit = allowed / len(rows)
    for _ in range(_DOUBLINGS):
        left_out = share.masked_fill(share > 2 * limit, 0).sum(0)
        limit = torch.where(left_out <= allowed, 2 * limit, limit)
    return share > limit


def _mirror(lower: Tensor) -> Tensor:
    """Copy the lower triangle onto the upper one, in place."""
    for block in lower.reshape(-1, *lower.shape[-2:]):
        block.copy_(block.tril() + block.tril(-1).T)
    return lower


def check_full_fits(images: TrainingImages) -> None:
    """Refuse a full Hessian that this machine's memory cannot hold, before anything is computed.

    Its blocks, the matrix and its Cholesky factor are K(K-1)/2 E^2 + 2 ((K-1) E)^2 numbers of 8 bytes, E = D+1.

    Raises:
        ValueError: they are more than the memory.
    """
    k, width = images.num_classes, images.num_features + 1
    need = 8 * (k * (k - 1) // 2 * width**2 + 2 * ((k - 1) * width) ** 2)
    held = -images.largest(torch.tensor(-memory(images.device), dtype=torch.float64, device=images.device)).item()
    if need > held:
        raise ValueError(
            f"structure 'full' needs {need / 2**30:.3g} GiB for {k} classes of {width - 1} features, this machine has "
            f"{held / 2**30:.3g}; choose 'kron' or 'diag', or check labels and num_classes"
        )


def full_covariance(
    images: TrainingImages, pair_weights: Callable[[slice, Tensor], Tensor], prior_precision: float
) -> FullCovariance:
    """The inverse Hessian with every correlation kept.

    A pivot L_ii^2 of the Cholesky factor is what of H_ii the parameters before it leave over; with products of
    rounding eps its own relative error is some eps H_ii / L_ii^2. Where that is above a thousandth in float32, for
    collinear features under a weak prior, the products are taken in float64.

    Raises:
        NotPositiveDefiniteError: the Hessian has a direction whose curvature float64 cannot hold.
    """
    hessian = contrast_hessian(pair_grams(images, pair_weights, prior_precision), images.num_classes)
    hessian.diagonal().add_(prior_precision)
    factor, lost = _factor(hessian, images.dtype)
    lost = images.agreed_number(lost)
    if lost > _LOST_DIGITS and images.dtype != torch.float64:
        return full_covariance(replace(images, widened=True), pair_weights, prior_precision)
    if lost > _LOST_DIGITS:
        raise NotPositiveDefiniteError(_singular(hessian, lost, prior_precision))
    return FullCovariance(factor, prior_precision, images.num_classes)


def contrast_hessian(grams: Tensor, num_classes: int) -> Tensor:
    """sum_{a<b} q_ab q_ab^T (x) G_ab with q_ab = Q^T (e_a - e_b): (pairs, E, E) -> (M, M)."""
    basis = contrast_basis(num_classes, like=grams)
    a, b = torch.triu_indices(num_classes, num_classes, 1, device=grams.device)
    contrast = basis[a] - basis[b]
    width, count = grams.shape[-1], num_classes - 1
    hessian = grams.new_empty(count, width, count, width)
    for i in range(count):
        blocks = (contrast[:, i, None] * contrast[:, : i + 1]).T @ grams.flatten(1)
        hessian[i, :, : i + 1] = blocks.view(i + 1, width, width).transpose(0, 1)
        hessian[: i + 1, :, i] = blocks.view(i + 1, width, width)
    return hessian.reshape(count * width, count * width)


def _factor(hessian: Tensor, products: torch.dtype) -> tuple[Tensor, float]:
    """L with L L^T the Hessian, and the largest relative error of a pivot if its products had that type's rounding.

    The error is infinite where there is no such L.
    """
    factor, failed_at = torch.linalg.cholesky_ex(hessian)
    if int(failed_at):
        return factor, math.inf
    share = hessian.diagonal() / factor.diagonal().square()
    return factor, torch.finfo(products).eps * float(share.max())


def _singular(hessian: Tensor, lost: float, prior_precision: float) -> str:
    what = "has a direction without curvature" if lost == math.inf else f"leaves a pivot a relative error of {lost:.2g}"
    return (
        f"the Hessian is too near singular for float64: rounding {what}, with a largest diagonal entry of "
        f"{float(hessian.diagonal().max()):.3g} against prior_precision {prior_precision:.3g}; standardise the "
        "features, drop those that repeat others, or raise prior_precision"
    )


def kron_covariance(gram: Tensor, class_curvature: Tensor, prior_precision: float, num_images: float) -> KronCovariance:
    """(B (x) A + tau I)^-1 with A = sum_n w_n phi~ phi~^T and B the mean Lambda (Ritter, Botev and Barber 2018).

    Args:
        gram: A, (D+1, D+1).
        class_curvature: sum_n w_n Lambda_n, (K, K); its null vector 1 is projected out exactly.
        prior_precision: tau.
        num_images: sum_n w_n, by which class_curvature is divided.

    Raises:
        ValueError: the features are so large that their squares overflow.
    """
    return feature_covariance(gram, len(class_curvature), prior_precision).with_classes(class_curvature, num_images)


def feature_covariance(gram: Tensor, num_classes: int, prior_precision: float) -> KronCovariance:
    """(C (x) A + tau I)^-1, C = I - 11^T/K: the covariance before anything is known of the classes.

    Args:
        gram: A, (D+1, D+1); eigenvalues below nought count as nought.
        num_classes: K.
        prior_precision: tau.

    Raises:
        ValueError: the features are so large that their squares overflow.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("features: the sum of their squares overflows; standardise them")
    basis = contrast_basis(num_classes, like=gram)
    values, vectors = torch.linalg.eigh(gram)
    return KronCovariance(basis, torch.ones_like(basis[0]), vectors, values.clamp(min=0), prior_precision)


def class_curvature(images: TrainingImages, probabilities: Probabilities) -> Tensor:
    """sum_n w_n (diag p_n - p_n p_n^T), (K, K) float64."""
    k = images.num_classes
    total = torch.zeros(k, k, dtype=torch.float64, device=images.device)
    for span, phi in images.chunks():
        proba = probabilities(span, phi)
        weighted = proba if images.image_weights is None else proba * images.image_weights[span, None].to(proba)
        total += torch.diag(weighted.sum(0, dtype=torch.float64)) - (weighted.T @ proba).double()
    return images.total(total)


def diag_covariance(images: TrainingImages, probabilities: Probabilities, prior_precision: float) -> DiagCovariance:
    """1 / (sum_n w_n p(1-p) phi~^2 + tau): the Hessian's diagonal, inverted."""
    k, width = images.num_classes, images.num_features + 1
    total = torch.zeros(k, width, dtype=torch.float64, device=images.device)
    for span, phi in images.chunks():
        proba = probabilities(span, phi)
        weight = proba * (1 - proba)
        if images.image_weights is not None:
            weight = weight * images.image_weights[span, None].to(weight)
        total += (weight.T @ augment(phi).square()).double()
    return DiagCovariance(images.total(total) + prior_precision, prior_precision)


def hessian_product(
    probabilities: Probabilities, vector: Tensor, images: TrainingImages, prior_precision: float
) -> Tensor:
    """H v without H: sum_n w_n (Lambda_n V phi~_n) phi~_n^T + tau V; vector and result (K, D+1) float64."""
    low = vector.to(images.dtype)
    sums = torch.zeros_like(vector)
    for span, phi in images.chunks():
        proba = probabilities(span, phi).T
        along = torch.addmm(low[:, -1:], low[:, :-1], phi.T)
        change = along.sub_(torch.linalg.vecdot(proba, along, dim=0)).mul_(proba)
        if images.image_weights is not None:
            change *= images.image_weights[span].to(change)
        sums[:, :-1] += change @ phi
        sums[:, -1] += change.sum(1, dtype=torch.float64)
    return prior_precision * vector + images.total(sums)
