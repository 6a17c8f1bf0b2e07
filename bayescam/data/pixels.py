"""Radiographs as squares for a network, and the way back to the original pixels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bayescam.errors import BayescamError
from bayescam.storage import atomic_path

if TYPE_CHECKING:
    from torch import Tensor


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
        inner = (self.scaled_height, self.scaled_width)
        picture = np.ascontiguousarray(image, dtype=np.float32)
        if picture.shape != inner:
            resized = Image.fromarray(picture).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
            picture = np.asarray(resized)
        square = np.zeros((self.size, self.size), dtype=np.float32)
        square[self.top : self.top + inner[0], self.left : self.left + inner[1]] = np.clip(picture, 0, 1)
        return square

    def from_square(self, maps: Tensor) -> Tensor:
        """Maps (..., S, S) over the square -> (..., H, W) over the original: the padding cut, bilinear, half-pixel."""
        inner = maps[..., self.top : self.top + self.scaled_height, self.left : self.left + self.scaled_width]
        if inner.shape[-2:] == (self.height, self.width):
            return inner
        from torch.nn.functional import interpolate

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
        import torch

        return torch.from_numpy(self.images[np.asarray(indices)].astype(np.float32) / 65535)[:, None]


def letterboxed(image: np.ndarray, size: int) -> tuple[np.ndarray, Geometry]:
    """One radiograph as (S, S) uint16, and how it lies there."""
    geometry = Geometry.fit(image.shape[0], image.shape[1], size)
    return np.round(geometry.to_square(image) * 65535).astype(np.uint16), geometry


def load_pixels(folder: Path, num: int, size: int) -> Pixels | None:
    """What ``save_pixels`` left in ``folder``, as a memory map; None where it is absent, broken or of another shape."""
    try:
        with warnings.catch_warnings(action="error"):  # a header that numpy has to mend is not ours
            images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
            rows = np.load(folder / "geometry.npy", allow_pickle=False)
    except Exception:  # numpy parses headers as Python text: it raises almost anything
        return None
    if images.shape != (num, size, size) or images.dtype != np.uint16:
        return None
    if rows.shape != (num, len(fields(Geometry))) or not np.issubdtype(rows.dtype, np.integer):
        return None
    return Pixels(images, tuple(Geometry(*map(int, row)) for row in rows))


def save_pixels(folder: Path, num: int, size: int, fill: Callable[[np.memmap], list[Geometry]]) -> Pixels:
    """Let ``fill`` write (N, S, S) uint16 into a new file, keep it in ``folder`` once it is whole, and open it.

    Raises:
        BayescamError: the cache folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BayescamError(
            f"{folder}: the cache cannot be written ({error.strerror}); set BAYESCAM_CACHE to a folder that can"
        ) from error
    with atomic_path(folder / "images.npy") as temporary:
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint16, shape=(num, size, size))
        _reserve(temporary)
        geometries = fill(images)
        images.flush()
    with atomic_path(folder / "geometry.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, np.array([astuple(geometry) for geometry in geometries]), allow_pickle=False)
    kept = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    return Pixels(kept, tuple(geometries))


def _reserve(path: Path) -> None:
    """Take the file's space now: a memory map on a full disk kills the process, this raises OSError."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
