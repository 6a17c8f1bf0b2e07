"""What an image's uncertainty tells of it, each number with its bootstrap interval over patients.

Are the least sure images the wrong ones? Are unknown images less sure than known ones?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bayescam.diagnose.arguments import check_forecasts, check_groups, check_resampling, check_scores
from bayescam.diagnose.calibration import told_apart
from bayescam.diagnose.intervals import (
    Interval,
    bounds,
    count_groups,
    counts_by_place,
    interval,
    resampled_mean,
    resampled_risk,
    resamples,
    share_interval,
)


def uncertainty_with_intervals(
    entropy: np.ndarray | Tensor,
    information: np.ndarray | Tensor | None,
    wrong: np.ndarray | Tensor,
    groups: np.ndarray | Tensor | Sequence[Any],
    *,
    level: float = 0.9,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Mean "entropy" and "mutual_information", and how well each finds errors: P(a wrong image's > a right one's).

    The AUROCs "entropy_finds_errors" and "mutual_information_finds_errors" are left out where all are right or wrong.

    Args:
        entropy: of the mean probabilities of each image, nat, (N,).
        information: mutual information, nat, (N,); None for a method with one set of weights.
        wrong: (N,) bool.
        groups: (N,) names of patients.
        level: of the intervals.
        num_resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        TypeError, ValueError: see ``arguments``.
    """
    check_resampling(level, num_resamples)
    entropy = check_scores(entropy, "entropy")
    wrong = check_scores(wrong, "wrong", len(entropy)) != 0
    groups = check_groups(groups, len(entropy))
    found, how = {}, {"num_resamples": num_resamples, "seed": seed}
    for name, given in (("entropy", entropy), ("mutual_information", information)):
        if given is None:
            continue
        values = check_scores(given, name, len(entropy))
        found[name] = interval(resampled_mean(values, groups, **how), level, num_groups=count_groups(groups))
        if 0 < wrong.sum() < len(wrong):
            scores = ood_with_intervals(
                values[~wrong], values[wrong], groups[~wrong], groups[wrong], level=level, **how
            )
            found[f"{name}_finds_errors"] = scores["auroc"]
    return found


def risk_band(
    probs: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    groups: np.ndarray | Tensor | Sequence[Any],
    *,
    level: float = 0.9,
    num_resamples: int = 300,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of ``calibration.risk_coverage``: of the error among the n surest images, n = 1..N, (N,) each.

    Patients are drawn anew, and the surest n / N of each resample's images are its own. Of one patient the bounds are
    nan.

    Raises:
        TypeError, ValueError: see ``arguments``.
    """
    check_resampling(level, num_resamples)
    probs, labels = check_forecasts(probs, labels)
    member, weights = resamples(check_groups(groups, len(labels)), num_resamples, np.random.default_rng(seed))
    coverage = np.arange(1, len(labels) + 1) / len(labels)
    risk = resampled_risk(probs.max(1), probs.argmax(1) != labels, member, weights, coverage)
    low, high = bounds(risk[1:], level, weights.shape[1])
    return low, high


def ood_with_intervals(
    inside: np.ndarray | Tensor,
    outside: np.ndarray | Tensor,
    inside_groups: np.ndarray | Tensor | Sequence[Any],
    outside_groups: np.ndarray | Tensor | Sequence[Any],
    *,
    level: float = 0.9,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """``calibration.ood_scores`` with intervals over patients, ``intervals.share_interval``.

    The patients of either side are drawn by themselves, or, where some have images on both sides, all at once. As G
    counts how many pairs of a known and an unknown patient there are without one in two pairs: the smaller number of
    the two sides, or less where they share patients.

    Args:
        inside: uncertainty of images like the training images, (N,).
        outside: of others, (M,).
        inside_groups, outside_groups: (N,), (M,) names of patients.
        level: of the intervals.
        num_resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        TypeError, ValueError: see ``arguments``.
    """
    check_resampling(level, num_resamples)
    inside, outside = check_scores(inside, "inside"), check_scores(outside, "outside")
    known_names = check_groups(inside_groups, len(inside), "inside_groups")
    unknown_names = check_groups(outside_groups, len(outside), "outside_groups")
    different, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    rng, n = np.random.default_rng(seed), len(inside)
    num_known, num_unknown = count_groups(known_names), count_groups(unknown_names)
    shared = len(np.intersect1d(known_names, unknown_names))
    if shared:
        member, weights = resamples(np.concatenate([known_names, unknown_names]), num_resamples, rng)
        known = counts_by_place(member[:n], weights, place[:n], len(different))
        unknown = counts_by_place(member[n:], weights, place[n:], len(different))
    else:
        known = counts_by_place(*resamples(known_names, num_resamples, rng), place[:n], len(different))
        unknown = counts_by_place(*resamples(unknown_names, num_resamples, rng), place[n:], len(different))
    auroc, fpr95 = told_apart(known, unknown)
    pairs = max(1, min(num_known, num_unknown, (num_known + num_unknown - shared) // 2))
    return {
        "auroc": share_interval(auroc, level, num_groups=pairs),
        "fpr95": share_interval(fpr95, level, num_groups=pairs),
    }
