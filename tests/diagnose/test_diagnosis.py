"""``bayescam diagnose``: every line a pass or a fail by its own threshold, read from the files of a run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import bayescam as bc
from bayescam.cli import main
from bayescam.diagnose import nuts_checks
from bayescam.diagnose.arviz_compat import get_dataset
from bayescam.diagnose.convergence import convergence, probabilities, spread
from bayescam.diagnose.diagnosis import diagnose_run, laplace_checks, precision_pivots
from bayescam.diagnose.inference_data import load, save
from bayescam.errors import BayescamError, FileFormatError
from bayescam.storage import save_tensors

N, D, K = 150, 3, 3


@pytest.fixture(scope="module")
def fitted():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (N,), generator=generator)
    laplace = bc.fit_laplace(features, labels, prior_precision=2.0)
    nuts = bc.sample_nuts(laplace, features, labels, num_chains=4, num_samples=200, num_warmup=50, progress=False)
    return features, labels, laplace, nuts


@pytest.fixture(scope="module")
def sound(fitted, tmp_path_factory):
    features, labels, laplace, nuts = fitted
    path = tmp_path_factory.mktemp("run")
    names = {"classes": ["hand", "<b>", "wrist"], "obs_ids": [f"image-{i}" for i in range(N)]}
    save(bc.to_inference_data(nuts, features, labels, **names), path / "posterior/nuts.nc")
    laplace.save(path / "posterior/laplace.safetensors")
    refined = laplace.refine(features, labels)
    refined.save(path / "posterior/refined.safetensors")
    comparison = bc.compare_posteriors(laplace, nuts, features, labels, refined=refined, training=(features, labels))
    (path / "comparison.json").write_text(json.dumps(comparison.to_dict()))
    return path


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    """A copy of the run, whose probabilities are looked at in 12 images."""
    monkeypatch.setattr(nuts_checks, "spread", lambda num_images: spread(num_images, 12))
    return shutil.copytree(sound, tmp_path / "run")


def checks(found, part, subject="nuts"):
    return [check for check in found.checks if check.subject == subject and part in check.name]


def test_a_sound_run_passes_every_check(sound):
    found = diagnose_run(sound)
    assert found.passed, found.text()
    assert found.sound
    assert found.recommended == "laplace"
    assert "Verdict laplace: use Laplace. NUTS passes its checks. Laplace passes its checks." in found.text()
    assert "No problems found" in found.text()
    names = " ".join(check.name for check in found.checks)
    for part in ("weights", "biases", "log joint", "probabilities", "E-BFMI", "divergent", "tree depth", "pivot"):
        assert part in names
    for part in ("R-hat", "bulk ESS", "tail ESS", "k-hat", "KL", "gradient", "total variation", "NLL"):
        assert part in names
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (content["passed"], content["sound"], content["verdict"]) == (True, True, "laplace")
    for check in content["checks"]:
        assert math.isfinite(check["value"])
        assert math.isfinite(check["threshold"])
        assert f"{check['threshold']:.4g}" in check["rule"]
    worst = next(check for check in content["checks"] if check["name"] == "R-hat, centred weights")
    assert (worst["threshold"], worst["fails_at"]) == (1.01, 1.05)
    assert worst["where"]["label"] in ("hand", "<b>", "wrist")
    assert worst["where"]["feature"] in range(D)
    assert worst["where"]["chain"] in range(4)
    (among,) = (check for check in content["checks"] if check["name"] == "R-hat, probabilities")
    assert "128 of 150 images" in among["rule"]
    assert among["where"]["image"].startswith("image-")


@pytest.fixture(scope="module")
def groups(sound):
    """What is read of the run's nuts.nc."""
    data = load(sound / "posterior/nuts.nc")
    return {name: get_dataset(data, name) for name in ("posterior", "sample_stats", "predictions", "constant_data")}


