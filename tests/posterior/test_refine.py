"""Variational Newton: its rule, its ELBO, the gradients it stands on, its fixed point."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad

import bayescam as bc
from bayescam.posterior.covariance import contrast_basis
from bayescam.posterior.curvature import full_covariance
from bayescam.posterior.expectations import (
    LogitRule,
    expected_loss,
    logistic_moments,
    logit_rule,
    logit_scales,
    moments,
    normal_rule,
)
from bayescam.posterior.images import augment, check_images
from bayescam.posterior.laplace import STRUCTURES
from bayescam.posterior.refine import MAX_CURVATURES, TOLERANCES, _pull, elbo, maximise_mean

TAU = 0.3
SLOW_STRUCTURES = ("full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kron", "diag")))


def problem(num_images=40, num_features=2, num_classes=3):
    generator = torch.Generator().manual_seed(5)
    phi = torch.randn(num_images, num_features, dtype=torch.float64, generator=generator)
    truth = 3 * torch.randn(num_features, num_classes, dtype=torch.float64, generator=generator)
    uniform = torch.rand(num_images, num_classes, dtype=torch.float64, generator=generator)
    return phi, (phi @ truth - (-uniform.log()).log()).argmax(1)


def clusters(num_images=300, num_features=16, num_classes=6, dtype=torch.float64):
    """Nearly separable classes, as a trained network's features are: the posterior is far from Laplace's."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(num_images) % num_classes
    centres = 3 * torch.rand(num_classes, num_features, dtype=torch.float64, generator=generator)
    noise = torch.randn(num_images, num_features, dtype=torch.float64, generator=generator)
    return torch.relu(centres[labels] + noise).to(dtype), labels


def fitted(structure="full", **sizes):
    phi, labels = problem(**sizes)
    return phi, labels, bc.fit_laplace(phi, labels, prior_precision=TAU, structure=structure)


def test_sobol_rule_has_the_moments_of_a_normal():
    rule = normal_rule(4, 2048)
    assert float((rule.weights @ rule.points).abs().max()) < 1e-12
    for tails in (False, True):
        rule = normal_rule(4, 256, tails=tails)
        second = rule.points.T @ (rule.weights[:, None] * rule.points)
        torch.testing.assert_close(second, torch.eye(4, dtype=torch.float64))
        fourth = rule.weights @ rule.points.pow(4)
        torch.testing.assert_close(fourth, torch.full((4,), 3.0, dtype=torch.float64), rtol=0.15, atol=0)
    with pytest.raises(ValueError, match="num_points is 3"):
        normal_rule(2, 3)


