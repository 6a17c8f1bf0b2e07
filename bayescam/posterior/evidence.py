"""Choosing the prior precision by a criterion that is re-evaluated, MAP and all, at every value tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

BRACKET = (1e-4, 1e4)
_TOLERANCE = 0.05
_PROMINENCE = 0.5


@dataclass(frozen=True)
class Choice:
    """The prior precision that maximises a criterion over a bracket.

    Args:
        prior_precision: tau.
        criterion: its value there.
        hit: "lower" or "upper" where the criterion still rises at that end of the bracket, else None.
        others: where else the grid has a maximum, by more than half a nat above its surroundings.
        tried: every (tau, criterion) evaluated, in order.
    """

    prior_precision: float
    criterion: float
    hit: str | None
    others: tuple[float, ...]
    tried: tuple[tuple[float, float], ...]


def maximise(criterion: Callable[[float], float], bracket: tuple[float, float] = BRACKET) -> Choice:
    """Maximise a criterion of tau over log tau: a grid of a point a decade, then Brent's search about its best point.

    Evidence can have several maxima, where features differ in scale by orders of magnitude. The grid is walked from the
    strongest prior to the weakest, along which MAPs follow one another; the search ends within 0.05 in log tau. It
    tries numbers of three digits, so that the rounding of sums does not move what it finds.

    Args:
        criterion: log evidence or ELBO at a tau, in nats; -inf where it cannot be computed.
        bracket: the smallest and largest tau, both positive.

    Raises:
        ValueError: the bracket is none.
    """
    low, high = bracket
    if not 0 < low < high < math.inf:
        raise ValueError(f"bracket is {bracket}; it must be two positive, finite, increasing prior precisions")
    tried: dict[float, float] = {}

    def evaluate(tau: float) -> float:
        if tau not in tried:
            tried[tau] = criterion(tau)
        return tried[tau]

    cells = max(2, math.ceil(math.log10(high) - math.log10(low) - 1e-9))
    grid = np.geomspace(high, low, cells + 1).tolist()
    values = [evaluate(tau) for tau in grid]
    at = values.index(max(values))
    ends = math.log(grid[min(at + 1, cells)]), math.log(grid[max(at - 1, 0)])
    minimize_scalar(
        lambda x: -evaluate(float(f"{math.exp(x):.3g}")), bounds=ends, method="bounded", options={"xatol": _TOLERANCE}
    )
    tau, value = max(tried.items(), key=lambda pair: pair[1])
    others = tuple(grid[i] for i in _peaks(values) if abs(i - at) > 1)
    return Choice(tau, value, {low: "lower", high: "upper"}.get(tau), others, tuple(tried.items()))


def _peaks(values: list[float]) -> list[int]:
    """Where a value stands out from both sides by the prominence, up to a higher one on that side or the end."""
    return [i for i in range(len(values)) if _stands_out(values[i::-1]) and _stands_out(values[i:])]


def _stands_out(side: list[float]) -> bool:
    """Whether a fall by the prominence comes before anything higher, from the first value on; an end counts as one."""
    for value in side[1:]:
        if value > side[0]:
            return False
        if value < side[0] - _PROMINENCE:
            return True
    return len(side) == 1
