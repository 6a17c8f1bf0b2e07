"""What happens in the X-ray room: part and view, pose, framing, marker, exposure, and what the patient wears."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from bayescam.data.phantom.arm import FINGERS, Frame, Pose, upper_limb
from bayescam.data.phantom.leg import foot, knee
from bayescam.data.phantom.patient import Patient, draw_patient
from bayescam.data.phantom.physics import Exposure
from bayescam.data.phantom.skeleton import Body, turn
from bayescam.data.phantom.solids import Array

PARTS = ("elbow", "finger", "forearm", "hand", "humerus", "shoulder", "wrist")
OTHER_PARTS = ("foot", "knee")  # never trained on: for out-of-distribution tests
VIEWS = {
    "elbow": ("AP", "lateral", "oblique"),
    "finger": ("PA", "lateral", "oblique"),
    "forearm": ("AP", "lateral"),
    "hand": ("PA", "oblique"),
    "humerus": ("AP", "lateral"),
    "shoulder": ("AP", "internal", "Grashey"),
    "wrist": ("PA", "lateral", "oblique"),
    "foot": ("DP", "oblique", "lateral"),
    "knee": ("AP", "lateral"),
}
TURN = {"AP": 0.0, "PA": 0.0, "DP": 0.0, "internal": 0.0, "Grashey": -32.0, "oblique": 42.0, "lateral": 90.0}
# field of view: long side in mm for a grown man; its spread (sd of the log); how far its centre slides (sd, in fields)
FIELD = {
    "elbow": (200.0, 0.15, 0.13),
    "finger": (104.0, 0.24, 0.14),
    "forearm": (285.0, 0.16, 0.15),
    "hand": (205.0, 0.18, 0.13),
    "humerus": (315.0, 0.15, 0.14),
    "shoulder": (235.0, 0.14, 0.12),
    "wrist": (150.0, 0.15, 0.13),
    "foot": (285.0, 0.12, 0.05),
    "knee": (230.0, 0.12, 0.07),
}
# segments that can come into the picture
REACH = {
    "shoulder": ("trunk", "humerus", "forearm"),
    "humerus": ("trunk", "humerus", "forearm"),
    "elbow": ("humerus", "forearm"),
    "forearm": ("humerus", "forearm", "hand"),
    "wrist": ("forearm", "hand"),
    "hand": ("forearm", "hand"),
    "finger": ("hand",),
}
CORNERS = ((-1, -1), (1, -1), (-1, 1), (1, 1))


@dataclass(frozen=True)
class Marker:
    """A lead letter, its centre and height in mm, in the picture's plane."""

    letter: str
    centre: tuple[float, float]
    height: float


@dataclass(frozen=True)
class Examination:
    """One picture as ordered and taken, before any photon flies; everything random but noise and texture is decided.

    ``field`` is the long side in mm; ``collimator`` the open rectangle (x0, y0, x1, y1) in mm from the centre;
    ``window`` the quantiles and gamma of the display; ``shutter`` whether the unexposed rim is shown black.
    """

    part: str
    view: str
    side: str
    pose: Pose
    finger: str
    angles: tuple[float, float]
    offset: tuple[float, float]
    field: float
    shape: tuple[int, int]
    marker: Marker | None
    hardware: str | None
    cast: bool
    collimator: tuple[float, float, float, float]
    shutter: bool
    exposure: Exposure
    window: tuple[float, float, float]
    inverted: bool = False

    @property
    def pixel(self) -> float:
        """The pixel size in mm."""
        return self.field / max(self.shape)


