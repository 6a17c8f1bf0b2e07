"""Decode a data set once and say what a run would stumble over."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bayescam.data.dataset import Radiograph, RadiographDataset, in_threads
from bayescam.data.image import ImageError
from bayescam.storage import printable

_SHOWN = 5
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


@dataclass(frozen=True)
class Checked:
    """What was found in a data set; images are named by their obs_id.

    Args:
        name: of the data set.
        counts: images of each class.
        patients: how many, 0 where they are unknown.
        unreadable: (image, reason) of what cannot be decoded, masks of another shape than their image among them.
        constant: images of one grey value.
        unfinished: PNG files that decode but end before their end mark.
        duplicates: images of equal pixels, in groups.
        duplicates_across_classes: those of them that stand under several labels.
        duplicates_across_patients: those of them that stand under several patients: no split keeps them together.
        duplicates_across_splits: those of them that stand in several official parts.
        several_labels: patients under more than one label.
        several_splits: patients, or contents where those are unknown, in more than one official part.
        ignored: files left out, and how many of each.
        sides: shortest and longest side in pixels.
    """

    name: str
    counts: dict[str, int]
    patients: int
    unreadable: list[tuple[str, str]]
    constant: list[str]
    unfinished: list[str]
    duplicates: list[list[str]]
    duplicates_across_classes: list[list[str]]
    duplicates_across_patients: list[list[str]]
    duplicates_across_splits: list[list[str]]
    several_labels: list[str]
    several_splits: list[str]
    ignored: dict[str, int]
    sides: tuple[int, int]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def text(self) -> str:
        """A page for a terminal."""
        width = max(len(printable(name)) for name in self.counts)
        lines = [
            f"{printable(self.name)}: {sum(self.counts.values())} images, sides {self.sides[0]} to {self.sides[1]}"
        ]
        lines += [f"  {printable(name):<{width}}  {count:>7}" for name, count in self.counts.items()]
        lines.append(f"patients: {self.patients or 'unknown; images of equal content stay together in a split'}")
        lines += _section("unreadable", [f"{name}: {reason}" for name, reason in self.unreadable])
        lines += _section("of one grey value", self.constant)
        lines += _section("cut at their very end, yet readable", self.unfinished)
        copies = sum(map(len, self.duplicates)) - len(self.duplicates)
        lines += _section(f"groups of equal pixels ({copies} copies)", [" = ".join(g) for g in self.duplicates])
        lines += _section(
            "groups of equal pixels under several labels", map(" = ".join, self.duplicates_across_classes)
        )
        lines += _section(
            "groups of equal pixels under several patients (a split may tear them apart: results would be too good)",
            map(" = ".join, self.duplicates_across_patients),
        )
        lines += _section(
            "groups of equal pixels in several official splits (results would be too good)",
            map(" = ".join, self.duplicates_across_splits),
        )
        lines += _section("patients under several labels (kept on one side of the split)", self.several_labels)
        lines += _section("patients in several official splits", self.several_splits)
        lines += [f"left out: {count} {what}" for what, count in self.ignored.items()]
        return "\n".join(lines)


def check_dataset(dataset: RadiographDataset, *, num_workers: int = 0, progress: bool = True) -> Checked:
    """Read every image and mask of ``dataset`` once, over all cores, and count.

    Args:
        dataset: N radiographs.
        num_workers: threads; 0 for one a core.
        progress: show a bar.
    """
    seen = in_threads(partial(_look, dataset), range(len(dataset)), num_workers, "checking" if progress else None)
    records = dataset.records
    named = list(zip(records, seen, strict=True))
    equal: dict[str, list[Radiograph]] = defaultdict(list)
    for record, look in named:
        if look.digest:
            equal[look.digest].append(record)
    groups = [group for group in equal.values() if len(group) > 1]

    def across(field: str) -> list[list[str]]:
        return [
            [record.obs_id for record in group]
            for group in groups
            if len({getattr(record, field) for record in group} - {None}) > 1
        ]

    labels, parts = defaultdict(set), defaultdict(set)
    for record, look in named:
        if record.patient is not None:
            labels[record.patient].add(record.label)
        parts[record.patient or f"content of {equal[look.digest][0].obs_id}" if look.digest else record.obs_id].add(
            record.split
        )
    sides = [side for look in seen for side in look.shape]
    counts = Counter(record.label for record in records)
    return Checked(
        name=dataset.name,
        counts={name: counts[k] for k, name in enumerate(dataset.classes)},
        patients=len(labels),
        unreadable=[(record.obs_id, look.reason) for record, look in named if look.reason],
        constant=[record.obs_id for record, look in named if look.constant],
        unfinished=[record.obs_id for record, look in named if look.unfinished],
        duplicates=[[record.obs_id for record in group] for group in groups],
        duplicates_across_classes=across("label"),
        duplicates_across_patients=across("patient"),
        duplicates_across_splits=across("split"),
        several_labels=sorted(patient for patient, found in labels.items() if len(found) > 1),
        several_splits=sorted(who for who, found in parts.items() if len(found) > 1),
        ignored=dict(dataset.ignored),
        sides=(min(sides, default=0), max(sides, default=0)),
    )


@dataclass(frozen=True)
class _Look:
    reason: str = ""
    digest: str = ""
    constant: bool = False
    unfinished: bool = False
    shape: tuple[int, ...] = ()


def _look(dataset: RadiographDataset, index: int) -> _Look:
    record = dataset.records[index]
    try:
        image = dataset.image(index)
        for name, mask in dataset.masks(index).items() if record.masks else ():
            if mask.shape != image.shape:
                return _Look(reason=f"mask {name!r} is {mask.shape}, the image {image.shape}")
    except ImageError as error:
        return _Look(reason=error.reason)
    digest = hashlib.sha256(np.array(image.shape).tobytes() + image.tobytes()).hexdigest()
    unfinished = record.path is not None and _cut(record.path)
    return _Look("", digest, bool(image.min() == image.max()), unfinished, image.shape)


def _cut(path: Path) -> bool:
    """Whether a PNG lacks its end mark, which the decoder never looks for."""
    with path.open("rb") as stream:
        if stream.read(8) != _PNG:
            return False
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 4096))
        return _PNG_END not in stream.read()


def _section(title: str, items: object) -> list[str]:
    found = list(items)  # type: ignore[call-overload]
    if not found:
        return []
    more = [f"  and {len(found) - _SHOWN} more (--json shows all)"] if len(found) > _SHOWN else []
    return [f"{len(found)} {title}:", *(f"  {printable(item, 400)}" for item in found[:_SHOWN]), *more]
