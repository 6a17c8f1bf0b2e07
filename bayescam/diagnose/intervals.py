"""Every number of how good predicted probabilities are, each with a bootstrap interval over patients.

A number that is a function of sums over images needs each patient's sums once; a resample of patients is then a row of
counts, and all resamples are one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

METRICS = {
    "accuracy": "share of images whose most probable class is right",
    "accuracy_macro": "mean over classes of the share of their images that are right",
    "nll": "mean of -log p(truth), nat",
    "brier": "mean squared distance to the truth, summed over classes",
    "brier_reliability": "part of brier from stated probabilities that are not the frequencies",
    "brier_resolution": "part that telling images apart takes off brier",
    "brier_uncertainty": "brier of the classes' shares themselves",
    "ece": "expected calibration error over bins of equal width",
    "ece_equal_mass": "the same over bins of equally many images",
    "error_surest_80": "error among the 80 % surest images",
}
# A resample has more ties than the sample, which makes these larger by about as much as chance did in the sample.
_INFLATED = ("ece", "ece_equal_mass", "brier_reliability", "brier_resolution")


@dataclass(frozen=True)
class Interval:
    """A number of the sample and the quantiles of it under resampling; ``f"{one:.3f}"`` is "0.904 [0.885, 0.923]".

    No number is printed as a negative zero.
    """

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:z{spec}} [{self.low:z{spec}}, {self.high:z{spec}}]"


def interval(values: np.ndarray, level: float = 0.9) -> Interval:
    """The first of (1 + R,) values, the sample's, and the percentile interval of the others, the resamples'."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(values[1:], [tail, 1 - tail])
    return Interval(float(values[0]), float(low), float(high))


def metrics_with_intervals(
    probs: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    level: float = 0.9,
    num_resamples: int = 1000,
    num_bins: int = 15,
    seed: int = 0,
) -> dict[str, Interval]:
    """``METRICS`` and "accuracy[k]" of each class that has images, with percentile intervals over whole patients.

    Args:
        level: of the intervals; the others as in ``resampled_metrics``.
    """
    found = resampled_metrics(probs, labels, groups, num_resamples=num_resamples, num_bins=num_bins, seed=seed)
    return {name: interval(values, level) for name, values in found.items() if np.isfinite(values[0])}


def resampled_metrics(
    probs: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    num_resamples: int = 1000,
    num_bins: int = 15,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """``METRICS`` and "accuracy[k]" of the sample and then of each resample of whole patients, (1 + R,) each.

    The same groups and seed draw the same patients, so that methods, or the same images changed, are compared pair by
    pair. Bins of equal mass and the 80 % surest are those of the sample, in every resample. A resample without an image
    of class k leaves that class out. What resampling inflates (both ECEs, Brier's reliability and resolution) is moved
    back by its mean inflation: their intervals say how far the number would move with other patients, not how far
    chance has lifted it above the truth already (Roelofs et al. 2022, arXiv:2012.08668).

    Args:
        probs: (N, K).
        labels: (N,).
        groups: (N,) names of patients; equal names stay together.
        num_resamples: R, bootstrap draws.
        num_bins: of both ECEs and of the Brier decomposition.
        seed: of the draws.
    """
    member, weights = resamples(groups, num_resamples, np.random.default_rng(seed))
    found = _evaluate(probs, labels, member, weights, num_bins)
    for name in _INFLATED:
        found[name][1:] = np.maximum(found[name][1:] - (found[name][1:].mean() - found[name][0]), 0)
    return found


def resampled_mean(values: np.ndarray, groups: np.ndarray, *, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """The mean of values (N,) over the sample and over the same resamples as ``resampled_metrics``, (1 + R,)."""
    member, weights = resamples(groups, num_resamples, np.random.default_rng(seed))
    sums, sizes = np.bincount(member, values), np.bincount(member)
    return (weights @ sums) / (weights @ sizes)


def resamples(groups: np.ndarray, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whose each image is, (N,), and how often each patient counts: once, then as drawn, (1 + R, G)."""
    names, member = np.unique(groups, return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num)
    return member, np.concatenate([np.ones((1, len(names))), drawn.astype(float)])


def _evaluate(
    probs: np.ndarray, labels: np.ndarray, member: np.ndarray, weights: np.ndarray, num_bins: int
) -> dict[str, np.ndarray]:
    """Every metric under each row of patient weights (R, G) -> (R,)."""
    n, k = probs.shape
    confidence, predicted = probs.max(1), probs.argmax(1)
    correct = (predicted == labels).astype(float)
    one_hot = np.eye(k)[labels]
    likelihood = np.maximum(probs[np.arange(n), labels], np.finfo(probs.dtype).tiny)
    order = np.argsort(-confidence, kind="stable")
    sure = np.zeros(n)
    sure[order[: max(1, round(0.8 * n))]] = 1

    def total(values: np.ndarray, bins: np.ndarray, size: int) -> np.ndarray:
        """Weighted sums of ``values`` by bin, (R, size)."""
        cells = np.bincount(member * size + bins, weights=values, minlength=weights.shape[1] * size)
        return weights @ cells.reshape(-1, size)

    def one(values: np.ndarray) -> np.ndarray:
        return total(values, np.zeros(n, dtype=int), 1)[:, 0]

    images = one(np.ones(n))
    with np.errstate(invalid="ignore"):
        by_class = total(correct, labels, k) / total(np.ones(n), labels, k)
        macro = np.nansum(by_class, 1) / np.isfinite(by_class).sum(1)
        found = {
            "accuracy": one(correct) / images,
            "accuracy_macro": macro,
            "nll": one(-np.log(likelihood)) / images,
            "brier": one(np.square(probs - one_hot).sum(1)) / images,
            **_brier_parts(probs, one_hot, total, images, num_bins),
            "ece": np.abs(total(correct - confidence, equal_width(confidence, num_bins), num_bins)).sum(1) / images,
            "ece_equal_mass": np.abs(total(correct - confidence, equal_mass(confidence, num_bins), num_bins)).sum(1)
            / images,
            "error_surest_80": one(sure * (1 - correct)) / one(sure),
        }
    return found | {f"accuracy[{label}]": by_class[:, label] for label in range(k)}


def _brier_parts(
    probs: np.ndarray,
    one_hot: np.ndarray,
    total: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    images: np.ndarray,
    num_bins: int,
) -> dict[str, np.ndarray]:
    """Murphy's three parts, summed over one-against-rest problems; see ``calibration.brier_decomposition``."""
    parts = {f"brier_{name}": np.zeros_like(images) for name in ("reliability", "resolution", "uncertainty")}
    for p, y in zip(probs.T, one_hot.T, strict=True):
        bins = equal_width(p, num_bins)
        count, stated, seen = (total(v, bins, num_bins) for v in (np.ones_like(p), p, y))
        share = seen.sum(1) / images
        some = np.maximum(count, 1)
        parts["brier_reliability"] += (np.square(stated - seen) / some).sum(1) / images
        parts["brier_resolution"] += (count * np.square(seen / some - share[:, None])).sum(1) / images
        parts["brier_uncertainty"] += share * (1 - share)
    return parts


def equal_width(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin (lo, hi] of each number in [0, 1], (N,)."""
    return np.clip(np.ceil(values * num_bins).astype(int) - 1, 0, num_bins - 1)


def equal_mass(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each number when bins hold (nearly) equally many, (N,)."""
    bins = np.empty(len(values), dtype=int)
    for b, part in enumerate(np.array_split(np.argsort(values, kind="stable"), num_bins)):
        bins[part] = b
    return bins
