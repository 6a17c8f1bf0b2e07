"""Uncertainty against a loop over resamples of patients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score, roc_curve

from bayescam.diagnose.calibration import ood_scores, risk_coverage
from bayescam.diagnose.intervals import Interval
from bayescam.diagnose.uncertainty import ood_with_intervals, risk_band, uncertainty_with_intervals


def expanded(values, num_groups):
    """The quantiles of a 90 % interval of so many patients."""
    tail = norm.cdf(-np.sqrt(num_groups / (num_groups - 1)) * student.ppf(0.95, num_groups - 1))
    return np.quantile(values, [tail, 1 - tail], axis=0)


def test_ood_intervals_equal_a_loop_over_resamples():
    rng = np.random.default_rng(5)
    inside, outside = rng.normal(size=60).round(1), rng.normal(1.0, size=40).round(1)
    inside_groups, outside_groups = np.arange(60) // 3, np.array([f"p{i // 2}" for i in range(40)])
    found = ood_with_intervals(inside, outside, inside_groups, outside_groups, num_resamples=200, seed=2)
    again = np.random.default_rng(2)
    known, unknown = (again.multinomial(20, np.full(20, 0.05), size=200) for _ in range(2))
    order = np.unique(outside_groups, return_inverse=True)[1]
    loop = [
        ood_scores(np.repeat(inside, a[inside_groups]), np.repeat(outside, b[order]))
        for a, b in zip(known, unknown, strict=True)
    ]
    for name, value in ood_scores(inside, outside).items():
        assert found[name].value == pytest.approx(value)
        expected = expanded([row[name] for row in loop], 20)
        np.testing.assert_allclose([found[name].low, found[name].high], expected, rtol=1e-12)


def test_ood_of_images_told_apart_entirely():
    found = ood_with_intervals(np.arange(5.0), np.arange(5.0, 9.0), np.arange(5), np.arange(5, 9), num_resamples=20)
    least = pytest.approx(0.05**0.25)  # four pairs of a known and an unknown patient, all told apart
    assert found["auroc"] == Interval(1, least, 1)
    assert found["fpr95"] == Interval(0, 0, pytest.approx(1 - 0.05**0.25))
    alone = ood_with_intervals(np.arange(5.0), np.arange(4.0), np.arange(5), np.full(4, 9), num_resamples=20)
    assert np.isnan([alone["auroc"].low, alone["fpr95"].high]).all()


@pytest.mark.parametrize("num_outside", [19, 20, 21, 40, 200])
def test_fpr95_is_the_least_with_95_percent_found(num_outside):
    rng = np.random.default_rng(num_outside)
    for decimals in (1, 12):
        inside, outside = rng.normal(size=300).round(decimals), rng.normal(1, 1, num_outside).round(decimals)
        groups = np.arange(300), np.arange(num_outside) + 300
        found = ood_with_intervals(inside, outside, *groups, num_resamples=5)["fpr95"]
        truth, scores = np.r_[np.zeros(300), np.ones(num_outside)], np.r_[inside, outside]
        fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert found.value == pytest.approx(fpr[tpr >= 0.95].min())


def test_the_band_of_risk_and_coverage_equals_a_loop(problem):
    probs, labels = (values[:60] for values in problem)
    groups = np.arange(60) // 3
    low, high = risk_band(probs, labels, groups, num_resamples=40, seed=4)
    drawn = np.random.default_rng(4).multinomial(20, np.full(20, 0.05), size=40)[:, groups]
    rows = [np.repeat(np.arange(60), row) for row in drawn]
    loop = expanded([risk_coverage(probs[row], labels[row])[1] for row in rows], 20)
    np.testing.assert_allclose([low, high], loop, atol=1e-12)
    _, risk = risk_coverage(probs, labels)
    assert low[-1] <= risk[-1] <= high[-1]


def test_the_surest_image_may_be_wrong_in_other_patients():
    probs = np.stack([np.linspace(0.99, 0.6, 150), np.linspace(0.01, 0.4, 150)], 1)
    labels = (np.arange(150) % 5 == 1).astype(int)  # the surest is right, the second wrong
    low, high = risk_band(probs, labels, np.arange(150))
    assert (low[0], high[0]) == (0, 1)


def test_the_band_of_patients_with_unlike_numbers_of_images_is_at_the_same_share(problem):
    probs, labels = (values[:40] for values in problem)
    groups = np.repeat([0, 1, 2, 3], [1, 4, 15, 20])
    low, high = risk_band(probs, labels, groups, num_resamples=30, seed=2)
    drawn = np.random.default_rng(2).multinomial(4, np.full(4, 0.25), size=30)[:, groups]
    loop = []
    for row in drawn:
        rows = np.repeat(np.arange(40), row)
        coverage, risk = risk_coverage(probs[rows], labels[rows])
        errors = np.interp(np.arange(1, 41) / 40, np.r_[0, coverage], np.r_[0, risk * coverage])
        loop.append(errors * 40 / np.arange(1, 41))
    np.testing.assert_allclose([low, high], expanded(loop, 4), atol=1e-12)


def test_the_band_has_no_order_and_of_one_patient_none(problem):
    probs, labels = problem[0][:60].round(1), problem[1][:60]
    probs[:, 0] = np.abs(probs[:, 0] + 1 - probs.sum(1))
    probs /= probs.sum(1, keepdims=True)
    order, groups = np.random.default_rng(3).permutation(60), np.arange(60) // 3
    band = risk_band(probs, labels, groups, num_resamples=20)
    np.testing.assert_allclose(risk_band(probs[order], labels[order], groups[order], num_resamples=20), band)
    assert np.isnan(risk_band(probs, labels, np.zeros(60), num_resamples=20)).all()


def test_errors_are_found_by_patients_drawn_at_once():
    rng = np.random.default_rng(8)
    entropy, wrong, groups = rng.random(60), rng.random(60) < 0.3, np.arange(60) // 4
    found = uncertainty_with_intervals(entropy, entropy / 2, wrong, groups, num_resamples=200, seed=1)
    assert found["entropy_finds_errors"].value == pytest.approx(roc_auc_score(wrong, entropy))
    assert found["mutual_information_finds_errors"] == found["entropy_finds_errors"]
    drawn = np.random.default_rng(1).multinomial(15, np.full(15, 1 / 15), size=200)
    rows = [np.repeat(np.arange(60), row[groups]) for row in drawn]
    # All 15 patients have images, and 7 pairs of them do not overlap.
    for name, num, values in (
        ("entropy", 15, [entropy[row].mean() for row in rows]),
        ("entropy_finds_errors", 7, [roc_auc_score(wrong[row], entropy[row]) for row in rows]),
    ):
        assert [found[name].low, found[name].high] == pytest.approx(expanded(values, num).tolist())


def test_nothing_is_said_of_errors_where_there_are_none():
    values, groups = np.arange(6.0), np.arange(6)
    found = uncertainty_with_intervals(values, None, np.zeros(6, dtype=bool), groups, num_resamples=20)
    assert set(found) == {"entropy"}
    few = uncertainty_with_intervals(values, None, values == 5, groups // 2, num_resamples=50)
    assert few["entropy_finds_errors"].value == 1
    assert np.isnan(few["entropy_finds_errors"].low)  # one patient has all errors


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"inside": [0.1, np.nan]}, r"inside\[1\] is nan"),
        ({"outside": [np.inf, 0.1]}, r"outside\[0\] is inf"),
        ({"outside": []}, "outside must be .* at least one image"),
        ({"inside_groups": [1]}, r"inside_groups must be \(2,\)"),
        ({"outside_groups": ["c", None]}, r"outside_groups\[1\] is None"),
        ({"level": 90}, "level is 90"),
    ],
)
def test_scores_that_say_nothing_are_refused(changed, words):
    given = {"inside": [0.1, 0.2], "outside": [0.3, 0.4], "inside_groups": ["a", "b"], "outside_groups": ["c", "d"]}
    given = {name: np.array(values, dtype=object if "groups" in name else None) for name, values in given.items()}
    with pytest.raises(ValueError, match=words):
        ood_with_intervals(**(given | changed))


def test_uncertainties_of_other_lengths_are_refused():
    values, right, groups = np.arange(4.0), np.zeros(4, dtype=bool), np.arange(4)
    with pytest.raises(ValueError, match=r"mutual_information must be \(4,\)"):
        uncertainty_with_intervals(values, values[:3], right, groups)
    with pytest.raises(ValueError, match=r"wrong must be \(4,\)"):
        uncertainty_with_intervals(values, None, right[:3], groups)
    torched = uncertainty_with_intervals(torch.tensor(values), None, torch.tensor(right), torch.tensor(groups))
    assert torched == uncertainty_with_intervals(values, None, right, groups)
