"""Many radiographs: records, where their pixels come from, and ``open_dataset``."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from bayescam.data.image import ImageError, read_image
from bayescam.data.pixels import Geometry, Pixels, letterboxed, load_pixels, save_pixels
from bayescam.data.workers import draw_in_processes
from bayescam.errors import BayescamError
from bayescam.notebook import html_table
from bayescam.storage import printable, sha256_of

Split = Literal["train", "valid", "test"]
_CACHE_VERSION = 3
_WORTH_PROCESSES = 300  # starting an interpreter costs as much as drawing some dozens of images
_CHUNK = 64  # images a thread takes at a time: a future for each would cost more than hashing it
_S = TypeVar("_S")
_T = TypeVar("_T")


class DataError(BayescamError, ValueError):
    """A data set that is absent, empty or not what it says; the message names the path and the next step."""


@dataclass(frozen=True)
class Radiograph:
    """One image of a data set.

    Args:
        obs_id: unique in the data set; for files the path below the root, with slashes.
        label: index into the classes.
        patient: whose it is, None where unknown.
        path: the file, None where the source draws it.
        study, view: of the patient.
        split: the official part, where there is one.
        masks: name -> mask file.
    """

    obs_id: str
    label: int
    patient: str | None = None
    path: Path | None = None
    study: str | None = None
    view: str | None = None
    split: Split | None = None
    masks: Mapping[str, Path] = field(default_factory=dict)


class Source(Protocol):
    """Where pixels come from: files, or a simulator that draws them on demand."""

    def image(self, record: Radiograph) -> np.ndarray:
        """float32 (H, W) in [0, 1]."""

    def masks(self, record: Radiograph) -> dict[str, np.ndarray]:
        """bool (H, W) each; empty where there are none."""

    def key(self, record: Radiograph) -> str:
        """A digest of what the image is: the same key, the same pixels."""

    def recipe(self) -> dict[str, Any] | None:
        """What a worker process makes this source from; None where only this process can."""


class FileSource:
    """Pixels from files through ``read_image``; a content hash is kept while the file's size and time stay."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int, int], str]] = {}

    def image(self, record: Radiograph) -> np.ndarray:
        return read_image(_path(record))

    def masks(self, record: Radiograph) -> dict[str, np.ndarray]:
        return {name: read_image(path) > 0.5 for name, path in record.masks.items()}

    def key(self, record: Radiograph) -> str:
        """SHA-256 of the file's content, read anew where its size, time or inode changed."""
        path = _path(record)
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise ImageError(path, "is not a regular file")
            state = (found.st_size, found.st_mtime_ns, found.st_ino)
            known = self._known.get(path)
            if known is None or known[0] != state:
                known = self._known[path] = (state, sha256_of(path))
            return known[1]
        except OSError as error:
            raise ImageError(path, error.strerror or str(error)) from error

    def recipe(self) -> dict[str, Any]:
        return {"files": True}


def _path(record: Radiograph) -> Path:
    if record.path is None:
        raise ValueError(f"{record.obs_id} has no file; its data set needs another source")
    return record.path


