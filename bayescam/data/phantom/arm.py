"""The upper limb from clavicle to finger tips, as tables of tapered capsules in millimetres for a man of 1.78 m.

Frames: y runs distally, x laterally (to the thumb), z to the palm; the arm hangs, the palm looks forward. Lengths and
widths are round figures near adult averages, then drawn and redrawn until the pictures looked right.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from bayescam.data.phantom.patient import Patient
from bayescam.data.phantom.skeleton import Body, Point, Rod, body, bone, join, turn
from bayescam.data.phantom.solids import Array

ELBOW_AT = np.array([0.0, 300.0, 0.0])  # in the humerus frame
WRIST_AT = np.array([6.0, 251.0, 0.0])  # in the forearm frame
FINGERS = ("thumb", "index", "middle", "ring", "little")
# metacarpal base (x, y, z), its fan angle in degrees, lengths of metacarpal and phalanges (the thumb has two), breadth
RAYS: dict[str, tuple[Point, float, tuple[float, ...], float]] = {
    "thumb": ((24.0, 27.0, 7.0), 33.0, (45.0, 32.0, 23.0), 1.1),
    "index": ((12.0, 32.0, 0.0), 8.0, (67.0, 41.0, 24.0, 17.0), 1.0),
    "middle": ((2.5, 33.0, 0.0), 1.0, (64.0, 45.0, 28.0, 18.0), 1.03),
    "ring": ((-7.0, 32.0, 0.0), -6.0, (57.0, 42.0, 27.0, 18.0), 0.95),
    "little": ((-15.5, 29.5, 0.0), -14.0, (53.0, 33.0, 19.0, 16.0), 0.86),
}


@dataclass(frozen=True)
class Pose:
    """Joint angles in degrees; ``fingers`` (5,) their flexion, thumb first; ``splay`` scales how far they spread."""

    abduction: float = 0.0
    rotation: float = 0.0
    elbow: float = 0.0
    wrist_deviation: float = 0.0
    wrist_flexion: float = 0.0
    fingers: tuple[float, ...] = (10.0, 0.0, 0.0, 0.0, 0.0)
    splay: float = 1.0


@dataclass(frozen=True)
class Frame:
    """Where a part lies: x -> rotation x + shift, from the frame of the part to that of the body."""

    rotation: Array
    shift: Array

    def then(self, rotation: Array, shift: Array) -> Frame:
        """The frame of a child whose own placement is (rotation, shift)."""
        return Frame(self.rotation @ rotation, self.rotation @ shift + self.shift)


def upper_limb(patient: Patient, pose: Pose, segments: Collection[str]) -> tuple[Body, dict[str, Frame]]:
    """Those ``segments`` ("trunk", "humerus", "forearm", "hand") of the right upper limb, and the frames of all.

    The body's own frame has the humeral head at the origin; segments are "humerus", "forearm", "hand" and, for each
    finger, "<finger> 0" (the metacarpal) and so on to the tip.
    """
    humerus = Frame(turn("z", -pose.abduction) @ turn("y", pose.rotation), np.zeros(3))
    forearm = humerus.then(turn("x", pose.elbow), ELBOW_AT)
    hand = forearm.then(turn("z", pose.wrist_deviation) @ turn("x", pose.wrist_flexion), WRIST_AT)
    frames = {"trunk": Frame(np.eye(3), np.zeros(3)), "humerus": humerus, "forearm": forearm, "hand": hand}
    build = {"trunk": _shoulder, "humerus": _upper_arm, "forearm": _forearm, "hand": _wrist}
    bodies = [
        build[name](patient).moved(frames[name].rotation, frames[name].shift) for name in build if name in segments
    ]
    for index, name in enumerate(FINGERS if "hand" in segments else ()):
        for segment, (part, frame) in enumerate(_ray(patient, name, pose.fingers[index], pose.splay, hand)):
            bodies.append(part.moved(frame.rotation, frame.shift))
            frames[f"{name} {segment}"] = frame
    return join(bodies), frames


@lru_cache(maxsize=4)
def _shoulder(patient: Patient) -> Body:
    home = "shoulder"
    glenoid = patient.proportion[0]
    scapula = [
        Rod(home, (-30, -9, -2), 7, (-31, 14, -2), 8.5, 1.4, 0.3),
        Rod(home, (-34, 2, -3), 13 * glenoid, (-48, 6, -5), 10, 1.2, 0.25, (1, 1, 0.7)),
        Rod(home, (-38, 16, -4), 7, (-68, 112, -14), 5, 2.0, 0.15),
        Rod(home, (-104, -18, -16), 3, (-71, 114, -15), 3.5, 1.2, 0.15),
        Rod(home, (-74, 16, -14), 31, (-71, 104, -14), 6, 0.8, 0.0, (1, 1, 0.05)),
        Rod(home, (-48, -14, -8), 4, (-102, -22, -15), 4, 1.2, 0.15),
    ]
    spine = [
        Rod(home, (-98, -4, -22), 4, (-30, -22, -30), 5.5, 1.4, 0.2),
        Rod(home, (-30, -22, -30), 6, (2, -36, -22), 7.5, 1.4, 0.2),
        Rod(home, (2, -36, -22), 8, (18, -33, -6), 8.5, 1.3, 0.2, (1, 0.7, 1)),
    ]
    coracoid = [
        Rod(home, (-40, -12, 2), 7.5, (-34, -20, 16), 6.5, 1.4, 0.25),
        Rod(home, (-34, -20, 16), 6.5, (-18, -12, 26), 5, 1.4, 0.25),
    ]
    clavicle = [
        Rod(home, (3, -44, -10), 7.5, (-30, -50, -4), 6.5, 1.6, 0.2),
        Rod(home, (-30, -50, -4), 6.2, (-95, -46, 16), 6, 2.0, 0.15),
        Rod(home, (-95, -46, 16), 6.2, (-140, -34, 20), 9, 1.8, 0.2),
    ]
    bones = [
        bone(name, rods, density=patient.density)
        for name, rods in (("scapula", scapula + spine + coracoid), ("clavicle", clavicle))
    ]
    bones += [bone(f"rib {k + 1}", _rib(k), density=patient.density) for k in range(6)]
    fat = patient.build
    tissue = [
        Rod(home, (-112, 60, 0), 88 * fat, (-112, 240, 0), 95 * fat, flat=(1, 1, 0.75)),
        Rod(home, (-30, -24, -4), 26 * fat, (-150, -80, -4), 42 * fat, flat=(1, 1, 0.8)),
        Rod(home, (-60, 0, 0), 50 * fat, (-160, 0, 0), 78 * fat, flat=(1, 1, 0.8)),
        Rod(home, (-20, 10, 0), 48 * fat, (-70, 60, 0), 55 * fat, flat=(1, 1, 0.8)),
    ]
    air = [Rod(home, (-150, 12, 0), 44, (-156, 240, 0), 66, flat=(1, 1, 0.75))]
    return body(bones, tissue, air=air, joints=[("shoulder", (-22, 2, 0), 17)])


def _rib(k: int) -> list[Rod]:
    y = -14 + 34 * k
    reach = 62 - 7 * abs(k - 4)
    angle = np.radians(np.linspace(-85, 75, 7))
    path = np.stack([-150 + reach * np.cos(angle), y + np.linspace(-8, 62, 7), 58 * np.sin(angle)], axis=1)
    points: list[Point] = [(float(a), float(b), float(c)) for a, b, c in path]
    return [Rod("shoulder", a, 4.3, b, 4.3, 1.0, 0.15) for a, b in pairwise(points)]


@lru_cache(maxsize=4)
def _upper_arm(patient: Patient) -> Body:
    wide = patient.proportion[1]
    rods = [
        Rod("shoulder", (0, 0, 0), 23.5, (3, 4, 0), 22.5, 1.2, 0.3),
        Rod("shoulder", (20, -10, -2), 9, (20, 16, 0), 11, 1.2, 0.26),
        Rod("shoulder", (7, 12, 0), 19.5, (12, 52, 0), 13 * wide, 1.8, 0.22),
        Rod("humerus", (12, 46, 0), 12.8 * wide, (11, 150, 0), 11 * wide, 4.6, 0.04),
        Rod("humerus", (11, 148, 0), 11 * wide, (6, 246, 0), 10.5 * wide, 4.4, 0.04),
        Rod("elbow", (7, 238, 0), 9.5, (-17, 286, 0), 8.5, 2.2, 0.2, (1, 1, 0.9)),
        Rod("elbow", (6, 238, 0), 9.5, (21, 286, 0), 8.0, 2.2, 0.2, (1, 1, 0.9)),
        Rod("elbow", (6, 240, 0), 11, (2, 274, 0), 19, 2.6, 0.15, (1, 1, 0.4)),
        Rod("elbow", (2, 276, 0), 16, (2, 284, 0), 17, 2.0, 0.1, (1, 1, 0.2)),
        Rod("elbow", (-22, 285, -2), 7.5, (-29, 286, -4), 6.0, 1.3, 0.28),
        Rod("elbow", (23, 287, 0), 6.5, (26, 287, 0), 6.0, 1.3, 0.28),
        Rod("elbow", (-17, 296, 1), 10.5, (-3, 293, 1), 8.2, 1.3, 0.3),
        Rod("elbow", (-3, 293, 1), 8.2, (16, 294, 3), 10.5, 1.3, 0.3),
    ]
    fat = patient.build
    tissue = [
        Rod("humerus", (6, 0, 0), 42 * fat, (18, 90, 0), 46 * fat),
        Rod("humerus", (14, 80, 0), 46 * fat, (4, 290, 0), 37 * fat),
        Rod("humerus", (2, 288, 0), 41 * fat, (2, 304, 0), 41 * fat, flat=(1, 1, 0.85)),
    ]
    plates = []
    if patient.growing:
        plates = [
            Rod("shoulder", (4, 20, 0), 27, (4, 20, 0), 27, flat=(1, 0.05, 1)),
            Rod("elbow", (0, 284, 0), 34, (0, 284, 0), 34, flat=(1, 0.04, 1)),
        ]
    joints = [("elbow", (0, 303, 0), 26)]
    return body([bone("humerus", rods, density=patient.density)], tissue, plates=plates, joints=joints)


@lru_cache(maxsize=4)
def _forearm(patient: Patient) -> Body:
    wide = patient.proportion[2]
    ulna = [
        Rod("elbow", (-9, -13, -15), 9.5, (-9, 6, -14), 10.5, 1.8, 0.28),
        Rod("elbow", (-9, 9, -8), 10, (-9, 13, 7), 5.5, 1.6, 0.28),
        Rod("elbow", (-9, 10, -8), 11, (-11, 58, -4), 8, 2.2, 0.15),
        Rod("forearm", (-11, 54, -4), 7.8 * wide, (-15, 150, -1), 6.5 * wide, 3.0, 0.04),
        Rod("forearm", (-15, 148, -1), 6.5 * wide, (-15, 218, -2), 5.4 * wide, 2.4, 0.05),
        Rod("wrist", (-15, 214, -2), 5.6, (-14, 238, -2), 8, 1.4, 0.25),
        Rod("wrist", (-19, 240, -5), 3.4, (-20, 248, -5), 2.2, 1.0, 0.25),
    ]
    radius = [
        Rod("elbow", (16, 9.5, 3), 10.5, (16, 15, 3), 10.5, 1.3, 0.28, (1, 0.55, 1)),
        Rod("elbow", (16, 14, 3), 8.2, (14, 34, 2), 7, 1.8, 0.15),
        Rod("elbow", (9, 40, 2), 6.5, (9, 47, 2), 6, 1.8, 0.15),
        Rod("forearm", (14, 32, 2), 7.2 * wide, (19, 118, 0), 7.6 * wide, 2.9, 0.04),
        Rod("forearm", (19, 116, 0), 7.6 * wide, (15, 210, 0), 7.6 * wide, 2.9, 0.05),
        Rod("wrist", (15, 206, 0), 7.8, (15.5, 239, 0), 9, 1.5, 0.25),
        Rod("wrist", (14, 208, 0), 7.6, (9, 240, 0), 8.6, 1.4, 0.25),
        Rod("wrist", (14, 208, 0), 7.6, (2, 239, 0), 8.5, 1.4, 0.25),
        Rod("wrist", (18, 238, 0), 7, (22, 250, 0), 3.8, 1.1, 0.25),
    ]
    bones = [bone("ulna", ulna, density=patient.density), bone("radius", radius, density=patient.density)]
    fat = patient.build
    tissue = [
        Rod("forearm", (2, -10, 0), 37 * fat, (6, 50, 0), 43 * fat, flat=(1, 1, 0.9)),
        Rod("forearm", (6, 50, 0), 43 * fat, (2, 215, 0), 27 * fat, flat=(1, 1, 0.85)),
        Rod("forearm", (2, 210, 0), 27 * fat, (3, 262, 0), 28 * fat, flat=(1, 1, 0.7)),
    ]
    plates = []
    if patient.growing:
        plates = [
            Rod("wrist", (9, 236, 0), 20, (9, 236, 0), 20, flat=(1, 0.06, 1)),
            Rod("wrist", (-14, 234, -2), 9, (-14, 234, -2), 9, flat=(1, 0.14, 1)),
            Rod("elbow", (15, 21, 3), 11, (15, 21, 3), 11, flat=(1, 0.12, 1)),
        ]
    return body(bones, tissue, plates=plates)


CARPALS: dict[str, tuple[tuple[Point, float, Point, float], ...]] = {
    "scaphoid": (((8.2, 6.2, 0), 6.7, (17, 13.5, 4), 5.6),),
    "lunate": (((-6.8, 6.0, 0), 7.0, (-5, 7.2, 0), 6.8),),
    "triquetrum": (((-18, 12, -2), 5.8, (-21, 15, -2), 5.0),),
    "pisiform": (((-17.5, 15, 11), 4.8, (-17.5, 17, 11), 4.6),),
    "trapezium": (((22.5, 22, 4), 6.1, (20.5, 22, 4), 5.6),),
    "trapezoid": (((11.4, 24.6, 0), 5.2, (10.6, 26, 0), 5.1),),
    "capitate": (((0.2, 16.5, 0), 5.6, (0.8, 26.5, 0), 6.2),),
    "hamate": (((-10.4, 19.5, 0), 4.9, (-12.2, 26, 0), 6.4), ((-11.5, 24, 4), 3.0, (-11.5, 24, 11), 2.6)),
}


@lru_cache(maxsize=4)
def _wrist(patient: Patient) -> Body:
    ripe = 1.05 * (float(np.clip(0.45 + 0.045 * patient.age, 0.5, 1.0)) if patient.growing else 1.0)
    bones = []
    for name, pieces in CARPALS.items():
        rods = [Rod("wrist", a, ra * ripe, b, rb * ripe, 0.9, 0.33) for a, ra, b, rb in pieces]
        bones.append(bone(name, rods, density=patient.density))
    fat = patient.build**0.5
    tissue = [
        Rod("wrist", (3, -4, 0), 28 * fat, (2, 30, 1), 34 * fat, flat=(1, 1, 0.62)),
        Rod("wrist", (14, 22, 4), 17 * fat, (26, 44, 8), 14 * fat),
    ]
    return body(bones, tissue, joints=[("wrist", (2, 2, 0), 18), ("wrist", (0, 31, 0), 13)])


def _ray(patient: Patient, name: str, flexion: float, splay: float, hand: Frame) -> list[tuple[Body, Frame]]:
    """Metacarpal and phalanges of one ray with their frames, from the palm out."""
    base, fan, lengths, breadth = RAYS[name]
    stretch = patient.proportion[3 + FINGERS.index(name)] ** 0.5
    frame = hand.then(
        turn("z", -fan * (0.75 + 0.25 * splay)) @ turn("y", 35.0 if name == "thumb" else 0.0), np.array(base)
    )
    placed: list[tuple[Body, Frame]] = []
    widths = (1.0, 0.82, 0.7, 0.62) if len(lengths) == 4 else (1.0, 0.85, 0.75)
    for index, length in enumerate(lengths):
        length = length * stretch
        part = _tubular(patient, name, index, index == len(lengths) - 1, length, breadth * widths[index])
        placed.append((part, frame))
        bend = turn("x", flexion * (0.6, 1.0, 0.7)[min(index, 2)])
        spread = turn("z", -fan * 0.45 * (splay - 1)) if index == 0 else np.eye(3)
        frame = frame.then(spread @ bend, np.array([0.0, length, 0.0]))
    return placed


@lru_cache(maxsize=64)
def _tubular(patient: Patient, finger: str, index: int, last: bool, length: float, wide: float) -> Body:
    """A metacarpal (index 0) or phalanx along y from 0 to ``length``, with the joint at its base."""
    home = "hand" if index == 0 else "finger"
    base, shaft, head = (6.7, 4.3, 7.2) if index == 0 else (8.0, 4.6, 6.2)
    base, shaft, head = base * wide, shaft * wide, (head if not last else 5.0) * wide
    gap = 0.9
    rods = [
        Rod(home, (0, gap + base * 0.55, 0), base, (0, 0.34 * length, 0), shaft * 1.05, 1.3, 0.22, (1, 0.62, 0.85)),
        Rod(home, (0, 0.3 * length, 0), shaft * 1.04, (0, 0.66 * length, 0), shaft, 1.9 * wide, 0.05, (1, 1, 0.85)),
        Rod(home, (0, 0.62 * length, 0), shaft, (0, length - head * 0.92 - gap, 0), head, 1.2, 0.24, (1, 1, 0.85)),
    ]
    if last:
        rods[1] = rods[1]._replace(radius_end=shaft * 0.72)
        rods[2] = rods[2]._replace(radius_start=shaft * 0.72, flat=(1, 0.7, 0.6))
    names = ("metacarpal", "proximal phalanx", "middle phalanx", "distal phalanx")
    name = names[3] if last else names[index]
    flesh = (
        (13.0, 10.2, 9.2, 8.2)[index if not last else 3]
        * patient.build**0.5
        * (1.08 if finger == "thumb" else wide**0.3)
    )
    tip = flesh * 0.93 if last else flesh * 0.97
    tissue = [Rod(home, (0, 0, 0), flesh, (0, length - (0 if not last else 4), 0), tip, flat=(1, 1, 0.95))]
    if index == 0 and finger != "thumb":
        tissue = [
            Rod(home, (0, 0, 1), 15 * patient.build**0.5, (0, length, 1), 13.5 * patient.build**0.5, flat=(1, 1, 0.9))
        ]
    plates = []
    if patient.growing:
        at = 0.14 * length if index else 0.82 * length
        plates = [Rod(home, (0, at, 0), 7.5 * wide, (0, at, 0), 7.5 * wide, flat=(1, 0.14, 1))]
    joint = [] if index == 0 else [("hand" if index == 1 else "finger", (0.0, 0.0, 0.0), 9.0 * wide)]
    return body([bone(f"{finger} {name}", rods, density=patient.density)], tissue, plates=plates, joints=joint)
