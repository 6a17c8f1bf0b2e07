"""Tapered capsules and ellipsoids, and the length of a ray inside them, in closed form.

A solid is the convex hull of two balls in an affine metric, {x : |M (x - c(t))| <= r(t) for some t in [0, 1]} with
centre c(t) = c0 + t (c1 - c0) and radius r(t) = r0 + t (r1 - r0). Equal centres give an ellipsoid, equal radii a
capsule, M = 1 a round cone. Rays run along z (parallel beam); x points right, y down, all lengths are in millimetres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

NOWHERE = np.float32(1e5)  # depth given to rays that miss: an empty interval behind everything
_TINY = 1e-9


@dataclass(frozen=True)
class Solids:
    """n solids: ends (n, 3) in mm, radii (n,) in units of the metric, metric (n, 3, 3)."""

    start: Array
    end: Array
    radius_start: Array
    radius_end: Array
    metric: Array

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: slice | Array) -> Solids:
        return Solids(
            self.start[rows], self.end[rows], self.radius_start[rows], self.radius_end[rows], self.metric[rows]
        )

    def moved(self, rotation: Array, shift: Array, scale: float = 1.0) -> Solids:
        """The image under x -> scale * rotation x + shift; ``rotation`` (3, 3) orthogonal, mirrors allowed."""
        return Solids(
            scale * self.start @ rotation.T + shift,
            scale * self.end @ rotation.T + shift,
            scale * self.radius_start,
            scale * self.radius_end,
            self.metric @ rotation.T,
        )

    def shrunk(self, depth: Array) -> Solids:
        """The solids inside, ``depth`` (n,) mm below the surface where the metric is 1; empty ones have radius 0."""
        return Solids(
            self.start,
            self.end,
            np.maximum(self.radius_start - depth, 0.0),
            np.maximum(self.radius_end - depth, 0.0),
            self.metric,
        )

    def boxes(self) -> Array:
        """The smallest boxes (n, 4) = x0, y0, x1, y1 in mm around the shadows: |x - c| <= r |e^T M^-1|."""
        reach = np.linalg.norm(np.linalg.inv(self.metric), axis=2)[:, :2]
        first = self.radius_start[:, None] * reach
        last = self.radius_end[:, None] * reach
        low = np.minimum(self.start[:, :2] - first, self.end[:, :2] - last)
        high = np.maximum(self.start[:, :2] + first, self.end[:, :2] + last)
        return np.concatenate([low, high], axis=1)


def stack(parts: Sequence[Solids]) -> Solids:
    """All solids of ``parts`` in one."""
    return Solids(
        np.concatenate([p.start for p in parts]),
        np.concatenate([p.end for p in parts]),
        np.concatenate([p.radius_start for p in parts]),
        np.concatenate([p.radius_end for p in parts]),
        np.concatenate([p.metric for p in parts]),
    )


@dataclass(frozen=True)
class Rays:
    """What n solids are to rays along z: ``plane`` (3, n, 3) coefficients of (x, y, 1) for u, w, depth; (n,) the rest.

    u and w are lateral coordinates in the metric, u along the solid's axis (v1, 0, v3); k is the slope of the radius,
    ``stretch`` the metric's length of a millimetre along the ray.
    """

    plane: Array
    v1: Array
    v3: Array
    radius: Array
    slope: Array
    stretch: Array

    @classmethod
    def of(cls, solids: Solids) -> Rays:
        """The ray coordinates of ``solids``, for all of them at once."""
        metric = solids.metric
        stretch = np.sqrt((metric[:, :, 2] ** 2).sum(axis=1))
        along = metric[:, :, 2] / stretch[:, None]
        axis = (metric @ (solids.end - solids.start)[:, :, None])[:, :, 0]
        v3 = (axis * along).sum(axis=1)
        side = axis - v3[:, None] * along
        v1 = np.sqrt((side * side).sum(axis=1))
        other = np.cross(along, np.where(np.abs(along[:, :1]) < 0.6, [[1.0, 0, 0]], [[0, 1.0, 0]]))
        side = np.where((v1 > _TINY)[:, None], side, other)
        side = side / np.sqrt((side * side).sum(axis=1))[:, None]
        rows = np.stack([side, np.cross(along, side), along], axis=1) @ metric
        rows[:, :, 2] = -(rows @ solids.start[:, :, None])[:, :, 0]
        return cls(rows.swapaxes(0, 1), v1, v3, solids.radius_start, solids.radius_end - solids.radius_start, stretch)

    def __getitem__(self, rows: slice | Array) -> Rays:
        return Rays(
            self.plane[:, rows], self.v1[rows], self.v3[rows], self.radius[rows], self.slope[rows], self.stretch[rows]
        )

    def intervals(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Where the rays through (x, y) enter and leave each solid: two arrays (n, H, W) in mm, float32.

        The lateral distance of the ray from c(t) leaves q(t) = (r0 + k t)^2 - (u - v1 t)^2 - w^2 = Q - a (t - m)^2 with
        a = v1^2 - k^2, m = (r0 k + u v1) / a, Q = r0^2 - u^2 - w^2 + a m^2. The exit is the maximum over t of
        v3 t + sqrt(q(t)), reached at t = m + v3 sqrt(Q / (a (a + v3^2))) clipped to [0, 1]; the entry likewise with the
        minus sign. Rays that miss get the empty interval at ``NOWHERE``.

        Args:
            x: (W,) pixel centres in mm.
            y: (H,) pixel centres in mm.
        """
        a = self.v1**2 - self.slope**2
        ball = self.v1**2 + self.v3**2 + self.slope**2 < _TINY
        end_on = ~ball & (a <= 1e-6 * self.v3**2 + _TINY)
        regular = ~(ball | end_on)
        a, v1, v3, k = (
            np.where(regular, value, rest) for value, rest in ((a, 1), (self.v1, 0), (self.v3, 0), (self.slope, 0))
        )
        u, w, depth = _planes(self.plane, x, y)
        seen_along = [(row, *self._end_on(row, u[row], w[row])) for row in np.flatnonzero(end_on).tolist()]
        middle = u * _column(v1 / a) + _column(self.radius * k / a)
        peak = middle * middle
        peak *= _column(a)
        peak += _column(self.radius**2) - np.square(u, out=u) - np.square(w, out=w)
        hit = peak > 0
        root = np.sqrt(np.maximum(peak, 0, out=peak))
        half = root * _column(1 / np.sqrt(a))
        hit &= (middle >= -half) & (middle - half <= _column(regular))
        step = np.multiply(root, _column(v3 / np.sqrt(a * (a + v3**2))), out=root)
        low = _surface(middle - step, -1.0, middle, peak, _column(a), _column(v3), _column(regular))
        high = _surface(middle + step, 1.0, middle, peak, _column(a), _column(v3), _column(regular))
        for row, near, far, inside in seen_along:
            low[row], high[row], hit[row] = near, far, inside
        for surface in (low, high):
            surface -= depth
            surface *= _column(1 / self.stretch)
        np.maximum(low, high, out=high)
        miss = ~hit
        np.copyto(low, NOWHERE, where=miss)
        np.copyto(high, NOWHERE, where=miss)
        return low, high

    def _end_on(self, row: int, u: Array, w: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Entry, exit and hit (H, W) of one solid seen along its axis, one disc inside the other.

        The extremes of v3 t -+ sqrt(q(t)), q linear or convex, are at t = 0, t = 1 or where the derivative vanishes.
        """
        v1, v3, r0, slope = (float(value[row]) for value in (self.v1, self.v3, self.radius, self.slope))
        b, c, curvature = r0 * slope + u * v1, r0**2 - u * u - w * w, slope**2 - v1**2
        stationary = [np.zeros_like(u), np.ones_like(u)]
        if v3**2 > curvature > _TINY:
            reach = np.sqrt(np.maximum(b * b - curvature * c, 0) / (v3**2 - curvature)) * abs(v3)
            stationary += [np.clip((sign * reach - b) / curvature, 0, 1) for sign in (-1.0, 1.0)]
        elif curvature <= _TINY:
            safe = np.where(np.abs(b) > _TINY, b, 1.0)
            stationary.append(np.clip(np.where(np.abs(b) > _TINY, ((b / v3) ** 2 - c) / (2 * safe), 0.0), 0, 1))
        low, high = np.full_like(u, np.inf), np.full_like(u, -np.inf)
        for t in stationary:
            q = curvature * t * t + 2 * b * t + c
            root = np.sqrt(np.maximum(q, 0))
            low = np.where(q >= 0, np.minimum(low, v3 * t - root), low)
            high = np.where(q >= 0, np.maximum(high, v3 * t + root), high)
        hit = high > low
        return np.where(hit, low, 0.0), np.where(hit, high, 0.0), hit


def _column(values: NDArray[np.generic]) -> Array:
    return np.asarray(values, np.float32)[:, None, None]


def _surface(t: Array, sign: float, middle: Array, peak: Array, a: Array, v3: Array, last: Array) -> Array:
    """v3 t + sign sqrt(Q - a (t - m)^2) with t clipped to [0, last]; overwrites ``t``."""
    np.minimum(np.maximum(t, 0, out=t), last, out=t)
    inside = np.square(t - middle)
    inside *= a
    np.sqrt(np.maximum(np.subtract(peak, inside, out=inside), 0, out=inside), out=inside)
    t *= v3
    return np.add(t, inside, out=t) if sign > 0 else np.subtract(t, inside, out=t)


def _planes(plane: Array, x: Array, y: Array) -> Array:
    coefficient = plane.astype(np.float32)
    across = coefficient[:, :, 0, None] * x.astype(np.float32) + coefficient[:, :, 2, None]
    down = coefficient[:, :, 1, None] * y.astype(np.float32)
    return across[:, :, None, :] + down[:, :, :, None]


def union_length(low: Array, high: Array) -> Array:
    """The length (H, W) in mm of the union of n intervals per ray.

    With entries and exits each sorted by themselves, the union is sum_k (b_k - max(a_k, b_(k-1))): a gap opens exactly
    where the k-th exit lies before the (k+1)-th entry.
    """
    low, high = _sorted(low), _sorted(high)
    length = high[0] - low[0]
    for k in range(1, len(low)):
        length = length + high[k] - np.maximum(low[k], high[k - 1])
    return np.maximum(length, 0)


def _sorted(values: Array) -> Array:
    """Sorted along the first axis by odd-even transposition: few whole-array operations for few intervals."""
    values = values.copy()
    for turn in range(len(values) if len(values) > 1 else 0):
        first, second = values[turn % 2 : -1 : 2], values[turn % 2 + 1 :: 2]
        smaller = np.minimum(first, second)
        np.maximum(first, second, out=second)
        first[...] = smaller
    return values
