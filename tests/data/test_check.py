"""``bayescam data``: what check finds, what the commands print, and what they return."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bayescam.cli import main
from bayescam.data.check import check_dataset
from bayescam.data.dataset import open_dataset


def _picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 14), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def flawed(tmp_path) -> Path:
    """One of every flaw, listed by a manifest."""
    rows = ["path,label,patient,split,mask_bone"]
    for i, label in enumerate(("hand", "hand", "elbow", "elbow", "elbow")):
        _picture(tmp_path / f"{i}.png", i)
        rows.append(f"{i}.png,{label},p{i},train,")
    (tmp_path / "bad.png").write_bytes(b"x")
    Image.new("L", (14, 20), 7).save(tmp_path / "flat.png")
    Image.open(tmp_path / "0.png").save(tmp_path / "copy.bmp")
    cut = _picture(tmp_path / "cut.png", 9)
    cut.write_bytes(cut.read_bytes()[:-12])
    Image.new("1", (14, 21)).save(tmp_path / "mask.png")
    rows += ["bad.png,hand,p9,train,", "flat.png,hand,p8,train,", "copy.bmp,elbow,p0,test,", "cut.png,hand,p7,train,"]
    _picture(tmp_path / "masked.png", 10)
    rows += ["masked.png,hand,p6,train,mask.png"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    return tmp_path


def test_every_flaw_is_found(flawed):
    found = check_dataset(open_dataset(flawed), progress=False)
    assert found.counts == {"elbow": 4, "hand": 6}
    assert found.patients == 9
    assert [name for name, _ in found.unreadable] == ["bad.png", "masked.png"]
    assert "mask 'bone'" in found.unreadable[1][1]
    assert found.constant == ["flat.png"]
    assert found.unfinished == ["cut.png"]
    assert found.duplicates == found.duplicates_across_classes == [["0.png", "copy.bmp"]]
    assert found.several_labels == found.several_splits == ["p0"]
    assert found.duplicates_across_splits == [["0.png", "copy.bmp"]]
    assert found.duplicates_across_patients == []
    assert found.sides == (14, 20)


def test_equal_pixels_under_several_patients_are_told_of(tmp_path, capsys):
    """A second file of another format under another name: no split by patient keeps the two together."""
    rows = ["path,label,patient"]
    for i, label in enumerate(("hand", "hand", "elbow", "elbow")):
        _picture(tmp_path / f"{i}.png", i)
        rows.append(f"{i}.png,{label},p{i}")
    Image.open(tmp_path / "0.png").save(tmp_path / "copy.bmp")
    (tmp_path / "manifest.csv").write_text("\n".join([*rows, "copy.bmp,hand,p9"]))
    found = check_dataset(open_dataset(tmp_path), progress=False)
    assert found.duplicates_across_patients == [["0.png", "copy.bmp"]]
    assert found.duplicates_across_splits == found.duplicates_across_classes == []
    assert main(["data", "check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 groups of equal pixels under several patients" in said
    assert "0.png = copy.bmp" in said


def test_the_command_prints_it_and_fails_where_files_are_unreadable(flawed, capsys):
    assert main(["data", "check", str(flawed)]) == 1
    said = capsys.readouterr().out
    for line in ["10 images", "hand", "2 unreadable:", "bad.png: is not a PNG", "0.png = copy.bmp", "1 patients under"]:
        assert line in said
    assert main(["data", "check", str(flawed / "manifest.csv"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["constant"] == ["flat.png"]


def test_a_clean_folder_passes(tmp_path, capsys):
    for k, name in enumerate(("a", "b")):
        for i in range(3):
            _picture(tmp_path / name / f"{i}.png", 10 * k + i)
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "unreadable" not in capsys.readouterr().out


def test_what_check_prints_is_harmless(tmp_path, capsys):
    for k, name in enumerate(("\x1b[31mred", "b\nc")):
        _picture(tmp_path / name / "0.png", k)
    (tmp_path / "b\nc" / "\x1b[2J.png").write_bytes(b"x")
    assert main(["data", "check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\nc" not in said


def test_the_phantom_written_opens_through_its_manifest_and_as_mura(tmp_path, capsys):
    for layout in ("folder", "mura"):
        out = tmp_path / layout
        assert main(["data", "phantom", "--num", "12", "--seed", "4", "--out", str(out), "--layout", layout]) == 0
        opened = open_dataset(out)
        assert len(opened) == 12
        assert all(mask.shape == opened.image(i).shape for i in range(12) for mask in opened.masks(i).values())
    mura = open_dataset("mura", root=tmp_path / "mura")
    split_of = {f"MURA-v1.1/{record.obs_id}": record.split for record in mura.records}
    assert {record.obs_id: record.split for record in open_dataset(tmp_path / "mura").records} == split_of
    capsys.readouterr()
    assert main(["data", "phantom", "--num", "0", "--out", str(tmp_path / "x")]) == 2
    assert "--num 0: give a whole number from 1" in capsys.readouterr().err


def test_manifest_command(tmp_path, capsys):
    for k, name in enumerate(("a", "b")):
        _picture(tmp_path / "data" / name / "0.png", k)
    out = tmp_path / "list.csv"
    assert main(["data", "manifest", str(tmp_path / "data"), "--out", str(out)]) == 0
    assert "2 images of 2 classes" in capsys.readouterr().out
    assert open_dataset(out).obs_ids == ["data/a/0.png", "data/b/0.png"]
    assert main(["data", "manifest", str(tmp_path / "data"), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["data", "manifest", str(tmp_path / "data"), "--out", str(tmp_path / "y/l.csv"), "--overwrite"]) == 0
    assert f"open it with --root {tmp_path / 'data'}" in capsys.readouterr().out


def test_list_names_all_sources(capsys):
    assert main(["data", "list"]) == 0
    said = capsys.readouterr().out
    for name in ("phantom", "mednist", "mura", "FOLDER", "FILE.csv", "CC BY-SA 4.0"):
        assert name in said


def test_no_verb_is_wrong_usage(capsys):
    assert main(["data"]) == 2
    assert "check" in capsys.readouterr().out


def test_help_needs_nothing_heavy():
    code = "import sys; from bayescam.cli import main\ntry: main(['data', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'numpy', 'torch', 'PIL', 'tqdm'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
