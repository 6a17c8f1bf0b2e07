"""What all ranks fit together: the network, its features, the Gaussians and NUTS."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.parallel import after_first, rows_on_first, share
from bayescam.posterior.laplace import Laplace, fit_laplace
from bayescam.stages.state import GAUSSIANS, RunState
from bayescam.storage import printable, save_tensors, write_csv, write_text


def train(state: RunState) -> None:
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


def features(state: RunState) -> None:
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


def laplace(state: RunState) -> None:
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


def nuts(state: RunState) -> None:
    """NUTS on the same density, chain by chain; ``posterior/nuts.safetensors``."""
    from bayescam.posterior.nuts import sample_nuts

    folder, settings = state.folder, state.config.nuts
    if state.done("nuts"):
        return
    train = state.own_training()
    with state.stage("nuts", ["posterior/nuts.safetensors"]):
        nuts = sample_nuts(
            state.gaussians["laplace_refined"],
            train.features.to(state.device),
            train.labels.to(state.device),
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
