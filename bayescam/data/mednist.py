"""MedNIST: 58,954 images of 64 x 64 in six classes, gathered by B. J. Erickson (Mayo Clinic), CC BY-SA 4.0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bayescam.data.dataset import DataError, RadiographDataset, cache_folder
from bayescam.data.folder import open_folder

CLASSES = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")
LICENCE = "CC BY-SA 4.0 (MedNIST, Dr. Bradley J. Erickson, Mayo Clinic; from TCIA, RSNA Bone Age and NIH Chest X-ray)"


def mednist_home() -> Path:
    """Where ``bayescam data fetch mednist`` puts it by default."""
    return cache_folder() / "mednist"


def open_mednist(root: Path | None) -> RadiographDataset:
    """MedNIST at ``root`` (the folder of the six class folders, or its parent), by default where ``fetch`` puts it.

    It has no patients and a few hundred images twice or more; splits keep equal contents together.

    Raises:
        DataError: it is not there; the message says how to fetch it.
    """
    place = mednist_home() if root is None else root
    for base in (place, place / "MedNIST"):
        if sum((base / name).is_dir() for name in CLASSES) >= 2:
            opened = open_folder(base, name="mednist", licence=LICENCE)
            foreign = [name for name in opened.classes if name not in CLASSES]
            if foreign:
                raise DataError(f"--root {base}: holds {foreign[0]!r}, no class of MedNIST; remove it")
            return replace(opened, root=base)
    fetch = "bayescam data fetch mednist" + ("" if root is None else f" --out {root}")
    raise DataError(f"mednist: not at {place}; give --root DIR, or download it: {fetch}")
