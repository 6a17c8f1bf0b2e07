"""``AutoLastLayerLaplace``: Pyro's ``AutoLaplaceApproximation`` with the last layer's closed-form Hessian."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor

from bayescam.posterior.covariance import FullCovariance
from bayescam.posterior.curvature import full_covariance, pair_products, probabilities_at
from bayescam.posterior.images import check_images
from bayescam.posterior.model import last_layer

_count = itertools.count()


class AutoLastLayerLaplace(AutoLaplaceApproximation):
    """Laplace's approximation of a model that calls ``last_layer``: used with SVI as Pyro documents its parent.

    The parent asks autograd for one row of the Hessian at a time; this one uses H = sum_n (diag p_n - p_n
    p_n^T) (x) phi~_n phi~_n^T + tau I, in the contrast basis, where the shift that softmax cannot see has its
    prior precision exactly. A model with more or other terms than ``last_layer``'s, or under ``poutine.scale``, is
    left to the parent, which stays reachable as
    ``AutoLaplaceApproximation.laplace_approximation(guide, ...)``.

    Unlike Pyro's, no two guides share a parameter: each has its own name, which counts the guides of this process, in
    Pyro's parameter store (``AutoLastLayerLaplace_0.loc``). A guide that is to find what another process stored
    (``pyro.get_param_store().save``) needs the name that it was stored under, so give both the same ``name``; two
    guides of one name in one process are one.

    Args:
        model: ``last_layer`` itself, a partial of it, or any model of Pyro's.
        name: of the guide in Pyro's parameter store; a new one without it.
        options: of the parent, as ``init_loc_fn``.

    Raises:
        TypeError, ValueError: ``name`` is no text, or empty.

    Source: MacKay (1992), Neural Computation 4, for Laplace's approximation; Pyro's documentation for its use.
    """

    def __init__(self, model: Callable[..., Any], *, name: str | None = None, **options: Any) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a text, got {name!r}; it stands before .loc in Pyro's parameter store")
        if name == "":
            raise ValueError("name is empty; give one, or leave it out for a new one")
        super().__init__(model, **options)
        self._pyro_name = f"{type(self).__name__}_{next(_count)}" if name is None else name

    def laplace_approximation(self, *args: Any, **kwargs: Any) -> AutoMultivariateNormal:
        """The Gaussian with mean ``self.loc`` and the inverse Hessian there, as a guide that works at once.

        It is a copy: steps that this guide takes afterwards do not move it.

        Args:
            args, kwargs: the model's own.

        Raises:
            TypeError, ValueError: features or labels that ``check_images`` refuses.
            NotPositiveDefiniteError: the Hessian in floating point has a direction without curvature.
        """
        with torch.no_grad():
            latent = poutine.trace(self).get_trace(*args, **kwargs)
            trace = poutine.trace(poutine.replay(self.model, trace=latent)).get_trace(*args, **kwargs)
        assert self.prototype_trace is not None
        if not _is_last_layer(trace, {name for name, _ in self.prototype_trace.iter_stochastic_nodes()}):
            guide = super().laplace_approximation(*args, **kwargs)
            guide.loc = guide.loc.clone()
            guide._create_plates(*args, **kwargs)
            return guide
        site = trace.nodes["y"]
        weight, bias = trace.nodes["weight"]["value"], trace.nodes["bias"]["value"]
        images = check_images(
            site["infer"]["features"],
            site["value"],
            num_classes=len(bias),
            class_weights=site["infer"]["class_weights"],
        )
        theta = torch.cat([weight, bias[:, None]], dim=1).detach().double()
        probabilities = probabilities_at(theta, images)
        tau = float(trace.nodes["weight"]["fn"].base_dist.scale.double().reshape(-1)[0]) ** -2
        covariance = full_covariance(images, lambda span, phi: pair_products(probabilities(span, phi)), tau)
        return gaussian_guide(self.model, self.loc.detach().clone(), covariance, *args, **kwargs)


def _is_last_layer(trace: poutine.Trace, latent: set[str]) -> bool:
    """Whether ``last_layer`` is all of a model's density under one prior precision.

    Nothing else is observed, no site is scaled or masked from outside, and every weight and bias has the same prior sd.
    """
    if latent != {"weight", "bias"} or trace.observation_nodes != ["y"]:
        return False
    told: Any = trace.nodes["y"]["infer"]
    if told.get("features") is None:
        return False
    priors: list[Any] = [trace.nodes[name]["fn"] for name in ("weight", "bias")]
    sds = torch.cat([prior.base_dist.scale.flatten() for prior in priors])
    if bool((sds != sds[0]).any()) or any(trace.nodes[name]["mask"] is not None for name in ("weight", "bias", "y")):
        return False
    weights = told["class_weights"]
    scales = {"weight": 1.0, "bias": 1.0, "y": 1.0 if weights is None else weights[trace.nodes["y"]["value"]]}
    return all(
        bool((torch.as_tensor(trace.nodes[name]["scale"]) == torch.as_tensor(scale)).all())
        for name, scale in scales.items()
    )


def gaussian_guide(
    model: Callable[..., Any], loc: Tensor, covariance: FullCovariance, *args: Any, **kwargs: Any
) -> AutoMultivariateNormal:
    """An ``AutoMultivariateNormal`` over theta = (weight row-major, bias), ready for Predictive and NeuTraReparam.

    Args:
        model: whose guide it is.
        loc: theta, (P,).
        covariance: of [weight, bias].
        args, kwargs: the model's own, used once to learn its sites.
    """
    guide = AutoMultivariateNormal(model)
    guide._setup_prototype(*args, **kwargs)
    guide._create_plates(*args, **kwargs)
    factor = theta_scale_tril(covariance)
    scale = factor.square().sum(1).sqrt()
    for name in ("loc", "scale", "scale_tril"):
        delattr(guide, name)
    guide.register_buffer("loc", loc)
    guide.register_buffer("scale", scale.to(loc))
    guide.register_buffer("scale_tril", (factor / scale[:, None]).to(loc))
    return guide


def theta_scale_tril(covariance: FullCovariance) -> Tensor:
    """The lower Cholesky factor of Cov(theta) in the order of Pyro's guide, (P, P).

    With Sigma = R R^T, R = [(Q (x) I) L^-T, 1/sqrt(K) (x) I/sqrt(tau)], the factor is the transposed triangle
    of R^T's QR.
    """
    k, width = covariance.num_classes, covariance.num_features + 1
    seen = torch.einsum("kj,mje->mke", covariance.basis, covariance.inverse_cholesky)
    shift = torch.eye(width).to(seen) / (k * covariance.prior_precision) ** 0.5
    root = torch.cat([seen, shift[:, None, :].expand(width, k, width)])
    root = torch.cat([root[..., :-1].flatten(1), root[..., -1]], dim=1)
    upper = torch.linalg.qr(root, mode="r").R
    return (upper * upper.diagonal().sign()[:, None]).T


def last_layer_guide(theta: Tensor, covariance: FullCovariance) -> AutoMultivariateNormal:
    """``gaussian_guide`` for ``last_layer`` without any training data; theta (K, D+1)."""
    k, width = theta.shape
    model = functools.partial(last_layer, num_classes=k, prior_precision=covariance.prior_precision)
    loc = torch.cat([theta[:, :-1].flatten(), theta[:, -1]])
    image, label = theta.new_zeros(1, width - 1), torch.zeros(1, dtype=torch.int64, device=theta.device)
    return gaussian_guide(model, loc, covariance, image, label)
