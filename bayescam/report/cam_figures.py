"""Pictures of class activation maps with their posterior: every colour has one meaning, in logits or in probability.

One signed scale for all images, centred at 0; nothing is stretched per image, flipped, clipped at 0 or hidden. Names of
files and classes are drawn as inert text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.ndimage import gaussian_filter

from bayescam.data.pixels import Geometry
from bayescam.explain.cam import CamPosterior
from bayescam.report.cam_panels import CasePanels, caption, case_panels, shared_limit, shared_spread
from bayescam.storage import printable

SIGNED, SPREAD, CHANCE = "RdBu_r", "cividis", "PuOr_r"
_INK, _LINE = "0.15", "0.45"
_SURE = (0.75, 0.9, 0.975)


def case_figure(
    image: np.ndarray,
    posterior: CamPosterior,
    *,
    label: int,
    classes: Sequence[str],
    probabilities: Sequence[float] | None = None,
    geometry: Geometry | None = None,
    limit: float | None = None,
    spread: float | None = None,
    title: str = "",
    level: float = 0.9,
    suppress: bool = False,
) -> Figure:
    """One radiograph with the map of one class: the image untouched, mean, sd, P(CAM > 0) with contours, probabilities.

    Args:
        image: (H, W) in [0, 1], the original.
        posterior: of this image alone (N = 1).
        label: the class whose map is drawn.
        classes: K names.
        probabilities: (K,) of the posterior predictive.
        geometry: how the network saw the image.
        limit: the colour scale of the mean goes from -limit to limit, logits; pass one for all images of a set.
        spread: the end of the sd's colour scale; this image's own without it.
        title: a line above, as it is.
        level: probability of the contours, solid for the joint region and dashed point by point.
        suppress: draw the mean in the value-suppressing palette: where its sign is unsure it fades.

    Raises:
        ValueError: more than one image, or numbers that are not finite.
    """
    case = case_panels(
        image,
        posterior,
        label=label,
        classes=classes,
        probabilities=probabilities,
        geometry=geometry,
        title=title,
    )
    return draw_case(case, limit=limit, spread=spread, level=level, suppress=suppress)


def draw_case(
    case: CasePanels,
    *,
    limit: float | None = None,
    spread: float | None = None,
    level: float = 0.9,
    suppress: bool = False,
) -> Figure:
    """``case_figure`` from panels already made."""
    limit, spread = limit or shared_limit([case]), spread or shared_spread([case])
    aspect = case.image.shape[0] / case.image.shape[1]
    count = 4 if case.probabilities is None else 5
    panels = 2.4 * min(aspect, 1.8) + 1.5
    figure = _figure(2.75 * count, panels + 0.65)
    grid = figure.add_gridspec(2, 1, height_ratios=[panels, 0.65])
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = top.subplots(1, count)
    _title(top, case.title)
    _radiograph(axes[0], case, "radiograph")
    _mean(axes[1], case, limit, suppress, f"evidence for {case.classes[case.label]}, mean")
    _sd(axes[2], case, spread, "its posterior sd")
    _chance(axes[3], case, level, "P(evidence > 0)")
    if suppress:
        _suppressing_key(top, axes[1], limit)
    else:
        _bar(top, axes[1], SIGNED, Normalize(-limit, limit), "logits")
    _bar(top, axes[2], SPREAD, Normalize(0, spread), "logits")
    jointly = "" if case.joint is None else f"; solid: {level:.0%} jointly"
    _bar(top, axes[3], CHANCE, Normalize(0, 1), f"probability\ndashed: {level:.0%} at each point{jointly}")
    if case.probabilities is not None:
        _probabilities(axes[4], case, aspect)
    _words(bottom, caption(case, level=level), width=int(13.5 * figure.get_figwidth()))
    return figure


def gallery_figure(
    cases: Sequence[CasePanels], *, limit: float | None = None, level: float = 0.9, columns: int = 2, title: str = ""
) -> Figure:
    """Many radiographs on shared scales: four tiles each (radiograph, mean, sd, P(CAM > 0)), ``columns`` cases a row.

    Args:
        cases: from ``case_panels`` or ``cell_panels``.
        limit: the end of the mean's colour scale; the largest |mean| of all cases without it.
        level: probability of the contours.
        columns: cases in a row.
        title: a line above.
    """
    if not cases:
        raise ValueError("cases is empty; pass at least one")
    limit, spread = limit or shared_limit(cases), shared_spread(cases)
    columns = min(columns, len(cases))
    rows = -(-len(cases) // columns)
    figure = _figure(6.5 * columns, 1.9 * rows + 1.2)
    grid = figure.add_gridspec(2, 1, height_ratios=[1.9 * rows, 1.0])
    blocks, scales = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _title(blocks, printable(title, 120))
    tiles = blocks.subplots(rows, 5 * columns, squeeze=False, width_ratios=[1, 1, 1, 1, 0.12] * columns)
    for axis in tiles.flat:
        axis.set_axis_off()
    for number, case in enumerate(cases):
        row, column = divmod(number, columns)
        radiograph, mean, sd, chance = tiles[row, 5 * column : 5 * column + 4]
        _radiograph(radiograph, case, case.title)
        _mean(mean, case, limit, False, _heading(case))
        _sd(sd, case, spread, "sd")
        _chance(chance, case, level, "P(evidence > 0)")
    words, *bars = scales.subplots(1, 4, width_ratios=[0.6, 1, 1, 1])
    words.set_axis_off()
    named = (
        (SIGNED, Normalize(-limit, limit), "mean evidence, logits (0: the average class)"),
        (SPREAD, Normalize(0, spread), "posterior sd, logits"),
        (CHANCE, Normalize(0, 1), f"P(evidence > 0); contours at {level:.0%}"),
    )
    for axis, (colours, norm, text) in zip(bars, named, strict=True):
        axis.set_axis_off()
        bar = figure.colorbar(
            ScalarMappable(norm, colours), ax=axis, orientation="horizontal", fraction=0.35, aspect=22
        )
        bar.set_label(text, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    handles = _contour_handles(level, any(case.joint is not None for case in cases))
    words.legend(handles=handles, loc="center", fontsize=7, frameon=False)
    return figure


def value_suppressing(mean: np.ndarray, sureness: np.ndarray, limit: float) -> np.ndarray:
    """Colours (..., 3) of a value-suppressing palette: the less sure the sign, the fewer and the greyer the colours.

    Sureness is P(the sign is that of the mean); from 0.975 up there are 8 colours from -limit to limit, from 0.9 up 4,
    from 0.75 up 2, and one grey below. (The sd itself would not do: it grows with the evidence.)

    Source: Correll, Moritz and Heer 2018.
    """
    step = 3 - np.searchsorted(_SURE, sureness, side="right")
    bins = 8 >> step
    at = np.clip(np.floor((mean / limit + 1) / 2 * bins), 0, bins - 1)
    colours = colormaps[SIGNED]((at + 0.5) / bins)[..., :3]
    grey = np.array([0.86, 0.86, 0.86])
    return colours + (grey - colours) * (step / 3)[..., None]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _extent(case: CasePanels) -> tuple[float, float, float, float]:
    height, width = case.image.shape
    return (0, width, height, 0)


def _radiograph(axis: Axes, case: CasePanels, title: str) -> None:
    axis.imshow(case.image, cmap="gray", vmin=0, vmax=1, extent=_extent(case), interpolation="nearest")
    _frame(axis, title)


def _mean(axis: Axes, case: CasePanels, limit: float, suppress: bool, title: str) -> None:
    if suppress:
        picture: dict[str, Any] = {"X": value_suppressing(case.mean, case.sureness, limit)}
    else:
        picture = {"X": case.mean, "cmap": SIGNED, "vmin": -limit, "vmax": limit}
    axis.imshow(**picture, extent=_extent(case), interpolation="nearest")
    _anatomy(axis, case)
    if case.is_flat:
        axis.text(0.5, 0.5, "flat map", transform=axis.transAxes, ha="center", va="center", fontsize=9, color=_INK)
    _frame(axis, title)


def _sd(axis: Axes, case: CasePanels, spread: float, title: str) -> None:
    axis.imshow(case.sd, cmap=SPREAD, vmin=0, vmax=spread, extent=_extent(case), interpolation="nearest")
    _anatomy(axis, case)
    if float(case.sd.max()) == 0:
        axis.text(0.5, 0.5, "sd is 0", transform=axis.transAxes, ha="center", va="center", fontsize=9, color="white")
    _frame(axis, title)


def _chance(axis: Axes, case: CasePanels, level: float, title: str) -> None:
    axis.imshow(case.above, cmap=CHANCE, vmin=0, vmax=1, extent=_extent(case), interpolation="nearest")
    _anatomy(axis, case)
    _contour(axis, case, case.above, level, "dashed")
    if case.joint is not None:
        _contour(axis, case, case.joint, level, "solid")
    _frame(axis, title)


def _contour(axis: Axes, case: CasePanels, values: np.ndarray, level: float, style: str) -> None:
    """The outline of values >= level; the picture's border closes it, so that a region at the edge is whole."""
    if not values.min() < level <= values.max():
        return
    if not case.interpolated:
        values = np.kron(values, np.ones((16, 16)))
    height, width = case.image.shape
    y = (np.arange(values.shape[0]) + 0.5) * height / values.shape[0]
    x = (np.arange(values.shape[1]) + 0.5) * width / values.shape[1]
    axis.contour(x, y, values, levels=[level], colors="black", linewidths=1.3, linestyles=style)


