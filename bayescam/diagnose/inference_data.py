"""Posteriors as ArviZ reads them: xarray first, wrapped at the end, whole files or none.

``az.from_pyro`` is not used: it keeps no energy or tree depth, and can write a wrong log likelihood without a word when
there are as many draws as images.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from bayescam import __version__
from bayescam.diagnose.arviz_compat import get_dataset, group_names, make_idata
from bayescam.posterior.covariance import Covariance, DiagCovariance, FullCovariance
from bayescam.posterior.draws import Draws
from bayescam.posterior.images import check_images
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.model import log_prior, negative_log_joint
from bayescam.posterior.nuts import Nuts
from bayescam.storage import load_netcdf, netcdf_groups, save_netcdf

_ELEMENTS = 1 << 24
_MAX_PREDICTION_ELEMENTS = 30_000_000
_THETA_BATCH = 64
_MAX_COVARIANCE_SIZE = 1000


def to_inference_data(
    posterior: Laplace | Nuts | Draws,
    features: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    train: tuple[Tensor, Tensor] | None = None,
    classes: Sequence[str] | None = None,
    obs_ids: Sequence[str] | None = None,
    num_samples: int = 500,
    seed: int = 0,
    prior_precision: float | None = None,
    log_likelihood: Literal["evaluation", "train"] = "evaluation",
) -> Any:
    """A posterior as ArviZ's InferenceData (a DataTree since ArviZ 1.0).

    Groups: ``posterior`` (weight, bias, and both centred), ``log_prior``, ``prior``; for NUTS ``sample_stats`` with
    Stan's names; for a Gaussian ``fit`` (mean, sd and, up to 1,000 parameters, the covariance) and, with ``train``,
    ``sample_stats`` (lp, lp_approx); with ``features`` ``constant_data``, ``posterior_predictive``, ``predictions``
    and ``prior_predictive``; with ``labels`` ``observed_data`` and ``log_likelihood``, whose attribute "images" says
    of which images it is. ``az.loo`` and ``az.compare`` leave images out of the posterior: they need those of "train".

    Args:
        posterior: a Laplace (refined or not; sampled here, C = 1), a Nuts or Draws.
        features: phi of the images to evaluate on, (N, D).
        labels: theirs, (N,).
        train: the features and labels that the posterior was fitted to, for the log joint of a Gaussian's draws.
        classes: K names, the coordinate ``label``.
        obs_ids: N names, the coordinate ``obs_id``.
        num_samples: draws of a Gaussian.
        seed: of these, of the prior's and of the simulated labels.
        prior_precision: tau of draws that do not carry it (NUTS), for ``log_prior`` and ``prior``.
        log_likelihood: of the images of ``features``, or of those of ``train`` (dims chain, draw, train_id), float32.

    Raises:
        ValueError: labels without features, lengths that do not fit, or no ``train`` where it is asked for.
    """
    draws = _draws(posterior, num_samples, seed)
    names = _names(draws, features, labels, classes, obs_ids)
    groups = {"posterior": _weights(draws, names)}
    tau = posterior.prior_precision if isinstance(posterior, Laplace) else prior_precision
    if isinstance(posterior, Nuts):
        groups["sample_stats"] = _nuts_stats(posterior)
        if posterior.tau is not None:
            groups["posterior"]["tau"] = (("chain", "draw"), _array(posterior.tau))
    if isinstance(posterior, Laplace):
        groups["fit"] = _fit(posterior, names)
        if train is not None:
            groups["sample_stats"] = _laplace_stats(posterior, draws, train)
    if tau is not None:
        groups["log_prior"] = xr.Dataset({"theta": (("chain", "draw"), _array(log_prior(draws.theta().double(), tau)))})
        groups["prior"] = _weights(_prior_draws(draws, tau, num_samples, seed), names)
    if features is not None:
        groups |= _predictive_groups(draws, features, names, seed)
        if tau is not None:
            prior = _prior_draws(draws, tau, num_samples, seed)
            groups["prior_predictive"] = _simulated(prior, features, names, seed)
        if labels is not None:
            groups["observed_data"] = xr.Dataset(
                {"y": (("obs_id",), _array(labels))}, coords={"obs_id": names["obs_id"]}
            )
    groups |= _likelihoods(draws, features, labels, train, names, log_likelihood)
    attrs = _attributes(posterior, seed)
    return make_idata({name: dataset.assign_attrs(attrs) for name, dataset in groups.items()})


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


def log_density(laplace: Laplace, theta: Tensor) -> Tensor:
    """log q(theta) of a Gaussian posterior, constants included: theta (S, K, D+1) -> (S,).

    log q = -|z|^2 / 2 - P/2 log 2 pi + 1/2 log det Sigma^-1, with z = Sigma^-1/2 (theta - mean).
    """
    delta = theta - laplace.theta_mean
    square = _mahalanobis(laplace.covariance, delta)
    size = delta.shape[1] * delta.shape[2]
    return -0.5 * square - 0.5 * size * math.log(2 * math.pi) + 0.5 * laplace.covariance.log_det_precision()


def _mahalanobis(covariance: Covariance, delta: Tensor) -> Tensor:
    """(theta - mean)^T Sigma^-1 (theta - mean) of each (S, K, D+1) -> (S,)."""
    if isinstance(covariance, DiagCovariance):
        return (delta.square() * covariance.precision).flatten(1).sum(1)
    shift = delta.sum(1).square().sum(1) * covariance.prior_precision / covariance.num_classes
    if isinstance(covariance, FullCovariance):
        contrasts = torch.einsum("kj,ske->sje", covariance.basis, delta).flatten(1)
        return (contrasts @ covariance.precision_cholesky).square().sum(1) + shift
    rotated = torch.einsum("kj,ske,ef->sjf", covariance.class_vectors, delta, covariance.feature_vectors)
    return (rotated.square() * covariance.eigenvalues).flatten(1).sum(1) + shift


def _draws(posterior: Laplace | Nuts | Draws, num_samples: int, seed: int) -> Draws:
    if isinstance(posterior, Laplace):
        return posterior.sample(num_samples, seed=seed)
    return posterior.draws if isinstance(posterior, Nuts) else posterior


def _names(
    draws: Draws,
    features: Tensor | None,
    labels: Tensor | None,
    classes: Sequence[str] | None,
    obs_ids: Sequence[str] | None,
) -> dict[str, np.ndarray]:
    k, d = draws.num_classes, draws.num_features
    if labels is not None and features is None:
        raise ValueError("labels without features: give the features of the same images")
    if features is not None and features.shape[1] != d:
        raise ValueError(f"features must be (N, {d}), got {tuple(features.shape)}")
    n = 0 if features is None else len(features)
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels has {len(labels)} entries for {n} images")
    names = {
        "label": np.array(classes if classes is not None else [str(i) for i in range(k)], dtype=object),
        "feature": np.arange(d),
        "obs_id": np.array(obs_ids if obs_ids is not None else [str(i) for i in range(n)], dtype=object),
    }
    for name, size in (("label", k), ("obs_id", n)):
        if len(names[name]) != size:
            raise ValueError(f"{'classes' if name == 'label' else 'obs_ids'} has {len(names[name])} names for {size}")
        if len(set(names[name])) != size:
            raise ValueError(f"{'classes' if name == 'label' else 'obs_ids'} has a name twice; names must differ")
    return names


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _weights(draws: Draws, names: dict[str, np.ndarray]) -> xr.Dataset:
    dims, centred = ("chain", "draw", "label", "feature"), draws.centred()
    return xr.Dataset(
        {
            "weight": (dims, _array(draws.weight)),
            "bias": (dims[:3], _array(draws.bias)),
            "weight_centred": (dims, _array(centred.weight)),
            "bias_centred": (dims[:3], _array(centred.bias)),
        },
        coords={
            "chain": np.arange(draws.num_chains),
            "draw": np.arange(draws.num_samples),
            "label": names["label"],
            "feature": names["feature"],
        },
    )


def _nuts_stats(nuts: Nuts) -> xr.Dataset:
    """The statistics under Stan's names; a chain reached the maximum where it began its last allowed doubling."""
    stats = xr.Dataset({name: (("chain", "draw"), values) for name, values in nuts.stats.items()})
    stats["reached_max_treedepth"] = stats["tree_depth"] >= nuts.settings.max_tree_depth
    return stats


