"""Radiographs as squares for a network, and the way back to the original pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


@dataclass(frozen=True)
class Geometry:
    """How a (H, W) radiograph lies letterboxed in an (S, S) square: scaled alike both ways, centred, black around.

    Args:
        height, width: H, W of the original.
        size: S.
        scaled_height, scaled_width: of the picture inside the square.
        top, left: its corner.
    """

    height: int
    width: int
    size: int
    scaled_height: int
    scaled_width: int
    top: int
    left: int

    @classmethod
    def fit(cls, height: int, width: int, size: int) -> Geometry:
        """The largest picture of this shape that the square holds."""
        scale = size / max(height, width)
        inner = (max(1, round(height * scale)), max(1, round(width * scale)))
        return cls(height, width, size, *inner, (size - inner[0]) // 2, (size - inner[1]) // 2)

    def to_square(self, image: np.ndarray) -> np.ndarray:
        """(H, W) -> (S, S) float32: antialiased bilinear, half-pixel centres."""
        source = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
        inner = (self.scaled_height, self.scaled_width)
        if source.shape[2:] != inner:
            source = interpolate(source, inner, mode="bilinear", align_corners=False, antialias=True)
        square = np.zeros((self.size, self.size), dtype=np.float32)
        square[self.top : self.top + inner[0], self.left : self.left + inner[1]] = source[0, 0].clamp(0, 1).numpy()
        return square

    def from_square(self, maps: Tensor) -> Tensor:
        """Maps (..., S, S) over the square -> (..., H, W) over the original: the padding cut, bilinear, half-pixel."""
        inner = maps[..., self.top : self.top + self.scaled_height, self.left : self.left + self.scaled_width]
        if inner.shape[-2:] == (self.height, self.width):
            return inner
        flat = inner.reshape(1, -1, *inner.shape[-2:])
        wide = interpolate(flat, (self.height, self.width), mode="bilinear", align_corners=False)
        return wide.reshape(*maps.shape[:-2], self.height, self.width)


@dataclass(frozen=True)
class Pixels:
    """N radiographs as squares.

    Args:
        images: (N, S, S) uint16, 65,535 is white; may be a memory map.
        geometry: of each.
    """

    images: np.ndarray
    geometry: tuple[Geometry, ...]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray | list[int]) -> Tensor:
        """Some images as (n, 1, S, S) float32 in [0, 1]."""
        return torch.from_numpy(self.images[np.asarray(indices)].astype(np.float32) / 65535)[:, None]


def quantised(square: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint16."""
    return np.round(square * 65535).astype(np.uint16)
