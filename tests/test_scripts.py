"""Every script says what question it answers, and the experiments run on a small scale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.py"))
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_docstring_says_what_it_is_for(script):
    text = script.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert f"scripts/{script.name}" in text, "the docstring shows how to call it"


def test_the_readme_names_every_script():
    text = (REPOSITORY / "scripts/README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert f"`{script.name}`" in text


@pytest.mark.slow
def test_the_experiments_run_small(tmp_path):
    (tmp_path / "settings.toml").write_text(SETTINGS)
    printed = _run("table1.py", "--out", tmp_path / "t", "--config", tmp_path / "settings.toml")
    assert "| NUTS, tau sampled |" in printed
    assert "0.072 + 0.546 h" in printed
    run = tmp_path / "t/run"
    printed = _run(
        "laplace_vs_hmc.py", "--run", run, "--out", tmp_path / "l", "--taus", 1, "--sizes", 80, "--samples", 20
    )
    assert "| refined |" in printed
    assert len(json.loads((tmp_path / "l/laplace_vs_hmc.json").read_text())) == 6
    assert (tmp_path / "l/laplace_vs_hmc.png").stat().st_size > 1000
    printed = _run(
        "shift_and_ood.py", "--run", run, "--out", tmp_path / "s", "--members", 1, "--unknown", 12, "--limit", 20
    )
    assert "| deep ensemble |" in printed
    assert "| MC dropout |" in printed
    assert (tmp_path / "s/shift_and_ood.png").stat().st_size > 1000
