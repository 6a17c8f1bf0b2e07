"""The guide against Pyro's own, and in every use that Pyro documents."""

from __future__ import annotations

import functools

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from pyro.infer.reparam import NeuTraReparam
from pyro.poutine.mask_messenger import MaskMessenger

import bayescam as bc
from bayescam.posterior.guide import theta_scale_tril

N, D, K, TAU = 40, 4, 3, 0.7


@pytest.fixture
def data():
    pyro.clear_param_store()
    phi = torch.randn(N, D, dtype=torch.float64)
    return phi, torch.arange(N) % K


def trained(model, data, steps=30, **options):
    guide = bc.AutoLastLayerLaplace(model, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*data)
    return guide


@pytest.fixture(params=["plain", "wrapped", "weighted"])
def model(request):
    model = functools.partial(bc.last_layer, num_classes=K, prior_precision=TAU)
    if request.param == "weighted":
        return functools.partial(model, class_weights=torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64))
    if request.param == "wrapped":
        return lambda features, labels=None: model(features * 2, labels)
    return model


def covariance_of(guide):
    factor = guide.scale[:, None] * guide.scale_tril
    return factor @ factor.T


def test_covariance_is_pyro_s_to_1e_10(model, data):
    guide = trained(model, data)
    ours = guide.laplace_approximation(*data)
    theirs = AutoLaplaceApproximation.laplace_approximation(guide, *data)
    assert isinstance(ours, AutoMultivariateNormal)
    assert ours.loc is not theirs.loc
    torch.testing.assert_close(ours.loc, theirs.loc, rtol=0, atol=0)
    expected = covariance_of(theirs)
    error = torch.linalg.matrix_norm(covariance_of(ours) - expected) / torch.linalg.matrix_norm(expected)
    assert 0 < float(error) < 1e-10


def test_two_guides_share_nothing(data):
    model = functools.partial(bc.last_layer, num_classes=K, prior_precision=TAU)
    first = trained(model, data)
    before = first.loc.detach().clone()
    second = trained(model, data, steps=60)
    torch.testing.assert_close(first.loc, before, rtol=0, atol=0)
    assert first.loc.data_ptr() != second.loc.data_ptr()


@pytest.mark.parametrize("scaled", [False, True])
def test_an_approximation_stays_where_it_was_made(scaled, data):
    """Steps that the guide takes afterwards do not move it, whoever made it: the closed form or Pyro."""
    model = functools.partial(bc.last_layer, num_classes=K, prior_precision=TAU)
    model = poutine.scale(model, scale=0.5) if scaled else model
    guide = bc.AutoLastLayerLaplace(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(*data)
    made = guide.laplace_approximation(*data)
    before = made.loc.clone()
    for _ in range(3):
        svi.step(*data)
    torch.testing.assert_close(made.loc, before, rtol=0, atol=0)
    assert float((guide.loc.detach() - before).abs().min()) > 0.01


def test_a_named_guide_finds_what_another_process_stored(data):
    model = functools.partial(bc.last_layer, num_classes=K, prior_precision=TAU)
    first = trained(model, data, name="head")
    assert list(pyro.get_param_store()) == ["head.loc"]
    stored, learnt = pyro.get_param_store().get_state(), first.loc.detach().clone()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(stored)
    for name, found in (("head", True), ("other", False), (None, False)):
        again = bc.AutoLastLayerLaplace(model, name=name)
        again(*data)
        assert torch.equal(again.loc, learnt) == found


@pytest.mark.parametrize(("name", "error"), [(3, TypeError), ("", ValueError)])
def test_a_name_that_is_none_is_refused(name, error):
    with pytest.raises(error, match="name"):
        bc.AutoLastLayerLaplace(bc.last_layer, name=name)


def test_another_model_is_left_to_pyro(data):
    def other():
        pyro.sample("x", pyro.distributions.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))

    guide = bc.AutoLastLayerLaplace(other)
    guide()
    torch.testing.assert_close(covariance_of(guide.laplace_approximation()), torch.diag(torch.tensor([1.0, 4.0])))


class HalfOfTheLabels(MaskMessenger):
    """Masks every other image, the prior not."""

    def _process_message(self, msg):
        if msg["name"] == "y":
            super()._process_message(msg)


