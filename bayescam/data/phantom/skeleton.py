"""The vocabulary of anatomy: rods make bones, bones and their envelope make a body that can be bent and moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bayescam.data.phantom.solids import Array, Solids, stack

Point = tuple[float, float, float]


class Rod(NamedTuple):
    """One tapered capsule (start = end: an ellipsoid) of a bone, in mm.

    ``home`` is the part whose picture it characterises; ``cortex`` the shell's thickness; ``spongy`` the bone share
    of what the shell holds (about 0.3 in ends, little in shafts); ``flat`` scales the half widths along x, y, z.
    """

    home: str
    start: Point
    radius_start: float
    end: Point
    radius_end: float
    cortex: float = 1.2
    spongy: float = 0.3
    flat: Point = (1.0, 1.0, 1.0)


def solids(rods: Sequence[Rod]) -> Solids:
    """The outer surfaces of ``rods``."""
    return Solids(
        np.array([r.start for r in rods], float),
        np.array([r.end for r in rods], float),
        np.array([r.radius_start for r in rods], float),
        np.array([r.radius_end for r in rods], float),
        np.stack([np.diag(1 / np.array(r.flat, float)) for r in rods]),
    )


@dataclass(frozen=True)
class Bone:
    """One bone: the union of n outer solids, a cortical shell around the union of n inner ones.

    ``solids`` (2n) are the outer, then the inner; ``homes`` and the inner bone fraction ``spongy`` have length n.
    """

    name: str
    solids: Solids
    homes: tuple[str, ...]
    spongy: Array

    @property
    def outer(self) -> Solids:
        """The n outer solids."""
        return self.solids[: len(self.homes)]

    def moved(self, rotation: Array, shift: Array, scale: float = 1.0) -> Bone:
        """The image under x -> scale * rotation x + shift."""
        return Bone(self.name, self.solids.moved(rotation, shift, scale), self.homes, self.spongy)


def bone(name: str, rods: Sequence[Rod], *, density: float = 1.0) -> Bone:
    """A bone of ``rods``; ``density`` thins its cortex and its spongiosa."""
    outer = solids(rods)
    depth = np.array([r.cortex * (0.4 + 0.6 * density) for r in rods])
    both = stack([outer, outer.shrunk(depth)])
    return Bone(name, both, tuple(r.home for r in rods), np.array([r.spongy * density for r in rods]))


@dataclass(frozen=True)
class Joint:
    """A joint: the ball around the space between two bones, and the part whose picture it characterises."""

    home: str
    centre: Array
    radius: float


@dataclass(frozen=True)
class Body:
    """Bones, growth plates (cartilage cut out of the bones), envelope of soft tissue, air (the lung) and joints."""

    bones: tuple[Bone, ...]
    plates: Solids | None
    tissue: Solids
    air: Solids | None
    joints: tuple[Joint, ...]

    def moved(self, rotation: Array, shift: Array, scale: float = 1.0) -> Body:
        """The image under x -> scale * rotation x + shift."""
        move = lambda part: None if part is None else part.moved(rotation, shift, scale)  # noqa: E731
        return Body(
            tuple(b.moved(rotation, shift, scale) for b in self.bones),
            move(self.plates),
            self.tissue.moved(rotation, shift, scale),
            move(self.air),
            tuple(Joint(j.home, scale * rotation @ j.centre + shift, scale * j.radius) for j in self.joints),
        )


def join(bodies: Sequence[Body]) -> Body:
    """All of ``bodies`` in one."""
    plates = [b.plates for b in bodies if b.plates is not None]
    air = [b.air for b in bodies if b.air is not None]
    return Body(
        tuple(bone for b in bodies for bone in b.bones),
        stack(plates) if plates else None,
        stack([b.tissue for b in bodies]),
        stack(air) if air else None,
        tuple(joint for b in bodies for joint in b.joints),
    )


def body(
    bones: Sequence[Bone],
    tissue: Sequence[Rod],
    *,
    plates: Sequence[Rod] = (),
    air: Sequence[Rod] = (),
    joints: Sequence[tuple[str, Point, float]] = (),
) -> Body:
    """A body in its own frame from tables of rods."""
    return Body(
        tuple(bones),
        solids(plates) if plates else None,
        solids(tissue),
        solids(air) if air else None,
        tuple(Joint(home, np.array(centre, float), radius) for home, centre, radius in joints),
    )


def turn(axis: str, degrees: float) -> Array:
    """The right-handed rotation (3, 3) about "x", "y" or "z"."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    rotation = np.eye(3)
    rotation[i, i] = rotation[j, j] = c
    rotation[i, j], rotation[j, i] = -s, s
    return rotation
