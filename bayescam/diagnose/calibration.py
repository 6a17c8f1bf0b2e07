"""How good predicted class probabilities are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bayescam.posterior.draws import Draws

_ELEMENTS = 1 << 24


def entropy(probs: Tensor) -> Tensor:
    """H = -sum_k p_k log p_k in nats, with 0 log 0 = 0: (..., K) -> (...)."""
    return -torch.xlogy(probs, probs).sum(-1)


def mutual_information(draws: Draws, features: Tensor) -> Tensor:
    """I(y; theta) = H(E p) - E H(p) in nats over the draws: features (N, D) -> (N,).

    The part of the predictive entropy that knowing the weights would remove (Houlsby et al. 2011, arXiv:1112.5745).
    """
    weight, bias = draws.flat()
    rows = max(1, _ELEMENTS // (len(weight) * draws.num_classes))
    parts = []
    for phi in features.to(weight).split(rows):
        probs = torch.softmax(torch.einsum("skd,nd->nsk", weight, phi) + bias, dim=-1)
        parts.append(entropy(probs.mean(1)) - entropy(probs).mean(1))
    return torch.cat(parts).clamp_min(0)


def classification_metrics(
    probs: np.ndarray | Tensor, labels: np.ndarray | Tensor, *, num_bins: int = 15
) -> dict[str, float]:
    """Accuracy, mean NLL in nats, ECE over equal-width confidence bins (lo, hi], and Brier score summed over classes.

    Args:
        probs: class probabilities (N, K).
        labels: (N,) whole numbers 0..K-1.
        num_bins: of the ECE.
    """
    probs, labels = np.asarray(probs), np.asarray(labels)
    rows = np.arange(len(labels))
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    tiny = np.finfo(probs.dtype).tiny
    one_hot = np.zeros_like(probs)
    one_hot[rows, labels] = 1
    return {
        "accuracy": float(correct.mean()),
        "nll": float(-np.log(np.maximum(probs[rows, labels], tiny)).mean()),
        "ece": float(np.abs(gaps).sum() / len(labels)),
        "brier": float(np.square(probs - one_hot).sum(1).mean()),
    }
