"""What goes wrong with a radiograph between the tube and the network, each in five severities.

The idea is that of Hendrycks and Dietterich (2019, arXiv:1903.12261); kinds and amounts are chosen for radiographs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

SEVERITIES = (1, 2, 3, 4, 5)


def corrupted(images: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """Images (N, 1, S, S) in [0, 1] under one of ``CORRUPTIONS``, clamped to [0, 1].

    Args:
        images: on the CPU, float.
        name: "blur", "noise", "rotation", "exposure" or "occlusion".
        severity: 1 to 5.
        generator: of the noise, and of where each image is covered; the others draw nothing.

    Raises:
        ValueError: unknown name, another severity, or images of another shape.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is unknown; take one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, got {severity!r}")
    if images.dim() != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (N, 1, S, S), got {tuple(images.shape)}")
    return CORRUPTIONS[name](images, severity, generator).clamp(0, 1)


def blur(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A Gaussian of sd 0.6 severity pixels at S = 128, and in proportion at others; borders replicated."""
    sd = 0.6 * severity * images.shape[-1] / 128
    reach = max(1, int(3 * sd))
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sd) ** 2).to(images)
    line = (line / line.sum())[None, None, None]
    return conv2d(conv2d(pad(images, [reach] * 4, mode="replicate"), line), line.mT)


def noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """White Gaussian noise of sd 0.04 severity, white being 1."""
    return images + 0.04 * severity * torch.randn(images.shape, generator=generator).to(images)


def rotation(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Turned by 15 severity degrees about the centre, bilinear, black outside."""
    angle = torch.tensor(15.0 * severity).deg2rad()
    matrix = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]]).to(images)
    grid = affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def exposure(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Too dark: raised to the power 1 + 0.35 severity."""
    return images ** (1 + 0.35 * severity)


def occlusion(images: Tensor, severity: int, generator: Generator) -> Tensor:
    """A black square of side 0.12 severity S somewhere in each image, uniformly."""
    size = images.shape[-1]
    side = int(size * 0.12 * severity)
    corners = torch.randint(0, size - side + 1, (len(images), 2), generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    top, left = corners[:, 0, None, None], corners[:, 1, None, None]
    covered = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    return images.masked_fill(covered[:, None], 0)


CORRUPTIONS: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    function.__name__: function for function in (blur, noise, rotation, exposure, occlusion)
}
