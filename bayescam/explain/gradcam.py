"""Grad-CAM and HiResCAM as class activation maps on *effective* maps, for any network that ends in a linear layer.

Before its ReLU, Grad-CAM is linear in the last layer: CAM_c(u) = w_c . g(u). So one ``CamPosterior(g, posterior)`` has
its closed-form posterior, as for class activation mapping. g comes of one Jacobian-vector product of ``pool`` for each
cell, with no hooks and no gradient left behind. Sources: Selvaraju et al. 2017; Draelos and Carin 2020 (HiResCAM).
"""

from __future__ import annotations

import warnings
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import jvp, vmap

from bayescam.backbone.network import Backbone
from bayescam.errors import BayescamError

Method = Literal["gradcam", "hirescam"]
_NUMBERS = 1 << 25
_PROBE = 256  # pixels, of a picture whose map tells the network's stride


class Pool(Protocol):
    """The part of a network between its maps and the input of its last layer: (N, D', h, w) -> (N, D)."""

    def __call__(self, maps: Tensor) -> Tensor: ...


def explanation_maps(backbone: Backbone, images: Tensor, *, method: Method = "gradcam") -> Tensor:
    """What ``CamPosterior`` takes for these images, (N, D, h, w), in eval mode; the network is left as it was.

    The maps themselves where the network ends in global average pooling (there Grad-CAM and HiResCAM are CAM),
    effective maps otherwise.

    Args:
        backbone: on the device of the images.
        images: (N, 1, S, S) in [0, 1].
        method: "gradcam" or "hirescam".

    Raises:
        TypeError, ValueError: images that are not such a tensor.
        BayescamError: images smaller than the network's stride, or maps that are not finite.
    """
    _check_method(method)
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor in [0, 1], got {kind}")
    if images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(f"images must be (N, 1, S, S), got {tuple(images.shape)}")
    with backbone.evaluating():
        maps = _maps(backbone, images)
        if not bool(torch.isfinite(maps).all()):
            raise BayescamError("the network's maps hold NaN or infinite numbers; check its weights and the images")
        return maps if backbone.is_average else effective_maps(backbone.pool, maps, method=method)


def effective_maps(pool: Pool, maps: Tensor, *, method: Method = "gradcam") -> Tensor:
    """g (N, D, h, w) such that the map of class c is w_c . g(u), in logit units.

    Grad-CAM: g_d(u) is the derivative of phi_d along A(:, u) added to all cells, U times the textbook scale. HiResCAM:
    U times the derivative along A(:, u) added at cell u alone. After global average pooling both are A itself. The mean
    of g over the cells is the derivative of phi along the mean map everywhere (Grad-CAM) or along A (HiResCAM); the
    latter is phi itself where pool is piecewise linear without biases, and then mean_u CAM_c(u) + b_c = logit_c. In
    general it is not: ``completeness_gap`` measures by how much.

    Args:
        pool: differentiable, in eval mode (images independent of each other).
        maps: A, (N, D', h, w).
        method: "gradcam" or "hirescam".
    """
    _check_method(method)
    cells = maps.shape[2] * maps.shape[3]
    each = max(1, _NUMBERS // max(1, maps.numel() * cells // max(1, len(maps))))
    parts = [_effective(pool, part, method, cells) for part in maps.detach().split(each)]
    return torch.cat(parts).unflatten(2, maps.shape[2:])


def completeness_gap(pool: Pool, maps: Tensor, effective: Tensor) -> Tensor:
    """|mean_u g(u) - phi| / |phi| of every image, (N,): 0 where mean_u CAM_c(u) + b_c is the logit for any weights."""
    with torch.no_grad():
        features = pool(maps)
    gap = (effective.mean((2, 3)) - features).norm(dim=1)
    return torch.where(gap > 0, gap / features.norm(dim=1), gap)


def _maps(backbone: Backbone, images: Tensor) -> Tensor:
    """The maps, refused where the images are smaller than what one cell stands for."""
    small = f"images of {tuple(images.shape[2:])} pixels are too small for {backbone.name!r}; use larger ones"
    try:
        maps = backbone.maps(images)
    except RuntimeError as error:
        if "size" in str(error).lower():
            raise BayescamError(f"{small} ({error})") from error
        raise
    if 0 in maps.shape[2:]:
        raise BayescamError(f"{small}: no cell of the map is left")
    if 1 in maps.shape[2:]:  # padding leaves one cell of any picture, however small
        stride = _PROBE // backbone.maps(images.new_zeros(1, 1, _PROBE, _PROBE)).shape[2]
        if min(images.shape[2:]) < stride:
            raise BayescamError(f"{small}: one cell of its map stands for {stride} x {stride} pixels")
    return maps


def _effective(pool: Pool, maps: Tensor, method: Method, cells: int) -> Tensor:
    """g (n, D, U): the cells' tangents go through one vmapped Jacobian-vector product, some at a time."""
    columns = maps.flatten(2)
    identity = torch.eye(cells, dtype=maps.dtype, device=maps.device)

    def along(cell: Tensor) -> Tensor:
        column = (columns * cell).sum(2)
        spread = torch.ones_like(cell) if method == "gradcam" else cells * cell
        tangent = (column.unsqueeze(2) * spread).unflatten(2, maps.shape[2:])
        return jvp(pool, (maps,), (tangent,))[1]

    with torch.no_grad(), warnings.catch_warnings():
        # The first forward-mode derivative makes torch use its own deprecated torch.jit.
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        at_once = max(1, _NUMBERS // max(1, maps.numel()))
        return torch.cat([vmap(along)(part) for part in identity.split(at_once)]).permute(1, 2, 0)


def _check_method(method: str) -> None:
    if method not in ("gradcam", "hirescam"):
        raise ValueError(f"method is {method!r}; choose 'gradcam' or 'hirescam'")
