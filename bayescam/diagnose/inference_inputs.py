"""What ``to_inference_data`` is given, checked: the posterior, its prior, images, names, seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayescam.posterior.draws import Draws
from bayescam.posterior.images import TrainingImages, check_images, check_rows
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.model import negative_log_joint
from bayescam.posterior.nuts import DEFAULT_TAU_PRIOR, Nuts

_STREAMS = ("prior", "prior_predictive", "posterior_predictive")
_SAME_LOG_JOINT = 1e-3


@dataclass(frozen=True)
class Prior:
    """tau of a posterior: fixed, or sampled with the weights from Gamma(shape, rate); neither where it is not known."""

    precision: float | None
    gamma: tuple[float, float] | None

    @property
    def known(self) -> bool:
        return self.precision is not None or self.gamma is not None

    def draw(self, num_samples: int, num_classes: int, num_features: int, seed: int) -> tuple[Draws, Tensor | None]:
        """Weights and biases from the prior, and the tau (1, S) of each draw where it is sampled."""
        shape = (1, num_samples, num_classes, num_features + 1)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if self.gamma is None:
            assert self.precision is not None
            theta = noise / math.sqrt(self.precision)
            return Draws(theta[..., :-1], theta[..., -1]), None
        alpha, rate = self.gamma
        tau = torch.from_numpy(np.random.default_rng(seed).gamma(alpha, 1 / rate, (1, num_samples)))
        theta = noise / tau[..., None, None].sqrt()
        return Draws(theta[..., :-1], theta[..., -1]), tau


def check_posterior(posterior: Any) -> None:
    """Raises TypeError for what is no posterior."""
    if not isinstance(posterior, Laplace | Nuts | Draws):
        raise TypeError(
            f"posterior must be a Laplace, a Nuts or Draws, got {type(posterior).__name__}; give what fit_laplace, "
            "refine or sample_nuts returned"
        )


def check_prior(posterior: Laplace | Nuts | Draws, prior_precision: Any, tau_prior: Any) -> Prior:
    """The prior of ``posterior``: its own, or what was said of draws that do not carry it."""
    told = None if prior_precision is None else _positive("prior_precision", prior_precision)
    sampled = posterior if isinstance(posterior, Nuts) and posterior.tau is not None else None
    if tau_prior is not None and sampled is None:
        raise ValueError(f"tau_prior is {tau_prior!r}, but tau was not sampled with this posterior; leave it out")
    own = None if isinstance(posterior, Draws) else posterior.prior_precision
    if own is not None:
        if told is not None and not math.isclose(told, own, rel_tol=1e-6):
            raise ValueError(f"prior_precision is {told:g}, but the posterior was fitted with {own:g}; leave it out")
        return Prior(own, None)
    if sampled is not None:
        if told is not None:
            raise ValueError(
                f"prior_precision is {told:g}, but tau was sampled with the weights and differs from draw to draw; "
                "leave it out (tau_prior names the prior it had)"
            )
        gamma, known = _gamma(tau_prior), sampled.tau_prior
        if None not in (gamma, known) and gamma != known:
            raise ValueError(f"tau_prior is {tau_prior!r}, but tau was sampled under {known}; leave it out")
        return Prior(None, gamma or known)
    return Prior(told, None)


def _gamma(tau_prior: Any) -> tuple[float, float] | None:
    if tau_prior is None:
        return None
    pair = DEFAULT_TAU_PRIOR if tau_prior == "gamma" else tau_prior
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"tau_prior must be None, 'gamma' or (shape, rate), got {tau_prior!r}")
    return _positive("tau_prior's shape", pair[0]), _positive("tau_prior's rate", pair[1])


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool | str) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, that of the prior of the draws, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive and finite, as the prior of the draws was")
    return float(value)


def spawned(seed: int) -> dict[str, int]:
    """A seed of its own for everything random but the draws of the posterior, which take ``seed`` itself."""
    states = np.random.SeedSequence(seed).generate_state(len(_STREAMS), np.uint64)
    return dict(zip(_STREAMS, (int(state >> np.uint64(1)) for state in states), strict=True))


def check_pair(draws: Draws, features: Any, labels: Any) -> tuple[Tensor | None, Tensor | None]:
    """Features (N, D), float32 or float64, and labels (N,), both on the draws' device."""
    if features is None:
        if labels is not None:
            raise ValueError("labels without features: give the features of the same images")
        return None, None
    rows = _rows(draws, features)
    if len(rows) == 0:
        raise ValueError("features holds no image (N = 0); leave it out, or give at least one")
    if labels is None:
        return rows, None
    return rows, check_images(rows, labels, num_classes=draws.num_classes).labels


