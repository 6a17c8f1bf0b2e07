"""Project a body: millimetres of bone, soft tissue and air behind every pixel, and whose shadow it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    tissue = filled(body.tissue, canvas)
    cortical, spongy, occupied, air = (np.zeros(canvas.shape, np.float32) for _ in range(4))
    joint, evidence = (np.zeros(canvas.shape, bool) for _ in range(2))
    shadow = Shadow(cortical, spongy, occupied, tissue, air, joint, evidence)
    _add_bones(shadow, [one for one in body.bones if one.name not in without], canvas, part)
    if body.plates is not None:
        cut = np.minimum(chords(body.plates, canvas), occupied) / np.maximum(occupied, 1e-3)
        cortical *= 1 - cut
        spongy *= 1 - cut
    if body.air is not None:
        np.minimum(chords(body.air, canvas), np.maximum(tissue - occupied, 0), out=air)
    for ball in body.joints:
        disc = (canvas.x[None, :] - ball.centre[0]) ** 2 + (canvas.y[:, None] - ball.centre[1]) ** 2 < ball.radius**2
        joint |= disc
        if ball.home == part:
            evidence |= disc
    return shadow


def _add_bones(shadow: Shadow, bones: Sequence[Bone], canvas: Canvas, part: str) -> None:
    """Add every bone on its own box, counting only the solids that reach into the picture."""
    if not bones:
        return
    everything = stack([one.solids for one in bones])
    rays, boxes = Rays.of(everything), everything.boxes()
    seen = canvas.touched(boxes)
    first = 0
    for one in bones:
        count = len(one.homes)
        chosen = first + np.flatnonzero(seen[first : first + count])
        if len(chosen):
            view = canvas.window(np.concatenate([boxes[chosen, :2].min(axis=0), boxes[chosen, 2:].max(axis=0)]))
            if view is not None:
                both = rays[np.concatenate([chosen, chosen + count])]
                low, high = both.intervals(canvas.x[view[1]], canvas.y[view[0]])
                home = np.array([one.homes[row] == part for row in chosen - first])
                _add_bone(shadow, view, low, high, one.spongy[chosen - first].astype(np.float32), home)
        first += 2 * count


def _add_bone(
    shadow: Shadow, view: tuple[slice, slice], low: Array, high: Array, share: Array, home: NDArray[np.bool_]
) -> None:
    """Add one bone's intervals (2n, h, w), outer then inner; ``share`` (n,) of bone inside, ``home`` (n,) for evidence.

    Cortex is the outer union less the inner one; what is held is the inner union at the mean share of its solids.
    """
    count = len(share)
    outside = union_length(low[:count], high[:count])
    within = union_length(low[count:], high[count:])
    length = high - low
    held = length[count:]
    fraction = np.einsum("n,nhw->hw", share, held) / np.maximum(held.sum(axis=0), 1e-3)
    shadow.cortical[view] += np.maximum(outside - within, 0)
    shadow.spongy[view] += within * fraction
    shadow.occupied[view] += outside
    if home.any():
        shadow.evidence[view] |= (length[:count][home] > VISIBLE).any(axis=0)


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
