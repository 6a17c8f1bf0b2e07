"""``Draws``: the narrow waist between inference and everything that uses a posterior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayescam.notebook import html_table


@dataclass(frozen=True)
class Draws:
    """Posterior draws of the last layer, whoever made them.

    Args:
        weight: (C, S, K, D), floating-point.
        bias: (C, S, K), of weight's type and on its device.

    Raises:
        TypeError: other than floating-point tensors, or of two types.
        ValueError: other shapes, no draw at all, two devices, or a number that is not finite.
    """

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name} must be a torch tensor, got {type(value).__name__}; give torch.as_tensor of it"
                )
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating-point numbers, got {value.dtype}; convert it to float64")
        if self.weight.dim() != 4:
            raise ValueError(f"weight must be (C, S, K, D), got shape {tuple(self.weight.shape)}")
        if self.bias.shape != self.weight.shape[:3]:
            raise ValueError(f"bias must be (C, S, K) = {tuple(self.weight.shape[:3])}, got {tuple(self.bias.shape)}")
        if self.weight.numel() == 0:
            raise ValueError(f"weight holds no draw: (C, S, K, D) is {tuple(self.weight.shape)}; give at least one")
        if self.bias.dtype != self.weight.dtype:
            raise TypeError(
                f"weight is {self.weight.dtype} and bias {self.bias.dtype}; convert one to the other's type"
            )
        if self.bias.device != self.weight.device:
            raise ValueError(f"weight lies on {self.weight.device} and bias on {self.bias.device}; move one")
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            finite = torch.isfinite(value)
            if not bool(finite.all()):
                at = (~finite).nonzero()[0].tolist()
                raise ValueError(f"{name}{at} is {float(value[tuple(at)])}; drop that draw or mend the sampler")

    @property
    def num_chains(self) -> int:
        """C."""
        return self.weight.shape[0]

    @property
    def num_samples(self) -> int:
        """S, the draws of each chain."""
        return self.weight.shape[1]

    @property
    def num_classes(self) -> int:
        """K."""
        return self.weight.shape[2]

    @property
    def num_features(self) -> int:
        """D."""
        return self.weight.shape[3]

    def flat(self) -> tuple[Tensor, Tensor]:
        """All chains one after another: weight (C*S, K, D), bias (C*S, K)."""
        return self.weight.flatten(0, 1), self.bias.flatten(0, 1)

    def centred(self) -> Draws:
        """The same draws without the part that softmax cannot see: w_c - mean_k w_k, b_c - mean_k b_k."""
        return Draws(self.weight - self.weight.mean(2, keepdim=True), self.bias - self.bias.mean(2, keepdim=True))

    def theta(self) -> Tensor:
        """Weights row-major, then biases: (C, S, P), the order of Pyro's guide."""
        return torch.cat([self.weight.flatten(2), self.bias], dim=-1)

    def __repr__(self) -> str:
        c, s, k, d = self.weight.shape
        return f"Draws(chains={c}, draws={s}, classes={k}, features={d}, {self.weight.dtype})"

    def _repr_html_(self) -> str:
        names = ("chains", "draws", "classes", "features")
        return html_table("Draws of the last layer", [*zip(names, self.weight.shape, strict=True)])
