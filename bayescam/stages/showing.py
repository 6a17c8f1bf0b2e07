"""What people look at: class activation maps of a gallery, figures, report and model card."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from bayescam.errors import BayescamError
from bayescam.posterior.laplace import Laplace
from bayescam.stages.state import INTERVAL_LEVEL, RunState, chosen_posterior, load_posterior, warn
from bayescam.storage import load_netcdf, printable, write_text

_SHOWN = 6  # features of which the report shows what they respond to
_MARKED = 100  # test images of which the report says whether the model looks at the marker


def _gallery(predictions: Any, count: int) -> tuple[np.ndarray, dict[str, int]]:
    """Test images worth a look: the surest right of each class in turn, the surest wrong and the most uncertain.

    Returns:
        their rows, and how many there are of each kind, in this order.
    """
    probs = predictions["probs"].values
    right = probs.argmax(1) == predictions["y"].values
    entropy = predictions["entropy"].values
    third = -(-count // 3)
    sure = np.argsort(entropy, kind="stable")
    best = sure[right[sure]]
    turn = np.zeros(len(best), dtype=int)
    for k in range(probs.shape[1]):
        members = probs[best].argmax(1) == k
        turn[members] = np.arange(members.sum())
    groups = {
        "surest_right": best[np.argsort(turn, kind="stable")][:third],
        "surest_wrong": sure[~right[sure]][:third],
        "most_uncertain": sure[::-1],
    }
    chosen: list[int] = []
    sizes = {}
    for name, group in groups.items():
        room = count if name == "most_uncertain" else min(count, len(chosen) + third)
        new = [int(i) for i in group if int(i) not in chosen][: room - len(chosen)]
        chosen += new
        sizes[name] = len(new)
    return np.array(chosen), sizes


def cams(state: RunState) -> None:
    """Class activation maps with their posterior for a gallery of test images; ``cams.nc``."""
    from bayescam.diagnose.inference_data import save_dataset

    folder = state.folder
    if folder.done("cams"):
        return
    with folder.stage("cams", ["cams.nc"]):
        method, _ = chosen_posterior(folder.path)
        predictions = load_netcdf(folder / "predictions.nc").sel({"method": method})
        gallery, sizes = _gallery(predictions, state.config.explain.num_images)
        outranks, marker = _marker(state, gallery, predictions["probs"].values.argmax(1), method)
        found = _maps(state, state.rows("test")[gallery], predictions.isel(obs_id=gallery), method)
        found["marker_outranks"] = (("obs_id",), outranks)
        found = found.merge(_features(state, method))
        found.attrs |= {"posterior": method, **sizes, **marker}
        save_dataset(found, folder / "cams.nc")


def _maps(state: RunState, rows: np.ndarray, chosen: Any, method: str) -> Any:
    """The images of ``rows``, their maps' mean and sd, and what was predicted for them, which some are of alone."""
    import xarray as xr

    from bayescam.explain.cam import CamPosterior
    from bayescam.explain.excursions import joint_exceedance
    from bayescam.explain.gradcam import explanation_maps

    images = state.pixels.batch(rows)
    maps = explanation_maps(state.backbone, images.to(state.device)).cpu()
    posterior = CamPosterior(maps.double(), load_posterior(state.folder.path, method))
    relative = posterior.relative()
    above_mean = relative.exceedance(0.0)
    predicted = torch.from_numpy(chosen["probs"].values.argmax(1))
    geometry = [asdict(state.pixels.geometry[i]) for i in rows]
    return xr.Dataset(
        {
            "mean": (("obs_id", "label", "row", "col"), posterior.mean.numpy()),
            "sd": (("obs_id", "label", "row", "col"), posterior.sd.numpy()),
            "joint": (("obs_id", "row", "col"), joint_exceedance(posterior, predicted).numpy()),
            "stands_out": (("obs_id", "row", "col"), above_mean[torch.arange(len(rows)), predicted].numpy()),
            "stands_out_jointly": (("obs_id", "row", "col"), joint_exceedance(relative, predicted).numpy()),
            "attribution": (("obs_id", "row", "col"), posterior.attribution(predicted).numpy()),
            "image": (("obs_id", "y_pixel", "x_pixel"), (images[:, 0] * 255).round().to(torch.uint8).numpy()),
            "y": (("obs_id",), chosen["y"].values),
            "probs": (("obs_id", "label"), chosen["probs"].values),
            "mutual_information": (("obs_id",), chosen["mutual_information"].values),
            "geometry": (("obs_id", "geometry_field"), np.array([list(map(float, g.values())) for g in geometry])),
        },
        coords={
            "obs_id": chosen["obs_id"].values,
            "label": chosen["label"].values,
            "geometry_field": list(geometry[0]),
        },
        attrs={
            "centred": 1,
            "unit": "logit",
            "h": maps.shape[2],
            "w": maps.shape[3],
            "num_features": maps.shape[1],
            "method": "CAM" if state.backbone.is_average else "Grad-CAM before ReLU",
            "shareable": int(state.dataset.shareable),
        },
    )


