"""Posteriors as ArviZ reads them: xarray first, wrapped at the end, whole files or none.

``az.from_pyro`` is not used: it keeps no energy or tree depth, and can write a wrong log likelihood without a word when
there are as many draws as images.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayescam import __version__
from bayescam.diagnose.arviz_compat import get_dataset, group_names, make_idata
from bayescam.diagnose.density import log_density, log_weight
from bayescam.diagnose.inference_inputs import (
    Prior,
    check_names,
    check_pair,
    check_posterior,
    check_prior,
    check_train,
    spawned,
)
from bayescam.posterior.covariance import Covariance
from bayescam.posterior.draws import Draws
from bayescam.posterior.images import TrainingImages, whole_number
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.model import log_prior, negative_log_joint
from bayescam.posterior.nuts import Nuts
from bayescam.storage import load_netcdf, netcdf_groups, save_netcdf

_ELEMENTS = 1 << 22
_MAX_PREDICTION_ELEMENTS = 30_000_000
_THETA_BATCH = 64
_MAX_COVARIANCE_SIZE = 1000


def to_inference_data(
    posterior: Laplace | Nuts | Draws,
    features: Tensor | np.ndarray | None = None,
    labels: Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    train: tuple[Tensor | np.ndarray, Tensor | np.ndarray | Sequence[int]] | None = None,
    classes: Sequence[str] | None = None,
    obs_ids: Sequence[str] | None = None,
    num_samples: int = 500,
    seed: int = 0,
    prior_precision: float | None = None,
    tau_prior: tuple[float, float] | Literal["gamma"] | None = None,
    log_likelihood: Literal["evaluation", "train"] = "evaluation",
) -> Any:
    """A posterior as ArviZ's InferenceData (a DataTree since ArviZ 1.0).

    Groups: ``posterior`` (weight, bias, both centred, and tau where it was sampled), ``log_prior``, ``prior``; for NUTS
    ``sample_stats`` with Stan's names; for a Gaussian ``fit`` (mean, sd and, up to 1,000 parameters, the covariance)
    and, with ``train``, ``sample_stats`` (lp, lp_approx, log_weight); with ``features`` ``constant_data``,
    ``posterior_predictive``, ``predictions`` and ``prior_predictive``; with ``labels`` ``observed_data`` and
    ``log_likelihood``, whose attribute "images" says of which images it is. ``az.loo`` and ``az.compare`` leave images
    out of the posterior: they need those of "train", and ``leave_one_out`` for the draws of a Gaussian.

    Where tau was sampled, ``log_prior`` holds log p(weights | tau) of each draw's own tau and, where the prior of
    tau is known, log p(tau); ``prior`` and ``prior_predictive`` need it.

    Args:
        posterior: a Laplace (refined or not; sampled here, C = 1), a Nuts or Draws.
        features: phi of the images to evaluate on, (N, D).
        labels: theirs, (N,).
        train: the features and labels that the posterior was fitted to, for the log joint of a Gaussian's draws.
        classes: K names, the coordinate ``label``.
        obs_ids: N names, the coordinate ``obs_id``.
        num_samples: draws of a Gaussian, and of the prior.
        seed: of a Gaussian's draws; the prior's and the simulated labels take seeds derived from it.
        prior_precision: tau of draws that do not carry it, for ``log_prior`` and ``prior``.
        tau_prior: likewise (shape, rate) of tau's Gamma prior, or "gamma" for that of ``sample_nuts``.
        log_likelihood: of the images of ``features``, or of those of ``train`` (dims chain, draw, train_id), float32.

    Raises:
        TypeError, ValueError: an argument of a type, shape or value that cannot be meant; ``train`` of other images
            than those the posterior was fitted to; or no ``train`` where it is asked for. The message names it.
    """
    check_posterior(posterior)
    num_samples = whole_number(num_samples, "num_samples", 1)
    seed = whole_number(seed, "seed", 0)
    prior, seeds = check_prior(posterior, prior_precision, tau_prior), spawned(seed)
    draws = _draws(posterior, num_samples, seed)
    phi, truth = check_pair(draws, features, labels)
    fitted_to = check_train(posterior, draws, train, prior)
    names: Any = check_names(draws, None if phi is None else len(phi), classes, obs_ids)
    groups = {"posterior": _weights(draws, names)}
    if isinstance(posterior, Nuts):
        groups["sample_stats"] = _nuts_stats(posterior)
        if posterior.tau is not None:
            groups["posterior"]["tau"] = (("chain", "draw"), _array(posterior.tau))
    if isinstance(posterior, Laplace):
        groups["fit"] = _fit(posterior, names)
        if fitted_to is not None:
            groups["sample_stats"] = _laplace_stats(posterior, draws, fitted_to)
    groups |= _log_prior(posterior, draws, prior)
    if phi is not None:
        groups |= _predictive_groups(draws, phi, names)
        groups["posterior_predictive"] = _simulated(draws, phi, names, seeds["posterior_predictive"])
        if truth is not None:
            observed = xr.Dataset({"y": (("obs_id",), _array(truth))}, coords={"obs_id": names["obs_id"]})
            groups["observed_data"] = observed
    if prior.known:
        own, tau = prior.draw(num_samples, draws.num_classes, draws.num_features, seeds["prior"])
        groups["prior"] = _weights(own, names)
        if tau is not None:
            groups["prior"]["tau"] = (("chain", "draw"), _array(tau))
        if phi is not None:
            groups["prior_predictive"] = _simulated(own, phi.cpu(), names, seeds["prior_predictive"])
    groups |= _likelihoods(draws, phi, truth, fitted_to, names, log_likelihood)
    attrs = _attributes(posterior, seed, prior, fitted_to)
    return make_idata({name: _numbered(dataset).assign_attrs(attrs) for name, dataset in groups.items()})


def save(idata: Any, path: Path) -> Path:
    """Write InferenceData (or a DataTree) as NetCDF through h5netcdf, atomically."""
    save_netcdf(Path(path), {name: get_dataset(idata, name) for name in sorted(group_names(idata))})
    return Path(path)


def load(path: Path) -> Any:
    """Read what ``save`` wrote, into memory, with the file closed.

    Raises:
        FileFormatError: absent or broken.
    """
    return make_idata({name: load_netcdf(Path(path), name) for name in netcdf_groups(Path(path))})


def save_dataset(dataset: xr.Dataset, path: Path) -> Path:
    """Write one Dataset as NetCDF through h5netcdf, atomically."""
    save_netcdf(Path(path), {None: dataset})
    return Path(path)


def _draws(posterior: Laplace | Nuts | Draws, num_samples: int, seed: int) -> Draws:
    if isinstance(posterior, Laplace):
        return posterior.sample(num_samples, seed=seed)
    return posterior.draws if isinstance(posterior, Nuts) else posterior


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _numbered(dataset: xr.Dataset) -> xr.Dataset:
    """The same with coordinates 0, 1, ... along chain and draw."""
    return dataset.assign_coords(
        {dim: np.arange(dataset.sizes[dim]) for dim in ("chain", "draw") if dim in dataset.sizes}
    )


def _weights(draws: Draws, names: dict[str, np.ndarray]) -> xr.Dataset:
    dims, centred = ("chain", "draw", "label", "feature"), draws.centred()
    return xr.Dataset(
        {
            "weight": (dims, _array(draws.weight)),
            "bias": (dims[:3], _array(draws.bias)),
            "weight_centred": (dims, _array(centred.weight)),
            "bias_centred": (dims[:3], _array(centred.bias)),
        },
        coords={"label": names["label"], "feature": names["feature"]},
    )


def _nuts_stats(nuts: Nuts) -> xr.Dataset:
    """The statistics under Stan's names; a chain reached the maximum where it began its last allowed doubling."""
    stats = xr.Dataset({name: (("chain", "draw"), values) for name, values in nuts.stats.items()})
    stats["reached_max_treedepth"] = stats["tree_depth"] >= nuts.settings.max_tree_depth
    return stats


