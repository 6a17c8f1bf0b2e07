"""What a complete run keeps of its images: the last layer's inputs."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from bayescam.errors import BayescamError
from bayescam.runfolder import of_images, verified
from bayescam.storage import load_tensors, printable


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a run's images.

    Args:
        features: (N, D).
        labels: (N,).
        patients: (N,) whose each is; itself, where no patient is named.
    """

    features: Tensor
    labels: Tensor
    patients: np.ndarray


def of_run(run: Path) -> dict[str, Part]:
    """The parts "train", "valid" and "test" of a complete run.

    Raises:
        BayescamError: not a complete run, a file that was changed, or features of other images than split.csv names.
    """
    verified(of_images(run), "features.safetensors", "split.csv")
    tensors, metadata = load_tensors(run / "features.safetensors", kind="features")
    with (run / "split.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if [printable(name) for name in metadata["ids"]] != [row["obs_id"] for row in rows]:
        raise BayescamError(f"--run {run}: its features are not of the images in its split.csv; run again")
    split = np.array([row["split"] for row in rows])
    patients = np.array([row["patient"] or row["obs_id"] for row in rows])
    return {
        part: Part(tensors["features"][split == part], tensors["labels"][split == part], patients[split == part])
        for part in ("train", "valid", "test")
    }
