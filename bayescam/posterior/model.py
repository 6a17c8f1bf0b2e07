"""The one density of the project: a multinomial-logit last layer with an isotropic Gaussian prior, in Pyro.

MAP, Hessian, evidence, refinement and NUTS all target it: ``last_layer`` states it to Pyro, and
``negative_log_joint`` is the same number (and its gradient) in closed form, which
``tests/posterior/test_model.py`` holds to Pyro's trace.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayescam.posterior.images import TrainingImages, check_prior_precision, whole_number


def last_layer(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    num_classes: int,
    prior_precision: float | Tensor,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The Pyro model of the last layer.

    weight, bias ~ Normal(0, tau^-1/2) i.i.d.;  y_n ~ Categorical(softmax(weight phi_n + bias)).

    With ``class_weights`` (K,) the likelihood is generalised: log p(y_n) is multiplied by class_weights[y_n].

    Args:
        features: phi, (N, D), float32 or float64; the logits are of the wider type of features and weight, so that a
            float64 guide works with float32 features.
        labels: (N,) whole numbers in 0..K-1 of an integer type, or None to simulate.
        num_classes: K >= 2.
        prior_precision: tau > 0, a number or a tensor.
        class_weights: (K,) positive, or None for the plain likelihood.

    Returns:
        The labels, (N,).

    Raises:
        TypeError: an argument of another type; labels that are not of an integer type.
        ValueError: another shape, or a value out of range. Values in tensors are looked at only while Pyro's own
            validation is on (``pyro.enable_validation``), as it is by default, but for MCMC's inner steps.

    The site "y" carries features and class weights in its ``infer`` dictionary, where ``AutoLastLayerLaplace``
    finds them.
    """
    num_classes = whole_number(num_classes, "num_classes", 2)
    _check_shapes(features, labels, class_weights, num_classes)
    tau = prior_precision if isinstance(prior_precision, Tensor) else check_prior_precision(prior_precision)
    if dist.is_validation_enabled():
        _check_values(labels, tau, class_weights, num_classes)
    n, d = features.shape
    sd = torch.as_tensor(tau, dtype=features.dtype, device=features.device).rsqrt()
    zero = features.new_zeros(())
    weight = pyro.sample("weight", dist.Normal(zero, sd).expand([num_classes, d]).to_event(2))
    bias = pyro.sample("bias", dist.Normal(zero, sd).expand([num_classes]).to_event(1))
    weight, bias = weight.reshape(-1, num_classes, d), bias.reshape(-1, 1, num_classes)
    wide = torch.promote_types(features.dtype, torch.promote_types(weight.dtype, bias.dtype))
    logits = features.to(wide) @ weight.to(wide).mT + bias.to(wide)
    logits = logits[0] if logits.shape[0] == 1 else logits
    scale = 1.0 if class_weights is None or labels is None else class_weights[labels.long()]
    with pyro.plate("images", n), pyro.poutine.scale(scale=scale):
        told: Any = {"features": features, "class_weights": class_weights}
        return pyro.sample("y", dist.Categorical(logits=logits), obs=labels, infer=told)


def _check_shapes(features: Tensor, labels: Tensor | None, class_weights: Tensor | None, num_classes: int) -> None:
    """What costs nothing to check: types and shapes."""
    for name, value in (("features", features), ("labels", labels), ("class_weights", class_weights)):
        if not isinstance(value, Tensor) and (value is not None or name == "features"):
            raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}; give torch.as_tensor of it")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating-point numbers, got {features.dtype}; convert them to float32")
    if features.dim() != 2 or features.numel() == 0:
        raise ValueError(f"features must be (N, D) with N, D >= 1, got shape {tuple(features.shape)}")
    if labels is not None and labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be ({len(features)},) like the rows of features, got {tuple(labels.shape)}")
    if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be whole numbers of an integer type, got {labels.dtype}; give labels.long()")
    if class_weights is not None and class_weights.shape != (num_classes,):
        raise ValueError(f"class_weights must be ({num_classes},), one a class, got {tuple(class_weights.shape)}")


