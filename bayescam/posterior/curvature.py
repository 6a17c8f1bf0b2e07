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

from collections.abc import Callable

import torch
from torch import Tensor

from bayescam.errors import NotPositiveDefiniteError
from bayescam.posterior.covariance import DiagCovariance, FullCovariance, KronCovariance, contrast_basis
from bayescam.posterior.images import TrainingImages, augment

_SKIPPED_SHARE = 1e-6
_DOUBLINGS = 10
_GRAM_ROWS = 8192
_STRIP = 128
Probabilities = Callable[[slice, Tensor], Tensor]


def probabilities_at(theta: Tensor, images: TrainingImages) -> Probabilities:
    """p_n = softmax(weight phi_n + bias) for a chunk of images, (n, K)."""
    weight, bias = theta[:, :-1].to(images.dtype), theta[:, -1].to(images.dtype)
    return lambda span, phi: torch.addmm(bias, phi, weight.T).softmax(-1)


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


def pair_grams(images: TrainingImages, pair_weights: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """G_ab for all pairs a < b: (K(K-1)/2, D+1, D+1) float64.

    In float32, images whose weight cannot matter are left out: with v a fixed unit vector, ||G_ab|| >= sum_n
    w_n (v . phi~_n)^2, so leaving out the images whose w_n |phi~_n|^2 sum to at most 1e-6 of that changes G_ab
    by less than 1e-6 of its norm.
    """
    k, width = images.num_classes, images.num_features + 1
    grams = torch.zeros(k * (k - 1) // 2, width, width, dtype=torch.float64, device=images.device)
    direction = None
    for span, phi in images.chunks(_GRAM_ROWS):
        rows = augment(phi)
        weights = pair_weights(span, phi)
        if images.image_weights is not None:
            weights = weights * images.image_weights[span, None].to(weights)
        if direction is None:
            direction = torch.nn.functional.normalize(rows.mean(0), dim=0)
        keep = _kept(rows, weights, direction) if images.dtype == torch.float32 else None
        for pair, weight in enumerate(weights.sqrt().T):
            if keep is None:
                grams[pair] += weighted_gram(rows * weight[:, None])
            else:
                chosen = keep[:, pair].nonzero().squeeze(-1)
                weighted = rows.index_select(0, chosen).mul_(weight.index_select(0, chosen)[:, None])
                grams[pair] += weighted_gram(weighted)
    return _mirror(images.total(grams))


def _kept(rows: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
    """Which images count for which pair, (n, pairs): all but small ones whose norms sum to at most 1e-6 of the block's.

    The limit below which an image is left out starts at its even share of that and doubles while the sum allows it.
    """
    share = weights * rows.square().sum(-1, keepdim=True)
    allowed = _SKIPPED_SHARE * (weights * (rows @ direction).square()[:, None]).sum(0)
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


def full_covariance(
    images: TrainingImages, pair_weights: Callable[[slice, Tensor], Tensor], prior_precision: float
) -> FullCovariance:
    """The inverse Hessian with every correlation kept.

    Raises:
        NotPositiveDefiniteError: the Hessian in floating point has a direction without curvature.
    """
    hessian = contrast_hessian(pair_grams(images, pair_weights), images.num_classes)
    hessian.diagonal().add_(prior_precision)
    factor = cholesky(hessian, prior_precision)
    return FullCovariance(factor, prior_precision, images.num_classes)


def contrast_hessian(grams: Tensor, num_classes: int) -> Tensor:
    """sum_{a<b} q_ab q_ab^T (x) G_ab with q_ab = Q^T (e_a - e_b): (pairs, E, E) -> (M, M)."""
    basis = contrast_basis(num_classes, like=grams)
    a, b = torch.triu_indices(num_classes, num_classes, 1, device=grams.device)
    contrast = basis[a] - basis[b]
    width, count = grams.shape[-1], num_classes - 1
    i, j = torch.tril_indices(count, count, device=grams.device)
    blocks = (contrast[:, i] * contrast[:, j]).T @ grams.flatten(1)
    hessian = grams.new_empty(count, width, count, width)
    hessian[i, :, j] = hessian[j, :, i] = blocks.unflatten(1, (width, width))
    return hessian.reshape(count * width, count * width)


def cholesky(hessian: Tensor, prior_precision: float) -> Tensor:
    """L with L L^T the Hessian, or the number that says why there is none."""
    factor, failed_at = torch.linalg.cholesky_ex(hessian)
    if int(failed_at):
        largest = float(hessian.diagonal().max())
        raise NotPositiveDefiniteError(
            f"the Hessian is not positive definite in float64: pivot {int(failed_at)} of {len(hessian)} is not "
            f"positive, the largest diagonal entry is {largest:.3g} against prior_precision {prior_precision:.3g}; "
            "pass float64 features, standardise them, or raise prior_precision"
        )
    return factor


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
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("features: the sum of their squares overflows; standardise them")
    basis = contrast_basis(len(class_curvature), like=class_curvature)
    values, vectors = torch.linalg.eigh(gram)
    unit = torch.ones_like(basis[0])
    bare = KronCovariance(basis, unit, vectors, values.clamp(min=0), prior_precision)
    return bare.with_classes(class_curvature, num_images)


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


def hessian_product(theta: Tensor, vector: Tensor, images: TrainingImages, prior_precision: float) -> Tensor:
    """H v without H: sum_n w_n (Lambda_n V phi~_n) phi~_n^T + tau V; theta, vector and result (K, D+1) float64."""
    k = images.num_classes
    both = torch.cat([theta, vector]).to(images.dtype)
    product = prior_precision * vector
    sums = torch.zeros_like(vector)
    for span, phi in images.chunks():
        logits, along = torch.addmm(both[:, -1:], both[:, :-1], phi.T).split(k)
        proba = logits.softmax(0)
        change = proba * (along - (proba * along).sum(0))
        if images.image_weights is not None:
            change *= images.image_weights[span].to(change)
        sums[:, :-1] += (change @ phi).double()
        sums[:, -1] += change.sum(1, dtype=torch.float64)
    return product + images.total(sums)
