"""A complete run opened again holds the very images that it saw, and nothing of it is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bayescam.config import read_config, to_toml
from bayescam.data.dataset import open_dataset
from bayescam.errors import BayescamError
from bayescam.runfolder import RunFolder
from bayescam.stages.reading import read, reopen
from bayescam.stages.state import RunState
from bayescam.storage import write_text


def _read_only(folder: Path, **settings: object) -> Path:
    """A run that has read its data, and is called complete."""
    config = read_config(None, {"device": "cpu", "data.image_size": 32, **settings})
    state = RunState(RunFolder(folder), config, None)
    write_text(folder / "config.toml", to_toml(config))
    read(state)
    state.folder.complete({})
    return folder


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "split.csv").open() as stream:
        return list(csv.DictReader(stream))


def _images(root: Path) -> Path:
    for label in ("left", "right"):
        (root / label).mkdir(parents=True)
        for i in range(12):
            picture = np.random.default_rng(i + 100 * (label == "left")).integers(0, 255, (10, 10), dtype=np.uint8)
            Image.fromarray(picture).save(root / label / f"{i}.png")
    return root


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_limited_run_is_opened_with_the_images_of_its_split(tmp_path):
    folder = _read_only(tmp_path / "r", **{"data.phantom_images": 300, "data.limit": 200})
    before, rows = _content(folder), _rows(folder)
    state = reopen(folder)
    assert len(rows) == len(state.dataset) <= 200
    assert state.dataset.obs_ids == [row["obs_id"] for row in rows]
    assert [state.dataset.classes[k] for k in state.dataset.labels] == [row["label"] for row in rows]
    assert state.split.tolist() == [row["split"] for row in rows]
    whole = open_dataset("phantom", num=300, seed=0).obs_ids
    assert whole[: len(rows)] != state.dataset.obs_ids, "the whole data's rows are others: the limit matters here"
    assert _content(folder) == before


def test_images_that_were_skipped_are_left_out_again(tmp_path):
    root = _images(tmp_path / "images")
    (root / "left/3.png").write_bytes(b"not an image")
    folder = _read_only(tmp_path / "r", **{"data.spec": str(root), "data.on_bad": "skip"})
    assert reopen(folder).dataset.obs_ids == [row["obs_id"] for row in _rows(folder)]
    assert len(_rows(folder)) == 23


def test_images_that_changed_are_refused(tmp_path):
    root = _images(tmp_path / "images")
    folder = _read_only(tmp_path / "r", **{"data.spec": str(root)})
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(root / "right/5.png")
    with pytest.raises(BayescamError, match=r"--run .*: data.records was .* and is now"):
        reopen(folder)


def test_a_changed_or_unfinished_run_is_refused(tmp_path):
    folder = _read_only(tmp_path / "r", **{"data.phantom_images": 200})
    text = (folder / "split.csv").read_text()
    (folder / "split.csv").write_text(text.replace("train", "test", 1))
    with pytest.raises(BayescamError, match="changed since the run wrote it"):
        reopen(folder)
    (folder / "run.json").unlink()
    with pytest.raises(BayescamError, match="is not finished"):
        reopen(folder)


def test_the_device_can_be_another(tmp_path):
    folder = _read_only(tmp_path / "r", **{"data.phantom_images": 200, "device": "cpu"})
    assert reopen(folder).config.device == "cpu"
    assert reopen(folder, device="auto").config.device == "auto"


def test_images_left_out_and_labels_that_contradict_each_other_are_told(tmp_path, capsys):
    root = _images(tmp_path / "d")
    (root / "left/4.png").write_bytes((root / "right/7.png").read_bytes())
    for i in range(7):
        (root / f"left/broken-{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    folder = _read_only(tmp_path / "r", **{"data.spec": str(root), "data.on_bad": "skip"})
    told = capsys.readouterr().err
    assert "equal images stand under several labels (1 times), first left/4.png (left) = right/7.png (right)" in told
    assert told.count("warning: left out: left/broken-") == 5
    assert "left out: 2 more, named in data.json" in told
    facts = json.loads((folder / "data.json").read_text())
    assert facts["equal_of_several_labels"] == [["left/4.png", "right/7.png"]]
    assert len(facts["skipped"]) == 7
