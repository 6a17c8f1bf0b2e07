"""The only import of ArviZ: what differs between 0.x (InferenceData) and 1.x (DataTree) is settled here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import logsumexp

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    import arviz as az

_IS_TREE = int(az.__version__.split(".")[0]) >= 1


def rhat(draws: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat (Vehtari et al. 2021) of draws (C, S, ...) -> (...)."""
    return az.rhat(_dataset(draws))["x"].values


def ess(draws: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Effective sample size of draws (C, S, ...) -> (...); method "bulk", "tail", "mean", "sd", ...; NaN of under 4."""
    if draws.shape[1] < 4:
        return np.full(draws.shape[2:], np.nan)
    return az.ess(_dataset(draws), method=method)["x"].values


def psis(log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed, normalised log weights (..., S) and the shapes k-hat (...) of log ratios (..., S).

    The ratios are log p - log q at draws from q, for each row by itself (Vehtari et al. 2024, JMLR 25(72)). The shape
    is 0 where all of the tail's ratios are equal, and infinite where it cannot be computed, as one draw has all weight.
    """
    ratios = np.array(log_ratios, dtype=float)
    rows = ratios.reshape(-1, ratios.shape[-1])
    num = rows.shape[1]
    tail = min(num, math.ceil(min(num / 5, 3 * math.sqrt(num))))
    flat = np.partition(rows, num - tail, axis=1)[:, num - tail] == rows.max(1)
    log_weights, shapes = rows - logsumexp(rows, axis=1, keepdims=True), np.zeros(len(rows))
    if not flat.all():
        log_weights[~flat], shapes[~flat] = _smoothed(rows[~flat])
    return log_weights.reshape(ratios.shape), shapes.reshape(ratios.shape[:-1])


def _smoothed(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # ratios can span hundreds of nats
        if _IS_TREE:
            from arviz_stats.base import array_stats

            log_weights, shapes = array_stats.psislw(-ratios)  # ArviZ 1.x takes the negative log ratios
        else:
            log_weights, shapes = az.psislw(ratios)
    return np.asarray(log_weights), np.nan_to_num(np.asarray(shapes, dtype=float), nan=np.inf, posinf=np.inf)


def loo(idata: Any) -> tuple[np.ndarray, np.ndarray]:
    """PSIS-LOO of draws from the posterior itself: elpd and k-hat of each observation of ``log_likelihood``, flat."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")  # the caller counts them
        found = az.loo(idata, pointwise=True)
    pointwise = found.elpd_i if _IS_TREE else found.loo_i
    return np.asarray(pointwise, dtype=float).ravel(), np.asarray(found.pareto_k, dtype=float).ravel()


def elpd_data(elpd_i: np.ndarray, pareto_k: np.ndarray, *, p: float, num_samples: int, good_k: float) -> Any:
    """Pointwise leave-one-out as the ELPDData that the installed ``az.compare`` and ``az.plot_khat`` take.

    Args:
        elpd_i, pareto_k: of each image, (N,).
        p: the effective number of parameters.
        num_samples: draws.
        good_k: the largest shape that can be trusted.
    """
    values, shapes = (xr.DataArray(one, dims=("train_id",)) for one in (elpd_i, pareto_k))
    warning = bool((pareto_k > good_k).any())
    se = float(np.sqrt(len(elpd_i) * elpd_i.var(ddof=int(_IS_TREE))))  # as ``az.loo`` of that version has it
    facts = [float(elpd_i.sum()), se, p, num_samples, len(elpd_i), warning]
    if not _IS_TREE:
        from arviz.stats.stats_utils import ELPDData

        names = ["elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i", "pareto_k", "scale"]
        return ELPDData(data=[*facts, values, shapes, "log", good_k], index=[*names, "good_k"])
    from arviz_stats import utils

    names = ["elpd", "se", "p", "n_samples", "n_data_points", "warning"]
    given = dict(zip(names, facts, strict=True)) | {"scale": "log", "good_k": good_k}
    if hasattr(utils, "ELPDDataLOO"):
        return utils.ELPDDataLOO(**given, elpd_i=values, pareto_k=shapes)
    return utils.ELPDData(kind="loo", **given, elpd_i=values, pareto_k=shapes)


def _dataset(draws: np.ndarray) -> xr.Dataset:
    values = np.asarray(draws, dtype=float)
    dims = ["chain", "draw", *(f"dim_{i}" for i in range(values.ndim - 2))]
    return xr.Dataset({"x": (dims, values)})


def summary(
    idata: Any,
    var_names: list[str] | str | None = None,
    *,
    group: str = "posterior",
    coords: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """``az.summary`` of what ``to_inference_data`` returns, on every version of ArviZ.

    ArviZ 1.x stacks the rows of its table along a dimension that it calls "label", a name that nothing in it changes,
    and so refuses data that have a dimension of that name, as ours do: here ours has another name on the way through.
    What else differs there: ``az.plot_ecdf`` is ``az.plot_dist(data, kind="ecdf")``, and ``az.plot_rank`` wants more
    chains than the one that a Gaussian's draws make.

    Args:
        idata: InferenceData, a DataTree, or one Dataset of it.
        var_names: which variables, for instance "bias_centred"; all by default.
        group: where they are.
        coords: which of their entries, for instance {"label": ["hand"], "feature": [0, 1]}.
        options: whatever else the installed ``az.summary`` takes (kind, fmt, round_to, filter_vars, ...).

    Returns:
        a pandas DataFrame, or a Dataset where fmt is "xarray".

    Raises:
        TypeError: idata is none of these.
        ValueError: a group that it does not have.
    """
    dataset = idata if isinstance(idata, xr.Dataset) else get_dataset(idata, group)
    away = {"label": "label_"} if _IS_TREE and "label" in dataset.dims else {}
    back = {new: old for old, new in away.items()}
    if coords is not None:
        options["coords"] = {away.get(name, name): chosen for name, chosen in coords.items()}
    names = [var_names] if isinstance(var_names, str) else var_names
    table = az.summary(dataset.rename(away), var_names=names, **options)
    if isinstance(table, xr.Dataset):
        return table.rename(back)
    return table.rename(columns=back) if "label_" in table.columns else table


def bfmi(idata: Any) -> np.ndarray:
    """``az.bfmi``: the energy fraction of each chain, (C,)."""
    found = az.bfmi(idata)
    return np.asarray(found["energy"] if _IS_TREE else found)


def make_idata(groups: Mapping[str, xr.Dataset]) -> Any:
    """Groups as ArviZ holds them: ``InferenceData`` before 1.0, ``xarray.DataTree`` since."""
    if _IS_TREE:
        return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    return az.InferenceData(warn_on_custom_groups=False, **groups)


def is_idata(value: Any) -> bool:
    """Whether ``value`` holds groups as the installed ArviZ does."""
    return isinstance(value, xr.DataTree if _IS_TREE else az.InferenceData)


def group_names(idata: Any) -> list[str]:
    """The names of the groups.

    Raises:
        TypeError: idata holds none.
    """
    if not is_idata(idata):
        raise TypeError(
            f"idata must be what to_inference_data returns ({'DataTree' if _IS_TREE else 'InferenceData'}), got "
            f"{type(idata).__name__}"
        )
    return list(idata.groups()) if callable(idata.groups) else [name.strip("/") for name in idata.groups if name != "/"]


def get_dataset(idata: Any, group: str) -> xr.Dataset:
    """One group as a plain Dataset.

    Raises:
        TypeError: idata holds no groups.
        ValueError: it does not hold this one.
    """
    names = group_names(idata)
    if group not in names:
        raise ValueError(f"group is {group!r}; idata has {', '.join(names)}")
    node = idata[group]
    return node if isinstance(node, xr.Dataset) else node.to_dataset()
