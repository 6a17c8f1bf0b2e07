"""Class probabilities, labels, patients and uncertainties checked where they enter; torch and numpy alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

# A float32 softmax over thousands of classes, or its mean over draws, is off by less; logits and counts by far more.
_SUM_TOLERANCE = 1e-4


def check_probs(probs: np.ndarray | Tensor) -> np.ndarray:
    """Class probabilities as float64 (N, K), refused where they are none.

    Raises:
        TypeError: no numbers.
        ValueError: another shape, N = 0, K < 2, a number that is not finite or below 0, or a row whose sum is off 1 by
            more than 1e-4.
    """
    found = _numbers(probs, "probs")
    if found.ndim != 2 or found.shape[1] < 2:
        raise ValueError(f"probs must be (N, K), a row an image and a column a class, K >= 2, got {found.shape}")
    if len(found) == 0:
        raise ValueError("probs holds no image (N = 0); give at least one")
    broken = ~np.isfinite(found) | (found < 0)
    if broken.any():
        row, column = np.argwhere(broken)[0]
        raise ValueError(
            f"probs[{row}, {column}] is {found[row, column]:g}, no probability; take the softmax of logits, and leave "
            "images out whose numbers are not finite"
        )
    sums = found.sum(1)
    if (away := np.abs(sums - 1) > _SUM_TOLERANCE).any():
        row = int(away.argmax())
        raise ValueError(f"probs[{row}] sums to {sums[row]:g}, not to 1; take the softmax of logits, or divide by it")
    return found


def check_forecasts(probs: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities as float64 (N, K) and labels as integers (N,), refused where they are none.

    Raises:
        TypeError: no numbers.
        ValueError: what ``check_probs`` refuses, labels of another length, or a label that is no whole number in
            0..K-1.
    """
    found = check_probs(probs)
    n, k = found.shape
    truth = _numbers(labels, "labels")
    if truth.shape != (n,):
        raise ValueError(f"labels must be ({n},), one for each row of probs, got {truth.shape}")
    broken = ~((truth == np.floor(truth)) & (truth >= 0) & (truth < k))
    if broken.any():
        at = int(broken.argmax())
        raise ValueError(
            f"labels[{at}] is {truth[at]:g}, but probs has the classes 0 to {k - 1}; number the classes as the columns "
            "of probs, and leave images without a label out"
        )
    return found, truth.astype(np.int64)


def check_groups(groups: np.ndarray | Tensor | Sequence[Any], num_images: int, name: str = "groups") -> np.ndarray:
    """Whose each image is, (N,), refused where that is not said of each.

    Raises:
        ValueError: another length, or an image without a patient (None, nan, "").
    """
    found = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if found.shape != (num_images,):
        raise ValueError(f"{name} must be ({num_images},), the patient of each image, got {found.shape}")
    if found.dtype == object:
        nobody = np.array([one is None or one != one or one == "" for one in found], dtype=bool)
    else:
        nobody = (found != found) | (found == "") if found.dtype.kind == "U" else found != found
    if nobody.any():
        at = int(nobody.argmax())
        raise ValueError(f"{name}[{at}] is {found[at]!r}, no patient; name the image itself where none is known")
    return found.astype(str) if found.dtype == object else found


def check_scores(values: np.ndarray | Tensor, name: str, num_images: int | None = None) -> np.ndarray:
    """One number an image as float64 (N,), refused where it is not finite.

    Raises:
        TypeError: no numbers.
        ValueError: another shape, N = 0, or a number that is not finite.
    """
    found = _numbers(values, name)
    if found.ndim != 1 or len(found) == 0 or num_images not in (None, len(found)):
        size = "N" if num_images is None else num_images
        raise ValueError(f"{name} must be ({size},), one number for each of at least one image, got {found.shape}")
    if not np.isfinite(found).all():
        at = int((~np.isfinite(found)).argmax())
        raise ValueError(f"{name}[{at}] is {found[at]:g}; drop that image or mend what made it")
    return found


def check_resampling(level: float, num_resamples: int) -> None:
    """Raise ValueError unless 0 < level < 1 and there is a resample to draw."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a number between 0 and 1, as 0.9")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; give at least 1, better 1000")


def check_bins(num_bins: int) -> None:
    """Raise ValueError unless there is a bin."""
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; give at least 1, as 15")


def _numbers(values: np.ndarray | Tensor, name: str) -> np.ndarray:
    found = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.dtype.kind not in "iufb":
        raise TypeError(f"{name} must be numbers, as a torch tensor or a numpy array, got {found.dtype}")
    return found.astype(np.float64, copy=False)
