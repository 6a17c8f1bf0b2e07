"""Pictures of class activation maps with their posterior: every colour has one meaning, in logits or in probability.

One signed scale for all images, centred at 0; nothing is stretched per image, flipped, clipped at 0 or hidden. Names of
files and classes are drawn as inert text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayescam.data.pixels import Geometry
from bayescam.explain.cam import CamPosterior
from bayescam.report.cam_panels import (
    CasePanels,
    Chance,
    caption,
    case_panels,
    shared_limit,
    shared_spread,
    shown_chance,
)
from bayescam.report.cam_tiles import (
    CHANCE,
    INK,
    SIGNED,
    SPREAD,
    SURE,
    contour_handles,
    draw_chance,
    draw_mean,
    draw_radiograph,
    draw_sd,
    value_suppressing,
)
from bayescam.report.wording import chance, percent, short
from bayescam.storage import printable

_MOST_CLASSES = 12


def case_figure(
    image: np.ndarray,
    posterior: CamPosterior,
    *,
    label: int,
    classes: Sequence[str],
    probabilities: Sequence[float] | None = None,
    interval: tuple[float, float] | None = None,
    geometry: Geometry | None = None,
    limit: float | None = None,
    spread: float | None = None,
    title: str = "",
    level: float = 0.9,
    suppress: bool = False,
) -> Figure:
    """One radiograph with the map of one class: the image untouched, mean, sd, where it stands out, probabilities.

    Args:
        image: (H, W) in [0, 1], the original.
        posterior: of this image alone (N = 1).
        label: the class whose map is drawn.
        classes: K names.
        probabilities: (K,) of the posterior predictive.
        interval: the 90 % credible interval of the most probable class's probability.
        geometry: how the network saw the image.
        limit: the colour scale of the mean goes from -limit to limit, logits; pass one for all images of a set.
        spread: the end of the sd's colour scale; this image's own without it.
        title: a line above, as it is.
        level: probability of the contours, solid for places all at once and dashed for each by itself.
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
        interval=interval,
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
    height = 2.45 * min(case.image.shape[0] / case.image.shape[1], 1.8)
    count = 4 if case.probabilities is None else 5
    figure = _figure(2.75 * count, height + 2.2)
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr, call-arg]
    grid = figure.add_gridspec(2, 1, height_ratios=[height + 1.5, 0.7])
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    panels, bars = top.subplots(2, count, height_ratios=[height, 0.4])
    for axis in bars:
        axis.set_axis_off()
    _title(top, case.title)
    draw_radiograph(panels[0], case, "radiograph")
    draw_mean(panels[1], case, limit, suppress, f"evidence for {short(case.classes[case.label], 16)}, mean")
    draw_sd(panels[2], case, spread, "its posterior sd")
    shown = shown_chance(case)
    draw_chance(panels[3], case, level, shown.name)
    if suppress:
        _suppressing_key(bars[1], limit)
    else:
        _bar(bars[1], SIGNED, Normalize(-limit, limit), "logits")
    _bar(bars[2], SPREAD, Normalize(0, spread), "logits")
    together = "" if shown.jointly is None else "; solid: all at once"
    outlines = f"dashed: {percent(level)}, each place by itself{together}"
    _bar(bars[3], CHANCE, Normalize(0, 1), f"{shown.words}\n{outlines}")
    if case.probabilities is not None:
        _probabilities(panels[4], case)
    _words(bottom, caption(case, level=level), width=int(17 * figure.get_figwidth()))
    return figure


