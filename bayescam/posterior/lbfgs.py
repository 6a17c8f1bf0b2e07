"""Preconditioned L-BFGS for convex functions on tensors: the MAP's and the refined mean's descent.

Our own because scipy's calls a BLAS whose threads wait for torch's and torch's for them (on two cores the MAP took six
times as long), because every optimiser of torch.optim first imports torch's compiler, and because neither takes a
preconditioner.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

_HISTORY = 5
_ARMIJO = 1e-4
_SHORTEST = 1e-6
_ROUNDING = 1e-9


class _Step(NamedTuple):
    """One step s, what it did to the gradient (y) and to the preconditioned gradient (P y), and s . y."""

    change: Tensor
    bend: Tensor
    solved: Tensor
    along: float


def minimise(
    objective: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] = Tensor.clone,
    near: Callable[[float], bool],
    evaluations: int,
    agree: Callable[[float], float] = float,
) -> Tensor:
    """Descend from ``start`` (P,) to the first point whose gradient's length sqrt(g . P g) is ``near`` enough.

    Two-loop recursion (Nocedal 1980) from the inverse curvature P, the same iterates as without one in coordinates
    whitened by P, at one product with P an evaluation. The line search backtracks, which a convex function lets do: its
    curvature along a step is never negative. Ends also where no step lowers the value by its rounding, and after
    ``evaluations``.

    Args:
        objective: point (P,) -> value and gradient (P,).
        start: float64.
        precondition: v (P,) -> P v, P fixed, symmetric and positive definite; the identity without it.
        near: of the gradient's length.
        evaluations: at most so many.
        agree: gives all ranks of a group one rank's number; it is asked for whatever decides the next step.
    """
    point = start
    value, gradient = objective(point)
    solved = precondition(gradient)
    steps: deque[_Step] = deque(maxlen=_HISTORY)
    used = 1
    while used < evaluations and not near(norm := math.sqrt(max(agree(float(gradient @ solved)), 0.0))):
        direction = _direction(gradient, solved, steps)
        slope = agree(float(direction @ gradient))
        length = 1.0 if steps else min(1.0, 1.0 / norm)
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
        turned_solved = precondition(turned)
        step = _Step(
            there - point, turned - gradient, turned_solved - solved, float((there - point) @ (turned - gradient))
        )
        if step.along > 0:
            steps.append(step)
        point, value, gradient, solved = there, lowered, turned, turned_solved
    return point


def _direction(gradient: Tensor, solved: Tensor, steps: deque[_Step]) -> Tensor:
    """-H g, H the inverse curvature that P and the steps have shown; both loops run on g and on P g at once."""
    plain, direction, shares = -gradient, -solved, []
    for step in reversed(steps):
        shares.append(float(step.change @ plain) / step.along)
        plain.sub_(step.bend, alpha=shares[-1])
        direction.sub_(step.solved, alpha=shares[-1])
    if steps:
        direction.mul_(steps[-1].along / float(steps[-1].bend @ steps[-1].solved))
    for step, share in zip(steps, reversed(shares), strict=True):
        direction.add_(step.change, alpha=share - float(step.bend @ direction) / step.along)
    return direction
