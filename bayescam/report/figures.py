"""The figures of a run: plain arrays in, a matplotlib Figure out; ``write_figures`` makes them from a run folder.

Half a page wide each, and transparent: the page shows them on white, and their colours inverted on black.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from bayescam.diagnose.calibration import consistency_band, reliability, risk_coverage
from bayescam.diagnose.intervals import Interval, count_groups, interval, resampled_mean
from bayescam.diagnose.selectors import largest_shift, worst_rhat
from bayescam.diagnose.uncertainty import risk_band
from bayescam.report.cam_tiles import tile_images
from bayescam.report.gallery import gallery, tile_name
from bayescam.report.run_files import RunFiles
from bayescam.report.style import CHAINS, COLOURS, FAINT, HALF, INK, QUIET, named_ticks, new_figure, plain, say
from bayescam.report.weights import effects, feature_images, top_features
from bayescam.report.wording import NAMES, percent, short, two_digits
from bayescam.storage import atomic_path

_NUM_WEIGHTS = 6
_FEW = 5  # images in a bin below which it is drawn hollow
_COMPARED = ("laplace_full", "laplace_refined", "nuts")


def reliability_figure(probs: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    """Observed accuracy against stated confidence, one panel a method, with the band that chance alone would fill.

    Args:
        probs: method -> (N, K).
        labels: (N,).
    """
    rows = -(-len(probs) // 3)
    figure = new_figure(HALF, 1.85 * rows + 0.3)
    panels = figure.subplots(rows, 3, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(probs) :]:
        axes.set_axis_off()
    for axes, (method, values) in zip(panels.flat, probs.items(), strict=False):
        bins = reliability(values, labels)
        low, high = consistency_band(values)
        plain(axes)
        axes.set_title(f"{NAMES.get(method, method)}\nECE {bins.ece:.4f}", fontsize=9, color=INK, loc="left")
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":")
        shown, many = bins.count > 0, bins.count >= _FEW
        axes.vlines(bins.confidence[shown], low[shown], high[shown], color=FAINT, linewidth=7)
        size = 10 + 50 * bins.count / bins.count.max()
        colour = COLOURS.get(method, INK)
        for which, face in ((shown & many, colour), (shown & ~many, "none")):
            where = bins.confidence[which], bins.accuracy[which]
            axes.scatter(*where, s=size[which], facecolor=face, edgecolor=colour, zorder=3, clip_on=False)
        most = int(bins.count.argmax())
        if bins.count[most] > 0.75 * len(labels):
            words = f"{percent(bins.count[most] / len(labels))} of all\nin the bin\nat {bins.confidence[most]:.2f}"
            say(axes, 0.05, 0.95, words, va="top", fontsize=8, color=QUIET)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
    figure.supxlabel("stated confidence: probability of the most probable class", fontsize=9, color=INK)
    figure.supylabel("share correct", fontsize=9, color=INK)
    return figure


def risk_coverage_figure(
    probs: Mapping[str, np.ndarray], labels: np.ndarray, band: tuple[str, np.ndarray, np.ndarray] | None = None
) -> Figure:
    """Error among the images kept when the least sure are handed to a person.

    Args:
        probs: method -> (N, K).
        labels: (N,).
        band: a method and the bounds of its error at each share kept, (N,) each.
    """
    figure = new_figure(HALF, 4.0)
    axes = plain(
        figure.subplots(),
        title="Handing over the least sure images",
        x="share of the images kept",
        y="error among them",
    )
    for method, values in probs.items():
        coverage, risk = risk_coverage(values, labels)
        axes.plot(coverage, risk, color=COLOURS.get(method, INK), label=NAMES.get(method, method), linewidth=1.4)
    if band is not None:
        method, low, high = band
        axes.fill_between(coverage, low, high, color=COLOURS.get(method, INK), alpha=0.15, linewidth=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    return figure


def confusion_figure(probs: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts of test images: rows the truth, columns the most probable class."""
    k = len(classes)
    counts = np.zeros((k, k), dtype=int)
    np.add.at(counts, (labels, probs.argmax(1)), 1)
    side = max(3.2, min(1.9 + 0.4 * k, 2.4 * HALF))
    figure = new_figure(side, side)
    axes = plain(figure.subplots(), x="most probable class", y="truth")
    axes.grid(False)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(np.ma.masked_where(counts == 0, share), cmap="Blues", vmin=-0.15, vmax=1)
    for row in range(k):
        for column in range(k):
            if counts[row, column]:
                colour = "white" if share[row, column] > 0.45 else INK
                say(axes, column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    named_ticks(axes, [short(name, 18) for name in classes], axis="x")
    named_ticks(axes, [short(name, 18) for name in classes], axis="y")
    return figure


def training_figure(history: Mapping[str, np.ndarray]) -> Figure:
    """Loss and accuracy of the network by epoch."""
    figure = new_figure(HALF, 2.6)
    left, right = figure.subplots(1, 2)
    plain(left, title="Cross-entropy, nat", x="epoch")
    plain(right, title="Accuracy", x="epoch")
    epochs = history["epoch"] + 1
    for axes, what in ((left, "loss"), (right, "accuracy")):
        axes.plot(epochs, history[f"train_{what}"], color=QUIET, label="train (augmented)")
        axes.plot(epochs, history[f"valid_{what}"], color=INK, label="valid")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return figure


def distance_figure(distances: Mapping[str, Interval], floor: float, limit: float) -> Figure:
    """How far each method's predictions are from those of NUTS.

    Args:
        distances: method -> mean total variation to NUTS's predictive, with its interval.
        floor: NUTS half against half.
        limit: what counts as close enough.
    """
    figure = new_figure(HALF, 2.7)
    axes = plain(figure.subplots(), title="Distance of the predictions to those of NUTS", x="mean total variation")
    names = list(distances)
    values, low, high = np.array([(distances[n].value, distances[n].low, distances[n].high) for n in names]).T
    colours = [COLOURS.get(n, INK) for n in names]
    axes.hlines(range(len(names)), low, high, color=colours, linewidth=2.5)
    axes.scatter(values, range(len(names)), color=colours, s=22, zorder=3)
    named_ticks(axes, [NAMES.get(n, n) for n in names], axis="y")
    axes.invert_yaxis()
    axes.axvline(limit, color=INK, linewidth=1, label="close enough: left of it")
    axes.axvline(floor, color=QUIET, linewidth=1, linestyle=":", label="NUTS, half against half")
    axes.set_xscale("log")
    wide = low[low > 0].min() * 100 < high.max() if (low > 0).any() else True
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def agreement_figure(moments: Mapping[str, tuple[np.ndarray, ...]]) -> Figure:
    """Means of the centred weights beside those of NUTS, and in a corner their median sds.

    Args:
        moments: method -> (mean, sd, NUTS mean, NUTS sd) of the centred weights, (K, D) each.
    """
    figure = new_figure(HALF, 2.7)
    panels = figure.subplots(1, len(moments), squeeze=False)[0]
    for axes, (method, (mean, sd, nuts_mean, nuts_sd)) in zip(panels, moments.items(), strict=True):
        plain(axes, title=NAMES.get(method, method))
        reach = 1.05 * max(np.abs(mean).max(), np.abs(nuts_mean).max(), 1e-12)
        axes.plot([-reach, reach], [-reach, reach], color=QUIET, linewidth=1, linestyle=":")
        axes.scatter(nuts_mean.ravel(), mean.ravel(), s=6, color=COLOURS.get(method, INK), alpha=0.6, linewidth=0)
        words = f"usual sd {two_digits(float(np.median(sd)))},\nunder NUTS {two_digits(float(np.median(nuts_sd)))}"
        say(axes, 0.97, 0.04, words, transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color=INK)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
    figure.supxlabel("mean under NUTS, logits per unit of the feature", fontsize=9, color=INK)
    figure.supylabel("mean under it", fontsize=9, color=INK)
    return figure


def weights_figure(
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]],
    classes: Sequence[str],
    chosen: Mapping[str, Sequence[tuple[int, int]]],
    unit: str = "logits per unit of the feature",
) -> Figure:
    """A few centred weights, mean and 90 % interval, one row a weight, one colour a method, one panel a reason.

    Args:
        moments: method -> (mean, sd) of the centred weights, (K, D) each.
        classes: K names.
        chosen: why -> the (label, feature) indices shown for it.
        unit: of the moments.
    """
    lengths = [len(weights) for weights in chosen.values()]
    figure = new_figure(HALF, 0.9 + 0.35 * len(chosen) + 0.32 * sum(lengths))
    panels = figure.subplots(len(chosen), 1, squeeze=False, sharex=True, height_ratios=lengths)[:, 0]
    offsets = np.linspace(-0.24, 0.24, len(moments))
    for axes, (title, weights) in zip(panels, chosen.items(), strict=True):
        plain(axes, title=title)
        rows, columns = np.array(weights).T
        for offset, (method, (mean, sd)) in zip(offsets, moments.items(), strict=True):
            axes.errorbar(
                mean[rows, columns],
                np.arange(len(weights)) + offset,
                xerr=1.645 * sd[rows, columns],
                fmt="o",
                markersize=3,
                color=COLOURS.get(method, INK),
                label=NAMES.get(method, method),
                elinewidth=1.2,
            )
        named_ticks(axes, [f"{short(classes[k], 12)}, feature {d}" for k, d in weights], axis="y")
        axes.invert_yaxis()
        axes.axvline(0, color=QUIET, linewidth=1)
    panels[-1].set_xlabel(f"mean and 90 % interval, {unit}", fontsize=9, color=INK)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(moments), fontsize=8, frameon=False)
    return figure


