"""How good predicted class probabilities are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from bayescam.posterior.draws import Draws

_ELEMENTS = 1 << 24


def entropy(probs: Tensor) -> Tensor:
    """H = -sum_k p_k log p_k in nats, with 0 log 0 = 0: (..., K) -> (...)."""
    return torch.special.entr(probs).sum(-1)


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
    probs, labels = (
        value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value) for value in (probs, labels)
    )
    rows = np.arange(len(labels))
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    tiny = np.finfo(probs.dtype).tiny
    one_hot = np.zeros_like(probs)
    one_hot[rows, labels] = 1
    return {
        "accuracy": float(correct.mean()),
        "nll": float(np.abs(np.log(np.maximum(probs[rows, labels], tiny))).mean()),
        "ece": float(np.abs(gaps).sum() / len(labels)),
        "brier": float(np.square(probs - one_hot).sum(1).mean()),
    }


@dataclass(frozen=True)
class Reliability:
    """Stated confidence against the share that is right, bin by bin.

    Args:
        confidence, accuracy: mean of each bin, (B,); nan where it is empty.
        count: images in it, (B,).
        ece: sum_b count_b / N |accuracy_b - confidence_b|.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    ece: float


def reliability(probs: np.ndarray, labels: np.ndarray, *, num_bins: int = 15) -> Reliability:
    """Reliability over equal-width confidence bins (lo, hi] (Guo et al. 2017, arXiv:1706.04599).

    Args:
        probs: (N, K).
        labels: (N,).
        num_bins: B.
    """
    confidence, bins = _confidence_bins(probs, num_bins)
    correct = probs.argmax(1) == labels
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        stated = np.bincount(bins, weights=confidence, minlength=num_bins) / count
        right = np.bincount(bins, weights=correct, minlength=num_bins) / count
    gaps = np.where(count > 0, np.abs(right - stated), 0)
    return Reliability(stated, right, count, float((count * gaps).sum() / len(labels)))


def consistency_band(
    probs: np.ndarray, *, num_bins: int = 15, level: float = 0.95, num_resamples: int = 500, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Where a bin's share correct would lie if the stated probabilities were true: (low, high), (B,) each.

    Correctness is redrawn as Bernoulli(confidence) (Broecker and Smith 2007, Weather and Forecasting 22).
    """
    confidence, bins = _confidence_bins(probs, num_bins)
    rng = np.random.default_rng(seed)
    member = np.zeros((len(bins), num_bins))
    member[np.arange(len(bins)), bins] = 1
    with np.errstate(invalid="ignore"):
        shares = (rng.random((num_resamples, len(bins))) < confidence) @ member / member.sum(0)
    tail = (1 - level) / 2
    low, high = np.full((2, num_bins), np.nan)
    filled = member.sum(0) > 0
    low[filled], high[filled] = np.quantile(shares[:, filled], [tail, 1 - tail], axis=0)
    return low, high


def risk_coverage(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Error among the n surest images against n / N, for n = 1..N (El-Yaniv and Wiener 2010, JMLR 11)."""
    order = np.argsort(-probs.max(1), kind="stable")
    wrong = (probs.argmax(1) != labels)[order]
    n = np.arange(1, len(labels) + 1)
    return n / len(labels), np.cumsum(wrong) / n


def _confidence_bins(probs: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = probs.max(1)
    return confidence, np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)


def per_class(probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Recall and precision of each class, (K,); nan where a class has no image or is never predicted."""
    k = probs.shape[1]
    predicted = probs.argmax(1)
    hits = np.bincount(labels[predicted == labels], minlength=k).astype(float)
    with np.errstate(invalid="ignore"):
        return {
            "recall": hits / np.bincount(labels, minlength=k),
            "precision": hits / np.bincount(predicted, minlength=k),
        }


def brier_decomposition(probs: np.ndarray, labels: np.ndarray, *, num_bins: int = 15) -> dict[str, float]:
    """Brier score = reliability - resolution + uncertainty + remainder, summed over one-against-rest problems.

    With o_b the share of class k among the images whose p_k falls into bin b and o its share in all:
    reliability = sum_b n_b/N (mean p - o_b)^2, resolution = sum_b n_b/N (o_b - o)^2, uncertainty = o (1 - o); the
    remainder is what the spread of p within bins adds (Murphy 1973; Stephenson, Coelho and Jolliffe 2008).
    """
    total = dict.fromkeys(("reliability", "resolution", "uncertainty"), 0.0)
    score = 0.0
    for k in range(probs.shape[1]):
        p, y = probs[:, k], (labels == k).astype(float)
        bins = np.clip(np.ceil(p * num_bins).astype(int) - 1, 0, num_bins - 1)
        count = np.bincount(bins, minlength=num_bins)
        share = np.maximum(count, 1)
        stated, seen = np.bincount(bins, p, num_bins) / share, np.bincount(bins, y, num_bins) / share
        total["reliability"] += float((count * np.square(stated - seen)).sum() / len(p))
        total["resolution"] += float((count * np.square(seen - y.mean())).sum() / len(p))
        total["uncertainty"] += float(y.mean() * (1 - y.mean()))
        score += float(np.square(p - y).mean())
    remainder = score - total["reliability"] + total["resolution"] - total["uncertainty"]
    return {**total, "remainder": remainder, "brier": score}


def equal_mass_ece(probs: np.ndarray, labels: np.ndarray, *, num_bins: int = 15) -> float:
    """ECE over bins of (nearly) equally many images, ordered by confidence (Nguyen and O'Connor 2015)."""
    confidence, correct = probs.max(1), (probs.argmax(1) == labels).astype(float)
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(num_bins, len(labels)))
    return float(sum(abs(correct[part].sum() - confidence[part].sum()) for part in parts) / len(labels))


def ood_scores(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """How well an uncertainty tells unknown images from known ones.

    AUROC = P(outside > inside) + P(equal) / 2; FPR95 = the share of inside images flagged at the threshold that flags
    95 % of the outside ones (Hendrycks and Gimpel 2017).

    Args:
        inside: uncertainty of images like the training images, (N,).
        outside: of others, (M,).
    """
    ranks = rankdata(np.concatenate([inside, outside]))[len(inside) :]
    auroc = (ranks.sum() - len(outside) * (len(outside) + 1) / 2) / (len(inside) * len(outside))
    threshold = np.quantile(outside, 0.05, method="lower")
    return {"auroc": float(auroc), "fpr95": float((inside >= threshold).mean())}
