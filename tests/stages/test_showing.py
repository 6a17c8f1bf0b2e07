"""Which test images the gallery shows."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bayescam.stages.showing import _gallery


def _predictions(probs, labels):
    entropy = -(probs * np.log(probs)).sum(1)
    return xr.Dataset(
        {"probs": (("obs_id", "label"), probs), "y": (("obs_id",), labels), "entropy": (("obs_id",), entropy)}
    )


def test_a_third_each_and_how_many_of_each():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), 200)
    labels = rng.integers(0, 3, 200)
    rows, sizes = _gallery(_predictions(probs, labels), 12)
    assert sizes == {"surest_right": 4, "surest_wrong": 4, "most_uncertain": 4}
    assert len(set(rows.tolist())) == 12
    right = probs.argmax(1) == labels
    assert right[rows[:4]].all()
    assert not right[rows[4:8]].any()
    assert len(set(probs[rows[:3]].argmax(1))) == 3


def test_where_nothing_is_wrong_more_of_the_uncertain_are_shown():
    probs = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    rows, sizes = _gallery(_predictions(probs, probs.argmax(1)), 9)
    assert sizes == {"surest_right": 3, "surest_wrong": 0, "most_uncertain": 6}
    assert len(rows) == 9
    few, sizes = _gallery(_predictions(probs[:4], probs[:4].argmax(1)), 9)
    assert sorted(few.tolist()) == [0, 1, 2, 3]
    assert sum(sizes.values()) == 4