def examine(
    rng: np.random.Generator,
    patient: Patient,
    part: str,
    view: str,
    side: str,
    *,
    size: int,
    difficulty: float,
    shortcut: float,
    told: str | None = None,
) -> Examination:
    """Draw how ``part`` of ``patient`` is pictured.

    Args:
        rng: the picture's own generator.
        patient: whose.
        part: one of ``PARTS`` or ``OTHER_PARTS``.
        view: one of ``VIEWS[part]``.
        side: "L" or "R".
        size: the long side in pixels.
        difficulty: 0 easy, 0.5 the standard, 1 hard: wider poses, sliding fields, less contrast, more noise.
        shortcut: the probability that letter and corner of the marker tell a class instead of being chance.
        told: which class they then tell; None for the part itself.
    """
    spread = 2 * difficulty
    usual, zoom, reach = FIELD[part]
    field_size = usual * patient.size * float(np.exp(rng.normal(0.0, zoom * (0.25 + 0.75 * spread))))
    slide = rng.normal(0, reach * spread, 2) * np.array([0.5, 1.0]) * field_size
    aspect = rng.uniform(0.72, 1.0)
    shape = (size, max(2 * round(size * aspect / 2), 8))
    half = np.array([field_size * shape[1] / size, field_size]) / 2
    pose, finger = _pose(rng, part, view, spread)
    upright = (
        180.0 if part in ("hand", "wrist", "finger") or view == "DP" or (part, view) == ("foot", "oblique") else 0.0
    )
    spin = upright + rng.normal(0, 3 + 7 * spread) + (180.0 if rng.random() < 0.1 * spread else 0.0)
    collimator = _collimator(rng, half)
    marker = _marker(rng, told or part, side, half, collimator, shortcut)
    return Examination(
        part=part,
        view=view,
        side=side,
        pose=pose,
        finger=finger,
        angles=(TURN[view] + float(rng.normal(0, 2 + 6 * spread)), float(spin)),
        offset=(float(slide[0]), float(slide[1])),
        field=field_size,
        shape=shape,
        marker=marker if rng.random() < 0.8 or shortcut > 0 else None,
        hardware=str(rng.choice(["titanium", "steel"])) if rng.random() < 0.08 and part in PARTS else None,
        cast=bool(rng.random() < 0.06) and part in ("elbow", "forearm", "wrist", "hand"),
        collimator=collimator,
        shutter=bool(rng.random() < 0.75),
        exposure=_exposure(rng, spread),
        window=(
            float(rng.uniform(0.01, 0.04)),
            float(rng.uniform(0.985, 0.999)),
            float(np.exp(rng.normal(-0.05, 0.06 + 0.1 * spread))),
        ),
    )


def _pose(rng: np.random.Generator, part: str, view: str, spread: float) -> tuple[Pose, str]:
    finger = str(rng.choice(FINGERS, p=[0.2, 0.25, 0.25, 0.15, 0.15]))
    curl = np.abs(rng.normal(0, 4 + 6 * spread, 5)) + np.array([12.0, 2, 2, 2, 4])
    if part == "finger" and view != "PA":
        curl = np.where(np.array(FINGERS) == finger, rng.uniform(2, 18), rng.uniform(80, 100, 5))
        curl[0] = curl[0] if finger == "thumb" else 25.0
    elbow = abs(float(rng.normal(0, 3 + 5 * spread)))
    if part == "elbow" and view == "lateral":
        elbow = float(rng.normal(85, 6 + 12 * spread))
    arm = part in ("humerus", "shoulder")
    return (
        Pose(
            abduction=float(rng.uniform(4, 14 + 14 * spread)) if arm else 0.0,
            rotation=(70.0 if view in ("lateral", "internal") else 0.0) + float(rng.normal(0, 8)) if arm else 0.0,
            elbow=elbow,
            wrist_deviation=float(rng.normal(0, 3 + 5 * spread)),
            wrist_flexion=float(rng.normal(0, 2 + 4 * spread)),
            fingers=(float(curl[0]), float(curl[1]), float(curl[2]), float(curl[3]), float(curl[4])),
            splay=float(rng.uniform(0.6, 1.9)),
        ),
        finger,
    )


