"""The leak canary: labels that say nothing teach nothing, patients that cross stop the run, no id leaks."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

CLASSES = ("elbow", "hand", "wrist")


def _texture(rng: np.random.Generator, size: int = 40) -> np.ndarray:
    return rng.integers(0, 255, (size // 5, size // 5)).repeat(5, 0).repeat(5, 1).astype(np.uint8)


@pytest.fixture(scope="module")
def driver(driver):
    """What the figures show does not matter here."""
    return SimpleNamespace(run=driver.sketch)


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    """60 patients of three near-equal images each; the patient's class is drawn by lot. A manifest.csv."""
    root, rng = tmp_path_factory.mktemp("canary"), np.random.default_rng(5)
    rows = []
    for patient in range(60):
        picture, label = _texture(rng), CLASSES[rng.integers(3)]
        for view in range(3):
            name = f"p{patient:02d}-{view}.png"
            noisy = np.clip(picture + rng.integers(-8, 9, picture.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / name)
            rows.append((name, label, f"patient{patient}"))
    with (root / "manifest.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label", "patient"), *rows])
    return root / "manifest.csv"


def test_random_labels_per_patient_give_chance_accuracy(driver, settings, canary, tmp_path):
    """Memorising patients would give an accuracy of 1 if their images crossed the split."""
    outcome = driver.run("run", "--config", settings(canary, epochs="8"), "--out", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    with (tmp_path / "run/split.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["patient"], set()).add(row["split"])
    assert len(sides) == 60
    assert all(len(parts) == 1 for parts in sides.values())
    assert not any("patient" in row["patient"] for row in rows)
    patients = sum(parts == {"test"} for parts in sides.values())
    chance = 1 / 3 + 3 * np.sqrt(1 / 3 * 2 / 3 / patients)
    for name, numbers in json.loads((tmp_path / "run/metrics.json").read_text())["methods"].items():
        assert numbers["accuracy"] <= chance, name


def test_a_planted_patient_overlap_stops_the_run(driver, settings, canary, tmp_path):
    """An official split that puts one patient on two sides."""
    with canary.open(newline="") as stream:
        header, *rows = list(csv.reader(stream))
    parts = ["train"] * 120 + ["valid"] * 30 + ["test"] * 30
    parts[0] = "test"
    planted = canary.with_name("planted.csv")
    with planted.open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [[*header, "split"], *([*row, part] for row, part in zip(rows, parts, strict=True))]
        )
    outcome = driver.run("run", "--config", settings(planted), "--out", tmp_path / "run")
    assert outcome.status == 1
    assert "p00-1.png is in both test and train" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "run/backbone.safetensors").exists()


def test_the_same_image_in_two_parts_stops_the_run(driver, settings, canary, tmp_path):
    """Where nobody says whose an image is, equal content is the patient."""
    with canary.open(newline="") as stream:
        rows = [row[:2] for row in list(csv.reader(stream))[1:]]
    canary.with_name("twin.png").write_bytes(canary.with_name(rows[0][0]).read_bytes())
    parts = ["train"] * 120 + ["valid"] * 30 + ["test"] * 31
    table = [[*row, part] for row, part in zip([*rows, ["twin.png", rows[0][1]]], parts, strict=True)]
    planted = canary.with_name("twins.csv")
    with planted.open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label", "split"), *table])
    outcome = driver.run("run", "--config", settings(planted), "--out", tmp_path / "run")
    assert outcome.status == 1
    assert "the content of twin.png is in both train and test" in outcome.err
    assert not (tmp_path / "run/backbone.safetensors").exists()


@pytest.fixture(scope="module")
def mura(tmp_path_factory):
    """A copy of MURA in small, with one image under two patients, on two sides of the official split."""
    root, rng = tmp_path_factory.mktemp("secret-home") / "MURA-v1.1", np.random.default_rng(7)
    for number in range(60):
        for part, name in enumerate(("ELBOW", "HAND")):
            split = "valid" if number >= 40 else "train"
            folder = root / split / f"XR_{name}" / f"patient{100 * part + number:05d}" / "study1_negative"
            folder.mkdir(parents=True)
            picture = _texture(rng) // 2
            picture[:, 20 * part : 20 * part + 20] += 120
            Image.fromarray(picture).save(folder / "image1.png")
    twin = root / "valid/XR_HAND/patient00140/study1_negative/image1.png"
    twin.write_bytes((root / "train/XR_HAND/patient00100/study1_negative/image1.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def mura_run(driver, settings, mura, tmp_path_factory):
    out = tmp_path_factory.mktemp("mura") / "run"
    outcome = driver.run("run", "--config", settings("mura"), "--root", mura, "--out", out)
    assert outcome.status == 0, outcome.err
    return out, outcome


def test_one_image_under_two_patients_in_two_splits_is_warned_of(mura_run):
    out, outcome = mura_run
    names = [
        "train/XR_HAND/patient00100/study1_negative/image1.png",
        "valid/XR_HAND/patient00140/study1_negative/image1.png",
    ]
    assert len(outcome.err.strip().splitlines()) == 1
    assert "warning: 1 images stand in several splits under different patients" in outcome.err
    assert names[0] in outcome.err
    assert json.loads((out / "data.json").read_text())["equal_across_splits"] == [names]
    assert names[1] in (out / "report.html").read_text()
    assert "too good" in (out / "MODEL_CARD.md").read_text()


def test_images_that_must_not_be_passed_on_put_a_banner_on_report_and_card(mura_run):
    out, _ = mura_run
    assert not json.loads((out / "data.json").read_text())["shareable"]
    report, card = (out / "report.html").read_text(), (out / "MODEL_CARD.md").read_text()
    assert '<p class="banner">The licence of these images (Stanford' in report
    assert "Do not share" in report
    assert card.splitlines()[2].startswith("**Do not share the images.**")


def test_no_file_but_the_settings_tells_a_patient_or_where_the_data_lay(mura_run, mura):
    """Relative paths, which in MURA hold the patient's number, stand as they are; ids do not."""
    out, outcome = mura_run
    with (out / "split.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert all(row["path"] == row["obs_id"] and row["path"].startswith(("train/XR_", "valid/XR_")) for row in rows)
    assert len({row["patient"] for row in rows}) == 120
    assert not any("patient" in row["patient"] for row in rows)
    told = {path.name for path in out.rglob("*") if path.is_file() and b"secret-home" in path.read_bytes()}
    assert told == {"config.toml"}
    assert "secret-home" not in outcome.err + outcome.out


def test_patients_are_named_where_that_is_asked_for(driver, settings, mura, tmp_path):
    strike = {"write": 2, "when": "after", "action": "kill"}
    flags = ("--root", mura, "--out", tmp_path / "run", "--show-patients")
    assert driver.run("run", "--config", settings("mura"), *flags, **strike).status == -9
    with (tmp_path / "run/split.csv").open(newline="") as stream:
        assert {row["patient"] for row in csv.DictReader(stream)} >= {"patient00000", "patient00100"}
