"""Readers of the users' own files, each with valid files: ``prepare(folder)`` fills it and gives ``read(path)``.

A reader also looks at what came out: a picture lies in [0, 1], nothing leads out of its folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Reader = Callable[[Path], object]


def _picture(seed: int = 0, size: tuple[int, int] = (20, 14)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def _check_picture(path: Path) -> None:
    from bayescam.data.image import read_image

    found = read_image(path, max_pixels=10**6)
    assert found.ndim == 2
    assert found.dtype == np.float32
    assert 0 <= found.min() <= found.max() <= 1


def image(folder: Path) -> Reader:
    from PIL import Image

    grey = Image.fromarray(_picture())
    deep = Image.fromarray(_picture().astype(np.uint16) * 257)
    for name in ("grey.png", "grey.jpg", "grey.bmp", "grey.tif"):
        grey.save(folder / name)
    for name in ("deep.png", "deep.tif"):
        deep.save(folder / name)
    grey.convert("P").save(folder / "palette.png", transparency=3)
    grey.convert("RGBA").save(folder / "alpha.png")
    grey.convert("CMYK").save(folder / "cmyk.jpg")
    grey.convert("1").save(folder / "bits.tif", compression="group4")
    grey.save(folder / "packed.tif", compression="tiff_lzw")
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.save(folder / "turned.jpg", exif=exif)
    return _check_picture


def dicom(folder: Path) -> Reader:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    for name, syntax, tags in (
        ("explicit", ExplicitVRLittleEndian, {"WindowCenter": "2000", "WindowWidth": "1000"}),
        ("implicit", ImplicitVRLittleEndian, {"RescaleSlope": "2", "RescaleIntercept": "-5", "BitsStored": 12}),
    ):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
        meta.TransferSyntaxUID = syntax
        dataset = FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 20, 14, 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME1", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelData = (_picture().astype(np.uint16) * 16).tobytes()
        for tag, value in tags.items():
            setattr(dataset, tag, value)
        stream = io.BytesIO()
        dataset.save_as(stream, enforce_file_format=True)
        (folder / f"{name}.dcm").write_bytes(stream.getvalue())
    return _check_picture


def _check_dataset(dataset: object, root: Path) -> None:
    from bayescam.data.split import SplitError, split_by_patient

    assert len(set(dataset.obs_ids)) == len(dataset)
    assert all(record.path.is_relative_to(root) for record in dataset.records)
    assert 0 <= dataset.labels.min() <= dataset.labels.max() < len(dataset.classes)
    with contextlib.suppress(SplitError):
        split_by_patient(dataset, seed=0)


def _table(folder: Path, name: str, text: str, places: list[str]) -> Reader:
    """A table that names images, read where these images lie."""
    from bayescam.data.dataset import open_dataset

    home = folder.parent / f"{name}-images"
    for place in places:
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        (home / place).write_bytes(place.encode())
    (folder / name).write_text(text)

    def read(path: Path) -> None:
        (home / name).write_bytes(path.read_bytes())
        _check_dataset(open_dataset(home / name), home)

    return read


def manifest(folder: Path) -> Reader:
    places = [f"{label}/{number}.png" for label in ("elbow", "hand") for number in range(6)]
    rows = [
        f"{place},{place[:4]},p{i // 2},s1,PA,{'train' if i % 3 else 'test'},{place}" for i, place in enumerate(places)
    ]
    text = "\n".join(["path,label,patient,study,view,split,mask_bone", *rows])
    return _table(folder, "manifest.csv", text, places)


def fracatlas(folder: Path) -> Reader:
    places = [f"images/Fractured/{i}.jpg" for i in range(6)]
    header = "image_id,hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,frontal,lateral,oblique"
    rows = [f"{i}.jpg,{i % 2},{1 - i % 2},0,0,0,0,0,1,1,1,0,0" for i in range(6)]
    return _table(folder, "dataset.csv", "\n".join([header, *rows]), places)


def _layout(folder: Path, places: list[str], spec: str | None) -> Reader:
    """A list of paths, one a line; ``read`` makes a tree of them (a last slash makes a folder) and opens it."""
    from bayescam.data.dataset import open_dataset

    (folder / "tree.txt").write_text("\n".join(places))

    def read(path: Path) -> None:
        root = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            for number, line in enumerate(path.read_bytes().splitlines()):
                _plant(root, line, number)
            dataset = open_dataset(root) if spec is None else open_dataset(spec, root=root)
            _check_dataset(dataset, root)
        finally:
            shutil.rmtree(root)

    return read


def _plant(root: Path, line: bytes, number: int) -> None:
    """Make what a line says, below ``root`` alone; what no file system can make is left out."""
    pieces = [
        os.fsdecode(piece[:255]) for piece in line.split(b"/") if piece not in (b"", b".", b"..") and b"\0" not in piece
    ]
    place = root.joinpath(*pieces[:20])
    with contextlib.suppress(OSError):
        if line.endswith(b"/"):
            place.mkdir(parents=True, exist_ok=True)
        elif not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"%d" % number)


def folder_layout(folder: Path) -> Reader:
    places = [f"{label}/{number}.png" for label in ("elbow", "hand", "wrist") for number in range(4)]
    return _layout(folder, [*places, "hand/deeper/a.dcm", "README.txt", ".git/config", "wrist/.hidden.png"], None)


def mednist_layout(folder: Path) -> Reader:
    return _layout(
        folder, [f"MedNIST/{c}/{i:06d}.jpeg" for c in ("Hand", "CXR", "HeadCT") for i in range(4)], "mednist"
    )


def mura_layout(folder: Path) -> Reader:
    parts = [
        f"MURA-v1.1/{split}/XR_{part}/patient{number:05d}/study{1 + number % 2}_positive/image{number}.png"
        for split in ("train", "valid")
        for part in ("ELBOW", "HAND")
        for number in range(3)
    ]
    return _layout(folder, parts, "mura")


def archive(folder: Path) -> Reader:
    from bayescam.data.archive import Limits, extract

    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for number in range(4):
            packed.writestr(f"d/{number}.txt", f"{number}" * 300)
    for name in ("a.tar", "a.tar.gz"):
        with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w", format=tarfile.PAX_FORMAT) as packed:
            for number in range(4):
                info = tarfile.TarInfo(f"d/é{'x' * 40 * number}.txt")
                info.size = 300
                packed.addfile(info, io.BytesIO(b"%d" % number * 300))

    def read(path: Path) -> None:
        home = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            out = extract(path, home / "out", limits=Limits(files=50, total=2**20))
            assert all(found.is_dir() or (found.is_file() and not found.is_symlink()) for found in out.rglob("*"))
        finally:
            left = sorted(found.name for found in home.iterdir())
            shutil.rmtree(home)
            assert left in ([], ["out"]), left

    return read


def _read_features(path: Path) -> None:
    from bayescam.data.feature_table import read_features

    table = read_features(path, seed=0)
    for features, labels in ((table.features, table.labels), (table.test_features, table.test_labels)):
        assert np.isfinite(features).all()
        assert features.shape == (len(labels), table.features.shape[1])
        assert 0 <= labels.min() <= labels.max() < len(table.classes)


def features(folder: Path) -> Reader:
    values, labels = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 3
    np.savez(folder / "plain.npz", features=values, labels=labels)
    np.savez_compressed(folder / "four.npz", features=values, labels=labels, test_features=values, test_labels=labels)
    np.savez(folder / "owned.npz", features=values, labels=labels, patients=np.arange(12) // 2)
    np.savez(folder / "words.npz", features=values.astype(np.float32), labels=np.array(["a", "b", "é"])[labels])
    return _read_features


def features_csv(folder: Path) -> Reader:
    rows = [f"{i * 0.5},{-i},{i % 3}" for i in range(12)]
    (folder / "named.csv").write_text("\n".join(["first,second,label", *rows]))
    (folder / "owned.csv").write_text("\n".join(["first,patient,label", *rows]))
    (folder / "bare.csv").write_text("\n".join(row + "x" for row in rows))
    return _read_features


def pixels(folder: Path) -> Reader:
    """The cache: what is not what was kept must be made again, or refused."""
    from bayescam.data.pixels import letterboxed, load_pixels, save_pixels

    home = folder.parent / "cached"

    def fill(squares: np.ndarray) -> list:
        squares[:], geometry = letterboxed(_picture() / np.float32(255), 16)
        return [geometry] * len(squares)

    save_pixels(home, 3, 16, fill)
    names = ("images.npy", "geometry.npy")
    whole = {name: (home / name).read_bytes() for name in names}
    for name in names:
        (folder / name).write_bytes(whole[name])

    def read(path: Path) -> None:
        content = path.read_bytes()
        for name in names:
            for changed in names:
                (home / changed).write_bytes(content if changed == name else whole[changed])
            found = load_pixels(home, 3, 16)
            if found is not None:
                assert tuple(found.batch([0, 2]).shape) == (2, 1, 16, 16)
                assert all(isinstance(geometry.height, int) for geometry in found.geometry)

    return read