def _collimator(rng: np.random.Generator, half: Array) -> tuple[float, float, float, float]:
    closed = rng.uniform(-0.10, 0.14, 4).clip(0) * 2 if rng.random() < 0.75 else np.zeros(4)
    low, high = -half * (1 - closed[:2]), half * (1 - closed[2:])
    wide = np.where(closed[:2] == 0, 1.2, 1.0), np.where(closed[2:] == 0, 1.2, 1.0)
    low, high = low * wide[0], high * wide[1]
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _marker(
    rng: np.random.Generator, told: str, side: str, half: Array, collimator: tuple[float, ...], shortcut: float
) -> Marker:
    corner, letter = CORNERS[rng.integers(4)], side
    jitter = rng.uniform(0.02, 0.12, 2)
    height = float(rng.uniform(0.07, 0.10) * 2 * half[1])
    if rng.random() < shortcut:
        code = (PARTS + OTHER_PARTS).index(told)
        corner, letter = CORNERS[code % 4], "LR"[code // 4 % 2]
    low, high = np.maximum(collimator[:2], -half), np.minimum(collimator[2:], half)
    middle, reach = (low + high) / 2, (high - low) / 2
    centre = middle + np.array(corner) * (reach - height * 0.8 - jitter * reach)
    return Marker(letter, (float(centre[0]), float(centre[1])), height)


def _exposure(rng: np.random.Generator, spread: float) -> Exposure:
    return Exposure(
        kilovolt=float(rng.uniform(52, 70)),
        photons=float(np.exp(rng.uniform(np.log(3e4), np.log(1e5)) - 1.0 * spread)),
        scatter_ratio=float(rng.uniform(0.05, 0.12 + 0.12 * spread)),
        scatter_width=float(rng.uniform(14, 24)),
        blur_width=float(rng.uniform(0.15, 0.35)),
    )


@cache
def structures() -> frozenset[str]:
    """The names of all that can be removed: every bone, and what is worn."""
    someone = draw_patient(0, 0)
    limb, _ = upper_limb(someone, Pose(), ("trunk", "humerus", "forearm", "hand"))
    bodies = (limb, knee(someone, 0.0), foot(someone, leg=True))
    return frozenset(bone.name for body in bodies for bone in body.bones) | {"marker", "hardware", "cast"}


def posed(patient: Patient, exam: Examination) -> Body:
    """The part in camera coordinates: mm, x right, y down, rays along z, the origin in the picture's centre."""
    if exam.part in OTHER_PARTS:
        return _posed_leg(patient, exam)
    limb, frames = upper_limb(patient, exam.pose, REACH[exam.part])
    frame, pivot = {
        "shoulder": ("trunk", (-26.0, 30.0, 0.0)),
        "humerus": ("humerus", (6.0, 152.0, 0.0)),
        "elbow": ("humerus", (0.0, 302.0, 0.0)),
        "forearm": ("forearm", (2.0, 122.0, 0.0)),
        "wrist": ("hand", (2.0, 2.0, 0.0)),
        "hand": ("hand", (4.0, 84.0, 0.0)),
        "finger": (f"{exam.finger} {1 if exam.finger == 'thumb' else 2}", (0.0, 5.0, 0.0)),
    }[exam.part]
    return _facing(limb, frames[frame], np.array(pivot), patient, exam)


def _posed_leg(patient: Patient, exam: Examination) -> Body:
    here = Frame(np.eye(3), np.zeros(3))
    if exam.part == "knee":
        bent = 30.0 if exam.view == "lateral" else 3.0
        return _facing(knee(patient, bent), here, np.array([0.0, 0.0, 0.0]), patient, exam)
    if exam.view == "lateral":
        side_on = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]])
        upright = foot(patient, leg=True).moved(turn("y", -TURN["lateral"]) @ side_on, np.zeros(3))
        return _facing(upright, here, turn("y", -TURN["lateral"]) @ np.array([30.0, -30.0, 0.0]), patient, exam)
    return _facing(foot(patient, leg=False), here, np.array([0.0, 45.0, 0.0]), patient, exam)


def _facing(whole: Body, frame: Frame, pivot: Array, patient: Patient, exam: Examination) -> Body:
    mirror = np.diag([-1.0 if exam.side == "L" else 1.0, 1.0, 1.0])
    rotation = turn("z", exam.angles[1]) @ mirror @ turn("y", exam.angles[0]) @ frame.rotation.T
    centre = frame.rotation @ pivot + frame.shift
    shift = turn("z", exam.angles[1]) @ np.array([*exam.offset, 0.0])
    return whole.moved(rotation, shift - patient.size * rotation @ centre, patient.size)
