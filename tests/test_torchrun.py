"""``torchrun -m bayescam run``: two ranks make one run, and a rank that dies ends it in one line (gloo, localhost).

``main`` is what ``torchrun`` starts: the console script with rank 1 watched, or made to die.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bayescam as bc
from bayescam.cli import main as bayescam
from bayescam.storage import load_tensors

SECONDS = 200  # far less than the patience of a rank that waits in vain
SETTINGS = """
[data]
image_size = 32
phantom_images = 180
[train]
epochs = 1
[posterior]
num_samples = 20
prior_precision = 1.0
[nuts]
num_chains = 2
num_samples = 10
num_warmup = 20
[explain]
num_images = 3
"""


def watch(out: Path, seen: list[str]) -> None:
    """Note every file under ``out`` that this process opens for writing, makes, moves or removes."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            path, changes = arguments[0] if arguments else "", event in ("os.rename", "os.mkdir", "os.remove")
        if changes and isinstance(path, str | os.PathLike) and Path(path).is_relative_to(out):
            seen.append(f"{event} {path}")

    sys.addaudithook(hook)


def main(how: str, out: Path) -> int:
    """One rank."""
    second, seen = os.environ["RANK"] == "1", []
    if how != "live":
        from bayescam.stages.state import Backbone

        def die(*_: object, **__: object) -> None:
            if how == "raise":
                raise OSError("this disk is gone")
            os.kill(os.getpid(), signal.SIGKILL)

        def work(*_: object, **__: object) -> None:
            while True:
                sum(range(1000))

        if second:
            Backbone.extract = die
        elif how == "kill beside work":
            Backbone.extract = work
    if second:
        watch(out, seen)
    command = ["run", "--data", "phantom", "--preset", "quick", "--device", "cpu"]
    status = bayescam([*command, "--config", str(out.with_name("settings.toml")), "--out", str(out)])
    if second:
        out.with_name("seen.json").write_text(json.dumps(seen))
    threads = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    out.with_name(f"threads-{os.environ['RANK']}.json").write_text(json.dumps(threads))
    return status


def torchrun(folder: Path, how: str) -> tuple[int, list[str]]:
    """The exit status, and what bayescam itself said on stderr."""
    (folder / "settings.toml").write_text(SETTINGS)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            __file__,
            how,
            str(folder / "run"),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    print(done.stderr)  # pytest shows it where a test fails
    said = [line for line in done.stderr.splitlines() if line.startswith("bayescam: ")]
    return done.returncode, said


@pytest.mark.slow
def test_two_ranks_make_one_run(tmp_path):
    status, said = torchrun(tmp_path, "live")
    assert (status, said) == (0, [])
    assert json.loads((tmp_path / "seen.json").read_text()) == [], "only rank 0 writes"
    for rank in range(2):  # a thread of the group's that outlives it can abort the process as the interpreter ends
        threads = json.loads((tmp_path / f"threads-{rank}.json").read_text())
        assert [name for name in threads if "gloo" in name] == []
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "complete"
    assert len((run / "history.csv").read_text().splitlines()) == 2
    tensors, _ = load_tensors(run / "features.safetensors", kind="features")
    rows = np.array([line.rsplit(",", 1)[1] == "train" for line in (run / "split.csv").read_text().splitlines()[1:]])
    phi, labels = tensors["features"][rows], tensors["labels"][rows]
    for name, one in {
        "laplace": (fit := bc.fit_laplace(phi, labels, num_classes=7, prior_precision=1.0)),
        "refined": fit.refine(phi, labels),
    }.items():
        two = bc.load_laplace(run / f"posterior/{name}.safetensors")
        assert one.num_train == two.num_train == rows.sum()
        assert float(((two.weight_mean - one.weight_mean) / one.weight_sd).abs().max()) < 1e-3
        assert float((two.weight_sd / one.weight_sd).log().abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "bayescam: rank 0: lost rank 1, whose process has died ("),
        ("kill beside work", "bayescam: rank 0: lost rank 1, whose process has died (torchrun ended this rank); look"),
        ("raise", "bayescam: rank 1: this disk is"),
    ],
)
def test_a_rank_that_dies_ends_all_in_one_line_that_names_it(tmp_path, how, words):
    status, said = torchrun(tmp_path, how)
    assert status == 1
    assert len(said) == 1
    assert said[0].startswith(words)
    assert not (tmp_path / "run/run.json").exists()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
