"""Ready-made features from a .npz or .csv file: any network's, any framework's, or plain tabular data."""

from __future__ import annotations

import csv
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayescam.errors import FileFormatError
from bayescam.storage import printable

TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Training and test features with labels 0..K-1.

    Args:
        features, test_features: (N, D), (M, D), float32 or float64.
        labels, test_labels: (N,), (M,) int64.
        classes: what each label was called in the file.
        rows, test_rows: where each row stood in the file's arrays.
        test_patients: whose each test row is, (M,); None where the file does not say.
    """

    features: np.ndarray
    labels: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    rows: np.ndarray
    test_rows: np.ndarray
    test_patients: np.ndarray | None = None


def read_features(path: Path, *, seed: int) -> FeatureTable:
    """Read ``path`` and split it; without test arrays 20 % of each class are held out by ``seed``.

    .npz: arrays ``features`` (N, D), ``labels`` (N,), and both or none of ``test_features``, ``test_labels``.
    .csv: one row an image, numbers, the label in the last column; a first line of names is recognised. Labels may be
    any whole numbers or words; they are counted 0..K-1 in sorted order.
    Where the file says whose each row is (arrays ``patients`` and, beside test arrays, ``test_patients``; a column
    named patient), patients are held out whole.

    Raises:
        FileFormatError: the file is absent or broken, or holds what cannot be features and labels; it names the place.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; give a .npz or .csv of features")
    if path.suffix.lower() == ".npz":
        arrays = _read_npz(path)
    elif path.suffix.lower() == ".csv":
        arrays = _read_csv(path)
    else:
        raise FileFormatError(f"{path}: ends in {path.suffix!r}; give a .npz or .csv of features")
    return _table(path, arrays, seed)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise FileFormatError(f"{path}: not a whole .npz; write it with numpy.savez")
    try:
        with (
            path.open("rb") as stream,
            warnings.catch_warnings(action="ignore"),  # numpy's, of headers that Python 2 wrote
            np.load(stream, allow_pickle=False) as stored,
        ):
            arrays = {name: stored[name] for name in stored.files}
    except Exception as error:  # numpy parses headers as Python text: it raises almost anything
        said = printable(" ".join(str(error).split()))
        raise FileFormatError(
            f"{path}: not a whole .npz of plain arrays ({said}); write it with numpy.savez"
        ) from error
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    for name in ("features", "labels"):
        if name not in arrays:
            held = ", ".join(printable(held) for held in sorted(arrays)) or "nothing"
            raise FileFormatError(f"{path}: has no array {name!r} (it holds {held}); save features= and labels=")
    if ("test_features" in arrays) != ("test_labels" in arrays):
        raise FileFormatError(f"{path}: holds one of test_features and test_labels; give both or none")
    if "test_features" in arrays and ("patients" in arrays) != ("test_patients" in arrays):
        raise FileFormatError(f"{path}: holds one of patients and test_patients; give both or none")
    return arrays


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except csv.Error as error:
        raise FileFormatError(f"{path}: is not a CSV file ({error}); save it again as such") from error
    patient = None
    if rows and not all(_is_number(cell) for cell in rows[0][:-1]):
        header = [cell.strip().lower() for cell in rows[0][:-1]]
        patient = header.index("patient") if "patient" in header else None
        rows = rows[1:]
    if not rows:
        raise FileFormatError(f"{path}: has no row of numbers")
    width = len(rows[0])
    if width < 2 + (patient is not None):
        raise FileFormatError(f"{path}: has one column; give the features and, last, the label")
    for i, row in enumerate(rows):
        if len(row) != width:
            raise FileFormatError(f"{path}: data row {i + 1} has {len(row)} columns, not {width}")
    owners = {} if patient is None else {"patients": np.array([row.pop(patient).strip() for row in rows])}
    features = np.empty((len(rows), len(rows[0]) - 1))
    for i, row in enumerate(rows):
        try:
            features[i] = [float(cell) for cell in row[:-1]]
        except ValueError as error:
            raise FileFormatError(f"{path}: data row {i + 1}: {printable(str(error))}") from error
    return {"features": features, "labels": np.array([row[-1].strip() for row in rows]), **owners}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _table(path: Path, arrays: dict[str, np.ndarray], seed: int) -> FeatureTable:
    given = "test_features" in arrays
    features, names = _checked(path, arrays, "")
    test_features, test_names = _checked(path, arrays, "test_") if given else (features[:0], names[:0])
    if given and test_features.shape[1] != features.shape[1]:
        raise FileFormatError(
            f"{path}: test_features has {test_features.shape[1]} columns and features {features.shape[1]}"
        )
    if not set(test_names.tolist()) <= set(names.tolist()):
        extra = sorted(set(test_names.tolist()) - set(names.tolist()))[0]
        raise FileFormatError(f"{path}: test_labels holds {printable(str(extra))!r}, which labels does not")
    classes = sorted(set(names.tolist()), key=_order)
    if len(classes) < 2:
        raise FileFormatError(f"{path}: labels hold one class only; a classifier needs at least 2")
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number[name] for name in names.tolist()])
    words = tuple(printable(str(name)) for name in classes)
    patients, test_patients = _owners(path, arrays, "", len(labels)), _owners(path, arrays, "test_", len(test_names))
    if given:
        _check_apart(path, patients, test_patients)
        test_labels = np.array([number[name] for name in test_names.tolist()])
        rows, test_rows = np.arange(len(labels)), np.arange(len(test_labels))
        return FeatureTable(features, labels, test_features, test_labels, words, rows, test_rows, test_patients)
    if patients is None:
        held = _held_out(path, labels, words, seed)
    else:
        held = _held_patients(path, labels, words, patients, seed)
    rows, test_rows = np.flatnonzero(~held), np.flatnonzero(held)
    owners = None if patients is None else patients[held]
    return FeatureTable(
        features[rows], labels[rows], features[test_rows], labels[test_rows], words, rows, test_rows, owners
    )


