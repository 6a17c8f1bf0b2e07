"""The figures of a run: plain arrays in, a matplotlib Figure out; ``write_figures`` makes them from a run folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bayescam.diagnose.calibration import consistency_band, reliability, risk_coverage
from bayescam.diagnose.intervals import Interval, count_groups, interval, resampled_mean
from bayescam.diagnose.selectors import Chosen, largest_effect, largest_shift, worst_rhat
from bayescam.diagnose.uncertainty import risk_band
from bayescam.report.cam_figures import scales_figure, strip_figure
from bayescam.report.cam_panels import CasePanels, cell_panels, shared_limit, shared_spread
from bayescam.report.run_files import RunFiles
from bayescam.report.style import COLOURS, INK, NAMES, QUIET, named_ticks, new_figure, plain, say
from bayescam.storage import atomic_path

_NUM_WEIGHTS = 6


def reliability_figure(probs: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    """Observed accuracy against stated confidence, one panel a method, with the band that chance alone would fill.

    Args:
        probs: method -> (N, K).
        labels: (N,).
    """
    figure = new_figure(2.0 * len(probs), 2.5)
    panels = figure.subplots(1, len(probs), squeeze=False)[0]
    for axes, (method, values) in zip(panels, probs.items(), strict=True):
        bins = reliability(values, labels)
        low, high = consistency_band(values)
        shown = bins.count > 0
        plain(axes, title=f"{NAMES.get(method, method)}\nECE {bins.ece:.3f}", x="confidence", y="")
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":")
        axes.vlines(bins.confidence[shown], low[shown], high[shown], color="#d9d9d9", linewidth=7)
        where, size = (bins.confidence[shown], bins.accuracy[shown]), 10 + 50 * bins.count[shown] / bins.count.max()
        axes.scatter(*where, s=size, color=COLOURS.get(method, INK), zorder=3, clip_on=False)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
    panels[0].set_ylabel("share correct", fontsize=9)
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
    figure = new_figure(4.8, 4)
    axes = plain(figure.subplots(), title="Handing over the least sure images", x="share kept", y="error among them")
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
    side = 1.9 + 0.45 * k
    figure = new_figure(side, side)
    axes = plain(figure.subplots(), title="Confusion, test images", x="most probable", y="truth")
    axes.grid(False)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(k):
        for column in range(k):
            if counts[row, column]:
                colour = "white" if share[row, column] > 0.5 else INK
                say(axes, column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    named_ticks(axes, classes, axis="x")
    named_ticks(axes, classes, axis="y")
    return figure


def training_figure(history: Mapping[str, np.ndarray]) -> Figure:
    """Loss and accuracy of the network by epoch."""
    figure = new_figure(5.2, 2.7)
    left, right = figure.subplots(1, 2)
    plain(left, title="Cross-entropy", x="epoch", y="nat")
    plain(right, title="Accuracy", x="epoch", y="share")
    epochs = history["epoch"] + 1
    for axes, what in ((left, "loss"), (right, "accuracy")):
        axes.plot(epochs, history[f"train_{what}"], color=QUIET, label="train (augmented)")
        axes.plot(epochs, history[f"valid_{what}"], color=INK, label="valid")
    right.legend(fontsize=8, frameon=False)
    return figure


def agreement_figure(
    distances: Mapping[str, Interval], floor: float, limit: float, moments: Mapping[str, tuple[np.ndarray, ...]]
) -> Figure:
    """How far each posterior's predictions are from NUTS, and its centred weights beside NUTS's.

    Args:
        distances: method -> mean total variation to NUTS's predictive, with its interval.
        floor: NUTS half against half.
        limit: what counts as close enough.
        moments: method -> (mean, sd, NUTS mean, NUTS sd) of the centred weights, (K, D) each.
    """
    figure = new_figure(3.4 + 2.9 * len(moments), 3.2)
    panels = figure.subplots(1, 1 + len(moments), width_ratios=[1.15, *[1] * len(moments)], squeeze=False)[0]
    dots = plain(panels[0], title="Distance of predictions to NUTS", x="", y="")
    names = list(distances)
    values, low, high = np.array([(distances[n].value, distances[n].low, distances[n].high) for n in names]).T
    colours = [COLOURS.get(n, INK) for n in names]
    dots.hlines(range(len(names)), low, high, color=colours, linewidth=2.5)
    dots.scatter(values, range(len(names)), color=colours, s=22, zorder=3)
    named_ticks(dots, [NAMES.get(n, n) for n in names], axis="y")
    dots.invert_yaxis()
    dots.axvline(limit, color=INK, linewidth=1)
    dots.axvline(floor, color=QUIET, linewidth=1, linestyle=":")
    dots.set_xscale("log")
    dots.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    dots.xaxis.set_major_formatter("{x:g}")
    dots.xaxis.set_minor_locator(NullLocator())
    dots.set_xlabel("mean total variation (line: close enough; dotted: noise floor)", fontsize=8)
    for axes, (method, (mean, sd, nuts_mean, nuts_sd)) in zip(panels[1:], moments.items(), strict=True):
        plain(axes, title="Centred weights", x="NUTS", y=NAMES.get(method, method))
        reach = 1.05 * max(np.abs(mean).max(), np.abs(nuts_mean).max())
        axes.plot([-reach, reach], [-reach, reach], color=QUIET, linewidth=1, linestyle=":")
        axes.errorbar(
            nuts_mean.ravel(),
            mean.ravel(),
            xerr=nuts_sd.ravel(),
            yerr=sd.ravel(),
            fmt="none",
            ecolor=COLOURS.get(method, INK),
            elinewidth=0.35,
            alpha=0.35,
        )
        axes.scatter(nuts_mean.ravel(), mean.ravel(), s=3, color=INK, zorder=3)
        axes.set_aspect("equal", adjustable="datalim")
    return figure


def weights_figure(
    moments: Mapping[str, tuple[np.ndarray, np.ndarray]],
    classes: Sequence[str],
    chosen: Mapping[str, Sequence[tuple[int, int]]],
) -> Figure:
    """A few centred weights, mean and 90 % interval, one row a weight, one colour a method, one panel a reason.

    Args:
        moments: method -> (mean, sd) of the centred weights, (K, D) each.
        classes: K names.
        chosen: why -> the (label, feature) indices shown for it.
    """
    lengths = [len(weights) for weights in chosen.values()]
    figure = new_figure(6.4, 1.1 + 0.4 * len(chosen) + 0.26 * sum(lengths))
    panels = figure.subplots(len(chosen), 1, squeeze=False, sharex=True, height_ratios=lengths)[:, 0]
    offsets = np.linspace(-0.22, 0.22, len(moments))
    for axes, (title, weights) in zip(panels, chosen.items(), strict=True):
        plain(axes, title=title, y="")
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
        named_ticks(axes, [f"{classes[k]}, feature {d}" for k, d in weights], axis="y")
        axes.invert_yaxis()
        axes.axvline(0, color=QUIET, linewidth=1)
    panels[-1].set_xlabel("centred weight, mean and 90 % interval, logits per unit", fontsize=9, color=INK)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(moments), fontsize=8, frameon=False)
    return figure


def trace_figure(lp: np.ndarray, energy: np.ndarray) -> Figure:
    """The log joint of every chain by draw, and the energies' spread beside their steps (Betancourt 2016).

    Args:
        lp, energy: (C, S).
    """
    figure = new_figure(5.2, 2.8)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    plain(left, title="Log joint by draw, one line a chain", x="draw", y="nat")
    for chain, values in enumerate(lp):
        left.plot(values, linewidth=0.6, alpha=0.8, color=list(COLOURS.values())[2 + chain % 6])
    plain(right, title="Energy", x="nat, centred", y="density")
    centred = (energy - energy.mean(1, keepdims=True)).ravel()
    right.hist(centred, bins=30, density=True, color="#56B4E9", alpha=0.7, label="energy")
    right.hist(np.diff(energy, axis=1).ravel(), bins=30, density=True, histtype="step", color=INK, label="its steps")
    figure.legend(loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return figure


def write_figures(folder: Path) -> list[Path]:
    """Draw every figure of a run folder into ``figures/`` and return their paths."""
    files, patients = RunFiles(folder), RunFiles(folder).patients
    labels, shown = files.labels, ("cnn", "map_temperature", "laplace_full", "laplace_refined", "nuts")
    probs = {name: files.probs(name) for name in shown}
    spread = files.centred_weights()
    nuts_mean, nuts_sd = spread["nuts"]
    figures = {
        "reliability": reliability_figure(probs, labels),
        "risk_coverage": risk_coverage_figure(probs, labels, ("nuts", *risk_band(probs["nuts"], labels, patients))),
        "confusion": confusion_figure(files.probs("nuts"), labels, files.classes),
        "training": training_figure(_history(folder / "history.csv")),
        "agreement": agreement_figure(
            {
                name: interval(
                    resampled_mean(_distances(files.probs(name), files.probs("nuts")), patients),
                    num_groups=count_groups(patients),
                )
                for name in COLOURS
                if name != "nuts"
            },
            files.comparison["predictive"]["nuts_half"]["total_variation"],
            files.tolerance,
            {n: (*spread[n], nuts_mean, nuts_sd) for n in ("laplace_full", "laplace_refined")},
        ),
        "weights": weights_figure(
            {n: spread[n] for n in ("laplace_full", "laplace_refined", "nuts")}, files.classes, _worth_a_look(files)
        ),
        "trace": trace_figure(*files.traces()),
        **_gallery(cam_cases(files)),
    }
    written = []
    for name, figure in figures.items():
        path = folder / "figures" / f"{name}.png"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
        written.append(path)
    return written


def _worth_a_look(files: RunFiles) -> dict[str, Chosen]:
    """The few weights that the report shows, by the reason for it."""
    draws, (mean, _) = files.nuts_weights, files.centred_weights()["laplace_full"]
    return {
        "Largest effect: mean x sd of the feature": largest_effect(draws.mean((0, 1)), files.features, _NUM_WEIGHTS)[0],
        "Furthest from Laplace to NUTS, in sds": largest_shift(mean, draws, _NUM_WEIGHTS)[0],
        "Worst mixed in NUTS: largest R-hat": worst_rhat(draws, _NUM_WEIGHTS)[0],
    }


def cam_cases(files: RunFiles) -> list[CasePanels]:
    """The gallery's radiographs with the map of each one's most probable class."""
    cams = files.cams
    marker = cams["marker_outranks"].values
    cases = []
    for i in range(cams.sizes["obs_id"]):
        probs = cams["probs"].values[i]
        k, truth = int(probs.argmax()), int(cams["y"].values[i])
        cases.append(
            cell_panels(
                cams["image"].values[i] / 255,
                cams["mean"].values[i, k],
                cams["sd"].values[i, k],
                label=k,
                classes=files.classes,
                probabilities=probs.tolist(),
                title=f"truth: {files.classes[truth]}",
                joint=cams["joint"].values[i],
                attribution=cams["attribution"].values[i],
                marker=None if np.isnan(marker[i]) else float(marker[i]),
            )
        )
    return cases


def _gallery(cases: Sequence[CasePanels]) -> dict[str, Figure]:
    """One picture a radiograph, "case-1" and so on, and the colour scales that they share."""
    limit, spread = shared_limit(cases), shared_spread(cases)
    strips = {f"case-{n}": strip_figure(case, limit=limit, spread=spread) for n, case in enumerate(cases, 1)}
    return {**strips, "scales": scales_figure(limit=limit, spread=spread)}


def _distances(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Total variation of two predictives by image, (N,)."""
    return 0.5 * np.abs(p - q).sum(1)


def _history(path: Path) -> dict[str, np.ndarray]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
