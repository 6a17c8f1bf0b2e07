"""``bayescam posterior``: from a file of features to the verdict."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import xarray as xr

from bayescam import features_run
from bayescam.cli import main
from bayescam.errors import BayescamError, FileFormatError, UsageError
from bayescam.features_run import FeaturesSettings, check_folder, run_features
from bayescam.posterior import nuts_run
from bayescam.posterior.laplace import load_laplace
from bayescam.posterior.nuts import Nuts, SamplingInterrupted
from bayescam.runfolder import RunFolder, locked
from bayescam.storage import write_text

SMALL = FeaturesSettings(prior_precision=0.5, num_chains=2, num_samples=120, num_warmup=60, num_laplace_samples=50)
FLAGS = ["--prior-precision", "0.5", "--num-chains", "2", "--num-samples", "40", "--num-warmup", "40"]


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
    assert metrics["resampled"] == "rows"
    for name, row in metrics["methods"].items():
        for metric in ("accuracy", "nll", "ece", "brier"):
            interval = metrics["intervals"][name][metric]
            assert interval["value"] == pytest.approx(row[metric])
            assert interval["low"] < interval["high"]
    nll = metrics["intervals"]["nuts"]["nll"]
    assert f"| {nll['value']:.4f} [{nll['low']:.4f}, {nll['high']:.4f}] |" in said
    words = (
        f"The file names no patients. In brackets the 90 % bootstrap interval over {metrics['num_resampled']} rows. "
    )
    assert f"{words}ECE is biased upwards in small samples" in said
    assert metrics["num_resampled"] == metrics["num_test"]
    diagnostics = json.loads((out / "diagnostics.json").read_text())
    assert diagnostics["nuts"]["num_divergent"] == 0
    assert diagnostics["nuts_hierarchical"]["tau"]["mean"] > 0
    assert set(json.loads((out / "timings.json").read_text())["seconds"]) >= {"laplace_full", "nuts", "compare"}
    assert load_laplace(out / "posterior/laplace.safetensors").prior_precision == 0.5
    assert Nuts.load(out / "posterior/nuts.safetensors").draws.weight.shape == (2, 40, 3, 3)
    for name in ("laplace", "refined", "nuts"):
        with xr.open_dataset(out / f"posterior/{name}.nc", group="posterior", engine="h5netcdf") as stored:
            assert {"label", "feature"} <= set(stored["weight"].dims)
    for name in ("laplace", "refined"):
        with xr.open_dataset(out / f"posterior/{name}.nc", group="sample_stats", engine="h5netcdf") as stored:
            assert {"lp", "lp_approx"} <= set(stored)
    for name, parts in {"nuts": {"theta"}, "nuts_hierarchical": {"theta", "tau"}}.items():
        with xr.open_dataset(out / f"posterior/{name}.nc", group="log_prior", engine="h5netcdf") as stored:
            assert parts <= set(stored), set(stored)
    assert not (out / ".scratch").exists()
    sealed = json.loads((out / "run.json").read_text())["files"]
    assert {"metrics.json", "posterior/nuts.nc", "settings.json"} <= set(sealed)


def test_a_table_of_one_patient_has_no_intervals():
    none = {name: {"value": 0.66, "low": None, "high": None} for name in ("accuracy", "nll", "ece", "brier")}
    metrics = {
        **{"num_train": 90, "num_test": 30, "num_features": 3, "classes": ["a", "b"], "prior_precision": 1.0},
        **{"interval_level": 0.9, "resampled": "patients", "num_resampled": 1, "intervals": {"nuts": none}},
    }
    said = features_run._markdown(metrics)
    assert "No number has an interval, for want of a second patient." in said
    assert "| NUTS | 0.660 [-] | 0.6600 [-] |" in said


@pytest.fixture
def sealing(monkeypatch):
    """Runs that fit nothing: they write two files and seal the folder."""

    def stages(table, out, settings, num_workers, device):
        write_text(out / "metrics.json", "{}")
        write_text(out / "posterior/laplace.nc", "draws")
        RunFolder(out).complete({"seed": settings.seed})
        return "done"

    monkeypatch.setattr(features_run, "_stages", stages)


def test_a_second_process_is_refused_and_the_lock_dies_with_the_first(features, tmp_path, sealing):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom bayescam.runfolder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "in"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(BayescamError, match="another run is working in this folder"):
                run_features(features, out, SMALL, **options)
        assert [path.name for path in out.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert run_features(features, out, SMALL) == "done"
    with locked(out):
        pass


def test_resuming_a_complete_run_names_the_file_that_was_changed_by_one_byte(features, tmp_path, sealing):
    out = tmp_path / "out"
    run_features(features, out, SMALL)
    sealed = json.loads((out / "run.json").read_text())["files"]
    assert set(sealed) == {"settings.json", "metrics.json", "posterior/laplace.nc"}
    assert "complete; nothing to do" in run_features(features, out, SMALL, resume=True)
    for name in set(sealed) - {"settings.json"}:
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BayescamError, match=rf"{name}: changed since the run wrote it"):
            run_features(features, out, SMALL, resume=True)
        (out / name).unlink()
        with pytest.raises(BayescamError, match=rf"{name}: missing"):
            run_features(features, out, SMALL, resume=True)
        (out / name).write_bytes(whole)
    (out / "settings.json").write_text((out / "settings.json").read_text() + " ")
    with pytest.raises(BayescamError, match=r"settings\.json: changed"):
        run_features(features, out, SMALL, resume=True)


@pytest.mark.parametrize("command", [["report"], ["predict", "x.png", "--run"]])
def test_what_needs_images_says_that_the_run_has_none(features, tmp_path, sealing, capsys, command):
    run_features(features, tmp_path / "out", SMALL)
    assert main([*command, str(tmp_path / "out")]) == 1
    assert "is a run on features, without images; give the folder of a bayescam run" in capsys.readouterr().err


def test_overwriting_replaces_the_run_and_all_that_is_of_it(features, tmp_path, sealing):
    out = tmp_path / "out"
    run_features(features, out, SMALL)
    write_text(out / "table.md", "of the earlier run")
    write_text(out / ".scratch/nuts/chain-0.safetensors", "of the earlier run")
    (out / ".x.partial.json").write_text("of a run that was killed")
    run_features(features, out, replace(SMALL, seed=5), overwrite=True)
    assert json.loads((out / "settings.json").read_text())["seed"] == 5
    assert {path.name for path in out.iterdir()} == {".lock", "settings.json", "metrics.json", "posterior", "run.json"}


DECISIVE = {**asdict(SMALL), "features_sha256": "0" * 64}


@pytest.mark.parametrize(
    ("settings", "beside", "options", "error", "said"),
    [
        (None, "mine.txt", {}, UsageError, r"not such a run \(mine\.txt\); name another"),
        (None, "mine.txt", {"overwrite": True}, UsageError, "not such a run"),
        (None, "\x1b[31m\n.txt", {}, UsageError, r"\\x1b\[31m\\n\.txt"),
        ('{"editor.tabSize": 4}', None, {"overwrite": True}, UsageError, "not such a run"),
        (DECISIVE, "table.md", {}, UsageError, "not empty; name another, or say --resume or --overwrite"),
        (DECISIVE, "mine.txt", {"overwrite": True}, UsageError, r"holds mine\.txt, which no run wrote"),
        (DECISIVE | {"seed": 7}, None, {"resume": True}, UsageError, "seed was 7 and is now 0"),
        (DECISIVE | {"features_sha256": "1"}, None, {"resume": True}, UsageError, "features_sha256 was '1'"),
        (DECISIVE | {"prior_precision": "evidence"}, None, {"resume": True}, UsageError, "prior_precision was 'evid"),
        ("[]", None, {"resume": True}, FileFormatError, r"settings\.json: holds no JSON object"),
        ("{", None, {"resume": True}, FileFormatError, r"settings\.json: not readable as JSON"),
    ],
)
def test_a_folder_that_is_not_this_run_is_refused_and_left_as_it_is(tmp_path, settings, beside, options, error, said):
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    if beside is not None:
        (tmp_path / beside).write_text("precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error, match=said) as caught:
        check_folder(tmp_path, DECISIVE, **{"resume": False, "overwrite": False, **options})
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_this_run_or_empty_is_taken(tmp_path):
    flags = {"resume": True, "overwrite": False}
    assert check_folder(tmp_path / "new", DECISIVE, **flags) == []
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".x.partial.json").write_text("half")
    assert check_folder(tmp_path, DECISIVE, resume=False, overwrite=False) == []
    (tmp_path / "settings.json").write_text(json.dumps(DECISIVE))
    assert check_folder(tmp_path, DECISIVE, **flags) == ["settings.json"]
    assert check_folder(tmp_path, DECISIVE | {"seed": 9}, resume=False, overwrite=False) == ["settings.json"]
    assert check_folder(tmp_path, DECISIVE | {"seed": 9}, resume=False, overwrite=True) == ["settings.json"]


def test_settings_of_the_file_and_the_folder(features, tmp_path, sealing):
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


@pytest.mark.slow
def test_interrupted_run_resumes_to_the_same_numbers(features, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    short = replace(SMALL, num_samples=30, num_warmup=30)
    run_features(features, whole, short)
    seen, advance = [0], nuts_run.Progress.advance

    def press(self, *args):
        seen[0] += 1
        if seen[0] == 90:
            raise KeyboardInterrupt
        advance(self, *args)

    monkeypatch.setattr(nuts_run.Progress, "advance", press)
    with pytest.raises(SamplingInterrupted, match="1 of 2 chains complete"):
        run_features(features, broken, short)
    monkeypatch.undo()
    assert (broken / ".scratch/nuts/chain-0.safetensors").is_file()
    run_features(features, broken, short, resume=True)
    for name in ("comparison.json", "metrics.json"):
        assert (whole / name).read_text() == (broken / name).read_text()
    assert "complete; nothing to do" in run_features(features, broken, short, resume=True)


def test_standardise_makes_the_scale_of_a_column_irrelevant(features, tmp_path, monkeypatch):
    with np.load(features) as stored:
        phi, labels = stored["features"], stored["labels"]
    np.savez(tmp_path / "big.npz", features=phi * [1, 1e4, 1e-3] + [0, 5, -1], labels=labels)
    seen = []
    monkeypatch.setattr(features_run, "_stages", lambda table, *rest: seen.append(table) or "")
    for number, path in enumerate((features, tmp_path / "big.npz")):
        run_features(path, tmp_path / str(number), replace(SMALL, standardise=True))
    for part in ("features", "test_features"):
        one, other = (getattr(table, part) for table in seen)
        np.testing.assert_allclose(one, other, atol=1e-9)
    np.testing.assert_allclose(seen[0].features.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(seen[0].features.std(0), 1)


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--prior-precision", "big"], 2, "positive number or evidence"),
        (["--prior-precision", "-1"], 2, "--prior-precision -1.0: give a positive number or evidence"),
        (["--prior-precision", "nan"], 2, "--prior-precision nan"),
        (["--num-samples", "0"], 2, "--num-samples 0: give a whole number from 4 to 10000000"),
        (["--num-samples", "1000000000000000"], 2, "--num-samples 1000000000000000"),
        (["--num-workers", "-3"], 2, "--num-workers -3"),
        (["--seed", "-1"], 2, "--seed -1"),
        (["--resume", "--overwrite"], 2, "exclude each other"),
    ],
)
def test_wrong_flags_are_one_line(features, tmp_path, capsys, flags, status, said):
    assert main(["posterior", "--features", str(features), "--out", str(tmp_path / "out"), *flags]) == status
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_file_is_named(tmp_path, capsys):
    assert main(["posterior", "--features", str(tmp_path / "no.npz"), "--out", str(tmp_path / "out")]) == 1
    assert "no.npz: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
