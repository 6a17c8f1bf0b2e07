"""Folders, manifests, MURA and MedNIST: every layout in the wild opens, every broken one is named."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bayescam.data import dataset as dataset_module
from bayescam.data.dataset import DataError, Radiograph, RadiographDataset, open_dataset
from bayescam.data.image import ImageError
from bayescam.data.manifest import open_manifest, write_manifest
from bayescam.data.mura import open_mura


def _picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 14)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng([seed, len(str(path))]).integers(0, 255, size, dtype=np.uint8)).save(
        path, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    )
    return path


def _folder(root: Path, classes=("elbow", "hand"), each: int = 3) -> Path:
    for k, name in enumerate(classes):
        for i in range(each):
            _picture(root / name / f"{i}.png", 100 * k + i)
    return root


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders(tmp_path):
    root = _folder(tmp_path / "x")
    _picture(root / "hand" / "deeper" / "still" / "3.PNG", 7)
    _picture(root / "hand" / "nosuffix", 8)
    opened = open_dataset(root)
    assert opened.classes == ("elbow", "hand")
    assert opened.obs_ids[:2] == ["elbow/0.png", "elbow/1.png"]
    assert "hand/deeper/still/3.PNG" in opened.obs_ids
    assert opened.labels.tolist() == [0] * 3 + [1] * 5
    assert opened.image(0).shape == (20, 14)
    assert opened.masks(0) == {}
    assert "RadiographDataset('x', images=8" in repr(opened)


def test_clutter_is_left_out_and_counted(tmp_path):
    root = _folder(tmp_path)
    clutter = ["hand/._0.png", "hand/Thumbs.db", "hand/.ipynb_checkpoints/0.png", "__MACOSX/hand/._0.png", ".DS_Store"]
    clutter += [".ipynb_checkpoints/x.png", "hand/notes.txt", "readme.md", "hand/desktop.ini"]
    for name in clutter:
        _picture(root / name)
    opened = open_dataset(root)
    assert len(opened) == 6
    assert opened.ignored == {"hidden or system": 7, "not an image by its suffix": 1, "outside a class folder": 1}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda r: None, "no such folder"),
        (lambda r: r.mkdir(), "no images in it"),
        (lambda r: _picture(r), "is not a folder"),
        (lambda r: _folder(r, ["hand"]), "only one class"),
        (lambda r: (_folder(r), (r / "wrist").mkdir()), "class folder 'wrist' holds no images"),
        (lambda r: _folder(r, ["Hand", "hand"]), "differ by case"),
    ],
)
def test_folders_that_are_no_data(tmp_path, make, match):
    make(tmp_path / "x")
    with pytest.raises(DataError, match=match) as caught:
        open_dataset(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)


def test_a_link_back_to_the_root_does_not_turn_in_circles(tmp_path):
    root = _folder(tmp_path / "x")
    (root / "hand" / "again").symlink_to(root / "hand", target_is_directory=True)
    (root / "hand" / "up").symlink_to(root, target_is_directory=True)
    opened = open_dataset(root)
    assert len(opened) == 6
    assert opened.ignored["link to a folder above"] == 2


def test_odd_class_and_file_names_are_data(tmp_path):
    names = ["<script>", "a\nb", "$x$", "é手", " ", "-rf", os.fsdecode(b"\xff")]
    opened = open_dataset(_folder(tmp_path / "x", names, 1))
    assert set(opened.classes) == set(names)
    assert opened.unreadable(progress=False) == []


def test_the_data_are_never_changed(tmp_path):
    root = _folder(tmp_path / "x")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()}
    opened = open_dataset(root)
    opened.pixels(16, cache=tmp_path / "cache", progress=False)
    opened.unreadable(progress=False)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_many_files_are_opened_and_hashed_quickly(mednist_dev):
    begun = time.process_time()
    opened = open_dataset(mednist_dev)
    groups = opened.groups()
    assert time.process_time() - begun < 10  # about 1 s on an idle core; the bound only catches a quadratic one
    assert len(opened) == len(groups) == 18_000
    assert len(set(groups)) < 18_000


# --- manifests -------------------------------------------------------------------------------------------------------


def _write(root: Path, text: str, name: str = "manifest.csv") -> Path:
    root.mkdir(exist_ok=True, parents=True)
    (root / name).write_bytes(text.encode("utf-8"))
    return root / name


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nelbow/0.png,elbow\nhand/0.png,hand\n",
        "\ufeffpath,label\r\nelbow/0.png,elbow\r\nhand/0.png,hand\r\n",
        "label, Path ,\nelbow,elbow/0.png,\n\n,,\nhand,./hand/0.png,,\n",
        'path,label\n"elbow/0.png","elbow"\n"hand/../hand/0.png",hand',
        "path,label,weather\nelbow/0.png,elbow,fine\nhand/0.png,hand,\n",
        "path,label,patient,study,view,split\nelbow/0.png,elbow\nhand/0.png,hand,,,,\n",
        "path,label\n{root}/elbow/0.png,elbow\nhand/0.png,hand\n",
    ],
)
def test_manifests_of_every_hand(tmp_path, text):
    root = _folder(tmp_path / "x")
    opened = open_dataset(_write(root, text.replace("{root}", str(root))))
    assert opened.classes == ("elbow", "hand")
    assert opened.obs_ids == ["elbow/0.png", "hand/0.png"]
    assert opened.records[0].path == root / "elbow/0.png"
    assert opened.patients == [None, None]


def test_all_columns(tmp_path):
    root = _folder(tmp_path / "x")
    Image.fromarray(np.eye(20, 14) > 0).save(root / "m.png")
    text = "path,label,patient,study,view,split,mask_bone,mask_cast\nelbow/0.png,1,p1,s1,ap,Train,m.png,\n"
    opened = open_dataset(_write(root, text + "hand/0.png,0,p2,,,test,,\n"))
    first, second = opened.records
    assert (first.patient, first.study, first.view, first.split) == ("p1", "s1", "ap", "train")
    assert (first.label, second.label, opened.classes) == (1, 0, ("0", "1"))
    assert (second.patient, second.study, second.split) == ("p2", None, "test")
    assert list(opened.masks(0)) == ["bone"]
    np.testing.assert_array_equal(opened.masks(0)["bone"], np.eye(20, 14) > 0)
    assert opened.masks(1) == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("path,label\n", "no rows"),
        ("elbow/0.png,elbow\nhand/0.png,hand\n", "no column 'path'"),
        ("path;label\nelbow/0.png;elbow\n", "by commas"),
        ("path,label,label\nelbow/0.png,elbow,x\n", "'label' stands twice"),
        ("path,label,patients\nelbow/0.png,elbow,1\n", "unknown column 'patients'; did you mean 'patient'"),
        ("path,label\nelbow/0.png,\n", "line 2: no label"),
        ("path,label\n,elbow\n", "line 2: no path"),
        ("path,label\nelbow/0.png,elbow,more\n", "line 2: 3 cells under 2 columns"),
        ("path,label\nelbow/0.png,elbow\nhand/9.png,hand\n", r"1 of its 2 files are missing.*hand/9\.png"),
        ("path,label\nelbow/0.png,elbow\nelbow/./0.png,hand\n", "line 3: elbow/0.png is listed twice"),
        ("path,label\nelbow/0.png,elbow\nelbow/1.png,elbow\n", "only one class"),
        ("path,label\nelbow/0.png,elbow\nhand/1.png,Elbow\n", "differ by case"),
        ("path,label,split\nelbow/0.png,elbow,dev\nhand/0.png,hand,train\n", "line 2: split is 'dev'"),
        ("path,label\n../out.png,elbow\nhand/0.png,hand\n", r"line 2: path '\.\./out\.png' leads out"),
        ("path,label\n/etc/passwd,elbow\nhand/0.png,hand\n", "leads out"),
        ("path,label\na/../../out.png,elbow\nhand/0.png,hand\n", "leads out"),
        ("path,label\n.,elbow\nhand/0.png,hand\n", "leads out"),
        ("path,label,mask_a\nelbow/0.png,elbow,../m.png\nhand/0.png,hand,\n", "leads out"),
        ("path,label,mask_a\nelbow/0.png,elbow,m.png\nhand/0.png,hand,\n", "missing"),
        ("path,label\nelbow\0/0.png,elbow\nhand/0.png,hand\n", "NUL"),
        ('path,label\n"elbow/0.png,elbow\nhand/0.png,hand\n', "."),
        ("path,label\n" + "x" * 200_000 + ",elbow\n", "."),
    ],
)
def test_broken_manifests_are_named(tmp_path, text, match):
    root = _folder(tmp_path / "x")
    with pytest.raises(DataError, match=match) as caught:
        open_dataset(_write(root, text))
    assert "manifest.csv" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00path", "path,label\né,a".encode("latin-1"), b"\x00" * 99])
def test_what_is_no_text_is_no_manifest(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(DataError):
        open_dataset(tmp_path / "m.csv")


def test_an_absent_manifest(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        open_dataset(tmp_path / "m.csv")


def test_a_manifest_with_a_root(tmp_path):
    root = _folder(tmp_path / "x")
    elsewhere = _write(tmp_path / "y", "path,label\nelbow/0.png,elbow\nhand/0.png,hand\n", "list.csv")
    opened = open_dataset(elsewhere, root=root)
    assert opened.records[0].path == root / "elbow/0.png"
    assert (opened.name, opened.root) == ("list", root)
    with pytest.raises(DataError, match="missing below"):
        open_dataset(elsewhere)


def test_a_written_manifest_gives_the_same_data_set_back(tmp_path):
    root = _folder(tmp_path / "x", ["=1+1", "-hand", "a,b", "@x"])
    first = open_dataset(root)
    assert write_manifest(first, root / "manifest.csv") == root
    again = open_dataset(root)
    assert (again.classes, again.records) == (first.classes, first.records)
    assert write_manifest(first, tmp_path / "deep" / "list.csv") == root
    assert open_manifest(tmp_path / "deep" / "list.csv", root).records == first.records


def test_what_has_no_files_has_no_manifest(tmp_path):
    with pytest.raises(DataError, match="bayescam data phantom"):
        write_manifest(open_dataset("phantom", num=3), tmp_path / "m.csv")
    root = _folder(tmp_path / "x", [os.fsdecode(b"\xff"), "hand"])
    with pytest.raises(DataError, match="not valid UTF-8"):
        write_manifest(open_dataset(root), root / "m.csv")


def test_no_mutation_breaks_the_manifest_reader(tmp_path):
    root = _folder(tmp_path / "x")
    content = b"path,label,patient,split,mask_a\r\n" + b"".join(
        b"%s/%d.png,%s,p%d,train,\r\n" % (name, i, name, i) for name in (b"elbow", b"hand") for i in range(3)
    )
    rng, opened = random.Random(0), 0
    for _ in range(300):
        data = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 9])] = rng.choice(
                [b"", b",", b'"', b"\n", b"\0", b"\xff", b"../", b"/", b";"]
            )
        (root / "m.csv").write_bytes(data)
        try:
            found = open_manifest(root / "m.csv")
        except DataError:
            continue
        opened += 1
        assert all(record.path.is_relative_to(root) for record in found.records)
    assert opened > 10


# --- FracAtlas -------------------------------------------------------------------------------------------------------

FRACATLAS = "image_id,hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,frontal,lateral,oblique\n"


def test_fracatlas_through_the_manifest_writer(tmp_path):
    for name in ("Fractured/1.jpg", "Non_fractured/2.jpg", "Non_fractured/3.jpg", "Non_fractured/4.jpg"):
        _picture(tmp_path / "images" / name)
    rows = ["1.jpg,1,0,0,0,0,0,0,1,1,1,0,0", "2.jpg,0,1,0,0,0,0,0,0,0,1,1,0", "3.jpg,1,1,0,0,1,0,0,0,0,0,0,0"]
    rows += ["4.jpg,0,0,0,0,0,0,0,0,0,0,0,0"]
    table = _write(tmp_path, FRACATLAS + "\n".join(rows), "dataset.csv")
    opened = open_dataset(table)
    assert (opened.name, opened.classes) == ("fracatlas", ("hand", "leg"))
    assert opened.obs_ids == ["images/Fractured/1.jpg", "images/Non_fractured/2.jpg"]
    assert [record.view for record in opened.records] == ["frontal", "frontal+lateral"]
    assert opened.ignored == {"several or no parts": 2}
    write_manifest(opened, tmp_path / "manifest.csv")
    again = open_manifest(tmp_path / "manifest.csv")
    assert (again.classes, again.labels.tolist()) == (opened.classes, opened.labels.tolist())
    (tmp_path / "images/Fractured/1.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are missing.*1\.jpg"):
        open_dataset(table)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("../1.jpg,1,0,0,0,0,0,0,1,1,1,0,0", "not a file name"),
        ("1.jpg,x,0,0,0,0,0,0,1", "hand is 'x'"),
        ("1.jpg,1,0,0,0,0,0,0,1\n1.jpg,0,1,0,0,0,0,0,0", "listed twice"),
        (f"{'1' * 300}.jpg,1,0,0,0,0,0,0,1", "1 of 1 images are missing"),  # what a fuzz found: no file's name
    ],
)
def test_broken_fracatlas_rows_are_named(tmp_path, row, match):
    with pytest.raises(DataError, match=rf"line 2: .*{match}|{match}"):
        open_dataset(_write(tmp_path, FRACATLAS + row, "dataset.csv"))


# --- MURA ------------------------------------------------------------------------------------------------------------

MURA = [
    "train/XR_ELBOW/patient00001/study1_positive/image1.png",
    "train/XR_ELBOW/patient00001/study1_positive/image2.png",
    "train/XR_ELBOW/patient00001/study1_positive/image10.png",
    "train/XR_HAND/patient00001/study2_negative/image1.png",
    "train/XR_HAND/patient00002/study1_unknown/image1.png",
    "valid/XR_ELBOW/patient11185/study1_negative/image1.png",
    "valid/XR_HAND/patient11186/study1_negative/image1.png",
]


def _mura(parent: Path, name: str = "MURA-v1.1") -> Path:
    for i, path in enumerate(MURA):
        _picture(parent / name / path, i)
    return parent / name


@pytest.mark.parametrize("name", ["MURA-v1.1", "mura copy"])
@pytest.mark.parametrize("where", ["itself", "parent"])
def test_mura_by_path(tmp_path, name, where):
    base = _mura(tmp_path, name)
    opened = open_dataset("mura", root=base if where == "itself" else tmp_path)
    assert opened.classes == ("elbow", "hand")
    assert opened.obs_ids == MURA
    assert [r.patient for r in opened.records] == [
        "patient00001", "patient00001", "patient00001", "patient00001", "patient00002", "patient11185", "patient11186",
    ]  # fmt: skip
    assert [r.split for r in opened.records] == ["train"] * 5 + ["test"] * 2
    assert [r.study for r in opened.records[2:5]] == ["study1", "study2", "study1"]
    assert not opened.shareable
    assert opened.image(0).shape == (20, 14)


def test_the_abnormality_reaches_no_field_but_the_path(tmp_path):
    for record in open_mura(_mura(tmp_path)).records:
        for value in (record.label, record.patient, record.study, record.view, record.split):
            assert "tive" not in str(value)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_one_part_of_mura_alone_has_no_official_split(tmp_path, part):
    opened = open_dataset("mura", root=_mura(tmp_path) / part)
    assert {record.split for record in opened.records} == {None}
    assert len(opened) == {"train": 5, "valid": 2}[part]
    assert all(name.startswith("XR_") for name in opened.obs_ids)


@pytest.mark.parametrize("text", ["{}", "Img_Path\n{}", "\ufeff{}", "Img_Path,Label\n{}"])
@pytest.mark.parametrize("end", ["\n", "\r\n", ",\n"])
def test_mura_lists_in_the_forms_of_the_wild(tmp_path, text, end):
    base = _mura(tmp_path)
    lines = "".join(f"MURA-v1.1/{path}{end}" for path in MURA if path.startswith("train"))
    _write(base, text.replace("{}", lines), "train_image_paths.csv")
    _write(base, "MURA-v1.1/train/XR_ELBOW/patient00001/study1_positive/,1\r\n", "train_labeled_studies.csv")
    assert len(open_mura(base)) == 7
    _picture(base / "train/XR_HAND/patient00002/study1_unknown/image2.png", 9)
    assert open_mura(base).ignored == {"kept though not in MURA's lists": 1}
    (base / MURA[0]).unlink()
    with pytest.raises(DataError, match=r"1 of the 5 images it lists are missing, first train/XR_ELBOW"):
        open_mura(base)


def test_clutter_in_mura_is_counted(tmp_path):
    base = _mura(tmp_path)
    for name in ("XR_KNEE/patient1/study1_negative/image1.png", "XR_HAND/._x.png", "XR_HAND/patient3/image1.png"):
        _picture(base / "train" / name)
    _picture(base / "train" / ".DS_Store")
    _picture(base / "train/XR_HAND/__MACOSX/x.png")
    assert len(open_mura(base)) == 7
    assert open_mura(base).ignored == {
        "not a part of MURA": 1, "hidden or system": 3, "not named as MURA's images are": 1
    }  # fmt: skip


@pytest.mark.parametrize("root", [None, "absent", "."])
def test_no_mura_says_where_to_apply_or_what_to_give(tmp_path, root):
    with pytest.raises(DataError, match=r"apply at https://|give the folder"):
        open_dataset("mura", root=None if root is None else tmp_path / root)


def test_mednist_absent_says_how_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESCAM_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="bayescam data fetch mednist"):
        open_dataset("mednist")
    with pytest.raises(DataError, match=rf"fetch mednist --out {tmp_path}"):
        open_dataset("mednist", root=tmp_path)


def test_mednist_where_it_lies(mednist_dev):
    opened = open_dataset("mednist", root=mednist_dev)
    assert opened.classes == ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")
    assert "CC BY-SA" in opened.licence


# --- what all have ---------------------------------------------------------------------------------------------------


def test_unreadable_files_are_all_named_in_order(tmp_path):
    root = _folder(tmp_path / "x", each=6)
    for name in ("elbow/3.png", "hand/1.png"):
        (root / name).write_bytes(b"x")
    opened = open_dataset(root)
    assert [error.path for error in opened.unreadable(progress=False)] == [root / "elbow/3.png", root / "hand/1.png"]
    with pytest.raises(ImageError, match=r"3\.png"):
        opened.pixels(16, cache=tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_a_key_follows_the_content(tmp_path):
    root = _folder(tmp_path / "x")
    opened = open_dataset(root)
    record = opened.records[0]
    first = opened.source.key(record)
    assert opened.source.key(record) == first
    _picture(record.path, 99, (30, 30))
    assert opened.source.key(record) != first
    os.unlink(record.path)
    with pytest.raises(ImageError, match="No such file"):
        opened.source.key(record)
    os.mkfifo(record.path)
    with pytest.raises(ImageError, match="not a regular file"):
        opened.source.key(record)


def test_select_keeps_order_and_source(tmp_path):
    opened = open_dataset(_folder(tmp_path / "x"))
    some = opened.select(np.array([4, 1]))
    assert some.obs_ids == ["hand/1.png", "elbow/1.png"]
    assert some.labels.tolist() == [1, 0]
    assert some.labels.dtype == np.int64
    assert some.source is opened.source


def test_a_record_without_a_file_needs_a_source():
    lost = RadiographDataset("x", ("a", "b"), (Radiograph("1", 0), Radiograph("2", 1)))
    with pytest.raises(ValueError, match="needs another source"):
        lost.image(0)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BAYESCAM_CACHE", str(tmp_path))
    assert dataset_module.cache_folder() == tmp_path
    monkeypatch.delenv("BAYESCAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert dataset_module.cache_folder() == tmp_path / "bayescam"


@pytest.mark.parametrize("num", [0, 1, 7, 1000])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_threads_keep_the_order(num, num_workers):
    assert dataset_module.in_threads(lambda i: i * i, range(num), num_workers, None) == [i * i for i in range(num)]


def test_the_first_error_ends_the_reading():
    done = []

    def work(i):
        if i == 100:
            raise ImageError("x.png", "is broken")
        time.sleep(0.0005)
        done.append(i)

    with pytest.raises(ImageError):
        dataset_module.in_threads(work, range(20_000), 2, None)
    assert len(done) < 2000
