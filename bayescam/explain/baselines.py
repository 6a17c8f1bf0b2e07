"""Maps that know nothing of the network: what a localisation metric gives away for free."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad


def centre_gaussian(num: int, size: tuple[int, int], *, width: float = 0.25) -> Tensor:
    """The same bell in the middle of every image, (N, H, W); ``width`` is its sd in sides."""
    y, x = (((torch.arange(side).double() + 0.5) / side - 0.5) / width for side in size)
    return torch.exp(-0.5 * (y[:, None] ** 2 + x**2)).expand(num, *size)


def edges(images: Tensor) -> Tensor:
    """Sobel's gradient length of images (N, H, W), borders replicated."""
    kernel = torch.tensor(
        [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=images.dtype, device=images.device
    )
    wide = pad(images[:, None], (1, 1, 1, 1), mode="replicate")
    return conv2d(wide, torch.stack([kernel, kernel.T])[:, None]).norm(dim=1)


def random_cam(maps: Tensor, *, seed: int = 0) -> Tensor:
    """The feature maps (N, D, h, w) weighted by one standard normal vector that no training has seen: (N, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(maps.shape[1], generator=generator, dtype=torch.float64).to(maps)
    return torch.einsum("d,ndij->nij", weight, maps)
