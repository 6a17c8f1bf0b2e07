"""Joint regions: where a map exceeds a level everywhere at once, with a stated probability.

Pointwise, P(CAM(u) > t) is a statement on each cell by itself; of many such cells at 95 % some will be wrong. The joint
region is the largest of the nested sets {u: P(CAM(u) > t) >= p} on *all* of whose cells the map exceeds t with
probability 95 % (Bolin and Lindgren 2015, excursion sets; their parametric family of marginal sets).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayescam.explain.arguments import check_threshold
from bayescam.explain.cam import CamPosterior
from bayescam.explain.regions import NUM_SAMPLES, over_draws
from bayescam.explain.upsample import Upsampling


def joint_exceedance(
    cam: CamPosterior,
    label: int | Sequence[int] | Tensor,
    *,
    t: float = 0.0,
    upsampling: Upsampling | None = None,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Tensor:
    """F(u) = P(CAM_c > t on every cell whose own P(CAM_c > t) is at least u's), (N, h, w), or (N, H, W) in pixels.

    {u: F(u) >= 0.95} is the joint region at 95 %. F is at most the pointwise probability, and equal to it where that is
    largest.

    Args:
        cam: N images.
        label: the class, one for all images or one an image.
        t: threshold in logits.
        upsampling: to take the interpolated map in place of the cells; meant for grids of up to some 10,000 points.
        num_samples: S under a Gaussian posterior; of draws all are used. The error of F is sqrt(F (1 - F) / S).
        seed: of the sampling.
    """
    check_threshold(t)
    shape = cam.shape if upsampling is None else upsampling.size

    def excursion(draws: Tensor) -> Tensor:
        if upsampling is not None:
            draws = upsampling.values(draws.unflatten(2, cam.shape)).flatten(2)
        above = draws > t
        marginal = above.sum(1) / draws.shape[1]
        distance = (draws.mean(1) - t) / draws.std(1).clamp(min=1e-300)
        order = _descending(marginal, distance)
        sorted_above = above.gather(2, order.unsqueeze(1).expand_as(above))
        joint = sorted_above.to(torch.uint8).cummin(2).values.sum(1).double() / draws.shape[1]
        return torch.zeros_like(joint).scatter(1, order, joint)

    points = shape[0] * shape[1]
    return over_draws(cam, label, excursion, num_samples, seed, points=points).to(cam.maps).unflatten(1, shape)


def _descending(marginal: Tensor, distance: Tensor) -> Tensor:
    """Order of the cells by their probability, ties (all at 0 or at 1) by how far they are beyond it in sds."""
    by_distance = distance.argsort(dim=1, descending=True, stable=True)
    again = marginal.gather(1, by_distance).argsort(dim=1, descending=True, stable=True)
    return by_distance.gather(1, again)
