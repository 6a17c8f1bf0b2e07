"""How every figure of the report looks: colours that the colour-blind tell apart, names as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from bayescam.report.wording import short

INK, QUIET = "#222222", "#8a8a8a"
FAINT = (0, 0, 0, 0.1)  # of the grid: an ink, so that it shows on white and, inverted, on black
HALF = 4.8  # inches: half the report's page, and all of a telephone's
# Okabe and Ito (2008): told apart with every common colour deficiency.
COLOURS = {
    "cnn": "#8a8a8a",
    "map": "#000000",
    "map_temperature": "#E69F00",
    "laplace_diag": "#CC79A7",
    "laplace_kron": "#56B4E9",
    "laplace_full": "#0072B2",
    "laplace_refined": "#009E73",
    "nuts": "#D55E00",
}
CHAINS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")  # no two of a hue


def new_figure(width: float, height: float) -> Figure:
    """A white figure that needs no screen; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> Axes:
    """Titles and labels, no box, a quiet grid."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def named_ticks(axes: Axes, names: Sequence[str], *, axis: str) -> None:
    """Names from users as tick labels: never mathtext."""
    labels = [short(name, 24) for name in names]
    if axis == "x":
        texts = axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", fontsize=8)
        written = axes.get_xticklabels()
    else:
        texts = axes.set_yticks(range(len(names)), labels, fontsize=8)
        written = axes.get_yticklabels()
    del texts
    for text in written:
        text.set_parse_math(False)


def say(axes: Axes, x: float, y: float, words: str, **options: object) -> Text:
    """Text in a picture, never mathtext."""
    return axes.text(x, y, words, parse_math=False, **options)  # type: ignore[arg-type]