def _anatomy(axis: Axes, case: CasePanels) -> None:
    """Thin outlines of the radiograph, which leave the colours as they are."""
    smooth = gaussian_filter(case.image, 0.015 * max(case.image.shape))
    if np.ptp(smooth) < 1e-3:
        return
    levels = np.unique(np.quantile(smooth[smooth > smooth.min()], [0.35, 0.75]))
    height, width = case.image.shape
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    axis.contour(x, y, smooth, levels=levels, colors=_LINE, linewidths=0.5, alpha=0.8)


def _contour_handles(level: float, joint: bool) -> list[Line2D]:
    dashed = Line2D([], [], color="black", linestyle="dashed", linewidth=1.2, label=f"{level:.0%} at each point")
    solid = Line2D([], [], color="black", linewidth=1.2, label=f"{level:.0%} jointly")
    return [dashed, solid] if joint else [dashed]


def _probabilities(axis: Axes, case: CasePanels, aspect: float) -> None:
    assert case.probabilities is not None
    places = np.arange(len(case.classes))
    colours = ["#2166ac" if k == case.label else "0.7" for k in places]
    axis.barh(places, case.probabilities, color=colours)
    axis.set_yticks(places, case.classes, fontsize=7.5, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28)
    axis.set_xticks([])
    for place, value in enumerate(case.probabilities):
        axis.text(value + 0.03, place, f"{value:.3f}", va="center", fontsize=7.5)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_box_aspect(min(aspect, 1.6))
    axis.set_title("posterior predictive", fontsize=9, parse_math=False)


