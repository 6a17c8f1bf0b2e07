"""The stages of a run, in order. Each stage writes files; the next reads them, so a resumed run is the straight run."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bayescam import __version__
from bayescam.backbone.network import Backbone, Features, check_name
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.config import Config, read_config
from bayescam.data.dataset import RadiographDataset, open_dataset
from bayescam.data.pixels import Pixels
from bayescam.data.pseudonyms import pseudonyms
from bayescam.data.split import assert_disjoint, equal_across_parts, split_by_patient
from bayescam.doctor import environment, resolve_device
from bayescam.errors import BayescamError, UsageError
from bayescam.parallel import after_first, from_first, joined, rank, rows_on_first, share
from bayescam.posterior.laplace import Laplace, fit_laplace, load_laplace
from bayescam.posterior.nuts import Nuts
from bayescam.posterior.predictive import predict_proba
from bayescam.posterior.temperature import fit_temperature
from bayescam.runfolder import AlreadyComplete, RunFolder, opened, sealed
from bayescam.storage import load_netcdf, load_tensors, printable, read_json, save_tensors, write_csv, write_text

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GAUSSIANS = {
    "laplace_diag": "posterior/laplace_diag.safetensors",
    "laplace_kron": "posterior/laplace_kron.safetensors",
    "laplace_full": "posterior/laplace.safetensors",
    "laplace_refined": "posterior/refined.safetensors",
}
_COMPARED_MAPS = 32
_MARKED = 100  # test images of which the report says whether the model looks at the marker
METHODS = ("cnn", "map", "map_temperature", *GAUSSIANS, "nuts")


def default_out(spec: str) -> Path:
    """``runs/<data>-<date>-<time>``."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(spec).stem)[:40].strip("-.") or "data"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def run(
    out: Path,
    config_file: Path | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> str:
    """All stages from radiographs to report in the folder ``out``; returns what to tell the user.

    Under ``torchrun`` every rank calls this: rank 0 leads and alone writes, the others work beside it through the heavy
    stages and read what it wrote, so the folder must be on a disk that all of them see; they return "".

    Raises:
        UsageError: a setting or the folder is not usable; nothing was begun.
        BayescamError: a stage cannot be done; what was finished stays and ``resume`` goes on from it.
    """
    with joined() as group:
        if rank(group) > 0:
            _follow(group)
            return ""
        try:
            with opened(out, config_file, overrides or {}, resume=resume, overwrite=overwrite) as (folder, config):
                from_first(str(out.absolute()), group)
                state = _Run(folder, config, group)
                for stage in SHARED:
                    stage(state)
                state.group = None
                for stage in (_predict, _compare, _cams, _arviz, _pictures):
                    stage(state)
                folder.complete({"bayescam": __version__, "seed": config.seed, "preset": config.preset})
                return _farewell(out)
        except AlreadyComplete:
            from_first(None, group)
            return f"{out}: this run is complete; nothing to do"


def _follow(group: ProcessGroup | None) -> None:
    """What every rank but the first does of a run."""
    out = from_first(None, group)
    if out is not None:
        state = _Run(RunFolder(Path(out)), read_config(Path(out) / "config.toml", {}), group)
        for stage in SHARED:
            stage(state)


@dataclass
class _Run:
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
        with (self.folder / "split.csv").open(encoding="utf-8", newline="") as stream:
            return np.array([row["split"] for row in csv.DictReader(stream)])

    @cached_property
    def patients(self) -> list[str]:
        """Each image's patient as the run's files name it, "" where it is unknown."""
        if not self.config.data.show_patients:
            return pseudonyms(self.dataset)
        return ["" if patient is None else printable(patient) for patient in self.dataset.patients]

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.split == split)

    @cached_property
    def backbone(self) -> Backbone:
        return Backbone.load(self.folder / "backbone.safetensors")[0].to(self.device)

    @cached_property
    def image_size(self) -> int:
        return self.new_backbone().image_size

    def new_backbone(self) -> Backbone:
        settings = self.config.backbone
        torch.manual_seed(self.config.seed)
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
        return {name: load_laplace(self.folder / file) for name, file in GAUSSIANS.items()}

    @cached_property
    def nuts(self) -> Nuts:
        return Nuts.load(self.folder / "posterior/nuts.safetensors")


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


