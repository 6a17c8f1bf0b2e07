"""The tiles that a CAM picture is put together from, each over the extent of the radiograph."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy.ndimage import gaussian_filter

from bayescam.report.cam_panels import CasePanels, percent

SIGNED, SPREAD, CHANCE = "RdBu_r", "cividis", "PuOr_r"
SURE = (0.75, 0.9, 0.975)
INK = "0.15"
_LINE = "0.45"


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
    """P(CAM > 0), outlined where it is at least ``level``: dashed point by point, solid jointly."""
    axis.imshow(case.above, cmap=CHANCE, vmin=0, vmax=1, extent=_extent(case), interpolation="nearest")
    _anatomy(axis, case)
    _contour(axis, case, case.above, level, "dashed")
    if case.joint is not None:
        _contour(axis, case, case.joint, level, "solid")
    if float(case.sd.max()) == 0:
        _say(axis, "sd is 0: P is 0 or 1", "white")
    _frame(axis, title)


def contour_handles(level: float, joint: bool) -> list[Line2D]:
    """What the outlines mean, for a legend."""
    dashed = Line2D([], [], color="black", linestyle="dashed", linewidth=1.2, label=f"{percent(level)} at each point")
    solid = Line2D([], [], color="black", linewidth=1.2, label=f"{percent(level)} jointly")
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


def short(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


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
