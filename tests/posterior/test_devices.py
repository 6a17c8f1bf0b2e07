"""Every sum and every covariance stays on the device it was given, without a GPU: tensors that only claim to be there.

Fake tensors carry a device, a type and a shape, and no numbers; an operation that mixes devices raises. What reads
numbers back (``float``, ``bool``) ends a fake run, so the fits themselves are tested under the marker ``gpu``.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bayescam.posterior.covariance import DiagCovariance, FullCovariance, KronCovariance, centring, contrast_basis
from bayescam.posterior.curvature import (
    class_curvature,
    diag_covariance,
    feature_gram,
    hessian_product,
    pair_grams,
    pair_products,
    probabilities_at,
)
from bayescam.posterior.expectations import LogitRule, NormalRule, logit_scales, moments
from bayescam.posterior.images import TrainingImages, augment, check_images
from bayescam.posterior.kronecker import projected_factors
from bayescam.posterior.model import negative_log_joint
from bayescam.posterior.nuts_potential import whitening_basis
from bayescam.posterior.predictive import laplace_bridge, pairwise_probit

N, D, K = 12, 5, 4
E, M = D + 1, (K - 1) * (D + 1)
THERE = torch.device("cuda:0")


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def images(request):
    with FakeTensorMode():
        phi = torch.empty(N, D, dtype=request.param, device=THERE)
        labels = torch.empty(N, dtype=torch.int64, device=THERE)
        yield TrainingImages(phi, labels, K, torch.empty(N, dtype=torch.float64, device=THERE))


def covariance(structure):
    def there(*shape):
        return torch.empty(*shape, dtype=torch.float64, device=THERE)

    if structure == "full":
        return FullCovariance(there(M, M), 1.0, K)
    if structure == "kron":
        return KronCovariance(there(K, K - 1), there(K - 1), there(E, E), there(E), 1.0)
    return DiagCovariance(there(K, E), 1.0)


def is_there(*tensors, dtype=torch.float64):
    for tensor in tensors:
        assert tensor.device == THERE
        assert tensor.dtype == dtype


def test_sums_over_images_stay_there_and_are_float64(images):
    theta = torch.empty(K, E, dtype=torch.float64, device=THERE)
    is_there(*negative_log_joint(theta, images, 1.0))
    is_there(hessian_product(probabilities_at(theta, images), theta, images, 1.0))
    is_there(feature_gram(images))
    is_there(class_curvature(images, probabilities_at(theta, images)))
    is_there(diag_covariance(images, probabilities_at(theta, images), 1.0).precision)
    if images.dtype == torch.float64:  # in float32 the images that matter are looked up: a shape that hangs on numbers
        proba = probabilities_at(theta, images)
        is_there(pair_grams(images, lambda span, phi: pair_products(proba(span, phi)), 1.0))


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_a_covariance_and_what_is_asked_of_it_stay_there(images, structure):
    sigma = covariance(structure)
    x, a = augment(images.features), torch.empty(K, device=THERE)
    is_there(sigma.bilinear(a, a, x.double(), x.double()), sigma.logit_covariance(x), sigma.diagonal())
    is_there(sigma.variance(x, centring(K, like=sigma.diagonal())), whitening_basis(sigma))
    is_there(sigma.unwhiten(torch.empty_like(sigma.whiten_gradient(sigma.diagonal()))))
    is_there(pairwise_probit(x.double() @ sigma.diagonal().T, sigma.logit_covariance(x)))
    is_there(laplace_bridge(x.double() @ sigma.diagonal().T, sigma.logit_covariance(x)))


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_expectations_stay_there_in_the_images_type(images, structure):
    sigma = covariance(structure)
    normal = NormalRule(torch.empty(8, sigma.logit_rank, dtype=torch.float64), torch.empty(8, dtype=torch.float64))
    rule = LogitRule(normal, torch.empty(len(images.labels), dtype=images.dtype, device=THERE))
    scales = logit_scales(images, sigma)
    is_there(scales, dtype=images.dtype)
    theta = torch.empty(K, E, dtype=torch.float64, device=THERE)
    found = moments(images, theta, sigma, scales, rule)
    is_there(found.variances, dtype=images.dtype)
    if found.products is not None:
        is_there(found.products, dtype=images.dtype)
        is_there(projected_factors(images, sigma, found.products))


def test_mps_is_refused_in_words():
    with FakeTensorMode(), pytest.raises(ValueError, match="mps, which has no float64"):
        check_images(torch.empty(3, 2, device="mps"), torch.empty(3, dtype=torch.int64))


@pytest.mark.parametrize("make", [contrast_basis, centring])
def test_bases_follow_their_model(make):
    with FakeTensorMode():
        is_there(make(K, like=torch.empty(1, device=THERE)), dtype=torch.float32)


def test_fake_tensors_do_refuse_a_mix():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.empty(2, device=THERE).add_(torch.empty(2))
