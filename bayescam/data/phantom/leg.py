"""Knee and foot, which no network here is trained on: for out-of-distribution tests. Frames as in the arm."""

from __future__ import annotations

import numpy as np

from bayescam.data.phantom.patient import Patient
from bayescam.data.phantom.skeleton import Body, Bone, Point, Rod, body, bone, join, turn
from bayescam.data.phantom.solids import Array


def knee(patient: Patient, flexion: float) -> Body:
    """A right knee bent by ``flexion`` degrees, the joint at the origin, the thigh above it."""
    fat = patient.build
    femur = [
        Rod("knee", (4, -200, 4), 14.5, (2, -75, 2), 14.5, 5.0, 0.05),
        Rod("knee", (0, -80, 2), 15, (-18, -24, 0), 19, 1.8, 0.25),
        Rod("knee", (0, -80, 2), 15, (18, -24, 0), 19, 1.8, 0.25),
        Rod("knee", (-21, -23, -8), 19, (-21, -21, 4), 18.5, 1.4, 0.3),
        Rod("knee", (21, -22, -8), 18.5, (21, -20, 4), 18.5, 1.4, 0.3),
    ]
    tibia = [
        Rod("knee", (-18, 14, -2), 19, (-3, 52, -2), 16, 1.5, 0.27),
        Rod("knee", (18, 14, -2), 18.5, (-1, 52, -2), 16, 1.5, 0.27),
        Rod("knee", (-22, 8, -2), 16, (22, 8, -2), 16, 1.3, 0.3, (1, 0.4, 1)),
        Rod("knee", (-2, 1, 0), 6, (-3, -3.5, 0), 2.4, 1.0, 0.3),
        Rod("knee", (-2, 50, 0), 16, (-4, 220, 0), 12.5, 4.2, 0.05),
    ]
    fibula = [
        Rod("knee", (31, 24, -16), 9.5, (27, 50, -16), 6.5, 1.4, 0.25),
        Rod("knee", (27, 48, -16), 6.6, (22, 220, -14), 6.4, 2.6, 0.05),
    ]
    patella = [Rod("knee", (2, -32, 34), 20, (2, -27, 34), 18, 1.3, 0.32, (1, 1, 0.5))]
    thigh = [
        Rod("knee", (2, -230, 0), 78 * fat, (0, -30, 0), 58 * fat),
        Rod("knee", (0, -40, 8), 56 * fat, (0, 10, 2), 54 * fat),
    ]
    calf = [
        Rod("knee", (0, 0, 0), 53 * fat, (2, 110, -8), 55 * fat),
        Rod("knee", (2, 100, -8), 55 * fat, (0, 260, 0), 40 * fat),
    ]
    plates = [Rod("knee", (0, -36, 0), 46, (0, -36, 0), 46, flat=(1, 0.03, 1))] if patient.growing else []
    upper = body([bone("femur", femur, density=patient.density), bone("patella", patella)], thigh, plates=plates)
    plates = [Rod("knee", (0, 22, 0), 42, (0, 22, 0), 42, flat=(1, 0.03, 1))] if patient.growing else []
    lower = body(
        [bone("tibia", tibia, density=patient.density), bone("fibula", fibula, density=patient.density)],
        calf,
        plates=plates,
        joints=[("knee", (0, -4, 0), 34)],
    )
    return join([upper, lower.moved(turn("x", -flexion), np.zeros(3))])


