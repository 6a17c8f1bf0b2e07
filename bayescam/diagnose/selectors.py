"""Which few of thousands of weights are worth a look: the worst mixed, those that moved most, those that matter most.

Every selector works on class-centred weights, which a common shift of all classes leaves as they are, and returns
(label, feature) indices, the most remarkable first.
"""

from __future__ import annotations

import numpy as np

from bayescam.diagnose.arviz_compat import rhat

Chosen = list[tuple[int, int]]


def worst_rhat(weights: np.ndarray, num: int = 10) -> tuple[Chosen, np.ndarray]:
    """The weights with the largest rank-normalised split R-hat, and it.

    Args:
        weights: class-centred draws (C, S, K, D).
        num: how many at most.
    """
    return _largest(rhat(_centred(weights, axis=2)), num)


def largest_shift(mean: np.ndarray, weights: np.ndarray, num: int = 10) -> tuple[Chosen, np.ndarray]:
    """The weights whose mean differs most from that of the draws, and |difference| in sds of the draws.

    Args:
        mean: of a Gaussian, (K, D).
        weights: draws of NUTS, (C, S, K, D).
        num: how many at most.
    """
    drawn = _centred(weights, axis=2)
    sd = drawn.std((0, 1), ddof=1)
    return _largest(np.abs(drawn.mean((0, 1)) - _centred(mean, axis=0)) / sd, num)


def largest_effect(mean: np.ndarray, features: np.ndarray, num: int = 10) -> tuple[Chosen, np.ndarray]:
    """The weights that move logits most, and |mean| times the sd of their feature: logits a sd of the feature.

    Args:
        mean: of the weights, (K, D).
        features: of images like those to be judged, (N, D).
        num: how many at most.
    """
    return _largest(np.abs(_centred(mean, axis=0)) * features.std(0), num)


def _centred(weights: np.ndarray, axis: int) -> np.ndarray:
    values = np.asarray(weights, dtype=float)
    return values - values.mean(axis, keepdims=True)


def _largest(scores: np.ndarray, num: int) -> tuple[Chosen, np.ndarray]:
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=None, kind="stable")[:num]
    rows, columns = np.unravel_index(order, scores.shape)
    return [(int(k), int(d)) for k, d in zip(rows, columns, strict=True)], scores[rows, columns]
