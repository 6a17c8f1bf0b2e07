"""Leave-one-out cross-validation without refitting, for draws from the posterior and for draws from a Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from bayescam.diagnose.arviz_compat import get_dataset, group_names, loo, psis
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
        good_k: largest shape that can be trusted with so many draws, min(1 - 1 / log10 S, 0.7).
        corrected: whether the draws' log p - log q went into the weights (draws of a Gaussian).
    """

    elpd_i: np.ndarray
    pareto_k: np.ndarray
    good_k: float
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
    def num_bad(self) -> int:
        """Images whose shape is above ``good_k``: their elpd_i, and so the sum, cannot be trusted."""
        return int((self.pareto_k > self.good_k).sum())

    @property
    def caveat(self) -> str:
        """What ``elpd`` does not say."""
        return CAVEAT

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
            ("training images", len(self.elpd_i)),
            (f"k-hat above {self.good_k:.2f}", self.num_bad),
            ("weights p / q of an approximation", "yes" if self.corrected else "not needed"),
            ("caveat", CAVEAT),
        ]
        return html_table("Leave-one-out", rows)


def leave_one_out(idata: Any) -> LeaveOneOut:
    """PSIS-LOO of the training images, corrected where the draws come from a Gaussian q and not from the posterior p.

    The importance ratios of image i are p(theta_s | y without i) / q(theta_s), up to a constant
    exp(lp_s - lp_approx_s - log p(y_i | theta_s)); then elpd_i = log sum_s w_is p(y_i | theta_s) with the smoothed,
    normalised weights (Magnusson et al. 2019, arXiv:1904.10679; Vehtari et al. 2017, arXiv:1507.04544). Draws of NUTS
    have no lp_approx, and go to ``az.loo``.

    Args:
        idata: ``to_inference_data(posterior, train=(features, labels), log_likelihood="train")``; of the plain
            likelihood, without class weights.

    Raises:
        ValueError: no log-likelihood of the training images, or a posterior with class weights.
    """
    groups = group_names(idata)
    if "log_likelihood" not in groups or get_dataset(idata, "log_likelihood").attrs.get("images") != "train":
        raise ValueError(
            "idata holds no log_likelihood of training images, and images that were never in the posterior cannot be "
            'left out of it; make it by to_inference_data(..., train=(features, labels), log_likelihood="train")'
        )
    likelihood = get_dataset(idata, "log_likelihood")
    if likelihood.attrs.get("class_weighted"):
        raise ValueError("idata is of a posterior with class weights, which leave_one_out does not know; fit without")
    values = likelihood["y"].values.astype(float)
    values = values.reshape(-1, values.shape[-1]).T
    good_k = min(1 - 1 / np.log10(values.shape[1]), 0.7)
    if "fit" not in groups:
        return LeaveOneOut(*loo(idata), good_k, corrected=False)
    stats = get_dataset(idata, "sample_stats")
    ratios = (stats["lp"] - stats["lp_approx"]).values.ravel() - values
    log_weights, shapes = psis(ratios - ratios.max(1, keepdims=True))
    return LeaveOneOut(logsumexp(log_weights + values, axis=1), shapes, good_k, corrected=True)