def _check_values(
    labels: Tensor | None, prior_precision: float | Tensor, class_weights: Tensor | None, num_classes: int
) -> None:
    """What costs a pass over the labels, and waits for a GPU."""
    if labels is not None:
        least, most = (int(end) for end in labels.long().aminmax())
        if least < 0 or most >= num_classes:
            raise ValueError(f"labels run from {least} to {most}, outside 0..{num_classes - 1}; check num_classes")
    if isinstance(prior_precision, Tensor) and not bool((prior_precision > 0).all()):
        raise ValueError(f"prior_precision is {prior_precision}; it must be positive")
    if class_weights is not None and not bool(((class_weights > 0) & class_weights.isfinite()).all()):
        raise ValueError(f"class_weights must be positive and finite, got {class_weights.tolist()}")


def log_prior(theta: Tensor, prior_precision: float) -> Tensor:
    """log Normal(theta; 0, tau^-1 I), constants included; theta (..., P) -> (...)."""
    p = theta.shape[-1]
    return 0.5 * p * math.log(prior_precision / (2 * math.pi)) - 0.5 * prior_precision * theta.square().sum(-1)


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(K, n): one where the class is the label, zero elsewhere."""
    columns = torch.arange(len(labels), device=labels.device)
    cells = torch.zeros(num_classes, len(labels), dtype=dtype, device=labels.device)
    cells[labels, columns] = 1
    return cells


def negative_log_likelihood(
    theta: Tensor, features: Tensor, truth: Tensor, image_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-sum_n a_n log softmax(theta phi~_n)_{y_n} and its gradient sum_n a_n (p_n - e_{y_n}) phi~_n^T.

    The one data term of the project: the MAP, the evidence and every sampler walk on it. Two matrix products with the
    features and one softmax along the class axis of (K, n), which is many times faster than along the short last axis
    of (n, K).

    Args:
        theta: [weight, bias], (B, K, D+1), in the features' type.
        features: phi, (n, D).
        truth: the labels' ``one_hot``, (K, n).
        image_weights: a, (n,), or None for ones.

    Returns:
        value (B,), summed in float64, and gradient (B, K, D+1) in the features' type.
    """
    k = theta.shape[1]
    flat = theta.flatten(0, 1)
    logits = torch.addmm(flat[:, -1:], flat[:, :-1], features.T).unflatten(0, (-1, k))
    log_proba = logits.log_softmax(1)
    hit = torch.linalg.vecdot(log_proba, truth, dim=1)
    residual = log_proba.exp_().sub_(truth)
    if image_weights is not None:
        hit, residual = hit * image_weights, residual.mul_(image_weights)
    residual = residual.flatten(0, 1)
    gradient = torch.cat([residual @ features, residual.sum(1, keepdim=True)], 1)
    return -hit.sum(1, dtype=torch.float64), gradient.view_as(theta)


def negative_log_joint(theta: Tensor, images: TrainingImages, prior_precision: float) -> tuple[Tensor, Tensor]:
    """-log p(theta) - log p(y | theta), constants included, and its gradient; the same number as
    ``last_layer``'s trace.

    Products over features are taken in the images' type, chunk by chunk; sums are accumulated in float64.

    Args:
        theta: [weight, bias], (..., K, D+1), float64; leading dimensions are a batch of parameters.
        images: the training images, whose class weights (if any) generalise the likelihood.
        prior_precision: tau.

    Returns:
        value (...,) and gradient (..., K, D+1), float64.
    """
    flat = theta.reshape(-1, *theta.shape[-2:])
    low = flat.to(images.dtype)
    value = flat.new_zeros(len(flat), dtype=torch.float64)
    gradient = torch.zeros_like(flat, dtype=torch.float64)
    for span, phi in images.chunks():
        weights = None if images.image_weights is None else images.image_weights[span].to(phi)
        truth = one_hot(images.labels[span], images.num_classes, phi.dtype)
        more, slope = negative_log_likelihood(low, phi, truth, weights)
        value += more
        gradient += slope
    sums = images.total(torch.cat([value[:, None], gradient.flatten(1)], dim=1))
    value = sums[:, 0] - log_prior(flat.flatten(1), prior_precision)
    gradient = sums[:, 1:].view_as(flat) + prior_precision * flat
    return value.reshape(theta.shape[:-2]), gradient.reshape(theta.shape)
