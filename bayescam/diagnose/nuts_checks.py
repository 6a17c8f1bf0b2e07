"""The checks of NUTS, read from its NetCDF file: every one made, or named as not made."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from bayescam.diagnose.compare import MAX_RHAT, MIN_ESS
from bayescam.diagnose.convergence import Convergence, Place, convergence, energy_fraction, probabilities, spread
from bayescam.diagnose.run_checks import Check
from bayescam.errors import FileFormatError
from bayescam.storage import load_netcdf, load_tensors, netcdf_groups

GOOD_RHAT = 1.01
GOOD_ESS_PER_CHAIN = 100
GOOD_CHAINS = 4
MIN_ENERGY_FRACTION = 0.3

_DEPTH = "reached_max_treedepth"


def nuts_checks(path: Path, *, subject: str = "nuts") -> list[Check]:
    """The checks of a ``posterior/nuts.nc``.

    The probabilities are held to what the verdict asks of them, R-hat below 1.05 and ESS of 100. For weights, biases,
    log joint and tau Vehtari et al. (2021) ask for more, R-hat below 1.01 and ESS of 100 a chain: short of that is a
    note, and a failure only where the verdict's limits are broken too.

    Raises:
        FileFormatError: not such a file.
    """
    found = Chains(path)
    stats = found.stats
    several = "; the R-hat of one chain compares its halves"
    checks = [Check.of(subject, "chains", len(stats["lp"]), "at least", GOOD_CHAINS, several, decides=False)]
    scalars = {"centred weights": found.weights, "centred biases": found.biases, "log joint": stats["lp"]}
    if found.tau is not None:
        scalars["tau"] = found.tau
    for name, draws in scalars.items():
        checks += _scalar_checks(subject, name, draws, found)
    checks += _probability_checks(subject, found)
    fractions = np.array(energy_fraction(stats["energy"]))
    worst = int(np.where(np.isfinite(fractions), fractions, -np.inf).argmin())
    fraction, where = float(fractions[worst]), {"chain": worst}
    checks.append(Check.of(subject, "E-BFMI, worst chain", fraction, "at least", MIN_ENERGY_FRACTION, where=where))
    for name, key in (("divergent transitions", "diverging"), ("transitions at maximum tree depth", _DEPTH)):
        by_chain = (stats[key] != 0).sum(1)  # NaN is not 0
        total = int(by_chain.sum())
        most = {"most in chain": int(by_chain.argmax())} if total else None
        checks.append(Check.of(subject, name, total, "at most", 0, where=most))
    return checks


@dataclass(frozen=True)
class Chains:
    """What ``posterior/nuts.nc`` holds, each part checked where it is asked for."""

    path: Path

    @cached_property
    def groups(self) -> dict[str, xr.Dataset]:
        there = netcdf_groups(self.path)
        groups = {name: load_netcdf(self.path, name) for name in ("posterior", "sample_stats")}
        more = ("predictions", "constant_data")
        return groups | {name: load_netcdf(self.path, name) if name in there else xr.Dataset() for name in more}

    def array(self, group: str, name: str, dims: int) -> np.ndarray:
        found = self.groups[group].get(name)
        if found is None or found.ndim != dims or found.size == 0 or found.dtype.kind not in "fiub":
            raise FileFormatError(f"{self.path}: holds no {name} of NUTS by chain and draw; give a complete run")
        return found.values

    @cached_property
    def weights(self) -> np.ndarray:
        """Centred, (C, S, K, D)."""
        return self.array("posterior", "weight_centred", 4)

    @cached_property
    def biases(self) -> np.ndarray:
        """Centred, (C, S, K)."""
        return self.array("posterior", "bias_centred", 3)

    @cached_property
    def tau(self) -> np.ndarray | None:
        """(C, S), where it was sampled."""
        return self.array("posterior", "tau", 2) if "tau" in self.groups["posterior"] else None

    @cached_property
    def stats(self) -> dict[str, np.ndarray]:
        """lp, energy, diverging and reached_max_treedepth, (C, S)."""
        return {name: self.array("sample_stats", name, 2) for name in ("lp", "energy", "diverging", _DEPTH)}

    @cached_property
    def probabilities(self) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Predicted probabilities (C, S, n, K) of images spread over the N there are, their names, and N.

        From its draws at its features, or at those of the run's test split, as the comparison has them; else those of
        the file, whose float32 ties near 0 and 1 move ranks.
        """
        features = self._features()
        if features is None:
            if "probs" not in self.groups["predictions"]:
                return None
            probs = self.array("predictions", "probs", 4)
            rows = spread(probs.shape[2])
            return probs[:, :, rows], self._names("predictions", probs.shape[2])[rows], probs.shape[2]
        rows = spread(len(features))
        weights, biases, phi = (np.array(one, dtype=float) for one in (self.weights, self.biases, features[rows]))
        if biases.shape != weights.shape[:3] or phi.shape[1] != weights.shape[3]:
            raise FileFormatError(
                f"{self.path}: features {features.shape}, weights {weights.shape}, biases {biases.shape} do not fit; "
                "give a complete run"
            )
        probs = probabilities(*map(torch.from_numpy, (weights, biases, phi)))
        return probs, self._names("constant_data", len(features))[rows], len(features)

    def _features(self) -> np.ndarray | None:
        if "features" in self.groups["constant_data"]:
            return self.array("constant_data", "features", 2)
        file, split = (self.path.parent.parent / name for name in ("features.safetensors", "split.csv"))
        if not file.is_file() or not split.is_file():
            return None
        features = load_tensors(file, kind="features")[0].get("features")
        try:
            with split.open(encoding="utf-8", newline="") as stream:
                test = np.array([row.get("split") == "test" for row in csv.DictReader(stream)], dtype=bool)
        except (OSError, ValueError, csv.Error) as error:
            raise FileFormatError(f"{split}: not readable as CSV ({error}); restore it or run again") from error
        if features is None or features.dim() != 2 or len(test) != len(features) or not test.any():
            return None
        return features.numpy()[test]

    def _names(self, group: str, num_images: int) -> np.ndarray:
        found = self.groups[group].coords.get("obs_id")
        return found.values if found is not None and found.shape == (num_images,) else np.arange(num_images)

    def label(self, index: int) -> str:
        """The name of a class."""
        found = self.groups["posterior"].coords.get("label")
        return str(index if found is None or found.ndim != 1 or index >= found.size else found.values[index])


