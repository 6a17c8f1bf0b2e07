"""Maps against masks: how much of where a map points is where the truth lies, with intervals.

Each metric takes maps (N, H, W) and masks (N, H, W) bool and gives (N,) in [0, 1]. A map that is flat points nowhere:
it is a miss, never a hit by a tie. Where a mask is empty or full there is nothing to score: nan, and ``score`` counts
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor
from torch.nn.functional import max_pool2d


def hit(maps: Tensor, masks: Tensor, *, tolerance: int = 0) -> Tensor:
    """Whether the largest value lies in the mask, or at most ``tolerance`` pixels (rows, columns) from it; ties share.

    Source: the pointing game, Zhang et al. 2018.
    """
    masks = _valid(maps, masks)
    near = masks
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance}; give a number of pixels, at least 0")
    if tolerance:
        near = max_pool2d(masks[:, None].to(maps), 2 * tolerance + 1, stride=1, padding=tolerance)[:, 0] > 0
    values = maps.flatten(1)
    top = values == values.amax(1, keepdim=True)
    inside = (top & near.flatten(1)).sum(1) / top.sum(1)
    return _scored(torch.where(is_flat(maps), torch.zeros_like(inside), inside), maps, masks)


def energy(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of the positive values that lies in the mask; 0 where there are none. Source: Wang et al. 2020."""
    masks = _valid(maps, masks)
    positive = maps.clamp(min=0)
    total = positive.sum((1, 2))
    share = (positive * masks).sum((1, 2)) / torch.where(total > 0, total, torch.ones_like(total))
    return _scored(share, maps, masks)


def iou(maps: Tensor, masks: Tensor, *, threshold: float | Tensor | None = None) -> Tensor:
    """|{map > t} and mask| / |{map > t} or mask|.

    Args:
        maps: (N, H, W).
        masks: (N, H, W).
        threshold: t, one or one an image (N,); None takes Otsu's of each map.
    """
    masks = _valid(maps, masks)
    level = otsu(maps) if threshold is None else torch.as_tensor(threshold, dtype=maps.dtype).to(maps.device)
    chosen = maps > level.expand(len(maps))[:, None, None]
    return _scored((chosen & masks).sum((1, 2)) / (chosen | masks).sum((1, 2)).clamp(min=1), maps, masks)


def average_precision(maps: Tensor, masks: Tensor) -> Tensor:
    """The area under the precision-recall curve over pixels, sum_i (R_i - R_{i-1}) P_i over the distinct values."""
    masks = _valid(maps, masks)
    values, order = maps.flatten(1).double().sort(dim=1, descending=True)
    inside = masks.flatten(1).gather(1, order).double()
    found = inside.cumsum(1)
    precision = found / torch.arange(1, found.shape[1] + 1, device=maps.device)
    # Equal values enter together: each takes the precision at the last of its equals.
    last = torch.ones_like(inside, dtype=torch.bool)
    last[:, :-1] = values[:, :-1] != values[:, 1:]
    places = torch.arange(found.shape[1], device=maps.device).expand_as(values)
    ends = torch.where(last, places, values.shape[1]).flip(1).cummin(1).values.flip(1)
    score = (precision.gather(1, ends) * inside).sum(1) / found[:, -1].clamp(min=1)
    return _scored(score, maps, masks)


def rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of the mask's size of largest values that lies in the mask; ties count in proportion.

    Source: relevance rank accuracy, Arras et al. 2022.
    """
    masks = _valid(maps, masks)
    values, inside = maps.flatten(1), masks.flatten(1)
    size = inside.sum(1)
    cut = values.sort(dim=1, descending=True).values.gather(1, (size - 1).clamp(min=0)[:, None])
    above, equal = values > cut, values == cut
    room = (size - above.sum(1)) / equal.sum(1)
    share = ((above & inside).sum(1) + room * (equal & inside).sum(1)) / size.clamp(min=1)
    return _scored(torch.where(is_flat(maps), torch.zeros_like(share), share), maps, masks)


def otsu(maps: Tensor, *, bins: int = 256) -> Tensor:
    """Otsu's threshold of each map, (N,): the cut of its histogram that separates the two sides' means best."""
    values = maps.flatten(1).double()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    width = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    index = ((values - low) / width * bins).long().clamp(0, bins - 1)
    counts = torch.zeros(len(values), bins, dtype=torch.float64, device=maps.device)
    counts.scatter_add_(1, index, torch.ones_like(values))
    centres = torch.arange(bins, device=maps.device) + 0.5
    below, sums = counts.cumsum(1), (counts * centres).cumsum(1)
    above = below[:, -1:] - below
    gap = sums / below.clamp(min=1) - (sums[:, -1:] - sums) / above.clamp(min=1)
    best = (below * above * gap**2)[:, :-1].argmax(1)
    return (low[:, 0] + (best + 1) * (high - low)[:, 0] / bins).to(maps)


def is_flat(maps: Tensor) -> Tensor:
    """Whether a map has one value everywhere, (N,)."""
    values = maps.flatten(1)
    return values.amax(1) == values.amin(1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hit rate": hit,
    "hit rate, 15 px": lambda maps, masks: hit(maps, masks, tolerance=15),
    "energy": energy,
    "IoU, Otsu": iou,
    "AUPRC": average_precision,
    "rank accuracy": rank_accuracy,
}


@dataclass(frozen=True)
class Score:
    """One metric of one kind of map: mean over images with a bootstrap interval.

    Args:
        maps, metric: names.
        mean, low, high: of the images with something to score; nan where there are none.
        num: of images scored.
        skipped: images whose mask is empty or full.
        dead: images whose map is flat.
    """

    maps: str
    metric: str
    mean: float
    low: float
    high: float
    num: int
    skipped: int
    dead: int


def score(
    maps: Mapping[str, Tensor],
    masks: Tensor,
    *,
    patients: Sequence[str | None] | None = None,
    probability: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[Score]:
    """Every metric of every kind of map on the same images, with bootstrap intervals over patients.

    Args:
        maps: name -> (N, H, W); put the baselines (``explain.baselines``) beside the maps.
        masks: (N, H, W) bool.
        patients: whose each image is, so that their images are drawn together; None takes images for independent.
        probability: of the percentile interval.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    groups = np.arange(len(masks))
    if patients is not None and len(patients) != len(masks):
        raise ValueError(f"patients has {len(patients)} entries and there are {len(masks)} images")
    if patients is not None:
        names = [f"image {n}" if patient is None else f"patient {patient}" for n, patient in enumerate(patients)]
        groups = np.unique(names, return_inverse=True)[1]
    rows = []
    for name, kind in maps.items():
        dead = int(is_flat(kind).sum())
        for metric, compute in METRICS.items():
            values = compute(kind, masks).double().cpu().numpy()
            scored = np.isfinite(values)
            low, high = bootstrap_mean(values[scored], groups[scored], probability, num_resamples, seed)
            mean = float(values[scored].mean()) if scored.any() else float("nan")
            rows.append(Score(name, metric, mean, low, high, int(scored.sum()), int((~scored).sum()), dead))
    return rows


def bootstrap_mean(
    values: np.ndarray, groups: np.ndarray, probability: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The interval of the mean of values (N,) when whole groups (N,), the patients, are drawn anew; nan of one.

    Of G patients the quantile is Phi(-sqrt(G / (G - 1)) t(1 - a; G - 1)), a = (1 - probability) / 2: the percentile
    interval expanded for few of them (Hesterberg 2015, doi:10.1080/00031305.2015.1089789).
    """
    members = np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(members, values), np.bincount(members)
    count = len(sums)
    if count < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=num_resamples)
    means = (drawn @ sums) / (drawn @ sizes)
    tail = norm.cdf(-math.sqrt(count / (count - 1)) * student.ppf((1 + probability) / 2, count - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _valid(maps: Tensor, masks: Tensor) -> Tensor:
    if maps.dim() != 3 or maps.shape != masks.shape:
        raise ValueError(f"maps and masks must both be (N, H, W), got {tuple(maps.shape)} and {tuple(masks.shape)}")
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be boolean, got {masks.dtype}; compare them with a threshold first")
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("maps hold NaN or infinite numbers; check the features they come from")
    return masks.to(maps.device)


def _scored(values: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    """In the type of the maps; nan where the mask has no inside or no outside."""
    flat = masks.flatten(1)
    return torch.where(flat.any(1) & ~flat.all(1), values.to(maps), maps.new_tensor(float("nan")))
