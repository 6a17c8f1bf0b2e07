"""From cells to pixels and back: one linear map for the mean and for the covariance, never for the sd.

Half-pixel convention: cell i of h lies with its centre at (i + 1/2) / h of the side. Between centres a map is bilinear,
beyond the outermost ones it is constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayescam.data.pixels import Geometry
from bayescam.explain.arguments import check_threshold
from bayescam.explain.cam import CamPosterior
from bayescam.explain.forms import normal_exceedance

_NUMBERS = 1 << 23


@dataclass(frozen=True, eq=False)
class Upsampling:
    """The linear map m -> R m C^T from (h, w) cells to (H, W) pixels.

    Args:
        vertical: R (H, h), rows of at most two weights that sum to 1.
        horizontal: C (W, w), alike.
    """

    vertical: Tensor
    horizontal: Tensor

    @classmethod
    def to_size(cls, shape: tuple[int, int], size: tuple[int, int]) -> Upsampling:
        """To a picture of ``size`` (H, W) that the (h, w) cells cover."""
        along = [(torch.arange(many).double() + 0.5) / many for many in size]
        return cls(_bilinear(along[0], shape[0]), _bilinear(along[1], shape[1]))

    @classmethod
    def to_original(cls, shape: tuple[int, int], geometry: Geometry) -> Upsampling:
        """To the original (H, W) pixels of a radiograph that the network saw letterboxed: resize and padding undone."""
        y = (torch.arange(geometry.height).double() + 0.5) / geometry.height * geometry.scaled_height + geometry.top
        x = (torch.arange(geometry.width).double() + 0.5) / geometry.width * geometry.scaled_width + geometry.left
        return cls(_bilinear(y / geometry.size, shape[0]), _bilinear(x / geometry.size, shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.vertical.shape[1], self.horizontal.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.vertical.shape[0], self.horizontal.shape[0]

    def values(self, cells: Tensor) -> Tensor:
        """Maps (..., h, w) -> (..., H, W)."""
        if cells.shape[-2:] != self.shape:
            raise ValueError(f"upsampling is from {self.shape} cells and the map has {tuple(cells.shape[-2:])}")
        return self.vertical.to(cells) @ cells @ self.horizontal.to(cells).mT

    def variance(self, covariance: Tensor) -> Tensor:
        """Variance of every pixel, (..., H, W), from the covariance of the cells, (..., U, U)."""
        pairs = (
            covariance.unflatten(-1, self.shape).unflatten(-3, self.shape).movedim(-2, -3).flatten(-4, -3).flatten(-2)
        )
        rows, columns = _pairs(self.vertical).to(covariance), _pairs(self.horizontal).to(covariance)
        return (rows @ pairs @ columns.mT).clamp(min=0)


@dataclass(frozen=True, eq=False)
class PixelMaps:
    """One class's map of N images in pixels: mean, sd and P(CAM > t), each (N, H, W); logits."""

    mean: Tensor
    sd: Tensor
    exceedance: Tensor


def pixel_maps(cam: CamPosterior, label: int | Tensor, upsampling: Upsampling, *, t: float = 0.0) -> PixelMaps:
    """The map of one class in pixels, exact: the interpolated map of every posterior draw has this mean and this sd.

    Args:
        cam: N images; images of different geometry are taken one by one, ``cam.select([n])``.
        label: the class, one for all images or one an image.
        upsampling: from the cells of ``cam``.
        t: threshold in logits.
    """
    check_threshold(t)

    def one_class(rows: Tensor, along: Tensor, _: Tensor) -> Tensor:
        cells = cam.forms.mean(rows, along)[..., 0].double()
        covariance = cam.forms.covariance(rows, rows, along[0])
        mean = upsampling.values(cells.unflatten(1, cam.shape))
        sd = upsampling.variance(covariance).sqrt()
        if not cam.forms.is_sampled:
            return torch.stack([mean, sd, normal_exceedance(mean, sd, t)], 1)
        draws = cam.forms.draw(rows, along[0], 0, 0).unflatten(2, cam.shape)
        return torch.stack([mean, sd, _share_above(draws, upsampling, t)], 1)

    mean, sd, exceedance = cam.by_label(label, one_class).to(cam.maps).unbind(1)
    return PixelMaps(mean, sd, exceedance)


def mask_shares(mask: np.ndarray | Tensor, shape: tuple[int, int], geometry: Geometry | None = None) -> Tensor:
    """How much of every cell's area a mask in pixels covers: (H, W) bool -> (h, w) in [0, 1], on its device.

    Args:
        mask: over the original pixels, or over the network's square where ``geometry`` is None.
        shape: (h, w).
        geometry: of the radiograph that the mask belongs to.

    Raises:
        TypeError, ValueError: a mask that is not boolean, or has another size than the radiograph.
    """
    given = pixels = torch.as_tensor(mask)
    if pixels.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {pixels.dtype}; compare it with a threshold first")
    if pixels.dim() != 2:
        raise ValueError(f"mask must be (H, W), got {tuple(pixels.shape)}")
    pixels = pixels.cpu().double()
    if geometry is not None:
        if pixels.shape != (geometry.height, geometry.width):
            raise ValueError(
                f"mask is {tuple(pixels.shape)} and its radiograph {(geometry.height, geometry.width)}; "
                "pass the mask in the original pixels"
            )
        pixels = torch.from_numpy(geometry.to_square(pixels.numpy())).double()
    shares = _overlap(shape[0], pixels.shape[0]) @ pixels @ _overlap(shape[1], pixels.shape[1]).T
    return shares.to(given.device)


def cells_of_mask(
    mask: np.ndarray | Tensor, shape: tuple[int, int], geometry: Geometry | None = None, *, least: float = 0.5
) -> Tensor:
    """The cells of which a mask in pixels covers at least the share ``least``: (H, W) bool -> (h, w) bool."""
    if not 0 < least <= 1:
        raise ValueError(f"least is {least}; give a share above 0 and at most 1")
    return mask_shares(mask, shape, geometry) >= least - 1e-9


def _bilinear(position: Tensor, cells: int) -> Tensor:
    """Weights (M, cells) at positions (M,) along a side of length 1."""
    at = (position * cells - 0.5).clamp(0, cells - 1)
    low = at.floor().clamp(max=max(cells - 2, 0)).long()
    weights = torch.zeros(len(at), cells, dtype=torch.float64)
    rows = torch.arange(len(at))
    weights[rows, low] = 1 - (at - low)
    if cells > 1:
        weights[rows, low + 1] = at - low
    return weights


def _overlap(cells: int, pixels: int) -> Tensor:
    """(cells, pixels): the share of cell i's extent that pixel j covers."""
    edges = torch.arange(pixels + 1).double() * cells / pixels
    starts = torch.arange(cells).double()[:, None]
    return (torch.minimum(edges[1:], starts + 1) - torch.maximum(edges[:-1], starts)).clamp(min=0)


def _pairs(weights: Tensor) -> Tensor:
    """(H, h) -> (H, h*h): the products of every row with itself."""
    return (weights.unsqueeze(2) * weights.unsqueeze(1)).flatten(1)


def _share_above(draws: Tensor, upsampling: Upsampling, t: float) -> Tensor:
    """P over draws (n, S, h, w) that a pixel is above t, (n, H, W), a bounded number of draws at a time."""
    pixels = upsampling.size[0] * upsampling.size[1] * max(1, len(draws))
    parts = draws.split(max(1, _NUMBERS // pixels), dim=1)
    counts = torch.stack([(upsampling.values(part) > t).sum(1) for part in parts]).sum(0)
    return counts.double() / draws.shape[1]
