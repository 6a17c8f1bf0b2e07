"""How good predicted class probabilities are."""

from __future__ import annotations

import numpy as np


def classification_metrics(probs: np.ndarray, labels: np.ndarray, *, num_bins: int = 15) -> dict[str, float]:
    """Accuracy, mean NLL in nats, ECE over equal-width confidence bins (lo, hi], and Brier score summed over classes.

    Args:
        probs: class probabilities (N, K).
        labels: (N,) whole numbers 0..K-1.
        num_bins: of the ECE.
    """
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
