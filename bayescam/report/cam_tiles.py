"""The tiles that a CAM picture is put together from, each over the extent of the radiograph."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, withStroke
from scipy.ndimage import gaussian_filter

from bayescam.report.cam_panels import CasePanels, shown_chance
from bayescam.report.wording import percent

SIGNED, SPREAD, CHANCE = "RdBu_r", "cividis", "PuOr_r"
SURE = (0.75, 0.9, 0.975)
INK = "0.15"
TILES = ("radiograph", "evidence", "sd", "chance")
_LINE = "0.35"
_PIXELS = 288  # along the longer side of a tile
_STROKE: list[AbstractPathEffect] = [withStroke(linewidth=3, foreground="white")]  # shows on any colour


def value_suppressing(mean: np.ndarray, sureness: np.ndarray, limit: float) -> np.ndarray:
    """Colours (..., 3) of a value-suppressing palette: the less sure the sign, the fewer and the greyer the colours.

    Sureness is P(the sign is that of the mean); from 0.975 up there are 8 colours from -limit to limit, from 0.9 up 4,
    from 0.75 up 2, and one grey below. (The sd itself would not do: it grows with the evidence.)

    Source: Correll, Moritz and Heer 2018.
    """
    step = 3 - np.searchsorted(SURE, sureness, side="right")
    bins = 8 >> step
    at = np.clip(np.floor((mean / limit + 1) / 2 * bins), 0, bins - 1)
    colours = colormaps[SIGNED]((at + 0.5) / bins)[..., :3]
    grey = np.array([0.86, 0.86, 0.86])
    return colours + (grey - colours) * (step / 3)[..., None]


def tile_images(case: CasePanels, *, limit: float, spread: float, level: float = 0.9) -> dict[str, np.ndarray]:
    """The four tiles of ``TILES`` as pictures without a word, RGBA (H, W, 4) uint8.

    Args:
        case: what is shown.
        limit: the colours of the mean go from -limit to limit, logits.
        spread: those of the sd from 0 to it.
        level: probability of the outlines.
    """
    height, width = case.image.shape
    scale = _PIXELS / max(height, width)
    down, across = round(height * scale), round(width * scale)
    figure = Figure(figsize=(4 * across / 144, down / 144), dpi=144)
    canvas = FigureCanvasAgg(figure)
    axes = [figure.add_axes((place / 4, 0, 0.25, 1)) for place in range(4)]
    draw_radiograph(axes[0], case, "")
    draw_mean(axes[1], case, limit, False, "")
    draw_sd(axes[2], case, spread, "")
    draw_chance(axes[3], case, level, "")
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())
    return dict(zip(TILES, np.array_split(drawn, 4, axis=1), strict=True))


def colour_stops(name: str, count: int = 17) -> list[str]:
    """The colours of a scale from its low to its high end, as #rrggbb."""
    return [to_hex(colour) for colour in colormaps[name](np.linspace(0, 1, count))]


def draw_radiograph(axis: Axes, case: CasePanels, title: str) -> None:
    """The image as it came, 0 black and 1 white."""
    axis.imshow(case.image, cmap="gray", vmin=0, vmax=1, extent=_extent(case), interpolation="nearest")
    _frame(axis, title)


def draw_mean(axis: Axes, case: CasePanels, limit: float, suppress: bool, title: str) -> None:
    """The mean from -limit to limit, or in the value-suppressing palette; a flat map says so."""
    if suppress:
        picture: dict[str, Any] = {"X": value_suppressing(case.mean, case.sureness, limit)}
    else:
        picture = {"X": case.mean, "cmap": SIGNED, "vmin": -limit, "vmax": limit}
    axis.imshow(**picture, extent=_extent(case), interpolation="nearest")
    _anatomy(axis, case)
    if case.is_flat:
        _say(axis, "flat map", INK)
    _frame(axis, title)


def draw_sd(axis: Axes, case: CasePanels, spread: float, title: str) -> None:
    """The sd from 0 to ``spread``."""
    axis.imshow(case.sd, cmap=SPREAD, vmin=0, vmax=spread, extent=_extent(case), interpolation="nearest")
    _anatomy(axis, case)
    if float(case.sd.max()) == 0:
        _say(axis, "sd is 0", "white")
    _frame(axis, title)


def draw_chance(axis: Axes, case: CasePanels, level: float, title: str) -> None:
    """``shown_chance``, outlined where it is at least ``level``: dashed each place by itself, solid all at once."""
    shown = shown_chance(case)
    axis.imshow(shown.alone, cmap=CHANCE, vmin=0, vmax=1, extent=_extent(case), interpolation="nearest")
    _anatomy(axis, case)
    _contour(axis, case, shown.alone, level, "dashed")
    if shown.jointly is not None:
        _contour(axis, case, shown.jointly, level, "solid")
    if case.is_flat:
        _say(axis, "flat map", "white")
    elif float(case.sd.max()) == 0:
        _say(axis, "sd is 0: P is 0 or 1", "white")
    _frame(axis, title)


def contour_handles(level: float, joint: bool) -> list[Line2D]:
    """What the outlines mean, for a legend."""
    dashed = Line2D([], [], color="black", linestyle="dashed", linewidth=1.2, label=f"{percent(level)}, each by itself")
    solid = Line2D([], [], color="black", linewidth=1.2, label=f"{percent(level)}, all at once")
    return [dashed, solid] if joint else [dashed]


def _contour(axis: Axes, case: CasePanels, values: np.ndarray, level: float, style: str) -> None:
    """The outline of values >= level; the picture's border closes it, so that a region at the edge is whole."""
    if not values.min() < level <= values.max():
        return
    if not case.interpolated:
        values = np.kron(values, np.ones((16, 16)))
    height, width = case.image.shape
    y = (np.arange(values.shape[0]) + 0.5) * height / values.shape[0]
    x = (np.arange(values.shape[1]) + 0.5) * width / values.shape[1]
    lines = axis.contour(x, y, values, levels=[level], colors="black", linewidths=1.4, linestyles=style)
    if style == "solid":
        lines.set_path_effects(_STROKE)


def _anatomy(axis: Axes, case: CasePanels) -> None:
    """A few thin outlines of the radiograph, which leave the colours as they are; small ones are left out."""
    side = max(case.image.shape)
    smooth = gaussian_filter(case.image, 0.03 * side)
    if np.ptp(smooth) < 1e-3:
        return
    level = smooth.mean()  # between a dark ground and the body, however much of the picture each takes
    height, width = case.image.shape
    found = axis.contour(np.arange(width) + 0.5, np.arange(height) + 0.5, smooth, levels=[level], linewidths=0)
    pieces = [piece for piece in found.allsegs[0] if np.hypot(*np.diff(piece, axis=0).T).sum() > 0.5 * side]
    found.remove()
    axis.add_collection(LineCollection(pieces, colors=_LINE, linewidths=0.6, alpha=0.7), autolim=False)


def _say(axis: Axes, words: str, colour: str) -> None:
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", fontsize=9, color=colour)


def _frame(axis: Axes, title: str) -> None:
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("0.8")
        spine.set_linewidth(0.5)
    axis.set_anchor("N")
    axis.set_title(title, fontsize=8.5, parse_math=False)


def _extent(case: CasePanels) -> tuple[float, float, float, float]:
    height, width = case.image.shape
    return (0, width, height, 0)