def _scalar_checks(subject: str, name: str, draws: np.ndarray, found: Chains) -> list[Check]:
    """Held to what Vehtari et al. ask for; a failure where the verdict's limits are broken."""
    enough = GOOD_ESS_PER_CHAIN * len(draws)
    checks = []
    for kind, value, place in _numbers(convergence(draws)):
        where = _where(draws, place, found)
        label = f"{kind}, {name}"
        if kind == "R-hat":
            checks.append(Check.of(subject, label, value, "below", GOOD_RHAT, fails_at=MAX_RHAT, where=where))
        else:
            checks.append(Check.of(subject, label, value, "at least", enough, fails_at=MIN_ESS, where=where))
    return checks


def _probability_checks(subject: str, found: Chains) -> list[Check]:
    """Held to what the verdict asks of them."""
    if found.probabilities is None:
        why = "neither probabilities nor features are in the file or the run folder; give to_inference_data features"
        return [Check.skipped(subject, f"{kind}, probabilities", why) for kind in ("R-hat", "bulk ESS", "tail ESS")]
    probs, images, num_images = found.probabilities
    among = f"; over {len(images)} of {num_images} images"
    checks = []
    for kind, value, place in _numbers(convergence(probs)):
        where = _where(probs, place, found, images)
        label = f"{kind}, probabilities"
        if kind == "R-hat":
            checks.append(Check.of(subject, label, value, "below", MAX_RHAT, among, where=where))
        else:
            checks.append(Check.of(subject, label, value, "above", MIN_ESS, among, where=where))
    return checks


def _numbers(found: Convergence) -> list[tuple[str, float, Place | None]]:
    return [
        ("R-hat", found.rhat, found.rhat_at),
        ("bulk ESS", found.ess_bulk, found.ess_bulk_at),
        ("tail ESS", found.ess_tail, found.ess_tail_at),
    ]


def _where(
    draws: np.ndarray, place: Place | None, found: Chains, images: np.ndarray | None = None
) -> dict[str, str | int] | None:
    """The names of a scalar, and the chain that strays furthest from the others, or is not finite."""
    if place is None:
        return None
    where: dict[str, str | int] = {}
    if images is not None:
        where = {"image": str(images[place[0]]), "label": found.label(place[1])}
    elif place:
        where = {"label": found.label(place[0]), **({"feature": place[1]} if len(place) > 1 else {})}
    if len(draws) > 1:
        scalar = np.ravel_multi_index(place, draws.shape[2:]) if place else 0
        where["chain"] = furthest_chain(draws.reshape(*draws.shape[:2], -1)[..., scalar])
    return where


def furthest_chain(draws: np.ndarray) -> int:
    """Of the draws of one scalar, (C, S): the chain that is not finite, or whose mean is furthest from the median."""
    finite = np.isfinite(draws).all(1)
    if not finite.all():
        return int(finite.argmin())
    means = draws.mean(1)
    return int(np.abs(means - np.median(means)).argmax())
