"""Every number of how good predicted probabilities are, each with a bootstrap interval over patients.

A number that is a function of sums over images needs each patient's sums once; a resample of patients is then a row of
counts, and all resamples are one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.special import ndtr, stdtrit
from torch import Tensor

from bayescam.diagnose.arguments import check_bins, check_forecasts, check_groups, check_resampling, check_scores
from bayescam.diagnose.calibration import equal_mass, equal_width, expected_risk, log_loss

METRICS = {
    "accuracy": "share of images whose most probable class is right",
    "accuracy_macro": "mean over classes of the share of their images that are right",
    "nll": "mean of -log p(truth), nat",
    "brier": "mean squared distance to the truth, summed over classes",
    "brier_reliability": "part of brier from stated probabilities that are not the frequencies",
    "brier_resolution": "part that telling images apart takes off brier",
    "brier_uncertainty": "brier of the classes' shares themselves",
    "brier_remainder": "what is left of brier: reliability - resolution + uncertainty + remainder",
    "ece": "expected calibration error over bins of equal width",
    "ece_equal_mass": "the same over bins of equally many images",
    "error_surest_80": "error among the 80 % surest images",
}
# A resample has more ties than the sample, which makes these larger by about as much as chance did in the sample.
_INFLATED = ("ece", "ece_equal_mass", "brier_reliability", "brier_resolution")
_FEW, _VERY_FEW = 20, 5
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A number of the sample and the quantiles of it under resampling; ``f"{one:.3f}"`` is "0.904 [0.885, 0.923]".

    Where there is no interval (one patient) the bounds are nan, null in the files of a run, and the print is
    "0.904 [-]". No number is printed as a negative zero.
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, math.nan)

    def __format__(self, spec: str) -> str:
        if math.isnan(self.low):
            return f"{self.value:z{spec}} [-]"
        return f"{self.value:z{spec}} [{self.low:z{spec}}, {self.high:z{spec}}]"


def interval(values: np.ndarray, level: float = 0.9, *, num_groups: int | None = None) -> Interval:
    """The first of (1 + R,) values, the sample's, and the percentile interval of the others, the resamples'.

    The plain percentile interval is too narrow for few patients: resampling has the variance of G draws from G numbers,
    (G - 1) / G of the unbiased one, and knows nothing of Student's t. With ``num_groups`` = G the quantile is not
    a = (1 - level) / 2 but Phi(-sqrt(G / (G - 1)) t(1 - a; G - 1)), further out (the expanded percentile interval,
    Hesterberg 2015, doi:10.1080/00031305.2015.1089789). In a simulation of calibrated forecasts a nominal 90 % interval
    of the NLL holds the truth in 84, 89 and 91 of 100 samples of 5, 10 and 20 patients, the plain one in 76, 83 and 90
    (``test_coverage_of_the_intervals_of_few_patients``). With 2 or 3 patients it is still too narrow (45 and 73), as
    it is for a number that few of the patients carry, which no resampling of the others shows.

    Args:
        values: what ``resampled_metrics`` or ``resampled_mean`` gives, or a function of it; nan is left out.
        level: of the interval.
        num_groups: G, the patients behind the number; None takes them for so many that it does not matter.
    """
    low, high = bounds(values[1:], level, num_groups)
    return Interval(float(values[0]), float(low), float(high))


def share_interval(values: np.ndarray, level: float = 0.9, *, num_groups: int) -> Interval:
    """``interval`` of a share of images; where none or all are in it, the exact bound for patients of whom none is.

    A sample without an error has none in any resample. If a share q of all patients has one, G patients have none with
    probability (1 - q)^G, so that q, and the share of images with it, is at most 1 - a^(1/G), a = (1 - level) / 2
    (Clopper and Pearson 1934; for a 90 % interval about 3/G).
    """
    found = interval(values, level, num_groups=num_groups)
    return _unless_all_alike(found, ((1 - level) / 2) ** (1 / num_groups))


def bounds(values: np.ndarray, level: float, num_groups: int | None) -> np.ndarray:
    """The bounds of ``interval`` by the first axis of the resamples' values (R, ...): (2, ...); nan without any."""
    tail = (1 - level) / 2
    if num_groups is not None and num_groups > 1:
        tail = ndtr(-math.sqrt(num_groups / (num_groups - 1)) * stdtrit(num_groups - 1, 1 - tail))
    if num_groups == 1 or np.isnan(values).all():
        return np.full((2, *values.shape[1:]), np.nan)
    return np.nanquantile(values, [tail, 1 - tail], axis=0)


