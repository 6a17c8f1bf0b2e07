"""Interpolation against torch's own, variances against explicit matrices, and the way back to the original pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from bayescam.data.pixels import Geometry
from bayescam.explain.cam import CamPosterior
from bayescam.explain.upsample import Upsampling, cells_of_mask, mask_shares, pixel_maps

from .posteriors import STRUCTURES, make, random_maps


@pytest.mark.parametrize(
    ("shape", "size"), [((7, 7), (224, 224)), ((2, 3), (10, 17)), ((1, 4), (6, 4)), ((5, 1), (3, 3))]
)
def test_values_are_bilinear_with_half_pixel_centres(shape, size):
    cells = torch.randn(2, 3, *shape, dtype=torch.float64)
    expected = interpolate(cells, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(Upsampling.to_size(shape, size).values(cells), expected)


def test_one_hot_cell_keeps_its_centre():
    cells = torch.zeros(4, 4, dtype=torch.float64)
    cells[1, 2] = 1
    pixels = Upsampling.to_size((4, 4), (40, 40)).values(cells)
    weight = pixels / pixels.sum()
    centre = [float((weight.sum(1 - axis) * (torch.arange(40) + 0.5)).sum()) for axis in (0, 1)]
    assert centre == pytest.approx([15.0, 25.0])  # (1 + 1/2) and (2 + 1/2) cells of ten pixels
    assert bool((pixels.flip(0)[4:26, 14:36] > 0).any())
    peak = (pixels == pixels.max()).nonzero().double().mean(0) + 0.5
    assert peak.tolist() == [15.0, 25.0]


@pytest.mark.parametrize("structure", [*STRUCTURES, "draws"])
def test_pixel_maps_are_those_of_interpolated_features(structure):
    """Interpolating the features and then asking for mean and sd is the definition; the covariance route must agree."""
    posterior = make("full" if structure == "draws" else structure)[0]
    source = posterior.sample(64, seed=0) if structure == "draws" else posterior
    maps = random_maps()
    upsampling = Upsampling.to_size((2, 3), (9, 8))
    wide = CamPosterior(upsampling.values(maps), source)
    found = pixel_maps(CamPosterior(maps, source), 1, upsampling, t=0.2)
    torch.testing.assert_close(found.mean, wide.mean[:, 1])
    torch.testing.assert_close(found.sd, wide.sd[:, 1])
    torch.testing.assert_close(found.exceedance, wide.exceedance(0.2)[:, 1])


def test_interpolating_the_sd_would_overstate_it():
    cam = CamPosterior(random_maps(), make("diag")[0])
    upsampling = Upsampling.to_size((2, 3), (20, 30))
    exact, wrong = pixel_maps(cam, 0, upsampling).sd, upsampling.values(cam.sd[:, 0])
    assert bool((wrong >= exact - 1e-12).all())
    assert float((wrong / exact).max()) > 1.001


@pytest.mark.parametrize(("height", "width"), [(50, 90), (200, 64), (33, 33)])
def test_back_to_original_pixels_of_any_aspect(height, width):
    """A picture drawn in original pixels, letterboxed and pooled to cells, comes back to where it was."""
    geometry = Geometry.fit(height, width, 64)
    upsampling = Upsampling.to_original((64, 64), geometry)
    assert upsampling.size == (height, width)
    y, x = np.mgrid[:height, :width]
    blob = np.exp(-(((y - 0.3 * height) / 12) ** 2 + ((x - 0.7 * width) / 12) ** 2)).astype(np.float32)
    back = upsampling.values(torch.from_numpy(geometry.to_square(blob)).double()).numpy()
    inside = blob > 0.5
    assert np.abs(back - blob)[inside].max() < 0.08
    torch.testing.assert_close(
        upsampling.values(torch.rand(64, 64, dtype=torch.float64).mul(0).add(2)),
        torch.full((height, width), 2.0, dtype=torch.float64),
    )


def test_original_pixels_agree_with_the_geometrys_own_way_back():
    geometry = Geometry.fit(40, 80, 32)
    cells = torch.rand(32, 32, dtype=torch.float64)
    found = Upsampling.to_original((32, 32), geometry).values(cells)
    torch.testing.assert_close(found[2:-2, 2:-2], geometry.from_square(cells)[2:-2, 2:-2])


def test_mask_shares_are_areas():
    mask = np.zeros((8, 12), dtype=bool)
    mask[0:2, 0:3] = True
    mask[4:8, 4:8] = True
    shares = mask_shares(mask, (2, 3))
    assert shares.tolist() == [[6 / 16, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert cells_of_mask(mask, (2, 3)).tolist() == [[False, False, False], [False, True, False]]
    assert cells_of_mask(mask, (2, 3), least=0.3).sum() == 2
    uneven = mask_shares(mask, (3, 5))
    assert float(uneven.sum() / 15) == pytest.approx(mask.mean())


def test_masks_pass_through_the_letterbox():
    geometry = Geometry.fit(30, 60, 60)
    mask = np.ones((30, 60), dtype=bool)
    shares = mask_shares(mask, (4, 4), geometry)
    assert shares.tolist() == [[0.0] * 4, [1.0] * 4, [1.0] * 4, [0.0] * 4]


def test_wrong_masks_are_refused():
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        mask_shares(np.ones((2, 2, 2), dtype=bool), (2, 2))
    with pytest.raises(ValueError, match="original pixels"):
        mask_shares(np.ones((5, 5), dtype=bool), (2, 2), Geometry.fit(30, 60, 60))
    with pytest.raises(ValueError, match="least is 0"):
        cells_of_mask(np.ones((5, 5), dtype=bool), (2, 2), least=0)
    with pytest.raises(TypeError, match=r"mask must be boolean, got torch\.float64"):
        mask_shares(np.ones((5, 5)), (2, 2))


def test_maps_of_other_cells_are_refused():
    cam = CamPosterior(random_maps(), make("kron")[0])
    with pytest.raises(ValueError, match=r"from \(7, 7\) cells and the map has \(2, 3\)"):
        pixel_maps(cam, 0, Upsampling.to_size((7, 7), (9, 9)))
    with pytest.raises(ValueError, match="t is nan"):
        pixel_maps(cam, 0, Upsampling.to_size((2, 3), (9, 9)), t=float("nan"))
