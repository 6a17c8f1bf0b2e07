"""Chord lengths in closed form against marching along the ray, known bodies and volumes."""

import numpy as np
import pytest

from bayescam.data.phantom.skeleton import turn
from bayescam.data.phantom.solids import NOWHERE, Rays, Solids, stack, union_length


def one(start, end, r0, r1, metric=None):
    return Solids(
        np.array([start], float),
        np.array([end], float),
        np.array([r0], float),
        np.array([r1], float),
        np.eye(3)[None] if metric is None else np.asarray(metric, float)[None],
    )


def chord(solids, x, y):
    low, high = Rays.of(solids).intervals(np.asarray(x, np.float32), np.asarray(y, np.float32))
    return high - low


def marched(solids, row, x, y, step=0.05, reach=30.0):
    """How long each ray is inside: distances to many balls between both ends, in the metric."""
    z = np.arange(-reach, reach, step)
    points = np.stack(np.meshgrid(x, y, z, indexing="ij"), axis=-1)
    inside = np.zeros(points.shape[:-1], bool)
    for t in np.linspace(0, 1, 120):
        centre = (1 - t) * solids.start[row] + t * solids.end[row]
        radius = (1 - t) * solids.radius_start[row] + t * solids.radius_end[row]
        inside |= (((points - centre) @ solids.metric[row].T) ** 2).sum(-1) <= radius**2
    return step * inside.sum(-1).T


def test_sphere_and_ellipsoid_have_their_textbook_chords():
    x = np.linspace(-12, 12, 41)
    sphere = chord(one((1, 0, 5), (1, 0, 5), 7, 7), x, [2.0])[0, 0]
    np.testing.assert_allclose(sphere, 2 * np.sqrt(np.maximum(49 - (x - 1) ** 2 - 4, 0)), atol=2e-4)
    a, b, c = 9.0, 4.0, 3.0
    ellipsoid = chord(one((0, 0, 0), (0, 0, 0), 1, 1, np.diag([1 / a, 1 / b, 1 / c])), x, [1.0])[0, 0]
    np.testing.assert_allclose(ellipsoid, 2 * c * np.sqrt(np.maximum(1 - (x / a) ** 2 - 1 / b**2, 0)), atol=2e-4)


def test_capsule_across_the_beam_is_a_cylinder_and_along_it_as_long_as_itself():
    across = chord(one((-20, 0, 0), (20, 0, 0), 5, 5), [0.0, 3.0], [0.0, 3.0])[0]
    np.testing.assert_allclose(across, [[10, 10], [8, 8]], atol=1e-4)
    along = chord(one((0, 0, -20), (0, 0, 20), 5, 5), [0.0, 3.0, 5.1], [0.0])[0, 0]
    np.testing.assert_allclose(along, [50, 48, 0], atol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_random_tapered_and_flattened_capsules_agree_with_marching(seed):
    rng = np.random.default_rng(seed)
    stretch = turn("x", rng.uniform(0, 90)) @ np.diag(1 / rng.uniform(0.4, 1.3, 3)) @ turn("y", rng.uniform(0, 90)).T
    solid = one(rng.uniform(-9, 9, 3), rng.uniform(-9, 9, 3), rng.uniform(2, 8), rng.uniform(0.5, 8), stretch)
    x, y = np.linspace(-14, 14, 8), np.linspace(-15, 13, 7)
    np.testing.assert_allclose(chord(solid, x, y)[0], marched(solid, 0, x, y), atol=0.2)


@pytest.mark.parametrize(
    ("end", "r0", "r1"), [((0, 0, 12), 6, 2), ((1, 0.5, 9), 7, 3), ((0, 0, -4), 3, 8), ((0, 3, 1), 8, 5)]
)
def test_capsules_seen_end_on_agree_with_marching(end, r0, r1):
    solid = one((0, 0, 0), end, r0, r1)
    x, y = np.linspace(-9, 8.4, 8), np.linspace(-8.5, 9.5, 7)
    np.testing.assert_allclose(chord(solid, x, y)[0], marched(solid, 0, x, y), atol=0.2)


def test_union_of_overlapping_and_disjoint_solids_agrees_with_marching():
    rng = np.random.default_rng(3)
    parts = [one(rng.uniform(-8, 8, 3), rng.uniform(-8, 8, 3), *rng.uniform(1, 4, 2)) for _ in range(5)]
    x = y = np.linspace(-10, 10, 9).astype(np.float32)
    low, high = Rays.of(stack(parts)).intervals(x, y)
    z = np.arange(-30, 30, 0.01)
    inside = ((low[..., None] <= z) & (z < high[..., None])).any(axis=0)
    np.testing.assert_allclose(union_length(low, high), 0.01 * inside.sum(-1), atol=0.05)


def test_union_of_misses_is_empty():
    nothing = np.full((3, 2, 2), NOWHERE)
    assert not union_length(nothing, nothing).any()


def test_shadow_sums_to_the_volume_and_lies_in_the_box():
    r0, r1, length = 6.0, 3.0, 20.0
    solid = one((-8, 3, 0), (-8 + length, 3, 0), r0, r1).moved(turn("y", 35) @ turn("z", 20), np.zeros(3))
    x = y = np.arange(-40, 40, 0.25) + 0.125
    shadow = chord(solid, x, y)[0]
    cosine = (r0 - r1) / length  # the cone touches both balls where their normals make this angle with the axis
    cap = lambda r, height: np.pi * height**2 * (3 * r - height) / 3  # noqa: E731
    rim0, rim1 = r0 * np.sqrt(1 - cosine**2), r1 * np.sqrt(1 - cosine**2)
    frustum = np.pi * (length - (r0 - r1) * cosine) * (rim0**2 + rim0 * rim1 + rim1**2) / 3
    volume = frustum + (4 / 3 * np.pi * r0**3 - cap(r0, r0 * (1 - cosine)))
    volume += cap(r1, r1 * (1 - cosine))
    assert shadow.sum() * 0.25**2 == pytest.approx(volume, rel=2e-3)
    rows, columns = np.nonzero(shadow > 0)
    box = solid.boxes()[0]
    assert box[0] <= x[columns.min()]
    assert x[columns.max()] <= box[2]
    assert box[1] <= y[rows.min()]
    assert y[rows.max()] <= box[3]
    assert x[columns.max()] - x[columns.min()] > box[2] - box[0] - 1


def test_shrunk_solids_lie_inside():
    solid = one((0, 0, 0), (10, 5, 3), 6, 4)
    x = y = np.linspace(-12, 18, 31)
    outer, inner = chord(solid, x, y), chord(solid.shrunk(np.array([1.5])), x, y)
    assert (inner <= outer + 1e-4).all()
    assert inner.max() == pytest.approx(outer.max() - 3, abs=0.2)
