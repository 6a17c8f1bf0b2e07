"""Every script says what question it answers, and the experiments run on a small scale."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bayescam.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((REPOSITORY / "scripts").glob("[!_]*.py"))
SETTINGS = """
[data]
image_size = 32
phantom_images = 320
[train]
epochs = 1
[nuts]
num_chains = 2
num_samples = 20
num_warmup = 20
[posterior]
num_samples = 30
[explain]
num_images = 3
"""


def _run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(REPOSITORY / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _here(monkeypatch, script: str, *arguments: object, **constants: int) -> None:
    """Run a script in this process, which has the libraries already, with other constants."""
    path = REPOSITORY / "scripts" / script
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, path.stem, module)
    threads = torch.get_num_threads()
    specification.loader.exec_module(module)
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    module.main()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_docstring_says_what_it_answers_and_how_long_it_takes(script):
    text = script.read_text(encoding="utf-8").split('"""')[1]
    assert f"scripts/{script.name}" in text, "the docstring shows how to call it"
    assert "?" in text.splitlines()[0], "the first line asks the question"
    assert re.search(r"seconds|minute|time of the run", text)


def test_the_readme_names_every_script():
    text = (REPOSITORY / "scripts/README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert f"`{script.name}`" in text


@pytest.mark.slow
def test_the_experiments_run_small(tmp_path):
    (tmp_path / "settings.toml").write_text(SETTINGS)
    settings = ("--preset", "quick", "--config", tmp_path / "settings.toml")
    printed = _run("bench_pipeline.py", *settings, "--out", tmp_path / "b")
    assert "| nuts |" in printed
    assert (tmp_path / "b/bench_pipeline.md").read_text() == printed
    (tmp_path / "t").mkdir()
    (tmp_path / "b/quick").rename(tmp_path / "t/run")  # complete: table1.py need not run it again
    printed = _run("table1.py", *settings, "--out", tmp_path / "t")
    assert "| NUTS, tau sampled |" in printed
    assert "0.072 + 0.546 h" in printed
    run = tmp_path / "t/run"
    printed = _run(
        "laplace_vs_hmc.py", "--run", run, "--out", tmp_path / "l", "--taus", 1, "--sizes", 80, "--samples", 20
    )
    assert "| refined |" in printed
    assert len(json.loads((tmp_path / "l/laplace_vs_hmc.json").read_text())) == 6
    assert (tmp_path / "l/laplace_vs_hmc.png").stat().st_size > 1000
    few = ("--per-class", 10, "--prior-precision", 1, "--draws", 20)
    assert "refined, 1 rows:" in _run("predictives.py", "--run", run, *few)
    printed = _run(
        "shift_and_ood.py", "--run", run, "--out", tmp_path / "s", "--members", 1, "--unknown", 12, "--limit", 20
    )
    assert "| deep ensemble |" in printed
    assert "| MC dropout |" in printed
    assert (tmp_path / "s/shift_and_ood.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_studys_table_of_a_mura_tree(tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.toml").write_text(SETTINGS)
    assert main(["data", "phantom", "--num", "200", "--layout", "mura", "--out", str(tmp_path / "tree")]) == 0
    where = ("--root", tmp_path / "tree/MURA-v1.1", "--config", tmp_path / "settings.toml", "--out", tmp_path / "t")
    _here(monkeypatch, "table1.py", "--data", "mura", *where)
    assert "| Laplace, full |" in capsys.readouterr().out
    data = json.loads((tmp_path / "t/run/data.json").read_text())
    official = sum(1 for _ in (tmp_path / "tree/MURA-v1.1/valid").rglob("*.png"))
    assert sum(data["counts"]["test"].values()) == official  # the official valid set is the test set
    assert not data["shareable"]


SMALL = {
    "bench_cam.py": ("--features 16 --cells 3 --images 4 --train 200 --repeats 2", "| mean, sd and P(CAM > 0), full |"),
    "bench_laplace.py": ("--images 300 --width 8 --peers --repeats 1 --refine", "| ours: refine, after the fit"),
    "bench_nuts.py": ("--size tiny --peers --samples 20", "share of a chain's time outside the potential"),
    "cam_coverage.py": (
        "--sets 2 --train 40 --test 4 --teaching 80 --epochs 1 --samples 20",
        "error of the means / sd |",
    ),
    "cam_localisation.py": ("--train 80 --test 14 --epochs 1", "| bell in the centre |"),
    "sbc.py": ("--simulations 3 --draws 9", "nuts: "),
    "shortcut_marker.py": ("--train 80 --test 16 --epochs 1", "| marker tied to the class |"),
}
LEFT = {  # what they leave in --out
    "bench_cam.py": ["bench_cam.md"],
    "cam_coverage.py": ["coverage.csv", "coverage.png"],
    "cam_localisation.py": ["cam_localisation.md"],
    "sbc.py": ["ecdf.png", "ranks.json"],
    "shortcut_marker.py": ["marker-by-chance.png", "marker-tied-to-the-class.png"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_it_runs_small(script, tmp_path, monkeypatch, capsys):
    arguments, words = SMALL[script]
    out = ["--out", tmp_path / "o"] if script in LEFT else []
    _here(monkeypatch, script, *arguments.split(), *out)
    printed = capsys.readouterr().out
    assert words in printed
    if script in LEFT:
        assert sorted(path.name for path in (tmp_path / "o").iterdir()) == LEFT[script]
    if script == "bench_cam.py":
        assert (tmp_path / "o/bench_cam.md").read_text() == printed


@pytest.mark.slow
def test_what_starts_processes_runs_small(tmp_path):
    printed = _run("bench_data.py", "--num", 12, "--size", 32, "--repeats", 1, "--out", tmp_path)
    assert "bayescam phantom, 1 process" in printed
    printed = _run("bench_scale.py", "--million", 500, 1000, "--out", tmp_path)
    assert "exponent of time over N" in printed
    small = ("--train", 64, "--test", 16, "--size", 32, "--epochs", 1)
    assert "accuracy" in _run("phantom_difficulty.py", *small, "--out", tmp_path)
    assert (tmp_path / "phantom_difficulty.txt").is_file()


@pytest.mark.slow
def test_real_features_run_small(mednist_dev, tmp_path, monkeypatch):
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", mednist_dev)
    small = "--width 8 --prior-precision 10 --draws 0 --vbll-epochs 0"
    few = {"PER_CLASS": 20, "VALID": 5, "TEST": 10}
    _here(monkeypatch, "real_features.py", "--zip", archive, *small.split(), "--out", tmp_path, **few)
    assert "full refined (" in (tmp_path / "real_features.md").read_text()
    small = "--width 8 --per-class 10 --prior-precision 10 --draws 20"
    _here(monkeypatch, "predictives.py", "--zip", archive, *small.split(), "--out", tmp_path)
    printed = (tmp_path / "predictives.md").read_text()
    assert "| 60 | 10 | shifted |" in printed
    assert "refined, 2 rows:" in printed
