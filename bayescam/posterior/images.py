"""The training images of one fit: checked features and labels, read in chunks, summed over ranks.

Every sum over images in this folder goes through ``TrainingImages.chunks`` and ``TrainingImages.total``, so
that memory maps, GPUs and process groups are the business of this module alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bayescam.parallel import size, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHUNK_ELEMENTS = 1 << 21
_MORE_OFF_CPU = 16  # a chunk that fills a processor's cache does not fill a GPU
_ValueT = TypeVar("_ValueT", bound=Tensor)


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """This rank's share of the training set.

    Args:
        features: phi (N, D), a floating-point tensor, array or memory map; never copied whole.
        labels: (N,) int64 on the compute device.
        num_classes: K.
        image_weights: (N,) float64, the class weight of each image's label, or None for the plain likelihood.
        group: a torch.distributed process group over which all sums run, or None.
        widened: take products in float64 whatever the features are.
    """

    features: Tensor | np.ndarray
    labels: Tensor
    num_classes: int
    image_weights: Tensor | None = None
    group: ProcessGroup | None = None
    widened: bool = False

    @property
    def num_features(self) -> int:
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def dtype(self) -> torch.dtype:
        """The type the products over features are taken in: float64 if widened or for such features, else float32."""
        wide = self.widened or self.features.dtype in (torch.float64, np.dtype(np.float64))
        return torch.float64 if wide else torch.float32

    def chunks(self, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Row ranges and their features, (n, D) of ``dtype`` on ``device``; on a GPU 16 times as many rows at once."""
        step = rows or max(256, _CHUNK_ELEMENTS // (self.num_features + 1))
        step *= 1 if self.device.type == "cpu" else _MORE_OFF_CPU
        for start in range(0, len(self.labels), step):
            span = slice(start, min(start + step, len(self.labels)))
            yield span, as_features(self.features[span]).to(self.device, self.dtype)

    def total(self, value: _ValueT) -> _ValueT:
        """Sum a tensor over the ranks of the group, in place; the value itself without a group."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def weight(self) -> float:
        """sum_n w_n over all ranks: N for the plain likelihood."""
        if self.image_weights is None:
            return float(self.count())
        return float(self.total(self.image_weights.sum()))

    def count(self) -> int:
        """N over all ranks."""
        return int(self.total(torch.tensor(len(self.labels), device=self.device)))


def as_features(features: Tensor | np.ndarray) -> Tensor:
    """A tensor over the same numbers; numpy's read-only or negatively strided arrays are copied."""
    if isinstance(features, Tensor):
        return features.detach()
    writable = features if features.flags.writeable and min(features.strides, default=1) >= 0 else features.copy()
    return torch.from_numpy(writable)


def augment(features: Tensor) -> Tensor:
    """phi~ = (phi, 1): (..., D) -> (..., D+1)."""
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)


def check_images(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    num_classes: int | None = None,
    class_weights: Tensor | np.ndarray | None = None,
    group: ProcessGroup | None = None,
) -> TrainingImages:
    """Check what a fit is given, and name what is wrong.

    The sums run on the features' device, or on the labels' where the features are an array: so a memory map can be
    worked off on a GPU, chunk by chunk. With a group every rank checks its shard before any sum runs: where one
    refuses, all do.

    Raises:
        TypeError: features or labels of a type that cannot be meant.
        ValueError: shapes, labels, class weights or feature values that cannot be used, or shards that differ in D, K
            or type.
        RankError: another rank's shard was refused.
    """
    device = next((found.device for found in (features, labels) if isinstance(found, Tensor)), torch.device("cpu"))

    def shard() -> Tensor:
        _check_features(features)
        _check_device(device)
        return _check_labels(labels, len(features)).to(device)

    own = together(shard, group, device)
    wide = features.dtype in (torch.float64, np.dtype(np.float64))
    _check_alike({"D": features.shape[1], "num_classes": num_classes or 0, "float64": wide}, group, device)
    k = _num_classes(own, num_classes, group)

    def whole() -> TrainingImages:
        _check_range(own, k)
        images = TrainingImages(features, own, k, _check_class_weights(class_weights, k, own), group)
        for span, chunk in images.chunks():
            _check_finite(chunk, span.start)
        return images

    return together(whole, group, device)