def _laplace_stats(laplace: Laplace, draws: Draws, images: TrainingImages) -> xr.Dataset:
    weight, bias = draws.flat()
    theta = torch.cat([weight, bias[..., None]], dim=-1).double()
    parts = theta.to(images.device).split(_THETA_BATCH)
    lp = -torch.cat([negative_log_joint(part, images, laplace.prior_precision)[0] for part in parts]).to(theta)
    found = {"lp": lp, "lp_approx": log_density(laplace, theta), "log_weight": log_weight(laplace, theta, lp)}
    return xr.Dataset({name: (("chain", "draw"), _array(values)[None]) for name, values in found.items()})


def _log_prior(posterior: Laplace | Nuts | Draws, draws: Draws, prior: Prior) -> dict[str, xr.Dataset]:
    """log p(theta | tau) of each draw, and log p(tau) where tau was sampled from a prior that is known."""
    dims, theta = ("chain", "draw"), draws.theta().double()
    if prior.precision is not None:
        return {"log_prior": xr.Dataset({"theta": (dims, _array(log_prior(theta, prior.precision)))})}
    if not isinstance(posterior, Nuts) or posterior.tau is None:
        return {}
    tau = posterior.tau.double().to(theta)
    unit = log_prior(theta * tau.sqrt()[..., None], 1.0) + 0.5 * theta.shape[-1] * tau.log()
    found = xr.Dataset({"theta": (dims, _array(unit))})
    if prior.gamma is not None:
        shape, rate = prior.gamma
        constant = shape * math.log(rate) - math.lgamma(shape)
        found["tau"] = (dims, _array(constant + (shape - 1) * tau.log() - rate * tau))
    return {"log_prior": found}


