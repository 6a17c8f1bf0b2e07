"""How good predicted class probabilities are.

Probabilities and labels may be torch tensors or numpy arrays; what is no probability and no label is refused by
``arguments.check_forecasts``. No number depends on the order of the images: equal confidences are in no order, and
share what they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayescam.diagnose.arguments import check_bins, check_forecasts, check_probs, check_scores
from bayescam.posterior.draws import Draws

_ELEMENTS = 1 << 24
# float32's smallest normal number, whatever type the probabilities have: 87.3 nat at most.
_LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)


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

    The NLL of one image is at most 87.3 nats, ``log_loss``. The bins are those of Guo et al. 2017 (arXiv:1706.04599): a
    confidence of exactly 1 is in the last one. torchmetrics takes [lo, hi) and gives 1 a bin of its own, so that its
    ECE is another where confidences lie on an edge or at 1.

    Args:
        probs: class probabilities (N, K).
        labels: (N,) whole numbers 0..K-1.
        num_bins: of the ECE.

    Raises:
        TypeError, ValueError: see ``arguments.check_forecasts``.
    """
    probs, labels = check_forecasts(probs, labels)
    return {
        "accuracy": float((probs.argmax(1) == labels).mean()),
        "nll": float(log_loss(probs, labels).mean()),
        "ece": reliability(probs, labels, num_bins=num_bins).ece,
        "brier": float(np.square(probs - np.eye(probs.shape[1])[labels]).sum(1).mean()),
    }


