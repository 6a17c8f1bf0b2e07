"""The ArviZ export: names, numbers and a round trip through NetCDF."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import xarray as xr

import bayescam as bc
from bayescam.diagnose.arviz_compat import bfmi, get_dataset, group_names
from bayescam.diagnose.convergence import energy_fraction
from bayescam.diagnose.inference_data import load, log_density, save
from bayescam.posterior.images import check_images
from bayescam.posterior.model import negative_log_joint

N, D, K = 120, 3, 4
CLASSES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator, dtype=torch.float64)
    truth = torch.randn(K, D, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(features @ truth.T, 1), 1, generator=generator)[:, 0]
    laplace = bc.fit_laplace(features, labels, prior_precision=2.0)
    nuts = bc.sample_nuts(laplace, features, labels, num_chains=2, num_samples=40, num_warmup=40)
    return features, labels, laplace, nuts


def _export(posterior, problem, **options):
    features, labels, *_ = problem
    return bc.to_inference_data(posterior, features[:40], labels[:40], classes=CLASSES, **options)


def test_groups_and_dims(problem):
    features, labels, laplace, nuts = problem
    gaussian = _export(laplace, problem, train=(features, labels), num_samples=30)
    chains = _export(nuts, problem, prior_precision=2.0)
    common = {"posterior", "predictions", "posterior_predictive", "log_likelihood", "observed_data", "constant_data"}
    common |= {"sample_stats", "log_prior", "prior", "prior_predictive"}
    assert common | {"fit"} == set(group_names(gaussian))
    assert common == set(group_names(chains))
    posterior = get_dataset(chains, "posterior")
    assert posterior["weight"].dims == ("chain", "draw", "label", "feature")
    assert posterior["bias"].dims == ("chain", "draw", "label")
    assert posterior["label"].values.tolist() == CLASSES
    assert get_dataset(gaussian, "posterior").sizes["chain"] == 1
    stats = get_dataset(chains, "sample_stats")
    assert {"lp", "energy", "n_steps", "tree_depth", "acceptance_rate", "step_size", "diverging"} <= set(stats)


def test_log_likelihood_is_right_also_where_draws_and_images_are_as_many(problem):
    features, labels, _, nuts = problem
    chains = _export(nuts, problem)
    found = get_dataset(chains, "log_likelihood")["y"]
    assert found.sizes["draw"] == found.sizes["obs_id"] == 40
    logits = torch.einsum("cskd,nd->csnk", nuts.draws.weight, features[:40]) + nuts.draws.bias[:, :, None]
    expected = torch.distributions.Categorical(logits=logits).log_prob(labels[:40])
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_lp_is_the_log_joint_and_lp_approx_the_gaussian(problem):
    features, labels, laplace, nuts = problem
    images = check_images(features, labels, num_classes=K)
    stats = get_dataset(_export(nuts, problem), "sample_stats")
    theta = torch.cat([nuts.draws.weight, nuts.draws.bias[..., None]], -1)
    np.testing.assert_allclose(stats["lp"].values, -negative_log_joint(theta, images, 2.0)[0].numpy(), rtol=1e-8)
    stats = get_dataset(_export(laplace, problem, train=(features, labels), num_samples=30), "sample_stats")
    draws = laplace.sample(30, seed=0)
    theta = torch.cat([draws.weight, draws.bias[..., None]], -1)
    np.testing.assert_allclose(stats["lp"].values, -negative_log_joint(theta, images, 2.0)[0].numpy(), rtol=1e-10)
    np.testing.assert_allclose(stats["lp_approx"].values[0], log_density(laplace, theta[0]).numpy())


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_log_density_is_the_multivariate_normals(problem, structure):
    features, labels, *_ = problem
    laplace = bc.fit_laplace(features, labels, prior_precision=2.0, structure=structure)
    theta = laplace.sample(20, seed=1)
    rows = torch.cat([theta.weight[0], theta.bias[0][..., None]], -1)
    width, eye, one = D + 1, torch.eye(D + 1, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    dense = torch.zeros(K * width, K * width, dtype=torch.float64)
    for a in range(K):
        for b in range(K):
            block = laplace.covariance.bilinear(one[a], one[b], eye, eye)
            dense[a * width : (a + 1) * width, b * width : (b + 1) * width] = block
    oracle = torch.distributions.MultivariateNormal(laplace.theta_mean.flatten(), dense)
    torch.testing.assert_close(log_density(laplace, rows), oracle.log_prob(rows.flatten(1)))


def test_centred_weights_and_predictions_cannot_see_a_shift(problem):
    _, _, _, nuts = problem
    shift = torch.randn(2, 40, 1, D, dtype=torch.float64)
    moved = bc.Draws(nuts.draws.weight + shift, nuts.draws.bias + 3.0)
    ours, theirs = _export(nuts.draws, problem), _export(moved, problem)
    for group, name in (("posterior", "weight_centred"), ("posterior", "bias_centred"), ("predictions", "probs")):
        np.testing.assert_allclose(
            get_dataset(ours, group)[name].values, get_dataset(theirs, group)[name].values, atol=1e-6
        )
    assert not np.allclose(get_dataset(ours, "posterior")["weight"], get_dataset(theirs, "posterior")["weight"])


def test_netcdf_round_trip_and_arviz_itself(problem, tmp_path):
    import arviz as az

    features, labels, laplace, nuts = problem
    for number, data in enumerate(
        (
            _export(laplace, problem, train=(features, labels), num_samples=30),
            _export(nuts, problem, prior_precision=2.0),
        )
    ):
        path = save(data, tmp_path / f"{number}.nc")
        again = load(path)
        assert set(group_names(again)) == set(group_names(data))
        for group in group_names(data):
            xr.testing.assert_allclose(get_dataset(again, group), get_dataset(data, group))
        assert set(group_names(az.from_netcdf(str(path)))) == set(group_names(data))
    read = az.from_netcdf(str(tmp_path / "1.nc"))
    table = bc.summary(read, var_names=["bias_centred"])
    assert list(table.index) == [f"bias_centred[{name}]" for name in CLASSES]
    chains = get_dataset(read, "sample_stats")["energy"].values
    np.testing.assert_allclose(bfmi(read), energy_fraction(chains), rtol=2 / chains.shape[1])


def test_arviz_draws_what_it_reads(problem):
    import arviz as az

    data = _export(problem[3], problem, prior_precision=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ trails matplotlib
        for name in ("plot_trace", "plot_rank", "plot_forest"):
            assert getattr(az, name)(data, var_names=["bias_centred"]) is not None
        assert az.plot_energy(data) is not None
        if hasattr(az, "plot_ecdf"):
            one = get_dataset(data, "posterior")["bias_centred"].sel(label=CLASSES[0])
            assert az.plot_ecdf(one.values.ravel()) is not None
        else:  # ArviZ 1.x
            assert az.plot_dist(data, var_names=["bias_centred"], kind="ecdf") is not None
        assert np.isfinite(az.rhat(data)["bias_centred"]).all()
        assert (az.ess(data)["bias_centred"] > 10).all()


def test_tree_depth_is_held_against_the_limit_of_the_run(problem):
    features, labels, laplace, nuts = problem
    shallow = bc.sample_nuts(
        laplace, features, labels, num_chains=1, num_samples=20, num_warmup=20, max_tree_depth=1, progress=False
    )
    assert get_dataset(bc.to_inference_data(shallow), "sample_stats")["reached_max_treedepth"].all()
    assert not get_dataset(bc.to_inference_data(nuts), "sample_stats")["reached_max_treedepth"].any()


def test_what_does_not_fit_is_named(problem):
    features, labels, _, nuts = problem
    with pytest.raises(ValueError, match="labels without features"):
        bc.to_inference_data(nuts, labels=labels)
    with pytest.raises(ValueError, match=r"features must be \(N, 3\)"):
        bc.to_inference_data(nuts, features[:, :2])
    with pytest.raises(ValueError, match="classes has 2 names for 4"):
        bc.to_inference_data(nuts, classes=["a", "b"])
    with pytest.raises(ValueError, match="classes has a name twice"):
        bc.to_inference_data(nuts, classes=["a", "a", "b", "c"])


def test_the_fit_group_holds_the_covariance_in_thetas_order(problem):
    _, _, laplace, _ = problem
    fit = get_dataset(bc.to_inference_data(laplace, num_samples=10, classes=CLASSES), "fit")
    dense = fit["covariance"].sel(rows="weight[b,1]", columns="bias[c]").item()
    eye, one = torch.eye(D + 1, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    assert dense == pytest.approx(float(laplace.covariance.bilinear(one[1], one[2], eye, eye)[1, D]))
    variances = np.diag(fit["covariance"].values)
    np.testing.assert_allclose(variances[: K * D], laplace.weight_sd.square().flatten().numpy())
    np.testing.assert_allclose(variances[K * D :], laplace.bias_sd.square().numpy())