def check_device_and_name(config: Config) -> None:
    """Refuse what cannot work before anything is read."""
    resolve_device(config.device)
    try:
        check_name(config.backbone.name)
    except ValueError as error:
        raise UsageError(f"--backbone: {error}") from error


def _data(state: _Run) -> None:
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


def _read_and_split(state: _Run) -> None:
    """Read, check and split; ``split.csv``, ``data.json``, ``environment.json``."""
    config, folder = state.config, state.folder
    check_device_and_name(config)
    if folder.done("data"):
        _drop_unreadable_again(state)
        stored = read_json(folder / "data.json")
        for field, value in _fingerprint(state.dataset).items():
            if stored.get(field) != value:
                raise UsageError(
                    f"--resume {folder.path}: data.{field} was {stored.get(field)!r} and is now {value!r}; "
                    "resume with the data it began with"
                )
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
            _warn(
                f"{len(equal)} images stand in several splits under different patients, first {names}; "
                "results are too good by them: give equal images one patient, or drop the copies"
            )
        header = ("obs_id", "path", "label", "patient", "split")
        write_csv(folder / "split.csv", header, _split_rows(dataset, state.patients, split))
        facts = {
            "name": printable(dataset.name),
            "licence": printable(dataset.licence, 2000),
            "shareable": dataset.shareable,
            "ignored": dict(dataset.ignored),
            "skipped": skipped,
            "equal_across_splits": [[printable(dataset.obs_ids[i]) for i in group] for group in equal],
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
        write_text(folder / "environment.json", json.dumps(environment(state.device), indent=1))


def _drop_unreadable(state: _Run, paths: set[Any]) -> None:
    if paths:
        _drop(state, [i for i, record in enumerate(state.dataset.records) if record.path in paths])


def _drop(state: _Run, indices: Sequence[int]) -> None:
    state.dropped = list(indices)
    if indices:
        state.dataset = state.dataset.select(np.delete(np.arange(len(state.dataset)), indices))


def _drop_unreadable_again(state: _Run) -> None:
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


def _warn(words: str) -> None:
    print(f"bayescam: warning: {printable(words, 2000)}", file=sys.stderr)


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


def _train(state: _Run) -> None:
    """Train the network and freeze it; ``backbone.safetensors``, ``history.csv``."""
    folder, config = state.folder, state.config
    if state.done("train"):
        return
    with state.stage("train", ["backbone.safetensors", "history.csv"]):
        backbone = after_first(state.new_backbone, state.group).to(state.device)
        history = train_backbone(
            backbone,
            state.pixels,
            state.dataset.labels,
            train=state.rows("train"),
            valid=state.rows("valid"),
            settings=TrainingSettings(**asdict(config.train)),
            seed=config.seed,
            checkpoint=folder.scratch / "training.safetensors",
            progress=state.leads,
            group=state.group,
        )
        if state.leads:
            backbone.save(folder / "backbone.safetensors", classes=state.dataset.classes)
            rows = [tuple(asdict(epoch).values()) for epoch in history]
            write_csv(folder / "history.csv", tuple(asdict(history[0])), rows)


def _features(state: _Run) -> None:
    """Features of every image, in the data's order; ``features.safetensors``."""
    dataset, group = state.dataset, state.group
    if state.done("features"):
        return
    with state.stage("features", ["features.safetensors"]):
        own = np.arange(len(dataset))[share(len(dataset), group)]
        found = state.backbone.extract(dataset, pixels=state.pixels, indices=own, progress=state.leads)
        features = rows_on_first(found.features, len(dataset), group)
        if features is not None:
            save_tensors(
                state.folder / "features.safetensors",
                {"features": features, "labels": torch.as_tensor(dataset.labels)},
                {"kind": "features", "ids": [printable(name) for name in dataset.obs_ids]},
            )


def _laplace(state: _Run) -> None:
    """Laplace in three structures at one tau, and the refined Gaussian; ``posterior/*.safetensors``."""
    folder, settings = state.folder, state.config.posterior
    if state.done("laplace"):
        return
    k, train = len(state.dataset.classes), state.own_training()
    phi, labels = train.features.to(state.device), train.labels.to(state.device)
    with state.stage("laplace", [*GAUSSIANS.values(), "posterior/fit_seconds.json"]):
        seconds: dict[str, float] = {}

        def timed(name: str, fit: Callable[..., Laplace], **options: Any) -> Laplace:
            begun = time.perf_counter()
            fitted = fit(phi, labels, group=state.group, **options)
            seconds[name] = round(time.perf_counter() - begun, 3)
            if state.leads:
                fitted.save(folder / GAUSSIANS[name])
            return fitted

        with tqdm(total=4, desc="laplace", unit="fit", disable=None if state.leads else True) as bar:
            tau = settings.prior_precision
            full = timed("laplace_full", fit_laplace, num_classes=k, prior_precision=tau)
            tau = full.prior_precision
            bar.update()
            for structure in ("kron", "diag"):
                timed(f"laplace_{structure}", fit_laplace, num_classes=k, prior_precision=tau, structure=structure)
                bar.update()
            timed("laplace_refined", full.refine)
            bar.update()
        if state.leads:
            write_text(folder / "posterior/fit_seconds.json", json.dumps(seconds, indent=1))


def _nuts(state: _Run) -> None:
    """NUTS on the same density, chain by chain; ``posterior/nuts.safetensors``."""
    from bayescam.posterior.nuts import sample_nuts

    folder, settings = state.folder, state.config.nuts
    if state.done("nuts"):
        return
    train = state.own_training()
    with state.stage("nuts", ["posterior/nuts.safetensors"]):
        nuts = sample_nuts(
            state.gaussians["laplace_refined"],
            train.features,
            train.labels,
            num_chains=settings.num_chains,
            num_samples=settings.num_samples,
            num_warmup=settings.num_warmup,
            kernel=settings.kernel,
            seed=state.config.seed,
            group=state.group,
            folder=folder.scratch / "chains",
            progress=state.leads,
        )
        if state.leads:
            nuts.save(folder / "posterior/nuts.safetensors")


# The stages on which all ranks work; what comes after them is small, and rank 0's alone.
SHARED = (_data, _train, _features, _laplace, _nuts)


def _probabilities(state: _Run, part: Features) -> dict[str, Tensor]:
    """Class probabilities (N, K) of every method; the temperature is fitted on the valid split alone."""
    head = state.backbone.head.cpu()
    full, valid = state.gaussians["laplace_full"], state.part("valid")
    phi = part.features
    with torch.no_grad():
        trained = torch.softmax(head(phi).double(), dim=1)
    state.backbone.to(state.device)
    temperature = fit_temperature(full.map_logits(valid.features), valid.labels)
    logits = full.map_logits(phi)
    probabilities = {
        "cnn": trained,
        "map": torch.softmax(logits, dim=1),
        "map_temperature": torch.softmax(logits / temperature, dim=1),
    }
    probabilities |= {name: gaussian.predict_proba(phi) for name, gaussian in state.gaussians.items()}
    probabilities["nuts"] = predict_proba(state.nuts.draws, phi)
    return {name: probabilities[name].double() for name in METHODS}


def _predict(state: _Run) -> None:
    """Predictions and metrics of every method on the test split; ``predictions.nc``, ``metrics.json``, ``table.md``."""
    from bayescam.diagnose.calibration import classification_metrics
    from bayescam.diagnose.inference_data import save_dataset

    folder, part = state.folder, state.part("test")
    if folder.done("predict"):
        return
    with folder.stage("predict", ["predictions.nc", "metrics.json", "table.md"]):
        probabilities = _probabilities(state, part)
        save_dataset(_predictions(state, part, probabilities), folder / "predictions.nc")
        methods = {name: classification_metrics(probs, part.labels) for name, probs in probabilities.items()}
        metrics = {
            "methods": methods,
            "num_test": len(part.labels),
            "num_train": len(state.rows("train")),
            "num_valid": len(state.rows("valid")),
            "classes": [printable(name) for name in state.dataset.classes],
            "prior_precision": state.gaussians["laplace_full"].prior_precision,
            "log_evidence": state.gaussians["laplace_full"].log_evidence,
        }
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
        write_text(folder / "table.md", _table(methods, len(part.labels)))


def _table(methods: dict[str, dict[str, Any]], num_test: int) -> str:
    lines = [
        f"Test split, {num_test} images. ECE: 15 bins of equal width. NLL in nats, lower is better.",
        "",
        "| method | accuracy | NLL | ECE | Brier |",
        "|---|---|---|---|---|",
    ]
    for name, row in methods.items():
        lines.append(f"| {name} | {row['accuracy']:.3f} | {row['nll']:.4f} | {row['ece']:.4f} | {row['brier']:.4f} |")
    return "\n".join(lines) + "\n"


def _predictions(state: _Run, part: Features, probabilities: dict[str, Tensor]) -> Any:
    import xarray as xr

    from bayescam.diagnose.calibration import entropy, mutual_information

    stacked = torch.stack([probabilities[name] for name in METHODS])
    information = torch.zeros(stacked.shape[:2], dtype=torch.float64)
    samples, seed = state.config.posterior.num_samples, state.config.seed
    for row, name in enumerate(METHODS):
        if name in state.gaussians:
            draws = state.gaussians[name].sample(samples, seed=seed)
        elif name == "nuts":
            draws = state.nuts.draws
        else:
            continue
        information[row] = torch.as_tensor(mutual_information(draws, part.features))
    return xr.Dataset(
        {
            "probs": (("method", "obs_id", "label"), stacked.numpy()),
            "y": (("obs_id",), part.labels.numpy()),
            "entropy": (("method", "obs_id"), np.asarray(entropy(stacked))),
            "mutual_information": (("method", "obs_id"), information.numpy()),
        },
        coords={
            "method": list(METHODS),
            "obs_id": [printable(name) for name in part.ids],
            "label": [printable(name) for name in state.dataset.classes],
            "patient": (("obs_id",), [state.patients[i] for i in state.rows("test")]),
        },
        attrs={"entropy_unit": "nat", "split": "test"},
    )


def _compare(state: _Run) -> None:
    """Is Laplace close enough to NUTS? ``comparison.json``."""
    from bayescam.diagnose.compare import compare_posteriors
    from bayescam.explain.gradcam import explanation_maps

    folder, part = state.folder, state.part("test")
    if folder.done("compare"):
        return
    with folder.stage("compare", ["comparison.json"]):
        train = state.part("train")
        images = state.pixels.batch(state.rows("test")[:_COMPARED_MAPS]).to(state.device)
        comparison = compare_posteriors(
            state.gaussians["laplace_full"],
            state.nuts,
            part.features,
            part.labels,
            refined=state.gaussians["laplace_refined"],
            maps=explanation_maps(state.backbone, images).cpu(),
            training=(train.features, train.labels),
        )
        write_text(folder / "comparison.json", json.dumps(comparison.to_dict(), indent=1))


def chosen_posterior(folder: Path) -> tuple[str, str]:
    """The Gaussian that the verdict lets speak for new images: (method, file in the run folder)."""
    verdict = read_json(folder / "comparison.json").get("verdict")
    name = "laplace_full" if verdict == "laplace" else "laplace_refined"
    return name, GAUSSIANS[name]


def _gallery(predictions: Any, method: str, count: int) -> np.ndarray:
    """Test images worth a look: the surest right of each class in turn, the surest wrong and the most uncertain."""
    probs = predictions["probs"].sel({"method": method}).values
    right = probs.argmax(1) == predictions["y"].values
    entropy = predictions["entropy"].sel({"method": method}).values
    third = -(-count // 3)
    sure = np.argsort(entropy, kind="stable")
    best = sure[right[sure]]
    turn = np.zeros(len(best), dtype=int)
    for k in range(probs.shape[1]):
        members = probs[best].argmax(1) == k
        turn[members] = np.arange(members.sum())
    groups = (best[np.argsort(turn, kind="stable")][:third], sure[~right[sure]][:third], sure[::-1])
    chosen: list[int] = []
    for group in groups:
        room = min(count, len(chosen) + third) if group is not groups[-1] else count
        chosen += [int(i) for i in group if int(i) not in chosen][: room - len(chosen)]
    return np.array(chosen)


def _cams(state: _Run) -> None:
    """Class activation maps with their posterior for a gallery of test images; ``cams.nc``."""
    import xarray as xr

    from bayescam.diagnose.inference_data import save_dataset
    from bayescam.explain.cam import CamPosterior
    from bayescam.explain.gradcam import explanation_maps

    folder = state.folder
    if folder.done("cams"):
        return
    with folder.stage("cams", ["cams.nc"]):
        method, file = chosen_posterior(folder.path)
        predictions = load_netcdf(folder / "predictions.nc")
        gallery = _gallery(predictions, method, state.config.explain.num_images)
        rows = state.rows("test")[gallery]
        images = state.pixels.batch(rows)
        maps = explanation_maps(state.backbone, images.to(state.device)).cpu()
        posterior = CamPosterior(maps.double(), load_laplace(folder / file))
        chosen = predictions.isel(obs_id=gallery)
        outranks, marker = _marker(state, gallery, predictions["probs"].sel({"method": method}).values.argmax(1), file)
        dataset = xr.Dataset(
            {
                "mean": (("obs_id", "label", "row", "col"), posterior.mean.numpy()),
                "sd": (("obs_id", "label", "row", "col"), posterior.sd.numpy()),
                "image": (("obs_id", "y_pixel", "x_pixel"), (images[:, 0] * 255).round().to(torch.uint8).numpy()),
                "y": (("obs_id",), chosen["y"].values),
                "probs": (("obs_id", "label"), chosen["probs"].sel({"method": method}).values),
                "mutual_information": (("obs_id",), chosen["mutual_information"].sel({"method": method}).values),
                "marker_outranks": (("obs_id",), outranks),
                "geometry": (
                    ("obs_id", "geometry_field"),
                    np.array([[float(v) for v in asdict(state.pixels.geometry[i]).values()] for i in rows]),
                ),
            },
            coords={
                "obs_id": chosen["obs_id"].values,
                "label": chosen["label"].values,
                "geometry_field": list(asdict(state.pixels.geometry[int(rows[0])])),
            },
            attrs={
                "posterior": method,
                "centred": 1,
                "unit": "logit",
                "h": maps.shape[2],
                "w": maps.shape[3],
                "num_features": maps.shape[1],
                "method": "CAM" if state.backbone.is_average else "Grad-CAM before ReLU",
                "shareable": int(state.dataset.shareable),
                **marker,
            },
        )
        save_dataset(dataset, folder / "cams.nc")


def _marker(
    state: _Run, gallery: np.ndarray, predicted: np.ndarray, file: str
) -> tuple[np.ndarray, dict[str, float | int]]:
    """P(the lead marker outranks the bones) where both have masks: of the gallery, nan else; a mean of more images.

    The mean is over the first test images, with a 95 % interval over patients.
    """
    from bayescam.explain.cam import CamPosterior
    from bayescam.explain.gradcam import explanation_maps
    from bayescam.explain.localise import bootstrap_mean
    from bayescam.explain.marker import marker_outranks, marker_regions

    many = np.arange(min(_MARKED, len(predicted)))
    places = np.union1d(gallery, many)
    rows, found = state.rows("test")[places], np.full(len(places), np.nan)
    masks = [_fitting_masks(state, int(row)) for row in rows]
    told = np.array([n for n, named in enumerate(masks) if "marker" in named], dtype=int)
    if len(told):
        maps = explanation_maps(state.backbone, state.pixels.batch(rows[told]).to(state.device)).cpu()
        cam = CamPosterior(maps.double(), load_laplace(state.folder / file))
        geometry = [state.pixels.geometry[row] for row in rows[told]]
        regions = marker_regions([masks[n] for n in told], geometry, cam.shape)
        found[told] = marker_outranks(cam, regions, torch.from_numpy(predicted[places[told]])).numpy()
    seen = np.isin(places, many) & np.isfinite(found)
    facts: dict[str, float | int] = {"marker_images": int(seen.sum())}
    if seen.any():
        low, high = bootstrap_mean(found[seen], np.array(state.dataset.groups())[rows[seen]])
        facts |= {"marker_mean": float(found[seen].mean()), "marker_low": low, "marker_high": high}
    return found[np.searchsorted(places, gallery)], facts


def _fitting_masks(state: _Run, row: int) -> dict[str, np.ndarray]:
    """The masks of one image; those that cannot be read or have another size are left out with a warning."""
    geometry, name = state.pixels.geometry[row], state.dataset.records[row].obs_id
    try:
        masks = state.dataset.masks(row)
    except BayescamError as error:
        _warn(f"{name}: {error}; its masks are left out")
        return {}
    wrong = [mask for mask, values in masks.items() if values.shape != (geometry.height, geometry.width)]
    if wrong:
        _warn(f"{name}: mask {wrong[0]} has another size than the image; left out")
    return {mask: values for mask, values in masks.items() if mask not in wrong}


def _arviz(state: _Run) -> None:
    """The posteriors as ArviZ files; ``posterior/laplace.nc``, ``posterior/refined.nc``, ``posterior/nuts.nc``."""
    from bayescam.diagnose.inference_data import save, to_inference_data

    folder, part = state.folder, state.part("test")
    if folder.done("arviz"):
        return
    files = ["posterior/laplace.nc", "posterior/refined.nc", "posterior/nuts.nc"]
    sources = (state.gaussians["laplace_full"], state.gaussians["laplace_refined"], state.nuts)
    with folder.stage("arviz", files):
        for file, source in zip(files, tqdm(sources, desc="arviz", unit="file", disable=None), strict=True):
            data = to_inference_data(
                source,
                part.features,
                part.labels,
                classes=[printable(name) for name in state.dataset.classes],
                obs_ids=[printable(name) for name in part.ids],
                num_samples=state.config.posterior.num_samples,
                seed=state.config.seed,
                prior_precision=state.gaussians["laplace_full"].prior_precision,
            )
            save(data, folder / file)


def _pictures(state: _Run) -> None:
    """Figures, report and model card from the files of the run; ``timings.json``."""
    from bayescam.report.figures import write_figures
    from bayescam.report.html import write_report
    from bayescam.report.model_card import write_model_card

    folder = state.folder
    if folder.done("report"):
        return
    write_text(folder / "timings.json", json.dumps({"stages": folder.timings}, indent=1))
    with folder.stage("report", ["report.html", "MODEL_CARD.md"]):
        write_figures(folder.path)
        write_model_card(folder.path)
        write_report(folder.path)


def report_again(path: Path) -> list[Path]:
    """Write the report and the model card of a complete run anew; ``run.json`` follows."""
    from bayescam.report.html import write_report
    from bayescam.report.model_card import write_model_card

    sealed(path)
    facts = read_json(path / "run.json")
    written = [write_report(path), write_model_card(path)]
    RunFolder(path).complete({key: facts.get(key) for key in ("bayescam", "seed", "preset")})
    return written


def _farewell(out: Path) -> str:
    comparison = read_json(out / "comparison.json")
    table = (out / "table.md").read_text(encoding="utf-8")
    return f"{table}\nVerdict: {comparison['verdict']}. {comparison['words']}\nwrote {out} (open {out / 'report.html'})"
