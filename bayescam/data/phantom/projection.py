"""Project a body: millimetres of bone, soft tissue and air behind every pixel, and which structure threw which shadow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bayescam.data.phantom.skeleton import Body, Bone
from bayescam.data.phantom.solids import Array, Solids, intervals, stack, union_length

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
    """Maps (H, W): mm of ``cortical`` and ``spongy`` bone, of all bone organs (``occupied``), ``envelope``, ``air``; masks."""

    cortical: Array
    spongy: Array
    occupied: Array
    envelope: Array
    air: Array
    joint: NDArray[np.bool_]
    evidence: NDArray[np.bool_]


def project(body: Body, canvas: Canvas, part: str, without: tuple[str, ...] = ()) -> Shadow:
    """The shadow of ``body``, less the bones named in ``without``; evidence is what is at home in ``part``."""
    cortical, spongy, occupied = (np.zeros(canvas.shape, np.float32) for _ in range(3))
    joint, evidence = (np.zeros(canvas.shape, bool) for _ in range(2))
    for one in body.bones:
        if one.name in without:
            continue
        _add_bone(one, canvas, part, cortical, spongy, occupied, evidence)
    if body.plates is not None:
        cut = np.minimum(chords(body.plates, canvas), occupied) / np.maximum(occupied, 1e-3)
        cortical *= 1 - cut
        spongy *= 1 - cut
    for ball in body.joints:
        disc = (canvas.x[None, :] - ball.centre[0]) ** 2 + (canvas.y[:, None] - ball.centre[1]) ** 2 < ball.radius**2
        joint |= disc
        if ball.home == part:
            evidence |= disc
    envelope = np.maximum(filled(body.tissue, canvas), occupied)
    air = np.minimum(chords(body.air, canvas), np.maximum(envelope - occupied, 0)) if body.air is not None else 0 * envelope
    return Shadow(cortical, spongy, occupied, envelope, air, joint, evidence)


def _add_bone(
    one: Bone, canvas: Canvas, part: str, cortical: Array, spongy: Array, occupied: Array, evidence: NDArray[np.bool_]
) -> None:
    boxes = one.outer.boxes()
    seen = (boxes[:, 0] < canvas.x[-1]) & (boxes[:, 2] > canvas.x[0]) & (boxes[:, 1] < canvas.y[-1]) & (boxes[:, 3] > canvas.y[0])
    if not seen.any():
        return
    boxes = boxes[seen]
    view = canvas.window(np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]))
    if view is None:
        return
    count = int(seen.sum())
    both = stack([one.outer[seen], one.inner[seen]])
    low, high = intervals(both, canvas.x[view[1]], canvas.y[view[0]])
    outside = union_length(low[:count], high[:count])
    within = union_length(low[count:], high[count:])
    held = high[count:] - low[count:]
    share = one.spongy[seen].astype(np.float32)
    fraction = np.einsum("n,nhw->hw", share, held) / np.maximum(held.sum(axis=0), 1e-3)
    cortical[view] += np.maximum(outside - within, 0)
    spongy[view] += within * fraction
    occupied[view] += outside
    home = np.array([h == part for h in one.homes])[seen]
    if home.any():
        evidence[view] |= (high[:count][home] - low[:count][home] > VISIBLE).any(axis=0)


def chords(solids: Solids, canvas: Canvas) -> Array:
    """The sum (H, W) of the chord lengths in mm, each solid on its own box."""
    total = np.zeros(canvas.shape, np.float32)
    for row, box in enumerate(solids.boxes()):
        view = canvas.window(box)
        if view is not None:
            low, high = intervals(solids[row : row + 1], canvas.x[view[1]], canvas.y[view[0]])
            total[view] += (high - low)[0]
    return total


def filled(solids: Solids, canvas: Canvas) -> Array:
    """From the first entry to the last exit (H, W) in mm: the solids with what lies between them."""
    first = np.full(canvas.shape, np.inf, np.float32)
    last = np.full(canvas.shape, -np.inf, np.float32)
    for row, box in enumerate(solids.boxes()):
        view = canvas.window(box)
        if view is None:
            continue
        low, high = intervals(solids[row : row + 1], canvas.x[view[1]], canvas.y[view[0]])
        hit = high[0] > low[0]
        first[view] = np.where(hit, np.minimum(first[view], low[0]), first[view])
        last[view] = np.where(hit, np.maximum(last[view], high[0]), last[view])
    return np.where(last > first, last - first, 0).astype(np.float32)
