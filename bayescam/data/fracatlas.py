"""FracAtlas (Abedeen et al. 2023, Scientific Data 10:521): hand, leg, hip, shoulder, through ``dataset.csv``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bayescam.data.dataset import DataError, Radiograph, RadiographDataset, check_classes
from bayescam.storage import is_file, printable

PARTS = ("hand", "hip", "leg", "shoulder")
VIEWS = ("frontal", "lateral", "oblique")
LICENCE = "CC BY 4.0 (FracAtlas, doi 10.6084/m9.figshare.22363012)"


def is_fracatlas(header: Sequence[str]) -> bool:
    """Whether a table's columns are those of FracAtlas's ``dataset.csv``."""
    return {"image_id", "fractured", *PARTS} <= {name.lower() for name in header}


def open_fracatlas(
    path: Path, header: Sequence[str], lines: Sequence[tuple[int, list[str]]], root: Path | None = None
) -> RadiographDataset:
    """The images of ``dataset.csv`` that show exactly one part; the others are counted in ``ignored``.

    FracAtlas has no patient numbers. Images lie in ``images/Fractured`` and ``images/Non_fractured``.

    Raises:
        DataError: rows without numbers, an image listed twice, missing files, or one part only.
    """
    place = path.parent if root is None else root
    names = [name.lower() for name in header]
    records: list[Radiograph] = []
    ignored: Counter[str] = Counter()
    seen: set[str] = set()
    for number, row in lines:
        cells = dict(zip(names, (cell.strip() for cell in row), strict=False))
        shown = [part for part in PARTS if _yes(path, number, cells, part)]
        if len(shown) != 1 or _yes(path, number, cells, "mixed"):
            ignored["several or no parts"] += 1
            continue
        name = cells["image_id"]
        if Path(name).name != name:
            raise DataError(f"{path} line {number}: image_id {printable(name)!r} is not a file name without a folder")
        if name in seen:
            raise DataError(f"{path} line {number}: {printable(name)} is listed twice; leave one of the rows")
        seen.add(name)
        folder = "Fractured" if _yes(path, number, cells, "fractured") else "Non_fractured"
        views = [view for view in VIEWS if _yes(path, number, cells, view)]
        where = f"images/{folder}/{name}"
        records.append(Radiograph(where, PARTS.index(shown[0]), path=place / where, view="+".join(views) or None))
    missing = [record for record in records if not is_file(place / record.obs_id)]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(records)} images are missing below {place}, first "
            f"{printable(missing[0].obs_id)}; unpack FracAtlas again or give --root"
        )
    classes = tuple(part for k, part in enumerate(PARTS) if any(record.label == k for record in records))
    check_classes(classes, path)
    labelled = tuple(Radiograph(r.obs_id, classes.index(PARTS[r.label]), path=r.path, view=r.view) for r in records)
    return RadiographDataset("fracatlas", classes, labelled, root=place, licence=LICENCE, ignored=ignored)


def _yes(path: Path, number: int, cells: dict[str, str], name: str) -> bool:
    value = cells.get(name) or "0"
    if value not in ("0", "1", "0.0", "1.0"):
        raise DataError(f"{path} line {number}: {name} is {printable(value)!r}; FracAtlas has 0 or 1 there")
    return value.startswith("1")
