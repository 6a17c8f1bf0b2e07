"""The metrics and their bootstrap intervals, against scikit-learn, torchmetrics and a loop over resamples."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, balanced_accuracy_score, brier_score_loss, log_loss, recall_score
from torchmetrics.functional.classification import multiclass_calibration_error

from bayescam.diagnose.calibration import (
    brier_decomposition,
    classification_metrics,
    entropy,
    equal_mass,
    equal_mass_ece,
    per_class,
    risk_coverage,
)
from bayescam.diagnose.intervals import (
    METRICS,
    Interval,
    interval,
    interval_words,
    metrics_with_intervals,
    resampled_mean,
    resampled_metrics,
    share_interval,
)


def expanded(values, num_groups, level=0.9):
    """Hesterberg's quantiles, written down again."""
    tail = norm.cdf(-np.sqrt(num_groups / (num_groups - 1)) * student.ppf((1 + level) / 2, num_groups - 1))
    return np.quantile(values, [tail, 1 - tail])


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
    for name in ("reliability", "resolution", "uncertainty", "remainder"):
        assert found[f"brier_{name}"].value == pytest.approx(parts[name])
    reliability, resolution, uncertainty, remainder = (found[f"brier_{name}"].value for name in list(parts)[:4])
    assert reliability - resolution + uncertainty + remainder == pytest.approx(found["brier"].value, abs=1e-12)
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
        values |= {f"brier_{name}": parts[name] for name in list(parts)[:4]}
        values["error_surest_80"] = risk_coverage(probs[rows], labels[rows])[1][319]
        values["accuracy_macro"] = balanced_accuracy_score(labels[rows], probs[rows].argmax(1))
        gap = (probs[rows].argmax(1) == labels[rows]) - probs[rows].max(1)
        values["ece_equal_mass"] = abs(np.bincount(bins[rows], gap, 15)).sum() / len(rows)
        for name, value in values.items():
            loop.setdefault(name, []).append(value)
    assert len(loop) == 11
    for name in ("ece", "ece_equal_mass", "brier_reliability", "brier_resolution"):
        loop[name] = np.maximum(np.array(loop[name]) - np.mean(loop[name]) + found[name].value, 0)
    for name, values in loop.items():
        num = 100 if name != "error_surest_80" else len(np.unique(groups[np.argsort(-probs.max(1))[:320]]))
        np.testing.assert_allclose([found[name].low, found[name].high], expanded(values, num), rtol=1e-9)


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
    assert metrics_with_intervals(probs, labels, groups, num_resamples=20)["nll"] == interval(
        one["nll"], num_groups=100
    )


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


def test_one_patient_has_no_interval(problem):
    probs, labels = problem
    found = metrics_with_intervals(probs, labels, np.zeros(400, dtype=int), num_resamples=20)
    assert set(METRICS) <= set(found)
    for one in found.values():
        assert np.isfinite(one.value)
        assert np.isnan([one.low, one.high]).all()
        assert f"{one:.3f}" == f"{one.value:.3f} [-]"
    alone = interval(resampled_mean(probs[:, 0], np.zeros(400)))
    assert np.isnan([alone.low, alone.high]).all()
    read = Interval(**json.loads('{"value": 0.66, "low": null, "high": null}'))
    assert f"{read:.2f}" == "0.66 [-]"
    with pytest.raises(ValueError, match="not JSON compliant"):
        json.dumps(asdict(read), allow_nan=False)


def test_a_class_of_one_patient_has_no_interval_and_the_others_have():
    probs, labels = np.tile([0.6, 0.3, 0.1], (30, 1)), np.repeat([0, 1], [25, 5])
    found = metrics_with_intervals(probs, labels, np.repeat(np.arange(6), 5), num_resamples=20)
    assert np.isnan(found["accuracy[1]"].low)
    assert found["accuracy[0]"] == Interval(1, 0.05**0.2, 1)
    assert "accuracy[2]" not in found


@pytest.mark.parametrize("num", [2, 10, 100])
def test_no_error_is_bounded_by_clopper_and_pearson_over_patients(num):
    probs = np.eye(2)[np.arange(3 * num) % 2]
    groups = np.arange(3 * num) // 3
    found = metrics_with_intervals(probs, probs.argmax(1), groups, num_resamples=20)
    least = binomtest(num, num).proportion_ci(0.9, "exact").low
    assert found["accuracy"] == Interval(1, pytest.approx(least), 1)
    # Every patient has images of both classes, so that no class says more than the patients do.
    assert found["accuracy_macro"] == Interval(1, pytest.approx(least), 1)
    assert found["accuracy[0]"] == Interval(1, pytest.approx(least), 1)
    assert found["error_surest_80"].low == 0
    assert 0 < found["error_surest_80"].high < 1
    turned = metrics_with_intervals(probs, 1 - probs.argmax(1), groups, num_resamples=20)
    assert turned["accuracy"] == Interval(0, 0, pytest.approx(1 - least))
    assert turned["accuracy_macro"] == Interval(0, 0, pytest.approx(1 - least))
    assert turned["error_surest_80"].high == pytest.approx(1)
    assert turned["error_surest_80"].low > 0
    narrow = share_interval(np.ones(21), 0.8, num_groups=num)
    assert narrow == Interval(1, pytest.approx(0.1 ** (1 / num)), 1)


