"""A folder of class folders: ``root/class/.../image.png``; the first level is the label."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bayescam.data.dataset import DataError, Radiograph, RadiographDataset, check_classes

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")
_CLUTTER_FOLDERS = ("__macosx",)
_CLUTTER_FILES = ("thumbs.db", "desktop.ini")


def open_folder(root: Path, *, name: str | None = None, licence: str = "the user's own") -> RadiographDataset:
    """The images below ``root``, sorted by class and path; a ``manifest.csv`` in it is opened instead.

    Hidden files and folders, ``__MACOSX``, ``Thumbs.db`` and files that are no images by their suffix are left out and
    counted. Files without a suffix are taken: DICOM often has none.

    Raises:
        DataError: absent, not a folder, without images, or with one class only.
    """
    if not root.exists():
        raise DataError(f"--data {root}: no such folder; give phantom, mednist, mura, a folder or a manifest.csv")
    if not root.is_dir():
        raise DataError(f"--data {root}: is not a folder; give a folder of class folders, or a .csv manifest")
    if (root / "manifest.csv").is_file():
        from bayescam.data.manifest import open_manifest

        return open_manifest(root / "manifest.csv")
    ignored: Counter[str] = Counter()
    found = {path: label for label, path in _walk(root, ignored)}
    classes = tuple(sorted(set(found.values())))
    if not classes:
        raise DataError(f"--data {root}: no images in it; expected {root}/<class>/<image>.png")
    check_classes(classes, root)
    records = tuple(
        Radiograph(obs_id=path.relative_to(root).as_posix(), label=classes.index(label), path=path)
        for path, label in sorted(found.items())
    )
    return RadiographDataset(
        name=name or root.resolve().name, classes=classes, records=records, root=root, licence=licence, ignored=ignored
    )


def is_clutter(name: str) -> bool:
    """Whether a file or folder is the operating system's or an editor's, not the user's."""
    return name.startswith(".") or name.lower() in _CLUTTER_FOLDERS or name.lower() in _CLUTTER_FILES


def _walk(root: Path, ignored: Counter[str]) -> Iterator[tuple[str, Path]]:
    with os.scandir(root) as entries:
        for entry in entries:
            if is_clutter(entry.name):
                ignored["hidden or system"] += 1
            elif entry.is_dir():
                images = list(_images(Path(entry.path), ignored, {os.path.realpath(root)}))
                if not images:
                    raise DataError(f"--data {root}: class folder {entry.name!r} holds no images; remove it or fill it")
                yield from ((entry.name, path) for path in images)
            else:
                ignored["outside a class folder"] += 1


def _images(folder: Path, ignored: Counter[str], above: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        ignored["link to a folder above"] += 1
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_clutter(entry.name):
                ignored["hidden or system"] += 1
            elif entry.is_dir():
                yield from _images(Path(entry.path), ignored, above | {real})
            elif os.path.splitext(entry.name)[1].lower() in ("", *SUFFIXES):
                yield Path(entry.path)
            else:
                ignored["not an image by its suffix"] += 1