def _features(state: RunState, method: str) -> Any:
    """The features that matter most, and where each responds in the test image in which it is strongest.

    ``feature_effect`` is |mean of the class-centred weight| times the feature's sd over the test images, of the class
    ``feature_label`` where that is largest, in logits; no feature is there twice.
    """
    import xarray as xr

    from bayescam.diagnose.selectors import largest_effect
    from bayescam.explain.gradcam import explanation_maps

    posterior, part = load_posterior(state.folder.path, method), state.part("test")
    weight = posterior.weight_mean if isinstance(posterior, Laplace) else posterior.flat()[0].mean(0)
    ranked, sizes = largest_effect(weight.numpy(), part.features.numpy(), weight.numel())
    best: dict[int, tuple[int, float]] = {}
    for (label, feature), size in zip(ranked, sizes.tolist(), strict=True):
        best.setdefault(feature, (label, size))
    shown = list(best)[:_SHOWN]
    strongest = part.features[:, shown].argmax(0).numpy()
    images = state.pixels.batch(state.rows("test")[strongest])
    maps = explanation_maps(state.backbone, images.to(state.device)).cpu()
    return xr.Dataset(
        {
            "feature_label": (("shown_feature",), np.array([best[d][0] for d in shown])),
            "feature_effect": (("shown_feature",), np.array([best[d][1] for d in shown])),
            "feature_response": (("shown_feature", "row", "col"), maps[range(len(shown)), shown].numpy()),
            "feature_image": (
                ("shown_feature", "y_pixel", "x_pixel"),
                (images[:, 0] * 255).round().to(torch.uint8).numpy(),
            ),
            "feature_obs_id": (("shown_feature",), [printable(part.ids[row]) for row in strongest]),
        },
        coords={"shown_feature": shown},
    )


def _marker(
    state: RunState, gallery: np.ndarray, predicted: np.ndarray, method: str
) -> tuple[np.ndarray, dict[str, float | int]]:
    """P(the lead marker outranks the bones) where both have masks: of the gallery, nan else; a mean of more images.

    The mean is over the first test images, with a 90 % interval over patients.
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
        cam = CamPosterior(maps.double(), load_posterior(state.folder.path, method))
        geometry = [state.pixels.geometry[row] for row in rows[told]]
        regions = marker_regions([masks[n] for n in told], geometry, cam.shape)
        found[told] = marker_outranks(cam, regions, torch.from_numpy(predicted[places[told]])).numpy()
    seen = np.isin(places, many) & np.isfinite(found)
    facts: dict[str, float | int] = {"marker_images": int(seen.sum())}
    if seen.any():
        low, high = bootstrap_mean(found[seen], np.array(state.dataset.groups())[rows[seen]], INTERVAL_LEVEL)
        facts |= {"marker_mean": float(found[seen].mean()), "marker_low": low, "marker_high": high}
    return found[np.searchsorted(places, gallery)], facts


def _fitting_masks(state: RunState, row: int) -> dict[str, np.ndarray]:
    """The masks of one image; those that cannot be read or have another size are left out with a warning."""
    geometry, name = state.pixels.geometry[row], state.dataset.records[row].obs_id
    try:
        masks = state.dataset.masks(row)
    except BayescamError as error:
        warn(f"{name}: {error}; its masks are left out")
        return {}
    wrong = [mask for mask, values in masks.items() if values.shape != (geometry.height, geometry.width)]
    if wrong:
        warn(f"{name}: mask {wrong[0]} has another size than the image; left out")
    return {mask: values for mask, values in masks.items() if mask not in wrong}


def pictures(state: RunState) -> None:
    """Figures, report and model card from the files of the run; ``timings.json``."""
    from bayescam.report.pages import write_pages

    folder = state.folder
    if folder.done("report"):
        return
    finished = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    write_text(folder / "timings.json", json.dumps({"finished": finished, "stages": folder.timings}, indent=1))
    with folder.stage("report", ["report.html", "MODEL_CARD.md"]):
        write_pages(folder.path)
