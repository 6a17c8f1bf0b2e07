"""Which features matter, by how much, and what each responds to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bayescam.diagnose.selectors import Chosen, largest_effect
from bayescam.report.run_files import RunFiles

_NUM_FEATURES = 6
_Z90 = 1.645


def effects(files: RunFiles, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of the class-centred weights times the sd of their feature over the test images, logits, (K, D)."""
    spread = files.features.std(0)
    mean, sd = files.moments(method)
    return mean * spread, sd * spread


def top_features(files: RunFiles) -> Chosen:
    """The features that move logits most, each with the class that it moves most: (label, feature)."""
    if "shown_feature" in files.cams.coords:
        pairs = zip(files.cams["feature_label"].values, files.cams["shown_feature"].values, strict=True)
        return [(int(label), int(feature)) for label, feature in pairs]
    mean = files.moments(files.speaker)[0]
    best: dict[int, int] = {}
    for label, feature in largest_effect(mean, files.features, mean.size)[0]:
        best.setdefault(feature, label)
    return [(label, feature) for feature, label in best.items()][:_NUM_FEATURES]


def told_from_zero(files: RunFiles) -> tuple[int, int, float]:
    """How many centred weights have a 90 % interval off zero, of how many, and their sd beside the prior's (median)."""
    mean, sd = files.moments(files.speaker)
    prior = np.sqrt((1 - 1 / len(mean)) / files.metrics["prior_precision"])
    return int((np.abs(mean) > _Z90 * sd).sum()), mean.size, float(np.median(sd) / prior)


def feature_images(files: RunFiles) -> Iterator[np.ndarray]:
    """Of each top feature: the test image in which it is strongest, RGBA (H, W, 4), and around where it responds."""
    if "shown_feature" not in files.cams.coords:
        return
    for image, response in zip(files.cams["feature_image"].values, files.cams["feature_response"].values, strict=True):
        figure = Figure(figsize=(2, 2 * image.shape[0] / image.shape[1]), dpi=144)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")
        cells = np.kron(response.astype(float), np.ones((16, 16)))
        if cells.max() > max(cells.min(), 0):
            down, across = ((np.arange(size) + 0.5) / size for size in cells.shape)
            half = (cells.max() + max(cells.min(), 0)) / 2
            axes.contour(across, down, cells, levels=[half], colors="#E69F00", linewidths=2)
        canvas.draw()
        yield np.array(canvas.buffer_rgba())
