"""What the posteriors are worth on the test split: predictions, metrics, the verdict, ArviZ files."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bayescam.backbone.network import Features
from bayescam.diagnose.intervals import Interval, count_groups, interval_words, metrics_with_intervals
from bayescam.posterior.predictive import predict_proba
from bayescam.posterior.temperature import bound_hit, fit_temperature
from bayescam.report.wording import NAMES
from bayescam.stages.state import INTERVAL_LEVEL, METHODS, RunState
from bayescam.storage import printable, write_text

_COMPARED_MAPS = 32


def _probabilities(state: RunState, part: Features) -> tuple[dict[str, Tensor], float]:
    """Class probabilities (N, K) of every method, and the temperature, fitted on the valid split alone."""
    full, valid = state.gaussians["laplace_full"], state.part("valid").to(state.device)
    phi = part.features.to(state.device)
    with torch.no_grad():
        trained = torch.softmax(state.backbone.head(phi).double(), dim=1)
    temperature = fit_temperature(full.map_logits(valid.features), valid.labels)
    logits = full.map_logits(phi)
    probabilities = {
        "cnn": trained,
        "map": torch.softmax(logits, dim=1),
        "map_temperature": torch.softmax(logits / temperature, dim=1),
    }
    probabilities |= {name: gaussian.predict_proba(phi) for name, gaussian in state.gaussians.items()}
    probabilities["nuts"] = predict_proba(state.nuts.draws, phi)
    return {name: probabilities[name].cpu().double() for name in METHODS}, temperature


def predict(state: RunState) -> None:
    """Predictions and metrics of every method on the test split; ``predictions.nc``, ``metrics.json``, ``table.md``."""
    from bayescam.diagnose.calibration import classification_metrics
    from bayescam.diagnose.compare import json_safe
    from bayescam.diagnose.inference_data import save_dataset

    folder, part = state.folder, state.part("test")
    if folder.done("predict"):
        return
    with folder.stage("predict", ["predictions.nc", "metrics.json", "table.md"]):
        probabilities, temperature = _probabilities(state, part)
        predictions = _predictions(state, part, probabilities)
        save_dataset(predictions, folder / "predictions.nc")
        intervals = _intervals(state, part, probabilities)
        metrics = {
            "methods": {name: classification_metrics(p, part.labels) for name, p in probabilities.items()},
            "interval_level": INTERVAL_LEVEL,
            "resampled": state.resampled,
            "num_resampled": count_groups(state.test_patients),
            "intervals": {name: {m: asdict(one) for m, one in row.items()} for name, row in intervals.items()},
            "uncertainty": _uncertainty(state, predictions),
            "num_test": len(part.labels),
            "num_train": len(state.rows("train")),
            "num_valid": len(state.rows("valid")),
            "classes": [printable(name) for name in state.dataset.classes],
            "prior_precision": state.gaussians["laplace_full"].prior_precision,
            "log_evidence": state.gaussians["laplace_full"].log_evidence,
            "temperature": temperature,
            "temperature_bound": bound_hit(temperature),
        }
        write_text(folder / "metrics.json", json.dumps(json_safe(metrics), indent=1, allow_nan=False))
        words = interval_words(count_groups(state.test_patients), state.resampled, INTERVAL_LEVEL)
        write_text(folder / "table.md", _table(intervals, len(part.labels), words, temperature))


def _intervals(state: RunState, part: Features, probabilities: dict[str, Tensor]) -> dict[str, dict[str, Interval]]:
    """Every metric of every method with its bootstrap interval over patients; see ``diagnose.intervals.METRICS``."""
    groups = state.test_patients
    return {
        name: metrics_with_intervals(probs.numpy(), part.labels.numpy(), groups, level=INTERVAL_LEVEL)
        for name, probs in probabilities.items()
    }


def _uncertainty(state: RunState, predictions: Any) -> dict[str, dict[str, Any]]:
    """Mean entropy and mutual information of every method, and how well they find its errors, with intervals."""
    from bayescam.diagnose.uncertainty import uncertainty_with_intervals

    found, groups = {}, state.test_patients
    for name in METHODS:
        own = predictions.sel({"method": name})  # as a keyword, method= is how to match
        information = own["mutual_information"].values if name == "nuts" or name in state.gaussians else None
        wrong = own["probs"].values.argmax(1) != own["y"].values
        row = uncertainty_with_intervals(own["entropy"].values, information, wrong, groups, level=INTERVAL_LEVEL)
        found[name] = {key: asdict(one) for key, one in row.items()}
    return found


def _table(methods: dict[str, dict[str, Interval]], num_test: int, words: str, temperature: float) -> str:
    if bound := bound_hit(temperature):
        words += f" The temperature, {temperature:g}, is at its {bound} bound: the valid loss still falls there."
    lines = [
        f"Test split, {num_test} images. {words} ECE: 15 bins of equal width. NLL in nats, lower is better.",
        "",
        "| method | accuracy | NLL | ECE | Brier |",
        "|---|---|---|---|---|",
    ]
    for name, row in methods.items():
        cells = [f"{row['accuracy']:.3f}", *(f"{row[key]:.4f}" for key in ("nll", "ece", "brier"))]
        lines.append(f"| {' | '.join([NAMES[name], *cells])} |")
    return "\n".join(lines) + "\n"


def _predictions(state: RunState, part: Features, probabilities: dict[str, Tensor]) -> Any:
    import xarray as xr

    from bayescam.diagnose.calibration import entropy, mutual_information

    stacked = torch.stack([probabilities[name] for name in METHODS])
    phi = part.features.to(state.device)
    information = torch.zeros(stacked.shape[:2], dtype=torch.float64)
    samples, seed = state.config.posterior.num_samples, state.config.seed
    for row, name in enumerate(METHODS):
        if name in state.gaussians:
            draws = state.gaussians[name].sample(samples, seed=seed)
        elif name == "nuts":
            draws = state.nuts.draws
        else:
            continue
        information[row] = torch.as_tensor(mutual_information(draws, phi))
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


def compare(state: RunState) -> None:
    """Is Laplace close enough to NUTS? ``comparison.json``."""
    from bayescam.diagnose.compare import compare_posteriors
    from bayescam.explain.gradcam import explanation_maps

    folder = state.folder
    if folder.done("compare"):
        return
    with folder.stage("compare", ["comparison.json"]):
        part, train = state.part("test").to(state.device), state.part("train").to(state.device)
        images = state.pixels.batch(state.rows("test")[:_COMPARED_MAPS]).to(state.device)
        comparison = compare_posteriors(
            state.gaussians["laplace_full"],
            state.nuts,
            part.features,
            part.labels,
            refined=state.gaussians["laplace_refined"],
            maps=explanation_maps(state.backbone, images),
            training=(train.features, train.labels),
            patients=state.test_patients,
        )
        write_text(folder / "comparison.json", json.dumps(comparison.to_dict(), indent=1))


def arviz(state: RunState) -> None:
    """The posteriors as ArviZ files; ``posterior/laplace.nc``, ``posterior/refined.nc``, ``posterior/nuts.nc``."""
    from bayescam.diagnose.inference_data import save, to_inference_data

    folder = state.folder
    if folder.done("arviz"):
        return
    part, train = state.part("test").to(state.device), state.part("train").to(state.device)
    files = ["posterior/laplace.nc", "posterior/refined.nc", "posterior/nuts.nc"]
    sources = (state.gaussians["laplace_full"], state.gaussians["laplace_refined"], state.nuts)
    with folder.stage("arviz", files):
        for file, source in zip(files, tqdm(sources, desc="arviz", unit="file", disable=None), strict=True):
            data = to_inference_data(
                source,
                part.features,
                part.labels,
                train=(train.features, train.labels),
                classes=[printable(name) for name in state.dataset.classes],
                obs_ids=[printable(name) for name in part.ids],
                num_samples=state.config.posterior.num_samples,
                seed=state.config.seed,
                prior_precision=state.gaussians["laplace_full"].prior_precision,
            )
            save(data, folder / file)