@pytest.mark.parametrize("sd", [0.0, 0.3, 3.0, 30.0])
def test_logistic_moments_are_the_integrals(sd):
    """Against the trapezoidal rule with 40,000 points, and each the derivative of the one before in the mean."""
    mean = torch.tensor([-40.0, -3.0, 0.0, 0.5, 20.0], dtype=torch.float64)
    z = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    density = (-0.5 * z * z).exp() / (-0.5 * z * z).exp().sum()
    x = mean[:, None] + sd * z
    soft, step, slope = logistic_moments(mean, torch.full_like(mean, sd**2))
    torch.testing.assert_close(soft, torch.nn.functional.softplus(x) @ density, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(step, x.sigmoid() @ density, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(slope, (x.sigmoid() * (1 - x.sigmoid())) @ density, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rule_s_error_is_small_for_confident_images(structure):
    """Loss and gradient by 256 points against 16,384 without the pairs, where few images err and then by far."""
    phi, labels = clusters(120)
    fit = bc.fit_laplace(phi, labels, prior_precision=0.1, structure=structure)
    images, theta = check_images(phi, labels), 4 * fit.theta_mean
    scales = logit_scales(images, fit.covariance)
    rule = logit_rule(images, fit.theta_mean, fit.covariance, 256, 0)
    many = LogitRule(normal_rule(fit.covariance.logit_rank, 1 << 14, tails=True), torch.zeros_like(rule.shares))
    loss, gradient = expected_loss(images, theta, fit.covariance, scales, rule)
    expected, slope = expected_loss(images, theta, fit.covariance, scales, many)
    error = float(fit.covariance.whiten_gradient(gradient - slope).norm())
    print(f"{structure}: loss {expected:.4f}, error {loss - expected:+.4f}, gradient's {error:.4f} sds")
    assert loss == pytest.approx(expected, rel=0.01)
    assert error < 0.1


def test_expectations_against_two_dimensional_quadrature():
    """K = 3: E[log p] and E[p_a p_b] of one image, integrated over the two contrasts."""
    phi, labels, fit = fitted()
    images = check_images(phi[:1], labels[:1], num_classes=3)
    rule, theta = logit_rule(images, fit.theta_mean, fit.covariance, 1 << 14, 0), fit.theta_mean
    scales = logit_scales(images, fit.covariance)
    loss, _ = expected_loss(images, theta, fit.covariance, scales, rule)
    products = moments(images, theta, fit.covariance, scales, rule).products
    root = fit.covariance.basis @ scales[0]
    centre = theta @ augment(phi[0])

    def integral(function):
        def integrand(v, u):
            logits = centre + root @ torch.tensor([u, v], dtype=torch.float64)
            return math.exp(-(u * u + v * v) / 2) / (2 * math.pi) * float(function(logits.log_softmax(0)))

        return dblquad(integrand, -6, 6, -6, 6, epsabs=1e-5, epsrel=1e-5)[0]

    assert loss == pytest.approx(-integral(lambda log_p: log_p[labels[0]]), rel=2e-3)
    assert float(products[0, 1]) == pytest.approx(integral(lambda log_p: (log_p[0] + log_p[2]).exp()), rel=5e-3)


def logistic_softplus(mean, variance):
    """E[log(1 + e^x)] by the trapezoidal rule, for autodiff."""
    z = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    density = (-0.5 * z * z).exp() / (-0.5 * z * z).exp().sum()
    return torch.nn.functional.softplus(mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * z) @ density


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradient_in_the_mean_is_autodiff_s(structure):
    phi, labels, fit = fitted(structure)
    images = check_images(phi, labels)
    rule, scales = logit_rule(images, fit.theta_mean, fit.covariance, 64, 0), logit_scales(images, fit.covariance)
    theta = fit.theta_mean.clone().requires_grad_()
    mean, label = augment(phi) @ theta.T, labels[:, None]
    logits = mean.unsqueeze(-1) + fit.covariance.perturb(scales, rule.normal.points)
    exact = logits.log_softmax(1)[torch.arange(len(phi)), labels] @ rule.normal.weights
    margins = logits - logits[torch.arange(len(phi)), labels].unsqueeze(1)
    variance = fit.covariance.relative_variance(scales, labels)
    pairs = logistic_softplus(mean - mean.gather(1, label), variance)
    pairs = pairs - torch.nn.functional.softplus(margins) @ rule.normal.weights
    loss = (rule.shares * pairs.scatter(1, label, 0.0).sum(1) - exact).sum()
    loss.backward()
    value, gradient = expected_loss(images, fit.theta_mean, fit.covariance, scales, rule)
    assert value == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(gradient, theta.grad)


def test_gradient_in_the_covariance_is_price_s_theorem():
    """dELBO/dSigma = (Sigma^-1 - E_q[H]) / 2, against the ELBO of a scaled covariance (K = 2)."""
    phi, labels, fit = fitted(num_classes=2)
    images, covariance = check_images(phi, labels), fit.covariance
    rule = logit_rule(images, fit.theta_mean, covariance, 2, 0)

    def bound(scale):
        scaled = type(covariance)(covariance.precision_cholesky / scale**0.5, TAU, 2)
        loss, _ = expected_loss(images, fit.theta_mean, scaled, logit_scales(images, scaled), rule)
        return elbo(images, fit.theta_mean, scaled, loss, TAU)

    found = moments(images, fit.theta_mean, covariance, logit_scales(images, covariance), rule).products
    expected_hessian = full_covariance(images, lambda span, _: found[span], TAU).precision_cholesky
    inverse = torch.linalg.inv(covariance.precision_cholesky)
    mismatch = len(inverse) - float((inverse @ expected_hessian).square().sum())
    step = 1e-4
    assert (bound(1 + step) - bound(1 - step)) / (2 * step) == pytest.approx(mismatch / 2, rel=1e-4, abs=1e-6)


def test_elbo_is_exact_for_one_contrast_by_quadrature_and_below_the_evidence():
    """K = 2, D = 1: log p(y) by integration; evidence - 0.2 < ELBO of the refined posterior < evidence."""
    phi, labels, fit = fitted(num_classes=2, num_features=1)
    sign = (2 * labels - 1).double()
    refined = fit.refine(phi, labels)

    def density(w, b):
        log = float(torch.nn.functional.logsigmoid(sign * math.sqrt(2) * (w * phi[:, 0] + b)).sum())
        return math.exp(log - TAU / 2 * (w * w + b * b) + math.log(TAU / (2 * math.pi)) - fit.log_evidence)

    ratio, _ = dblquad(density, -6, 6, -8, 8, epsrel=1e-3, epsabs=1e-3)
    evidence = fit.log_evidence + math.log(ratio)
    assert evidence - 0.2 < refined.elbo < evidence + 1e-3


def test_refined_is_the_fixed_point():
    """K = 2, where the rule is exact: the gradients in mean and covariance vanish."""
    phi, labels, fit = fitted(num_classes=2)
    refined = fit.refine(phi, labels)
    images, covariance = check_images(phi, labels), refined.covariance
    rule = logit_rule(images, fit.theta_mean, covariance, 2, 0)
    scales = logit_scales(images, covariance)
    _, gradient = expected_loss(images, refined.theta_mean, covariance, scales, rule)
    assert float(covariance.whiten_gradient(gradient + TAU * refined.theta_mean).norm()) < 5e-3
    found = moments(images, refined.theta_mean, covariance, scales, rule).products
    expected_hessian = full_covariance(images, lambda span, _: found[span], TAU).precision_cholesky
    inverse = torch.linalg.inv(covariance.precision_cholesky)
    whitened = inverse @ expected_hessian @ expected_hessian.T @ inverse.T
    torch.testing.assert_close(whitened, torch.eye(len(inverse), dtype=torch.float64), rtol=0, atol=0.01)
    assert refined.refinement.rule_error < 1e-8


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_elbo_never_falls_and_the_shift_stays_the_prior(structure, num_classes):
    phi, labels, fit = fitted(structure, num_classes=num_classes)
    refined = fit.refine(phi, labels)
    record = refined.refinement
    assert refined.refined
    assert refined.structure == structure
    assert list(record.elbo) == sorted(record.elbo)
    assert record.elbo[-1] > record.elbo[0]
    assert refined.elbo == record.elbo[-1]
    assert record.curvatures <= MAX_CURVATURES
    assert record.converged
    assert record.rule_error < 0.02
    assert record.mean_change < TOLERANCES[0]
    assert record.sd_change < TOLERANCES[1]
    assert abs(record.elbo_change) < TOLERANCES[2]
    if structure != "diag":
        shift = torch.ones(num_classes) / num_classes**0.5
        x = augment(phi[:4])
        torch.testing.assert_close(refined.covariance.variance(x, shift[None])[:, 0], x.square().sum(1) / TAU)


@pytest.mark.parametrize("structure", SLOW_STRUCTURES)
def test_separable_images_reach_the_fixed_point(structure):
    """One plain step from the end, rebuilt by hand with other points, changes nothing that matters."""
    phi, labels = clusters(150, 12)
    check_fixed_point(phi, labels, structure)


@pytest.mark.slow
def test_kron_s_steps_do_not_stall_on_the_rule():
    """Once eigenvectors' signs decided which points were used: steps kept until the rule's error outweighed them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (100,), generator=generator)
    centres = 4 * torch.randn(5, 12, generator=generator)
    phi = torch.relu(centres[labels] + torch.randn(100, 12, generator=generator))
    record = check_fixed_point(phi, labels, "kron", tau=0.01)
    assert len(record.elbo) == record.curvatures + 1


@pytest.mark.parametrize("structure", SLOW_STRUCTURES)
def test_the_fixed_point_is_the_same_from_a_worse_start(structure):
    """The ELBO is concave in the mean and the Cholesky factor ("kron": found so): from Laplace's at 100 times tau."""
    phi, labels, fit = fitted(structure)
    far = bc.fit_laplace(phi, labels, prior_precision=100 * TAU, structure=structure)
    far = replace(far, prior_precision=TAU, covariance=replace(far.covariance, prior_precision=TAU))
    near, again = fit.refine(phi, labels), far.refine(phi, labels)
    assert again.refinement.elbo[0] < near.refinement.elbo[0]
    assert again.elbo == pytest.approx(near.elbo, abs=0.01)
    assert near.covariance.distance(again.theta_mean - near.theta_mean) < 0.05


def test_a_second_refinement_changes_nothing():
    phi, labels, fit = fitted()
    once = fit.refine(phi, labels)
    twice = once.refine(phi, labels)
    assert twice.refinement.curvatures == 1
    assert twice.elbo == pytest.approx(once.elbo, abs=0.005)


def test_steps_that_grow_are_no_pull(monkeypatch):
    """A step more than twice as long as the one before would ask for a next one of negative length."""
    phi, labels = clusters(150, 12)
    monkeypatch.setattr("bayescam.posterior.refine._pull", lambda *_: -3.0)
    assert bc.fit_laplace(phi, labels, prior_precision=0.1).refine(phi, labels).refinement.converged


def test_what_stops_short_says_so_and_what_to_do(monkeypatch):
    phi, labels = clusters(150, 12)
    monkeypatch.setattr("bayescam.posterior.refine.MAX_CURVATURES", 1)
    refined = bc.fit_laplace(phi, labels, prior_precision=0.1).refine(phi, labels)
    assert not refined.refinement.converged
    assert "stopped after 1 curvatures short of its fixed point" in refined.notes[-1]
    assert refined.notes[-1].endswith("nats; refine the result again")
    monkeypatch.undo()
    again = refined.refine(phi, labels)
    assert again.refinement.converged
    assert not any("refinement stopped" in note for note in again.notes)


@pytest.mark.slow
def test_a_rule_that_is_too_coarse_says_so():
    """What the rule's error is said to be is what it is: against 16,384 points."""
    phi, labels = problem(60, 4, 16)
    refined = bc.fit_laplace(phi, labels, num_classes=16, prior_precision=0.1).refine(phi, labels, num_points=128)
    images = check_images(phi, labels, num_classes=16)
    many = LogitRule(normal_rule(refined.covariance.logit_rank, 1 << 14, seed=5), torch.zeros(60).double())
    scales = logit_scales(images, refined.covariance)
    loss, _ = expected_loss(images, refined.theta_mean, refined.covariance, scales, many)
    error = abs(refined.elbo - elbo(images, refined.theta_mean, refined.covariance, loss, 0.1))
    assert error > 0.2
    assert refined.refinement.rule_error == pytest.approx(error, rel=0.35)
    assert "give refine more num_points than 128" in refined.notes[-1]


def test_more_pairs_than_memory_holds_are_refused(monkeypatch):
    phi, labels, fit = fitted("kron")
    monkeypatch.setattr("bayescam.posterior.refine.memory", lambda _: 1000.0)
    with pytest.raises(ValueError, match=r"structure 'kron' needs .* GiB for 3 classes of 2 features and 40 images"):
        fit.refine(phi, labels)


@pytest.mark.slow
def test_a_confident_network_s_features_reach_the_fixed_point():
    """N = 450, D = 96, K = 6 in float32, much like those of ``scripts/real_features.py``."""
    check_fixed_point(*clusters(450, 96, 6, torch.float32), "full")


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "kron"])
def test_whole_steps_that_overshoot_are_damped(structure):
    """Separable images at a weak prior, where every second whole step would lower the ELBO: few builds all the same."""
    record = check_fixed_point(*clusters(150, 24, 6, torch.float32), structure, tau=0.01)
    assert record.curvatures <= 10
    assert len(record.elbo) >= record.curvatures


def test_the_pull_is_what_a_step_leaves_of_the_one_before():
    phi, labels = problem()
    images, before = check_images(phi, labels), torch.randn(40, 3, dtype=torch.float64)
    before[0] = math.nan
    for step, pull in ((1.0, 0.8), (0.5, 2.5), (0.25, 3.0)):
        assert _pull(images, (1 - step * pull) * before, (before, step)) == pytest.approx(pull)


def quadrature_elbo(images, theta, covariance, tau):
    """The ELBO of any Gaussian for K = 3 by 60 x 60 Gauss-Hermite points: covariance (3(D+1), 3(D+1)), class-major."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    points = torch.cartesian_prod(nodes, nodes).T
    weights = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    rows, basis = augment(images.features), contrast_basis(3)
    blocks = covariance.unflatten(1, (3, -1)).unflatten(0, (3, -1))
    spread = torch.linalg.cholesky(basis.T @ torch.einsum("ne,keaf,nf->nka", rows, blocks, rows) @ basis)
    logits = (rows @ theta.T).unsqueeze(-1) + basis @ spread @ points
    log_p = logits.log_softmax(1)[torch.arange(len(rows)), images.labels] @ weights
    own = torch.ones_like(log_p) if images.image_weights is None else images.image_weights
    prior = tau * (theta.square().sum() + covariance.trace()) - theta.numel() * (1 + math.log(tau))
    return (own * log_p).sum() - (prior - covariance.logdet()) / 2


def structured(covariance):
    """The free parameters of a covariance (K = 3) and the dense covariance as a function of them."""
    basis, width, tau = contrast_basis(3), covariance.num_features + 1, covariance.prior_precision
    wide, eye = torch.kron(basis, torch.eye(width, dtype=torch.float64)), torch.eye(2 * width, dtype=torch.float64)
    shift = torch.kron(torch.ones(3, 3, dtype=torch.float64) / 3, torch.eye(width, dtype=torch.float64)) / tau
    if covariance.structure == "full":
        factor = covariance.precision_cholesky
        return [factor @ factor.T], lambda precision: wide @ precision.inverse() @ wide.T + shift
    if covariance.structure == "kron":
        v, u = basis.T @ covariance.class_vectors, covariance.feature_vectors
        factors = [(v * covariance.class_values) @ v.T, (u * covariance.feature_values) @ u.T]
        return factors, lambda b, a: wide @ (torch.kron(b, a) + tau * eye).inverse() @ wide.T + shift
    return [covariance.precision.flatten().diag()], lambda precision: precision.diagonal().reciprocal().diag()


@pytest.mark.parametrize("structure", SLOW_STRUCTURES)
@pytest.mark.parametrize("case", ["noisy", "separable", "absent class", "class weights", "one image"])
def test_the_exact_elbo_is_stationary_where_refine_ends(structure, case):
    """K = 3, by quadrature and autodiff, in the mean (posterior sds) and the structure's own parameters (relative)."""
    phi, labels = clusters(60, 8, 3) if case == "separable" else problem()
    phi, labels = (phi[:1], labels[:1]) if case == "one image" else (phi, labels)
    labels = labels.clamp(max=1) if case == "absent class" else labels
    weights = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64) if case == "class weights" else None
    tau = 0.003 if case == "separable" else TAU
    fit = bc.fit_laplace(phi, labels, num_classes=3, prior_precision=tau, structure=structure, class_weights=weights)
    refined, found = fit.refine(phi, labels), {}
    images = check_images(phi, labels, num_classes=3, class_weights=weights)
    for name, posterior in (("laplace", fit), ("refined", refined)):
        parameters, dense = structured(posterior.covariance)
        free = [posterior.theta_mean, *parameters]
        for one in free:
            one.requires_grad_()
        covariance = dense(*parameters)
        bound = quadrature_elbo(images, free[0], covariance, tau)
        slopes = torch.autograd.grad(bound, free)
        slope = slopes[0].flatten()
        found[name] = [bound.item(), math.sqrt(float(slope @ covariance.detach() @ slope))]
        for one, turn in zip(parameters, slopes[1:], strict=True):
            values, vectors = torch.linalg.eigh(one.detach())
            root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
            found[name].append(float((root @ (turn + turn.T) / 2 @ root).norm()))
    assert refined.refinement.converged
    assert refined.elbo == pytest.approx(found["refined"][0], abs=0.02)
    assert found["refined"][0] > found["laplace"][0]
    assert max(found["refined"][1:]) < 0.1


