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


def test_certain_and_wrong_is_finite():
    probs, labels = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1])
    found = classification_metrics(probs, labels)
    assert np.isfinite(found["nll"])
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


def test_ood_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=300).round(1), rng.normal(1, 1, 200).round(1)
    found = ood_scores(inside, outside)
    truth = np.r_[np.zeros(300), np.ones(200)]
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, np.r_[inside, outside]))
    fpr, tpr, _ = roc_curve(truth, np.r_[inside, outside], drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(fpr[tpr >= 0.95].min())
