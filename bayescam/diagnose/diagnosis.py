"""``bayescam diagnose RUN``: did NUTS converge, is Laplace sound; each line a pass or a fail with its threshold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bayescam.diagnose.compare import MAX_NLL_DIFFERENCE, json_safe
from bayescam.diagnose.convergence import Convergence, convergence, energy_fraction
from bayescam.errors import BayescamError, FileFormatError
from bayescam.notebook import html_table
from bayescam.posterior.covariance import Covariance, FullCovariance, KronCovariance
from bayescam.posterior.laplace import Laplace, load_laplace
from bayescam.storage import load_netcdf, read_json

MAX_RHAT = 1.05
MIN_ESS = 100.0
MIN_ENERGY_FRACTION = 0.3
MAX_NEWTON_DECREMENT = 1e-3
MAX_KHAT = 0.7
MAX_KL = 0.045
_IMAGES = 128


@dataclass(frozen=True)
class Check:
    """One line: a number, what it must be, whether it is.

    Args:
        subject: "nuts", "laplace", "refined" or "comparison".
        name: what is measured.
        value: the number.
        rule: the threshold in words.
        passed: None where the number is information only.
        decides: whether a failure here fails the whole; k-hat and KL look at all weights at once, and condemn most
            Gaussians that predict well.
    """

    subject: str
    name: str
    value: float
    rule: str
    passed: bool | None
    decides: bool = True

    @property
    def word(self) -> str:
        """ "pass", "FAIL", "note" (beyond its threshold, but decides nothing) or "info" (no threshold)."""
        if self.passed is None:
            return "info"
        return "pass" if self.passed else "FAIL" if self.decides else "note"


@dataclass(frozen=True)
class Diagnosis:
    """All checks of a run."""

    run: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that fail and decide."""
        return tuple(check for check in self.checks if check.word == "FAIL")

    def to_dict(self) -> dict[str, Any]:
        """As JSON; a number that is not finite is None."""
        return json_safe({"run": self.run, "passed": self.passed, "checks": [asdict(check) for check in self.checks]})

    def text(self) -> str:
        """In the manner of CmdStan's diagnose."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for subject in dict.fromkeys(check.subject for check in self.checks):
            lines.append(f"{subject}:")
            for check in self.checks:
                if check.subject == subject:
                    lines.append(f"  {check.word}  {check.name:<{width}}  {check.value:<10.4g}  {check.rule}")
        if any(check.word == "note" for check in self.checks):
            lines.append("note: beyond its threshold, but decides nothing: all weights at once, not the predictions")
        lines.append(self._result())
        return "\n".join(lines)

    def _result(self) -> str:
        return f"{len(self.failed)} of {len(self.checks)} checks failed" if self.failed else "no problems found"

    def __repr__(self) -> str:
        return f"Diagnosis({self.run!r}: {self._result()}{''.join(f'; {check.name}' for check in self.failed)})"

    def _repr_html_(self) -> str:
        rows = [(check.subject, check.name, f"{check.value:.4g}", check.rule, check.word) for check in self.checks]
        return html_table(f"Diagnosis: {self._result()}", rows, header=("of", "check", "value", "rule", ""))


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
        comparison = read_json(folder / "comparison.json")
        checks += importance_checks(comparison, load_laplace(gaussian))
        checks += comparison_checks(comparison)
    subjects = [check.subject for check in checks]
    return Diagnosis(str(folder), tuple(sorted(checks, key=lambda check: subjects.index(check.subject))))


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
    deepest = int(stats["reached_max_treedepth"].sum())
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

    stats = {name: array("sample_stats", name, 2) for name in ("lp", "energy", "diverging", "reached_max_treedepth")}
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
    tau = laplace.prior_precision
    pivot, share = smallest_pivot(laplace.covariance), float((laplace.covariance.diagonal().mean() * tau).sqrt())
    definite = f"at least {tau:.4g}, the prior's precision"
    checks = [
        Check(subject, "smallest pivot of the precision", pivot, definite, pivot >= tau * (1 - 1e-6)),
        Check(subject, "posterior sd / prior sd, root mean square", share, "near 1: the prior dominates", None),
    ]
    if not laplace.refined:
        decrement = laplace.newton_decrement
        rule = f"below {MAX_NEWTON_DECREMENT:g} posterior sds"
        checks.append(Check(subject, "Newton decrement at the MAP", decrement, rule, decrement < MAX_NEWTON_DECREMENT))
        checks.append(Check(subject, "gradient norm at the MAP", laplace.gradient_norm, "information", None))
    return checks


def smallest_pivot(covariance: Covariance) -> float:
    """How definite the precision is: its smallest Cholesky pivot (full), eigenvalue (kron) or entry (diag).

    Each is at least tau, since the likelihood is log-concave: the precision is tau I and something without negative
    eigenvalues.
    """
    if isinstance(covariance, FullCovariance):
        return float(covariance.precision_cholesky.diagonal().min().square())
    return float((covariance.eigenvalues if isinstance(covariance, KronCovariance) else covariance.precision).min())


def importance_checks(comparison: dict[str, Any], laplace: Laplace) -> list[Check]:
    """k-hat and KL of each Gaussian, over all its weights at once; they decide nothing.

    A KL of ``MAX_KL`` a parameter is that of a Gaussian whose every mean is off by 0.3 sd: 0.3^2 / 2.
    """
    size = (laplace.num_classes - 1) * (laplace.num_features + 1)
    checks = []
    for name, found in comparison.get("importance", {}).items():
        # JSON has no word for an infinite k-hat, which weights that rest on one draw have: it stands there as null.
        khat, kl = (
            float(np.median([math.inf if value is None else value for value in values]))
            for values in (found["khat"], [found["kl"]])
        )
        draws = f"median over {len(found['khat'])} x {found['num_draws']} draws"
        checks += [
            Check(name, f"Pareto k-hat, {draws}", khat, f"below {MAX_KHAT}", khat < MAX_KHAT, decides=False),
            Check(
                name,
                "KL to the posterior, nat a parameter",
                kl / size,
                f"at most {MAX_KL}",
                kl / size <= MAX_KL,
                decides=False,
            ),
        ]
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
            worse = comparison["predictive"][name].get("nll_difference")
            if worse is not None:
                close = abs(worse) <= MAX_NLL_DIFFERENCE
                rule = f"within {MAX_NLL_DIFFERENCE} of 0"
                checks.append(Check("comparison", f"NLL, {name} less NUTS", worse, rule, close))
    return checks
