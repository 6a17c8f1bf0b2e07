"""A ``manifest.csv``: one row an image, for data of any layout."""

from __future__ import annotations

import csv
import difflib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bayescam.data.dataset import DataError, Radiograph, RadiographDataset, check_classes
from bayescam.storage import printable, write_csv

COLUMNS = ("path", "label", "patient", "study", "view", "split")
MASK_PREFIX = "mask_"
SPLITS = ("train", "valid", "test")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def open_manifest(path: Path, root: Path | None = None) -> RadiographDataset:
    """The radiographs that a CSV file lists: ``path,label[,patient][,study][,view][,split][,mask_<name>...]``.

    UTF-8 with or without a byte order mark, any line ends, columns in any order; empty rows, trailing commas and
    foreign columns do no harm. Classes are the labels in sorted order. FracAtlas's ``dataset.csv`` is recognised too.

    Args:
        path: the CSV file.
        root: what its paths are relative to; None for its own folder. No path may lead out of it.

    Raises:
        DataError: absent, not such a table, a path that leads out of ``root``, a file that is missing, a path listed
            twice, or fewer than two classes; the message names the file and the line.
    """
    header, lines = read_table(path)
    from bayescam.data.fracatlas import is_fracatlas, open_fracatlas

    if is_fracatlas(header):
        return open_fracatlas(path, header, lines, root)
    place = path.parent if root is None else root
    columns, ignored = _columns(path, header)
    rows = [(number, _cells(path, number, columns, row)) for number, row in lines]
    labels = sorted({cells["label"] for _, cells in rows})
    check_classes(labels, path)
    number_of = {label: k for k, label in enumerate(labels)}
    records: dict[str, Radiograph] = {}
    for number, cells in rows:
        record = _record(path, number, cells, place, number_of)
        if record.obs_id in records:
            raise DataError(f"{path} line {number}: {printable(record.obs_id)} is listed twice; leave one of the rows")
        records[record.obs_id] = record
    _check_files(path, place, list(records.values()))
    return RadiographDataset(
        name=path.resolve().parent.name if path.stem == "manifest" else path.stem,
        classes=tuple(labels),
        records=tuple(records.values()),
        root=place,
        ignored=+ignored,
    )