def _bar(parent: Any, axis: Axes, colours: str, norm: Normalize, unit: str, *, height: float = 0.05) -> Axes:
    bar = parent.colorbar(
        ScalarMappable(norm, colours),
        ax=axis,
        orientation="horizontal",
        fraction=height,
        pad=0.03,
        shrink=0.85,
        aspect=1 / height,
    )
    bar.set_label(unit, fontsize=7.5)
    bar.ax.tick_params(labelsize=7)
    return bar.ax


def _suppressing_key(parent: Any, axis: Axes, limit: float) -> None:
    """The key of the value-suppressing palette: the mean to the right, sureness of its sign upwards."""
    key = _bar(parent, axis, SIGNED, Normalize(-limit, limit), "", height=0.15)
    key.clear()
    steps = np.array([*_SURE[::-1], 0.5])
    mean, sureness = np.meshgrid(np.linspace(-limit, limit, 161)[:-1] + limit / 160, steps)
    key.imshow(value_suppressing(mean, sureness, limit), extent=(-limit, limit, 4, 0), aspect="auto")
    key.set_xlabel("mean, logits; upwards: P(its sign)", fontsize=7.5)
    key.set_yticks([1, 2, 3], [f"{step:g}" for step in steps[:-1]])
    key.tick_params(labelsize=6, length=2)


def _heading(case: CasePanels) -> str:
    name = case.classes[case.label]
    return name if case.probabilities is None else f"{name}, p = {case.probabilities[case.label]:.2f}"


def _frame(axis: Axes, title: str) -> None:
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("0.8")
        spine.set_linewidth(0.5)
    axis.set_anchor("N")
    axis.set_title(title, fontsize=8.5, parse_math=False)


def _title(parent: Any, title: str) -> None:
    if title:
        parent.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)


def _words(parent: Any, text: str, width: int) -> None:
    parent.text(0.01, 0.95, textwrap.fill(text, width), fontsize=8, va="top", ha="left", color=_INK, parse_math=False)
