"""Calibration against scikit-learn, torchmetrics and arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import multiclass_calibration_error

from bayescam.diagnose.calibration import (
    brier_decomposition,
    classification_metrics,
    consistency_band,
    entropy,
    equal_mass,
    equal_mass_ece,
    mutual_information,
    ood_scores,
    per_class,
    reliability,
    risk_coverage,
)
from bayescam.posterior.draws import Draws


def test_metrics_equal_the_libraries_that_have_them(problem):
    probs, labels = problem
    found = classification_metrics(probs, labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert found["nll"] == pytest.approx(log_loss(labels, probs))
    assert found["brier"] == pytest.approx(brier_score_loss(labels, probs, scale_by_half=False))
    theirs = multiclass_calibration_error(torch.tensor(probs), torch.tensor(labels), 5, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(theirs), abs=1e-6)
    assert reliability(probs, labels).ece == pytest.approx(found["ece"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_certain_and_wrong_costs_the_same_in_every_type(dtype):
    probs, labels = np.array([[1.0, 0.0], [1.0, 0.0]], dtype=dtype), np.array([0, 1])
    found = classification_metrics(probs, labels)
    assert found["nll"] == pytest.approx(126 * np.log(2) / 2)
    assert found["ece"] == pytest.approx(0.5)
    assert found["brier"] == pytest.approx(1.0)


def test_reliability_bins_by_hand():
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    bins = reliability(probs, np.array([0, 1, 0, 1]), num_bins=10)
    assert bins.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 2, 0]
    assert bins.accuracy[8] == pytest.approx(0.5)
    assert bins.accuracy[5] == pytest.approx(1.0)
    assert bins.ece == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)


def test_a_calibrated_forecast_lies_in_its_consistency_band(problem):
    probs, labels = problem
    low, high = consistency_band(probs, level=0.99)
    bins = reliability(probs, labels)
    filled = bins.count > 0
    inside = (bins.accuracy[filled] >= low[filled]) & (bins.accuracy[filled] <= high[filled])
    assert inside.mean() > 0.8
    overconfident = reliability(np.eye(5)[probs.argmax(1)] * 0.9 + 0.02, labels)
    low, high = consistency_band(np.eye(5)[probs.argmax(1)] * 0.9 + 0.02)
    worst = np.nanargmax(overconfident.count)
    assert overconfident.accuracy[worst] < low[worst]


def test_risk_coverage_by_hand():
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.55, 0.45]])
    coverage, risk = risk_coverage(probs, np.array([0, 0, 0]))
    np.testing.assert_allclose(coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(risk, [0, 1 / 2, 1 / 3])


def test_entropy_and_mutual_information_have_their_bounds():
    assert float(entropy(torch.full((1, 4), 0.25, dtype=torch.float64))) == pytest.approx(np.log(4))
    assert float(entropy(torch.tensor([[1.0, 0.0]]))) == 0
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 30, 3, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64)
    phi = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    found = mutual_information(Draws(weight, bias), phi)
    probs = torch.softmax(torch.einsum("cskd,nd->csnk", weight, phi) + bias[:, :, None], -1).flatten(0, 1)
    by_hand = (probs * (probs / probs.mean(0)).log()).sum(-1).mean(0)
    torch.testing.assert_close(found, by_hand)
    same = Draws(weight[:1, :1].expand(1, 5, 3, 4), bias[:1, :1].expand(1, 5, 3))
    assert float(mutual_information(same, phi).abs().max()) < 1e-12
    shifted = Draws(weight + torch.randn(2, 30, 1, 4, generator=generator, dtype=torch.float64), bias)
    torch.testing.assert_close(mutual_information(shifted, phi), found)


def test_per_class_equals_scikit_learn(problem):
    probs, labels = problem
    found = per_class(probs, labels)
    precision, recall, _, _ = precision_recall_fscore_support(labels, probs.argmax(1))
    np.testing.assert_allclose(found["recall"], recall)
    np.testing.assert_allclose(found["precision"], precision)


def test_the_brier_decomposition_adds_up_and_is_exact_for_constant_bins(problem):
    probs, labels = problem
    parts = brier_decomposition(probs, labels)
    assert parts["brier"] == pytest.approx(classification_metrics(probs, labels)["brier"])
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["remainder"]
    assert total == pytest.approx(parts["brier"])
    two = np.array([[0.8, 0.2], [0.3, 0.7]])[np.arange(100) % 2]
    exact = brier_decomposition(two, (np.arange(100) % 3 == 0).astype(int))
    assert exact["remainder"] == pytest.approx(0, abs=1e-12)


def test_equal_mass_ece_by_hand():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    assert equal_mass_ece(probs, np.array([0, 0, 1, 1]), num_bins=2) == pytest.approx((0.3 + 1.3) / 4)


@pytest.mark.parametrize("decimals", [1, 12], ids=["ties", "no ties"])
@pytest.mark.parametrize("num_outside", [1, 19, 20, 21, 40, 200, 1000])
def test_ood_scores_equal_scikit_learn(num_outside, decimals):
    rng = np.random.default_rng(num_outside)
    inside, outside = rng.normal(size=300).round(decimals), rng.normal(1, 1, num_outside).round(decimals)
    found = ood_scores(inside, outside)
    truth = np.r_[np.zeros(300), np.ones(num_outside)]
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, np.r_[inside, outside]))
    fpr, tpr, _ = roc_curve(truth, np.r_[inside, outside], drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(fpr[tpr >= 0.95].min())


def test_a_confidence_of_one_is_in_the_last_bin_which_torchmetrics_keeps_apart():
    probs = np.concatenate([np.tile([1.0, 0.0], (50, 1)), np.tile([0.95, 0.05], (50, 1))])
    labels = np.repeat([0, 1, 0], [40, 10, 50])
    assert classification_metrics(probs, labels)["ece"] == pytest.approx(abs(0.9 - 0.975))
    theirs = multiclass_calibration_error(torch.tensor(probs), torch.tensor(labels), 2, n_bins=15, norm="l1")
    assert float(theirs) == pytest.approx(0.5 * abs(0.8 - 1) + 0.5 * abs(1 - 0.95), abs=1e-5)


@pytest.fixture
def tied():
    """Two hundred images of one confidence, 80 % of them right, the right ones first: calibrated."""
    return np.tile([0.8, 0.2], (200, 1)), np.repeat([0, 1], [160, 40])


def test_equal_confidences_share_their_error(tied):
    coverage, risk = risk_coverage(*tied)
    np.testing.assert_allclose(risk, 0.2)
    assert coverage[-1] == 1
    assert equal_mass_ece(*tied) == pytest.approx(0, abs=1e-12)


def test_the_order_of_the_images_is_nothing(problem):
    probs, labels = problem[0].round(1), problem[1]
    probs[:, 0] += 1 - probs.sum(1)
    probs = np.abs(probs) / np.abs(probs).sum(1, keepdims=True)
    order = np.random.default_rng(1).permutation(len(labels))
    np.testing.assert_allclose(risk_coverage(probs[order], labels[order])[1], risk_coverage(probs, labels)[1])
    assert equal_mass_ece(probs[order], labels[order]) == pytest.approx(equal_mass_ece(probs, labels), abs=1e-12)


def test_risk_coverage_is_the_mean_over_the_orders_of_the_equally_sure(problem):
    probs, labels = np.eye(5)[problem[0][:60].argmax(1)] * 0.5 + 0.1, problem[1][:60]
    probs[:20] = np.eye(5)[probs[:20].argmax(1)] * 0.75 + 0.05
    rng, wrong = np.random.default_rng(2), probs.argmax(1) != labels
    risks = []
    for _ in range(2000):
        order = np.lexsort([rng.random(60), -probs.max(1)])
        risks.append(wrong[order].cumsum() / np.arange(1, 61))
    np.testing.assert_allclose(risk_coverage(probs, labels)[1], np.mean(risks, axis=0), atol=0.04)


def test_without_ties_the_surest_and_the_bins_are_those_of_the_sorted_images(problem):
    probs, labels = problem
    order = np.argsort(-probs.max(1))
    wrong = (probs.argmax(1) != labels)[order]
    np.testing.assert_allclose(risk_coverage(probs, labels)[1], wrong.cumsum() / np.arange(1, 401))
    for num_bins in (1, 7, 15, 400, 1000):
        bins = np.empty(400, dtype=int)
        for b, part in enumerate(np.array_split(order[::-1], num_bins)):
            bins[part] = b
        np.testing.assert_array_equal(equal_mass(probs.max(1), num_bins), bins)
    few = equal_mass(probs.max(1).round(1), 15)
    assert len(np.unique(few)) <= 9
    assert (np.diff(few[order[::-1]]) >= 0).all()


@pytest.mark.parametrize(
    ("probs", "labels", "words"),
    [
        (np.log([[0.2, 0.8]]), [1], r"probs\[0, 0\] is -1.6.*softmax"),
        ([[0.5, 0.5], [1.5, 1.5]], [0, 0], r"probs\[1\] sums to 3, not to 1; take the softmax"),
        ([[0.5, np.nan]], [0], r"probs\[0, 1\] is nan"),
        (np.empty((0, 3)), [], "probs holds no image"),
        ([0.5, 0.5], [0], r"probs must be \(N, K\).*\(2,\)"),
        ([[1.0]], [0], r"probs must be \(N, K\).*\(1, 1\)"),
        ([[0.5, 0.5]] * 2, [0], r"labels must be \(2,\).*\(1,\)"),
        ([[0.5, 0.5]] * 2, [0, -1], r"labels\[1\] is -1.*classes 0 to 1"),
        ([[0.5, 0.5]], [2], r"labels\[0\] is 2"),
        ([[0.5, 0.5]], [0.5], r"labels\[0\] is 0.5"),
        ([[0.5, 0.5]], [np.nan], r"labels\[0\] is nan"),
    ],
)
def test_what_is_no_forecast_is_refused(probs, labels, words):
    for as_type in (np.array, torch.tensor):
        for measure in (
            classification_metrics,
            reliability,
            risk_coverage,
            per_class,
            brier_decomposition,
            equal_mass_ece,
        ):
            with pytest.raises(ValueError, match=words):
                measure(as_type(probs), as_type(labels))


def test_words_are_no_numbers_and_no_bin_is_none():
    with pytest.raises(TypeError, match="labels must be numbers"):
        classification_metrics(np.array([[0.5, 0.5]]), np.array(["hand"]))
    with pytest.raises(ValueError, match="num_bins is 0"):
        classification_metrics(np.array([[0.5, 0.5]]), np.array([0]), num_bins=0)


def test_torch_and_numpy_give_the_same(problem):
    probs, labels = problem
    both = torch.tensor(probs, requires_grad=True), torch.tensor(labels)
    assert classification_metrics(*both) == classification_metrics(probs, labels.astype(float))
    single = classification_metrics(torch.tensor(probs, dtype=torch.float32), both[1])
    assert single == pytest.approx(classification_metrics(probs, labels), rel=1e-5)
    np.testing.assert_array_equal(risk_coverage(*both)[1], risk_coverage(probs, labels)[1])
    np.testing.assert_array_equal(consistency_band(both[0])[0], consistency_band(probs)[0])
    inside, outside = torch.tensor([0.1, 0.4]), torch.tensor([0.3])
    assert ood_scores(inside, outside) == {"auroc": 0.5, "fpr95": 0.5}


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"inside\[1\] is nan"):
        ood_scores(np.array([0.1, np.nan]), np.ones(3))
    with pytest.raises(ValueError, match=r"outside must be .* at least one image"):
        ood_scores(np.ones(3), np.empty(0))
