"""The one density: Pyro's trace, the closed form and autograd give the same number."""

from __future__ import annotations

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


def test_a_batch_of_parameters_is_each_alone():
    phi, labels = torch.randn(N, D, dtype=torch.float64), torch.arange(N) % K
    images, theta = check_images(phi, labels), torch.randn(2, 5, K, D + 1, dtype=torch.float64)
    value, gradient = negative_log_joint(theta, images, TAU)
    assert value.shape == (2, 5)
    alone = negative_log_joint(theta[1, 2], images, TAU)
    torch.testing.assert_close(value[1, 2], alone[0])
    torch.testing.assert_close(gradient[1, 2], alone[1])
    assert augment(phi).shape == (N, D + 1)
