"""The ArviZ export: names, numbers and a round trip through NetCDF."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats as law
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import bayescam as bc
from bayescam.diagnose import inference_data
from bayescam.diagnose.arviz_compat import bfmi, get_dataset, group_names
from bayescam.diagnose.convergence import energy_fraction
from bayescam.diagnose.density import log_density
from bayescam.diagnose.inference_data import load, save
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
    for data in (gaussian, chains):
        for group in group_names(data):
            dataset = get_dataset(data, group)
            assert set(dataset.dims) <= set(dataset.coords), group
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


@pytest.mark.slow
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
    """The calls that docs/guide.md names for each version of ArviZ."""
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
            one_chain = _export(problem[2], problem, num_samples=40)
            with pytest.raises(ValueError, match="chain"):
                az.plot_rank(one_chain, var_names=["bias_centred"])
            assert az.plot_dist(one_chain, var_names=["bias_centred"]) is not None
        assert np.isfinite(az.rhat(data)["bias_centred"]).all()
        assert (az.ess(data)["bias_centred"] > 10).all()


def test_tree_depth_is_held_against_the_limit_of_the_run(problem):
    features, labels, laplace, nuts = problem
    shallow = bc.sample_nuts(
        laplace, features, labels, num_chains=1, num_samples=20, num_warmup=20, max_tree_depth=1, progress=False
    )
    assert get_dataset(bc.to_inference_data(shallow), "sample_stats")["reached_max_treedepth"].all()
    assert not get_dataset(bc.to_inference_data(nuts), "sample_stats")["reached_max_treedepth"].any()


@pytest.fixture(scope="module")
def hierarchical(problem):
    features, labels, laplace, _ = problem
    return bc.sample_nuts(
        laplace, features, labels, num_chains=2, num_samples=30, num_warmup=40, tau_prior=(2.0, 0.5), progress=False
    )


def test_a_sampled_tau_is_the_prior_of_each_draw(hierarchical, problem):
    features, labels, *_ = problem
    data = _export(hierarchical, problem, train=(features, labels), num_samples=4000)
    tau = get_dataset(data, "posterior")["tau"].values
    theta = hierarchical.draws.theta().numpy()
    found = get_dataset(data, "log_prior")
    np.testing.assert_allclose(found["theta"], law.norm(0, tau[..., None] ** -0.5).logpdf(theta).sum(-1))
    np.testing.assert_allclose(found["tau"], law.gamma(2.0, scale=2.0).logpdf(tau))
    images = check_images(features, labels, num_classes=K)
    at = torch.cat([hierarchical.draws.weight, hierarchical.draws.bias[..., None]], -1)
    likelihood = -negative_log_joint(at, images, 1.0)[0].numpy() - law.norm(0, 1).logpdf(theta).sum(-1)
    whole = likelihood + found["theta"].values + found["tau"].values
    np.testing.assert_allclose(whole, get_dataset(data, "sample_stats")["lp"].values)
    prior = get_dataset(data, "prior")
    assert law.kstest(prior["tau"].values.ravel(), law.gamma(2.0, scale=2.0).cdf).pvalue > 1e-3
    scaled = prior["weight"].values * np.sqrt(prior["tau"].values)[..., None, None]
    assert law.kstest(scaled.ravel()[::7], law.norm.cdf).pvalue > 1e-3
    assert prior["weight"].values.std() > 0.5 / math.sqrt(4)
    assert json.loads(get_dataset(data, "posterior").attrs["tau_prior"]) == [2.0, 0.5]


def test_without_taus_prior_what_needs_it_is_left_out(hierarchical, problem):
    unknown = replace(hierarchical, tau_prior=None)  # a file of an earlier version
    data = _export(unknown, problem)
    assert set(get_dataset(data, "log_prior")) == {"theta"}
    assert not {"prior", "prior_predictive"} & set(group_names(data))
    with pytest.raises(ValueError, match="prior_precision is 2, but tau was sampled"):
        _export(hierarchical, problem, prior_precision=2.0)
    with pytest.raises(ValueError, match=r"tau_prior is 'gamma', but tau was sampled under \(2.0, 0.5\)"):
        _export(hierarchical, problem, tau_prior="gamma")
    default = get_dataset(_export(unknown, problem, tau_prior="gamma"), "posterior").attrs["tau_prior"]
    assert json.loads(default) == [1.0, 0.1]
    for wrong, error in (((0.0, 1.0), ValueError), (3.0, TypeError), ("flat", TypeError), ((1.0, "b"), TypeError)):
        with pytest.raises(error, match="tau_prior"):
            _export(hierarchical, problem, tau_prior=wrong)
    for other in problem[2:]:
        with pytest.raises(ValueError, match="tau was not sampled"):
            _export(other, problem, tau_prior="gamma")


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that an operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [tensor.numel() for tensor in tree_iter(out) if isinstance(tensor, torch.Tensor)]
        self.numbers = max([self.numbers, *made])
        return out


def test_images_are_worked_off_in_chunks(problem, monkeypatch):
    features, labels, _, nuts = problem
    options = dict(prior_precision=2.0, num_samples=40, train=(features, labels), log_likelihood="train")
    expected = _export(nuts, problem, **options)
    monkeypatch.setattr(inference_data, "_ELEMENTS", 3000)
    with Largest() as largest:
        data = _export(nuts, problem, **options)
    assert largest.numbers <= 3000 < 2 * 40 * 40 * K < 2 * 40 * N * K
    for group, name in (("log_likelihood", "y"), ("predictions", "probs"), ("predictions", "sd")):
        np.testing.assert_allclose(get_dataset(data, group)[name], get_dataset(expected, group)[name], rtol=1e-5)


def test_no_two_things_take_the_same_random_numbers(problem, monkeypatch):
    seeds = []
    plain = torch.Generator.manual_seed

    class Noted(torch.Generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return plain(self, seed)

    monkeypatch.setattr(torch, "Generator", Noted)
    _export(problem[2], problem, num_samples=5, seed=7)
    assert len(seeds) == len(set(seeds)) == 4  # the draws, the prior's, and the labels of each
    assert seeds[0] == 7
    first = list(seeds)
    _export(problem[2], problem, num_samples=5, seed=8)
    assert not set(first) & set(seeds[4:])


def test_simulated_labels_do_not_lean_on_the_draws(problem):
    """As many images as columns: random numbers shared by weights and labels would show."""
    features, labels, laplace, _ = problem
    data = bc.to_inference_data(laplace, features[: D + 1], labels[: D + 1], num_samples=3000)
    for weights, simulated in (("prior", "prior_predictive"), ("posterior", "posterior_predictive")):
        group = get_dataset(data, weights)
        logits = np.einsum("skd,nd->snk", group["weight"].values[0], features[: D + 1].numpy())
        p = np.exp(logits + group["bias"].values[0][:, None])
        p /= p.sum(-1, keepdims=True)
        y = get_dataset(data, simulated)["y"].values[0].astype(int)
        hit = np.take_along_axis(p, y[..., None], -1)[..., 0]
        expected = np.square(p).sum(-1)
        error = np.sqrt((np.power(p, 3).sum(-1) - expected**2).mean(0) / len(p))
        assert (np.abs((hit - expected).mean(0)) < 4.5 * error).all()


def test_what_fit_laplace_takes_is_taken(problem):
    features, labels, laplace, nuts = problem
    expected = _export(laplace, problem, train=(features, labels), num_samples=8)
    rows, truth = features.numpy(), labels.numpy()
    for given in (truth, labels.tolist(), truth.astype(float), labels.int()):
        data = bc.to_inference_data(laplace, rows[:40], given[:40], train=(rows, given), classes=CLASSES, num_samples=8)
        for group in ("log_likelihood", "sample_stats", "observed_data", "predictions"):
            xr.testing.assert_allclose(get_dataset(data, group), get_dataset(expected, group))
    single = bc.to_inference_data(nuts, features.float()[:9])
    assert get_dataset(single, "constant_data")["features"].dtype == np.float32


def _wrong():
    nan = torch.full((5, D), math.nan)
    ones, zeros = torch.ones(5, D), torch.zeros(5, dtype=torch.long)
    return {
        "features is 1-D": ({"features": torch.ones(D)}, ValueError, r"features must be \(N, 3\), got \(3,\)"),
        "features of another D": ({"features": ones[:, :2]}, ValueError, r"features must be \(N, 3\)"),
        "features hold NaN": ({"features": nan}, ValueError, r"features\[0, 0\] is nan"),
        "features are whole": ({"features": ones.long()}, TypeError, "features must be floating-point"),
        "features are a list": ({"features": ones.tolist()}, TypeError, "features must be a torch tensor"),
        "no image": ({"features": ones[:0]}, ValueError, "features holds no image"),
        "labels alone": ({"labels": zeros}, ValueError, "labels without features"),
        "label 4": ({"features": ones, "labels": zeros + 4}, ValueError, r"labels\[0\] is 4, outside 0..3"),
        "label -1": ({"features": ones, "labels": zeros - 1}, ValueError, r"labels\[0\] is -1"),
        "half labels": ({"features": ones, "labels": zeros + 0.5}, ValueError, r"labels\[0\] is 0.5"),
        "labels 2-D": ({"features": ones, "labels": zeros[:, None]}, ValueError, r"labels must be \(5,\)"),
        "few labels": ({"features": ones, "labels": zeros[:4]}, ValueError, r"labels must be \(5,\)"),
        "no draw": ({"num_samples": 0}, ValueError, "num_samples is 0; it must be at least 1"),
        "fewer": ({"num_samples": -1}, ValueError, "num_samples is -1"),
        "half a draw": ({"num_samples": 1.5}, TypeError, "num_samples must be a whole number"),
        "seed -1": ({"seed": -1}, ValueError, "seed is -1"),
        "seed too large": ({"seed": 1 << 70}, ValueError, r"seed must be below 2\^64"),
        "tau 0": ({"prior_precision": 0}, ValueError, "prior_precision is 0; it must be positive"),
        "tau -1": ({"prior_precision": -1.0}, ValueError, "prior_precision is -1.0"),
        "tau NaN": ({"prior_precision": math.nan}, ValueError, "prior_precision is nan"),
        "tau in words": ({"prior_precision": "evidence"}, TypeError, "prior_precision must be a number"),
        "other images": ({"log_likelihood": "both"}, ValueError, "log_likelihood is 'both'"),
        "no training images": ({"log_likelihood": "train"}, ValueError, "needs train"),
        "train no pair": ({"train": ones}, TypeError, r"train must be \(features, labels\)"),
        "train of another D": ({"train": (ones[:, :1], zeros)}, ValueError, r"train: features must be \(N, 3\)"),
        "train of another N": ({"train": (ones, zeros[:2])}, ValueError, r"train: labels must be \(5,\)"),
        "train of other classes": ({"train": (ones, zeros + 9)}, ValueError, r"train: labels\[0\] is 9"),
        "train holds NaN": ({"train": (nan, zeros)}, ValueError, r"train: features\[0, 0\] is nan"),
        "two names": ({"classes": ["a", "b"]}, ValueError, "classes has 2 names for 4"),
        "a name twice": ({"classes": ["a", "a", "b", "c"]}, ValueError, "classes has a name twice"),
        "one text": ({"classes": "abcd"}, TypeError, "classes is the single text 'abcd'"),
        "a NUL": ({"classes": ["a", "b\0", "c", "d"]}, ValueError, r"classes\[1\] is 'b\\x00'"),
        "half a character": ({"classes": ["a", "b", "c", "\udc80"]}, ValueError, r"classes\[3\]"),
        "ids alone": ({"obs_ids": ["a"]}, ValueError, "obs_ids without features"),
        "few ids": ({"features": ones, "obs_ids": ["a"]}, ValueError, "obs_ids has 1 names for 5"),
    }


@pytest.mark.parametrize("name", _wrong())
def test_what_does_not_fit_is_named(problem, name):
    given, error, words = _wrong()[name]
    for posterior in problem[2:]:
        with pytest.raises(error, match=words):
            bc.to_inference_data(posterior, **given)


def test_what_is_no_posterior_and_what_belongs_to_another_is_named(problem):
    features, labels, laplace, nuts = problem
    for nothing in (None, np.zeros((2, 3)), laplace.guide):
        with pytest.raises(TypeError, match="posterior must be a Laplace, a Nuts or Draws, got"):
            bc.to_inference_data(nothing)
    with pytest.raises(ValueError, match="prior_precision is 50, but the posterior was fitted with 2"):
        bc.to_inference_data(laplace, prior_precision=50)
    bc.to_inference_data(laplace, prior_precision=2)
    with pytest.raises(ValueError, match="train holds 100 images, the posterior was fitted to 120"):
        bc.to_inference_data(laplace, train=(features[:100], labels[:100]))
    for posterior in (laplace, nuts):
        with pytest.raises(ValueError, match="these are not the images it was fitted to"):
            bc.to_inference_data(posterior, train=(features, labels.flip(0)), prior_precision=2.0)
    for one in (laplace, laplace.refine(features, labels), nuts):
        bc.to_inference_data(one, train=(features.float(), labels), prior_precision=2.0)


def test_names_that_no_file_can_hold_are_all_there_are(problem, tmp_path):
    names = ["", "ü", "\ud83e\uddb4".encode("utf-16", "surrogatepass").decode("utf-16"), "a/b\n"]
    path = save(bc.to_inference_data(problem[2], classes=names, num_samples=3), tmp_path / "x.nc")
    assert get_dataset(load(path), "posterior")["label"].values.tolist() == names
    assert get_dataset(bc.to_inference_data(problem[2], classes=range(K)), "fit")["label"].values[2] == "2"


def test_attributes_say_how_the_draws_were_made(problem, tmp_path):
    features, labels, laplace, nuts = problem
    sampled = bc.to_inference_data(nuts, train=(features, labels), prior_precision=2.0, seed=5)
    attrs = get_dataset(sampled, "posterior").attrs
    told = {"seed": 5, "sampling_seed": 0, "tuning_steps": 40, "num_train": N, "prior_precision": 2.0}
    assert told.items() <= attrs.items()
    attrs = get_dataset(bc.to_inference_data(laplace), "posterior").attrs
    assert attrs["inference_method"] == "Laplace, full"
    assert attrs["log_evidence"] == laplace.log_evidence
    kron = bc.fit_laplace(features, labels, prior_precision=2.0, structure="kron").refine(features, labels)
    attrs = get_dataset(load(save(bc.to_inference_data(kron), tmp_path / "kron.nc")), "fit").attrs
    assert attrs["inference_method"] == "refined Gaussian, kron"
    assert attrs["structure"] == "kron"
    assert attrs["elbo"] == pytest.approx(kron.elbo)
    assert not {"log_evidence", "gradient_norm"} & set(attrs)
    assert attrs["laplace_log_evidence"] == pytest.approx(kron.log_evidence)
    assert "elbo" not in get_dataset(bc.to_inference_data(replace(kron, elbo=None)), "fit").attrs


def test_the_fit_group_holds_the_covariance_in_thetas_order(problem):
    _, _, laplace, _ = problem
    fit = get_dataset(bc.to_inference_data(laplace, num_samples=10, classes=CLASSES), "fit")
    dense = fit["covariance"].sel(rows="weight[b,1]", columns="bias[c]").item()
    eye, one = torch.eye(D + 1, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    assert dense == pytest.approx(float(laplace.covariance.bilinear(one[1], one[2], eye, eye)[1, D]))
    variances = np.diag(fit["covariance"].values)
    np.testing.assert_allclose(variances[: K * D], laplace.weight_sd.square().flatten().numpy())
    np.testing.assert_allclose(variances[K * D :], laplace.bias_sd.square().numpy())