def check_fixed_point(phi, labels, structure, tau=0.1):
    fit = bc.fit_laplace(phi, labels, prior_precision=tau, structure=structure)
    refined = fit.refine(phi, labels)
    record = refined.refinement
    assert record.converged, record
    assert record.curvatures <= MAX_CURVATURES
    assert list(record.elbo) == sorted(record.elbo)
    assert not any("short of its fixed point" in note for note in refined.notes)
    images, covariance = check_images(phi, labels), refined.covariance
    rule = logit_rule(images, fit.theta_mean, covariance, 1024, 3)
    scales = logit_scales(images, covariance)
    if structure == "full":
        found = moments(images, refined.theta_mean, covariance, scales, rule).products
        covariance = full_covariance(images, lambda span, _: found[span], tau)
        scales = logit_scales(images, covariance)
    theta = maximise_mean(images, refined.theta_mean, covariance, scales, rule, tau)
    loss, _ = expected_loss(images, theta, covariance, scales, rule)
    assert covariance.distance(theta - refined.theta_mean) < 0.3
    assert elbo(images, theta, covariance, loss, tau) == pytest.approx(refined.elbo, rel=2e-3, abs=0.05)
    return record


def test_refined_is_closer_to_the_exact_predictive():
    """K = 2, D = 1: class probabilities by integrating the true posterior."""
    phi, labels, fit = fitted(num_classes=2, num_features=1, num_images=12)
    refined = fit.refine(phi, labels)
    grid = torch.linspace(-14, 14, 561, dtype=torch.float64)
    w, b = torch.meshgrid(grid, grid, indexing="ij")
    sign = (2 * labels - 1).double()
    log = -TAU / 2 * (w * w + b * b)
    for s, x in zip(sign, phi[:, 0], strict=True):
        log = log + torch.nn.functional.logsigmoid(s * math.sqrt(2) * (w * x + b))
    mass = (log - log.logsumexp((0, 1))).exp()
    points = torch.linspace(-3, 3, 13, dtype=torch.float64)
    exact = torch.stack([(mass * torch.sigmoid(math.sqrt(2) * (w * x + b))).sum() for x in points])
    errors = [float((f.predict_proba(points[:, None])[:, 1] - exact).abs().mean()) for f in (fit, refined)]
    assert errors[1] < errors[0]
    assert errors[1] < 0.02


