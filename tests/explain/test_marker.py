"""The marker's cells against the bones': which are whose, and the closed form of their comparison."""

from __future__ import annotations

import numpy as np
import torch

from bayescam.data.pixels import Geometry
from bayescam.explain.cam import CamPosterior
from bayescam.explain.marker import marker_outranks, marker_regions

from .posteriors import make, random_maps

SQUARE = Geometry(40, 60, 60, 40, 60, 10, 0)  # a wide picture between two bars


def _mask(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[rows, columns] = True
    return mask


def test_cells_are_those_that_the_masks_cover_after_letterboxing():
    letter = _mask(slice(0, 8), slice(0, 8))  # of the cell (0, 0), whose lower half is picture: 64 of 400 pixels
    bones = _mask(slice(10, 40), slice(0, 60))
    found = marker_regions([{"marker": letter, "bone": bones}], [SQUARE], (3, 3))
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[0, 0] = True
    assert torch.equal(found.marker[0], expected)
    expected = torch.ones(3, 3, dtype=torch.bool)
    expected[0] = False  # the middle row is covered from its first pixel, the lower one by half
    assert torch.equal(found.bones[0], expected)


def test_the_evidence_mask_goes_before_all_bones_and_the_markers_cells_are_no_bones():
    whole = _mask(slice(0, 40), slice(0, 60))
    named = {"marker": _mask(slice(0, 20), slice(0, 20)), "bone": whole, "evidence": _mask(slice(0, 40), slice(0, 20))}
    found = marker_regions([named], [SQUARE], (3, 3))
    assert found.bones[0].tolist() == [[False, False, False], [False, False, False], [True, False, False]]


def test_images_without_marker_or_bones_have_no_answer_and_others_keep_theirs():
    posterior, _ = make("full")
    cam = CamPosterior(random_maps(4, size=(3, 3)), posterior)
    letter, bones = _mask(slice(0, 8), slice(0, 8)), _mask(slice(20, 40), slice(0, 60))
    masks = [
        {"bone": bones},
        {"marker": letter, "bone": bones},
        {"marker": letter},
        {"marker": ~bones & False} | {"bone": bones},
    ]
    regions = marker_regions(masks, [SQUARE] * 4, cam.shape)
    assert regions.chosen.tolist() == [1]
    found = marker_outranks(cam, regions, torch.tensor([0, 2, 1, 1]))
    assert torch.isnan(found).tolist() == [True, False, True, True]
    alone = cam.select([1]).outranks(regions.marker, regions.bones, 2)
    torch.testing.assert_close(found[1:2], alone)
    nothing = marker_regions(masks[:1] * 4, [SQUARE] * 4, cam.shape)
    assert bool(torch.isnan(marker_outranks(cam, nothing, 0)).all())