def log_loss(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log p(truth) in nats, (N,), of checked probabilities (N, K) and labels (N,).

    A probability below 1.2e-38, the smallest normal number of float32, counts as that, 87.3 nats, in whatever type the
    probabilities come: so one image to which a method gave none, or one that was rounded to none, does not make every
    mean infinite, and methods computed in either type are compared alike.
    """
    truth = probs[np.arange(len(labels)), labels]
    return np.abs(np.log(np.clip(truth, _LEAST_PROBABILITY, 1)))


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


def reliability(probs: np.ndarray | Tensor, labels: np.ndarray | Tensor, *, num_bins: int = 15) -> Reliability:
    """Reliability over equal-width confidence bins (lo, hi] (Guo et al. 2017, arXiv:1706.04599).

    Args:
        probs: (N, K).
        labels: (N,).
        num_bins: B.
    """
    probs, labels = check_forecasts(probs, labels)
    confidence = probs.max(1)
    bins = equal_width(confidence, num_bins)
    correct = probs.argmax(1) == labels
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        stated = np.bincount(bins, weights=confidence, minlength=num_bins) / count
        right = np.bincount(bins, weights=correct, minlength=num_bins) / count
    gaps = np.where(count > 0, np.abs(right - stated), 0)
    return Reliability(stated, right, count, float((count * gaps).sum() / len(labels)))


def consistency_band(
    probs: np.ndarray | Tensor, *, num_bins: int = 15, level: float = 0.95, num_resamples: int = 500, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Where a bin's share correct would lie if the stated probabilities were true: (low, high), (B,) each.

    Correctness is redrawn as Bernoulli(confidence) (Broecker and Smith 2007, Weather and Forecasting 22).
    """
    confidence = check_probs(probs).max(1)
    bins = equal_width(confidence, num_bins)
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


def risk_coverage(probs: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Error among the n surest images against n / N, for n = 1..N (El-Yaniv and Wiener 2010, JMLR 11).

    Where equally sure images are only in part among the n surest, theirs is the mean error of all of them.
    """
    probs, labels = check_forecasts(probs, labels)
    wrong = probs.argmax(1) != labels
    different, place = np.unique(-probs.max(1), return_inverse=True)
    counts, errors = (np.bincount(place, values, len(different))[None] for values in (np.ones_like(wrong), wrong))
    n = np.arange(1, len(labels) + 1)
    return n / len(labels), expected_risk(counts, errors, n[None])[0]


def expected_risk(counts: np.ndarray, errors: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Error among the surest images, the mean over all orders of the equally sure: E(m) / m.

    E(m) is the number of errors among the m surest: a sum over the surer groups, and in the group that m ends in, its
    share of the group's.

    Args:
        counts: images of each confidence, the surest first, (R, U), of R samples.
        errors: how many of them are wrong, (R, U).
        kept: m, above 0 and at most the images of the sample, not needfully whole, (R, M).

    Returns:
        (R, M).
    """
    rows, size = counts.shape
    ends, known = counts.cumsum(1), errors.cumsum(1)
    row = np.arange(rows)[:, None]
    apart = 2 * row * (ends[:, -1].max() + 1)  # one search through all rows, each in a range of its own
    place = np.searchsorted((ends + apart).ravel(), (kept + apart).ravel()).reshape(kept.shape) - row * size
    place = np.minimum(place, size - 1)
    group, inside = counts[row, place], errors[row, place]
    part = (kept - (ends[row, place] - group)) / group
    return (known[row, place] - inside * (1 - part)) / kept


def equal_width(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin (lo, hi] of each number in [0, 1], (N,)."""
    check_bins(num_bins)
    return np.clip(np.ceil(values * num_bins).astype(int) - 1, 0, num_bins - 1)


def equal_mass(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each number when bins hold (nearly) equally many, (N,); equal numbers are in one bin.

    In order, the numbers are cut into bins whose sizes differ by at most one, the larger first; equal ones go where
    the middle of them would.
    """
    check_bins(num_bins)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    size, larger = divmod(len(values), num_bins)
    starts = np.concatenate([[0], np.cumsum(np.full(num_bins - 1, size) + (np.arange(num_bins - 1) < larger))])
    middle = last - 1 - counts // 2
    return (np.searchsorted(starts, middle, side="right") - 1)[place]


def per_class(probs: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> dict[str, np.ndarray]:
    """Recall and precision of each class, (K,); nan where a class has no image or is never predicted."""
    probs, labels = check_forecasts(probs, labels)
    k = probs.shape[1]
    predicted = probs.argmax(1)
    hits = np.bincount(labels[predicted == labels], minlength=k).astype(float)
    with np.errstate(invalid="ignore"):
        return {
            "recall": hits / np.bincount(labels, minlength=k),
            "precision": hits / np.bincount(predicted, minlength=k),
        }


def brier_decomposition(
    probs: np.ndarray | Tensor, labels: np.ndarray | Tensor, *, num_bins: int = 15
) -> dict[str, float]:
    """Brier score = reliability - resolution + uncertainty + remainder, summed over one-against-rest problems.

    With o_b the share of class k among the images whose p_k falls into bin b and o its share in all:
    reliability = sum_b n_b/N (mean p - o_b)^2, resolution = sum_b n_b/N (o_b - o)^2, uncertainty = o (1 - o); the
    remainder is what the spread of p within bins adds (Murphy 1973; Stephenson, Coelho and Jolliffe 2008).
    """
    probs, labels = check_forecasts(probs, labels)
    total = dict.fromkeys(("reliability", "resolution", "uncertainty"), 0.0)
    score = 0.0
    for k in range(probs.shape[1]):
        p, y = probs[:, k], (labels == k).astype(float)
        bins = equal_width(p, num_bins)
        count = np.bincount(bins, minlength=num_bins)
        share = np.maximum(count, 1)
        stated, seen = np.bincount(bins, p, num_bins) / share, np.bincount(bins, y, num_bins) / share
        total["reliability"] += float((count * np.square(stated - seen)).sum() / len(p))
        total["resolution"] += float((count * np.square(seen - y.mean())).sum() / len(p))
        total["uncertainty"] += float(y.mean() * (1 - y.mean()))
        score += float(np.square(p - y).mean())
    remainder = score - total["reliability"] + total["resolution"] - total["uncertainty"]
    return {**total, "remainder": remainder, "brier": score}


def equal_mass_ece(probs: np.ndarray | Tensor, labels: np.ndarray | Tensor, *, num_bins: int = 15) -> float:
    """ECE over bins of (nearly) equally many images, ``equal_mass`` of confidence (Nguyen and O'Connor 2015)."""
    probs, labels = check_forecasts(probs, labels)
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    gaps = np.bincount(equal_mass(confidence, num_bins), weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(labels))


def ood_scores(inside: np.ndarray | Tensor, outside: np.ndarray | Tensor) -> dict[str, float]:
    """How well an uncertainty tells unknown images from known ones: "auroc" and "fpr95", see ``told_apart``.

    Args:
        inside: uncertainty of images like the training images, (N,).
        outside: of others, (M,).

    Raises:
        TypeError, ValueError: see ``arguments.check_scores``.
    """
    inside, outside = check_scores(inside, "inside"), check_scores(outside, "outside")
    different, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    known, unknown = (
        np.bincount(part, minlength=len(different))[None] for part in (place[: len(inside)], place[len(inside) :])
    )
    auroc, fpr95 = told_apart(known, unknown)
    return {"auroc": float(auroc[0]), "fpr95": float(fpr95[0])}


def told_apart(known: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and FPR95 of scores that are larger for unknown images, of R samples: (R,) each.

    AUROC = P(unknown > known) + P(equal) / 2 = sum_u unknown(u) (known(< u) + known(u) / 2) / (N M). FPR95 = the share
    of known images that is flagged at the largest threshold that flags at least 95 % of the M unknown ones, their score
    number floor(M / 20) counted from 0 upwards: the least FPR of the ROC curve where TPR >= .95 (Hendrycks and Gimpel
    2017). Both are nan in a sample without images of one side.

    Args:
        known, unknown: images with each score, the scores ascending, (R, U).
    """
    num_known, num_unknown = known.sum(1), unknown.sum(1)
    below = known.cumsum(1) - known
    threshold = (unknown.cumsum(1) > (num_unknown // 20)[:, None]).argmax(1)
    flagged = num_known - below[np.arange(len(below)), threshold]
    with np.errstate(invalid="ignore"):
        auroc = (unknown * (below + known / 2)).sum(1) / (num_known * num_unknown)
        return auroc, np.where(num_unknown > 0, flagged / num_known, np.nan)