def interval_words(num_groups: int, resampled: str, level: float = 0.9, where: str = "In brackets") -> str:
    """What is to be known of a table's intervals, in sentences.

    Args:
        num_groups: of what was drawn.
        resampled: what was drawn: "patients", or "images" or "rows" where no patient is named.
        level: of the intervals.
        where: the intervals stand.
    """
    biased = "ECE is biased upwards in small samples"
    if num_groups == 1:
        return f"No number has an interval, for want of a second {resampled[:-1]}. {biased}."
    words = f"{where} the {100 * level:.0f} % bootstrap interval over {num_groups} {resampled}."
    if num_groups < _FEW:
        words += f" So few {resampled} make the intervals too narrow"
        words += "." if num_groups < _VERY_FEW else " where a few of them carry the number, as they may the NLL."
    return f"{words} {biased}; its interval says how far it would move with other {resampled}."


def metrics_with_intervals(
    probs: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    groups: np.ndarray | Tensor | Sequence[Any],
    *,
    level: float = 0.9,
    num_resamples: int = 1000,
    num_bins: int = 15,
    seed: int = 0,
) -> dict[str, Interval]:
    """``METRICS`` and "accuracy[k]" of each class that has images, with intervals over whole patients.

    Each is ``interval``, or ``share_interval`` where it is a share, for the patients behind the number: those with an
    image of class k of "accuracy[k]", those with one among the surest of "error_surest_80".

    Args:
        level: of the intervals; the others as in ``resampled_metrics``.

    Raises:
        TypeError, ValueError: see ``arguments``.
    """
    check_resampling(level, num_resamples)
    probs, labels = check_forecasts(probs, labels)
    groups = check_groups(groups, len(labels))
    values = resampled_metrics(probs, labels, groups, num_resamples=num_resamples, num_bins=num_bins, seed=seed)
    num_groups, confidence = count_groups(groups), probs.max(1)
    surest = confidence >= np.sort(confidence)[-_num_surest(len(labels))]
    behind = {"accuracy": num_groups, "error_surest_80": count_groups(groups[surest])}
    behind |= {f"accuracy[{k}]": count_groups(groups[labels == k]) for k in np.unique(labels)}
    found = {}
    for name, row in values.items():
        if name in behind:
            found[name] = share_interval(row, level, num_groups=behind[name])
        elif np.isfinite(row[0]):
            found[name] = interval(row, level, num_groups=num_groups)
    least = _least_mean_share((1 - level) / 2, labels, groups)
    return found | {"accuracy_macro": _unless_all_alike(found["accuracy_macro"], least)}


