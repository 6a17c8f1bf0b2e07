"""Disk full, read-only folder, folder removed: exit status 1, one line, and what was written before is still valid."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow


def _one_line(outcome, *words):
    assert outcome.status == 1, (outcome.status, outcome.err)
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("bayescam: ")
    for word in words:
        assert word in lines[0]


def _assert_earlier_files_valid(out):
    """No temporary is left, and each file of a finished stage has the checksum that was recorded."""
    assert not list(out.rglob("*.partial*"))
    if (out / ".stages.json").is_file():
        for stage in json.loads((out / ".stages.json").read_text()).values():
            for name, digest in stage["files"].items():
                assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name
    assert not (out / "run.json").exists()


@pytest.fixture(scope="module")
def driver(driver):
    """What the figures show does not matter here."""
    return SimpleNamespace(run=driver.sketch)


@pytest.fixture(scope="module")
def config(settings, tiny):
    return settings(tiny, epochs="1", num_images="1")


def test_a_disk_that_is_full_and_then_is_not(driver, config, tmp_path):
    """One folder: full at its second write, resumed and full at the fifth, and so on to the end."""
    out, cache = tmp_path / "run", tmp_path / "cache"
    for number in range(2, 200, 3):
        strike = {"write": number, "when": "written", "action": "full"}
        outcome = driver.run("run", "--config", config, "--out", out, "--resume", cache=cache, **strike)
        if outcome.status == 0:
            break
        _one_line(outcome, "No space left on device")
        _assert_earlier_files_valid(out)
    assert number > 5
    assert (out / "run.json").is_file()


@pytest.mark.parametrize("limit", [200, 2_000, 20_000, 150_000])
def test_writes_that_the_system_refuses_half_way(driver, config, tmp_path, limit):
    """Below Python: no file may grow beyond ``limit`` bytes, so that C libraries meet a failing write."""
    out = tmp_path / "run"
    outcome = driver.run("run", "--config", config, "--out", out, cache=tmp_path / "cache", limit=limit)
    _one_line(outcome, "File too large")
    _assert_earlier_files_valid(out)


def _mount(folder, options) -> bool:
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("kilobytes", [16, 100, 300, 600])
def test_a_small_disk(driver, config, tmp_path, kilobytes):
    """A file system of its own that is really full; its cache lies on it too."""
    disk = tmp_path / "disk"
    if not _mount(disk, f"size={kilobytes}k"):
        pytest.skip("no right to mount a file system here")
    try:
        outcome = driver.run("run", "--config", config, "--out", disk / "run", cache=disk / "cache")
        _one_line(outcome, "No space left on device")
        _assert_earlier_files_valid(disk / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="module")
def common_driver(new_driver):
    """A driver without root's right to write anywhere."""
    if os.name != "posix":
        pytest.skip("POSIX permissions")
    if os.geteuid() != 0:
        return new_driver()
    if shutil.which("setpriv") is None:
        pytest.skip("root may write anywhere, and setpriv is not there to give that up")
    rights = "-dac_override,-dac_read_search"
    return new_driver(prefix=("setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"))


def test_a_read_only_folder(common_driver, config, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    _one_line(common_driver.run("run", "--config", config, "--out", locked), "cannot be written", str(locked))
    _one_line(common_driver.run("run", "--config", config, "--out", locked / "run"), "cannot be written", str(locked))
    locked.chmod(0o700)


def test_a_read_only_run_still_predicts_and_refuses_to_be_written(common_driver, driver, config, tiny, tmp_path):
    out = tmp_path / "run"
    assert driver.run("run", "--config", config, "--out", out, cache=tmp_path / "cache").status == 0
    for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
        folder.chmod(0o500)
    try:
        image = tiny / "hand/03.png"
        assert common_driver.run("predict", image, "--run", out).status == 0
        _one_line(common_driver.run("report", out), "Permission denied")
        _one_line(common_driver.run("explain", image, "--run", out, "--out", out / "cams"), "Permission denied")
    finally:
        for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
            folder.chmod(0o700)


def test_a_read_only_cache(common_driver, config, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o500)
    outcome = common_driver.run("run", "--config", config, "--out", tmp_path / "run", cache=cache)
    cache.chmod(0o700)
    _one_line(outcome, str(cache), "BAYESCAM_CACHE")


@pytest.mark.parametrize("number", [2, 6, 14, 20])
def test_a_folder_removed_on_the_way(driver, config, tmp_path, number):
    out = tmp_path / "run"
    strike = {"write": number, "when": "before", "action": "remove", "remove": out}
    outcome = driver.run("run", "--config", config, "--out", out, cache=tmp_path / "cache", **strike)
    _one_line(outcome, str(out))
    assert not (out / "run.json").exists()


def test_images_removed_on_the_way(driver, config, settings, tiny, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(tiny, images)
    strike = {"write": 2, "when": "before", "action": "remove", "remove": images}
    outcome = driver.run("run", "--config", settings(images), "--out", tmp_path / "run", cache=tmp_path / "c", **strike)
    _one_line(outcome, str(images))
