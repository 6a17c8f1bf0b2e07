"""Do the credible bands of the maps hold the truth as often as they say? One panel a kind of truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from bayescam.report.style import COLOURS, INK, QUIET, new_figure, plain
from bayescam.report.wording import NAMES, percent


def coverage_figure(shares: Mapping[str, Mapping[str, np.ndarray]], levels: Sequence[float]) -> Figure:
    """Coverage less the stated probability, in percentage points, with 95 % Monte Carlo intervals.

    Args:
        shares: truth -> posterior -> (R, L), the share of the maps' cells within the band of each level, a row for each
            of R >= 2 independent training sets.
        levels: L stated probabilities.
    """
    figure = new_figure(3.3 * len(shares) + 1.6, 3.3)
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for axes, (truth, posteriors) in zip(panels, shares.items(), strict=True):
        plain(axes, title=truth, x="stated probability of the band", y="")
        axes.axhline(0, color=INK, linewidth=1)
        offsets = np.linspace(-0.3, 0.3, len(posteriors))
        for offset, (name, found) in zip(offsets, posteriors.items(), strict=True):
            error = 196 * found.std(0, ddof=1) / np.sqrt(len(found))
            axes.errorbar(
                np.arange(len(levels)) + offset,
                100 * (found.mean(0) - np.asarray(levels)),
                yerr=error,
                fmt="o",
                markersize=4,
                elinewidth=1.2,
                color=COLOURS.get(name, QUIET),
                label=NAMES.get(name, name),
            )
        axes.set_xticks(range(len(levels)), [percent(level) for level in levels])
        axes.set_xlim(-0.5, len(levels) - 0.5)
    panels[0].set_ylabel("coverage less stated, percentage points\n(above 0: wider than need be)", fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False)
    return figure
