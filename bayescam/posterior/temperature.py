"""Temperature scaling: the one-number recalibration that every Bayesian method is asked to beat (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from bayescam.posterior.images import as_labels, as_tensor

TEMPERATURES = (0.01, 100.0)


def fit_temperature(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray | Sequence[int]) -> float:
    """The T that minimises the mean of -log softmax(logits / T)[label], sought within ``TEMPERATURES`` = (.01, 100).

    The loss is convex in b = 1/T, so the root of its derivative, the mean of sum_k softmax(b f)_k (f_k - f_label), is
    the only minimum. Where the loss still falls at an end, or has no minimum at all, T is that end exactly: .01 where
    the largest logit is right on every image, 100 where the logits mislead; ``bound_hit`` asks for that.
    Logits that are equal on every image fit any T, and T is 1.

    Use logits of images that the network was not trained on, never the test set.

    Args:
        logits: f, (N, K).
        labels: (N,) whole numbers in 0..K-1.

    Raises:
        TypeError: other than real numbers.
        ValueError: shapes, labels or values that cannot be used, or K = 1.

    Source: Guo et al. (2017), arXiv:1706.04599.
    """
    scores = as_tensor(logits, "logits", "give (N, K) floating-point numbers").double().cpu()
    target = as_labels(labels).cpu()
    if scores.dim() != 2 or target.shape != scores.shape[:1] or not len(target):
        raise ValueError(f"logits must be (N, K) and labels (N,), got {tuple(scores.shape)} and {tuple(target.shape)}")
    if scores.shape[1] < 2:
        raise ValueError("logits must be (N, K) with K >= 2, got K = 1; one class has no temperature")
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(f"logits[{row}, {column}] is {float(scores[row, column])}, NaN or infinite; drop that image")
    if int(target.min()) < 0 or int(target.max()) >= scores.shape[1]:
        raise ValueError(
            f"labels run from {int(target.min())} to {int(target.max())}, outside 0..{scores.shape[1] - 1}; number the "
            "classes as the columns of logits"
        )
    ahead = scores - scores.gather(1, target[:, None])

    def slope(inverse: float) -> float:
        return float(((inverse * ahead).softmax(1) * ahead).sum(1).mean())

    least, most = TEMPERATURES
    hot, cold = slope(1 / most), slope(1 / least)
    if hot == 0.0 == cold:
        return 1.0
    if hot >= 0.0:
        return most
    return least if cold <= 0.0 else 1 / float(brentq(slope, 1 / most, 1 / least, xtol=1e-12, rtol=1e-12))


def bound_hit(temperature: float) -> str | None:
    """ "lower" or "upper" where a fitted temperature is an end of ``TEMPERATURES``, at which the loss still falls."""
    return dict(zip(TEMPERATURES, ("lower", "upper"), strict=True)).get(temperature)
