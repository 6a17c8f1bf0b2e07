"""k-hat and KL of Gaussians against quadrature over the whole posterior."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import bayescam as bc
from bayescam.diagnose.density import log_density, log_weight
from bayescam.diagnose.importance import good_khat, importance, importances, log_ratios
from bayescam.posterior.covariance import contrast_basis
from bayescam.posterior.images import check_images
from bayescam.posterior.model import log_prior, negative_log_joint

TAU, D = 0.3, 1


def problem(classes, images=24):
    generator = torch.Generator().manual_seed(classes)
    features = torch.randn(images, D, generator=generator, dtype=torch.float64)
    truth = 3 * torch.linspace(-1, 1, classes, dtype=torch.float64)
    labels = torch.multinomial((features * truth).softmax(1), 1, generator=generator)[:, 0]
    labels[:classes] = torch.arange(classes)
    return features, labels


def gaussians(features, labels, classes):
    fits = {s: bc.fit_laplace(features, labels, num_classes=classes, prior_precision=TAU, structure=s) for s in FITS}
    return fits | {"refined": fits["full"].refine(features, labels)}


FITS = ("full", "kron", "diag")


def contrasts(gaussian):
    """Mean (M,) and covariance (M, M) of eta = Q^T theta, from the structure's own bilinear form."""
    k, basis = gaussian.num_classes, contrast_basis(gaussian.num_classes)
    eye = torch.eye(D + 1, dtype=torch.float64)
    columns = [basis[:, j] for j in range(k - 1)]
    rows = [torch.cat([gaussian.covariance.bilinear(a, b, eye, eye) for b in columns], 1) for a in columns]
    return (basis.T @ gaussian.theta_mean).flatten(), torch.cat(rows)


def log_joint(eta, classes, images):
    theta = contrast_basis(classes) @ eta.unflatten(-1, (classes - 1, D + 1))
    at_no_shift = log_prior(torch.zeros(D + 1, dtype=torch.float64), TAU)
    return torch.cat([-negative_log_joint(part, images, TAU)[0] for part in theta.split(20_000)]) - at_no_shift


def under(gaussian, nodes):
    """Nodes eta, weights and log q of a Gauss-Hermite rule for E_q."""
    mean, covariance = contrasts(gaussian)
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    size = len(mean)
    z = torch.tensor(list(itertools.product(points, repeat=size)), dtype=torch.float64)
    mass = torch.tensor([math.prod(w) for w in itertools.product(weights, repeat=size)], dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    log_q = -0.5 * z.square().sum(1) - 0.5 * size * math.log(2 * math.pi) - factor.diagonal().log().sum()
    return mean + z @ factor.T, mass / mass.sum(), log_q


@pytest.fixture(scope="module", params=[2, 3])
def exact(request):
    """K classes: the images, the Gaussians, log Z and KL(q || posterior) of each by quadrature."""
    k = request.param
    features, labels = problem(k)
    images, found = check_images(features, labels, num_classes=k), gaussians(features, labels, k)
    eta, mass, log_q = under(found["refined"], 60 if k == 2 else 15)
    evidence = torch.logsumexp(mass.log() + log_joint(eta, k, images) - log_q, 0).item()
    if k == 2:  # the rule has seen the tails: a plain grid says the same
        axis = torch.linspace(-14, 14, 281, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        area = 2 * math.log(float(axis[1] - axis[0]))
        assert torch.logsumexp(log_joint(grid, k, images), 0).item() + area == pytest.approx(evidence, abs=1e-3)
    kl = {}
    for name, gaussian in found.items():
        eta, mass, log_q = under(gaussian, 40 if k == 2 else 13)
        kl[name] = evidence - float((mass * (log_joint(eta, k, images) - log_q)).sum())
    return images, found, evidence, kl


def test_kl_is_the_quadratures(exact):
    images, found, evidence, kl = exact
    measured = importances(found, images, num_batches=4, num_draws=2000, seed=1)
    for name, one in measured.items():
        assert not one.kl_is_lower_bound
        assert one.log_evidence == pytest.approx(evidence, abs=0.05)
        assert one.kl == pytest.approx(kl[name], abs=4 * one.kl_error)
        assert one.kl_error < 0.1
        assert one.num_parameters == (found[name].num_classes - 1) * (D + 1)
    # Half the variance of the log ratio is another number.
    assert any(abs(0.5 * one.sd**2 - kl[name]) > 20 * one.kl_error for name, one in measured.items())
    assert kl["refined"] < kl["full"] < kl["diag"]


def test_where_no_weights_are_good_the_kl_is_a_bound_and_says_so():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    labels = (features[:, :4] + 0.3 * torch.randn(60, 4, generator=generator, dtype=torch.float64)).argmax(1)
    laplace = bc.fit_laplace(features, labels, num_classes=4, prior_precision=0.05)
    images, refined = check_images(features, labels, num_classes=4), laplace.refine(features, labels)
    alone = importance(laplace, images, num_draws=50)
    beside = importances({"laplace": laplace, "refined": refined}, images, num_draws=50)["laplace"]
    assert min(alone.khat) > good_khat(50)
    assert (alone.evidence_from, alone.kl_is_lower_bound) == ("laplace", True)
    assert beside.evidence_from == "refined"
    assert 0 < alone.kl < beside.kl - 2
    assert beside.log_evidence > laplace.log_evidence  # the posterior is wider than its Gaussian at the mode


def test_log_ratios_are_of_the_contrasts_density(exact):
    images, found, _, _ = exact
    for gaussian in found.values():
        k, draws = gaussian.num_classes, gaussian.sample(50, seed=3)
        theta = torch.cat([draws.weight[0], draws.bias[0][..., None]], -1)
        eta = (contrast_basis(k).T @ theta).flatten(1)
        mean, covariance = contrasts(gaussian)
        log_q = torch.distributions.MultivariateNormal(mean, covariance).log_prob(eta)
        joint = -negative_log_joint(theta, images, TAU)[0]
        torch.testing.assert_close(log_weight(gaussian, theta, joint), log_joint(eta, k, images) - log_q)
        if gaussian.structure != "diag":  # the shift under q is the prior's: nothing changes without it
            torch.testing.assert_close(log_weight(gaussian, theta, joint), joint - log_density(gaussian, theta))


def test_ratios_in_batches_are_as_many_as_asked_for():
    features, labels = problem(2)
    laplace = bc.fit_laplace(features, labels, num_classes=2, prior_precision=TAU)
    images = check_images(features, labels, num_classes=2)
    ratios = log_ratios(laplace, images, 130, seed=0)
    assert ratios.shape == (130,)
    assert len(set(ratios)) == 130


def test_the_shape_that_can_be_trusted():
    assert good_khat(250) == pytest.approx(1 - 1 / math.log10(250))
    assert good_khat(10_000) == 0.7
    assert good_khat(1) == -math.inf
