"""The files of a run folder as the report reads them, each once."""

from __future__ import annotations

import csv
import hashlib
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bayescam.diagnose.compare import SPEAKERS
from bayescam.diagnose.diagnosis import Diagnosis, diagnose_run
from bayescam.errors import FileFormatError
from bayescam.storage import load_netcdf, read_json

_POSTERIORS = {"laplace_full": "laplace.nc", "laplace_refined": "refined.nc", "nuts": "nuts.nc"}
SPLITS = ("train", "valid", "test")


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

    def table(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV file of the run.

        Raises:
            FileFormatError: absent, or not UTF-8.
        """
        try:
            with (self.folder / name).open(encoding="utf-8", newline="") as stream:
                return list(csv.DictReader(stream))
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{self.folder / name}: cannot be read ({error}); restore it or run again") from error

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
    def seeds(self) -> dict[str, Any] | None:
        """How far other trainings move; None where no other network was trained."""
        return self.json("seeds.json") if (self.folder / "seeds.json").is_file() else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "config.toml").read_text(encoding="utf-8"))

    @cached_property
    def predictions(self) -> xr.Dataset:
        return self.dataset("predictions.nc")

    @cached_property
    def cams(self) -> xr.Dataset:
        return self.dataset("cams.nc")

    @cached_property
    def diagnosis(self) -> Diagnosis:
        return diagnose_run(self.folder)

    @property
    def verdict(self) -> str:
        found = str(self.comparison["verdict"])
        if found not in SPEAKERS:
            raise FileFormatError(f"{self.folder / 'comparison.json'}: verdict is {found!r}; run again")
        return found

    @property
    def speaker(self) -> str:
        """The method whose numbers the page puts first: what the verdict lets speak."""
        return SPEAKERS[self.verdict]

    @property
    def mapped(self) -> str:
        """The method that the maps are of; in a run of an older bayescam it may not be the speaker."""
        return str(self.cams.attrs["posterior"])

    @property
    def identity(self) -> str:
        """Twelve hex digits that tell this run from others: the beginning of metrics.json's SHA-256."""
        return hashlib.sha256((self.folder / "metrics.json").read_bytes()).hexdigest()[:12]

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

    @cached_property
    def patients_by_split(self) -> dict[str, int]:
        """How many different patients each split names."""
        rows = self.table("split.csv")
        return {part: len({r["patient"] for r in rows if r["split"] == part and r["patient"]}) for part in SPLITS}

    @cached_property
    def num_unnamed(self) -> int:
        """Of how many images the patient is not known."""
        return sum(not row["patient"] for row in self.table("split.csv"))

    @property
    def limits(self) -> dict[str, float]:
        """How far from NUTS is close enough: "total_variation" and "nll_difference"."""
        return {name: float(self.comparison["thresholds"][name]) for name in ("total_variation", "nll_difference")}

    def probs(self, method: str) -> np.ndarray:
        """Class probabilities of the test images by one method, (N, K)."""
        return self.predictions["probs"].sel({"method": method}).values

    def draws(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Class-centred weights (C, S, K, D) and biases (C, S, K) of "laplace_full", "laplace_refined" or "nuts"."""
        if method not in self._draws:
            found = self.dataset(f"posterior/{_POSTERIORS[method]}", "posterior")
            self._draws[method] = found["weight_centred"].values, found["bias_centred"].values
        return self._draws[method]

    @cached_property
    def _draws(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {}

    def moments(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sd of the class-centred weights, (K, D) each."""
        weights = self.draws(method)[0]
        return weights.mean((0, 1)), weights.std((0, 1))

    @cached_property
    def features(self) -> np.ndarray:
        """phi of the test images, (N, D), in the order of ``predictions``."""
        return self.dataset("posterior/nuts.nc", "constant_data")["features"].values

    def credible(self, method: str, rows: np.ndarray, level: float = 0.9) -> np.ndarray:
        """Equal-tailed intervals of the probabilities of some test images under the draws, (2, n, K)."""
        weight, bias = (values.reshape(-1, *values.shape[2:]) for values in self.draws(method))
        found = []
        for phi in self.features[rows].astype(float):
            logits = weight @ phi + bias
            odds = np.exp(logits - logits.max(1, keepdims=True))
            tail = (1 - level) / 2
            found.append(np.quantile(odds / odds.sum(1, keepdims=True), [tail, 1 - tail], axis=0))
        return np.stack(found, 1)

    def traces(self) -> tuple[np.ndarray, np.ndarray]:
        """lp and energy of NUTS, (C, S)."""
        stats = self.dataset("posterior/nuts.nc", "sample_stats")
        return stats["lp"].values, stats["energy"].values

    def rows_of(self, obs_ids: np.ndarray) -> np.ndarray:
        """Where images of these names are among the test images."""
        place = {str(name): row for row, name in enumerate(self.predictions["obs_id"].values)}
        return np.array([place[str(name)] for name in obs_ids], dtype=int)
