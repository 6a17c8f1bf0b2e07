"""The walked potentials against the model's own density and autograd."""

import math

import pytest
import torch
from torch.distributions import Gamma

from bayescam.posterior.covariance import contrast_basis
from bayescam.posterior.hierarchical import HierarchicalPotential
from bayescam.posterior.images import TrainingImages, check_images
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.model import log_prior, negative_log_joint
from bayescam.posterior.nuts_potential import SoftmaxLikelihood, WhitenedPotential, whitening_basis


def data(n=90, d=3, k=4, dtype=torch.float64):
    torch.manual_seed(1)
    features = torch.randn(n, d, dtype=torch.float64).abs()
    labels = torch.distributions.Categorical(logits=features @ torch.randn(d, k).double() * 2).sample()
    return features.to(dtype), labels


def potentials(structure="full", class_weights=None, dtype=torch.float64, chunked=False):
    features, labels = data(dtype=dtype)
    images = check_images(features, labels, num_classes=4, class_weights=class_weights)
    laplace = fit_laplace(
        features.double(), labels, num_classes=4, prior_precision=0.7, structure=structure, class_weights=class_weights
    )
    mean = laplace.theta_mean - laplace.theta_mean.mean(0)
    likelihood = SoftmaxLikelihood(images)
    if chunked:
        likelihood._held = [likelihood._prepare(s, phi) for s, phi in images.chunks(rows=17)]
    basis = whitening_basis(laplace.covariance)
    flat = WhitenedPotential(likelihood, mean=mean, basis=basis, prior_precision=0.7)
    deep = HierarchicalPotential(likelihood, mean=mean, basis=basis, prior_precision=0.7, tau_prior=(1.5, 0.4))
    return laplace, images, flat, deep


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_whitening_basis_squares_to_the_contrast_covariance(structure):
    laplace, *_ = potentials(structure)
    basis = whitening_basis(laplace.covariance)
    covariance = laplace.covariance
    eye = torch.eye(4, dtype=torch.float64)
    rows = [[covariance.bilinear(a, b, eye, eye) for b in eye] for a in eye]
    raw = torch.cat([torch.cat(row, 1) for row in rows])
    project = torch.kron(contrast_basis(4), eye)
    expected = project @ (project.T @ raw @ project) @ project.T
    if structure == "diag":
        expected_sd = (project.T @ raw @ project).diagonal().sqrt()
        torch.testing.assert_close((project.T @ basis).diagonal(), expected_sd)
    else:
        torch.testing.assert_close(basis @ basis.T, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(basis.view(4, 4, -1).sum(0), torch.zeros(4, 12).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1.0, 2.0, 3.0])])
@pytest.mark.parametrize("chunked", [False, True])
def test_log_joint_is_the_models_up_to_the_shifts_prior(class_weights, chunked):
    _, images, flat, _ = potentials(class_weights=class_weights, chunked=chunked)
    for _ in range(5):
        z = 2 * torch.randn(flat.dimension, dtype=torch.float64)
        value, _ = flat.value_and_gradient(z)
        theta, tau, lp = flat.unpack(z[None], torch.tensor([value], dtype=torch.float64))
        shift = torch.randn(4, dtype=torch.float64)
        whole, _ = negative_log_joint(theta[0] + shift / 2, images, 0.7)  # 1/sqrt(K) = 1/2
        shift_prior = log_prior(shift, 0.7)
        assert (lp + shift_prior).item() == pytest.approx(-whole.item(), rel=1e-12)
        assert tau.item() == 0.7