@pytest.fixture
def changed(folder, groups, monkeypatch):
    """Diagnose the run as if its nuts.nc were another: the groups as a change in place leaves them."""

    def diagnosed(change):
        copies = {name: dataset.copy(deep=True) for name, dataset in groups.items()}
        change(copies)
        monkeypatch.setattr(nuts_checks, "netcdf_groups", lambda path: list(copies))
        monkeypatch.setattr(nuts_checks, "load_netcdf", lambda path, name: copies[name])
        return diagnose_run(folder)

    return diagnosed


def put(group, name, at, value):
    def change(groups):
        array = groups[group][name].values
        array[at] = value(array) if callable(value) else value

    return change


def put_probs(at, value):
    """In a file without features, whose probabilities are all that there is."""

    def change(groups):
        groups["constant_data"] = groups["constant_data"].drop_vars("features")
        put("predictions", "probs", at, value)(groups)

    return change


BROKEN = {
    "NaN in a weight": (put("posterior", "weight_centred", (2, 9, 1, 0), np.nan), "weights", {"label": "<b>"}),
    "infinite weight": (put("posterior", "weight_centred", (2, 9, 1, 0), np.inf), "weights", {"chain": 2}),
    "NaN in a bias": (put("posterior", "bias_centred", (1, 3, 2), np.nan), "biases", {"label": "wrist", "chain": 1}),
    "bias of one chain elsewhere": (
        put("posterior", "bias_centred", (0, slice(None), 0), lambda a: a[0, :, 0] + 5),
        "biases",
        {"label": "hand", "chain": 0},
    ),
    "NaN in lp": (put("sample_stats", "lp", (3, 0), np.nan), "log joint", {"chain": 3}),
    "NaN in an energy": (put("sample_stats", "energy", (2, 5), np.nan), "E-BFMI", {"chain": 2}),
    "an energy that stands still": (put("sample_stats", "energy", (1,), 4.7), "E-BFMI", {"chain": 1}),
    "late images": (
        put_probs((1, slice(None), slice(130, None)), lambda a: np.roll(a[1, :, 130:], 1, -1)),
        "probabilities",
        {"chain": 1},
    ),
    "NaN in the last image": (put_probs((0, 0, -1, 0), np.nan), "probabilities", {"label": "hand"}),
    "a divergence": (put("sample_stats", "diverging", (3, 8), True), "divergent", {"most in chain": 3}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_chains_fail_where_they_are_broken(changed, name):
    change, part, where = BROKEN[name]
    found = changed(change)
    failed = [check for check in found.failed if check.subject == "nuts"]
    assert failed
    assert all(part in check.name or "probabilities" in check.name for check in failed)
    assert part in failed[0].name
    assert where.items() <= failed[0].where.items()
    assert not found.passed
    assert not found.sound
    assert "NUTS fails" in found.summary()
    json.dumps(found.to_dict(), allow_nan=False)


def test_between_the_two_limits_is_a_note(changed):
    def widen(groups):
        bias = groups["posterior"]["bias_centred"].values
        bias[0, :, 0] += 0.35 * bias[..., 0].std()

    (check,) = checks(changed(widen), "R-hat, centred biases")
    assert 1.01 < check.value < 1.05
    assert check.word == "note"
    assert not check.decides


def same(found, expected):
    """R-hat, bulk and tail ESS of the same draws, computed twice.

    A draw at which a chain stays is a tie. Where it lies at a quantile of the tails, rounding says whether it counts
    among the some forty draws beyond.
    """
    return found[:2] == pytest.approx(expected[:2], rel=1e-3) and found[2] == pytest.approx(expected[2], rel=0.15)


def test_probabilities_converge_as_the_comparison_says(sound, fitted, monkeypatch):
    seen = []

    def noted(draws):
        seen.append(draws)
        return convergence(draws)

    monkeypatch.setattr(nuts_checks, "convergence", noted)
    compared = json.loads((sound / "comparison.json").read_text())["convergence"]["probabilities"]
    found = [check.value for check in checks(diagnose_run(sound), "probabilities")]
    assert same(found, [compared[name] for name in ("rhat", "ess_bulk", "ess_tail")])
    features, _, _, nuts = fitted
    expected = probabilities(nuts.draws.weight, nuts.draws.bias, features[spread(N)])
    assert any(draws.shape == expected.shape and np.allclose(draws, expected, rtol=1e-13, atol=0) for draws in seen)


def test_probabilities_are_the_file_s_where_it_has_no_features(folder, groups, changed):
    before = checks(changed(lambda groups: None), "probabilities")

    def without(groups):
        groups["constant_data"] = groups["constant_data"].drop_vars("features")

    after = checks(changed(without), "probabilities")
    assert same([check.value for check in after], [check.value for check in before])
    assert [check.where for check in after] == [check.where for check in before]

    def bare(groups):
        del groups["predictions"], groups["constant_data"]

    found = changed(bare)
    assert [check.word for check in checks(found, "probabilities")] == ["skip"] * 3
    assert "not checked for R-hat, probabilities" in found.summary()
    assert not found.passed
    assert not found.sound
    whole = np.concatenate([groups["constant_data"]["features"].values, np.zeros((2, D))])
    save_tensors(folder / "features.safetensors", {"features": torch.tensor(whole)}, {"kind": "features"})
    rows = "".join(f"{i},test\n" for i in range(N)) + "x,train\ny,valid\n"
    (folder / "split.csv").write_text("obs_id,split\n" + rows)
    again = checks(diagnose_run(folder), "probabilities")
    assert same([check.value for check in again], [check.value for check in after])


@pytest.mark.slow
def test_tau_is_looked_at_where_it_was_sampled(folder, fitted):
    features, labels, laplace, _ = fitted
    nuts = bc.sample_nuts(
        laplace, features, labels, num_chains=2, num_samples=60, num_warmup=60, tau_prior="gamma", progress=False
    )
    nuts.tau[1] *= 50
    save(bc.to_inference_data(nuts, features, labels), folder / "posterior/nuts_hierarchical.nc")
    found = diagnose_run(folder)
    failed = {check.name for check in found.failed if check.subject == "nuts_hierarchical"}
    assert "R-hat, tau" in failed
    assert found.sound  # the verdict is about the other
    assert not found.passed


def test_the_depth_limit_is_the_files(folder, fitted):
    features, labels, laplace, _ = fitted
    shallow = bc.sample_nuts(
        laplace, features, labels, num_chains=2, num_samples=150, num_warmup=60, max_tree_depth=1, progress=False
    )
    save(bc.to_inference_data(shallow, features, labels), folder / "posterior/nuts.nc")
    found = diagnose_run(folder)
    assert [check.value for check in checks(found, "tree depth")] == [300]
    assert [check.word for check in checks(found, "chains")] == ["note"]
    assert not found.passed
    assert "tree depth" in repr(found)


def edited(folder, change):
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def test_without_a_comparison_nothing_passes(folder, capsys):
    (folder / "comparison.json").unlink()
    found = diagnose_run(folder)
    assert [check.word for check in found.checks if check.subject == "comparison"] == ["skip"]
    assert not found.passed
    assert "No problems found" not in found.text()
    assert "no posterior is recommended" in found.text()
    assert main(["diagnose", str(folder)]) == 0
    assert main(["diagnose", str(folder), "--strict"]) == 1
    assert "not sound" in capsys.readouterr().err


def to_refine(content):
    content["verdict"] = "refine"
    content["predictive"]["laplace"]["total_variation"] = 0.2


def test_the_summary_is_about_the_recommended_posterior(folder, capsys):
    found = diagnose_run(edited(folder, to_refine))
    assert found.recommended == "refined"
    assert found.sound
    assert not found.passed
    summary = found.summary()
    assert "use the refined Gaussian. NUTS passes its checks. The refined Gaussian passes its checks." in summary
    assert "Not recommended: Laplace fails total variation to NUTS." in summary
    assert main(["diagnose", str(folder), "--strict"]) == 0
    assert summary in capsys.readouterr().out
    edited(folder, lambda content: content["predictive"]["refined"].update(total_variation=0.3))
    assert main(["diagnose", str(folder), "--strict", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["sound"] is False
    assert printed.err.count("\n") == 1
    assert "The refined Gaussian fails total variation to NUTS" in printed.err
    assert main(["diagnose", str(folder)]) == 0
    edited(folder, lambda content: content.update(verdict="undecided"))
    assert main(["diagnose", str(folder), "--strict"]) == 1
    assert "Verdict undecided: no posterior is recommended" in capsys.readouterr().err


def test_what_was_compared_without_labels_or_training_images_is_not_a_pass(folder):
    def bare(content):
        del content["predictive"]["laplace"]["nll_difference"]
        content["importance"] = {}

    found = diagnose_run(edited(folder, bare))
    skipped = [check for check in found.checks if check.word == "skip"]
    assert {check.name for check in skipped if check.subject == "laplace"} == {
        "NLL less that of NUTS",
        "Pareto k-hat",
        "KL to the posterior",
    }
    assert all(check.passed is None and not check.decides for check in skipped)
    assert found.sound


def test_khat_and_kl_are_noted_but_fail_nothing(folder):
    numbers = {"khat": [2.0, 3.0, 1.0, 2.5], "kl": 50.0}
    found = diagnose_run(edited(folder, lambda content: content["importance"]["laplace"].update(numbers)))
    of = [check for check in found.checks if check.subject == "laplace" and check.name.startswith(("Pareto", "KL"))]
    assert [check.word for check in of] == ["note", "note"]
    assert of[0].threshold == pytest.approx(1 - 1 / math.log10(250))
    assert of[1].value == pytest.approx(50 / ((K - 1) * (D + 1)))
    assert "50 nat in all" in of[1].rule
    assert found.passed
    assert "decides nothing" in found.text()


def test_a_kl_that_is_only_a_bound_does_not_pass(folder):
    bound = {"kl": 0.01, "kl_is_lower_bound": True}
    (check,) = checks(
        diagnose_run(edited(folder, lambda content: content["importance"]["refined"].update(bound))), "KL", "refined"
    )
    assert check.word == "info"
    assert "at least" in check.rule


def test_an_infinite_khat_is_read_and_written(folder):
    numbers = {"khat": [None, None, 3.0, None], "kl": None}
    found = diagnose_run(edited(folder, lambda content: content["importance"]["laplace"].update(numbers)))
    assert [check.value for check in found.checks if check.word == "note" and check.subject == "laplace"] == [
        math.inf
    ] * 2
    assert "inf" in found.text()
    json.dumps(found.to_dict(), allow_nan=False)


def test_numbers_of_another_meaning_are_not_taken_for_these(folder):
    old = {"khat": [0.1] * 4, "kl": 0.01, "sd": 0.1, "num_draws": 250}
    found = diagnose_run(edited(folder, lambda content: content["importance"].update(laplace=old)))
    assert [check.word for check in checks(found, "KL", "laplace")] == ["skip"]


HURT = {
    "no predictive": lambda content: content.pop("predictive"),
    "no verdict": lambda content: content.pop("verdict"),
    "another verdict": lambda content: content.update(verdict=["laplace"]),
    "predictive is a list": lambda content: content.update(predictive=[]),
    "no floor": lambda content: content["predictive"].pop("nuts_half"),
    "no kl": lambda content: content["importance"]["laplace"].pop("kl"),
    "null distance": lambda content: content["predictive"]["laplace"].update(total_variation=None),
    "a word for a number": lambda content: content["predictive"]["refined"].update(nll_difference="small"),
    "no khat": lambda content: content["importance"]["laplace"].update(khat=[]),
    "khat of words": lambda content: content["importance"]["refined"].update(khat=["a"]),
    "khat is a number": lambda content: content["importance"]["refined"].update(khat=0.3),
    "no draws": lambda content: content["importance"]["refined"].update(num_draws=0),
    "khat of another": lambda content: content["importance"].update(bogus={"khat": ["a"], "kl": 1, "num_draws": 3}),
    "importance is null": lambda content: content.update(importance=None),
}


@pytest.mark.parametrize("name", HURT)
def test_a_broken_comparison_is_one_line(folder, capsys, name):
    edited(folder, HURT[name])
    with pytest.raises(FileFormatError, match=r"comparison\.json: "):
        diagnose_run(folder)
    assert main(["diagnose", str(folder)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "run again" in said


def test_a_shifted_mean_is_no_map(fitted):
    _, _, laplace, _ = fitted
    assert all(check.passed is not False for check in laplace_checks("laplace", laplace))
    for change, name in (
        ({"newton_decrement": 0.5}, "Newton decrement at the MAP"),
        ({"newton_decrement": math.nan}, "Newton decrement at the MAP"),
        ({"gradient_norm": 1.0}, "gradient norm at the MAP"),
    ):
        found = laplace_checks("laplace", replace(laplace, **change))
        assert [check.name for check in found if check.word == "FAIL"] == [name]


def test_a_refinement_short_of_its_fixed_point_fails(fitted, tmp_path):
    features, labels, laplace, _ = fitted
    refined = laplace.refine(features, labels)
    assert all(check.passed for check in laplace_checks("refined", refined))
    short = replace(refined, refinement=replace(refined.refinement, converged=False))
    noted = replace(refined, refinement=None, notes=("refinement stopped after 25 curvatures short of ...",))
    for one, part in ((short, "fixed point"), (noted, "fixed point"), (replace(refined, newton_decrement=1.0), "mean")):
        assert [part in check.name for check in laplace_checks("refined", one) if check.word == "FAIL"] == [True]


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_a_precision_that_is_lost_in_rounding_fails(fitted, structure):
    features, labels, *_ = fitted
    laplace = bc.fit_laplace(features, labels, prior_precision=2.0, structure=structure)
    assert float(precision_pivots(laplace.covariance).min()) >= 2.0 * (1 - 1e-12)
    name = {"full": "precision_cholesky", "kron": "class_values", "diag": "precision"}[structure]
    stored = getattr(laplace.covariance, name).clone()
    for value in (1e20, math.nan):
        stored[(0,) * stored.dim()] = value
        hurt = replace(laplace, covariance=replace(laplace.covariance, **{name: stored}))
        failed = [check.name for check in laplace_checks("laplace", hurt) if check.word == "FAIL"]
        assert "smallest / largest pivot of the precision" in failed


def test_a_prior_that_dominates_is_noted(fitted):
    features, labels, *_ = fitted
    tight = bc.fit_laplace(features, labels, prior_precision=1e4)
    (check,) = (check for check in laplace_checks("laplace", tight) if "prior sd" in check.name)
    assert check.word == "note"


def test_it_shows_itself_in_a_notebook_without_markup_from_names(folder):
    page = replace(diagnose_run(folder), run="<script>")._repr_html_()
    assert page.startswith("<table>")
    assert "<script>" not in page
    assert "<b>," not in page
    assert "&lt;b&gt;" in page


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(BayescamError, match="holds no posteriors"):
        diagnose_run(tmp_path / "none")
    edited(folder, to_refine)
    (folder / "posterior/refined.safetensors").unlink()
    found = diagnose_run(folder)
    assert [check.word for check in found.checks if check.subject == "refined"] == ["skip"]
    assert not found.sound
    save(bc.to_inference_data(bc.Draws(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2))), folder / "posterior/nuts.nc")
    with pytest.raises(FileFormatError, match=r"nuts\.nc"):
        diagnose_run(folder)