def _owners(path: Path, arrays: dict[str, np.ndarray], prefix: str, num_rows: int) -> np.ndarray | None:
    """Whose each row is, as words."""
    if f"{prefix}patients" not in arrays:
        return None
    names = arrays[f"{prefix}patients"]
    if names.shape != (num_rows,) or not (np.issubdtype(names.dtype, np.integer) or names.dtype.kind == "U"):
        raise FileFormatError(
            f"{path}: {prefix}patients must be whole numbers or words ({num_rows},), got {names.dtype} {names.shape}"
        )
    if names.dtype.kind == "U":
        _check_text(path, names, f"{prefix}patients")
    return names.astype(str)


def _checked(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    features, names = arrays[f"{prefix}features"], arrays[f"{prefix}labels"]
    if features.ndim != 2 or features.shape[1] == 0 or not np.issubdtype(features.dtype, np.number):
        raise FileFormatError(f"{path}: {prefix}features must be numbers (N, D), got {features.dtype} {features.shape}")
    if np.iscomplexobj(features):
        raise FileFormatError(f"{path}: {prefix}features are complex numbers; give real ones")
    if names.shape != (len(features),) or len(names) == 0:
        raise FileFormatError(f"{path}: {prefix}labels must be ({len(features)},) and not empty, got {names.shape}")
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float32 if features.dtype == np.float16 else np.float64)
    broken = np.argwhere(~np.isfinite(features))
    if len(broken):
        i, j = broken[0]
        raise FileFormatError(f"{path}: {prefix}features[{i}, {j}] is {features[i, j]}; drop or mend that row")
    if np.issubdtype(names.dtype, np.floating):
        if not np.equal(names, np.round(names)).all():
            raise FileFormatError(f"{path}: {prefix}labels are not whole numbers; a classifier needs classes")
        names = names.astype(np.int64)
    if not (np.issubdtype(names.dtype, np.integer) or names.dtype.kind == "U"):
        raise FileFormatError(f"{path}: {prefix}labels must be whole numbers or words, got {names.dtype}")
    if names.dtype.kind == "U":
        _check_text(path, names, f"{prefix}labels")
    return features, names


def _check_apart(path: Path, patients: np.ndarray | None, test_patients: np.ndarray | None) -> None:
    if patients is None or test_patients is None:
        return
    both = np.intersect1d(patients, test_patients)
    if len(both):
        raise FileFormatError(
            f"{path}: patient {printable(str(both[0]))!r} stands in patients and in test_patients; give each one side"
        )


def _check_text(path: Path, names: np.ndarray, array: str) -> None:
    codes = np.frombuffer(names.astype(names.dtype.newbyteorder("=")).tobytes(), dtype=np.uint32)
    if codes.max(initial=0) > sys.maxunicode:
        raise FileFormatError(f"{path}: {array} hold what is no text; write them again")


def _order(name: object) -> tuple[int, float, str]:
    """Numbers by size, then words."""
    text = str(name)
    return (0, float(text), text) if _is_number(text) and np.isfinite(float(text)) else (1, 0.0, text)


def _held_out(path: Path, labels: np.ndarray, classes: tuple[str, ...], seed: int) -> np.ndarray:
    """A fifth of each class, at least one row of it, drawn by seed; one row at least stays."""
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for k, name in enumerate(classes):
        members = np.flatnonzero(labels == k)
        if len(members) < 2:
            raise FileFormatError(
                f"{path}: class {name!r} has one row, none can be held out; give test_features and test_labels, "
                "or drop the class"
            )
        held[generator.permutation(members)[: max(1, round(TEST_SHARE * len(members)))]] = True
    return held


def _held_patients(
    path: Path, labels: np.ndarray, classes: tuple[str, ...], patients: np.ndarray, seed: int
) -> np.ndarray:
    """Whole patients in an order drawn by seed, for each class until a fifth of its rows are held."""
    names, member = np.unique(patients, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = np.zeros(len(names), dtype=bool)
    for k in range(len(classes)):
        own = np.bincount(member, weights=labels == k, minlength=len(names))[order]
        before = own.cumsum() - own
        chosen[order[(own > 0) & (before < TEST_SHARE * own.sum())]] = True
    held = chosen[member]
    for k, name in enumerate(classes):
        if held[labels == k].all():
            raise FileFormatError(
                f"{path}: class {name!r} has no row left once whole patients are held out; give test_features, "
                "test_labels and test_patients, drop the class, or try another --seed"
            )
    return held
