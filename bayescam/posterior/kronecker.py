"""The Kronecker-factored precision whose Gaussian is nearest to the posterior in KL(q || posterior).

In the family Sigma = (B (x) A + tau I)^-1, with H the likelihood's part of E_q[Hessian U],

    dELBO = tr(Sigma (H - B (x) A) Sigma (dB (x) A + B (x) dA)) / 2,

so at the optimum B (x) A is H's projection onto the family's tangent space in the metric <X, Y> = tr(Sigma X Sigma Y).
With B = V diag(b) V^T, A = U diag(a) U^T and the variances r_ie = 1 / (b_i a_e + tau), the least-squares factors
of H, each with the other held fixed, are, in these eigenvectors,

    B'_ij = sum_e a_e r_ie r_je H_(ie)(je) / sum_e a_e^2 r_ie r_je,
    A'_ef = sum_i b_i r_ie r_if H_(ie)(if) / sum_i b_i^2 r_ie r_if,

and B' = B, A' = A where the gradient vanishes. Both answer to a common scale of H, which A' / s takes out of one of
them, with s = <H, B (x) A> / <B (x) A, B (x) A>. H = sum_n w_n E[Lambda_n] (x) phi~_n phi~_n^T is never formed: B'
takes a product of N x (D+1) and (D+1) x (K-1)^2, A' takes K-1 weighted Gram matrices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bayescam.posterior.covariance import KronCovariance
from bayescam.posterior.curvature import feature_covariance, weighted_gram
from bayescam.posterior.images import TrainingImages, augment

_ELEMENTS = 1 << 23


def projected_factors(images: TrainingImages, covariance: KronCovariance, products: Tensor) -> Tensor:
    """B' (K, K) and A' / s (D+1, D+1) at this covariance, joined in one vector; in float64, whatever the features are.

    Args:
        images: the training images.
        covariance: of q.
        products: E_q[p_na p_nb] for a < b, (N, K(K-1)/2).
    """
    images = replace(images, widened=True)
    a, b, r = covariance.feature_values, covariance.class_values, covariance.eigenvalues.reciprocal()
    along_classes, along_features = _contract(images, covariance, products)
    own_classes = torch.einsum("e,ie,je->ij", a.square(), r, r)
    own_features = torch.einsum("i,ie,if->ef", b.square(), r, r)
    scale = (along_classes.diagonal() @ b) / (own_classes.diagonal() @ b.square())
    classes = torch.where(own_classes > 0, along_classes / own_classes, torch.diag(b))
    features = torch.where(own_features > 0, along_features / own_features / scale, torch.diag(a))
    return _joined(covariance, classes, features)


def covariance_of(factors: Tensor, num_classes: int, prior_precision: float) -> KronCovariance:
    """The covariance whose factors B and A are joined in a vector; eigenvalues below nought count as nought."""
    k = num_classes
    width = round((len(factors) - k * k) ** 0.5)
    bare = feature_covariance(factors[k * k :].reshape(width, width), k, prior_precision)
    return bare.with_classes(factors[: k * k].reshape(k, k), 1.0)


def _joined(covariance: KronCovariance, classes: Tensor, features: Tensor) -> Tensor:
    v, u = covariance.class_vectors, covariance.feature_vectors
    return torch.cat([(v @ classes @ v.T).flatten(), (u @ features @ u.T).flatten()])


def _contract(images: TrainingImages, covariance: KronCovariance, products: Tensor) -> tuple[Tensor, Tensor]:
    """sum_e a_e r_ie r_je H_(ie)(je), (K-1, K-1), and sum_i b_i r_ie r_if H_(ie)(if), (D+1, D+1)."""
    k, local = images.num_classes, covariance.to(images.dtype)
    r = covariance.eigenvalues.reciprocal()
    between = torch.einsum("e,ie,je->ije", covariance.feature_values, r, r).flatten(0, 1).T.to(images.dtype)
    along_classes = torch.zeros((k - 1) ** 2, dtype=torch.float64, device=images.device)
    along_features = torch.zeros_like(covariance.feature_vectors)
    for span, phi in images.chunks(max(256, _ELEMENTS // (k * max(k, images.num_features)))):
        rows = augment(phi) @ local.feature_vectors
        curvature = _curvature(products[span].to(rows), local.class_vectors)
        if images.image_weights is not None:
            curvature = curvature * images.image_weights[span, None, None].to(curvature)
        along_classes += ((rows.square() @ between) * curvature.flatten(1)).sum(0, dtype=torch.float64)
        for i in range(k - 1):
            sizes = curvature[:, i, i].clamp(min=0).sqrt()
            scaled = rows * r[i].to(rows) * sizes[:, None]
            along_features += covariance.class_values[i] * weighted_gram(scaled)
    lower = images.total(along_features)
    return images.total(along_classes).reshape(k - 1, k - 1), lower.tril() + lower.tril(-1).T


def _curvature(products: Tensor, vectors: Tensor) -> Tensor:
    """V^T E[Lambda_n] V, (n, K-1, K-1), from E[p_a p_b], (n, K(K-1)/2)."""
    k = len(vectors)
    a, b = torch.triu_indices(k, k, 1, device=products.device)
    square = products.new_zeros(len(products), k, k)
    square[:, a, b] = products
    square = square + square.mT
    laplacian = torch.diag_embed(square.sum(-1)) - square
    return vectors.T @ laplacian @ vectors
