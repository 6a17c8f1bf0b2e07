"""Statements about regions that have no closed form: where the map peaks, how much of it lies in a mask.

Under a Gaussian posterior they are sampled among the U cells, with a Monte Carlo error of at most 1 / (2 sqrt(S)); from
draws they are shares of the draws. ``CamPosterior.outranks`` and ``.region`` are the closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayescam.explain.arguments import check_region
from bayescam.explain.cam import CamPosterior

NUM_SAMPLES = 4000
_NUMBERS = 1 << 23


@dataclass(frozen=True, eq=False)
class Interval:
    """Posterior median and equal-tailed interval of a quantity, each (N,)."""

    median: Tensor
    low: Tensor
    high: Tensor


def peak_probability(
    cam: CamPosterior, label: int | Sequence[int] | Tensor, *, num_samples: int = NUM_SAMPLES, seed: int = 0
) -> Tensor:
    """P(u is the cell where CAM_c is largest), (N, h, w).

    Cells that tie share the draw. A map that is flat in a draw has no peak there, so the sum falls short of 1 by the
    probability of a flat map.

    Args:
        cam: N images.
        label: the class, one for all images or one an image.
        num_samples: S under a Gaussian posterior; of draws all are used.
        seed: of the sampling.
    """

    def peaks(draws: Tensor) -> Tensor:
        top = draws.amax(2, keepdim=True)
        at_top = (draws == top) & (top > draws.amin(2, keepdim=True))
        return (at_top / at_top.sum(2, keepdim=True).clamp(min=1)).mean(1)

    return over_draws(cam, label, peaks, num_samples, seed).to(cam.maps).unflatten(1, cam.shape)


def hit_rate(
    cam: CamPosterior,
    mask: Tensor,
    label: int | Sequence[int] | Tensor,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Tensor:
    """The posterior hit rate P(argmax cell of CAM_c lies in the mask), (N,).

    Args:
        cam: N images.
        mask: bool (h, w) or (N, h, w); ``upsample.cells_of_mask`` makes one of a mask in pixels.
        label: the class, one for all images or one an image.
        num_samples: S under a Gaussian posterior; of draws all are used.
        seed: of the sampling.

    Raises:
        ValueError: a mask that is empty (nothing can hit it) or full (everything does).
    """
    cells = _check_mask(cam, mask)
    probability = peak_probability(cam, label, num_samples=num_samples, seed=seed)
    return (probability * cells).sum((1, 2))


def energy(
    cam: CamPosterior,
    mask: Tensor,
    label: int | Sequence[int] | Tensor,
    *,
    probability: float = 0.9,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Interval:
    """The share of the positive evidence that lies in the mask, sum_mask max(CAM, 0) / sum max(CAM, 0), (N,).

    A draw without positive evidence anywhere has the share 0.

    Args:
        cam: N images.
        mask: bool (h, w) or (N, h, w).
        label: the class, one for all images or one an image.
        probability: of the equal-tailed interval.
        num_samples: S under a Gaussian posterior; of draws all are used.
        seed: of the sampling.

    Raises:
        ValueError: an empty or a full mask; a probability outside (0, 1).

    Source: the energy-based pointing game, Wang et al. 2020 (Score-CAM).
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability is {probability}; give one strictly between 0 and 1")
    cells = _check_mask(cam, mask).flatten(1).to(torch.float64)

    def shares(draws: Tensor, inside: Tensor) -> Tensor:
        positive = draws.clamp(min=0)
        total = positive.sum(2)
        share = (positive * inside.unsqueeze(1)).sum(2) / torch.where(total > 0, total, torch.ones_like(total))
        tail = (1 - probability) / 2
        levels = torch.tensor([0.5, tail, 1 - tail], dtype=share.dtype, device=share.device)
        return share.quantile(levels, dim=1).T

    inside = cells.expand(cam.num_images, -1)
    median, low, high = over_draws(cam, label, shares, num_samples, seed, inside).to(cam.maps).unbind(1)
    return Interval(median, low, high)


def over_draws(
    cam: CamPosterior,
    label: int | Sequence[int] | Tensor,
    reduce: Callable[..., Tensor],
    num_samples: int,
    seed: int,
    *of_images: Tensor,
    points: int = 0,
) -> Tensor:
    """reduce(draws (n, S, U), parts of ``of_images``) -> (n, ...), a bounded number of images at once, as (N, ...).

    Args:
        cam: N images.
        label: the class, one for all images or one an image.
        reduce: as above.
        num_samples: S under a Gaussian posterior; of draws all are used.
        seed: of the sampling.
        of_images: (N, ...), what ``reduce`` needs of each image.
        points: how many numbers a draw ``reduce`` makes of an image, where they are more than U.
    """
    if num_samples < 100:
        raise ValueError(f"num_samples is {num_samples}; probabilities need at least 100")

    def one_part(rows: Tensor, along: Tensor, chosen: Tensor) -> Tensor:
        found = []
        each = max(1, _NUMBERS // (num_samples * max(points, rows.shape[1])))
        for part, numbers in zip(rows.split(each), chosen.split(each), strict=True):
            draws = cam.forms.draw(part, along[0], num_samples, seed)
            found.append(reduce(draws, *(value[numbers] for value in of_images)))
        return torch.cat(found)

    return cam.by_label(label, one_part)


def _check_mask(cam: CamPosterior, mask: Tensor) -> Tensor:
    cells = check_region(mask, cam.num_images, cam.shape, "mask").to(cam.maps.device)
    full = cells.flatten(1).all(1)
    if bool(full.any()):
        raise ValueError(f"mask is full in image {int(full.nonzero()[0])}; every map lies in it, whatever it shows")
    return cells
