"""What an image's uncertainty tells of it, each number with its bootstrap interval over patients.

Are the least sure images the wrong ones? Are unknown images less sure than known ones?
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from bayescam.diagnose.intervals import Interval, interval, resampled_mean, resamples


def uncertainty_with_intervals(
    entropy: np.ndarray,
    information: np.ndarray | None,
    wrong: np.ndarray,
    groups: np.ndarray,
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
    """
    found, how = {}, {"num_resamples": num_resamples, "seed": seed}
    for name, values in (("entropy", entropy), ("mutual_information", information)):
        if values is None:
            continue
        found[name] = interval(resampled_mean(values, groups, **how), level)
        if 0 < wrong.sum() < len(wrong):
            scores = ood_with_intervals(
                values[~wrong], values[wrong], groups[~wrong], groups[wrong], level=level, **how
            )
            found[f"{name}_finds_errors"] = scores["auroc"]
    return found


def risk_band(
    probs: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    level: float = 0.9,
    num_resamples: int = 300,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of ``calibration.risk_coverage``: of the error among the n surest images, n = 1..N, (N,) each.

    Patients are drawn anew; the order of the images by sureness is theirs in the sample.
    """
    order = np.argsort(-probs.max(1), kind="stable")
    wrong = (probs.argmax(1) != labels)[order]
    member, weights = resamples(groups, num_resamples, np.random.default_rng(seed))
    drawn = weights[1:, member[order]].astype(np.float32)
    with np.errstate(invalid="ignore"):
        risk = (drawn * wrong).cumsum(1) / drawn.cumsum(1)
    tail = (1 - level) / 2
    low, high = np.nanquantile(risk, [tail, 1 - tail], axis=0)
    return low, high


def ood_with_intervals(
    inside: np.ndarray,
    outside: np.ndarray,
    inside_groups: np.ndarray,
    outside_groups: np.ndarray,
    *,
    level: float = 0.9,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """``calibration.ood_scores`` with percentile intervals over patients.

    The patients of either side are drawn by themselves, or, where some have images on both sides, all at once. With the
    scores in order, AUROC = sum_u out(u) (in(< u) + in(u) / 2) / (N M) over the different scores u, where in and out
    count the images of a resample; FPR95 = in(>= t) / N at the lower 5 % quantile t of the outside ones.

    Args:
        inside: uncertainty of images like the training images, (N,).
        outside: of others, (M,).
        inside_groups, outside_groups: (N,), (M,) names of patients.
        level: of the intervals.
        num_resamples: bootstrap draws.
        seed: of the draws.
    """
    different, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    rng, n = np.random.default_rng(seed), len(inside)
    if len(np.intersect1d(inside_groups, outside_groups)):
        member, weights = resamples(np.concatenate([inside_groups, outside_groups]), num_resamples, rng)
        known = _counts(member[:n], weights, place[:n], len(different))
        unknown = _counts(member[n:], weights, place[n:], len(different))
    else:
        known = _counts(*resamples(inside_groups, num_resamples, rng), place[:n], len(different))
        unknown = _counts(*resamples(outside_groups, num_resamples, rng), place[n:], len(different))
    num_known, num_unknown = known.sum(1), unknown.sum(1)
    below = known.cumsum(1) - known
    reached = unknown.cumsum(1) > np.floor(0.05 * (num_unknown - 1))[:, None]
    flagged = num_known - below[np.arange(len(below)), reached.argmax(1)]
    with np.errstate(invalid="ignore"):  # a resample may hold no image of one side
        auroc = (unknown * (below + known / 2)).sum(1) / (num_known * num_unknown)
        fpr95 = np.where(num_unknown > 0, flagged / num_known, np.nan)
    return {"auroc": interval(auroc, level), "fpr95": interval(fpr95, level)}


def _counts(member: np.ndarray, weights: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """How many images of the sample and of each resample have each score, (1 + R, size)."""
    cells = csr_array((np.ones(len(places)), (member, places)), shape=(weights.shape[1], size))
    return weights @ cells
