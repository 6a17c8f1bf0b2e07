"""The run folder: one lock, stages that are whole or absent, and ``run.json`` as the mark of completion."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bayescam.config import Config, read_config, to_toml
from bayescam.errors import BayescamError, FileFormatError, UsageError
from bayescam.storage import is_file, is_partial, printable, read_json, sha256_of, write_text

_LOCK = ".lock"
_STAGES = ".stages.json"
_SCRATCH = ".scratch"
_MARKS = (_LOCK, _STAGES, "run.json")  # one of them beside config.toml says that the folder is a run
WRITTEN = frozenset(
    """config.toml environment.json split.csv data.json backbone.safetensors history.csv features.safetensors posterior
    predictions.nc metrics.json table.md comparison.json cams.nc seeds.json timings.json figures report.html
    MODEL_CARD.md run.json
    """.split()
) | {_LOCK, _STAGES, _SCRATCH}  # all that a run puts into its folder, and all that --overwrite may remove

_REMADE = ("report.html", "MODEL_CARD.md", "figures/")  # what bayescam report writes anew


class AlreadyComplete(Exception):
    """``--resume`` met a run that is complete and unchanged: nothing is left to do."""


class RunFolder:
    """A folder that one process writes, stage by stage.

    A stage is done when every file it listed is there with the checksum it had; so a run that was killed anywhere goes
    on from its last whole stage, and a file that was changed by hand is noticed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stages: dict[str, dict[str, Any]] = {}
        if (path / _STAGES).is_file():
            self._stages = _read_stages(path / _STAGES)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def scratch(self) -> Path:
        """A folder for what a stage keeps in case it is interrupted; gone when the run is complete."""
        return self.path / _SCRATCH

    @property
    def timings(self) -> dict[str, dict[str, float]]:
        """Seconds of each finished stage, and the highest memory of the process up to its end in MiB."""
        return {
            name: {"seconds": stage["seconds"], "peak_memory_mib": stage["peak_memory_mib"]}
            for name, stage in self._stages.items()
        }

    def done(self, stage: str) -> bool:
        """Whether the stage's files are all there, unchanged."""
        files = self._stages.get(stage, {}).get("files")
        if files is None:
            return False
        for name, digest in files.items():
            if not (self / name).is_file():
                return False
            if sha256_of(self / name) != digest:
                raise BayescamError(f"{self / name}: changed since the run wrote it; restore it or start another run")
        return True

    @contextmanager
    def stage(self, name: str, files: Sequence[str]) -> Iterator[None]:
        """Do the stage's work inside; on leaving without an error its files are recorded."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self._stages[name] = {
            "seconds": round(seconds, 3),
            "peak_memory_mib": _peak_memory_mib(),
            "files": {file: sha256_of(self / file) for file in files},
        }
        write_text(self / _STAGES, json.dumps(self._stages, indent=1))

    def complete(self, facts: dict[str, Any]) -> None:
        """Write ``run.json`` last: the checksum of every file, and that the run is complete."""
        if self.scratch.is_dir():
            shutil.rmtree(self.scratch)
        files = {
            path.relative_to(self.path).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        }
        files.pop("run.json", None)
        write_text(self / "run.json", json.dumps({"status": "complete", **facts, "files": files}, indent=1))


@contextmanager
def opened(
    path: Path, config_file: Path | None, overrides: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[tuple[RunFolder, Config]]:
    """The folder of a run, locked by this process, with the run's configuration in ``config.toml``.

    Raises:
        UsageError: the folder is a file, lies among the images or in another run, holds something finished already, or
            (on resume) another configuration.
        BayescamError: another process runs in it, it cannot be written, or (on resume) a file of a complete run is not
            what it was.
        AlreadyComplete: on resume, when ``run.json`` says complete and every file is as it lists it.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path}: is a file; name a folder")
    if not _is_utf8(path):
        raise UsageError(f"--out {path}: not UTF-8, which safetensors cannot open; name another folder")
    held = sorted(p.name for p in path.iterdir() if p.name != _LOCK and not is_partial(p)) if path.is_dir() else []
    ours = (path / "config.toml").is_file() and any((path / name).is_file() for name in _MARKS)
    if held and not ours:
        raise UsageError(f"--out {path}: the folder is not empty and not a run ({printable(held[0])}); name another")
    if held not in ([], ["config.toml"]) and not resume and not overwrite:
        raise UsageError(f"--out {path}: the folder is not empty; name another, or say --resume or --overwrite")
    if overwrite and held:
        _refuse_other_program(path)
        refuse_foreign(path, held, WRITTEN)
    config = _config(path, config_file, overrides, resume=resume and ours)
    _refuse_inside(path, config)
    with locked(path):
        if resume and (path / "run.json").is_file():
            verified(path, *recorded(path))
            raise AlreadyComplete
        if overwrite and not resume:
            clear(path, last="config.toml")
        sweep(path)
        if not ours or not resume:
            write_text(path / "config.toml", to_toml(config))
        yield RunFolder(path), config


def _refuse_inside(path: Path, config: Config) -> None:
    """Refuse a run folder among the images, where its figures would be images, or in another run folder."""
    out, data = Path(os.path.realpath(path)), Path(config.data.spec)  # Path.resolve raises where links go round
    if (data.is_dir() and not (data / "manifest.csv").is_file()) and out.is_relative_to(os.path.realpath(data)):
        raise UsageError(f"--out {path}: lies among the images of --data {data}; name a folder outside")
    for parent in out.parents:
        if is_file(parent / _STAGES):
            raise UsageError(f"--out {path}: lies in the run folder {parent}; name a folder outside")


