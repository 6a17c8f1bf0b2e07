"""What the stages of a run share."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bayescam.backbone.network import Backbone, Features
from bayescam.config import Config
from bayescam.data.dataset import RadiographDataset, open_dataset
from bayescam.data.pixels import Pixels
from bayescam.data.pseudonyms import pseudonyms
from bayescam.doctor import resolve_device
from bayescam.errors import FileFormatError, UsageError
from bayescam.parallel import after_first, from_first, rank, share
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import Laplace, load_laplace
from bayescam.posterior.nuts import Nuts
from bayescam.runfolder import RunFolder, read_split
from bayescam.storage import load_tensors, printable, read_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GAUSSIANS = {
    "laplace_diag": "posterior/laplace_diag.safetensors",
    "laplace_kron": "posterior/laplace_kron.safetensors",
    "laplace_full": "posterior/laplace.safetensors",
    "laplace_refined": "posterior/refined.safetensors",
}
POSTERIORS = {**GAUSSIANS, "nuts": "posterior/nuts.safetensors"}
INTERVAL_LEVEL = 0.9  # of every bootstrap interval that a run writes
METHODS = ("cnn", "map", "map_temperature", *POSTERIORS)


def chosen_posterior(folder: Path) -> tuple[str, str]:
    """The posterior that the verdict lets speak for new images: (method, file in the run folder).

    Raises:
        FileFormatError: ``comparison.json`` holds no verdict.
    """
    from bayescam.diagnose.compare import SPEAKERS

    file = folder / "comparison.json"
    verdict = str(read_json(file).get("verdict"))
    if verdict not in SPEAKERS:
        raise FileFormatError(f"{file}: verdict is {verdict!r}, not one of {', '.join(SPEAKERS)}; run again")
    return SPEAKERS[verdict], POSTERIORS[SPEAKERS[verdict]]


def load_posterior(folder: Path, method: str) -> Laplace | Draws:
    """The posterior of a run by its method's name: a Gaussian, or NUTS's draws."""
    file = folder / POSTERIORS[method]
    return Nuts.load(file).draws if method == "nuts" else load_laplace(file)


def warn(words: str) -> None:
    """One line on stderr."""
    print(f"bayescam: warning: {printable(words, 2000)}", file=sys.stderr)


@dataclass
class RunState:
    """What the stages share: the folder, the settings, the ranks, and the inputs that are not files of the run."""

    folder: RunFolder
    config: Config
    group: ProcessGroup | None
    dropped: list[int] = field(default_factory=list)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return rank(self.group) == 0

    def done(self, stage: str) -> bool:
        """Whether the stage's files are all there: rank 0 looks, and the others go by its word."""
        return bool(from_first(self.leads and self.folder.done(stage), self.group))

    def stage(self, name: str, files: Sequence[str]) -> AbstractContextManager[None]:
        """``RunFolder.stage`` on rank 0, nothing on the others."""
        return self.folder.stage(name, files) if self.leads else nullcontext()

    @cached_property
    def device(self) -> str:
        return resolve_device(self.config.device)

    @cached_property
    def dataset(self) -> RadiographDataset:
        return _open(self.config)

    @cached_property
    def split(self) -> np.ndarray:
        return np.array(read_split(self.folder.path)[0])

    @cached_property
    def patients(self) -> list[str]:
        """Each image's patient as the run's files name it, "" where it is unknown."""
        if not self.config.data.show_patients:
            return pseudonyms(self.dataset)
        return ["" if patient is None else printable(patient) for patient in self.dataset.patients]

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.split == split)

    @property
    def resampled(self) -> str:
        """What the bootstrap draws: "patients", or "images" where the data name no patient."""
        return "patients" if any(self.patients) else "images"

    @property
    def test_patients(self) -> np.ndarray:
        """Whose each test image is; itself, where no patient is named."""
        patients, ids = self.patients, self.dataset.obs_ids
        return np.array([patients[i] or ids[i] for i in self.rows("test")])

    @cached_property
    def backbone(self) -> Backbone:
        return Backbone.load(self.folder / "backbone.safetensors")[0].to(self.device)

    @cached_property
    def image_size(self) -> int:
        return self.new_backbone().image_size

    def new_backbone(self, seed: int | None = None) -> Backbone:
        """The network before training, drawn from ``seed`` (the run's, unless another is given)."""
        settings = self.config.backbone
        torch.manual_seed(self.config.seed if seed is None else seed)
        try:
            return Backbone(
                settings.name,
                len(self.dataset.classes),
                settings.weights,
                image_size=self.config.data.image_size,
            )
        except ValueError as error:
            raise UsageError(f"--backbone {settings.name}: {error}") from error

    @cached_property
    def pixels(self) -> Pixels:
        size, workers = self.image_size, self.config.data.num_workers
        return after_first(lambda: self.dataset.pixels(size, num_workers=workers, progress=self.leads), self.group)

    @cached_property
    def features(self) -> Features:
        tensors, metadata = load_tensors(self.folder / "features.safetensors", kind="features")
        return Features(tensors["features"], tensors["labels"], tuple(metadata["ids"]))

    def part(self, split: str) -> Features:
        return self.features.select(self.rows(split))

    def own_training(self) -> Features:
        """This rank's share of the training split."""
        rows = self.rows("train")
        return self.features.select(rows[share(len(rows), self.group)])

    @cached_property
    def gaussians(self) -> dict[str, Laplace]:
        return {name: load_laplace(self.folder / file).to(self.device) for name, file in GAUSSIANS.items()}

    @cached_property
    def nuts(self) -> Nuts:
        return Nuts.load(self.folder / POSTERIORS["nuts"]).to(self.device)


def _open(config: Config) -> RadiographDataset:
    settings = config.data
    dataset = open_dataset(settings.spec, root=settings.root, num=settings.phantom_images, seed=config.seed)
    return dataset if settings.limit is None else _limited(dataset, settings.limit, config.seed)


def _limited(dataset: RadiographDataset, limit: int, seed: int) -> RadiographDataset:
    """About ``limit`` images: whole patients, in an order that a hash of (seed, patient) decides."""
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(dataset.records):
        groups.setdefault(record.patient or record.obs_id, []).append(i)
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest())
    kept: list[int] = []
    for name in order:
        if len(kept) + len(groups[name]) <= limit:
            kept += groups[name]
    if not kept:
        raise UsageError(f"--limit {limit}: smaller than every patient's number of images; raise it")
    return dataset.select(sorted(kept))
