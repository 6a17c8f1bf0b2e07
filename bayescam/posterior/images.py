"""The training images of one fit: checked features and labels, read in chunks, summed over ranks.

Every sum over images in this folder goes through ``TrainingImages.chunks`` and ``TrainingImages.total``, so
that memory maps, GPUs and process groups are the business of this module alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bayescam.parallel import check_alike, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHUNK_ELEMENTS = 1 << 21
_MORE_OFF_CPU = 16  # a chunk that fills a processor's cache does not fill a GPU
_MOST_CLASSES = 1 << 20
_LARGEST_WEIGHT = 1e9
_FEATURES_WAY_OUT = "give dense float32 or float64 numbers"
_LABELS_WAY_OUT = "number the classes 0..K-1, as np.unique(names, return_inverse=True) does"
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
        """D."""
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the sums run: the labels' device."""
        return self.labels.device

    @property
    def dtype(self) -> torch.dtype:
        """The type the products over features are taken in: float64 if widened or for such features, else float32."""
        return torch.float64 if self.widened or _is_wide(self.features) else torch.float32

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

    def agreed(self, value: _ValueT) -> _ValueT:
        """Rank 0's tensor on every rank, in place; the value itself without a group.

        The ranks see the same sums, but what each makes of them can differ in the last digit where their processors
        do. So whatever a sum is taken at, and whatever decides how the ranks go on, is rank 0's.
        """
        if self.group is not None:
            dist.broadcast(value, group_src=0, group=self.group)
        return value

    def agreed_number(self, value: float) -> float:
        """Rank 0's number on every rank."""
        if self.group is None:
            return value
        return float(self.agreed(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def largest(self, value: _ValueT) -> _ValueT:
        """The largest of a tensor over the ranks of the group, in place; the value itself without a group."""
        if self.group is not None:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value

    def weight(self) -> float:
        """sum_n w_n over all ranks: N for the plain likelihood."""
        if self.image_weights is None:
            return float(self.count())
        return float(self.total(self.image_weights.sum()))

    def count(self) -> int:
        """N over all ranks."""
        return int(self.total(torch.tensor(len(self.labels), device=self.device)))


def as_tensor(values: object, name: str, way_out: str) -> Tensor:
    """Real numbers as a tensor without gradient, over the same memory where torch can use it.

    Copied are lists, and arrays that are read-only, of another byte order or of strides that torch has not.

    Args:
        values: a tensor, an array or nested lists of numbers.
        name: of the argument, for the message.
        way_out: what to give instead, for the message.

    Raises:
        TypeError: other than real numbers of at most 64 bits; sparse, quantised or masked ones.
    """
    if not isinstance(values, Tensor | np.ndarray):
        try:
            values = np.asarray(values)
        except ValueError:
            raise TypeError(f"{name} holds rows of different lengths; {way_out}") from None
    check_numbers(values, name, way_out)
    if isinstance(values, Tensor):
        return values.detach()
    strides = all(step >= 0 and step % values.itemsize == 0 for step in values.strides)
    if not (strides and values.flags.writeable and values.flags.aligned and values.dtype.isnative):
        values = values.astype(values.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(values)


def check_numbers(values: Tensor | np.ndarray, name: str, way_out: str) -> None:
    """Raise ``as_tensor``'s TypeError, without touching the numbers."""
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and its mask would not count; leave those images out, or fill them")
    if isinstance(values, np.ndarray):
        plain = values.dtype.kind in "biuf" and values.itemsize <= 8
        kind: object = values.dtype if values.ndim else repr(values.item())
    else:
        plain = values.layout == torch.strided and not values.is_quantized and not values.is_complex()
        kind = values.dtype if values.layout == torch.strided else values.layout
    if not plain:
        raise TypeError(f"{name} must be dense real numbers of at most 64 bits, got {kind}; {way_out}")


def whole_number(value: object, name: str, least: int) -> int:
    """A whole number of any integer type, numpy's and 0-dimensional tensors included, as an int.

    Raises:
        TypeError: no whole number; a bool is none.
        ValueError: below ``least``, or above 2^64 - 1.
    """
    given = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0 else value
    try:
        if isinstance(given, bool | Tensor):
            raise TypeError
        found = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if found < least:
        raise ValueError(f"{name} is {found}; it must be at least {least}")
    if found >= 1 << 64:
        raise ValueError(f"{name} must be below 2^64, got {value!r}")
    return found


def as_features(features: Tensor | np.ndarray) -> Tensor:
    """``as_tensor`` of floating-point features (..., D).

    Raises:
        TypeError: no tensor or array, or not of floating-point numbers.
    """
    _check_type(features)
    return as_tensor(features, "features", _FEATURES_WAY_OUT)


def as_labels(labels: Tensor | np.ndarray | Sequence[int]) -> Tensor:
    """``as_tensor`` of labels of any real type and shape, as int64.

    Raises:
        TypeError: no numbers, or bools.
        ValueError: one that is not a whole number, or of 2^53 and more, where floats skip some.
    """
    found = as_tensor(labels, "labels", _LABELS_WAY_OUT)
    if found.dtype == torch.bool:
        raise TypeError(f"labels must be whole numbers 0..K-1, got {found.dtype}; {_LABELS_WAY_OUT}")
    if found.is_floating_point():
        broken = (found != found.round()) | ~(found.abs() < 2.0**53)
        if bool(broken.any()):
            at = broken.nonzero()[0].tolist()
            raise ValueError(
                f"labels{at} is {float(found[tuple(at)]):g}, not a whole number in 0..K-1; mend it or drop that image"
            )
    return found.long()


def augment(features: Tensor) -> Tensor:
    """phi~ = (phi, 1): (..., D) -> (..., D+1)."""
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)


def check_images(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    *,
    num_classes: int | None = None,
    class_weights: Tensor | np.ndarray | Sequence[float] | None = None,
    group: ProcessGroup | None = None,
    facts: Mapping[str, object] | None = None,
) -> TrainingImages:
    """Check what a fit is given, and name what is wrong.

    The sums run on the features' device, or on the labels' where the features are an array: so a memory map can be
    worked off on a GPU, chunk by chunk. With a group every rank checks its shard before any sum runs: where one
    refuses, all do; and D, K, type, class weights and what else is told in ``facts`` must be every rank's.

    Raises:
        TypeError: features or labels of a type that cannot be meant.
        ValueError: shapes, labels, class weights or feature values that cannot be used, or ranks that disagree.
        RankError: another rank's shard was refused.
    """
    check_group(group)
    device = device_of(features, labels)

    def shard() -> tuple[Tensor, int]:
        _check_features(features)
        _check_device(device)
        own = _check_labels(labels, len(features)).to(device)
        return own, 0 if num_classes is None else whole_number(num_classes, "num_classes", 2)

    own, told = together(shard, group, device)
    shapes = {"D": features.shape[1], "num_classes": told, "float64": _is_wide(features)}
    check_alike({**shapes, **(facts or {})}, group, device)
    k = told or _count_classes(own, group)

    def whole() -> TrainingImages:
        _check_range(own, k)
        images = TrainingImages(features, own, k, None if weights is None else weights[own], group)
        for span, chunk in images.chunks():
            _check_finite(chunk, span.start)
        return images

    weights = together(
        lambda: None if class_weights is None else check_class_weights(class_weights, k, device), group, device
    )
    check_alike({"class_weights": None if weights is None else weights.tolist()}, group, device)
    return together(whole, group, device)


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
    check_numbers(features, "features", _FEATURES_WAY_OUT)
    floating = features.is_floating_point() if isinstance(features, Tensor) else features.dtype.kind == "f"
    if not floating:
        raise TypeError(f"features must be floating-point numbers, got {features.dtype}; convert them to float32")


def _is_wide(features: Tensor | np.ndarray) -> bool:
    """Whether floating-point features are float64, in whatever byte order."""
    return features.dtype.itemsize == 8


def _check_labels(labels: Tensor | np.ndarray | Sequence[int], num_images: int) -> Tensor:
    found = as_labels(labels)
    if found.shape != (num_images,):
        raise ValueError(f"labels must be ({num_images},) like the rows of features, got {tuple(found.shape)}")
    if num_images == 0:
        raise ValueError("features holds no image (N = 0); a fit needs at least one on every rank")
    return found


def _count_classes(labels: Tensor, group: ProcessGroup | None) -> int:
    """One more than the largest label on any rank."""
    top = labels.max()
    if group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    largest = int(top)
    if largest == 0:
        raise ValueError("labels hold class 0 alone, and a classifier needs at least 2 classes; give num_classes")
    if largest >= _MOST_CLASSES:
        raise ValueError(
            f"labels go up to {largest}, outside 0..K-1 of any likely K; number the classes or give num_classes"
        )
    return max(2, largest + 1)


def _check_range(labels: Tensor, num_classes: int) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(f"labels[{at}] is {int(labels[at])}, outside 0..{num_classes - 1}; check num_classes")


def check_class_weights(
    class_weights: Tensor | np.ndarray | Sequence[float], num_classes: int, device: torch.device
) -> Tensor:
    """Class weights (K,) as a float64 copy on the device.

    Raises:
        TypeError: no numbers.
        ValueError: another shape, or a weight that is not positive or above 1e9.
    """
    found = as_tensor(class_weights, "class_weights", "give one positive number a class")
    if found.shape != (num_classes,):
        raise ValueError(f"class_weights must be ({num_classes},), one a class, got {tuple(found.shape)}")
    weights = found.to(device, torch.float64, copy=True)
    if not bool((weights.isfinite() & (weights > 0)).all()):
        raise ValueError(f"class_weights must be positive and finite, got {weights.tolist()}")
    if not bool((weights <= _LARGEST_WEIGHT).all()):
        raise ValueError(
            f"class_weights go up to {float(weights.max()):g}, above {_LARGEST_WEIGHT:g}; a weight counts an image "
            "that many times: divide them all by the largest"
        )
    return weights


def device_of(features: object, labels: object) -> torch.device:
    """Where sums over the images run."""
    return next((found.device for found in (features, labels) if isinstance(found, Tensor)), torch.device("cpu"))


def check_group(group: ProcessGroup | None) -> None:
    """Refuse what is no process group.

    Raises:
        TypeError: so.
    """
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be a torch.distributed process group, got {group!r}; leave it out for one process")


def check_prior_precision(prior_precision: object) -> float:
    """tau as a float: any real number, numpy's and 0-dimensional tensors included.

    Raises:
        TypeError: no real number; a bool is none.
        ValueError: not positive, or not finite.
    """
    given = prior_precision
    if isinstance(given, Tensor | np.ndarray | np.generic) and given.ndim == 0:
        given = given.item()
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"prior_precision must be one positive number, got {prior_precision!r}")
    try:
        tau = float(given)
    except OverflowError:
        tau = math.inf
    if not (0.0 < tau < math.inf):
        raise ValueError(f"prior_precision is {tau}; it must be positive and finite")
    return tau
