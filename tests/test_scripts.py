"""Every script says what question it answers, and the experiments run on a small scale."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bayescam as bc
from bayescam.cli import main
from bayescam.config import read_config
from bayescam.data.dataset import open_dataset
from bayescam.data.pixels import Pixels
from bayescam.diagnose.intervals import Interval
from bayescam.errors import BayescamError
from bayescam.runfolder import RunFolder
from bayescam.stages.state import RunState
from bayescam.storage import save_tensors, write_csv, write_text

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((REPOSITORY / "scripts").glob("[!_]*.py"))
SETTINGS = """
[data]
image_size = 32
phantom_images = 250
limit = 200
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


def _module(monkeypatch, name: str):
    """A module of the scripts' folder."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    return importlib.import_module(name)


def _run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(REPOSITORY / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _here(monkeypatch, script: str, *arguments: object) -> None:
    """Run a script in this process, which has the libraries already."""
    path = REPOSITORY / "scripts" / script
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, path.stem, module)
    threads = torch.get_num_threads()
    specification.loader.exec_module(module)
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
def test_the_experiments_run_small(tmp_path, monkeypatch, capsys):
    def printed_by(script, *arguments):
        _here(monkeypatch, script, *arguments)
        return capsys.readouterr().out

    (tmp_path / "settings.toml").write_text(SETTINGS)
    settings = ("--preset", "quick", "--config", tmp_path / "settings.toml")
    printed = _run("bench_pipeline.py", *settings, "--out", tmp_path / "b")
    assert "| nuts |" in printed
    assert (tmp_path / "b/bench_pipeline.md").read_text() == printed
    (tmp_path / "t").mkdir()
    (tmp_path / "b/quick").rename(tmp_path / "t/run")  # complete: table1.py need not run it again
    printed = printed_by("table1.py", *settings, "--out", tmp_path / "t")
    assert "| NUTS, tau sampled |" in printed
    assert "0.072 + 0.546 h" in printed
    run = tmp_path / "t/run"
    few = ("--taus", 1, "--sizes", 80, "--samples", 20, "--warmup", 20)
    printed = printed_by("laplace_vs_hmc.py", "--run", run, "--out", tmp_path / "l", *few)
    assert "| refined |" in printed
    assert len(json.loads((tmp_path / "l/laplace_vs_hmc.json").read_text())) == 6
    assert (tmp_path / "l/laplace_vs_hmc.png").stat().st_size > 1000
    assert (tmp_path / "l/laplace_vs_hmc.md").read_text() == printed
    nuts = json.loads((tmp_path / "l/laplace_vs_hmc.json").read_text())[-1]
    assert nuts["rhat"] > 1.05, "twenty draws do not converge, and the table says so"
    assert not nuts["converged"]
    assert 0 < nuts["tv"]["value"] < 1
    assert f"NUTS, half against half, NOT CONVERGED | {nuts['tv']['value']:.4f}" in printed
    assert f"| {nuts['rhat']:.3f} | {nuts['ess']:.0f} |" in printed
    assert "not converged: n = 80, tau = 1" in printed
    few = ("--per-class", 10, "--prior-precision", 1, "--draws", 20)
    assert "refined, 1 rows:" in printed_by("predictives.py", "--run", run, *few)
    shift = ("shift_and_ood.py", "--run", run, "--members", 1, "--num-unknown", 12)
    printed = printed_by(*shift, "--out", tmp_path / "s", "--limit", 1000)
    assert "| deep ensemble |" in printed
    assert "| MC dropout |" in printed
    assert (tmp_path / "s/shift_and_ood.png").stat().st_size > 1000
    clean = {row["method"]: row for row in json.loads((tmp_path / "s/shift_and_ood.json").read_text())["shift"][:9]}
    for name, row in json.loads((run / "metrics.json").read_text())["methods"].items():
        if name != "map_temperature":  # on clean test images the run's own numbers: the very images that it kept
            assert clean[name]["nll"]["value"] == pytest.approx(row["nll"], abs=1e-5), name


def _picture(path: Path, seed: int, more: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(seed).integers(0, 100, (30, 40)) + more
    Image.fromarray(grey.astype(np.uint8)).save(path)


@pytest.mark.slow
def test_shift_of_images_that_are_no_phantom_asks_for_unknown_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.toml").write_text(SETTINGS.replace("phantom_images = 250\nlimit = 200\n", ""))
    for label in ("left", "right"):
        for i in range(40):
            _picture(tmp_path / f"images/{label}/{i}.png", i, 100 * (label == "left"))
    where = ["--data", str(tmp_path / "images"), "--config", str(tmp_path / "settings.toml")]
    assert main(["run", *where, "--out", str(tmp_path / "r")]) == 0
    capsys.readouterr()
    few = ("--run", tmp_path / "r", "--members", 0, "--dropout", 0, "--limit", 10, "--num-unknown", 7)
    _here(monkeypatch, "shift_and_ood.py", *few, "--out", tmp_path / "without")
    printed = capsys.readouterr().out
    assert "name a folder of images of what this network was not taught with --unknown" in printed.splitlines()[0]
    assert "| - | - | - | - |" in printed
    assert json.loads((tmp_path / "without/shift_and_ood.json").read_text())["ood"] == []
    for i in range(9):
        _picture(tmp_path / f"chests/some/{i}.png", i, 50)
    _here(monkeypatch, "shift_and_ood.py", *few, "--unknown", tmp_path / "chests", "--out", tmp_path / "with")
    found = json.loads((tmp_path / "with/shift_and_ood.json").read_text())["ood"]
    assert {row["method"] for row in found} >= {"cnn", "nuts", "laplace_refined"}
    assert "MC dropout" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_studys_table_of_a_mura_tree(tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.toml").write_text(SETTINGS)
    assert main(["data", "phantom", "--num", "200", "--layout", "mura", "--out", str(tmp_path / "tree")]) == 0
    where = ("--root", tmp_path / "tree/MURA-v1.1", "--config", tmp_path / "settings.toml", "--out", tmp_path / "t")
    _here(monkeypatch, "table1.py", "--data", "mura", "--preset", "quick", *where)
    assert "| Laplace, full |" in capsys.readouterr().out
    data = json.loads((tmp_path / "t/run/data.json").read_text())
    official = sum(1 for _ in (tmp_path / "tree/MURA-v1.1/valid").rglob("*.png"))
    assert sum(data["counts"]["test"].values()) == official  # the official valid set is the test set
    assert not data["shareable"]


SMALL = {
    "bench_cam.py": ("--features 16 --cells 3 --images 4 --train 200 --repeats 2", "| mean, sd and P(CAM > 0), full |"),
    "bench_laplace.py": ("--images 300 --width 8 --peers --repeats 1 --refine", "| ours: refine, after the fit"),
    "bench_nuts.py": ("--size tiny --peers --samples 20 --seed 1", "share of a chain's time outside the potential"),
    "cam_coverage.py": (
        "--sets 2 --train 40 --test 4 --teaching 48 --epochs 1 --samples 20 --warmup 20",
        "error of the means / sd |",
    ),
    "cam_localisation.py": ("--train 80 --test 14 --epochs 1", "| bell in the centre |"),
    "sbc.py": ("--simulations 3 --draws 9", "nuts: "),
    "shortcut_marker.py": ("--train 80 --test 16 --epochs 1 --parts elbow wrist", "| marker tied to the class |"),
}
LEFT = {  # what they leave in --out; the first file is what they print
    "bench_cam.py": ["bench_cam.md"],
    "bench_laplace.py": ["bench_laplace.md"],
    "bench_nuts.py": ["bench_nuts.txt", "bench_nuts.json"],
    "cam_coverage.py": ["cam_coverage.md", "coverage.csv", "coverage.png"],
    "cam_localisation.py": ["cam_localisation.md"],
    "sbc.py": ["sbc.txt", "ecdf.png", "ranks.json"],
    "shortcut_marker.py": ["shortcut_marker.md", "marker-by-chance.png", "marker-tied-to-the-class.png"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_it_runs_small(script, tmp_path, monkeypatch, capsys):
    arguments, words = SMALL[script]
    _here(monkeypatch, script, *arguments.split(), "--out", tmp_path / "o")
    printed = capsys.readouterr().out
    assert words in printed
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == sorted(LEFT[script])
    assert (tmp_path / "o" / LEFT[script][0]).read_text() == printed


def test_the_contact_sheet_runs_small(tmp_path, monkeypatch):
    _here(monkeypatch, "contact_sheet.py", "--size", 32, "--patients", 1, "--out", tmp_path / "o/sheet.png")
    with Image.open(tmp_path / "o/sheet.png") as sheet:
        assert sheet.size == (2 * 32 + 6, 7 * (32 + 18))
        assert len(sheet.convert("RGB").getcolors(1 << 16)) > 20


@pytest.mark.slow
def test_a_fuzz_keeps_what_it_prints(tmp_path):
    printed = _run("fuzz.py", "--reader", "config", "--rounds", 3, "--out", tmp_path)
    assert re.fullmatch(r"config: (\d answered|, |\d refused)+\n", printed)
    assert (tmp_path / "fuzz.txt").read_text() == printed


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "bench_scale.py"], ids=lambda p: p.name)
def test_it_has_a_seed_and_keeps_what_it_makes(script):
    text = script.read_text(encoding="utf-8")
    assert 'add_argument("--seed"' in text
    assert re.search(r'add_argument\(\s*"--out"', text)
    drawn_by_a_number = re.search(r"manual_seed\(\d|seed=\d|PRNGKey\(\d|default_rng\(\d", text)
    assert not drawn_by_a_number, f"{drawn_by_a_number.group()}: no seed reaches it"


class TestDropout:
    @pytest.fixture
    def networks(self, monkeypatch):
        return _module(monkeypatch, "_networks")

    @pytest.mark.parametrize("name", ["small", "study", "mobilenet_v3_small"])
    def test_it_is_dropout_of_the_last_layers_inputs_in_training_and_nothing_in_eval_mode(self, networks, name):
        backbone = bc.Backbone(name, 3, image_size=64).eval()
        images, num_features = torch.rand(2, 1, 64, 64), backbone.num_features
        with torch.no_grad():
            before = backbone(images)
            dropped = networks.with_dropout(backbone, 0.5).eval()
            torch.testing.assert_close(dropped(images), before)
            torch.testing.assert_close(dropped.head(dropped.pool(dropped.maps(images))), before)
            assert dropped.num_features == num_features
            network = dropped.net
            for module in network.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.train()
            seen = []
            handle = dropped.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            dropped(images)
            handle.remove()
        share = float((seen[0] == 0).double().mean())
        assert share > 0.3, "half of the inputs are dropped (and ReLU's noughts with them)"

    def test_masks_differ_are_drawn_by_the_seed_and_average_to_the_logits(self, networks):
        backbone = networks.with_dropout(bc.Backbone("small", 3, image_size=32), 0.5).eval()
        images = torch.rand(3, 1, 32, 32)
        probs = networks.under_masks(backbone, images, 4000, 0)
        assert probs.shape == (4000, 3, 3)
        assert not torch.equal(probs[0], probs[1])
        assert torch.equal(probs[:5], networks.under_masks(backbone, images, 5, 0))
        assert not torch.equal(probs[:5], networks.under_masks(backbone, images, 5, 1))
        with torch.no_grad():
            logits = backbone(images)
        centred = probs.log() - probs.log().mean(2, keepdim=True)  # inverted dropout: E logits = logits at the mean
        error = centred.std(0) / 4000**0.5
        assert ((centred.mean(0) - (logits - logits.mean(1, keepdim=True))).abs() < 5 * error).all()
        assert not any(module.training for module in backbone.net.modules())
        still = networks.with_dropout(bc.Backbone("small", 3, image_size=32), 0.0)
        assert networks.under_masks(still, images, 3, 0).std(0).max() < 1e-6

    def test_training_drops(self, networks, tmp_path):
        config = read_config(
            None, {"data.phantom_images": 200, "data.image_size": 32, "train.epochs": 1, "device": "cpu"}
        )
        state = RunState(RunFolder(tmp_path), config, None)
        state.dataset = open_dataset("phantom", num=200)
        state.split = np.array(["train"] * 150 + ["valid"] * 50)
        state.pixels = Pixels(np.random.default_rng(0).integers(0, 65536, (200, 32, 32), dtype=np.uint16), ())
        plain, dropped = (networks.trained(state, 0, dropout=rate) for rate in (0.0, 0.9))
        assert not any(isinstance(module, torch.nn.Dropout) for module in plain.net.modules())
        assert [module.p for module in dropped.net.modules() if isinstance(module, torch.nn.Dropout)] == [0.9]
        assert not torch.equal(plain.head.weight, dropped.head.weight), "the same but for dropout, so it acted"
        again = networks.trained(state, 0, dropout=0.9)
        assert torch.equal(again.head.weight, dropped.head.weight)


def test_the_distance_of_nuts_to_itself_is_a_dashed_line_and_a_lost_point_has_a_cross(monkeypatch):
    script = _module(monkeypatch, "laplace_vs_hmc")
    one = {measure: Interval(0.2, 0.1, 0.3) for measure in script.MEASURES}
    rows = [
        {"n": 80, "tau": tau, "method": name, **one, **({"converged": tau == 1} if name == "nuts" else {})}
        for tau in (0.1, 1.0)
        for name in script.METHODS
    ]
    for axes in script.draw(rows).axes:
        dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata())]
        assert len(dashed) == ("total variation" in axes.get_ylabel())
        crosses = [line for line in axes.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
        assert [(*line.get_xdata(), *line.get_ydata()) for line in crosses] == [(0.1, 0.2)]


def test_features_of_other_images_than_the_split_names_are_refused(tmp_path, monkeypatch):
    features = _module(monkeypatch, "_features")
    ids = ["a", "b", "c"]
    write_csv(
        tmp_path / "split.csv",
        ("obs_id", "path", "label", "patient", "split"),
        [("a", "", "x", "p", "train"), ("b", "", "y", "", "test"), ("c", "", "x", "q", "valid")],
    )
    tensors = {"features": torch.eye(3), "labels": torch.tensor([0, 1, 0])}
    save_tensors(tmp_path / "features.safetensors", tensors, {"kind": "features", "ids": ids})
    write_text(tmp_path / "config.toml", "")
    RunFolder(tmp_path).complete({})
    parts = features.of_run(tmp_path)
    assert parts["test"].features.tolist() == [[0, 1, 0]]
    assert parts["test"].patients.tolist() == ["b"]
    assert parts["train"].patients.tolist() == ["p"]
    save_tensors(tmp_path / "features.safetensors", tensors, {"kind": "features", "ids": ids[::-1]})
    RunFolder(tmp_path).complete({})
    with pytest.raises(BayescamError, match="not of the images in its split"):
        features.of_run(tmp_path)


def test_the_cost_model_finds_planted_costs_and_plans_by_them(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS[0].parent))
    from scaling import model
    from scaling.point import Found, Size

    costs = {stage: 1e-9 * (2 + i) for i, stage in enumerate(model.STAGES)}
    points = []
    for n, d, k, r in [(1000, 8, 3, 1), (2000, 8, 3, 1), (1000, 32, 3, 1), (1000, 8, 7, 1), (4000, 16, 5, 2)]:
        size = Size(n, d, k, ranks=r)
        passes = round(20 * k**0.5)
        took = {stage: cost * sum(model.terms(stage, size, passes).values()) for stage, cost in costs.items()}
        found = Found(
            took, passes=passes, reduced=[8] * passes, told=[8] * 3 * passes, wire=[(80, 1.8e-4), (800, 9e-4)]
        )
        points.append((size, found if r == 2 else Found(took, passes=passes)))
    fitted = model.fit(points)
    assert (fitted.latency, fitted.per_byte, fitted.messages) == pytest.approx((1e-4, 1e-6, 4))
    size = Size(3000, 24, 4, ranks=2)
    assert fitted.passes(size) == pytest.approx(40, rel=0.02)
    compute = sum(cost * sum(model.terms(stage, size, 40).values()) for stage, cost in costs.items())
    sent = 1e-6 * (model.reduced(size, 40) + model.told(size, 40)) + 40 * 4 * 1e-4
    assert fitted.predict(size) == pytest.approx(compute + sent, rel=0.02)
    work = model.Workload(800, 70_000, {512: 700}, 4.0, 15, 5, 200)
    steps = {step.name: step for step in model.plan(Size(10**9, 512, 7, ranks=64), work)}
    images = 10**9 / 64
    assert steps["decode files"].seconds == pytest.approx(images / (14 * 800))
    reads = 2 * 4 * images * 512 / (0.7 * 3.35e12)
    messages = 4 * 20e-6 * 6 + (2 * 63 / 64 + 1) * 8 * 7 * 513 / (0.7 * 50e9)
    assert steps["MAPs for the evidence, 700 passes"].seconds == pytest.approx(700 * (reads + messages))


@pytest.mark.slow
def test_what_starts_processes_runs_small(tmp_path, monkeypatch, capsys):
    printed = _run("bench_data.py", "--num", 12, "--size", 32, "--repeats", 1, "--out", tmp_path)
    assert "bayescam phantom, 1 process" in printed
    _here(monkeypatch, "bench_scale.py", "--million", 500, 1000, "--out", tmp_path)
    assert "exponent of time over N" in capsys.readouterr().out
    small = ("--train", 64, "--test", 16, "--size", 32, "--epochs", 1)
    _here(monkeypatch, "phantom_difficulty.py", *small, "--out", tmp_path)
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "phantom_difficulty.txt").is_file()


@pytest.mark.slow
def test_real_features_run_small(mednist_dev, tmp_path, monkeypatch):
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", mednist_dev)
    small = "--images 20 5 10 --width 8 --prior-precision 10 --draws 20 --warmup 20 --vbll-epochs 0"
    _here(monkeypatch, "real_features.py", "--zip", archive, *small.split(), "--out", tmp_path)
    printed = (tmp_path / "real_features.md").read_text()
    assert "full refined (" in printed
    assert "NUTS half against half, shifted: total variation 0." in printed
    small = "--images 20 5 10 --width 8 --per-class 10 --prior-precision 10 --draws 20"
    _here(monkeypatch, "predictives.py", "--zip", archive, *small.split(), "--out", tmp_path)
    printed = (tmp_path / "predictives.md").read_text()
    assert "| 60 | 10 | shifted |" in printed
    assert "refined, 2 rows:" in printed
