"""Train, valid and test: by patient, by a hash, so that a patient stays where it was when the data grow."""

from __future__ import annotations

import hashlib

import numpy as np

from bayescam.data.dataset import RadiographDataset
from bayescam.errors import BayescamError

PARTS = ("train", "valid", "test")


class SplitError(BayescamError, ValueError):
    """The data cannot be split as asked, or a patient stands on both sides."""


def split_by_patient(dataset: RadiographDataset, *, seed: int, valid: float = 0.15, test: float = 0.2) -> np.ndarray:
    """A part for each image: "train", "valid" or "test", (N,).

    u = hash(seed, patient) / 2^64 is uniform on [0, 1): test where u < test, valid where u < test + valid, else train.
    An official split of the data is honoured; where it has no valid part, hash(seed, patient) < valid takes one out of
    its train part. Without patients, images of equal content stay together.

    Raises:
        SplitError: a class is left without training or test images; the message says the way out.
    """
    groups = dataset.groups()
    u = np.array([_uniform(seed, group) for group in groups])
    official = np.array([record.split or "" for record in dataset.records])
    if (official == "").all():
        parts = np.where(u < test, "test", np.where(u < test + valid, "valid", "train"))
    else:
        if (official == "").any():
            raise SplitError(f"{dataset.name}: some images have an official split and some have none; give all or none")
        parts = official.copy()
        if not (parts == "valid").any():
            parts[(parts == "train") & (u < valid)] = "valid"
        if not (parts == "test").any():
            raise SplitError(f"{dataset.name}: the official split has no test part; leave the split column out")
    _check_classes(dataset, parts, official=bool((official != "").any()))
    assert_disjoint(dataset, parts)
    return parts


def assert_disjoint(dataset: RadiographDataset, parts: np.ndarray) -> None:
    """No patient, and where there are none no content, in two parts.

    Raises:
        SplitError: naming the first that is.
    """
    seen: dict[str, str] = {}
    for group, part, record in zip(dataset.groups(), parts, dataset.records, strict=True):
        if seen.setdefault(group, str(part)) != part:
            what = "patient" if record.patient is not None else "the content"
            raise SplitError(
                f"{what} of {record.obs_id} is in both {seen[group]} and {part}: results would be too good; "
                "give each patient one part"
            )


def equal_across_parts(dataset: RadiographDataset, parts: np.ndarray) -> list[list[int]]:
    """Images of equal content in different parts, in groups of indices: the same picture under several patients.

    ``assert_disjoint`` lets them pass, since what is told of patients goes before; results are too good by them.
    """
    return [group for group in _equal(dataset) if len({str(parts[i]) for i in group}) > 1]


def equal_of_several_labels(dataset: RadiographDataset) -> list[list[int]]:
    """Images of equal content under different labels, in groups of indices: at most one of the labels is right."""
    return [group for group in _equal(dataset) if len({int(dataset.labels[i]) for i in group}) > 1]


def _equal(dataset: RadiographDataset) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(dataset.keys):
        groups.setdefault(key, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _uniform(seed: int, group: str) -> float:
    digest = hashlib.sha256(f"bayescam split {seed} {group}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _check_classes(dataset: RadiographDataset, parts: np.ndarray, *, official: bool) -> None:
    for k, name in enumerate(dataset.classes):
        for part in ("train", "test"):
            if not ((dataset.labels == k) & (parts == part)).any():
                count = int((dataset.labels == k).sum())
                way = "add patients of it, raise --limit, leave the class out, or try another --seed"
                way = "mend its split" if official else way
                raise SplitError(f"class {name!r} ({count} images) is left without a {part} image; {way}")
