"""Choosing the prior precision by a criterion that is re-evaluated, MAP and all, at every value tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy.optimize import minimize_scalar

BRACKET = (1e-4, 1e4)
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Choice:
    """The prior precision that maximises a criterion over a bracket.

    Args:
        prior_precision: tau.
        criterion: its value there.
        hit: "lower" or "upper" where the criterion still rises at that end of the bracket, else None.
        tried: every (tau, criterion) evaluated, in order.
    """

    prior_precision: float
    criterion: float
    hit: str | None
    tried: tuple[tuple[float, float], ...]


def maximise(criterion: Callable[[float], float], bracket: tuple[float, float] = BRACKET) -> Choice:
    """Maximise a criterion of tau over log tau by Brent's bounded search, to 0.05 in log tau.

    Args:
        criterion: log evidence or ELBO at a tau.
        bracket: the smallest and largest tau, both positive.
    """
    low, high = bracket
    if not 0 < low < high < math.inf:
        raise ValueError(f"bracket is {bracket}; it must be two positive, finite, increasing prior precisions")
    tried: list[tuple[float, float]] = []

    def loss(log_tau: float) -> float:
        return -evaluate(math.exp(log_tau))

    def evaluate(tau: float) -> float:
        tried.append((tau, criterion(tau)))
        return tried[-1][1]

    ends = (math.log(low), math.log(high))
    found = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": _TOLERANCE}).x
    hit = None
    for tau, name in zip(bracket, ("lower", "upper"), strict=True):
        if abs(found - math.log(tau)) < 4 * _TOLERANCE:
            evaluate(tau)
            hit = name
    tau, value = max(tried, key=lambda pair: pair[1])
    return Choice(tau, value, hit if tau in bracket else None, tuple(tried))