@dataclass(frozen=True, eq=False)
class RadiographDataset:
    """N radiographs with labels.

    Args:
        name: of the data set.
        classes: K names; a label is an index into them.
        records: N.
        root: the folder that obs_ids are relative to, None for the phantom.
        source: where pixels come from.
        licence: of the images, in words.
        shareable: whether pictures of them may be passed on.
        ignored: what was left out, and how many of each.
    """

    name: str
    classes: tuple[str, ...]
    records: tuple[Radiograph, ...]
    root: Path | None = None
    source: Source = field(default_factory=FileSource)
    licence: str = "the user's own"
    shareable: bool = True
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"RadiographDataset({self.name!r}, images={len(self)}, classes={list(self.classes)})"

    def _repr_html_(self) -> str:
        named = sorted({who for who in self.patients if who is not None})
        rows: list[tuple[str, object]] = [(name, int((self.labels == k).sum())) for k, name in enumerate(self.classes)]
        rows += [("all images", len(self)), ("patients", len(named) or "none named")]
        return html_table(f"Radiographs: {self.name}", rows, ("class", "images"))

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        return np.array([record.label for record in self.records], dtype=np.int64)

    @property
    def obs_ids(self) -> list[str]:
        return [record.obs_id for record in self.records]

    @property
    def patients(self) -> list[str | None]:
        return [record.patient for record in self.records]

    def image(self, index: int) -> np.ndarray:
        """float32 (H, W) in [0, 1]."""
        return self.source.image(self.records[index])

    def masks(self, index: int) -> dict[str, np.ndarray]:
        """The image's true masks by name, bool (H, W); empty where there are none."""
        return self.source.masks(self.records[index])

    def select(self, indices: Sequence[int] | np.ndarray) -> RadiographDataset:
        """The same data set with some of the images."""
        return replace(self, records=tuple(self.records[int(i)] for i in indices))

    @cached_property
    def keys(self) -> list[str]:
        """A digest of each image's content, (N,): the same key, the same pixels."""
        return in_threads(self.source.key, self.records, 0, None)

    def groups(self) -> list[str]:
        """What must stay on one side of a split: the patient, else equal content; (N,)."""
        if all(record.patient is not None for record in self.records):
            return [str(record.patient) for record in self.records]
        keys = self.keys
        return [
            f"content {key}" if record.patient is None else record.patient
            for record, key in zip(self.records, keys, strict=True)
        ]

    def unreadable(self, *, num_workers: int = 0, progress: bool = True) -> list[ImageError]:
        """Decode every file once and return the errors, in the data's order."""

        def attempt(record: Radiograph) -> ImageError | None:
            try:
                read_image(_path(record))
            except ImageError as error:
                return error
            return None

        files = [record for record in self.records if record.path is not None]
        found = in_threads(attempt, files, num_workers, "checking images" if progress else None)
        return [error for error in found if error is not None]

    def pixels(self, size: int, *, num_workers: int = 0, cache: Path | None = None, progress: bool = True) -> Pixels:
        """All images letterboxed to (S, S), from the cache where the same content was made before.

        Args:
            size: S.
            num_workers: processes that decode or draw, for data sets large enough to be worth it; 0 takes one a core.
            cache: folder of decoded images; None takes ``cache_folder()``.
            progress: show a bar.

        Raises:
            ImageError: the first unreadable image.
        """
        digest = hashlib.sha256(f"{_CACHE_VERSION} {size}".encode())
        for key in self.keys:
            digest.update(key.encode())
        folder = (cache_folder() if cache is None else cache) / "pixels" / digest.hexdigest()[:32]
        kept = load_pixels(folder, len(self), size)
        if kept is not None:
            return kept
        description = ("drawing images" if self.root is None else "reading images") if progress else None
        return save_pixels(folder, len(self), size, lambda images: self._fill(images, size, num_workers, description))

    def _fill(self, images: np.memmap, size: int, num_workers: int, description: str | None) -> list[Geometry]:
        """Decode or draw every image into its row, with all cores, and return the geometries."""
        recipe, workers = self.source.recipe(), num_workers or _cores()
        names = [record.obs_id if record.path is None else str(record.path) for record in self.records]
        if recipe is not None and workers > 1 and len(self) >= _WORTH_PROCESSES:
            return draw_in_processes(recipe, names, size, Path(str(images.filename)), workers, description)

        def fill(index: int) -> Geometry:
            square, geometry = letterboxed(self.image(index), size)
            images[index] = square
            return geometry

        return in_threads(fill, range(len(self)), 1, description)


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(work: Callable[[_S], _T], items: Sequence[_S], num_workers: int, description: str | None) -> list[_T]:
    """Map in order over threads, decoding and resizing release the interpreter's lock; the first error ends it all.

    Args:
        work: what to do with an item.
        items: N.
        num_workers: threads; 0 for one a core.
        description: of the bar; None for no bar.
    """
    workers = num_workers or _cores()
    length = max(1, min(_CHUNK, len(items) // (4 * workers)))
    results: list[_T] = []
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(items), desc=description, unit="image", disable=None if description else True) as bar,
    ):
        starts = range(0, len(items), length)
        jobs = [pool.submit(lambda i: [work(item) for item in items[i : i + length]], i) for i in starts]
        try:
            for job in jobs:
                results += job.result()
                bar.update(len(results) - bar.n)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def check_classes(classes: Sequence[str], place: Path) -> None:
    """Refuse class names that no classifier can be made of.

    Raises:
        DataError: none, only one, or two that differ by case alone.
    """
    if not classes:
        raise DataError(f"{place}: no images in it; bayescam data --help says what is read")
    if len(classes) == 1:
        raise DataError(f"{place}: only one class ({printable(classes[0])!r}); a classifier needs at least two")
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise DataError(
                f"{place}: classes {printable(other)!r} and {printable(name)!r} differ by case alone; rename one"
            )


def cache_folder() -> Path:
    """``$BAYESCAM_CACHE``, or ``bayescam`` in the platform's folder for a user's caches; safe to delete."""
    chosen = os.environ.get("BAYESCAM_CACHE")
    if chosen:
        return Path(chosen)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "bayescam"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bayescam"


def open_dataset(
    spec: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None, num: int | None = None, seed: int = 0
) -> RadiographDataset:
    """Open radiographs by name or place.

    Args:
        spec: "phantom" (simulated here), "mednist" or "mura" (at ``root``), a folder of class folders, or a
            manifest.csv (path,label[,patient][,study][,split]).
        root: where mednist or mura lies; for a manifest, what its paths are relative to (default: its own folder).
        num, seed: of the phantom alone: how many images, and which.

    Raises:
        DataError: absent, empty, fewer than two classes; the message names the path and the next step.
    """
    name = os.fspath(spec)
    if name == "phantom":
        from bayescam.data.phantom.dataset import phantom_dataset

        return phantom_dataset(3000 if num is None else num, seed)
    if name == "mednist":
        from bayescam.data.mednist import open_mednist

        return open_mednist(None if root is None else Path(root))
    if name == "mura":
        from bayescam.data.mura import open_mura

        return open_mura(None if root is None else Path(root))
    place = Path(name)
    if place.suffix.lower() == ".csv":
        from bayescam.data.manifest import open_manifest

        return open_manifest(place, root=None if root is None else Path(root))
    from bayescam.data.folder import open_folder

    return open_folder(place)
