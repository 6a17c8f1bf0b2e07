"""The metrics and their bootstrap intervals, against scikit-learn, torchmetrics and a loop over resamples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, brier_score_loss, log_loss, recall_score
from torchmetrics.functional.classification import multiclass_calibration_error

from bayescam.diagnose.calibration import (
    brier_decomposition,
    classification_metrics,
    entropy,
    equal_mass_ece,
    per_class,
    risk_coverage,
)
from bayescam.diagnose.intervals import (
    METRICS,
    Interval,
    equal_mass,
    interval,
    metrics_with_intervals,
    resampled_mean,
    resampled_metrics,
)


def test_values_are_the_libraries_where_they_have_them(problem):
    probs, labels = problem
    found = metrics_with_intervals(probs, labels, np.arange(400), num_resamples=50)
    value = {name: interval.value for name, interval in found.items()}
    assert value["accuracy"] == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert value["accuracy_macro"] == pytest.approx(balanced_accuracy_score(labels, probs.argmax(1)))
    assert value["nll"] == pytest.approx(log_loss(labels, probs))
    assert value["brier"] == pytest.approx(brier_score_loss(labels, probs, scale_by_half=False))
    ece = multiclass_calibration_error(torch.as_tensor(probs), torch.as_tensor(labels), 5, n_bins=15)
    assert value["ece"] == pytest.approx(float(ece))
    recall = recall_score(labels, probs.argmax(1), average=None)
    assert [value[f"accuracy[{k}]"] for k in range(5)] == pytest.approx(recall.tolist())
    assert set(METRICS) <= set(found)


def test_values_are_the_definitions_elsewhere(problem):
    probs, labels = problem
    found = metrics_with_intervals(probs, labels, np.arange(400), num_resamples=50)
    parts = brier_decomposition(probs, labels)
    for name in ("reliability", "resolution", "uncertainty"):
        assert found[f"brier_{name}"].value == pytest.approx(parts[name])
    assert found["ece_equal_mass"].value == pytest.approx(equal_mass_ece(probs, labels))
    coverage, risk = risk_coverage(probs, labels)
    assert found["error_surest_80"].value == pytest.approx(risk[np.argmin(abs(coverage - 0.8))])
    assert found["accuracy[2]"].value == pytest.approx(per_class(probs, labels)["recall"][2])


def test_intervals_equal_a_loop_over_resamples(problem):
    probs, labels = problem
    groups = np.repeat(np.arange(100), 4)
    found = metrics_with_intervals(probs, labels, groups, num_resamples=200, seed=3)
    counts = np.random.default_rng(3).multinomial(100, np.full(100, 0.01), size=200)
    bins = equal_mass(probs.max(1), 15)
    loop = {}
    for row in counts:
        rows = np.repeat(np.arange(400), row[groups])
        values = classification_metrics(probs[rows], labels[rows])
        parts = brier_decomposition(probs[rows], labels[rows])
        values |= {f"brier_{name}": parts[name] for name in ("reliability", "resolution", "uncertainty")}
        values["accuracy_macro"] = balanced_accuracy_score(labels[rows], probs[rows].argmax(1))
        gap = (probs[rows].argmax(1) == labels[rows]) - probs[rows].max(1)
        values["ece_equal_mass"] = abs(np.bincount(bins[rows], gap, 15)).sum() / len(rows)
        for name, value in values.items():
            loop.setdefault(name, []).append(value)
    assert len(loop) == 9
    for name in ("ece", "ece_equal_mass", "brier_reliability", "brier_resolution"):
        loop[name] = np.maximum(np.array(loop[name]) - np.mean(loop[name]) + found[name].value, 0)
    for name, values in loop.items():
        np.testing.assert_allclose([found[name].low, found[name].high], np.quantile(values, [0.05, 0.95]), rtol=1e-9)


def test_patients_resampled_whole_are_wider_than_images(problem):
    probs, labels = (np.repeat(values[:80], 5, 0) for values in problem)
    single = metrics_with_intervals(probs, labels, np.arange(400))["nll"]
    whole = metrics_with_intervals(probs, labels, np.repeat(np.arange(80), 5))["nll"]
    assert whole.high - whole.low > 1.5 * (single.high - single.low)


def test_a_class_without_images_has_no_accuracy(problem):
    probs, labels = problem
    keep = labels != 3
    found = metrics_with_intervals(probs[keep], labels[keep], np.arange(keep.sum()), num_resamples=50)
    assert "accuracy[3]" not in found
    assert found["accuracy_macro"].value == pytest.approx(
        np.mean([found[f"accuracy[{k}]"].value for k in (0, 1, 2, 4)])
    )


def test_the_same_patients_are_drawn_for_every_method(problem):
    probs, labels = problem
    groups = np.repeat(np.arange(100), 4)
    one, other = (resampled_metrics(p, labels, groups, num_resamples=20) for p in (probs, probs[:, ::-1]))
    both = resampled_metrics(np.tile(probs, (2, 1)), np.tile(labels, 2), np.tile(groups, 2), num_resamples=20)
    np.testing.assert_allclose(both["nll"], one["nll"])
    np.testing.assert_array_equal(one["brier_uncertainty"], other["brier_uncertainty"])
    assert metrics_with_intervals(probs, labels, groups, num_resamples=20)["nll"] == interval(one["nll"])


def test_an_interval_prints_its_three_numbers():
    assert f"{Interval(0.9044, 0.885, 0.9231):.3f}" == "0.904 [0.885, 0.923]"


def test_a_certain_method_prints_no_negative_zero():
    assert f"{Interval(-1e-9, -0.0, 0.0):.4f}" == "0.0000 [0.0000, 0.0000]"
    probs, labels = np.eye(3)[np.arange(12) % 3], np.arange(12) % 3
    printed = [f"{one:.4f}" for one in metrics_with_intervals(probs, labels, np.arange(12)).values()]
    printed += map(str, classification_metrics(probs, labels).values())
    printed += map(str, entropy(torch.as_tensor(probs)).tolist())
    assert not [words for words in printed if "-" in words]


def test_every_interval_holds_its_number():
    rng = np.random.default_rng(7)
    probs = rng.dirichlet(np.full(4, 0.2), size=60)
    labels = (probs.cumsum(1) > rng.random((60, 1))).argmax(1)
    for name, one in metrics_with_intervals(probs, labels, np.arange(60) // 2).items():
        assert one.low <= one.value <= one.high, name


def test_the_mean_is_resampled_like_the_metrics(problem):
    probs, labels = problem
    groups = np.arange(400) // 5
    nll = -np.log(probs[np.arange(400), labels])
    np.testing.assert_allclose(resampled_mean(nll, groups), resampled_metrics(probs, labels, groups)["nll"])
