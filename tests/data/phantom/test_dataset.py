"""The phantom through the doors every data set has, and on disk."""

import csv
import pickle

import numpy as np
import pytest
from PIL import Image

from bayescam.data.dataset import DataError, open_dataset
from bayescam.data.phantom.clinic import PARTS
from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.data.phantom.export import MASKS, export
from bayescam.data.phantom.roster import Dials


def test_dataset_draws_on_demand_what_the_simulator_draws():
    dataset = phantom_dataset(12, 3, size=64)
    assert dataset.classes == PARTS
    assert len(dataset) == len(set(dataset.obs_ids)) == 12
    assert dataset.shareable
    np.testing.assert_array_equal(dataset.image(5), phantom_dataset(6, 3, size=64).image(5))
    assert set(dataset.masks(5)) == set(MASKS)
    picked = dataset.select([7, 2])
    np.testing.assert_array_equal(picked.image(0), dataset.image(7))
    assert picked.labels.tolist() == dataset.labels[[7, 2]].tolist()


def test_open_dataset_knows_the_phantom():
    dataset = open_dataset("phantom", num=8, seed=1)
    assert len(dataset) == 8
    assert dataset.image(0).shape[0] == 128


def test_keys_tell_pictures_apart():
    one, same, other = phantom_dataset(4, 3, size=64), phantom_dataset(9, 3, size=64), phantom_dataset(4, 3, size=96)
    keys = lambda dataset: [dataset.source.key(record) for record in dataset.records[:4]]  # noqa: E731
    assert keys(one) == keys(same)
    assert not set(keys(one)) & set(keys(other))
    assert len(set(keys(one))) == 4


def test_source_travels_to_workers():
    dataset = phantom_dataset(3, 0, size=64)
    assert pickle.loads(pickle.dumps(dataset.source)) == dataset.source


def test_unknown_dial_is_a_type_error():
    with pytest.raises(TypeError, match="contrast"):
        phantom_dataset(3, 0, contrast=2)


def test_exported_folder_has_what_the_dataset_has(tmp_path):
    out = tmp_path / "phantom"
    manifest = export(out, 10, 0, dials=Dials(size=64), progress=False)
    dataset = phantom_dataset(10, 0, size=64)
    with manifest.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == [PARTS[label] for label in dataset.labels]
    for index, row in enumerate(rows):
        stored = np.asarray(Image.open(out / row["path"]))
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored, np.rint(255 * dataset.image(index)))
        for name, mask in dataset.masks(index).items():
            assert bool(row[f"mask_{name}"]) == bool(mask.any())
            if mask.any():
                np.testing.assert_array_equal(np.asarray(Image.open(out / row[f"mask_{name}"])), mask)
    assert {path.name for path in out.iterdir()} == {"masks", "manifest.csv", *(row["label"] for row in rows)}


def test_exported_folder_opens_through_its_manifest(tmp_path):
    pytest.importorskip("bayescam.data.manifest")
    export(tmp_path / "phantom", 20, 0, dials=Dials(size=64), progress=False)
    opened, drawn = open_dataset(tmp_path / "phantom"), phantom_dataset(20, 0, size=64)
    assert set(opened.classes) == {PARTS[label] for label in drawn.labels}
    assert "masks" not in opened.classes
    assert opened.patients == drawn.patients
    np.testing.assert_array_equal(opened.image(4), drawn.image(4))
    assert opened.masks(4)
    for name, mask in opened.masks(4).items():
        np.testing.assert_array_equal(mask, drawn.masks(4)[name.removeprefix("mask_")])


def test_sixteen_bits_survive_the_disk(tmp_path):
    export(tmp_path / "deep", 2, 0, dials=Dials(size=64, bits=16), progress=False)
    place = next((tmp_path / "deep").glob("*/000000.png"))
    stored = np.asarray(Image.open(place)).astype(float)
    np.testing.assert_array_equal(
        stored, np.rint(65535 * phantom_dataset(2, 0, size=64, bits=16).image(0).astype(float))
    )


def test_mura_layout_is_that_of_mura(tmp_path):
    export(tmp_path / "m", 24, 0, "mura", Dials(size=64), progress=False)
    root = tmp_path / "m" / "MURA-v1.1"
    patients = {}
    for split in ("train", "valid"):
        paths = (root / f"{split}_image_paths.csv").read_text().splitlines()
        assert all((tmp_path / "m" / path).is_file() for path in paths)
        assert all(path.startswith(f"MURA-v1.1/{split}/XR_") for path in paths)
        studies = [line.split(",") for line in (root / f"{split}_labeled_studies.csv").read_text().splitlines()]
        assert {study for study, _ in studies} == {path.rsplit("/", 1)[0] + "/" for path in paths}
        assert all(("positive" in study) == (verdict == "1") for study, verdict in studies)
        patients[split] = {path.split("/")[3] for path in paths}
    assert not patients["train"] & patients["valid"]


def test_export_refuses_a_full_folder_and_an_unknown_layout(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not an empty folder"):
        export(tmp_path, 2, 0)
    with pytest.raises(ValueError, match="layout is 'zip'"):
        export(tmp_path / "new", 2, 0, "zip")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
