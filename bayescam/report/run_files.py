"""The files of a run folder as the report reads them, each once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bayescam.storage import load_netcdf, read_json

_POSTERIORS = {"laplace_full": "laplace.nc", "laplace_refined": "refined.nc", "nuts": "nuts.nc"}


class RunFiles:
    """What a run folder says, and nothing that it does not."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run."""
        return read_json(self.folder / name)

    def dataset(self, name: str, group: str | None = None) -> xr.Dataset:
        """A NetCDF file of the run, or one group of it, in memory."""
        return load_netcdf(self.folder / name, group)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return self.json("metrics.json")

    @cached_property
    def comparison(self) -> dict[str, Any]:
        return self.json("comparison.json")

    @cached_property
    def data(self) -> dict[str, Any]:
        return self.json("data.json")

    @cached_property
    def predictions(self) -> xr.Dataset:
        return self.dataset("predictions.nc")

    @cached_property
    def cams(self) -> xr.Dataset:
        return self.dataset("cams.nc")

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in self.metrics["classes"]]

    @property
    def labels(self) -> np.ndarray:
        return self.predictions["y"].values

    @property
    def patients(self) -> np.ndarray:
        """Whose each test image is, (N,); itself, where no patient is named."""
        named = self.predictions["patient"].values.astype(str)
        return np.where(named == "", self.predictions["obs_id"].values.astype(str), named)

    @property
    def resampled(self) -> str:
        """What the bootstrap draws: "patients", or "images" where the data name no patient."""
        return "patients" if (self.predictions["patient"].values.astype(str) != "").any() else "images"

    @property
    def tolerance(self) -> float:
        """The total variation to NUTS that counts as close enough: max(.01, twice NUTS half against half)."""
        return max(0.01, 2 * self.comparison["predictive"]["nuts_half"]["total_variation"])

    def probs(self, method: str) -> np.ndarray:
        """Class probabilities of the test images by one method, (N, K)."""
        return self.predictions["probs"].sel({"method": method}).values

    def centred_weights(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean and sd of the class-centred weights by posterior, (K, D) each."""
        found = {}
        for method, file in _POSTERIORS.items():
            weight = self.dataset(f"posterior/{file}", "posterior")["weight_centred"]
            found[method] = (weight.mean(("chain", "draw")).values, weight.std(("chain", "draw")).values)
        return found

    @cached_property
    def nuts_weights(self) -> np.ndarray:
        """The class-centred draws of NUTS, (C, S, K, D)."""
        return self.dataset("posterior/nuts.nc", "posterior")["weight_centred"].values

    @cached_property
    def features(self) -> np.ndarray:
        """phi of the test images, (N, D)."""
        return self.dataset("posterior/nuts.nc", "constant_data")["features"].values

    def traces(self) -> tuple[np.ndarray, np.ndarray]:
        """lp and energy of NUTS, (C, S)."""
        stats = self.dataset("posterior/nuts.nc", "sample_stats")
        return stats["lp"].values, stats["energy"].values