def _fit(laplace: Laplace, names: dict[str, np.ndarray]) -> xr.Dataset:
    mean = laplace.theta_mean
    fit = xr.Dataset(
        {
            "weight_mean": (("label", "feature"), _array(laplace.weight_mean)),
            "bias_mean": (("label",), _array(laplace.bias_mean)),
            "weight_centred_mean": (("label", "feature"), _array((mean - mean.mean(0))[:, :-1])),
            "weight_sd": (("label", "feature"), _array(laplace.weight_sd)),
            "bias_sd": (("label",), _array(laplace.bias_sd)),
        },
        coords={"label": names["label"], "feature": names["feature"]},
    )
    if mean.numel() <= _MAX_COVARIANCE_SIZE:
        rows = [f"weight[{k},{d}]" for k in names["label"] for d in names["feature"]]
        rows += [f"bias[{k}]" for k in names["label"]]
        fit = fit.assign_coords(rows=rows, columns=rows)
        fit["covariance"] = (("rows", "columns"), _array(_dense(laplace.covariance)))
    return fit


def _dense(covariance: Covariance) -> Tensor:
    """Sigma (P, P) in theta's order: weights row-major, then biases."""
    k, width = covariance.num_classes, covariance.num_features + 1
    like = covariance.diagonal()
    one, eye = torch.eye(k).to(like), torch.eye(width).to(like)
    blocks = [[covariance.bilinear(one[a], one[b], eye, eye) for b in range(k)] for a in range(k)]
    dense = torch.cat([torch.cat(row, 1) for row in blocks])
    index = torch.arange(k * width).reshape(k, width)
    order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
    return dense[order][:, order]


