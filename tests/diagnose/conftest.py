"""Predictions that are calibrated by construction."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def problem():
    """Probabilities (400, 5) and labels drawn from them."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(5, 0.6), size=400)
    labels = np.array([rng.choice(5, p=p) for p in probs])
    return probs, labels