def test_the_mean_is_the_best_for_its_covariance():
    phi, labels, fit = fitted("kron")
    images = check_images(phi, labels)
    rule = logit_rule(images, fit.theta_mean, fit.covariance, 256, 0)
    scales = logit_scales(images, fit.covariance)
    theta = maximise_mean(images, fit.theta_mean, fit.covariance, scales, rule, TAU)

    def bound(mean):
        loss, _ = expected_loss(images, mean, fit.covariance, scales, rule)
        return elbo(images, mean, fit.covariance, loss, TAU)

    best = bound(theta)
    assert best >= bound(fit.theta_mean)
    for _ in range(5):
        assert bound(theta + 0.1 * torch.randn_like(theta)) < best


def test_class_weights_are_repeated_images_in_the_refinement_too():
    phi, labels = problem()
    weights = torch.tensor([2.0, 1.0, 1.0])
    twice = labels == 0
    weighted = bc.fit_laplace(phi, labels, prior_precision=TAU, class_weights=weights).refine(phi, labels)
    more, again = torch.cat([phi, phi[twice]]), torch.cat([labels, labels[twice]])
    repeated = bc.fit_laplace(more, again, prior_precision=TAU).refine(more, again)
    assert weighted.elbo == pytest.approx(repeated.elbo, abs=0.02)


