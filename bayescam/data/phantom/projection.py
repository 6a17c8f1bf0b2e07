"""Project a body: millimetres of bone, soft tissue and air behind every pixel, and whose shadow it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayescam.data.phantom.skeleton import Body, Bone
from bayescam.data.phantom.solids import NOWHERE, Array, Rays, Solids, stack, union_length

VISIBLE = 0.3  # mm of bone from which a pixel belongs to its mask


@dataclass(frozen=True)
class Canvas:
    """Pixel centres in mm from the picture's centre: ``x`` (W,), ``y`` (H,), ``pixel`` their distance."""

    x: Array
    y: Array
    pixel: float

    @classmethod
    def of(cls, shape: tuple[int, int], pixel: float) -> Canvas:
        """The canvas of an (H, W) picture."""
        y, x = ((np.arange(n, dtype=np.float32) + 0.5 - n / 2) * pixel for n in shape)
        return cls(x, y, pixel)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.y), len(self.x)

    def window(self, box: Array) -> tuple[slice, slice] | None:
        """The rows and columns whose centres lie in ``box`` (x0, y0, x1, y1), or None where there are none."""
        left, right = np.searchsorted(self.x, [box[0], box[2]])
        top, bottom = np.searchsorted(self.y, [box[1], box[3]])
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None

    def touched(self, boxes: Array) -> NDArray[np.bool_]:
        """Which boxes (n, 4) reach into the picture."""
        return (
            (boxes[:, 0] < self.x[-1])
            & (boxes[:, 2] > self.x[0])
            & (boxes[:, 1] < self.y[-1])
            & (boxes[:, 3] > self.y[0])
        )

    def inside(self, box: tuple[float, float, float, float]) -> NDArray[np.bool_]:
        """The pixels (H, W) of a rectangle (x0, y0, x1, y1) in mm."""
        columns, rows = (self.x >= box[0]) & (self.x <= box[2]), (self.y >= box[1]) & (self.y <= box[3])
        return rows[:, None] & columns[None, :]

    def opening(self, box: tuple[float, float, float, float], leak: float) -> Array:
        """The beam (H, W) behind collimator leaves: 1 inside, ``leak`` outside, a penumbra of a pixel."""
        ramp = lambda v, low, high: np.clip(np.minimum(v - low, high - v) / self.pixel + 0.5, 0, 1)  # noqa: E731
        open_part = ramp(self.y, box[1], box[3])[:, None] * ramp(self.x, box[0], box[2])[None, :]
        return (leak + (1 - leak) * open_part).astype(np.float32)


@dataclass(frozen=True)
class Shadow:
    """Maps (H, W): mm of ``cortical`` and ``spongy`` bone, bone organs (``occupied``), ``tissue``, ``air``; masks."""

    cortical: Array
    spongy: Array
    occupied: Array
    tissue: Array
    air: Array
    joint: NDArray[np.bool_]
    evidence: NDArray[np.bool_]

    @property
    def envelope(self) -> Array:
        """Everything that is the patient: tissue and bones."""
        return np.maximum(self.tissue, self.occupied)


def project(body: Body, canvas: Canvas, part: str, without: tuple[str, ...] = ()) -> Shadow:
    """The shadow of ``body``, less the bones named in ``without``; evidence is what is at home in ``part``."""
    cortical, spongy, occupied = (np.zeros(canvas.shape, np.float32) for _ in range(3))
    joint, evidence = (np.zeros(canvas.shape, bool) for _ in range(2))
    bones = [one for one in body.bones if one.name not in without]
    if bones:
        everything = stack([one.solids for one in bones])
        rays, boxes = Rays.of(everything), everything.boxes()
        seen = canvas.touched(boxes)
        at = 0
        for one in bones:
            rows, at = np.arange(at, at + len(one.solids)), at + len(one.solids)
            outer = rows[: len(one.homes)][seen[rows[: len(one.homes)]]]
            if len(outer):
                _add_bone(
                    one, outer - rows[0], rays, boxes, rows[0], canvas, part, (cortical, spongy, occupied), evidence
                )
    if body.plates is not None:
        cut = np.minimum(chords(body.plates, canvas), occupied) / np.maximum(occupied, 1e-3)
        cortical *= 1 - cut
        spongy *= 1 - cut
    for ball in body.joints:
        disc = (canvas.x[None, :] - ball.centre[0]) ** 2 + (canvas.y[:, None] - ball.centre[1]) ** 2 < ball.radius**2
        joint |= disc
        if ball.home == part:
            evidence |= disc
    tissue = filled(body.tissue, canvas)
    lung = np.zeros(canvas.shape, np.float32) if body.air is None else chords(body.air, canvas)
    air = np.minimum(lung, np.maximum(tissue - occupied, 0))
    return Shadow(cortical, spongy, occupied, tissue, air, joint, evidence)


def _add_bone(
    one: Bone,
    chosen: NDArray[np.integer],
    rays: Rays,
    boxes: Array,
    first: int,
    canvas: Canvas,
    part: str,
    maps: tuple[Array, Array, Array],
    evidence: NDArray[np.bool_],
) -> None:
    """Add the ``chosen`` solids of a bone, whose rows in ``rays`` and ``boxes`` begin at ``first``."""
    box = boxes[first + chosen]
    view = canvas.window(np.concatenate([box[:, :2].min(axis=0), box[:, 2:].max(axis=0)]))
    if view is None:
        return
    count = len(chosen)
    rows = first + np.concatenate([chosen, chosen + len(one.homes)])
    low, high = rays[rows].intervals(canvas.x[view[1]], canvas.y[view[0]])
    outside = union_length(low[:count], high[:count])
    within = union_length(low[count:], high[count:])
    length = high - low
    share = one.spongy[chosen].astype(np.float32)
    fraction = np.einsum("n,nhw->hw", share, length[count:]) / np.maximum(length[count:].sum(axis=0), 1e-3)
    cortical, spongy, occupied = maps
    cortical[view] += np.maximum(outside - within, 0)
    spongy[view] += within * fraction
    occupied[view] += outside
    home = [k for k, row in enumerate(chosen) if one.homes[row] == part]
    if home:
        evidence[view] |= (length[home] > VISIBLE).any(axis=0)


def chords(solids: Solids, canvas: Canvas) -> Array:
    """The sum (H, W) of the chord lengths in mm, each solid on its own box."""
    total = np.zeros(canvas.shape, np.float32)
    for view, low, high in _each(solids, canvas):
        total[view] += high - low
    return total


def filled(solids: Solids, canvas: Canvas) -> Array:
    """From the first entry to the last exit (H, W) in mm: the solids with what lies between them."""
    first = np.full(canvas.shape, NOWHERE, np.float32)
    last = np.full(canvas.shape, -NOWHERE, np.float32)
    for view, low, high in _each(solids, canvas):
        np.minimum(first[view], low, out=first[view])
        np.maximum(last[view], np.where(high > low, high, -NOWHERE), out=last[view])
    return np.where(last > first, last - first, 0).astype(np.float32)


def _each(solids: Solids, canvas: Canvas) -> Iterator[tuple[tuple[slice, slice], Array, Array]]:
    rays, boxes = Rays.of(solids), solids.boxes()
    for row in np.flatnonzero(canvas.touched(boxes)):
        view = canvas.window(boxes[row])
        if view is not None:
            low, high = rays[row : row + 1].intervals(canvas.x[view[1]], canvas.y[view[0]])
            yield view, low[0], high[0]