@pytest.mark.parametrize("change", ["scaled", "masked", "factor", "another observation"])
def test_a_last_layer_with_more_in_its_density_is_left_to_pyro(change, data):
    last = functools.partial(bc.last_layer, num_classes=K, prior_precision=TAU)

    def model(features, labels=None):
        if change == "scaled":
            return poutine.scale(last, scale=1 / N)(features, labels)
        if change == "masked":
            with HalfOfTheLabels(mask=torch.arange(N) % 2 == 0):
                return last(features, labels)
        labels = last(features, labels)
        if change == "factor":
            return pyro.factor("f", -features.square().sum())
        return pyro.sample("z", pyro.distributions.Normal(features[:, 0], 1.0).to_event(1), obs=features[:, 1])

    guide = trained(model, data, steps=3)
    ours = covariance_of(guide.laplace_approximation(*data))
    theirs = covariance_of(AutoLaplaceApproximation.laplace_approximation(guide, *data))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_a_prior_precision_for_each_feature_is_left_to_pyro():
    """With as many features as classes a vector of K numbers is one for each: no scale that all parameters share."""
    pyro.clear_param_store()
    tau = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    data = torch.randn(N, 3, dtype=torch.float64), torch.arange(N) % 3
    guide = trained(functools.partial(bc.last_layer, num_classes=3, prior_precision=tau), data, steps=3)
    ours = covariance_of(guide.laplace_approximation(*data))
    theirs = covariance_of(AutoLaplaceApproximation.laplace_approximation(guide, *data))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def guides(data):
    model = functools.partial(bc.last_layer, num_classes=K, prior_precision=TAU)
    fit = bc.fit_laplace(*data, prior_precision=TAU)
    return model, [trained(model, data).laplace_approximation(*data), fit.guide, fit.refine(*data).guide]


@pytest.mark.parametrize("features", [torch.float32, torch.float64])
def test_predictive_works_at_once(features, data):
    data = data[0].to(features), data[1]
    model, made = guides(data)
    for guide in made:
        drawn = Predictive(model, guide=guide, num_samples=6)(data[0])
        assert drawn["y"].shape == (6, N)
        latent = Predictive(guide, num_samples=6)(data[0])
        assert latent["weight"].shape[-2:] == (K, D)
        side_by_side = Predictive(model, guide=guide, num_samples=6, parallel=True)(data[0])
        assert side_by_side["y"].shape == (6, N)


@pytest.mark.parametrize("features", [torch.float32, torch.float64])
def test_neutra_works_at_once(features, data):
    data = data[0].to(features), data[1]
    model, made = guides(data)
    for guide in made:
        neutra = NeuTraReparam(guide.requires_grad_(False))
        chain = MCMC(NUTS(neutra.reparam(model), max_tree_depth=3), 3, warmup_steps=3, disable_progbar=True)
        chain.run(*data)
        (latent,) = chain.get_samples().values()
        assert neutra.transform_sample(latent)["weight"].shape == (3, K, D)


def test_svi_takes_particles_side_by_side(model, data):
    guide = bc.AutoLastLayerLaplace(model)
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    assert float(svi.step(*data)) > float(svi.step(*data))
    theirs = AutoLaplaceApproximation.laplace_approximation(guide, *data)
    torch.testing.assert_close(covariance_of(guide.laplace_approximation(*data)), covariance_of(theirs))


def test_the_guide_of_a_posterior_has_its_moments(data):
    fit = bc.fit_laplace(*data, prior_precision=TAU)
    guide = fit.guide
    torch.testing.assert_close(guide.median()["weight"], fit.weight_mean)
    torch.testing.assert_close(guide.median()["bias"], fit.bias_mean)
    sd = covariance_of(guide).diagonal().sqrt()
    torch.testing.assert_close(sd, torch.cat([fit.weight_sd.flatten(), fit.bias_sd]))
    factor = theta_scale_tril(fit.covariance)
    assert bool((factor.diagonal() > 0).all())
    assert float(factor.triu(1).abs().max()) == 0.0


def test_the_guide_needs_the_full_structure(data):
    with pytest.raises(ValueError, match="guide needs structure 'full'"):
        bc.fit_laplace(*data, prior_precision=TAU, structure="kron").guide  # noqa: B018
