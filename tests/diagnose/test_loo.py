"""Leave-one-out of draws from NUTS and from Gaussians, against the integral over the whole posterior."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import bayescam as bc
from bayescam.diagnose.arviz_compat import get_dataset, loo, make_idata, psis
from bayescam.posterior.images import check_images
from bayescam.posterior.model import negative_log_joint

N, TAU = 24, 1.0


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(N, 1, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] + 0.7 * torch.randn(N, generator=generator, dtype=torch.float64) > 0).long()
    return features, labels, bc.fit_laplace(features, labels, num_classes=2, prior_precision=TAU)


@pytest.fixture(scope="module")
def exact(problem):
    """log p(y_i | y without i) of each image by quadrature: two classes and one feature leave two contrasts."""
    return left_out(*problem)


def left_out(features, labels, laplace):
    axis = torch.linspace(-12, 12, 241, dtype=torch.float64)
    slope, offset = torch.meshgrid(axis, axis, indexing="ij")
    half = torch.stack([slope, offset], -1).reshape(-1, 2) / 2
    theta = torch.stack([-half, half], 1) + laplace.theta_mean.mean(0)
    log_joint = -negative_log_joint(theta, check_images(features, labels, num_classes=2), laplace.prior_precision)[0]
    logits = theta[:, :, :1] @ features.T + theta[:, :, 1:]
    log_proba = logits.log_softmax(1)[:, labels, torch.arange(N)]
    return (torch.logsumexp(log_joint[:, None], 0) - torch.logsumexp(log_joint[:, None] - log_proba, 0)).numpy()


def _export(posterior, problem, **options):
    features, labels, _ = problem
    return bc.to_inference_data(posterior, train=(features, labels), log_likelihood="train", **options)


def test_the_gaussians_loo_is_the_posteriors(problem, exact):
    data = _export(problem[2], problem, num_samples=20_000)
    found = bc.leave_one_out(data)
    assert found.corrected
    assert found.num_bad == 0
    assert np.abs(found.elpd_i - exact).max() < 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        uncorrected, _ = loo(data)
    # Without p / q the sum is the Gaussian's own leave-one-out, another number.
    assert np.abs(uncorrected - exact).max() > 5 * np.abs(found.elpd_i - exact).max()


@pytest.mark.slow
def test_nuts_needs_no_correction(problem, exact):
    features, labels, laplace = problem
    nuts = bc.sample_nuts(laplace, features, labels, num_samples=400, num_warmup=100, progress=False)
    found = bc.leave_one_out(_export(nuts, problem))
    assert not found.corrected
    assert np.abs(found.elpd_i - exact).max() < 0.1
    assert abs(found.elpd - exact.sum()) < 0.15


def test_the_correction_cannot_see_a_shift_and_vanishes_for_an_exact_gaussian(problem):
    data = _export(problem[2], problem, num_samples=500)
    groups = {name: get_dataset(data, name) for name in ("log_likelihood", "fit", "sample_stats")}
    stats = groups["sample_stats"]
    groups["sample_stats"] = stats.assign(log_weight=0 * stats["lp"] + 7.0)
    same = bc.leave_one_out(make_idata(groups))
    values = groups["log_likelihood"]["y"].values[0].T.astype(float)
    weights, shapes = psis(-values)
    np.testing.assert_allclose(same.elpd_i, np.log(np.exp(weights + values).sum(1)), rtol=1e-10)
    np.testing.assert_allclose(same.pareto_k, shapes)


def test_the_caveat_is_said(problem):
    found = bc.leave_one_out(_export(problem[2], problem, num_samples=200))
    assert "frozen network" in found.caveat
    assert found.caveat in repr(found)
    assert found.se == pytest.approx(np.sqrt(N * found.elpd_i.var()))


def test_neither_test_images_nor_weighted_ones_are_left_out(problem, tmp_path):
    features, labels, laplace = problem
    with pytest.raises(ValueError, match="no log_likelihood of training images"):
        bc.leave_one_out(bc.to_inference_data(laplace, features, labels, num_samples=20))
    with pytest.raises(ValueError, match="needs train"):
        bc.to_inference_data(laplace, log_likelihood="train")
    weighted = bc.fit_laplace(features, labels, prior_precision=TAU, class_weights=torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="class weights"):
        bc.leave_one_out(_export(weighted, problem, num_samples=20))
    nuts = bc.sample_nuts(
        weighted, features, labels, num_chains=1, num_samples=20, num_warmup=20, max_tree_depth=3, progress=False
    )
    nuts.save(tmp_path / "nuts.safetensors")
    with pytest.raises(ValueError, match="class weights"):
        bc.leave_one_out(_export(bc.Nuts.load(tmp_path / "nuts.safetensors"), problem))


@pytest.fixture(scope="module")
def rivals():
    """Two models of the same images, and the exact leave-one-out of each: the better is drawn from a poor Gaussian."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, 1, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] + 0.7 * torch.randn(N, generator=generator, dtype=torch.float64) > 0).long()
    features = features + 2
    fits = {
        "tight": bc.fit_laplace(features, labels, num_classes=2, prior_precision=1.0),
        "loose": bc.fit_laplace(features, labels, num_classes=2, prior_precision=0.5, structure="diag"),
    }
    data = {
        name: bc.to_inference_data(one, train=(features, labels), log_likelihood="train", num_samples=4000)
        for name, one in fits.items()
    }
    return data, {name: left_out(features, labels, one).sum() for name, one in fits.items()}


