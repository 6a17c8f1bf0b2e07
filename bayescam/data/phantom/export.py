"""Write the phantom to disk, as a folder of classes with a manifest or laid out like MURA v1.1."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from bayescam.data.dataset import DataError
from bayescam.data.phantom.patient import draw_patient
from bayescam.data.phantom.roster import Case, Dials, exam_of, roster
from bayescam.data.phantom.simulate import Simulated, simulate
from bayescam.storage import write_bytes, write_csv, write_text

Layout = Literal["folder", "mura"]
MASKS = ("bone", "joint", "soft_tissue", "evidence", "marker", "hardware", "cast", "collimation")
HEADER = ("path", "label", "patient", "study", "view", "split", *(f"mask_{name}" for name in MASKS))
VALID_EVERY = 5  # in the MURA layout each fifth patient is in the official valid set


def export(
    out: Path, num: int, seed: int, layout: Layout = "folder", dials: Dials | None = None, *, progress: bool = True
) -> Path:
    """Write ``num`` simulated radiographs below ``out`` and return the manifest.

    Layout folder: ``<class>/<number>.png``. Layout mura: ``MURA-v1.1/{train,valid}/XR_<CLASS>/patient<p>/
    study<s>_{positive,negative}/image<m>.png`` with its four CSV files; a study with hardware or a cast is positive.
    Both have those masks that are not empty below ``masks/``, and ``manifest.csv`` (path, label, patient, study, view,
    split, mask_<name>...) with paths relative to itself; the folder layout has no official split, MURA's valid set is
    the test set.

    Raises:
        DataError: ``out`` exists and is not an empty folder.
        ValueError: an unknown layout, or num or seed out of range.
    """
    if layout not in ("folder", "mura"):
        raise ValueError(f"layout is {layout!r}; give 'folder' or 'mura'")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out}: exists and is not an empty folder; give a new one")
    dials = dials or Dials()
    drawn = simulate(num, seed, dials)
    rows: list[list[str]] = []
    places = _folder_places if layout == "folder" else _mura_places
    positive = _positive_studies(num, seed, dials) if layout == "mura" else set()
    counts: dict[str, int] = {}
    for one in tqdm(drawn, total=num, unit="image", desc="phantom", disable=None if progress else True):
        path, split = places(one.case, positive, counts)
        write_bytes(out / path, _png(one.image, dials.bits))
        rows.append([path, one.case.part, f"{one.case.patient:05d}", f"study{one.case.study}", one.case.view, split])
        rows[-1] += [_write_mask(out, path, name, one) for name in MASKS]
    if layout == "mura":
        _write_mura_tables(out, [row[0] for row in rows])
    write_csv(out / "manifest.csv", HEADER, rows)
    return out / "manifest.csv"


def _folder_places(case: Case, positive: set[tuple[int, int]], counts: dict[str, int]) -> tuple[str, str]:
    del positive, counts
    return f"{case.part}/{case.index:06d}.png", ""


def _mura_places(case: Case, positive: set[tuple[int, int]], counts: dict[str, int]) -> tuple[str, str]:
    split = "valid" if case.patient % VALID_EVERY == VALID_EVERY - 1 else "train"
    verdict = "positive" if (case.patient, case.study) in positive else "negative"
    study = f"MURA-v1.1/{split}/XR_{case.part.upper()}/patient{case.patient + 1:05d}/study{case.study}_{verdict}"
    counts[study] = counts.get(study, 0) + 1
    return f"{study}/image{counts[study]}.png", {"train": "train", "valid": "test"}[split]


def _positive_studies(num: int, seed: int, dials: Dials) -> set[tuple[int, int]]:
    exams = ((case, exam_of(case, draw_patient(seed, case.patient), seed, dials)) for case in roster(num, seed, dials))
    return {(case.patient, case.study) for case, exam in exams if exam.hardware or exam.cast}


def _write_mask(out: Path, path: str, name: str, one: Simulated) -> str:
    mask = one.masks[name]
    if not mask.any():
        return ""
    place = f"masks/{name}/{path}"
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, format="PNG")
    write_bytes(out / place, stream.getvalue())
    return place


def _png(image: NDArray[np.float32], bits: int) -> bytes:
    levels = np.rint(image * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, format="PNG")
    return stream.getvalue()


def _write_mura_tables(out: Path, places: list[str]) -> None:
    for split in ("train", "valid"):
        paths = [path for path in places if path.startswith(f"MURA-v1.1/{split}/")]
        studies = dict.fromkeys(path.rsplit("/", 1)[0] + "/" for path in paths)
        labelled = [f"{study},{int(study.endswith('positive/'))}" for study in studies]
        write_text(out / f"MURA-v1.1/{split}_image_paths.csv", "".join(f"{path}\n" for path in paths))
        write_text(out / f"MURA-v1.1/{split}_labeled_studies.csv", "".join(f"{line}\n" for line in labelled))