def trace_figure(lp: np.ndarray, energy: np.ndarray) -> Figure:
    """The log joint of every chain by draw, and the energies' spread beside their steps (Betancourt 2016).

    Args:
        lp, energy: (C, S).
    """
    figure = new_figure(HALF, 2.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    plain(left, title="Log joint, nat; a line a chain", x="draw")
    for chain, values in enumerate(lp):
        left.plot(values, linewidth=0.6, alpha=0.8, color=CHAINS[chain % len(CHAINS)])
    plain(right, title="Energy, density", x="nat, centred")
    centred = (energy - energy.mean(1, keepdims=True)).ravel()
    right.hist(centred, bins=30, density=True, color="#56B4E9", alpha=0.7, label="energy")
    right.hist(np.diff(energy, axis=1).ravel(), bins=30, density=True, histtype="step", color=INK, label="its steps")
    right.set_yticks([])
    figure.legend(loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return figure


def seeds_figure(seeds: Mapping[str, Any]) -> Figure:
    """What other trainings of the network move: accuracy, NLL, and a cell of the maps beside its posterior sd.

    Args:
        seeds: ``seeds.json``; the run's own training is the first of its lists.
    """
    figure = new_figure(HALF, 2.3)
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    for axes, key, words in zip(panels, ("accuracy", "nll"), ("Accuracy", "NLL, nat"), strict=False):
        plain(axes, title=words)
        values = np.array(seeds[key])
        axes.scatter(np.linspace(-0.2, 0.2, len(values))[1:], values[1:], s=22, color=QUIET, label="others")
        axes.scatter([-0.2], values[:1], s=26, color=COLOURS["laplace_full"], label="this training")
        axes.set_xlim(-0.6, 0.6)
        axes.set_xticks([])
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if key == "accuracy":
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.004))  # a dot at 1 is whole, and no tick is beyond it
    names = {"map_sd_posterior": "posterior", "map_sd_between": "trainings"}
    axes = plain(panels[2], title="Sd of a cell, logits")
    for place, key in enumerate(names):
        found = seeds["intervals"][key]
        axes.bar([place], [seeds[key]], width=0.55, color=[COLOURS["laplace_full"], QUIET][place])
        if found["low"] is not None:
            axes.vlines([place], found["low"], found["high"], color=INK, linewidth=1.2)
    axes.set_xticks(range(2), list(names.values()), fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    return figure


def write_figures(files: RunFiles) -> list[Path]:
    """Draw every figure of a run folder into ``figures/`` and return their paths."""
    folder = files.folder
    labels, patients, speaker = files.labels, files.patients, files.speaker
    compared = {name: files.moments(name) for name in _COMPARED}
    band = (speaker, *risk_band(files.probs(speaker), labels, patients))
    figures = {
        "reliability": reliability_figure({name: files.probs(name) for name in _shown_methods(files)}, labels),
        "risk_coverage": risk_coverage_figure({n: files.probs(n) for n in _shown_methods(files)}, labels, band),
        "confusion": confusion_figure(files.probs(speaker), labels, files.classes),
        "training": training_figure(_history(files)),
        "distance": distance_figure(
            {
                name: interval(
                    resampled_mean(_distances(files.probs(name), files.probs("nuts")), patients),
                    num_groups=count_groups(patients),
                )
                for name in COLOURS
                if name != "nuts"
            },
            files.comparison["predictive"]["nuts_half"]["total_variation"],
            files.limits["total_variation"],
        ),
        "agreement": agreement_figure({n: (*compared[n], *compared["nuts"]) for n in _COMPARED[:2]}),
        "effects": weights_figure(
            {name: effects(files, name) for name in _COMPARED},
            files.classes,
            {"What moves logits most": top_features(files)},
            "logits per sd of the feature",
        ),
        "weights": weights_figure(
            compared,
            files.classes,
            {
                "Furthest from Laplace to NUTS, in sds": largest_shift(
                    compared["laplace_full"][0], files.draws("nuts")[0], _NUM_WEIGHTS
                )[0],
                "Worst mixed in NUTS: largest R-hat": worst_rhat(files.draws("nuts")[0], _NUM_WEIGHTS)[0],
            },
        ),
        "trace": trace_figure(*files.traces()),
    }
    if files.seeds is not None:
        figures["seeds"] = seeds_figure(files.seeds)
    (folder / "figures").mkdir(exist_ok=True)
    written = []
    for name, figure in figures.items():
        with atomic_path(folder / "figures" / f"{name}.png") as temporary, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a name; the page itself writes it
            figure.savefig(temporary, dpi=150, format="png", transparent=True)
        written.append(folder / "figures" / f"{name}.png")
    return written + [_save(folder, name, picture) for name, picture in _pictures(files)]


def _shown_methods(files: RunFiles) -> list[str]:
    """Six of the methods: those that the page speaks of, and with them the best calibrated."""
    shown = {"cnn", "map", "laplace_full", "laplace_refined", "nuts"}
    errors = {name: row["ece"]["value"] for name, row in files.metrics["intervals"].items() if name not in shown}
    return [name for name in COLOURS if name in shown | {min(errors, key=errors.__getitem__)}]


def _pictures(files: RunFiles) -> list[tuple[str, np.ndarray]]:
    """The tiles of the gallery and of the features, by name."""
    found = [
        (tile_name(number, tile), picture)
        for group in gallery(files)
        for number, case in enumerate(group.cases, group.first)
        for tile, picture in tile_images(case, limit=group.limit, spread=group.spread).items()
    ]
    return found + [(f"feature-{number}", picture) for number, picture in enumerate(feature_images(files), 1)]


def _save(folder: Path, name: str, picture: np.ndarray) -> Path:
    path = folder / "figures" / f"{name}.png"
    with atomic_path(path) as temporary:
        Image.fromarray(picture).convert("RGB").save(temporary, format="png", optimize=True)
    return path


def _distances(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Total variation of two predictives by image, (N,)."""
    return 0.5 * np.abs(p - q).sum(1)


def _history(files: RunFiles) -> dict[str, np.ndarray]:
    rows = files.table("history.csv")
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
