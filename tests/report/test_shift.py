"""The picture of shift draws the numbers it is given, and says where there are no unknown images."""

from __future__ import annotations

import numpy as np
import pytest

from bayescam.diagnose.intervals import Interval
from bayescam.report.shift import shift_figure


def _one(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.2)


NLL = {
    corruption: {"cnn": [_one(base + s) for s in range(3)], "mc_dropout": [_one(base + 2 * s) for s in range(3)]}
    for corruption, base in (("blur", 0.5), ("noise", 1.0))
}


def test_every_curve_is_drawn_with_its_intervals_and_a_peer_is_dashed():
    panels = shift_figure(NLL, {}).axes
    assert [axes.get_title(loc="left") for axes in panels[:2]] == ["blur", "noise"]
    cnn, dropout = panels[1].get_lines()
    assert np.asarray(cnn.get_ydata()) == pytest.approx([1, 2, 3])
    assert np.asarray(dropout.get_ydata()) == pytest.approx([1, 3, 5])
    assert np.asarray(cnn.get_xdata()) == pytest.approx(np.arange(3), abs=0.1)
    assert (cnn.get_linestyle(), dropout.get_linestyle()) == ("-", "--")
    bars = panels[1].collections[0].get_segments()
    assert [sorted(bar[:, 1]) for bar in bars] == [pytest.approx([v - 0.1, v + 0.2]) for v in (1, 2, 3)]
    assert panels[1].get_xlabel() == "severity"
    assert panels[1].get_ylabel() == "NLL, nat"


def test_unknown_images_have_a_row_a_method_or_a_word_that_there_are_none():
    auroc = {"cnn": {"entropy": _one(0.6)}, "mc_dropout": {"entropy": _one(0.7), "mutual information": _one(0.8)}}
    last = shift_figure(NLL, auroc).axes[2]
    assert [text.get_text() for text in last.get_yticklabels()] == ["CNN", "MC dropout"]
    points = [(line.get_marker(), *line.get_xdata()) for line in last.get_lines() if len(line.get_xdata()) == 1]
    assert points == [("o", 0.6), ("o", 0.7), ("x", 0.8)]
    empty = shift_figure(NLL, {}).axes[2]
    assert [text.get_text() for text in empty.texts] == ["no images of something else"]
    assert not empty.axison
