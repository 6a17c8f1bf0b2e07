"""The only import of ArviZ: what differs between its versions is settled here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    import arviz as az


def rhat(draws: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat (Vehtari et al. 2021) of draws (C, S, ...) -> (...)."""
    return az.rhat(_dataset(draws))["x"].values


def ess(draws: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Effective sample size of draws (C, S, ...) -> (...); method "bulk", "tail", "mean", "sd", ..."""
    return az.ess(_dataset(draws), method=method)["x"].values


def psis(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed log weights and the shape k-hat of log p - log q at draws from q, (S,)."""
    ratios = np.array(log_ratios, dtype=float)
    # ArviZ 1.x takes the negative log ratios.
    log_weights, shape = az.psislw(ratios) if hasattr(az, "InferenceData") else az.psislw(-ratios)
    return np.asarray(log_weights), float(shape)


def _dataset(draws: np.ndarray) -> xr.Dataset:
    values = np.asarray(draws, dtype=float)
    dims = ["chain", "draw", *(f"dim_{i}" for i in range(values.ndim - 2))]
    return xr.Dataset({"x": (dims, values)})


def make_idata(groups: Mapping[str, xr.Dataset]) -> Any:
    """Groups as ArviZ holds them: ``InferenceData`` before 1.0, ``xarray.DataTree`` since."""
    if hasattr(az, "InferenceData"):
        return az.InferenceData(warn_on_custom_groups=False, **groups)
    return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})


def group_names(idata: Any) -> list[str]:
    """The names of the groups."""
    return list(idata.groups()) if callable(idata.groups) else [name.strip("/") for name in idata.groups if name != "/"]


def get_dataset(idata: Any, group: str) -> xr.Dataset:
    """One group as a plain Dataset."""
    node = idata[group]
    return node if isinstance(node, xr.Dataset) else node.to_dataset()
