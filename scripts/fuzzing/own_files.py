"""Readers of what bayescam itself wrote, with valid files: ``prepare(folder)`` fills it and gives ``read(path)``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Reader = Callable[[Path], object]


def _features() -> tuple:
    import torch

    torch.manual_seed(0)
    labels = torch.arange(30) % 3
    return torch.randn(30, 4) + labels[:, None], labels


def laplace(folder: Path) -> Reader:
    from bayescam.posterior.laplace import fit_laplace, load_laplace

    for structure in ("full", "kron", "diag"):
        fit_laplace(*_features(), structure=structure, prior_precision=1.0).save(folder / f"{structure}.safetensors")
    fit_laplace(*_features(), prior_precision=1.0).refine(*_features()).save(folder / "refined.safetensors")
    question = _features()[0]

    def read(path: Path) -> None:
        laplace = load_laplace(path)
        if laplace.num_features == question.shape[1]:
            laplace.predict_proba(question)

    return read


def nuts(folder: Path) -> Reader:
    from bayescam.posterior.laplace import fit_laplace
    from bayescam.posterior.nuts import Nuts, sample_nuts

    lengths = {"num_chains": 2, "num_samples": 4, "num_warmup": 20}
    nuts = sample_nuts(fit_laplace(*_features(), prior_precision=1.0), *_features(), **lengths, progress=False)
    nuts.save(folder / "nuts.safetensors")
    return Nuts.load


def chain(folder: Path) -> Reader:
    from bayescam.posterior.laplace import fit_laplace
    from bayescam.posterior.nuts import sample_nuts
    from bayescam.posterior.nuts_chain import load_chain
    from bayescam.storage import load_tensors

    laplace = fit_laplace(*_features(), prior_precision=1.0)
    sample_nuts(laplace, *_features(), num_chains=1, num_samples=4, num_warmup=20, folder=folder, progress=False)
    _, metadata = load_tensors(folder / "chain-0.safetensors", kind="chain")
    return lambda path: load_chain(path, metadata["fingerprint"])


def backbone(folder: Path) -> Reader:
    from bayescam.backbone.network import Backbone

    Backbone("small", 3, image_size=32).save(folder / "backbone.safetensors", classes=["a", "b", "c"])
    return Backbone.load


def weights(folder: Path) -> Reader:
    from bayescam.backbone.network import Backbone

    Backbone("small", 3, image_size=32).save(folder / "weights.safetensors", classes=["a", "b", "c"])
    return lambda path: Backbone("small", 3, str(path))


def training(folder: Path) -> Reader:
    import numpy as np

    from bayescam.backbone.network import Backbone
    from bayescam.backbone.training import TrainingSettings, train_backbone
    from bayescam.data.pixels import Geometry, Pixels

    rng = np.random.default_rng(0)
    geometry = (Geometry.fit(32, 32, 32),) * 6
    pixels = Pixels(rng.integers(0, 65536, (6, 32, 32), dtype=np.uint16), geometry)
    rows = np.arange(6)

    def train(path: Path) -> None:
        train_backbone(
            Backbone("small", 3, image_size=32),
            pixels,
            rows % 3,
            train=rows,
            valid=rows[:3],
            settings=TrainingSettings(epochs=1, batch_size=6),
            seed=0,
            checkpoint=path,
            progress=False,
        )

    train(folder / "training.safetensors")
    return train


def config(folder: Path) -> Reader:
    from bayescam.config import read_config, to_toml

    for preset in ("quick", "thorough"):
        config = read_config(None, {"preset": preset, "data.limit": 50, "data.root": str(folder)})
        (folder / f"{preset}.toml").write_text(to_toml(config))
    return lambda path: read_config(path, {"seed": 1})


def run_json(folder: Path) -> Reader:
    from bayescam.config import read_config, to_toml
    from bayescam.runfolder import AlreadyComplete, RunFolder, opened, sealed, verified
    from bayescam.storage import write_text

    run = folder.parent / "run"
    run.mkdir()
    write_text(run / "config.toml", to_toml(read_config(None, {})))
    names = ("metrics.json", "posterior/laplace.safetensors")
    for name in names:
        write_text(run / name, "{}")
    RunFolder(run).complete({"seed": 0})
    (folder / "run.json").write_bytes((run / "run.json").read_bytes())

    def read(path: Path) -> None:
        (run / "run.json").write_bytes(path.read_bytes())
        verified(run, *names)
        sealed(run)
        try:
            with opened(run, None, {}, resume=True, overwrite=False):
                raise AssertionError("a complete run was begun again")
        except AlreadyComplete:
            return

    return read


def stages_json(folder: Path) -> Reader:
    from bayescam.runfolder import RunFolder, opened
    from bayescam.storage import write_text

    run = folder.parent / "stages"
    run.mkdir()
    with opened(run, None, {}, resume=False, overwrite=False) as (stages, _):
        for name in ("data", "train"):
            with stages.stage(name, [f"{name}.txt"]):
                write_text(run / f"{name}.txt", name)
    (folder / "stages.json").write_bytes((run / ".stages.json").read_bytes())

    def read(path: Path) -> None:
        (run / ".stages.json").write_bytes(path.read_bytes())
        with opened(run, None, {}, resume=True, overwrite=False) as (stages, _):
            again = RunFolder(stages.path)
            return [again.timings, *(again.done(name) for name in ("data", "train", "other"))]

    return read


def settings_json(folder: Path) -> Reader:
    """The settings of ``bayescam posterior``, asked whether a resumed run is the same."""
    from dataclasses import asdict

    from bayescam.features_run import FeaturesSettings, check_folder

    settings = {**asdict(FeaturesSettings()), "features_sha256": "0" * 64}
    (folder / "settings.json").write_text(json.dumps(settings))
    run = folder.parent / "features"
    run.mkdir()

    def read(path: Path) -> None:
        (run / "settings.json").write_bytes(path.read_bytes())
        check_folder(run, settings, resume=True, overwrite=False)

    return read


def comparison_json(folder: Path) -> Reader:
    from bayescam.stages.state import chosen_posterior

    (folder / "comparison.json").write_text(json.dumps({"verdict": "refine", "words": "w", "tv": {"x": 0.1}}))
    run = folder.parent / "compared"
    run.mkdir()

    def read(path: Path) -> object:
        (run / "comparison.json").write_bytes(path.read_bytes())
        return chosen_posterior(run)

    return read


def netcdf(folder: Path) -> Reader:
    from bayescam.diagnose.diagnosis import nuts_checks
    from bayescam.diagnose.inference_data import load, save, save_dataset, to_inference_data
    from bayescam.posterior.laplace import fit_laplace
    from bayescam.posterior.nuts import sample_nuts
    from bayescam.storage import load_netcdf

    features, labels = _features()
    laplace = fit_laplace(features, labels, prior_precision=1.0)
    lengths = {"num_chains": 2, "num_samples": 4, "num_warmup": 20}
    nuts = sample_nuts(laplace, features, labels, **lengths, progress=False)
    idata = to_inference_data(nuts, features[:3], labels[:3], classes=["a", "b", "c"])
    save(idata, folder / "nuts.nc")
    save_dataset(idata.posterior, folder / "posterior.nc")

    def read(path: Path) -> None:
        load_netcdf(path)
        load(path)
        if path.name != "posterior.nc":
            nuts_checks(path)

    return read
