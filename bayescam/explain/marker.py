"""Does the model look at the lead marker? Its cells against those of the bones, image by image.

A letter in a corner has nothing to say on the anatomy; a network that was given a tie between the two may read it all
the same (Zech et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayescam.data.pixels import Geometry
from bayescam.explain.cam import CamPosterior
from bayescam.explain.upsample import mask_shares

_BONES = ("evidence", "bone")  # the masks that hold what the class should be known by, the first that is there


@dataclass(frozen=True, eq=False)
class MarkerRegions:
    """Where the marker is and where the bones are, in cells, of those images that have both.

    Args:
        marker: (n, h, w) bool.
        bones: (n, h, w) bool, without the marker's cells.
        chosen: (n,), the images' numbers.
    """

    marker: Tensor
    bones: Tensor
    chosen: Tensor


def marker_regions(
    masks: Sequence[Mapping[str, np.ndarray]],
    geometry: Sequence[Geometry],
    shape: tuple[int, int],
    *,
    least: float = 0.2,
    bones: float = 0.3,
) -> MarkerRegions:
    """Cells of the marker and of the bones, from masks in the original pixels.

    The bones are the mask "evidence" (those that the class is known by) or, without one, "bone".

    Args:
        masks: name -> bool (H, W) of each image; names that are missing leave the image out.
        geometry: of each image.
        shape: (h, w).
        least: a cell is the marker's if it holds at least this share of the marker.
        bones: a cell is a bone's if bones cover at least this share of the cell.
    """
    found = []
    for number, (named, how) in enumerate(zip(masks, geometry, strict=True)):
        name = next((name for name in _BONES if name in named), None)
        if name is None or "marker" not in named:
            continue
        covered = mask_shares(named["marker"], shape, how)
        marker = (covered >= least * covered.sum()) & (covered > 0)
        others = (mask_shares(named[name], shape, how) >= bones) & ~marker
        if bool(marker.any()) and bool(others.any()):
            found.append((number, marker, others))
    none = torch.zeros(0, *shape, dtype=torch.bool)
    return MarkerRegions(
        torch.stack([marker for _, marker, _ in found]) if found else none,
        torch.stack([others for _, _, others in found]) if found else none,
        torch.tensor([number for number, _, _ in found], dtype=torch.long),
    )


def marker_outranks(cam: CamPosterior, regions: MarkerRegions, label: int | Sequence[int] | Tensor) -> Tensor:
    """P(mean CAM over the marker > mean CAM over the bones) of all N images, nan where one of the two is missing.

    Args:
        cam: N images.
        regions: of the same N images.
        label: the class, one for all images or one an image.
    """
    found = torch.full((cam.num_images,), float("nan"), dtype=cam.maps.dtype, device=cam.maps.device)
    if len(regions.chosen):
        labels = cam.labels(label)[regions.chosen]
        found[regions.chosen] = cam.select(regions.chosen).outranks(regions.marker, regions.bones, labels)
    return found