def test_hierarchical_log_joint_and_jacobian():
    _, images, _, deep = potentials()
    z = torch.randn(deep.dimension, dtype=torch.float64)
    value, _ = deep.value_and_gradient(z)
    theta, tau, lp = deep.unpack(z[None], torch.tensor([value], dtype=torch.float64))
    whole, _ = negative_log_joint(theta[0], images, tau.item())
    shift_density_at_zero = 4 * 0.5 * math.log(tau.item() / (2 * math.pi))
    expected = -whole.item() - shift_density_at_zero + Gamma(1.5, torch.tensor(0.4)).log_prob(tau).item()
    assert lp.item() == pytest.approx(expected, rel=1e-6)

    contrast = torch.kron(contrast_basis(4), torch.eye(4, dtype=torch.float64))

    def walked_to_parameters(x):
        t = deep._tau(x[-1])
        coordinates, _ = deep._coordinates(x[:-1], t)
        return torch.cat([contrast.T @ deep._vectors @ coordinates, t[None]])

    jacobian = torch.autograd.functional.jacobian(walked_to_parameters, z)
    log_det = torch.linalg.slogdet(jacobian).logabsdet.item() - math.log(deep._scale)
    assert -value == pytest.approx(lp.item() + log_det, rel=1e-9)


@pytest.mark.parametrize("which", [2, 3])
def test_gradient_equals_finite_differences_and_pyros_autograd_route(which):
    potential = potentials()[which]
    z = torch.randn(potential.dimension, dtype=torch.float64, requires_grad=True)
    _, gradient = potential.value_and_gradient(z.detach())
    (by_autograd,) = torch.autograd.grad(potential({"z": z}), z)
    torch.testing.assert_close(gradient, by_autograd)
    step = 1e-5
    for i in range(potential.dimension):
        e = torch.zeros_like(z.detach())
        e[i] = step
        up, down = potential.value_and_gradient(z.detach() + e)[0], potential.value_and_gradient(z.detach() - e)[0]
        assert gradient[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("which", [2, 3])
def test_float32_products_move_the_energy_by_less_than_a_ten_thousandth(which):
    fine, coarse = potentials()[which], potentials(dtype=torch.float32)[which]
    for _ in range(20):
        z = 1.5 * torch.randn(fine.dimension, dtype=torch.float64)
        exact, slope = fine.value_and_gradient(z)
        rounded, rough = coarse.value_and_gradient(z)
        assert abs(exact - rounded) < 1e-4
        torch.testing.assert_close(slope, rough, rtol=1e-4, atol=1e-3)  # in sds
        assert rough.dtype == torch.float64


def test_map_is_the_origin_and_the_whitened_curvature_is_one():
    laplace, _, flat, _ = potentials()
    _, gradient = flat.value_and_gradient(torch.zeros(flat.dimension, dtype=torch.float64))
    assert gradient.norm().item() == pytest.approx(laplace.newton_decrement, rel=1e-2)
    here = flat.value_and_gradient(torch.zeros(flat.dimension, dtype=torch.float64))[0]
    z = 0.02 * torch.randn(flat.dimension, dtype=torch.float64)
    above = flat.value_and_gradient(z)[0] - here
    assert above == pytest.approx(0.5 * z.square().sum().item(), rel=0.05)


def test_non_finite_potential_is_infinite_energy():
    _, _, flat, _ = potentials()
    value, _ = flat.value_and_gradient(torch.full((flat.dimension,), 1e300, dtype=torch.float64))
    assert not math.isfinite(value)


def test_images_that_do_not_fit_the_memory_are_read_at_each_call(monkeypatch):
    features, labels = data()
    images = check_images(features, labels, num_classes=4)
    theta = torch.randn(4, 4, dtype=torch.float64)
    value, gradient = SoftmaxLikelihood(images).value_and_gradient(theta)
    monkeypatch.setattr("bayescam.posterior.nuts_potential.memory", lambda device: 8.0)
    monkeypatch.setattr("bayescam.posterior.images.TrainingImages.chunks", _in_small_chunks(reads := []))
    likelihood = SoftmaxLikelihood(images)
    assert not reads
    for _ in range(2):
        again, slope = likelihood.value_and_gradient(theta)
        assert again == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(slope, gradient)
    assert len(reads) == 2


def _in_small_chunks(reads):
    whole = TrainingImages.chunks

    def chunks(self, rows=None):
        reads.append(rows)
        return whole(self, 17)

    return chunks
