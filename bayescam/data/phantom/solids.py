"""Tapered capsules and ellipsoids, and the length of a ray inside them, in closed form.

A solid is the convex hull of two balls in an affine metric, {x : |M (x - c(t))| <= r(t) for some t in [0, 1]} with centre
c(t) = c0 + t (c1 - c0) and radius r(t) = r0 + t (r1 - r0). Equal centres give an ellipsoid, equal radii a capsule, M = 1 a
round cone. Rays run along z (parallel beam); x points right, y down, all lengths are in millimetres.
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
        """The solids inside, ``depth`` (n,) mm below the surface along the metric's unit axis; empty ones have radius 0."""
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


def intervals(solids: Solids, x: Array, y: Array) -> tuple[Array, Array]:
    """Where the rays through (x, y) enter and leave each solid: two arrays (n, H, W) in mm, float32.

    In coordinates with the ray along the third axis and the solid's lateral axis along the first, the lateral distance of
    the ray from c(t) leaves q(t) = (r0 + k t)^2 - (u - v1 t)^2 - w^2 = Q - a (t - m)^2 with a = v1^2 - k^2,
    m = (r0 k + u v1) / a, Q = r0^2 - u^2 - w^2 + a m^2. The exit is the maximum over t of v3 t + sqrt(q(t)), reached at
    t = m + v3 sqrt(Q / (a (a + v3^2))) clipped to [0, 1]; the entry likewise with the minus sign. Rays that miss get the
    empty interval at ``NOWHERE``.

    Args:
        solids: n solids.
        x: (W,) pixel centres in mm.
        y: (H,) pixel centres in mm.
    """
    lateral, across, depth, v1, v3, slope = _ray_coordinates(solids)
    a = v1**2 - slope**2
    ball = np.hypot(v1, v3) + np.abs(slope) < _TINY
    end_on = ~ball & (a <= 1e-6 * v3**2)
    regular = ~(ball | end_on)
    a = np.where(regular, a, 1.0)
    last = np.where(regular, 1.0, 0.0)
    v1, v3, slope = (np.where(regular, value, 0.0) for value in (v1, v3, slope))
    column = lambda value: np.asarray(value, np.float32)[:, None, None]  # noqa: E731
    u, w, shift = (_plane(rows, x, y) for rows in (lateral, across, depth))
    r0 = column(solids.radius_start)
    middle = (r0 * column(slope) + u * column(v1)) / column(a)
    peak = r0 * r0 - u * u - w * w + column(a) * middle * middle
    hit = peak > 0
    root = np.sqrt(np.maximum(peak, 0, out=peak))
    half = root / np.sqrt(column(a))
    hit &= (middle + half >= 0) & (middle - half <= column(last))
    step = root * column(v3 / np.sqrt(a * (a + v3**2)))
    low, high = (
        _surface(np.clip(middle + sign * step, 0, column(last)), sign, middle, root, column(a), column(v3))
        for sign in (-1.0, 1.0)
    )
    for row in np.flatnonzero(end_on):
        low[row], high[row], hit[row] = _end_on(solids, row, u[row], w[row])
    stretch = column(np.linalg.norm(solids.metric[:, :, 2], axis=1))
    low, high = (low - shift) / stretch, (high - shift) / stretch
    return np.where(hit, low, NOWHERE), np.where(hit, np.maximum(high, low), NOWHERE)


def _ray_coordinates(solids: Solids) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Rows (n, 3) = coefficients of x, y, 1 for u, w and depth; the axis (v1, 0, v3); the radius slope."""
    along = solids.metric[:, :, 2] / np.linalg.norm(solids.metric[:, :, 2], axis=1)[:, None]
    axis = np.einsum("nij,nj->ni", solids.metric, solids.end - solids.start)
    v3 = np.einsum("ni,ni->n", axis, along)
    side = axis - v3[:, None] * along
    v1 = np.linalg.norm(side, axis=1)
    fallback = np.cross(along, np.where(np.abs(along[:, :1]) < 0.6, [[1.0, 0, 0]], [[0, 1.0, 0]]))
    side = np.where((v1 > _TINY)[:, None], side, fallback)
    side = side / np.linalg.norm(side, axis=1)[:, None]
    basis = np.stack([side, np.cross(along, side), along], axis=1)
    rows = basis @ solids.metric
    offset = -np.einsum("nij,nj->ni", rows, solids.start)
    u, w, depth = (np.stack([rows[:, i, 0], rows[:, i, 1], offset[:, i]], axis=1) for i in range(3))
    return u, w, depth, v1, v3, solids.radius_end - solids.radius_start


def _plane(rows: Array, x: Array, y: Array) -> Array:
    rows = rows.astype(np.float32)
    return (rows[:, 0, None] * x.astype(np.float32) + rows[:, 2, None])[:, None, :] + (
        rows[:, 1, None] * y.astype(np.float32)
    )[:, :, None]


def _surface(t: Array, sign: float, middle: Array, root: Array, a: Array, v3: Array) -> Array:
    inside = root * root - a * (t - middle) ** 2
    return v3 * t + np.float32(sign) * np.sqrt(np.maximum(inside, 0))


def _end_on(solids: Solids, row: int, u: Array, w: Array) -> tuple[Array, Array, Array]:
    """Entry, exit and hit (H, W) of one solid seen along its axis, one disc inside the other: the hull of both balls.

    Where only the larger disc is hit the larger ball is the hull; where both are, its cone is between them: the slope of
    the depth is linear in the distance from the axis, so the extremes are those of t in {0, 1} and of the cone's tangent.
    """
    along = solids.metric[row, :, 2] / np.linalg.norm(solids.metric[row, :, 2])
    axis = solids.metric[row] @ (solids.end[row] - solids.start[row])
    v3 = float(axis @ along)
    v1 = float(np.linalg.norm(axis - v3 * along))
    r0 = float(solids.radius_start[row])
    slope = float(solids.radius_end[row]) - r0
    b = r0 * slope + u * v1
    c = r0**2 - u * u - w * w
    curvature = slope**2 - v1**2
    stationary = [np.zeros_like(u), np.ones_like(u)]
    if v3**2 > curvature > _TINY:
        reach = np.sqrt(np.maximum(b * b - curvature * c, 0) / (v3**2 - curvature)) * abs(v3)
        stationary += [np.clip((sign * reach - b) / curvature, 0, 1) for sign in (-1.0, 1.0)]
    elif curvature <= _TINY:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(np.abs(b) > _TINY, ((b / v3) ** 2 - c) / (2 * b), 0.0)
        stationary.append(np.clip(t, 0, 1))
    low, high = np.full_like(u, np.inf), np.full_like(u, -np.inf)
    for t in stationary:
        q = curvature * t * t + 2 * b * t + c
        root = np.sqrt(np.maximum(q, 0))
        low = np.where(q >= 0, np.minimum(low, v3 * t - root), low)
        high = np.where(q >= 0, np.maximum(high, v3 * t + root), high)
    hit = high > low
    return np.where(hit, low, 0.0), np.where(hit, high, 0.0), hit


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
