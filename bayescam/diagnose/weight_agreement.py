"""How far apart two posteriors of the centred weights are, weight by weight, and how much of that is noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri
from torch import Tensor

from bayescam.diagnose.arviz_compat import ess
from bayescam.posterior.covariance import DiagCovariance
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import Laplace


@dataclass(frozen=True, eq=False)
class WeightAgreement:
    """A Gaussian posterior of the centred [weight, bias] against draws of it; every array (K, D+1).

    Args:
        z: (NUTS mean - Gaussian mean) / NUTS sd.         z_noise: its Monte Carlo standard error, 1/sqrt(ESS).
        sd_ratio: NUTS sd / Gaussian sd.                  sd_noise: relative Monte Carlo error of the NUTS sd.
        ks: Kolmogorov-Smirnov distance.                  ks_noise: 95 % bound under no difference, over all weights.
        wasserstein: W1 distance in Gaussian sds.         wasserstein_noise: NUTS half against half (twice the noise).
    """

    z: np.ndarray
    z_noise: np.ndarray
    sd_ratio: np.ndarray
    sd_noise: np.ndarray
    ks: np.ndarray
    ks_noise: np.ndarray
    wasserstein: np.ndarray
    wasserstein_noise: np.ndarray

    def summary(self) -> dict[str, float]:
        """Root mean squares and extremes, each beside its noise."""
        return {
            "z_rms": _rms(self.z),
            "z_rms_noise": _rms(self.z_noise),
            "z_max": float(np.abs(self.z).max()),
            "sd_ratio_median": float(np.median(self.sd_ratio)),
            "sd_ratio_min": float(self.sd_ratio.min()),
            "sd_ratio_max": float(self.sd_ratio.max()),
            "sd_ratio_noise": _rms(self.sd_noise),
            "ks_max": float(self.ks.max()),
            "ks_share_beyond_noise": float((self.ks > self.ks_noise).mean()),
            "wasserstein_median": float(np.median(self.wasserstein)),
            "wasserstein_max": float(self.wasserstein.max()),
            "wasserstein_median_noise": float(np.median(self.wasserstein_noise)),
        }

    def worst(self, num: int = 10) -> list[dict[str, float | int]]:
        """The weights with the largest KS distance, as plain numbers; feature D is the bias."""
        order = np.argsort(-self.ks, axis=None)[:num]
        rows, columns = np.unravel_index(order, self.ks.shape)
        return [
            {
                "label": int(k),
                "feature": int(d),
                "z": float(self.z[k, d]),
                "sd_ratio": float(self.sd_ratio[k, d]),
                "ks": float(self.ks[k, d]),
            }
            for k, d in zip(rows, columns, strict=True)
        ]


def centred_moments(laplace: Laplace) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of [weight, bias] minus their mean over classes, (K, D+1), in closed form."""
    mean, k = laplace.theta_mean, laplace.num_classes
    variance = laplace.covariance.diagonal()
    if isinstance(laplace.covariance, DiagCovariance):
        variance = variance * (1 - 2 / k) + variance.sum(0) / k**2
    else:
        # The shift is independent of the contrasts and adds 1 / (K tau) to every raw variance.
        variance = variance - 1 / (k * laplace.prior_precision)
    return _numpy(mean - mean.mean(0)), _numpy(variance.sqrt())


def weight_agreement(laplace: Laplace, draws: Draws) -> WeightAgreement:
    """Compare the centred weights of a Gaussian posterior with draws (C, S, K, D) of another."""
    values = _centred_values(draws)
    mean, sd = centred_moments(laplace)
    drawn_mean, drawn_sd = values.mean((0, 1)), values.std((0, 1), ddof=1)
    effective, effective_sd = ess(values, "mean"), ess(values, "sd")
    flat = np.sort(values.reshape(-1, *mean.shape), axis=0)
    first, second = (np.sort(_centred_values(half)[0], axis=0) for half in halves(draws))
    bound = np.log(2 * mean.size / 0.05) / 2
    return WeightAgreement(
        z=(drawn_mean - mean) / drawn_sd,
        z_noise=1 / np.sqrt(effective),
        sd_ratio=drawn_sd / sd,
        sd_noise=1 / np.sqrt(2 * effective_sd),
        ks=_ks(flat, mean, sd),
        ks_noise=np.sqrt(bound / effective),
        wasserstein=np.abs((flat - mean) / sd - _normal_quantiles(len(flat))).mean(0),
        wasserstein_noise=np.abs(first - second).mean(0) / sd,
    )


def halves(draws: Draws) -> tuple[Draws, Draws]:
    """Two equal halves, each as one chain: half of the chains against the other half, or of the draws of one chain."""
    if draws.num_chains > 1:
        c = draws.num_chains // 2
        parts = [(slice(None, c), slice(None)), (slice(c, 2 * c), slice(None))]
    else:
        s = draws.num_samples // 2
        parts = [(slice(None), slice(None, s)), (slice(None), slice(s, 2 * s))]
    first, second = (
        Draws(draws.weight[part].flatten(0, 1)[None], draws.bias[part].flatten(0, 1)[None]) for part in parts
    )
    return first, second


def _centred_values(draws: Draws) -> np.ndarray:
    centred = draws.centred()
    return np.concatenate([_numpy(centred.weight), _numpy(centred.bias)[..., None]], -1)


def _ks(ordered: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """sup |F_n - F| of each column against Normal(mean, sd); ``ordered`` is sorted along axis 0."""
    n = len(ordered)
    law = ndtr((ordered - mean) / sd)
    steps = np.arange(n).reshape(-1, *[1] * mean.ndim)
    return np.maximum((law - steps / n).max(0), ((steps + 1) / n - law).max(0))


def _normal_quantiles(n: int) -> np.ndarray:
    return ndtri((np.arange(n) + 0.5) / n).reshape(-1, 1, 1)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