def _rows(draws: Draws, features: Any) -> Tensor:
    single = getattr(features, "dtype", None) in (torch.float32, np.dtype(np.float32))
    like = draws.weight.new_zeros((), dtype=torch.float32 if single else torch.float64)
    return check_rows(features, draws.num_features, like)


def check_train(posterior: Laplace | Nuts | Draws, draws: Draws, train: Any, prior: Prior) -> TrainingImages | None:
    """The training images, sums in float64; those that the posterior was fitted to, as far as that can be seen."""
    if train is None:
        return None
    if not isinstance(train, tuple | list) or len(train) != 2:
        raise TypeError(f"train must be (features, labels) of the images fitted to, got {type(train).__name__}")
    weights = None if isinstance(posterior, Draws) else posterior.class_weights
    try:
        images = check_images(_rows(draws, train[0]), train[1], num_classes=draws.num_classes, class_weights=weights)
    except (TypeError, ValueError) as error:
        raise type(error)(f"train: {error}") from error
    images = replace(images, widened=True)
    if isinstance(posterior, Laplace) and posterior.num_train != len(images.labels):
        raise ValueError(
            f"train holds {len(images.labels)} images, the posterior was fitted to {posterior.num_train}; give those"
        )
    _check_log_joint(posterior, images, prior)
    return images


def _check_log_joint(posterior: Laplace | Nuts | Draws, images: TrainingImages, prior: Prior) -> None:
    """Refuse images under which the log joint is not what the posterior recorded."""
    if isinstance(posterior, Laplace) and not posterior.refined:
        # log evidence = log joint at the mode + P/2 log 2 pi - log det / 2
        size = posterior.theta_mean.numel()
        constant = 0.5 * (size * math.log(2 * math.pi) - posterior.covariance.log_det_precision())
        theta, recorded, tau = posterior.theta_mean, posterior.log_evidence - constant, posterior.prior_precision
    elif isinstance(posterior, Nuts) and prior.precision is not None:
        theta = torch.cat([posterior.draws.weight[0, 0], posterior.draws.bias[0, 0, :, None]], 1).double()
        recorded, tau = float(posterior.stats["lp"][0, 0]), prior.precision
    else:
        return
    found = -float(negative_log_joint(theta.to(images.device), images, tau)[0])
    if not abs(found - recorded) <= _SAME_LOG_JOINT * (1 + abs(recorded)):
        also = " and the prior_precision" if isinstance(posterior, Nuts) else ""
        raise ValueError(
            f"train gives the log joint {found:.6g} where the posterior has {recorded:.6g}: these are not the images "
            f"it was fitted to; give those{also}"
        )


def check_names(
    draws: Draws, num_images: int | None, classes: Sequence[str] | None, obs_ids: Sequence[str] | None
) -> dict[Literal["label", "feature", "obs_id"], np.ndarray]:
    """The coordinates label, feature and obs_id."""
    if obs_ids is not None and num_images is None:
        raise ValueError("obs_ids without features: give the features of the images that it names")
    return {
        "label": _unique("classes", classes, draws.num_classes),
        "feature": np.arange(draws.num_features),
        "obs_id": _unique("obs_ids", obs_ids, num_images or 0),
    }


def _unique(argument: str, names: Sequence[str] | None, size: int) -> np.ndarray:
    if isinstance(names, str):
        raise TypeError(f"{argument} is the single text {names!r}; give a list of names")
    found = [str(name) for name in (range(size) if names is None else names)]
    if len(found) != size:
        raise ValueError(f"{argument} has {len(found)} names for {size}")
    if len(set(found)) != size:
        raise ValueError(f"{argument} has a name twice; names must differ")
    for at, name in enumerate(found):
        if "\0" in name or name.encode("utf-8", errors="replace").decode("utf-8") != name:
            raise ValueError(
                f"{argument}[{at}] is {name!r}, which no NetCDF file can hold; give it without NULs and lone surrogates"
            )
    return np.array(found, dtype=object)
