"""Radiographs in: read, checked and split; the same on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayescam.backbone.network import check_name
from bayescam.config import Config, read_config
from bayescam.data.dataset import RadiographDataset
from bayescam.data.split import assert_disjoint, equal_across_parts, equal_of_several_labels, split_by_patient
from bayescam.doctor import environment, resolve_device
from bayescam.errors import BayescamError, UsageError
from bayescam.parallel import from_first, rank, size
from bayescam.runfolder import RunFolder, of_images, sealed
from bayescam.stages.state import RunState, warn
from bayescam.storage import printable, read_json, write_csv, write_text

_NAMED = 5  # of the images left out that are named on stderr


def check_device_and_name(config: Config) -> None:
    """Refuse what cannot work before anything is read."""
    resolve_device(config.device)
    try:
        check_name(config.backbone.name)
    except ValueError as error:
        raise UsageError(f"--backbone: {error}") from error


def read(state: RunState) -> None:
    """The same images on every rank: the first reads, checks and splits, the others leave out what it left out."""
    if state.leads:
        _read_and_split(state)
    found = from_first({"dropped": state.dropped, **_fingerprint(state.dataset)} if state.leads else None, state.group)
    if not state.leads:
        _drop(state, found.pop("dropped"))
        for field, value in _fingerprint(state.dataset).items():
            if found[field] != value:
                raise BayescamError(
                    f"rank {rank(state.group)}: data.{field} is {value!r}, and {found[field]!r} on rank 0; "
                    "let every rank see the same data"
                )


def reopen(path: Path, *, device: str | None = None) -> RunState:
    """A complete run to look at: its split, network and posteriors, and the very images that it saw.

    What the run left out (by ``data.limit``, or as unreadable) is left out again, so that image i of ``dataset`` is row
    i of ``split.csv``. Nothing is written.

    Args:
        path: the run folder.
        device: where its network computes; None takes the run's.

    Raises:
        BayescamError: not a complete run on images, a file that was changed, or data that are not what they were.
    """
    folder = sealed(of_images(path))
    state = RunState(RunFolder(folder), read_config(folder / "config.toml", {"device": device}), None)
    _read_again(state, "--run")
    return state


def _read_again(state: RunState, flag: str) -> None:
    """Open the data of a run whose ``data.json`` is there, and refuse others than it was made from."""
    _drop_unreadable_again(state)
    stored = read_json(state.folder / "data.json")
    for field, value in _fingerprint(state.dataset).items():
        if stored.get(field) != value:
            raise UsageError(
                f"{flag} {state.folder.path}: data.{field} was {stored.get(field)!r} and is now {value!r}; "
                "go on with the data it began with"
            )


def _read_and_split(state: RunState) -> None:
    """Read, check and split; ``split.csv``, ``data.json``, ``environment.json``."""
    config, folder = state.config, state.folder
    check_device_and_name(config)
    if folder.done("data"):
        _read_again(state, "--resume")
        return
    with folder.stage("data", ["split.csv", "data.json", "environment.json"]):
        bad = state.dataset.unreadable(num_workers=config.data.num_workers)
        if bad and config.data.on_bad == "raise":
            named = "; ".join(map(str, bad))
            raise BayescamError(f"{len(bad)} unreadable images: {named}; mend them or say --on-bad skip")
        skipped = [printable(f"{_relative(error.path, state.dataset.root)}: {error.reason}") for error in bad]
        _drop_unreadable(state, {error.path for error in bad})
        dataset = state.dataset
        split = split_by_patient(dataset, seed=config.seed, valid=config.data.valid, test=config.data.test)
        assert_disjoint(dataset, split)
        equal = equal_across_parts(dataset, split)
        if equal:
            names = " = ".join(f"{dataset.obs_ids[i]} ({split[i]})" for i in equal[0])
            warn(
                f"{len(equal)} images stand in several splits under different patients, first {names}; "
                "results are too good by them: give equal images one patient, or drop the copies"
            )
        disputed = equal_of_several_labels(dataset)
        if disputed:
            names = " = ".join(f"{dataset.obs_ids[i]} ({dataset.classes[dataset.labels[i]]})" for i in disputed[0])
            warn(
                f"equal images stand under several labels ({len(disputed)} times), first {names}; at most one is "
                "right: mend the labels, `bayescam data check` names all"
            )
        for reason in skipped[:_NAMED]:
            warn(f"left out: {reason}")
        if len(skipped) > _NAMED:
            warn(f"left out: {len(skipped) - _NAMED} more, named in data.json")
        header = ("obs_id", "path", "label", "patient", "split")
        write_csv(folder / "split.csv", header, _split_rows(dataset, state.patients, split))
        facts = {
            "name": printable(dataset.name),
            "licence": printable(dataset.licence, 2000),
            "shareable": dataset.shareable,
            "ignored": dict(dataset.ignored),
            "skipped": skipped,
            "equal_across_splits": [[printable(dataset.obs_ids[i]) for i in group] for group in equal],
            "equal_of_several_labels": [[printable(dataset.obs_ids[i]) for i in group] for group in disputed],
            "counts": {
                part: {
                    printable(name): int(((split == part) & (dataset.labels == k)).sum())
                    for k, name in enumerate(dataset.classes)
                }
                for part in ("train", "valid", "test")
            },
            **_fingerprint(dataset),
        }
        write_text(folder / "data.json", json.dumps(facts, indent=1))
        write_text(folder / "environment.json", json.dumps(environment(state.device, size(state.group)), indent=1))


def _drop_unreadable(state: RunState, paths: set[Any]) -> None:
    if paths:
        _drop(state, [i for i, record in enumerate(state.dataset.records) if record.path in paths])


def _drop(state: RunState, indices: Sequence[int]) -> None:
    state.dropped = list(indices)
    if indices:
        state.dataset = state.dataset.select(np.delete(np.arange(len(state.dataset)), indices))


def _drop_unreadable_again(state: RunState) -> None:
    if read_json(state.folder / "data.json").get("skipped"):
        bad = state.dataset.unreadable(num_workers=state.config.data.num_workers)
        _drop_unreadable(state, {error.path for error in bad})


def _fingerprint(dataset: RadiographDataset) -> dict[str, Any]:
    """What a resumed run must find as it was: classes, and every image's name, label, patient and content."""
    digest = hashlib.sha256()
    for record in dataset.records:
        key = dataset.source.key(record)
        digest.update(f"{record.obs_id}\0{record.label}\0{record.patient}\0{key}\n".encode(errors="surrogateescape"))
    return {
        "classes": [printable(name) for name in dataset.classes],
        "num_images": len(dataset),
        "records": digest.hexdigest(),
    }


def _split_rows(dataset: RadiographDataset, patients: list[str], split: np.ndarray) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for record, patient, part in zip(dataset.records, patients, split, strict=True):
        path = "" if record.path is None else _relative(record.path, dataset.root)
        rows.append(
            (
                printable(record.obs_id),
                printable(path),
                printable(dataset.classes[record.label]),
                patient,
                str(part),
            )
        )
    return rows


def _relative(path: Path, root: Path | None) -> str:
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return path.name