def write_manifest(dataset: RadiographDataset, path: Path) -> Path:
    """Write ``dataset`` as a manifest and return the folder its paths are relative to.

    That is the manifest's own folder where all images lie below it, else the data set's root, which then has to be
    given as ``root`` to ``open_manifest``.

    Raises:
        DataError: the data set has no files (the phantom), or a file name that UTF-8 text cannot hold.
    """
    files = [p for record in dataset.records for p in (record.path, *record.masks.values()) if p is not None]
    if dataset.root is None or any(record.path is None for record in dataset.records):
        raise DataError(f"{dataset.name} has no files to list; write it to disk first: bayescam data phantom --out DIR")
    folder = path.resolve().parent
    inside = all(Path(os.path.abspath(p)).is_relative_to(folder) for p in files)
    base = folder if inside else Path(os.path.abspath(dataset.root))
    masks = sorted({name for record in dataset.records for name in record.masks})

    def row(record: Radiograph) -> list[str]:
        shown = [_relative(record.path, base), dataset.classes[record.label], record.patient, record.study]
        shown += [record.view, record.split, *(_relative(record.masks.get(name), base) for name in masks)]
        return [cell or "" for cell in shown]

    write_csv(path, [*COLUMNS, *(MASK_PREFIX + name for name in masks)], map(row, dataset.records))
    return base


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """A CSV file as its header and its (line number, cells) rows that are not empty.

    Raises:
        DataError: absent, no UTF-8 text, no CSV, or without rows.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give the path of a manifest.csv") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is not a CSV file in UTF-8 ({error}); save it again as such") from error
    if not rows:
        raise DataError(f"{path}: is empty; its first line names the columns: {','.join(COLUMNS)}")
    header = [cell.strip() for cell in rows[0][1]]
    if len(rows) == 1:
        raise DataError(f"{path}: has a header and no rows; list one image a row")
    return header, rows[1:]


def inside(table: Path, line: int, root: Path, written: str) -> Path:
    """The file that a cell names, refused where it would lie outside ``root``."""
    if "\0" in written:
        raise DataError(f"{table} line {line}: path {printable(written)!r} holds a NUL character")
    base = os.path.abspath(root)
    full = os.path.normpath(os.path.join(base, written))
    if os.path.commonpath([base, full]) != base or full == base:
        raise DataError(
            f"{table} line {line}: path {printable(written)!r} leads out of {root}; write paths relative to it, or "
            "give a --root that holds all images"
        )
    return Path(full)


def _columns(path: Path, header: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """The name of each column, "" for those that are not read."""
    names = [name.lower() for name in header]
    ignored: Counter[str] = Counter()
    for needed in ("path", "label"):
        if needed not in names:
            hint = "; separate the columns by commas" if len(header) == 1 and ";" in header[0] else ""
            shown = printable(",".join(header))
            raise DataError(f"{path}: no column {needed!r} in its header {shown!r}; begin with path,label{hint}")
    for index, name in enumerate(names):
        if name in COLUMNS or name.startswith(MASK_PREFIX):
            if name in names[:index]:
                raise DataError(f"{path}: column {name!r} stands twice in its header")
        elif close := difflib.get_close_matches(name, COLUMNS, 1, 0.8):
            raise DataError(f"{path}: unknown column {printable(header[index])!r}; did you mean {close[0]!r}?")
        else:
            ignored["column not read"] += bool(name)
            names[index] = ""
    return names, ignored


def _cells(path: Path, number: int, columns: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    if any(cell.strip() for cell in row[len(columns) :]):
        raise DataError(f"{path} line {number}: {len(row)} cells under {len(columns)} columns; quote cells with commas")
    cells = {name: _plain(cell.strip()) for name, cell in zip(columns, row, strict=False) if name}
    for needed in ("path", "label"):
        if not cells.get(needed):
            raise DataError(f"{path} line {number}: no {needed}; fill it in or remove the row")
    return cells


def _plain(cell: str) -> str:
    """Undo the quote that keeps a spreadsheet from computing a cell."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] in _FORMULA and len(cell) > 1 else cell


def _record(path: Path, number: int, cells: dict[str, str], root: Path, number_of: dict[str, int]) -> Radiograph:
    split = cells.get("split", "").lower() or None
    if split is not None and split not in SPLITS:
        raise DataError(
            f"{path} line {number}: split is {printable(split)!r}; use train, valid, test or leave it empty"
        )
    image = inside(path, number, root, cells["path"])
    masks = {
        name.removeprefix(MASK_PREFIX): inside(path, number, root, cell)
        for name, cell in cells.items()
        if name.startswith(MASK_PREFIX) and cell
    }
    return Radiograph(
        obs_id=image.relative_to(os.path.abspath(root)).as_posix(),
        label=number_of[cells["label"]],
        patient=cells.get("patient") or None,
        path=image,
        study=cells.get("study") or None,
        view=cells.get("view") or None,
        split=split,  # type: ignore[arg-type]
        masks=masks,
    )


def _check_files(path: Path, root: Path, records: list[Radiograph]) -> None:
    files = [p for record in records for p in (record.path, *record.masks.values()) if p is not None]
    missing = [p for p in files if not os.path.lexists(p)]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of its {len(files)} files are missing below {root}, first "
            f"{printable(str(missing[0]))}; correct the paths or give --root"
        )


def _relative(path: Path | None, base: Path) -> str:
    if path is None:
        return ""
    name = Path(os.path.abspath(path)).relative_to(base).as_posix()
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{printable(name)}: its name is not valid UTF-8, a CSV cannot hold it; rename it") from error
    return name
