"""What the posterior of one layer cannot know: how far another training of the whole network would move things."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayescam.backbone.network import Backbone
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.posterior.laplace import fit_laplace
from bayescam.stages.state import INTERVAL_LEVEL, RunState, chosen_posterior, load_posterior
from bayescam.storage import write_text

_MAPPED = 64


def retrain(state: RunState) -> None:
    """Train the network again from ``config.seeds`` other seeds; ``seeds.json``. Nothing is done for ``seeds = 0``."""
    from bayescam.diagnose.compare import json_safe

    folder = state.folder
    if state.config.seeds == 0 or folder.done("seeds"):
        return
    with folder.stage("seeds", ["seeds.json"]):
        own = _judged(state, state.backbone)
        others = [_judged(state, _trained(state, member)) for member in range(1, state.config.seeds + 1)]
        spread = json_safe(_spread(own, others, _map_sd(state), state.test_patients))
        write_text(folder / "seeds.json", json.dumps(spread, indent=1, allow_nan=False))


def _trained(state: RunState, member: int) -> Backbone:
    """The run's network, trained as it was but from the seed ``seed + member``."""
    seed = state.config.seed + member
    backbone = state.new_backbone(seed).to(state.device)
    train_backbone(
        backbone,
        state.pixels,
        state.dataset.labels,
        train=state.rows("train"),
        valid=state.rows("valid"),
        settings=TrainingSettings(**asdict(state.config.train)),
        seed=seed,
        checkpoint=state.folder.scratch / f"training-{member}.safetensors",
    )
    return backbone


def _judged(state: RunState, backbone: Backbone) -> dict[str, Any]:
    """Accuracy and NLL of the network with its last layer at the MAP, its predictions, and the maps of some images."""
    from bayescam.diagnose.calibration import classification_metrics
    from bayescam.explain.cam import CamPosterior

    found = backbone.extract(state.dataset, pixels=state.pixels)
    train, test = (found.select(state.rows(part)) for part in ("train", "test"))
    k, tau = len(state.dataset.classes), state.gaussians["laplace_full"].prior_precision
    fitted = fit_laplace(train.features, train.labels, num_classes=k, prior_precision=tau, structure="diag")
    probs = torch.softmax(fitted.map_logits(test.features), 1)
    cams = CamPosterior(_mapped(state, backbone), fitted).mean
    return {**classification_metrics(probs, test.labels), "predicted": probs.argmax(1), "cams": cams}


def _mapped(state: RunState, backbone: Backbone) -> Tensor:
    from bayescam.explain.gradcam import explanation_maps

    images = state.pixels.batch(state.rows("test")[:_MAPPED]).to(state.device)
    return explanation_maps(backbone, images).cpu().double()


def _map_sd(state: RunState) -> Tensor:
    """Posterior sd of the run's own maps, (n, K, h, w)."""
    from bayescam.explain.cam import CamPosterior

    method, _ = chosen_posterior(state.folder.path)
    return CamPosterior(_mapped(state, state.backbone), load_posterior(state.folder.path, method)).sd


def _spread(
    own: dict[str, Any], others: list[dict[str, Any]], posterior_sd: Tensor, patients: np.ndarray
) -> dict[str, Any]:
    """How much the trainings differ, of the class that the run's own network finds most probable.

    ``map_correlation``: of the cells of two trainings' centred CAMs of one image, mean over images and pairs with the
    run's own. ``map_sd_ratio``: sd of a cell over trainings, beside its posterior sd, both root mean squares.
    ``intervals``: of what are means over images, by the bootstrap over the patients of the test images.
    """
    from bayescam.diagnose.intervals import count_groups, interval, resampled_mean, share_interval

    classes = own["predicted"][: len(own["cams"])]
    rows = torch.arange(len(classes))
    maps = torch.stack([one["cams"][rows, classes] for one in (own, *others)]).flatten(2)
    away = maps - maps.mean(2, keepdim=True)
    correlation = torch.nn.functional.cosine_similarity(away[:1], away[1:], dim=2)
    between, within = maps.std(0).square().mean(1), posterior_sd[rows, classes].square().flatten(1).mean(1)
    same = torch.stack([one["predicted"] == own["predicted"] for one in others]).double().mean(0)

    def resampled(values: Tensor) -> np.ndarray:
        return resampled_mean(values.numpy(), patients[: len(values)])

    found = {
        "same_class": resampled(same),
        "map_correlation": resampled(correlation.mean(0)),
        "map_sd_ratio": np.sqrt(resampled(between) / resampled(within)),
        "map_sd_between": np.sqrt(resampled(between)),
        "map_sd_posterior": np.sqrt(resampled(within)),
    }
    mapped = count_groups(patients[: len(classes)])
    intervals = {name: interval(values, INTERVAL_LEVEL, num_groups=mapped) for name, values in found.items()}
    intervals["same_class"] = share_interval(found["same_class"], INTERVAL_LEVEL, num_groups=count_groups(patients))
    return {
        "num_trainings": 1 + len(others),
        "accuracy": [one["accuracy"] for one in (own, *others)],
        "nll": [one["nll"] for one in (own, *others)],
        "map_images": len(classes),
        **{name: float(values[0]) for name, values in found.items()},
        "intervals": {name: asdict(one) for name, one in intervals.items()},
    }