def test_the_mean_of_classes_without_error_is_bounded_by_its_rarest():
    labels = np.repeat([0, 1], [30, 3])
    found = metrics_with_intervals(np.eye(2)[labels], labels, np.arange(33), num_resamples=20)
    shares = np.linspace(1e-4, 1, 100_001)
    least = min((a + min(1, (0.05 / a**30) ** (1 / 3))) / 2 for a in shares if a**30 >= 0.05)
    assert found["accuracy_macro"].low == pytest.approx(least, abs=1e-4)
    assert found["accuracy_macro"].low < found["accuracy"].low == pytest.approx(0.05 ** (1 / 33))


def test_the_order_of_the_images_is_nothing():
    probs, labels = np.tile([0.8, 0.2], (200, 1)), np.repeat([0, 1], [160, 40])
    order = np.random.default_rng(1).permutation(200)
    groups = np.arange(200)
    first = metrics_with_intervals(probs, labels, groups, num_resamples=100)
    second = metrics_with_intervals(probs[order], labels[order], groups[order], num_resamples=100)
    assert first["error_surest_80"].value == pytest.approx(0.2)
    assert first["error_surest_80"].low < 0.2 < first["error_surest_80"].high
    assert first["ece_equal_mass"].value == pytest.approx(0, abs=1e-12)
    for name, one in first.items():
        assert list(asdict(one).values()) == pytest.approx(list(asdict(second[name]).values()), abs=1e-9), name


def test_the_interval_of_few_patients_is_wider(problem):
    values = resampled_mean(problem[0][:60, 0], np.arange(60) // 6)
    plain, wide = interval(values), interval(values, num_groups=10)
    np.testing.assert_allclose([wide.low, wide.high], expanded(values[1:], 10))
    assert wide.low < plain.low < plain.high < wide.high
    many = interval(values, num_groups=100_000)
    assert (many.low, many.high) == pytest.approx((plain.low, plain.high), abs=1e-4)


def test_the_words_say_what_was_drawn_and_what_to_doubt():
    many, few = interval_words(30, "patients"), interval_words(12, "patients", 0.8, "Below each")
    assert many.startswith("In brackets the 90 % bootstrap interval over 30 patients. ECE is biased upwards")
    assert "too narrow" not in many
    assert few.startswith("Below each the 80 % bootstrap interval over 12 patients. So few patients make the intervals")
    assert "carry the number" in few
    assert "make the intervals too narrow. ECE" in interval_words(4, "images")
    assert interval_words(1, "images").startswith("No number has an interval, for want of a second image. ECE")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"groups": np.arange(3)}, r"groups must be \(4,\), the patient of each image, got \(3,\)"),
        ({"groups": ["a", None, "b", "c"]}, r"groups\[1\] is None, no patient"),
        ({"groups": np.array(["a", "b", "", "c"])}, r"groups\[2\] is .*, no patient"),
        ({"groups": np.array([1.0, 2.0, 3.0, np.nan])}, r"groups\[3\] is .*nan"),
        ({"labels": [0, 1, 2, 0]}, r"labels\[2\] is 2, but probs has the classes 0 to 1"),
        ({"probs": np.full((4, 2), 0.7)}, r"probs\[0\] sums to 1.4"),
        ({"probs": np.empty((0, 2))}, "probs holds no image"),
        ({"level": 95}, "level is 95"),
        ({"num_resamples": 0}, "num_resamples is 0"),
        ({"num_bins": 0}, "num_bins is 0"),
    ],
)
def test_what_cannot_be_resampled_is_refused(changed, words):
    given = {"probs": np.full((4, 2), 0.5), "labels": np.array([0, 1, 0, 1]), "groups": np.arange(4)}
    with pytest.raises(ValueError, match=words):
        metrics_with_intervals(**(given | changed))


def test_torch_and_numpy_are_resampled_alike(problem):
    probs, labels = problem
    groups = np.arange(400) // 4
    plain = metrics_with_intervals(probs, labels, groups, num_resamples=20)
    assert metrics_with_intervals(*map(torch.tensor, (probs, labels, groups)), num_resamples=20) == plain
    assert metrics_with_intervals(probs, labels.tolist(), groups.tolist(), num_resamples=20) == plain
    single = metrics_with_intervals(torch.tensor(probs).float(), labels, groups, num_resamples=20)
    assert single["nll"].low == pytest.approx(plain["nll"].low, rel=1e-5)


@pytest.mark.slow
def test_coverage_of_the_intervals_of_few_patients():
    """How often a 90 % interval holds the number of all patients; the docstring of ``interval`` has what is printed."""
    rng = np.random.default_rng(0)
    truth = {name: values[0] for name, values in resampled_metrics(*_patients(100_000, rng), num_resamples=1).items()}
    samples, names = 500, ("accuracy", "nll", "brier")
    for num in (2, 3, 5, 10, 20):
        wide, plain = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for _ in range(samples):
            values = resampled_metrics(*_patients(num, rng), num_resamples=500)
            for name in names:
                one = (share_interval if name == "accuracy" else interval)(values[name], num_groups=num)
                other = interval(values[name])
                wide[name] += (one.low <= truth[name] <= one.high) / samples
                plain[name] += (other.low <= truth[name] <= other.high) / samples
        print(f"{num} patients:", ", ".join(f"{name} {wide[name]:.0%} (plain {plain[name]:.0%})" for name in names))
        for name in names:
            assert wide[name] >= plain[name]
            assert 0.82 < wide[name] < 0.95 or num < 5


def _patients(num, rng):
    """Forecasts that are calibrated, of patients who differ in difficulty and have one to six images each."""
    groups = np.repeat(np.arange(num), rng.integers(1, 7, num))
    logits = rng.normal(size=(num, 3))[groups] + rng.normal(size=(len(groups), 3)) + [2, 0, 0]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs, (logits + rng.gumbel(size=logits.shape)).argmax(1), groups