def _laplace_stats(laplace: Laplace, draws: Draws, train: tuple[Tensor, Tensor]) -> xr.Dataset:
    images = check_images(train[0], train[1], num_classes=laplace.num_classes, class_weights=laplace.class_weights)
    weight, bias = draws.flat()
    theta = torch.cat([weight, bias[..., None]], dim=-1).double()
    parts = theta.split(_THETA_BATCH)
    lp = -torch.cat([negative_log_joint(part, images, laplace.prior_precision)[0] for part in parts])
    return xr.Dataset(
        {
            "lp": (("chain", "draw"), _array(lp)[None]),
            "lp_approx": (("chain", "draw"), _array(log_density(laplace, theta))[None]),
        }
    )


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


def _prior_draws(draws: Draws, tau: float, num_samples: int, seed: int) -> Draws:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, num_samples, draws.num_classes, draws.num_features + 1)
    theta = torch.randn(shape, generator=generator, dtype=torch.float64) / tau**0.5
    return Draws(theta[..., :-1], theta[..., -1])


def _logits(draws: Draws, features: Tensor) -> list[tuple[slice, Tensor]]:
    """Logits (C, S, n, K) in float64, some images at a time."""
    size = draws.num_chains * draws.num_samples * draws.num_classes
    rows = max(1, _ELEMENTS // size)
    phi = features.to(draws.weight.device, torch.float64)
    weight, bias = draws.weight.double(), draws.bias.double()
    return [
        (slice(start, start + rows), phi[start : start + rows] @ weight.mT + bias[:, :, None])
        for start in range(0, len(phi), rows)
    ]


def _predictive_groups(
    draws: Draws, features: Tensor, names: dict[str, np.ndarray], seed: int
) -> dict[str, xr.Dataset]:
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
    return {
        "predictions": predictions,
        "constant_data": constant,
        "posterior_predictive": _simulated(draws, features, names, seed),
    }


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
    train: tuple[Tensor, Tensor] | None,
    names: dict[str, np.ndarray],
    images: str,
) -> dict[str, xr.Dataset]:
    """The group ``log_likelihood`` of the images asked for, if they were given."""
    if images not in ("evaluation", "train"):
        raise ValueError(f"log_likelihood is {images!r}; take 'evaluation' or 'train'")
    if images == "train":
        if train is None:
            raise ValueError("log_likelihood='train' needs train=(features, labels) of the images fitted to")
        ids = np.array([str(i) for i in range(len(train[0]))], dtype=object)
        return {"log_likelihood": _log_likelihood(draws, *train, ids, images)}
    if features is None or labels is None:
        return {}
    return {"log_likelihood": _log_likelihood(draws, features, labels, names["obs_id"], images)}