def _check_alike(facts: dict[str, int], group: ProcessGroup | None, device: torch.device) -> None:
    """Refuse shards of different arrays, on every rank in the same words."""
    if group is None:
        return
    own = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
    heard = [torch.empty_like(own) for _ in range(size(group))]
    dist.all_gather(heard, own, group=group)
    for name, first, *others in zip(facts, *(found.tolist() for found in heard), strict=True):
        for source, value in enumerate(others, start=1):
            if value != first:
                raise ValueError(
                    f"the ranks disagree: {name} is {first} on rank 0 and {value} on rank {source}; "
                    "give every rank a shard of the same features"
                )


def check_rows(features: Tensor | np.ndarray, num_features: int, like: Tensor) -> Tensor:
    """Features (N, D) that a fitted posterior is asked about, in ``like``'s type and on its device.

    Raises:
        TypeError, ValueError: not floating-point numbers, of another D, or not finite; the message names what.
    """
    _check_type(features)
    if len(features.shape) != 2 or features.shape[1] != num_features:
        raise ValueError(f"features must be (N, {num_features}), got {tuple(features.shape)}")
    rows = as_features(features).to(like)
    _check_finite(rows, 0)
    return rows


def _check_finite(rows: Tensor, start: int) -> None:
    finite = torch.isfinite(rows)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"features[{start + row}, {column}] is {float(rows[row, column])}; "
            "drop that image or mend the network that made it"
        )


def _check_features(features: Tensor | np.ndarray) -> None:
    _check_type(features)
    if len(features.shape) != 2 or features.shape[1] == 0:
        raise ValueError(f"features must be (N, D) with D >= 1, got shape {tuple(features.shape)}")


def _check_device(device: torch.device) -> None:
    if device.type == "mps":
        raise ValueError("features lie on mps, which has no float64, and the posterior needs it; give features.cpu()")


def _check_type(features: Tensor | np.ndarray) -> None:
    if not isinstance(features, Tensor | np.ndarray):
        raise TypeError(f"features must be a torch tensor or a numpy array, got {type(features).__name__}")
    floating = (
        features.is_floating_point() if isinstance(features, Tensor) else np.issubdtype(features.dtype, np.floating)
    )
    if not floating:
        raise TypeError(f"features must be floating-point numbers, got {features.dtype}; convert them to float32")


def _check_labels(labels: Tensor | np.ndarray, num_images: int) -> Tensor:
    found = torch.as_tensor(np.array(labels) if not isinstance(labels, Tensor) else labels)
    if found.shape != (num_images,):
        raise ValueError(f"labels must be ({num_images},) like the rows of features, got {tuple(found.shape)}")
    if num_images == 0:
        raise ValueError("features holds no image (N = 0); a fit needs at least one on every rank")
    if found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"labels must be whole numbers 0..K-1, got {found.dtype}")
    if found.is_floating_point():
        broken = (found != found.round()) | ~torch.isfinite(found)
        if bool(broken.any()):
            at = int(broken.nonzero()[0])
            raise ValueError(f"labels[{at}] is {float(found[at])}, not a whole number; labels count from 0 to K-1")
    return found.long()


def _num_classes(labels: Tensor, num_classes: int | None, group: ProcessGroup | None) -> int:
    """K as given, or one more than the largest label on any rank."""
    if num_classes is None:
        largest = labels.max()
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        num_classes = int(largest) + 1
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2 classes")
    return num_classes


def _check_range(labels: Tensor, num_classes: int) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(f"labels[{at}] is {int(labels[at])}, outside 0..{num_classes - 1}; check num_classes")


def _check_class_weights(class_weights: Tensor | np.ndarray | None, num_classes: int, labels: Tensor) -> Tensor | None:
    if class_weights is None:
        return None
    weights = torch.as_tensor(class_weights, dtype=torch.float64, device=labels.device)
    if weights.shape != (num_classes,):
        raise ValueError(f"class_weights must be ({num_classes},), one a class, got {tuple(weights.shape)}")
    if not bool((weights.isfinite() & (weights > 0)).all()):
        raise ValueError(f"class_weights must be positive and finite, got {weights.tolist()}")
    return weights[labels]


def check_prior_precision(prior_precision: float) -> float:
    """tau as a float, or ValueError."""
    tau = float(prior_precision)
    if not (0.0 < tau < float("inf")):
        raise ValueError(f"prior_precision is {prior_precision}; it must be positive and finite, or 'evidence'")
    return tau
