"""The whole way, small: every file of a run, the same numbers again, new images, real radiographs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bayescam.cli import main
from bayescam.runfolder import WRITTEN
from bayescam.storage import load_netcdf, sha256_of

SETTINGS = """
[data]
image_size = 32
phantom_images = 180
[train]
epochs = 2
[nuts]
num_chains = 2
num_samples = 20
num_warmup = 20
[posterior]
num_samples = 50
[explain]
num_images = 6
"""
FILES = """
config.toml environment.json split.csv backbone.safetensors posterior/laplace.safetensors posterior/laplace.nc
posterior/nuts.nc metrics.json timings.json table.md comparison.json cams.nc report.html MODEL_CARD.md run.json
history.csv predictions.nc""".split()
METHODS = {"cnn", "map", "map_temperature", "laplace_diag", "laplace_kron", "laplace_full", "laplace_refined", "nuts"}


def _config(folder: Path, text: str = SETTINGS) -> Path:
    file = folder / "settings.toml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", "--config", str(_config(folder)), "--out", str(folder / "r"), "--device", "cpu"]) == 0
    return folder / "r"


@pytest.mark.slow
class TestPhantom:
    def test_every_file_is_there_with_real_numbers(self, tiny_run):
        for name in FILES:
            assert (tiny_run / name).stat().st_size > 0, name
        assert list((tiny_run / "figures").glob("*.png"))
        assert {path.name for path in tiny_run.iterdir()} <= WRITTEN, "what --overwrite may remove must be listed"
        metrics = json.loads((tiny_run / "metrics.json").read_text())
        assert set(metrics["methods"]) == METHODS
        assert 0.01 <= metrics["temperature"] <= 100
        assert (metrics["temperature_bound"] is None) == (0.01 < metrics["temperature"] < 100)
        for row in metrics["methods"].values():
            assert 0 <= row["accuracy"] <= 1
            assert all(np.isfinite(row[key]) for key in ("nll", "ece", "brier"))
        with (tiny_run / "split.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == 180
        assert metrics["num_test"] == sum(row["split"] == "test" for row in rows)
        assert json.loads((tiny_run / "comparison.json").read_text())["verdict"] in (
            "laplace",
            "refine",
            "nuts",
            "undecided",
        )

    def test_the_gaussians_files_hold_the_log_joint_of_their_draws(self, tiny_run):
        for name in ("laplace", "refined"):
            stats = load_netcdf(tiny_run / f"posterior/{name}.nc", "sample_stats")
            assert {"lp", "lp_approx"} <= set(stats)
            assert np.isfinite(stats["lp"]).all()

    def test_the_report_says_whether_the_model_looks_at_the_marker(self, tiny_run):
        words = (tiny_run / "report.html").read_text()
        assert "Does it look at the lead marker? In " in words
        assert "more than the bones do with probability 0." in words
        cams = load_netcdf(tiny_run / "cams.nc")
        assert 0 <= cams.attrs["marker_low"] <= cams.attrs["marker_mean"] <= cams.attrs["marker_high"] <= 1
        assert cams["attribution"].shape == cams["joint"].shape
        assert cams["joint"].shape == (*cams["marker_outranks"].shape, cams.attrs["h"], cams.attrs["w"])
        assert cams.attrs["marker_images"] >= np.isfinite(cams["marker_outranks"].values).sum() > 0

    def test_run_json_seals_every_file(self, tiny_run):
        sealed = json.loads((tiny_run / "run.json").read_text())
        assert sealed["status"] == "complete"
        for name, facts in sealed["files"].items():
            assert sha256_of(tiny_run / name) == facts["sha256"]
        assert set(FILES) - {"run.json"} <= set(sealed["files"])

    def test_the_config_fed_back_gives_the_same_metrics_to_the_last_byte(self, tiny_run, tmp_path):
        assert main(["run", "--config", str(tiny_run / "config.toml"), "--out", str(tmp_path / "again")]) == 0
        for name in ("metrics.json", "split.csv", "history.csv", "config.toml", "table.md"):
            assert (tmp_path / "again" / name).read_bytes() == (tiny_run / name).read_bytes(), name

    def test_a_second_run_never_overwrites_and_resume_says_complete(self, tiny_run, capsys):
        before = sha256_of(tiny_run / "metrics.json")
        assert main(["run", "--out", str(tiny_run)]) == 2
        assert "not empty" in capsys.readouterr().err
        assert main(["run", "--resume", "--out", str(tiny_run)]) == 0
        assert "complete; nothing to do" in capsys.readouterr().out
        assert sha256_of(tiny_run / "metrics.json") == before

    def test_predict_and_explain_new_images(self, tiny_run, tmp_path, capsys):
        pixels = (np.random.default_rng(0).random((90, 70)) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "new.png")
        capsys.readouterr()
        assert main(["predict", str(tmp_path / "new.png"), "--run", str(tiny_run), "--json"]) == 0
        (prediction,) = json.loads(capsys.readouterr().out)
        assert sum(row["probability"] for row in prediction["classes"]) == pytest.approx(1)
        for row in prediction["classes"]:
            low, high = row["interval_90"]
            assert 0 <= low <= high <= 1
        assert 0 <= prediction["mutual_information_nats"] <= prediction["entropy_nats"] + 0.05
        assert main(["predict", str(tmp_path / "new.png"), "--run", str(tiny_run)]) == 0
        assert "mutual information" in capsys.readouterr().out
        pictures = tmp_path / "pictures"
        assert main(["explain", str(tmp_path / "new.png"), "--run", str(tiny_run), "--out", str(pictures)]) == 0
        with Image.open(pictures / "cam-001.png") as picture:
            assert min(picture.size) > 200
        assert main(["explain", str(tmp_path / "new.png"), "--run", str(tiny_run), "--out", str(pictures)]) == 2
        assert "exists" in capsys.readouterr().err
        assert main(["predict", str(tmp_path / "absent.png"), "--run", str(tiny_run)]) == 1
        assert "absent.png" in capsys.readouterr().err

    def test_a_file_that_was_changed_is_refused(self, tiny_run, tmp_path, capsys):
        shutil.copytree(tiny_run, tmp_path / "r")
        with (tmp_path / "r/backbone.safetensors").open("ab") as stream:
            stream.write(b"x")
        assert main(["predict", "x.png", "--run", str(tmp_path / "r")]) == 1
        assert "changed since the run wrote it" in capsys.readouterr().err

    def test_diagnose_and_report_again(self, tiny_run, tmp_path, capsys):
        shutil.copytree(tiny_run, tmp_path / "r")
        assert main(["diagnose", str(tmp_path / "r"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
        (tmp_path / "r/report.html").unlink()
        assert main(["report", str(tmp_path / "r")]) == 0
        assert (tmp_path / "r/report.html").stat().st_size > 10_000
        sealed = json.loads((tmp_path / "r/run.json").read_text())
        assert sealed["files"]["report.html"]["sha256"] == sha256_of(tmp_path / "r/report.html")


def _folder(root: Path, per_class: int = 30) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(("left", "middle", "right")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture = rng.integers(0, 60, (40, 36)).astype(np.uint8)
            picture[:, 12 * label : 12 * label + 12] += 120
            Image.fromarray(picture).save(root / name / f"{i}.png")
    return root


FOLDER_SETTINGS = SETTINGS.replace("phantom_images = 180\n", "")


@pytest.mark.slow
def test_unreadable_images_stop_the_run_before_training_and_are_all_named(tmp_path, capsys):
    root = _folder(tmp_path / "images")
    (root / "left/3.png").write_bytes(b"not an image")
    (root / "right/7.png").write_bytes(b"")
    command = ["run", "--data", str(root), "--config", str(_config(tmp_path, FOLDER_SETTINGS))]
    assert main([*command, "--out", str(tmp_path / "a")]) == 1
    said = capsys.readouterr().err
    assert "2 unreadable images" in said
    assert "left/3.png" in said
    assert "right/7.png" in said
    assert not (tmp_path / "a/backbone.safetensors").exists()
    assert main([*command, "--out", str(tmp_path / "b"), "--on-bad", "skip"]) == 0
    assert len(json.loads((tmp_path / "b/data.json").read_text())["skipped"]) == 2
    with (tmp_path / "b/split.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 88


@pytest.mark.parametrize(
    ("per_class", "remove", "words"),
    [(1, (), "is left without a"), (5, ("middle", "right"), "only one class")],
)
def test_data_that_cannot_be_learned_from_is_refused_with_the_way_out(tmp_path, capsys, per_class, remove, words):
    root = _folder(tmp_path / "images", per_class)
    for name in remove:
        shutil.rmtree(root / name)
    assert main(["run", "--data", str(root), "--out", str(tmp_path / "r")]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_real_radiographs(mednist_dev, tmp_path):
    config = _config(tmp_path, FOLDER_SETTINGS.replace("epochs = 2", "epochs = 5"))
    command = ["run", "--data", str(mednist_dev), "--limit", "300", "--config", str(config)]
    assert main([*command, "--out", str(tmp_path / "r")]) == 0
    metrics = json.loads((tmp_path / "r/metrics.json").read_text())
    assert len(metrics["classes"]) == 6
    assert metrics["methods"]["cnn"]["accuracy"] > 0.5
    assert metrics["methods"]["map"]["accuracy"] > 0.8
