"""Leave-one-out cross-validation without refitting, for draws from the posterior and for draws from a Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import logsumexp

from bayescam.diagnose.arviz_compat import elpd_data, get_dataset, group_names, loo, psis
from bayescam.diagnose.importance import good_khat
from bayescam.notebook import html_table

CAVEAT = (
    "The frozen network was trained on these very images, and leaving one out of the last layer does not take it out "
    "of the network: elpd is too good as a statement about the network. Use it to compare posteriors of one last "
    "layer, and the test split for everything else."
)


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Expected log predictive density of each training image under the posterior given all the others.

    Args:
        elpd_i: log p(y_i | y without i) of each image, nat, (N,).
        pareto_k: shape of each image's importance weights, (N,).
        p: effective number of parameters, sum_i log p(y_i | y) - elpd_i.
        num_samples: draws, S.
        corrected: whether the draws' log p - log q went into the weights (draws of a Gaussian).
    """

    elpd_i: np.ndarray
    pareto_k: np.ndarray
    p: float
    num_samples: int
    corrected: bool

    @property
    def elpd(self) -> float:
        """sum_i elpd_i."""
        return float(self.elpd_i.sum())

    @property
    def se(self) -> float:
        """Standard error of ``elpd``: sqrt(N) times the sd of ``elpd_i``."""
        return float(np.sqrt(len(self.elpd_i) * self.elpd_i.var()))

    @property
    def good_k(self) -> float:
        """The largest shape that can be trusted with so many draws, min(1 - 1 / log10 S, 0.7)."""
        return good_khat(self.num_samples)

    @property
    def num_bad(self) -> int:
        """Images whose shape is above ``good_k``: their elpd_i, and so the sum, cannot be trusted."""
        return int((~(self.pareto_k <= self.good_k)).sum())

    @property
    def caveat(self) -> str:
        """What ``elpd`` does not say."""
        return CAVEAT

    def elpd_data(self) -> Any:
        """The same as ArviZ's ELPDData, for ``az.compare({"full": a.elpd_data(), "diag": b.elpd_data()})``.

        Handed the InferenceData of a Gaussian, ``az.compare`` and ``az.loo`` take its draws for draws from the
        posterior; this has log p - log q in its weights.
        """
        return elpd_data(self.elpd_i, self.pareto_k, p=self.p, num_samples=self.num_samples, good_k=self.good_k)

    def __repr__(self) -> str:
        kind = "with the weights p / q of an approximation" if self.corrected else "of draws from the posterior"
        return (
            f"LeaveOneOut(elpd {self.elpd:.2f}, se {self.se:.2f}, {len(self.elpd_i)} training images, "
            f"{self.num_bad} with k-hat above {self.good_k:.2f}; {kind}. {CAVEAT})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("elpd, nat", f"{self.elpd:.2f}"),
            ("standard error", f"{self.se:.2f}"),
            ("effective number of parameters", f"{self.p:.1f}"),
            ("training images", len(self.elpd_i)),
            (f"k-hat above {self.good_k:.2f}", self.num_bad),
            ("weights p / q of an approximation", "yes" if self.corrected else "not needed"),
            ("caveat", CAVEAT),
        ]
        return html_table("Leave-one-out", rows)


def leave_one_out(idata: Any) -> LeaveOneOut:
    """PSIS-LOO of the training images, corrected where the draws come from a Gaussian q and not from the posterior p.

    The importance ratios of image i are p(theta_s | y without i) / q(theta_s), up to a constant
    exp(log_weight_s - log p(y_i | theta_s)), where log_weight is lp - lp_approx without what it says of the shift
    common to all classes, which no likelihood sees; then elpd_i = log sum_s w_is p(y_i | theta_s) with the smoothed,
    normalised weights (Magnusson et al. 2019, arXiv:1904.10679; Vehtari et al. 2017, arXiv:1507.04544). Only draws
    that come with the statistics of NUTS go to ``az.loo`` as they are.

    Args:
        idata: ``to_inference_data(posterior, train=(features, labels), log_likelihood="train")`` of a Laplace (refined
            or not) or a Nuts; of the plain likelihood, without class weights.

    Raises:
        TypeError: something else than InferenceData.
        ValueError: no log-likelihood of the training images, draws of unknown origin, a posterior with class weights,
            or a single draw.
    """
    groups = group_names(idata)
    if "log_likelihood" not in groups or get_dataset(idata, "log_likelihood").attrs.get("images") != "train":
        raise ValueError(
            "idata holds no log_likelihood of training images, and images that were never in the posterior cannot be "
            'left out of it; make it by to_inference_data(..., train=(features, labels), log_likelihood="train")'
        )
    likelihood = get_dataset(idata, "log_likelihood")
    stats = get_dataset(idata, "sample_stats") if "sample_stats" in groups else xr.Dataset()
    _check(likelihood, stats)
    values = likelihood["y"].values.astype(float)
    values = values.reshape(-1, values.shape[-1]).T
    if "energy" in stats:
        elpd_i, shapes = loo(idata)
        predictive = logsumexp(values, axis=1) - np.log(values.shape[1])
    else:
        ratios = stats["log_weight"].values.ravel()
        log_weights, shapes = psis((ratios - values) - (ratios - values).max(1, keepdims=True))
        elpd_i = logsumexp(log_weights + values, axis=1)
        predictive = logsumexp(psis(ratios - ratios.max())[0] + values, axis=1)
    return LeaveOneOut(
        elpd_i, shapes, float((predictive - elpd_i).sum()), values.shape[1], corrected="energy" not in stats
    )


def _check(likelihood: xr.Dataset, stats: xr.Dataset) -> None:
    if likelihood.attrs.get("class_weighted"):
        raise ValueError("idata is of a posterior with class weights, which leave_one_out does not know; fit without")
    if "energy" not in stats and "log_weight" not in stats:
        raise ValueError(
            "idata does not say where its draws come from: neither the statistics of NUTS nor the log_weight of a "
            "Gaussian are in its sample_stats; give to_inference_data the Nuts or the Laplace itself, not its draws"
        )
    draws, images = likelihood.sizes["chain"] * likelihood.sizes["draw"], likelihood.sizes["train_id"]
    if draws < 2:
        raise ValueError(f"idata holds {draws} draw, which leaves no tail to smooth; give num_samples, say 1000")
    fitted = likelihood.attrs.get("num_train", images)
    if fitted != images:
        raise ValueError(f"idata leaves {images} images out of a posterior of {fitted}; give train those, all of them")