@pytest.mark.slow
def test_prior_precision_by_the_elbo_beats_its_neighbours():
    phi, labels = problem()
    chosen = bc.fit_laplace(phi, labels, prior_precision="elbo", bracket=(0.05, 5.0))
    bounds = [
        bc.fit_laplace(phi, labels, prior_precision=tau).refine(phi, labels).elbo
        for tau in (chosen.prior_precision * 0.5, chosen.prior_precision, chosen.prior_precision * 2)
    ]
    assert bounds[1] >= max(bounds) - 0.02


@pytest.mark.parametrize("structure", SLOW_STRUCTURES)
@pytest.mark.parametrize("spoil", ["absent class", "all zero", "constant", "duplicate", "half", "tiny", "huge"])
def test_degenerate_features_are_refined(structure, spoil):
    """What ``fit_laplace`` accepts, ``refine`` takes too: it ends, finite, and never below its start."""
    phi, labels = problem()
    change = {
        "all zero": torch.zeros_like(phi),
        "constant": torch.cat([phi, torch.ones_like(phi)], 1),
        "duplicate": torch.cat([phi, phi], 1),
        "half": phi.half(),
        "tiny": phi * 1e-8,
        "huge": phi * 1e8,
    }
    phi, classes = change.get(spoil, phi), 4 if spoil == "absent class" else 3
    fit = bc.fit_laplace(phi, labels, num_classes=classes, prior_precision=TAU, structure=structure)
    refined = fit.refine(phi, labels)
    assert math.isfinite(refined.elbo)
    assert refined.elbo >= refined.refinement.elbo[0]
    assert bool(refined.predict_proba(phi).isfinite().all())
    assert refined.refinement.converged or "short of its fixed point" in refined.notes[-1]


def test_other_features_are_refused():
    _, labels, fit = fitted()
    with pytest.raises(ValueError, match=r"features must be \(N, 2\)"):
        fit.refine(torch.randn(40, 3, dtype=torch.float64), labels)
    with pytest.raises(ValueError, match="holds 30 images, the posterior was fitted to 40"):
        fit.refine(torch.randn(30, 2, dtype=torch.float64), labels[:30])
    with pytest.raises(ValueError, match="num_points is 0"):
        fit.refine(torch.randn(40, 2, dtype=torch.float64), labels, num_points=0)
