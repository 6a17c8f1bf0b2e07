"""Temperature scaling: the one-number recalibration that every Bayesian method is asked to beat (Guo et al. 2017)."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

TEMPERATURES = (0.01, 100.0)


def fit_temperature(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """The T > 0 that minimises the mean of -log softmax(logits / T)[label], sought within 0.01..100.

    The loss is convex in 1/T, so the minimum is the only one. Use logits of images that the network was not
    trained on, never the test set.

    Args:
        logits: (N, K).
        labels: (N,) whole numbers in 0..K-1.

    Raises:
        ValueError: shapes, labels or values that cannot be used.
    """
    scores, target = torch.as_tensor(logits).detach().double().cpu(), torch.as_tensor(labels).long().cpu()
    if scores.dim() != 2 or target.shape != scores.shape[:1] or not len(target):
        raise ValueError(f"logits must be (N, K) and labels (N,), got {tuple(scores.shape)} and {tuple(target.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("logits hold NaN or infinite numbers; drop those images")
    if int(target.min()) < 0 or int(target.max()) >= scores.shape[1]:
        raise ValueError(
            f"labels run from {int(target.min())} to {int(target.max())}, outside 0..{scores.shape[1] - 1}"
        )

    def loss(log_inverse: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores * math.exp(log_inverse), target))

    bounds = (-math.log(TEMPERATURES[1]), -math.log(TEMPERATURES[0]))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(-found.x)
