"""MURA v1.1 (Rajpurkar et al. 2018, arXiv 1712.06957): the user's own copy, read by its paths."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from bayescam.data.dataset import DataError, Radiograph, RadiographDataset, Split, check_classes
from bayescam.data.folder import is_clutter
from bayescam.storage import printable

PARTS = ("elbow", "finger", "forearm", "hand", "humerus", "shoulder", "wrist")
LICENCE = "Stanford University research use agreement: non-commercial research, no redistribution"
WHERE = "https://aimi.stanford.edu/datasets/mura-msk-xrays"
_OFFICIAL = {"train": "train", "valid": "test"}
_PART = re.compile(r"XR_(" + "|".join(PARTS).upper() + r")", re.IGNORECASE)
_IMAGE = re.compile(r"(patient\d+)/(study\d+)(?:_\w+)?/[^/]+\.(?:png|jpe?g)", re.IGNORECASE)


def open_mura(root: Path | None) -> RadiographDataset:
    """MURA below ``root``: the folder MURA-v1.1 under any name, its parent, or one of ``train`` and ``valid`` alone.

    Label, patient and study come from the path ``{train,valid}/XR_<PART>/patient<n>/study<m>_<finding>/image<i>.png``;
    the finding is not kept. The official valid set is the test set; a folder ``train`` or ``valid`` given alone has no
    official split. Where ``<split>_image_paths.csv`` is present, every image it lists must be.

    Raises:
        DataError: no MURA there, listed images missing, or fewer than two parts.
    """
    if root is None:
        raise DataError(f"mura: say where your copy lies by --root DIR; to get one, apply at {WHERE}")
    if not root.is_dir():
        raise DataError(f"--root {root}: is not a folder; give the folder that holds MURA-v1.1")
    base, folders = _parts_of(root)
    ignored: Counter[str] = Counter()
    found: dict[str, tuple[str, str, str, Split | None, Path]] = {}
    for split, folder in folders.items():
        for part, patient, study, path in _images(folder, ignored):
            official = cast(Split, _OFFICIAL[split]) if base is not None else None
            found[path.relative_to(base or folder).as_posix()] = (part, patient, study, official, path)
    if base is not None:
        _check_lists(base, set(found), ignored)
    classes = tuple(part for part in PARTS if any(part == one[0] for one in found.values()))
    check_classes(classes, root)
    records = tuple(
        Radiograph(obs_id, classes.index(part), patient, path, study, split=split)
        for obs_id, (part, patient, study, split, path) in sorted(found.items(), key=lambda item: _natural(item[0]))
    )
    place = base or next(iter(folders.values()))
    return RadiographDataset("mura", classes, records, place, licence=LICENCE, shareable=False, ignored=+ignored)


def _parts_of(root: Path) -> tuple[Path | None, dict[str, Path]]:
    """The folder that holds ``train`` and ``valid`` (None where one of them was given) and these folders."""
    if _has_parts(root):
        return None, {root.name: root}
    below = sorted(p for p in root.iterdir() if p.is_dir() and not is_clutter(p.name))
    for base in (root, *sorted(below, key=lambda p: (p.name != "MURA-v1.1", p.name))):
        folders = {split: base / split for split in _OFFICIAL if _has_parts(base / split)}
        if folders:
            return base, folders
    raise DataError(f"--root {root}: no train/XR_* or valid/XR_* in it; give the folder MURA-v1.1, apply at {WHERE}")


def _has_parts(folder: Path) -> bool:
    return folder.is_dir() and any(_PART.fullmatch(p.name) for p in folder.iterdir())


def _images(folder: Path, ignored: Counter[str]) -> Iterator[tuple[str, str, str, Path]]:
    for part in sorted(folder.iterdir()):
        named = _PART.fullmatch(part.name)
        if named is None:
            ignored["hidden or system" if is_clutter(part.name) else "not a part of MURA"] += 1
            continue
        for above, folders, names in os.walk(part):
            ignored["hidden or system"] += sum(map(is_clutter, folders))
            folders[:] = [name for name in folders if not is_clutter(name)]
            for name in names:
                path = Path(above, name)
                fits = _IMAGE.fullmatch(path.relative_to(part).as_posix())
                if is_clutter(name):
                    ignored["hidden or system"] += 1
                elif fits is None:
                    ignored["not named as MURA's images are"] += 1
                else:
                    yield named[1].lower(), fits[1].lower(), fits[2].lower(), path


def _check_lists(base: Path, found: set[str], ignored: Counter[str]) -> None:
    extra = 0
    for split in _OFFICIAL:
        table = base / f"{split}_image_paths.csv"
        if not table.is_file():
            continue
        try:
            lines = table.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{table}: cannot be read ({error}); unpack MURA again") from error
        cells = (line.split(",")[0].strip().strip('"').replace("\\", "/") for line in lines)
        names = {cell[cell.index(f"{split}/XR_") :] for cell in cells if f"{split}/XR_" in cell}
        missing = sorted(names - found)
        if missing:
            raise DataError(
                f"{table}: {len(missing)} of the {len(names)} images it lists are missing, first "
                f"{printable(missing[0])}; unpack MURA again, or remove the list to use what is there"
            )
        extra += len({name for name in found if name.startswith(f"{split}/")} - names)
    if extra:
        ignored["kept though not in MURA's lists"] = extra


def _natural(name: str) -> tuple[object, ...]:
    """Numbers in names in the order of numbers: image2 before image10."""
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"(\d+)", name)))
