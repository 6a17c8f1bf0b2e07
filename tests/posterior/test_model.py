"""The one density: Pyro's trace, the closed form and autograd give the same number."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine

import bayescam as bc
from bayescam.posterior.images import augment, check_images
from bayescam.posterior.model import negative_log_joint

N, D, K, TAU = 30, 3, 4, 0.6


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)])
def test_closed_form_is_the_trace_and_its_gradient(class_weights):
    phi, labels = torch.randn(N, D, dtype=torch.float64), torch.arange(N) % K
    theta = torch.randn(K, D + 1, dtype=torch.float64).requires_grad_()
    fixed = poutine.condition(bc.last_layer, data={"weight": theta[:, :-1], "bias": theta[:, -1]})
    trace = poutine.trace(fixed).get_trace(phi, labels, num_classes=K, prior_precision=TAU, class_weights=class_weights)
    expected = -trace.log_prob_sum()
    expected.backward()
    images = check_images(phi, labels, class_weights=class_weights)
    value, gradient = negative_log_joint(theta.detach(), images, TAU)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, theta.grad)


def test_logits_are_a_linear_layer():
    phi = torch.randn(N, D)
    layer = torch.nn.Linear(D, K)
    fixed = poutine.condition(bc.last_layer, data={"weight": layer.weight, "bias": layer.bias})
    trace = poutine.trace(fixed).get_trace(phi, num_classes=K, prior_precision=TAU)
    torch.testing.assert_close(trace.nodes["y"]["fn"].logits, layer(phi).log_softmax(1))


@pytest.mark.parametrize("features", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_logits_are_of_the_wider_type_of_features_and_weight(features, weights):
    phi, layer = torch.randn(N, D, dtype=features), torch.nn.Linear(D, K, dtype=weights)
    fixed = poutine.condition(bc.last_layer, data={"weight": layer.weight, "bias": layer.bias})
    trace = poutine.trace(fixed).get_trace(phi, num_classes=K, prior_precision=TAU)
    wide = torch.promote_types(features, weights)
    torch.testing.assert_close(trace.nodes["y"]["fn"].logits, layer.to(wide)(phi.to(wide)).log_softmax(1))


PHI, LABELS = torch.zeros(N, D), torch.arange(N) % K


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": PHI.numpy()}, TypeError, "features must be a torch tensor, got ndarray"),
        ({"features": PHI.long()}, TypeError, "features must be floating-point numbers, got torch.int64"),
        ({"features": PHI[None]}, ValueError, r"features must be \(N, D\) with N, D >= 1, got shape \(1, 30, 3\)"),
        ({"features": PHI[:0], "labels": None}, ValueError, r"features must be .* got shape \(0, 3\)"),
        ({"labels": LABELS[:-1]}, ValueError, r"labels must be \(30,\) like the rows of features, got \(29,\)"),
        (
            {"labels": LABELS.float()},
            TypeError,
            "labels must be whole numbers .* got torch.float32; give labels.long()",
        ),
        ({"labels": LABELS > 0}, TypeError, "labels must be whole numbers .* got torch.bool"),
        ({"labels": LABELS.tolist()}, TypeError, "labels must be a torch tensor, got list"),
        ({"labels": LABELS + 1}, ValueError, "labels run from 1 to 4, outside 0..3; check num_classes"),
        ({"num_classes": 1, "labels": None}, ValueError, "num_classes is 1; it must be at least 2"),
        ({"num_classes": 4.0}, TypeError, "num_classes must be a whole number, got 4.0"),
        ({"prior_precision": 0.0}, ValueError, "prior_precision is 0.0; it must be positive and finite"),
        ({"prior_precision": -1.0}, ValueError, "prior_precision is -1.0"),
        ({"prior_precision": "evidence"}, TypeError, "prior_precision must be one positive number, got 'evidence'"),
        ({"prior_precision": torch.tensor(-1.0)}, ValueError, "prior_precision is -1.0; it must be positive"),
        ({"class_weights": [1, 2, 3, 4]}, TypeError, "class_weights must be a torch tensor, got list"),
        ({"class_weights": torch.ones(3)}, ValueError, r"class_weights must be \(4,\), one a class, got \(3,\)"),
        ({"class_weights": torch.tensor([1.0, 1, 1, -1])}, ValueError, "class_weights must be positive and finite"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    given = {"features": PHI, "labels": LABELS, "num_classes": K, "prior_precision": TAU} | change
    with pytest.raises(error, match=message):
        bc.last_layer(given.pop("features"), given.pop("labels"), **given)


def test_values_in_tensors_are_looked_at_only_while_pyro_validates():
    with pyro.validation_enabled(False):
        weights = torch.tensor([1.0, 1, 1, -1])
        bc.last_layer(PHI, LABELS, num_classes=K, prior_precision=TAU, class_weights=weights)


def test_small_integer_types_are_labels_and_never_masks():
    """A uint8 tensor as an index is a mask to torch."""
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0])
    traces = [
        poutine.trace(pyro.poutine.seed(bc.last_layer, 0)).get_trace(
            PHI, labels, num_classes=K, prior_precision=TAU, class_weights=weights
        )
        for labels in (LABELS, LABELS.to(torch.uint8))
    ]
    torch.testing.assert_close(traces[1].log_prob_sum(), traces[0].log_prob_sum())


def test_a_batch_of_parameters_is_each_alone():
    phi, labels = torch.randn(N, D, dtype=torch.float64), torch.arange(N) % K
    images, theta = check_images(phi, labels), torch.randn(2, 5, K, D + 1, dtype=torch.float64)
    value, gradient = negative_log_joint(theta, images, TAU)
    assert value.shape == (2, 5)
    alone = negative_log_joint(theta[1, 2], images, TAU)
    torch.testing.assert_close(value[1, 2], alone[0])
    torch.testing.assert_close(gradient[1, 2], alone[1])
    assert augment(phi).shape == (N, D + 1)