def _refuse_other_program(path: Path) -> None:
    """Refuse to empty a folder whose ``config.toml`` no run wrote; other programs have files of that name too."""
    try:
        read_config(path / "config.toml", {})
    except UsageError as error:
        raise UsageError(
            f"--out {path}: its config.toml is not that of a run ({error}); name another, or remove the folder yourself"
        ) from error


def refuse_foreign(path: Path, held: Sequence[str], written: Collection[str]) -> None:
    """Refuse to empty a folder in which something stands that no run writes.

    Raises:
        UsageError: naming it.
    """
    foreign = [name for name in held if name not in written]
    if foreign:
        raise UsageError(
            f"--out {path}: holds {printable(foreign[0])}, which no run wrote and would be removed; move it away"
        )


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path.absolute()).encode("utf-8"))
    except UnicodeEncodeError:
        return False


def _config(path: Path, config_file: Path | None, overrides: dict[str, Any], *, resume: bool) -> Config:
    if not resume:
        return read_config(config_file, overrides)
    stored = read_config(path / "config.toml", {})
    asked = read_config(config_file or path / "config.toml", overrides)
    for name, was, now in _differences(asdict(stored), asdict(asked)):
        raise UsageError(
            f"--resume {path}: {name} was {was!r} and is now {now!r}; resume with what it was, or start anew"
        )
    return stored


def _differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in was.items():
        if isinstance(value, dict):
            yield from _differences(value, now[key], f"{prefix}{key}.")
        elif value != now[key]:
            yield f"{prefix}{key}", value, now[key]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """An advisory lock on a folder that the operating system drops with the process, however it ends.

    Raises:
        BayescamError: another process holds it, or the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise BayescamError(f"--out {path}: cannot be written ({error.strerror}); name a folder that can") from error
    try:
        _take(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    if os.name != "posix":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BayescamError(f"--out {path}: another run is working in this folder; wait for it") from error
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BayescamError(f"--out {path}: another run is working in this folder; wait for it") from error


def _peak_memory_mib() -> float:
    if os.name != "posix":
        return float("nan")
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def clear(path: Path, *, last: str) -> None:
    """Empty the folder, run.json first and the settings last: a kill in between leaves an unfinished run."""
    entries = sorted(path.iterdir(), key=lambda entry: (entry.name != "run.json", entry.name == last))
    for entry in entries:
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sweep(path: Path) -> None:
    """Remove the temporaries of a process that was killed."""
    for leftover in [entry for entry in path.rglob(".*") if is_partial(entry)]:
        leftover.unlink()


def read_split(path: Path) -> tuple[list[str], list[str]]:
    """Each image's split, and whose it is (itself, where no patient is named), from ``split.csv`` of a run."""
    with (path / "split.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row["split"] for row in rows], [row["patient"] or row["obs_id"] for row in rows]


def _read_stages(path: Path) -> dict[str, dict[str, Any]]:
    stages = read_json(path)
    for name, stage in stages.items():
        if not (
            isinstance(stage, dict)
            and all(isinstance(stage.get(key), int | float) for key in ("seconds", "peak_memory_mib"))
            and isinstance(stage.get("files"), dict)
        ):
            raise FileFormatError(
                f"{path}: the record of stage {name!r} is broken; start the run anew with --overwrite"
            )
    return stages


def verified(path: Path, *names: str) -> Path:
    """A complete run folder whose named files still have the checksums of ``run.json``.

    Raises:
        BayescamError: no such folder, an unfinished run, or a file that was changed or lost.
    """
    if not (path / "run.json").is_file():
        what = "is not finished: resume it first" if (path / "config.toml").is_file() else "is not a run folder"
        raise BayescamError(f"--run {path}: {what}")
    files = read_json(path / "run.json").get("files")
    for name in names:
        record = files.get(name) if isinstance(files, dict) else None
        way = "bayescam report writes it again" if name.startswith(_REMADE) else "restore it or run again"
        if not isinstance(record, dict) or not is_file(path / name):
            raise BayescamError(f"{printable(str(path / name))}: missing; {way}")
        if sha256_of(path / name) != record.get("sha256"):
            raise BayescamError(f"{printable(str(path / name))}: changed since the run wrote it; {way}")
    return path


def sealed(path: Path) -> Path:
    """A complete run folder whose files are all as ``run.json`` lists them, but for what ``report`` makes anew.

    Raises:
        BayescamError: as ``verified``.
    """
    return verified(path, *(name for name in recorded(path) if not name.startswith(_REMADE)))


def of_images(path: Path) -> Path:
    """A complete run folder of ``bayescam run``; one of ``bayescam posterior`` has neither network nor images.

    Raises:
        BayescamError: as ``verified``, or it is a run on features.
    """
    if "config.toml" not in recorded(path) and is_file(path / "settings.json"):
        raise BayescamError(f"--run {path}: is a run on features, without images; give the folder of a bayescam run")
    return path


def recorded(path: Path) -> list[str]:
    """The files that ``run.json`` lists."""
    files = read_json(verified(path) / "run.json").get("files")
    if not isinstance(files, dict) or not files:
        raise FileFormatError(f"{path / 'run.json'}: lists no files of a run; restore it or run again")
    return list(files)
