"""Maps, labels and regions checked where they enter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def check_label(label: int, num_classes: int, name: str) -> None:
    """Raise unless it is a whole number with 0 <= label < K."""
    if not isinstance(label, (int, np.integer)) or isinstance(label, bool):
        raise TypeError(f"{name} must be a whole number, got {label!r}")
    if not 0 <= label < num_classes:
        raise ValueError(f"{name} is {label}; the posterior has classes 0 to {num_classes - 1}")


def check_threshold(t: float) -> None:
    """Raise ValueError where t is NaN."""
    if t != t:
        raise ValueError(f"t is {t}; give a threshold in logits")


def check_region(region: Tensor, num_images: int, shape: tuple[int, int], name: str) -> Tensor:
    """A region as bool (1 or N, h, w), refused where it is of another type or shape, or empty."""
    cells = torch.as_tensor(region)
    if cells.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, got {cells.dtype}; compare it with a threshold first")
    if cells.shape not in (shape, (num_images, *shape)):
        raise ValueError(
            f"{name} must be {shape} or {(num_images, *shape)}, got {tuple(cells.shape)}; "
            "explain.upsample.cells_of_mask makes cells of a mask in pixels"
        )
    cells = cells.reshape(-1, *shape)
    empty = ~cells.flatten(1).any(1)
    if bool(empty.any()):
        raise ValueError(f"{name} is empty in image {int(empty.nonzero()[0])}; leave such images out")
    return cells


def check_maps(maps: Tensor) -> None:
    """Refuse what are no feature maps (N, D, h, w) of finite numbers.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape, no cell, or a number that is not finite.
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise TypeError(f"maps must be a floating-point tensor (N, D, h, w), got {type(maps).__name__}")
    if maps.dim() != 4 or 0 in maps.shape[1:]:
        raise ValueError(
            f"maps must be (N, D, h, w) with at least one cell, got {tuple(maps.shape)}; an image smaller than the "
            "network's stride leaves none"
        )
    if bool(torch.isfinite(maps.sum())):
        return
    finite = torch.isfinite(maps).flatten(1).all(1)  # a finite sum proves it; large numbers may overflow theirs
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(f"maps of image {bad} hold NaN or infinite numbers; check its features")
