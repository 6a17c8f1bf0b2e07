"""What is not the patient: lead letters, plates with screws, wires, casts."""

from __future__ import annotations

import numpy as np

from bayescam.data.phantom.clinic import Examination, Marker
from bayescam.data.phantom.projection import Canvas, filled
from bayescam.data.phantom.skeleton import Body
from bayescam.data.phantom.solids import Array, Solids

# strokes x0, y0, x1, y1 in a box from (-0.3, -0.5) to (0.3, 0.5), y down
STROKES = {
    "L": ((-0.28, -0.5, -0.28, 0.5), (-0.28, 0.5, 0.3, 0.5)),
    "R": (
        (-0.28, -0.5, -0.28, 0.5),
        (-0.28, -0.5, 0.16, -0.46),
        (0.16, -0.46, 0.26, -0.24),
        (0.26, -0.24, 0.14, -0.02),
        (0.14, -0.02, -0.28, 0.02),
        (-0.02, 0.02, 0.3, 0.5),
    ),
}
LEAD = 1.5  # mm
CAST = 7.0  # mm of plaster


def marker_solids(marker: Marker) -> Solids:
    """The letter's strokes as flat capsules of lead in the detector's plane."""
    strokes = np.array(STROKES[marker.letter]) * marker.height
    centre = np.array(marker.centre)
    stroke = 0.085 * marker.height
    start, end = (np.c_[strokes[:, i : i + 2] + centre, np.zeros(len(strokes))] for i in (0, 2))
    radius = np.full(len(strokes), stroke)
    metric = np.tile(np.diag([1, 1, stroke / (LEAD / 2)]), (len(strokes), 1, 1))
    return Solids(start, end, radius, radius, metric)


def hardware_solids(body: Body, exam: Examination) -> Solids:
    """A plate with screws on the shaft nearest the picture's centre."""
    start, end, radius = _nearest_shaft(body)
    axis = end - start
    length = float(np.linalg.norm(axis))
    axis = axis / length
    across = np.cross(axis, [0.35, 0.2, 1.0])
    across /= np.linalg.norm(across)
    side = np.cross(axis, across)
    thick = max(0.22 * radius, 0.5)
    lift = across * (radius + thick)
    count = int(np.clip(length / (3.2 * radius), 3, 7))
    at = start + np.linspace(0.12, 0.88, count)[:, None] * (end - start)
    metric = np.outer(axis, axis) + np.outer(side, side) + np.outer(across, across) * (0.55 * radius / thick)
    screw = 0.2 * radius
    return Solids(
        np.r_[[at[0] + lift], at + lift],
        np.r_[[at[-1] + lift], at - across * (1.1 * radius)],
        np.r_[0.55 * radius, np.full(count, screw)],
        np.r_[0.55 * radius, np.full(count, 0.7 * screw)],
        np.stack([metric, *([np.eye(3)] * count)]),
    )


def _nearest_shaft(body: Body) -> tuple[Array, Array, float]:
    best = None
    for one in body.bones:
        if one.name == "scapula" or one.name.startswith("rib"):
            continue
        for row in np.flatnonzero(one.spongy < 0.08):
            start, end = one.outer.start[row], one.outer.end[row]
            distance = float(np.hypot(*((start + end) / 2)[:2]))
            if np.linalg.norm(end - start) > 5 and (best is None or distance < best[0]):
                best = distance, start, end, float(one.outer.radius_start[row])
    if best is None:
        raise ValueError(
            "the body has no shaft to hold hardware; give one with a bone whose spongy share is below 0.08"
        )
    return best[1:]


def cast_thickness(body: Body, canvas: Canvas) -> Array:
    """Plaster (H, W) in mm: the envelope grown by the cast's thickness less the envelope, on both walls."""
    tissue = body.tissue
    grown = Solids(tissue.start, tissue.end, tissue.radius_start + CAST, tissue.radius_end + CAST, tissue.metric)
    return np.maximum(filled(grown, canvas) - filled(tissue, canvas), 0)