def _log_likelihood(draws: Draws, features: Tensor, labels: Tensor, ids: np.ndarray, images: str) -> xr.Dataset:
    """log p(y_n | theta_s), float32."""
    values = np.empty((draws.num_chains, draws.num_samples, len(features)), dtype=np.float32)
    target = torch.as_tensor(labels).to(draws.weight.device, torch.long)
    for rows, logits in _logits(draws, torch.as_tensor(features)):
        index = target[rows].expand(*logits.shape[:2], -1)[..., None]
        values[:, :, rows] = _array(logits.log_softmax(-1).gather(-1, index)[..., 0])
    name = "train_id" if images == "train" else "obs_id"
    return xr.Dataset({"y": (("chain", "draw", name), values)}, coords={name: ids}, attrs={"images": images})


def _attributes(posterior: Laplace | Nuts | Draws, seed: int) -> dict[str, str | int | float]:
    """What NetCDF can hold: texts and numbers."""
    attrs: dict[str, str | int | float] = {
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "creation_library": "bayescam",
        "creation_library_version": __version__,
        "inference_library": "bayescam",
        "inference_library_version": __version__,
        "seed": seed,
    }
    if isinstance(posterior, Laplace):
        attrs |= {
            "inference_method": "refined Gaussian" if posterior.refined else f"Laplace, {posterior.structure}",
            "prior_precision": posterior.prior_precision,
            "log_evidence": posterior.log_evidence,
            "gradient_norm": posterior.gradient_norm,
            "num_train": posterior.num_train,
            "class_weighted": int(posterior.class_weights is not None),
            "notes": json.dumps(list(posterior.notes)),
        }
    elif isinstance(posterior, Nuts):
        attrs |= {
            "inference_method": posterior.settings.kernel,
            "max_tree_depth": posterior.settings.max_tree_depth,
            "class_weighted": int(posterior.class_weights is not None),
            "sampling_time": float(posterior.seconds.sum()),
            "num_divergent": posterior.num_divergent,
        }
    return attrs
