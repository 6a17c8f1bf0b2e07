"""Killed at any moment and resumed, a run ends as the straight run: the same files, the same bits."""

from __future__ import annotations

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from bayescam.posterior.nuts import Nuts
from bayescam.storage import load_netcdf, netcdf_groups

pytestmark = pytest.mark.slow

# Files that tell the time of day or how long something took: of these the name alone is compared, or the values.
TIMED = {"run.json", "timings.json", ".stages.json", "report.html", "posterior/fit_seconds.json"}
VALUES = {"posterior/laplace.nc", "posterior/refined.nc", "posterior/nuts.nc"}


def _digests(folder) -> dict[str, str]:
    """Every file of a run, hidden ones included, with its SHA-256."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _assert_same_end(folder, straight, note):
    found, wanted = _digests(folder), _digests(straight)
    assert sorted(found) == sorted(wanted), note
    other = {name for name in found if found[name] != wanted[name]}
    assert other <= TIMED | VALUES | {"posterior/nuts.safetensors"}, f"{note}: {other} differ"
    for name in VALUES:
        for group in netcdf_groups(straight / name):
            assert load_netcdf(folder / name, group).equals(load_netcdf(straight / name, group)), (
                f"{note}: {name} {group}"
            )
    chains = [Nuts.load(run / "posterior/nuts.safetensors") for run in (folder, straight)]
    assert torch.equal(chains[0].draws.theta(), chains[1].draws.theta()), note
    assert json.loads((folder / "run.json").read_text())["status"] == "complete", note


@pytest.fixture(scope="module")
def straight(driver, tiny, settings, tmp_path_factory):
    """The run that nobody disturbs: (folder, configuration file, number of writes)."""
    folder, config = tmp_path_factory.mktemp("straight") / "run", settings(tiny, num_images="1")
    outcome = driver.run("run", "--config", config, "--out", folder, cache=folder.parent / "cache")
    assert outcome.status == 0, outcome.err
    return folder, config, outcome.writes


def test_a_second_run_is_the_first_to_the_last_bit(driver, straight, tmp_path):
    folder, config, _ = straight
    outcome = driver.run("run", "--config", config, "--out", tmp_path / "run", cache=tmp_path / "cache")
    assert outcome.status == 0, outcome.err
    _assert_same_end(tmp_path / "run", folder, "second run")


def test_killed_at_every_write(driver, straight, tmp_path):
    """In one folder: within each stage killed at its first write, resumed, killed at its second, and so on.

    By turns before the write has begun, when its temporary is whole but not yet renamed, and after. Until the report's
    last writes the figures are blank, to save time; the last attempts draw all of them.
    """
    folder, config, writes = straight
    out, cache = tmp_path / "run", tmp_path / "cache"
    number, finished, kills = 1, -1, 0
    while True:
        strike = {"write": number, "when": ("before", "written", "after")[kills % 3], "action": "kill"}
        run = driver.sketch if number < 20 else driver.run
        outcome = run("run", "--config", config, "--out", out, "--resume", cache=cache, **strike)
        if outcome.status != -9:
            break
        kills += 1
        record = out / ".stages.json"
        stages = len(json.loads(record.read_text())) if record.exists() else 0
        number, finished = (1, stages) if stages > finished else (number + 1, finished)
    assert outcome.status == 0, outcome.err
    assert kills > 0.8 * writes  # epochs and chains that are kept need no second write
    _assert_same_end(out, folder, f"killed at {kills} writes")


def test_killed_at_random_moments(driver, straight, tmp_path):
    folder, config, _ = straight
    out, cache, moments = tmp_path / "run", tmp_path / "cache", random.Random(0)
    for _ in range(6):
        driver.run("run", "--config", config, "--out", out, "--resume", cache=cache, seconds=moments.uniform(0, 3.5))
    outcome = driver.run("run", "--config", config, "--out", out, "--resume", cache=cache)
    assert outcome.status == 0, outcome.err
    _assert_same_end(out, folder, "killed at random moments")


@pytest.fixture(scope="module")
def killed(driver, straight, tiny, tmp_path_factory):
    """A run on a copy of the images, killed after its first stages: (folder, images)."""
    home = tmp_path_factory.mktemp("killed")
    own = home / "own.toml"
    own.write_text(straight[1].read_text().replace(json.dumps(str(tiny)), json.dumps(str(home / "images"))))
    shutil.copytree(tiny, home / "images")
    strike = {"write": 12, "when": "after", "action": "kill"}
    assert driver.run("run", "--config", own, "--out", home / "run", cache=home / "cache", **strike).status == -9
    assert {"data", "train"} <= set(json.loads((home / "run/.stages.json").read_text()))
    return home / "run", home / "images"


@pytest.fixture
def half_done(killed, tiny, tmp_path):
    """A copy of that run, and its images as they were."""
    folder, images = killed
    shutil.rmtree(images)
    shutil.copytree(tiny, images)
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", images


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--seed", "4"), "seed was 3 and is now 4"),
        (("--preset", "standard"), "preset was 'quick' and is now 'standard'"),
        (("--data", "phantom"), "data.spec was"),
        (("--backbone", "study"), "backbone.name was 'small' and is now 'study'"),
        (("--limit", "80"), "data.limit was None and is now 80"),
    ],
)
def test_resumed_with_another_setting_is_an_error_that_names_it(driver, half_done, flags, name):
    out, _ = half_done
    outcome = driver.run("run", "--out", out, "--resume", *flags)
    assert outcome.status == 2
    assert name in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def _repaint(images):
    Image.fromarray(np.zeros((40, 40), dtype=np.uint8)).save(images / "hand/05.png")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda images: (images / "hand").rename(images / "fist"), "data.classes was"),
        (lambda images: (images / "elbow").rename(images / "zelbow"), "data.classes was"),
        (lambda images: (images / "hand/05.png").unlink(), "data.num_images was 90 and is now 89"),
        (lambda images: (images / "hand/05.png").rename(images / "wrist/99.png"), "data.records was"),
        (_repaint, "data.records was"),
    ],
    ids=["renamed", "reordered", "removed", "moved", "repainted"],
)
def test_resumed_with_other_data_is_an_error_that_names_the_field(driver, half_done, change, name):
    out, images = half_done
    change(images)
    outcome = driver.run("run", "--out", out, "--resume")
    assert outcome.status == 2, outcome.err
    assert name in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_file_changed_between_is_noticed_before_it_is_used(driver, half_done):
    out, _ = half_done
    with (out / "split.csv").open("a") as table:
        table.write("one more line\n")
    outcome = driver.run("run", "--out", out, "--resume")
    assert outcome.status == 1
    assert "split.csv: changed since the run wrote it" in outcome.err


def test_resuming_the_complete_run_says_so_and_writes_nothing(driver, straight):
    folder, _, _ = straight
    before = _digests(folder)
    outcome = driver.run("run", "--out", folder, "--resume")
    assert (outcome.status, outcome.writes) == (0, 0)
    assert "complete" in outcome.out
    assert _digests(folder) == before


def test_resuming_a_complete_run_names_the_file_that_was_changed(driver, straight, tmp_path):
    folder, _, _ = straight
    shutil.copytree(folder, tmp_path / "run")
    content = (tmp_path / "run/posterior/nuts.nc").read_bytes()
    (tmp_path / "run/posterior/nuts.nc").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    outcome = driver.run("run", "--out", tmp_path / "run", "--resume")
    assert (outcome.status, outcome.writes) == (1, 0)
    assert "posterior/nuts.nc: changed since the run wrote it" in outcome.err


def test_a_run_on_features_survives_kills(driver, tmp_path):
    """Killed at some of its writes in one folder, then resumed: the numbers of the run that nobody disturbs."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    np.savez(tmp_path / "f.npz", features=rng.normal(size=(60, 2)) + labels[:, None], labels=labels)
    flags = ("--prior-precision", "1", "--num-chains", "2", "--num-samples", "10", "--num-warmup", "20")
    command = ("posterior", "--features", tmp_path / "f.npz", *flags)
    assert driver.run(*command, "--out", tmp_path / "straight").status == 0
    out = tmp_path / "broken"
    for write, when in ((2, "written"), (7, "after"), (13, "before")):
        strike = {"write": write, "when": when, "action": "kill"}
        assert driver.run(*command, "--out", out, "--resume", **strike).status == -9
        assert not (out / "run.json").exists()
    assert driver.run(*command, "--out", out, "--resume").status == 0
    found, wanted = _digests(out), _digests(tmp_path / "straight")
    assert sorted(found) == sorted(wanted)
    for name in ("metrics.json", "comparison.json", "diagnostics.json", "settings.json", "table.md"):
        assert found[name] == wanted[name], name
    chains = [Nuts.load(run / "posterior/nuts.safetensors") for run in (out, tmp_path / "straight")]
    assert torch.equal(chains[0].draws.theta(), chains[1].draws.theta())


def test_a_run_moved_elsewhere_still_predicts(driver, straight, tiny, tmp_path):
    folder, _, _ = straight
    shutil.copytree(folder, tmp_path / "elsewhere")
    outcome = driver.run("predict", tiny / "hand/03.png", "--run", tmp_path / "elsewhere", "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)[0]["classes"][0]["label"] == "hand"
