"""How methods fare as images are corrupted, and how well their uncertainty tells images of something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayescam.diagnose.intervals import Interval
from bayescam.report.style import COLOURS, QUIET, named_ticks, new_figure, plain, say
from bayescam.report.wording import NAMES

# Rows that are no posterior of the last layer; drawn dashed.
PEERS = {"mc_dropout": "MC dropout", "deep_ensemble": "deep ensemble"}
_PEER_COLOURS = {"mc_dropout": "#8c564b", "deep_ensemble": "#bcbd22"}
MARKS = {"entropy": "o", "mutual information": "x"}


def title(method: str) -> str:
    """How a method is called in pictures and tables."""
    return PEERS.get(method) or NAMES.get(method, method)


def shift_figure(
    nll: Mapping[str, Mapping[str, Sequence[Interval]]], auroc: Mapping[str, Mapping[str, Interval]]
) -> Figure:
    """NLL against severity, one panel a corruption, and a last panel on unknown images.

    Args:
        nll: corruption -> method -> one interval a severity, 0 (clean) first.
        auroc: method -> score ("entropy", "mutual information") -> how well it tells unknown images; empty where there
            are none.
    """
    num_panels = len(nll) + 1
    figure = new_figure(10, 3.1 * -(-num_panels // 3) + 0.4)
    panels = figure.subplots(-(-num_panels // 3), 3, squeeze=False).ravel()
    for axes in panels[num_panels:]:
        axes.set_axis_off()
    for axes, (corruption, methods) in zip(panels, nll.items(), strict=False):
        _against_severity(plain(axes, title=corruption, x="severity", y="NLL, nat"), methods)
    last = panels[len(nll)]
    if auroc:
        _unknown(plain(last, title="images of something else"), auroc)
    else:
        last.set_axis_off()
        say(last, 0.5, 0.5, "no images of something else", ha="center", va="center", fontsize=9, color=QUIET)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _against_severity(axes: Axes, methods: Mapping[str, Sequence[Interval]]) -> None:
    for place, (method, found) in enumerate(methods.items()):
        severity = [s + 0.05 * (place - (len(methods) - 1) / 2) for s in range(len(found))]
        colour = _colour(method)
        axes.plot(
            severity,
            [one.value for one in found],
            "--" if method in PEERS else "-",
            marker="o",
            markersize=3,
            linewidth=1.3,
            color=colour,
            label=title(method),
        )
        axes.vlines(severity, [one.low for one in found], [one.high for one in found], color=colour, linewidth=0.8)
    axes.set_ylim(bottom=0)


def _unknown(axes: Axes, auroc: Mapping[str, Mapping[str, Interval]]) -> None:
    for place, (method, scores) in enumerate(auroc.items()):
        for score, one in scores.items():
            row = place + 0.15 * (1 if score == "entropy" else -1)
            axes.plot([one.value], [row], MARKS[score], markersize=4, color=_colour(method))
            axes.hlines([row], [one.low], [one.high], color=_colour(method), linewidth=1.2)
    axes.axvline(0.5, color="0.6", linewidth=0.8, linestyle=":")
    named_ticks(axes, [title(method) for method in auroc], axis="y")
    axes.set_ylim(len(auroc) - 0.4, -0.6)
    axes.set_xlabel("AUROC (dot: entropy, cross: mutual information)", fontsize=7)


def _colour(method: str) -> str:
    return _PEER_COLOURS.get(method) or COLOURS.get(method, QUIET)
