"""``bayescam diagnose RUN``: did NUTS converge, is Laplace sound; each line a pass or a fail with its threshold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bayescam.diagnose.convergence import Convergence, convergence, energy_fraction
from bayescam.errors import BayescamError, FileFormatError
from bayescam.posterior.laplace import Laplace, load_laplace
from bayescam.storage import load_netcdf, read_json

MAX_RHAT = 1.05
MIN_ESS = 100.0
MIN_ENERGY_FRACTION = 0.3
MAX_NEWTON_DECREMENT = 1e-3
_IMAGES = 128
_DEFAULT_MAX_DEPTH = 10


@dataclass(frozen=True)
class Check:
    """One line: a number, what it must be, whether it is.

    Args:
        subject: "nuts", "laplace", "refined" or "comparison".
        name: what is measured.
        value: the number.
        rule: the threshold in words.
        passed: None where the number is information only.
    """

    subject: str
    name: str
    value: float
    rule: str
    passed: bool | None


@dataclass(frozen=True)
class Diagnosis:
    """All checks of a run."""

    run: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"run": self.run, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    def text(self) -> str:
        """In the manner of CmdStan's diagnose."""
        words = {True: "pass", False: "FAIL", None: "info"}
        width = max(len(check.name) for check in self.checks)
        lines = []
        for subject in dict.fromkeys(check.subject for check in self.checks):
            lines.append(f"{subject}:")
            for check in self.checks:
                if check.subject == subject:
                    lines.append(f"  {words[check.passed]}  {check.name:<{width}}  {check.value:<10.4g}  {check.rule}")
        failed = sum(check.passed is False for check in self.checks)
        lines.append("no problems found" if failed == 0 else f"{failed} of {len(self.checks)} checks failed")
        return "\n".join(lines)


def diagnose_run(folder: Path) -> Diagnosis:
    """Read the posteriors of a run folder and check them.

    R-hat is rank-normalised and split, ESS bulk and tail (Vehtari et al. 2021); both over the class-centred weights,
    the log joint and the predicted probabilities, which is what a reader looks at. E-BFMI: Betancourt (2016). A
    Laplace fit is sound where its Newton decrement is small: the distance of the mean from the MAP in posterior sds.

    Raises:
        BayescamError: the folder holds no posteriors.
    """
    chains, gaussian = folder / "posterior/nuts.nc", folder / "posterior/laplace.safetensors"
    if not chains.is_file() or not gaussian.is_file():
        raise BayescamError(f"{folder}: holds no posteriors (posterior/nuts.nc); give the folder of a complete run")
    checks = nuts_checks(chains)
    checks += laplace_checks("laplace", load_laplace(gaussian))
    refined = folder / "posterior/refined.safetensors"
    if refined.is_file():
        checks += laplace_checks("refined", load_laplace(refined))
    if (folder / "comparison.json").is_file():
        checks += comparison_checks(read_json(folder / "comparison.json"))
    return Diagnosis(str(folder), tuple(checks))


def nuts_checks(path: Path) -> list[Check]:
    """The checks of a ``posterior/nuts.nc``."""
    weights, probabilities, stats = _chains(path)
    scalars = {"centred weights": convergence(weights), "log joint": convergence(stats["lp"])}
    if probabilities is not None:
        scalars["probabilities"] = convergence(probabilities[:, :, :_IMAGES])
    checks = []
    for name, numbers in scalars.items():
        checks += _convergence_checks(name, numbers)
    fraction = min(energy_fraction(stats["energy"]))
    divergent = int(stats["diverging"].sum())
    deepest = int((stats["tree_depth"] >= _DEFAULT_MAX_DEPTH).sum())
    checks.append(Check("nuts", "E-BFMI, worst chain", fraction, "at least 0.3", fraction >= MIN_ENERGY_FRACTION))
    checks.append(Check("nuts", "divergent transitions", divergent, "none", divergent == 0))
    checks.append(Check("nuts", "transitions at maximum tree depth", deepest, "none", deepest == 0))
    return checks


def _chains(path: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    """Centred weights (C, S, K, D), predicted probabilities (C, S, N, K) if there are any, and statistics (C, S)."""
    groups = {name: load_netcdf(path, name) for name in ("posterior", "sample_stats", "predictions")}

    def array(group: str, name: str, dims: int) -> np.ndarray:
        found = groups[group].get(name)
        if found is None or found.ndim != dims or found.size == 0 or found.dtype.kind not in "fiub":
            raise FileFormatError(f"{path}: holds no {name} of NUTS by chain and draw; give a complete run")
        return found.values

    stats = {name: array("sample_stats", name, 2) for name in ("lp", "energy", "diverging", "tree_depth")}
    probabilities = array("predictions", "probs", 4) if "probs" in groups["predictions"] else None
    return array("posterior", "weight_centred", 4), probabilities, stats


def _convergence_checks(name: str, numbers: Convergence) -> list[Check]:
    enough = f"at least {MIN_ESS:g}"
    return [
        Check("nuts", f"R-hat, {name}", numbers.rhat, f"below {MAX_RHAT}", numbers.rhat < MAX_RHAT),
        Check("nuts", f"bulk ESS, {name}", numbers.ess_bulk, enough, numbers.ess_bulk >= MIN_ESS),
        Check("nuts", f"tail ESS, {name}", numbers.ess_tail, enough, numbers.ess_tail >= MIN_ESS),
    ]


def laplace_checks(subject: Literal["laplace", "refined"], laplace: Laplace) -> list[Check]:
    """The checks of a Gaussian posterior."""
    variances = laplace.covariance.diagonal()
    smallest, prior = float(variances.min()), 1 / laplace.prior_precision
    share = float((variances.mean() / prior).sqrt())
    checks = [
        Check(subject, "smallest marginal variance", smallest, "above 0", smallest > 0),
        Check(subject, "posterior sd / prior sd, root mean square", share, "near 1: the prior dominates", None),
    ]
    if not laplace.refined:
        decrement = laplace.newton_decrement
        rule = f"below {MAX_NEWTON_DECREMENT:g} posterior sds"
        checks.append(Check(subject, "Newton decrement at the MAP", decrement, rule, decrement < MAX_NEWTON_DECREMENT))
        checks.append(Check(subject, "gradient norm at the MAP", laplace.gradient_norm, "information", None))
    return checks


def comparison_checks(comparison: dict[str, Any]) -> list[Check]:
    """What ``comparison.json`` says of each Gaussian's predictions beside NUTS."""
    floor = comparison["predictive"]["nuts_half"]["total_variation"]
    limit = max(0.01, 2 * floor)
    checks = []
    for name in ("laplace", "refined"):
        if name in comparison["predictive"]:
            distance = comparison["predictive"][name]["total_variation"]
            rule = f"at most {limit:.4f} (twice NUTS half against half, at least 0.01)"
            checks.append(Check("comparison", f"total variation, {name} to NUTS", distance, rule, distance <= limit))
    return checks