def resampled_metrics(
    probs: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    groups: np.ndarray | Tensor | Sequence[Any],
    *,
    num_resamples: int = 1000,
    num_bins: int = 15,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """``METRICS`` and "accuracy[k]" of the sample and then of each resample of whole patients, (1 + R,) each.

    The same groups and seed draw the same patients, so that methods, or the same images changed, are compared pair by
    pair. The 80 % surest are those of each resample; bins of equal mass are the sample's in every resample. A resample
    without an image of class k leaves that class out. What resampling inflates (both ECEs, Brier's reliability and
    resolution) is moved back by its mean inflation: their intervals say how far the number would move with other
    patients, not how far chance has lifted it above the truth already (Roelofs et al. 2022, arXiv:2012.08668). Of one
    patient there is no resample: nan.

    Args:
        probs: (N, K).
        labels: (N,).
        groups: (N,) names of patients; equal names stay together.
        num_resamples: R, bootstrap draws.
        num_bins: of both ECEs and of the Brier decomposition.
        seed: of the draws.

    Raises:
        TypeError, ValueError: see ``arguments``.
    """
    probs, labels = check_forecasts(probs, labels)
    check_bins(num_bins)
    member, weights = resamples(check_groups(groups, len(labels)), num_resamples, np.random.default_rng(seed))
    found = _evaluate(probs, labels, member, weights, num_bins)
    for name in _INFLATED:
        found[name][1:] = np.maximum(found[name][1:] - (found[name][1:].mean() - found[name][0]), 0)
    if weights.shape[1] == 1:
        for values in found.values():
            values[1:] = np.nan
    return found


def resampled_mean(
    values: np.ndarray | Tensor,
    groups: np.ndarray | Tensor | Sequence[Any],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """The mean of values (N,) over the sample and over the same resamples as ``resampled_metrics``, (1 + R,)."""
    values = check_scores(values, "values")
    member, weights = resamples(check_groups(groups, len(values)), num_resamples, np.random.default_rng(seed))
    sums, sizes = np.bincount(member, values), np.bincount(member)
    means = (weights @ sums) / (weights @ sizes)
    if len(sizes) == 1:
        means[1:] = np.nan
    return means


def resampled_risk(
    confidence: np.ndarray, wrong: np.ndarray, member: np.ndarray, weights: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """Error among the surest images of the sample and of each resample, ``calibration.expected_risk``.

    Args:
        confidence: (N,).
        wrong: (N,) bool.
        member, weights: of ``resamples``.
        shares: how many of a resample's images are the surest, above 0 to 1, (M,).

    Returns:
        (1 + R, M).
    """
    different, place = np.unique(-confidence, return_inverse=True)
    found, rows = [], max(1, _ELEMENTS // max(len(different), len(shares)))
    for part in np.split(weights, range(rows, len(weights), rows)):
        counts = counts_by_place(member, part, place, len(different))
        errors = counts_by_place(member[wrong], part, place[wrong], len(different))
        found.append(expected_risk(counts, errors, counts.sum(1, keepdims=True) * shares))
    return np.concatenate(found)


def resamples(groups: np.ndarray, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whose each image is, (N,), and how often each patient counts: once, then as drawn, (1 + R, G)."""
    names, member = np.unique(groups, return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num)
    return member, np.concatenate([np.ones((1, len(names))), drawn.astype(float)])


def counts_by_place(member: np.ndarray, weights: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """How many images of the sample and of each resample are at each of ``size`` places, (1 + R, size)."""
    cells = csr_array((np.ones(len(places)), (member, places)), shape=(weights.shape[1], size))
    return np.ascontiguousarray(weights @ cells)


def count_groups(groups: np.ndarray | Tensor | Sequence[Any]) -> int:
    """How many patients there are, G."""
    return len(np.unique(check_groups(groups, len(groups))))


def _unless_all_alike(found: Interval, least: float) -> Interval:
    """The interval of a share, or from ``least`` to 1 where the share is 1, and turned round where it is 0."""
    if math.isnan(found.low) or 1e-12 < found.value < 1 - 1e-12:
        return found
    return Interval(found.value, least, 1.0) if found.value > 0.5 else Interval(found.value, 0.0, 1 - least)


def _least_mean_share(tail: float, labels: np.ndarray, groups: np.ndarray) -> float:
    """How low the mean over classes of the share that is right can be where G patients have no error.

    Let a patient's images be of c classes, in which the shares that are right are a_k: it has no error with probability
    at most the least of its a_k, so at most their product to the power 1 / c. With n_k the sum of 1 / c over the
    patients of class k, no error has probability at most prod_k a_k^n_k, and the least mean of a_k for which that is
    ``tail`` has a_k = min(1, s n_k). With one class, or classes alike, this is tail^(1/G).
    """
    pairs = np.unique(np.stack([np.unique(groups, return_inverse=True)[1], labels]), axis=1)
    classes = np.bincount(pairs[0])[pairs[0]]
    n = np.sort(np.bincount(np.unique(pairs[1], return_inverse=True)[1], weights=1 / classes))
    scale = (math.log(tail) - np.cumsum(n * np.log(n))) / np.cumsum(n)  # log s if the first so many classes are below 1
    below = scale + np.log(n) < 0
    return float(np.minimum(1, np.exp(scale[below.sum() - 1]) * n).mean())


def _num_surest(num_images: int) -> int:
    return max(1, round(0.8 * num_images))


def _evaluate(
    probs: np.ndarray, labels: np.ndarray, member: np.ndarray, weights: np.ndarray, num_bins: int
) -> dict[str, np.ndarray]:
    """Every metric under each row of patient weights (R, G) -> (R,)."""
    n, k = probs.shape
    confidence, predicted = probs.max(1), probs.argmax(1)
    correct = (predicted == labels).astype(float)
    one_hot = np.eye(k)[labels]

    def total(values: np.ndarray, bins: np.ndarray, size: int) -> np.ndarray:
        """Weighted sums of ``values`` by bin, (R, size)."""
        cells = np.bincount(member * size + bins, weights=values, minlength=weights.shape[1] * size)
        return weights @ cells.reshape(-1, size)

    def one(values: np.ndarray) -> np.ndarray:
        return total(values, np.zeros(n, dtype=int), 1)[:, 0]

    images, surest = one(np.ones(n)), np.array([_num_surest(n) / n])
    with np.errstate(invalid="ignore"):
        by_class = total(correct, labels, k) / total(np.ones(n), labels, k)
        macro = np.nansum(by_class, 1) / np.isfinite(by_class).sum(1)
    brier = one(np.square(probs - one_hot).sum(1)) / images
    parts = _brier_parts(probs, one_hot, total, images, num_bins)
    found = {
        "accuracy": one(correct) / images,
        "accuracy_macro": macro,
        "nll": one(log_loss(probs, labels)) / images,
        "brier": brier,
        **parts,
        "brier_remainder": brier
        - (parts["brier_reliability"] - parts["brier_resolution"] + parts["brier_uncertainty"]),
        "ece": np.abs(total(correct - confidence, equal_width(confidence, num_bins), num_bins)).sum(1) / images,
        "ece_equal_mass": np.abs(total(correct - confidence, equal_mass(confidence, num_bins), num_bins)).sum(1)
        / images,
        "error_surest_80": resampled_risk(confidence, predicted != labels, member, weights, surest)[:, 0],
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
