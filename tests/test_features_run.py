"""``bayescam posterior``: from a file of features to the verdict."""

import json

import numpy as np
import pytest
import xarray as xr

from bayescam.cli import main
from bayescam.errors import UsageError
from bayescam.features_run import FeaturesSettings, run_features
from bayescam.posterior import nuts_run
from bayescam.posterior.laplace import load_laplace
from bayescam.posterior.nuts import Nuts, SamplingInterrupted

SMALL = FeaturesSettings(prior_precision=0.5, num_chains=2, num_samples=120, num_warmup=60, num_laplace_samples=50)
FLAGS = ["--prior-precision", "0.5", "--num-chains", "2", "--num-samples", "120", "--num-warmup", "60"]


@pytest.fixture
def features(tmp_path):
    generator = np.random.default_rng(0)
    phi = generator.standard_normal((150, 3))
    logits = phi @ generator.standard_normal((3, 3)) * 2
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(1)
    path = tmp_path / "f.npz"
    np.savez(path, features=phi, labels=labels)
    return path


def test_command_line_leaves_the_verdict_and_every_file(features, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["posterior", "--features", str(features), "--out", str(out), "--sample-tau", *FLAGS]) == 0
    said = capsys.readouterr().out
    comparison = json.loads((out / "comparison.json").read_text())
    assert f"Verdict: {comparison['verdict']}" in said
    assert comparison["verdict"] in {"laplace", "refine", "nuts", "undecided"}
    assert set(comparison["importance"]) == {"laplace", "refined"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["methods"]) == [
        "map",
        "laplace_diag",
        "laplace_kron",
        "laplace_full",
        "laplace_refined",
        "nuts",
        "nuts_hierarchical",
    ]
    for row in metrics["methods"].values():
        assert {"accuracy", "nll", "ece", "brier"} <= set(row)
    diagnostics = json.loads((out / "diagnostics.json").read_text())
    assert diagnostics["nuts"]["num_divergent"] == 0
    assert diagnostics["nuts_hierarchical"]["tau"]["mean"] > 0
    assert set(json.loads((out / "timings.json").read_text())["seconds"]) >= {"laplace_full", "nuts", "compare"}
    assert load_laplace(out / "posterior/laplace.safetensors").prior_precision == 0.5
    assert Nuts.load(out / "posterior/nuts.safetensors").draws.weight.shape == (2, 120, 3, 3)
    for name in ("laplace", "refined", "nuts"):
        with xr.open_dataset(out / f"posterior/{name}.nc", group="posterior", engine="h5netcdf") as stored:
            assert {"label", "feature"} <= set(stored["weight"].dims)
    assert not (out / ".scratch").exists()
    sealed = json.loads((out / "run.json").read_text())["files"]
    assert {"metrics.json", "posterior/nuts.nc", "settings.json"} <= set(sealed)
    again = ["posterior", "--features", str(features), "--out", str(out), "--sample-tau", *FLAGS, "--resume"]
    (out / "table.md").write_text("other")
    assert main(again) == 1
    assert "changed since the run wrote it" in capsys.readouterr().err


def test_settings_of_the_file_and_the_folder(features, tmp_path):
    out = tmp_path / "out"
    run_features(features, out, SMALL)
    with pytest.raises(UsageError, match="not empty"):
        run_features(features, out, SMALL)
    with pytest.raises(UsageError, match="num_samples was 120 and is now 7"):
        run_features(features, out, FeaturesSettings(**{**vars(SMALL), "num_samples": 7}), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        run_features(features, tmp_path / "other", SMALL, overwrite=True)
    (tmp_path / "other" / "settings.json").write_text('{"editor.tabSize": 4}')
    with pytest.raises(UsageError, match=r"not such a run"):
        run_features(features, tmp_path / "other", SMALL, overwrite=True)
    assert (tmp_path / "other" / "mine.txt").read_text() == "precious"
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"holds mine\.txt, which no run wrote"):
        run_features(features, out, SMALL, overwrite=True)
    assert (out / "metrics.json").is_file()
    with pytest.raises(UsageError, match="is a file"):
        run_features(features, features, SMALL)


def test_interrupted_run_resumes_to_the_same_numbers(features, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_features(features, whole, SMALL)
    seen, advance = [0], nuts_run.Progress.advance

    def press(self, *args):
        seen[0] += 1
        if seen[0] == 250:
            raise KeyboardInterrupt
        advance(self, *args)

    monkeypatch.setattr(nuts_run.Progress, "advance", press)
    with pytest.raises(SamplingInterrupted, match="1 of 2 chains complete"):
        run_features(features, broken, SMALL)
    monkeypatch.undo()
    assert (broken / ".scratch/nuts/chain-0.safetensors").is_file()
    run_features(features, broken, SMALL, resume=True)
    for name in ("comparison.json", "metrics.json"):
        assert (whole / name).read_text() == (broken / name).read_text()
    assert "complete; nothing to do" in run_features(features, broken, SMALL, resume=True)


def test_standardise_makes_the_scale_of_a_column_irrelevant(features, tmp_path):
    with np.load(features) as stored:
        phi, labels = stored["features"], stored["labels"]
    np.savez(tmp_path / "big.npz", features=phi * [1, 1e4, 1e-3] + [0, 5, -1], labels=labels)
    settings = FeaturesSettings(**{**vars(SMALL), "standardise": True})
    run_features(features, tmp_path / "a", settings)
    run_features(tmp_path / "big.npz", tmp_path / "b", settings)
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text())["methods"] for name in "ab")
    assert a["laplace_full"]["nll"] == pytest.approx(b["laplace_full"]["nll"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--prior-precision", "big"], 2, "positive number or evidence"),
        (["--prior-precision", "-1"], 1, "must be positive"),
        (["--num-samples", "0"], 1, "num_samples is 0"),
        (["--resume", "--overwrite"], 2, "exclude each other"),
    ],
)
def test_wrong_flags_are_one_line(features, tmp_path, capsys, flags, status, said):
    assert main(["posterior", "--features", str(features), "--out", str(tmp_path / "out"), *flags]) == status
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_missing_file_is_named(tmp_path, capsys):
    assert main(["posterior", "--features", str(tmp_path / "no.npz"), "--out", str(tmp_path / "out")]) == 1
    assert "no.npz: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
