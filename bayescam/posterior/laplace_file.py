"""What the file of a ``Laplace`` must hold, checked before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayescam.errors import FileFormatError
from bayescam.storage import load_tensors

SCALARS = ("prior_precision", "log_evidence", "num_train", "gradient_norm", "newton_decrement", "refined", "elbo")
STORED: dict[str, tuple[str, ...]] = {
    "full": ("precision_cholesky",),
    "kron": ("class_vectors", "class_values", "feature_vectors", "feature_values"),
    "diag": ("precision",),
}


def read_laplace_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a posterior, of one structure and of shapes that fit each other.

    Raises:
        FileFormatError: the file is none of ours, or one of its parts is missing, of another shape or impossible.
    """
    tensors, facts = load_tensors(path, kind="laplace")
    wrong = _wrong_fact(facts) or _wrong_tensor(tensors, facts["structure"])
    if wrong:
        raise FileFormatError(f"{path}: {wrong}; the file is broken: fit and save the posterior again")
    return tensors, facts


def _wrong_fact(facts: Mapping[str, Any]) -> str | None:
    if not set(SCALARS) <= set(facts):
        return f"{', '.join(sorted(set(SCALARS) - set(facts)))} missing"
    tau, elbo, notes, structure = facts["prior_precision"], facts["elbo"], facts.get("notes"), facts.get("structure")
    if not isinstance(structure, str) or structure not in STORED:
        return f"structure is {structure!r}"
    if not _is_number(tau) or not 0 < tau < math.inf:
        return f"prior_precision is {tau!r}"
    for name in ("log_evidence", "gradient_norm", "newton_decrement", "num_train"):
        if not _is_number(facts[name]):
            return f"{name} is {facts[name]!r}"
    if not isinstance(facts["refined"], bool) or not (elbo is None or _is_number(elbo)):
        return f"refined is {facts['refined']!r} with elbo {elbo!r}"
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        return f"notes are {notes!r}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _wrong_tensor(tensors: Mapping[str, Tensor], structure: str) -> str | None:
    mean = tensors.get("weight_mean")
    if mean is None or mean.dim() != 2 or len(mean) < 2 or mean.shape[1] < 1:
        return "tensor 'weight_mean' is missing or not (K, D)"
    for name, shape in _shapes(mean.shape[0], mean.shape[1], structure).items():
        found = tensors.get(name)
        if found is None and name == "class_weights":
            continue
        if found is None or found.shape != shape or found.dtype != torch.float64:
            words = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            return f"tensor {name!r} is {words}, not float64 {shape}"
        signed = found.diagonal() if name == "precision_cholesky" else found
        if (name in _POSITIVE and bool((signed <= 0).any())) or (name in _NOT_NEGATIVE and bool((signed < 0).any())):
            return f"tensor {name!r} holds {float(signed.min()):g}"
    return None


_POSITIVE = ("precision_cholesky", "precision", "class_weights")
_NOT_NEGATIVE = ("class_values", "feature_values")


def _shapes(k: int, d: int, structure: str) -> dict[str, tuple[int, ...]]:
    contrasts = (k - 1) * (d + 1)
    stored: dict[str, tuple[int, ...]] = {
        "precision_cholesky": (contrasts, contrasts),
        "class_vectors": (k, k - 1),
        "class_values": (k - 1,),
        "feature_vectors": (d + 1, d + 1),
        "feature_values": (d + 1,),
        "precision": (k, d + 1),
    }
    own = {name: stored[name] for name in STORED[structure]}
    return {"weight_mean": (k, d), "bias_mean": (k,), "class_weights": (k,), **own}
