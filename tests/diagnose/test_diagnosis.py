"""``bayescam diagnose``: every line a pass or a fail by its own threshold, read from the files of a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import bayescam as bc
from bayescam.diagnose.diagnosis import diagnose_run, laplace_checks, smallest_pivot
from bayescam.diagnose.inference_data import save
from bayescam.errors import BayescamError, FileFormatError

N, D, K = 150, 3, 3


@pytest.fixture(scope="module")
def fitted():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (N,), generator=generator)
    laplace = bc.fit_laplace(features, labels, prior_precision=2.0)
    nuts = bc.sample_nuts(laplace, features, labels, num_chains=4, num_samples=250, num_warmup=80, progress=False)
    return features, labels, laplace, nuts


@pytest.fixture(scope="module")
def sound(fitted, tmp_path_factory):
    features, labels, laplace, nuts = fitted
    path = tmp_path_factory.mktemp("run")
    save(bc.to_inference_data(nuts, features, labels), path / "posterior/nuts.nc")
    laplace.save(path / "posterior/laplace.safetensors")
    comparison = bc.compare_posteriors(laplace, nuts, features, labels, training=(features, labels))
    (path / "comparison.json").write_text(json.dumps(comparison.to_dict()))
    return path


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "run")


def test_a_sound_run_passes_every_check(folder):
    found = diagnose_run(folder)
    assert found.passed, found.text()
    assert "no problems found" in found.text()
    names = " ".join(check.name for check in found.checks)
    for part in (
        "R-hat",
        "bulk ESS",
        "tail ESS",
        "E-BFMI",
        "divergent",
        "tree depth",
        "pivot",
        "k-hat",
        "KL",
        "gradient",
    ):
        assert part in names
    assert all(check.rule for check in found.checks)
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


def test_the_depth_limit_is_the_files(folder, fitted):
    features, labels, laplace, _ = fitted
    shallow = bc.sample_nuts(
        laplace, features, labels, num_chains=2, num_samples=150, num_warmup=60, max_tree_depth=1, progress=False
    )
    save(bc.to_inference_data(shallow, features, labels), folder / "posterior/nuts.nc")
    found = diagnose_run(folder)
    assert [check.value for check in found.checks if "tree depth" in check.name] == [300]
    assert not found.passed
    assert "tree depth" in repr(found)


def test_khat_and_kl_are_noted_but_fail_nothing(folder):
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    content["importance"]["laplace"] |= {"khat": [2.0, 3.0, 1.0, 2.5], "kl": 50.0}
    path.write_text(json.dumps(content))
    found = diagnose_run(folder)
    assert [check.word for check in found.checks if check.name.startswith(("Pareto", "KL"))] == ["note", "note"]
    assert found.passed
    assert "decides nothing" in found.text()


def test_an_infinite_khat_is_read_and_written(folder):
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    content["importance"]["laplace"] |= {"khat": [None, None, 3.0, None], "kl": None}
    path.write_text(json.dumps(content))
    found = diagnose_run(folder)
    assert [check.value for check in found.checks if check.word == "note"] == [float("inf")] * 2
    assert "inf" in found.text()
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_shifted_mean_is_no_map(fitted):
    features, _, laplace, _ = fitted
    assert all(check.passed is not False for check in laplace_checks("laplace", laplace))
    moved = replace(laplace, newton_decrement=0.5)
    assert [check.name for check in laplace_checks("laplace", moved) if check.word == "FAIL"] == [
        "Newton decrement at the MAP"
    ]
    assert len(features) == N


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_every_pivot_is_at_least_the_priors_precision(fitted, structure):
    features, labels, *_ = fitted
    laplace = bc.fit_laplace(features, labels, prior_precision=2.0, structure=structure)
    assert smallest_pivot(laplace.covariance) >= 2.0 * (1 - 1e-12)


def test_it_shows_itself_in_a_notebook_without_markup_from_names(folder):
    page = replace(diagnose_run(folder), run="<script>")._repr_html_()
    assert page.startswith("<table>")
    assert "<script>" not in page


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(BayescamError, match="holds no posteriors"):
        diagnose_run(tmp_path / "none")
    save(bc.to_inference_data(bc.Draws(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2))), folder / "posterior/nuts.nc")
    with pytest.raises(FileFormatError, match=r"nuts\.nc"):
        diagnose_run(folder)