def _logits(draws: Draws, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits (C, S, n, K) in float64, a few images at a time: at most ``_ELEMENTS`` numbers are held at once."""
    rows = max(1, _ELEMENTS // (draws.num_chains * draws.num_samples * draws.num_classes))
    weight, bias = draws.weight.double(), draws.bias.double()
    for start in range(0, len(features), rows):
        span = slice(start, start + rows)
        yield span, features[span].to(weight) @ weight.mT + bias[:, :, None]


def _predictive_groups(draws: Draws, features: Tensor, names: dict[str, np.ndarray]) -> dict[str, xr.Dataset]:
    c, s, k, n = draws.num_chains, draws.num_samples, draws.num_classes, len(features)
    dims = ("chain", "draw", "obs_id", "label")
    coords = {"obs_id": names["obs_id"], "label": names["label"]}
    mean, square = np.zeros((n, k)), np.zeros((n, k))
    keep = c * s * n * k <= _MAX_PREDICTION_ELEMENTS
    probs = np.empty((c, s, n, k), dtype=np.float32) if keep else None
    for rows, logits in _logits(draws, features):
        p = _array(logits.softmax(-1))
        mean[rows], square[rows] = p.mean((0, 1)), np.square(p).mean((0, 1))
        if probs is not None:
            probs[:, :, rows] = p
    sd = np.sqrt(np.maximum(square - np.square(mean), 0))
    predictions = xr.Dataset({"mean": (dims[2:], mean), "sd": (dims[2:], sd)}, coords=coords)
    if probs is not None:
        predictions["probs"] = (dims, probs)
    constant = xr.Dataset(
        {"features": (("obs_id", "feature"), _array(features))},
        coords={"obs_id": names["obs_id"], "feature": names["feature"]},
    )
    return {"predictions": predictions, "constant_data": constant}


def _simulated(draws: Draws, features: Tensor, names: dict[str, np.ndarray], seed: int) -> xr.Dataset:
    """One label an image and draw, by the Gumbel-max trick."""
    generator = torch.Generator(draws.weight.device).manual_seed(seed)
    y = np.empty((draws.num_chains, draws.num_samples, len(features)), dtype=np.int16)
    for rows, logits in _logits(draws, features):
        uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        y[:, :, rows] = _array((logits - (-uniform.clamp_min(1e-300).log()).log()).argmax(-1))
    return xr.Dataset({"y": (("chain", "draw", "obs_id"), y)}, coords={"obs_id": names["obs_id"]})


def _likelihoods(
    draws: Draws,
    features: Tensor | None,
    labels: Tensor | None,
    train: TrainingImages | None,
    names: dict[str, np.ndarray],
    images: str,
) -> dict[str, xr.Dataset]:
    """The group ``log_likelihood`` of the images asked for, if they were given."""
    if images not in ("evaluation", "train"):
        raise ValueError(f"log_likelihood is {images!r}; take 'evaluation' or 'train'")
    if images == "train":
        if train is None:
            raise ValueError("log_likelihood='train' needs train=(features, labels) of the images fitted to")
        ids = np.array([str(i) for i in range(len(train.labels))], dtype=object)
        return {"log_likelihood": _log_likelihood(draws, torch.as_tensor(train.features), train.labels, ids, images)}
    if features is None or labels is None:
        return {}
    return {"log_likelihood": _log_likelihood(draws, features, labels, names["obs_id"], images)}


def _log_likelihood(draws: Draws, features: Tensor, labels: Tensor, ids: np.ndarray, images: str) -> xr.Dataset:
    """log p(y_n | theta_s), float32."""
    values = np.empty((draws.num_chains, draws.num_samples, len(features)), dtype=np.float32)
    target = labels.to(draws.weight.device)
    for rows, logits in _logits(draws, features):
        index = target[rows].expand(*logits.shape[:2], -1)[..., None]
        values[:, :, rows] = _array(logits.log_softmax(-1).gather(-1, index)[..., 0])
    name = "train_id" if images == "train" else "obs_id"
    return xr.Dataset({"y": (("chain", "draw", name), values)}, coords={name: ids}, attrs={"images": images})


def _attributes(
    posterior: Laplace | Nuts | Draws, seed: int, prior: Prior, train: TrainingImages | None
) -> dict[str, str | int | float]:
    """What NetCDF can hold: texts and numbers."""
    attrs: dict[str, str | int | float] = {
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "creation_library": "bayescam",
        "creation_library_version": __version__,
        "inference_library": "bayescam",
        "inference_library_version": __version__,
        "seed": seed,
    }
    if prior.precision is not None:
        attrs["prior_precision"] = prior.precision
    if prior.gamma is not None:
        attrs["tau_prior"] = json.dumps(prior.gamma)
    if train is not None:
        attrs["num_train"] = len(train.labels)
    if isinstance(posterior, Laplace):
        return attrs | _laplace_attributes(posterior)
    if isinstance(posterior, Nuts):
        settings = posterior.settings
        attrs |= {
            "inference_method": settings.kernel,
            "sampling_seed": settings.seed,
            "tuning_steps": settings.num_warmup,
            "target_accept": settings.target_accept,
            "max_tree_depth": settings.max_tree_depth,
            "class_weighted": int(posterior.class_weights is not None),
            "sampling_time": float(posterior.seconds.sum()),
            "num_divergent": posterior.num_divergent,
        }
    return attrs


def _laplace_attributes(laplace: Laplace) -> dict[str, str | int | float]:
    """``log_evidence`` and ``gradient_norm`` are of the mode; a refined Gaussian has an ``elbo`` and E_q[grad U]."""
    attrs: dict[str, str | int | float] = {
        "inference_method": f"{'refined Gaussian' if laplace.refined else 'Laplace'}, {laplace.structure}",
        "structure": laplace.structure,
        "newton_decrement": laplace.newton_decrement,
        "num_train": laplace.num_train,
        "class_weighted": int(laplace.class_weights is not None),
        "notes": json.dumps(list(laplace.notes)),
    }
    if not laplace.refined:
        return attrs | {"log_evidence": laplace.log_evidence, "gradient_norm": laplace.gradient_norm}
    if laplace.elbo is not None:
        attrs["elbo"] = laplace.elbo
    return attrs | {"laplace_log_evidence": laplace.log_evidence, "mean_gradient_norm": laplace.gradient_norm}
