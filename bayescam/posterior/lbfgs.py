"""L-BFGS for convex functions on tensors: the MAP's and the refined mean's descent.

Our own because scipy's calls a BLAS whose threads wait for torch's and torch's for them (on two cores the MAP took six
times as long), and because every optimiser of torch.optim first imports torch's compiler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

_HISTORY = 10
_ARMIJO = 1e-4
_SHORTEST = 1e-6
_ROUNDING = 1e-9


def minimise(
    objective: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    *,
    near: Callable[[float], bool],
    evaluations: int,
) -> Tensor:
    """Descend from ``start`` (P,) to the first point whose gradient's norm is ``near`` enough.

    Two-loop recursion (Nocedal 1980) with a backtracking line search, which a convex function lets do: its curvature
    along a step is never negative. Ends also where no step lowers the value by its rounding, and after ``evaluations``.

    Args:
        objective: point (P,) -> value and gradient (P,).
        start: float64.
        near: of the gradient's norm.
        evaluations: at most so many.
    """
    point = start
    value, gradient = objective(point)
    steps: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_HISTORY)
    used = 1
    while used < evaluations and not near(float(gradient.norm())):
        direction = _direction(gradient, steps)
        slope = float(direction @ gradient)
        length = 1.0 if steps else min(1.0, 1.0 / float(gradient.norm()))
        while True:
            there = point + length * direction
            lowered, turned = objective(there)
            used += 1
            if lowered <= value + _ARMIJO * length * slope + _ROUNDING * abs(value):
                break
            curvature = 2 * (lowered - value - length * slope) / length**2
            length = min(max(-slope / curvature, 0.1 * length), 0.5 * length) if curvature > 0 else 0.5 * length
            if length < _SHORTEST or used >= evaluations:
                return point
        change, bend = there - point, turned - gradient
        along = float(change @ bend)
        if along > 0:
            steps.append((change, bend, along))
        point, value, gradient = there, lowered, turned
    return point


def _direction(gradient: Tensor, steps: deque[tuple[Tensor, Tensor, float]]) -> Tensor:
    """-H g, H the inverse curvature that the steps have shown."""
    direction, shares = -gradient, []
    for change, bend, along in reversed(steps):
        shares.append(float(change @ direction) / along)
        direction = direction - shares[-1] * bend
    if steps:
        _, bend, along = steps[-1]
        direction = direction * (along / float(bend @ bend))
    for (change, bend, along), share in zip(steps, reversed(shares), strict=True):
        direction = direction + (share - float(bend @ direction) / along) * change
    return direction