TARSUS: dict[str, list[Rod]] = {
    "tibia": [
        Rod("foot", (0, -8, 200), 13, (0, -8, 62), 14, 3.6, 0.05),
        Rod("foot", (0, -8, 66), 14, (-3, -8, 40), 20, 1.4, 0.27),
    ],
    "fibula": [
        Rod("foot", (24, -14, 200), 6.5, (24, -14, 60), 6.5, 2.4, 0.05),
        Rod("foot", (24, -14, 62), 7, (25, -14, 22), 8, 1.4, 0.2),
    ],
    "talus": [
        Rod("foot", (-2, -8, 14), 18, (-4, 2, 10), 16, 1.3, 0.32),
        Rod("foot", (-4, 2, 8), 13, (-8, 26, 4), 12, 1.3, 0.3),
    ],
    "calcaneus": [
        Rod("foot", (4, -56, -20), 18, (4, -20, -14), 15, 1.3, 0.28),
        Rod("foot", (4, -20, -14), 15, (12, 18, -14), 11.5, 1.2, 0.28),
    ],
    "navicular": [Rod("foot", (-20, 38, 0), 9.5, (0, 38, 4), 9, 1.1, 0.3)],
    "cuboid": [Rod("foot", (16, 36, -12), 11, (16, 46, -12), 10.5, 1.1, 0.3)],
    "medial cuneiform": [Rod("foot", (-22, 52, -4), 8.5, (-23, 64, -5), 8.5, 1.1, 0.3)],
    "middle cuneiform": [Rod("foot", (-8, 52, 2), 7, (-8, 60, 1), 7, 1.1, 0.3)],
    "lateral cuneiform": [Rod("foot", (4, 52, 0), 7, (5, 62, 0), 7, 1.1, 0.3)],
}
# for each toe from the big one: base of its metatarsal (x, y, z), fan angle in degrees, breadth, lengths of its bones
TOES: tuple[tuple[Point, float, float, tuple[int, ...]], ...] = (
    ((-25, 74, -8), -3, 1.55, (60, 32, 26)),
    ((-8, 70, -3), 0, 0.95, (72, 26, 12, 10)),
    ((5, 70, -4), 4, 0.9, (69, 24, 11, 10)),
    ((14, 66, -8), 8, 0.9, (67, 22, 10, 10)),
    ((23, 60, -13), 13, 0.95, (66, 20, 8, 9)),
)


def foot(patient: Patient, *, leg: bool) -> Body:
    """A right foot flat on the ground, with the ``leg`` or without: toes along y, sole towards -z, big toe at -x."""
    fat = patient.build**0.5
    shown = [name for name in TARSUS if leg or name not in ("tibia", "fibula")]
    bones = [bone(name, TARSUS[name], density=patient.density) for name in shown]
    tissue = [
        Rod("foot", (2, -60, -24), 27 * fat, (0, 20, -12), 33 * fat),
        Rod("foot", (0, 0, 0), 36 * fat, (-2, 90, -16), 33 * fat, flat=(1.15, 1, 0.75)),
    ]
    if leg:
        tissue.append(Rod("foot", (4, -10, 230), 40 * fat, (4, -10, 20), 36 * fat))
    for number in range(1, len(TOES) + 1):
        more_bones, more_tissue = _toe(patient, number)
        bones += more_bones
        tissue += more_tissue
    return body(bones, tissue, joints=[("foot", (0, -8, 32), 22), ("foot", (-25, 134, -14), 14)])


def _toe(patient: Patient, number: int) -> tuple[list[Bone], list[Rod]]:
    """The metatarsal and phalanges of toe ``number`` from 1, and their flesh."""
    base, fan, wide, lengths = TOES[number - 1]
    direction = turn("z", -fan) @ turn("x", -7.0) @ np.array([0.0, 1.0, 0.0])
    fat = patient.build**0.5 * wide**0.4
    bones, tissue = [], []
    at = np.array(base, float)
    for index, length in enumerate(lengths):
        low, mid, high, stop = (_point(at + direction * share * length) for share in (0.14, 0.5, 0.87, 1.0))
        ends = (6.8, 4.0, 5.8) if index == 0 else (4.7, 2.9, 3.8)
        first, middle, last = (radius * wide for radius in ends)
        rods = [
            Rod("foot", low, first, mid, middle, 1.4, 0.2),
            Rod("foot", mid, middle, high, last, 1.3, 0.2),
        ]
        bones.append(bone(f"toe {number} bone {index + 1}", rods, density=patient.density))
        flesh = (16.0 if index == 0 else 9.0) * fat
        tissue.append(Rod("foot", _point(at), flesh, stop, flesh * 0.95))
        at = np.array(stop)
    return bones, tissue


def _point(position: Array) -> Point:
    return float(position[0]), float(position[1]), float(position[2])
