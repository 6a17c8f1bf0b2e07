"""The verdict on targets where it is known, and what every number of a comparison means."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from bayescam.diagnose.compare import _verdict, compare_posteriors, limits, predictive_moments, total_variation
from bayescam.diagnose.convergence import Convergence
from bayescam.diagnose.importance import log_ratios
from bayescam.diagnose.weight_agreement import centred_moments, halves, weight_agreement
from bayescam.posterior.draws import Draws
from bayescam.posterior.images import check_images
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.model import negative_log_joint
from bayescam.posterior.nuts import Nuts
from bayescam.posterior.nuts_chain import STATISTICS, ChainSettings

K, D, N = 4, 3, 120


def data():
    torch.manual_seed(2)
    features = torch.randn(N, D, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=features @ torch.randn(D, K).double() * 2).sample()
    return features, labels


def evaluation():
    features, labels = data()
    return features[:25], labels[:25]


def fitted(**options):
    return fit_laplace(*data(), num_classes=K, prior_precision=1.0, **options)


def as_nuts(laplace, chains=4, samples=400, seed=3):
    """A 'NUTS run' whose draws come from the Gaussian itself: the two posteriors are then equal."""
    flat = laplace.sample(chains * samples, seed=seed)
    weight = flat.weight[0].unflatten(0, (chains, samples))
    bias = flat.bias[0].unflatten(0, (chains, samples))
    generator = np.random.default_rng(0)
    fill = {name: generator.standard_normal((chains, samples)) for name in STATISTICS}
    return Nuts(
        Draws(weight, bias), fill, None, np.zeros(chains), np.zeros(chains), ChainSettings("nuts", samples, 1, 0)
    )


def moved(laplace, by):
    step = by * torch.tensor([1.0, -1.0] + [0.0] * (K - 2)).double()
    return replace(laplace, weight_mean=laplace.weight_mean + step[:, None], bias_mean=laplace.bias_mean + step)


def test_equal_posteriors_are_laplace():
    laplace = fitted()
    comparison = compare_posteriors(laplace, as_nuts(laplace), *evaluation(), refined=laplace)
    assert comparison.verdict == "laplace"
    assert comparison.predictive["laplace"]["total_variation"] < 0.01
    assert comparison.predictive["laplace"]["agreement"] > 0.97
    weights = comparison.weights["laplace"]
    assert weights["z_rms"] < 2 * weights["z_rms_noise"]
    assert weights["ks_share_beyond_noise"] == 0
    assert abs(weights["sd_ratio_median"] - 1) < 0.05
    assert weights["wasserstein_median"] < weights["wasserstein_median_noise"]
    assert "Laplace predicts like NUTS" in comparison.words


@pytest.mark.slow
def test_every_distance_has_its_interval_over_patients():
    truth, (features, labels) = fitted(), data()
    nuts, off = as_nuts(truth), moved(truth, 0.3)
    patients = np.arange(N) // 4
    row = compare_posteriors(off, nuts, features, labels, patients=patients).predictive["laplace"]
    names = {name for name in row if f"{name}_low" in row}
    assert {"total_variation", "agreement", "mutual_information_difference", "nll", "nll_difference"} <= names
    assert all(row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] for name in names)
    p, q = off.predict_proba(features), predictive_moments(nuts.draws, features)[0]
    assert row["total_variation"] == pytest.approx(total_variation(p, q))
    right = torch.arange(N), labels
    excess = (q[right].log() - p[right].log()).numpy()
    counts = np.random.default_rng(0).multinomial(N // 4, np.full(N // 4, 4 / N), size=1000)
    means = [np.repeat(excess, drawn[patients]).mean() for drawn in counts]
    assert row["nll_difference"] == pytest.approx(excess.mean())
    groups = N // 4
    tail = stats.norm.cdf(-math.sqrt(groups / (groups - 1)) * stats.t.isf(0.05, groups - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    assert [row["nll_difference_low"], row["nll_difference_high"]] == pytest.approx([low, high])
    single = compare_posteriors(off, nuts, features, labels).predictive["laplace"]
    assert single["nll_difference"] == pytest.approx(row["nll_difference"])
    assert single["nll_difference_low"] != row["nll_difference_low"]
    with pytest.raises(ValueError, match="patients must name one for each of the 120 images"):
        compare_posteriors(off, nuts, features, labels, patients=patients[:3])


def test_refined_alone_is_close():
    truth = fitted()
    comparison = compare_posteriors(moved(truth, 1.5), as_nuts(truth), *evaluation(), refined=truth)
    assert comparison.verdict == "refine"
    assert comparison.predictive["laplace"]["total_variation"] > comparison.thresholds["total_variation"]


@pytest.mark.parametrize("with_refined", [True, False])
def test_neither_is_close(with_refined):
    truth = fitted()
    off = moved(truth, 1.5)
    comparison = compare_posteriors(off, as_nuts(truth), *evaluation(), refined=off if with_refined else None)
    assert comparison.verdict == "nuts"
    assert ("try refine()" in comparison.words) is not with_refined


def test_what_the_halves_of_nuts_do_not_agree_on_tells_no_gaussian_from_it():
    half = {"total_variation": 0.0007, "nll_difference": -0.0456}
    rows = {"laplace": {"total_variation": 0.0787, "nll_difference": -0.0092}, "nuts_half": half}
    rows["refined"] = {"total_variation": 0.0012, "nll_difference": 0.0202}
    assert limits(rows) == {"total_variation": 0.01, "nll_difference": pytest.approx(0.0912)}
    verdict, words = _verdict(Convergence(1.001, 900.0, 900.0, 30, 0, None, None, None), rows)
    assert verdict == "refine"
    assert "total variation 0.0787, beyond 0.0100; NLL -0.0092, within 0.0912" in words
    assert "NUTS half against half: total variation 0.0007, NLL -0.0456" in words
    half["nll_difference"] = 0.001
    verdict, words = _verdict(Convergence(1.001, 900.0, 900.0, 30, 0, None, None, None), rows)
    assert verdict == "nuts"
    assert "NLL +0.0202, beyond 0.0100" in words


def test_unconverged_nuts_decides_nothing():
    laplace = fitted()
    nuts = as_nuts(laplace)
    nuts.draws.bias[0, :, 0] += 3.0
    comparison = compare_posteriors(laplace, nuts, *evaluation())
    assert comparison.verdict == "undecided"
    assert comparison.convergence["probabilities"].rhat > 1.05
    few = replace(as_nuts(laplace, samples=12), draws=as_nuts(laplace, samples=12).draws)
    assert compare_posteriors(laplace, few, *evaluation()).verdict == "undecided"


def test_nll_is_part_of_the_gate():
    laplace = fitted()
    nuts = as_nuts(laplace)
    features, _ = data()
    rare = 3 * features[:1].repeat(10, 1)
    mean, _ = predictive_moments(nuts.draws, rare[:1])
    unlikely = torch.full((10,), int(mean[0].argmin()))
    off = moved(laplace, 0.05)
    with_labels = compare_posteriors(off, nuts, rare, unlikely)
    without = compare_posteriors(off, nuts, rare)
    assert abs(with_labels.predictive["laplace"]["nll_difference"]) > 0.01
    assert without.verdict == "laplace"
    assert with_labels.verdict == "nuts"
    assert "nll" not in without.predictive["laplace"]


def test_a_common_shift_changes_nothing():
    laplace = fitted()
    nuts = as_nuts(laplace)
    torch.manual_seed(0)
    c_w, c_b = 5 * torch.randn(4, 400, 1, D).double(), 5 * torch.randn(4, 400, 1).double()
    other = replace(nuts, draws=Draws(nuts.draws.weight + c_w, nuts.draws.bias + c_b))
    a, b = (compare_posteriors(laplace, one, *evaluation()).to_dict() for one in (nuts, other))
    for left, right in zip(_numbers(a), _numbers(b), strict=True):
        assert left == pytest.approx(right, rel=1e-6, abs=1e-8)


def _numbers(value):
    if isinstance(value, dict):
        return [x for inner in value.values() for x in _numbers(inner)]
    if isinstance(value, list):
        return [x for inner in value for x in _numbers(inner)]
    return [value] if isinstance(value, float) else []


def test_to_dict_is_json_and_repr_is_one_line():
    laplace = fitted()
    comparison = compare_posteriors(laplace, as_nuts(laplace), *evaluation(), training=data())
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    assert json.loads(text)["verdict"] == comparison.verdict
    assert "\n" not in repr(comparison)
    assert len(comparison.importance["laplace"]["khat"]) == 4


def test_predictive_moments_by_hand():
    draws = fitted().sample(7, seed=1)
    features, _ = data()
    proba = torch.stack([torch.softmax(features @ w.T + b, 1) for w, b in zip(*draws.flat(), strict=True)])
    mean, information = predictive_moments(draws, features)
    torch.testing.assert_close(mean, proba.mean(0))

    def entropy(p):
        return -(p * p.log()).sum(-1)

    torch.testing.assert_close(information, entropy(proba.mean(0)) - entropy(proba).mean(0))
    assert total_variation(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.75]])) == 0.75


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_centred_moments_are_those_of_centred_draws(structure):
    laplace = fitted(structure=structure)
    centred = laplace.sample(40_000, seed=0).centred()
    values = torch.cat([centred.weight, centred.bias.unsqueeze(-1)], -1)[0]
    mean, sd = centred_moments(laplace)
    # 40,000 independent draws: standard errors sd/200 and sd/283; five of them over 16 numbers.
    assert (np.abs(values.mean(0).numpy() - mean) / sd).max() < 5 / 200
    assert np.abs(values.std(0).numpy() / sd - 1).max() < 5 / 283


def test_weight_numbers_against_scipy():
    laplace, nuts = fitted(), as_nuts(moved(fitted(), 0.1), samples=50)
    agreement = weight_agreement(laplace, nuts.draws)
    mean, sd = centred_moments(laplace)
    values = nuts.draws.centred().weight[..., 1, 2].flatten().numpy()
    assert agreement.ks[1, 2] == pytest.approx(stats.kstest(values, stats.norm(mean[1, 2], sd[1, 2]).cdf).statistic)
    exact = stats.wasserstein_distance(values, stats.norm(mean[1, 2], sd[1, 2]).ppf((np.arange(200) + 0.5) / 200))
    assert agreement.wasserstein[1, 2] == pytest.approx(exact / sd[1, 2])
    assert agreement.z[1, 2] == pytest.approx((values.mean() - mean[1, 2]) / values.std(ddof=1))
    assert agreement.sd_ratio[1, 2] == pytest.approx(values.std(ddof=1) / sd[1, 2])
    worst = agreement.worst(3)
    assert worst[0]["ks"] == agreement.ks.max()
    assert len(worst) == 3


def test_halves_share_no_draw():
    draws = as_nuts(fitted(), chains=5, samples=6).draws
    first, second = halves(draws)
    assert first.weight.shape == second.weight.shape == (1, 12, K, D)
    one = Draws(draws.weight[:1], draws.bias[:1])
    a, b = halves(one)
    assert torch.equal(torch.cat([a.bias, b.bias], 1), one.bias)


def test_log_ratio_against_the_whole_space():
    laplace = fitted()
    features, labels = data()
    images = check_images(features, labels, num_classes=K)
    exact = torch.distributions.MultivariateNormal(laplace.theta_mean.flatten(), covariance_matrix=_covariance(laplace))
    draws = laplace.sample(2000, seed=4)
    theta = torch.cat([draws.weight[0], draws.bias[0].unsqueeze(-1)], -1)
    joint = -negative_log_joint(theta, images, 1.0)[0]
    whole = (joint - exact.log_prob(theta.flatten(1))).numpy()
    ours = log_ratios(laplace, images, 2000, seed=5)
    error = np.sqrt(whole.var() / 2000 + ours.var() / 2000)
    assert abs(whole.mean() - ours.mean()) < 5 * error
    assert ours.std() == pytest.approx(whole.std(), rel=0.3)


def _covariance(laplace):
    eye_k, eye_d = torch.eye(K).double(), torch.eye(D + 1).double()
    rows = [[laplace.covariance.bilinear(a, b, eye_d, eye_d) for b in eye_k] for a in eye_k]
    return torch.cat([torch.cat(row, 1) for row in rows])


def test_every_structure_has_khat_and_kl():
    laplace, diag = fitted(), fitted(structure="diag")
    found = compare_posteriors(diag, as_nuts(laplace), *evaluation(), refined=laplace, training=data()).importance
    assert set(found) == {"laplace", "refined"}
    assert found["refined"]["evidence_from"] == found["laplace"]["evidence_from"] == "refined"
    assert found["refined"]["log_evidence"] == pytest.approx(laplace.log_evidence, abs=0.5)
    assert 0 <= found["refined"]["kl"] < found["laplace"]["kl"]


def test_wrong_shapes_are_named():
    laplace = fitted()
    nuts = as_nuts(laplace)
    with pytest.raises(ValueError, match=r"features must be \(N, 3\)"):
        compare_posteriors(laplace, nuts, torch.randn(5, 7))
    with pytest.raises(ValueError, match="labels must be"):
        compare_posteriors(laplace, nuts, data()[0], data()[1][:5])
    two = fit_laplace(data()[0][:, :2], data()[1], num_classes=K, prior_precision=1.0)
    with pytest.raises(ValueError, match="compare posteriors of one model"):
        compare_posteriors(two, nuts, data()[0][:, :2])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda laplace, nuts: (nuts, laplace), TypeError, "laplace must be a Laplace, got Nuts"),
        (lambda laplace, nuts: (laplace, laplace), TypeError, "nuts must be a Nuts, got Laplace"),
        (lambda laplace, nuts: (laplace, nuts, {"refined": nuts}), TypeError, "refined must be a Laplace, got Nuts"),
        (lambda laplace, nuts: (laplace, nuts, {"num_samples": 0}), ValueError, "num_samples is 0"),
        (lambda laplace, nuts: (laplace, nuts, {"seed": 0.5}), TypeError, "seed must be a whole number"),
        (lambda laplace, nuts: (laplace, nuts, {"training": data()[0]}), TypeError, "training must be"),
        (lambda laplace, nuts: (laplace, nuts, {"training": evaluation()}), ValueError, "training has features"),
        (lambda laplace, nuts: (laplace, nuts, {"training": (data()[0], [9] * N)}), ValueError, "training: labels"),
    ],
)
def test_what_cannot_be_compared_is_named(change, error, words):
    laplace = fitted()
    first, second, *options = change(laplace, as_nuts(laplace, samples=8))
    with pytest.raises(error, match=words):
        compare_posteriors(first, second, *evaluation(), **(options[0] if options else {}))


def test_features_that_are_no_numbers_are_refused():
    laplace = fitted()
    with pytest.raises(ValueError, match=r"features\[0, 0\] is nan"):
        compare_posteriors(laplace, as_nuts(laplace, samples=8), data()[0] * float("nan"))


def test_draws_that_are_not_finite_are_refused():
    laplace = fitted()
    nuts = as_nuts(laplace, samples=20)
    nuts.draws.weight[1, 3, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="nuts holds NaN or infinity in draw 3 of chain 1"):
        compare_posteriors(laplace, nuts, *evaluation())


def test_cams_are_compared_in_units_of_their_sd():
    laplace = fitted()
    torch.manual_seed(1)
    maps = torch.randn(6, D, 3, 2, dtype=torch.float64)
    same = compare_posteriors(laplace, as_nuts(laplace), *evaluation(), maps=maps).cams["laplace"]
    # 1,600 independent draws: standard error 1/40 of an sd for a mean, 1/57 for an sd; halves have twice that and more.
    assert same["mean_difference_rms"] < 3 / 40
    assert same["mean_difference_rms_half"] < 2 * 3 / 40
    assert abs(same["sd_ratio_median"] - 1) < 3 / 57
    assert same["sd_ratio_rms"] < 3 / 57
    off = compare_posteriors(moved(laplace, 1.0), as_nuts(laplace), *evaluation(), maps=maps).cams["laplace"]
    assert off["mean_difference_rms"] > 5 * same["mean_difference_rms"]