def test_arviz_ranks_gaussians_by_corrected_leave_one_out(rivals):
    import arviz as az

    data, exact = rivals
    assert exact["loose"] > exact["tight"] + 0.5
    found = {name: bc.leave_one_out(one) for name, one in data.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ trails pandas, and warns of k-hat
        assert list(az.compare(data).index) == ["tight", "loose"]  # takes both for draws from the posterior
        exactly = {"round_to": "none"} if int(az.__version__.split(".")[0]) else {}
        table = az.compare({name: one.elpd_data() for name, one in found.items()}, **exactly)
    assert list(table.index) == ["loose", "tight"]
    column = "elpd" if "elpd" in table else "elpd_loo"
    for name, one in found.items():
        assert one.num_bad == 0
        assert one.elpd == pytest.approx(exact[name], abs=0.2)
        assert float(table.loc[name, column]) == pytest.approx(one.elpd)
        assert 0.5 < one.p < 2.5  # two contrasts
        assert "elpd" in str(one.elpd_data())


def test_elpd_data_is_what_arviz_makes_of_nuts(problem):
    import arviz as az

    features, labels, laplace = problem
    nuts = bc.sample_nuts(laplace, features, labels, num_samples=100, num_warmup=50, progress=False)
    data = _export(nuts, problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = az.loo(data, pointwise=True)
    ours = bc.leave_one_out(data).elpd_data()
    assert ours["scale"] == theirs["scale"]
    sums = ("elpd", "p") if hasattr(theirs, "elpd_i") else ("elpd_loo", "p_loo")
    for name in ("se", "n_samples", "n_data_points", "good_k", *sums):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_draws_that_do_not_say_where_they_come_from_are_refused(problem):
    features, labels, laplace = problem
    nuts = bc.sample_nuts(laplace, features, labels, num_chains=1, num_samples=20, num_warmup=20, progress=False)
    for draws in (laplace.sample(50, seed=0), nuts.draws):
        with pytest.raises(ValueError, match="does not say where its draws come from"):
            bc.leave_one_out(_export(draws, problem))


def test_one_draw_and_other_things_are_refused_in_words(problem):
    with pytest.raises(ValueError, match="idata holds 1 draw"):
        bc.leave_one_out(_export(problem[2], problem, num_samples=1))
    few = bc.leave_one_out(_export(problem[2], problem, num_samples=5))
    assert few.num_bad == N
    for nothing in (None, problem[2], {}):
        with pytest.raises(TypeError, match="idata must be what to_inference_data returns"):
            bc.leave_one_out(nothing)
    data = _export(problem[2], problem, num_samples=20)
    groups = {name: get_dataset(data, name) for name in ("log_likelihood", "fit", "sample_stats")}
    groups["log_likelihood"] = groups["log_likelihood"].isel(train_id=slice(5))
    with pytest.raises(ValueError, match="leaves 5 images out of a posterior of 24"):
        bc.leave_one_out(make_idata(groups))