def gallery_figure(
    cases: Sequence[CasePanels], *, limit: float | None = None, level: float = 0.9, columns: int = 2, title: str = ""
) -> Figure:
    """Many radiographs on shared scales: the four tiles of ``case_figure`` each, ``columns`` cases a row.

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
        _strip(tiles[row, 5 * column : 5 * column + 4], case, limit, spread, level)
    _scales(figure, scales, limit, spread, level, shown_chance(cases[0]))
    return figure


def _strip(tiles: Iterable[Axes], case: CasePanels, limit: float, spread: float, level: float) -> None:
    radiograph, mean, sd, probability = tiles
    draw_radiograph(radiograph, case, short(case.title, 16))
    draw_mean(mean, case, limit, False, _heading(case))
    draw_sd(sd, case, spread, "sd")
    draw_chance(probability, case, level, shown_chance(case).name)


def _scales(figure: Figure, place: Any, limit: float, spread: float, level: float, shown: Chance) -> None:
    words, *bars = place.subplots(1, 4, width_ratios=[0.6, 1, 1, 1])
    words.set_axis_off()
    named = (
        (SIGNED, Normalize(-limit, limit), "mean evidence, logits\n(0: the average class)"),
        (SPREAD, Normalize(0, spread), "posterior sd, logits"),
        (CHANCE, Normalize(0, 1), f"{shown.words}\noutlines at {percent(level)}"),
    )
    for axis, (colours, norm, text) in zip(bars, named, strict=True):
        axis.set_axis_off()
        bar = figure.colorbar(
            ScalarMappable(norm, colours),
            ax=axis,
            orientation="horizontal",
            fraction=0.35,
            aspect=22,
            ticks=MaxNLocator(4),
        )
        bar.set_label(text, fontsize=7.5)
        bar.ax.tick_params(labelsize=7)
    handles = contour_handles(level, shown.jointly is not None)
    words.legend(handles=handles, loc="center", fontsize=8, frameon=False)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _probabilities(axis: Axes, case: CasePanels) -> None:
    """Bars of the classes in their order, or of the likeliest where they are many."""
    assert case.probabilities is not None
    chances, chosen, title = np.array(case.probabilities), np.arange(len(case.classes)), "posterior predictive"
    if len(chosen) > _MOST_CLASSES:
        chosen = np.argsort(-chances, kind="stable")[:_MOST_CLASSES]
        title += f", {_MOST_CLASSES} likeliest of {len(chances)}"
    places = np.arange(len(chosen))
    axis.barh(places, chances[chosen], color=["#2166ac" if k == case.label else "0.7" for k in chosen])
    axis.set_yticks(places, [short(case.classes[k], 16) for k in chosen], fontsize=7.5, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28)
    axis.set_xticks([])
    for place, value in enumerate(chances[chosen].tolist()):
        axis.text(value + 0.03, place, f"{value:.3f}", va="center", fontsize=7.5)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_title(title, fontsize=8.5, parse_math=False)


def _bar(axis: Axes, colours: str, norm: Normalize, unit: str) -> None:
    """A colour bar with its unit in an axis of its own."""
    axis.set_axis_on()
    axis.set_box_aspect(0.05)
    axis.set_anchor("N")
    bar = axis.figure.colorbar(ScalarMappable(norm, colours), cax=axis, orientation="horizontal", ticks=MaxNLocator(5))
    bar.set_label(unit, fontsize=7.5)
    bar.ax.tick_params(labelsize=7)


def _suppressing_key(axis: Axes, limit: float) -> None:
    """The key of the value-suppressing palette: the mean to the right, sureness of its sign upwards."""
    axis.set_axis_on()
    steps = np.array([*SURE[::-1], 0.5])
    mean, sureness = np.meshgrid(np.linspace(-limit, limit, 161)[:-1] + limit / 160, steps)
    axis.imshow(value_suppressing(mean, sureness, limit), extent=(-limit, limit, 4, 0), aspect="auto")
    axis.set_box_aspect(0.15)
    axis.set_anchor("N")
    axis.set_xlabel("mean, logits; upwards: P(its sign)", fontsize=7.5)
    axis.set_yticks([1, 2, 3], [f"{step:g}" for step in steps[:-1]])
    axis.tick_params(labelsize=7, length=2)


def _heading(case: CasePanels) -> str:
    name = short(case.classes[case.label], 12)
    return name if case.probabilities is None else f"{name}\np {_equals(chance(case.probabilities[case.label]))}"


def _equals(words: str) -> str:
    return words if words[0] in "<>" else f"= {words}"


def _title(parent: Any, title: str) -> None:
    if title:
        parent.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)


def _words(parent: Any, text: str, width: int) -> None:
    parent.text(0.01, 0.95, textwrap.fill(text, width), fontsize=8, va="top", ha="left", color=INK, parse_math=False)
