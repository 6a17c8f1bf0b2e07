"""Uncertainty against a loop over resamples of patients."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bayescam.diagnose.calibration import ood_scores, risk_coverage
from bayescam.diagnose.intervals import Interval
from bayescam.diagnose.uncertainty import ood_with_intervals, risk_band, uncertainty_with_intervals


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
        expected = np.quantile([row[name] for row in loop], [0.05, 0.95])
        np.testing.assert_allclose([found[name].low, found[name].high], expected, rtol=1e-12)


def test_ood_of_images_told_apart_entirely():
    found = ood_with_intervals(np.arange(5.0), np.arange(5.0, 9.0), np.arange(5), np.arange(4), num_resamples=20)
    assert (found["auroc"], found["fpr95"]) == (Interval(1, 1, 1), Interval(0, 0, 0))


def test_the_band_of_risk_and_coverage_equals_a_loop(problem):
    probs, labels = (values[:60] for values in problem)
    groups = np.arange(60) // 3
    low, high = risk_band(probs, labels, groups, num_resamples=40, seed=4)
    order = np.argsort(-probs.max(1), kind="stable")
    wrong = (probs.argmax(1) != labels)[order]
    drawn = np.random.default_rng(4).multinomial(20, np.full(20, 0.05), size=40)[:, groups[order]]
    for n in (0, 10, 59):
        kept = drawn[:, : n + 1]
        risk = [(row * wrong[: n + 1]).sum() / row.sum() for row in kept if row.sum()]
        assert [low[n], high[n]] == pytest.approx(np.quantile(risk, [0.05, 0.95]).tolist(), abs=1e-6)
    _, risk = risk_coverage(probs, labels)
    assert low[-1] <= risk[-1] <= high[-1]


def test_errors_are_found_by_patients_drawn_at_once():
    rng = np.random.default_rng(8)
    entropy, wrong, groups = rng.random(60), rng.random(60) < 0.3, np.arange(60) // 4
    found = uncertainty_with_intervals(entropy, entropy / 2, wrong, groups, num_resamples=200, seed=1)
    assert found["entropy_finds_errors"].value == pytest.approx(roc_auc_score(wrong, entropy))
    assert found["mutual_information_finds_errors"] == found["entropy_finds_errors"]
    drawn = np.random.default_rng(1).multinomial(15, np.full(15, 1 / 15), size=200)
    rows = [np.repeat(np.arange(60), row[groups]) for row in drawn]
    for name, values in (
        ("entropy", [entropy[row].mean() for row in rows]),
        ("entropy_finds_errors", [roc_auc_score(wrong[row], entropy[row]) for row in rows]),
    ):
        assert [found[name].low, found[name].high] == pytest.approx(np.quantile(values, [0.05, 0.95]).tolist())


def test_nothing_is_said_of_errors_where_there_are_none():
    values, groups = np.arange(6.0), np.arange(6)
    found = uncertainty_with_intervals(values, None, np.zeros(6, dtype=bool), groups, num_resamples=20)
    assert set(found) == {"entropy"}
    few = uncertainty_with_intervals(values, None, values == 5, groups // 2, num_resamples=50)
    assert few["entropy_finds_errors"].value == 1
