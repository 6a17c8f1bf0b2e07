"""``bayescam diagnose RUN``: did NUTS converge, is each Gaussian sound, and may the recommended posterior be used."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from bayescam.diagnose.compare import MAX_NLL_DIFFERENCE, MAX_TOTAL_VARIATION, Verdict, json_safe
from bayescam.diagnose.importance import good_khat
from bayescam.diagnose.nuts_checks import nuts_checks
from bayescam.diagnose.run_checks import Check, FoundComparison
from bayescam.errors import BayescamError
from bayescam.notebook import html_table
from bayescam.posterior.covariance import Covariance, FullCovariance, KronCovariance
from bayescam.posterior.laplace import Laplace, load_laplace
from bayescam.posterior.refine import TOLERANCES

MAX_NEWTON_DECREMENT = 1e-3
MAX_PRIOR_SHARE = 0.95
MAX_KL = 0.045
RECOMMENDED = {"laplace": "laplace", "refine": "refined", "nuts": "nuts"}
_SPOKEN = {
    "nuts": "NUTS",
    "nuts_hierarchical": "NUTS with tau sampled",
    "laplace": "Laplace",
    "refined": "the refined Gaussian",
}


@dataclass(frozen=True)
class Diagnosis:
    """All checks of a run.

    Args:
        run: the folder.
        checks: one line each.
        verdict: of ``comparison.json``; None without it.
    """

    run: str
    checks: tuple[Check, ...]
    verdict: Verdict | None

    @property
    def passed(self) -> bool:
        """Whether every check that decides was made, and holds."""
        return not self._open(self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that fail and decide."""
        return tuple(check for check in self.checks if check.word == "FAIL")

    @property
    def recommended(self) -> str | None:
        """The posterior that the verdict names: "laplace", "refined" or "nuts"; None where it names none."""
        return RECOMMENDED.get(self.verdict or "")

    @property
    def sound(self) -> bool:
        """Whether NUTS and the recommended posterior pass every check of theirs that decides."""
        return self.recommended is not None and not self._open(self._of("nuts") + self._of(self.recommended))

    def _of(self, subject: str) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.subject == subject)

    @staticmethod
    def _open(checks: tuple[Check, ...]) -> list[Check]:
        """Those that decide and do not pass: failed, or not made."""
        return [check for check in checks if check.decides and (check.passed is False or not check.made)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; a number that is not finite is None."""
        facts = {"run": self.run, "passed": self.passed, "verdict": self.verdict, "recommended": self.recommended}
        checks = [asdict(check) | {"word": check.word} for check in self.checks]
        return json_safe(facts | {"sound": self.sound, "summary": self.summary(), "checks": checks})

    def text(self) -> str:
        """In the manner of CmdStan's diagnose."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for subject in dict.fromkeys(check.subject for check in self.checks):
            lines.append(f"{subject}:")
            lines += [
                f"  {check.word}  {check.name:<{width}}  {check.number:<10}  {check.words}"
                for check in self._of(subject)
            ]
        said = {check.word for check in self.checks}
        if "note" in said:
            lines.append("note: beyond its threshold, but decides nothing: the verdict rests on the predictions")
        if "skip" in said:
            lines.append("skip: could not be checked")
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """Which posterior the verdict recommends, whether its checks and those of NUTS pass, and what else does not."""
        if self.verdict is None:
            first = "no comparison.json, so no posterior is recommended."
        elif self.recommended is None:
            first = f"Verdict {self.verdict}: no posterior is recommended."
        else:
            first = f"Verdict {self.verdict}: use {_SPOKEN[self.recommended]}."
        words = [first]
        for subject in dict.fromkeys(["nuts", self.recommended or "nuts"]):
            found = self._open(self._of(subject))
            words.append(f"{_listed(subject, found)}." if found else f"{_SPOKEN[subject]} passes its checks.")
        named = ("nuts", self.recommended)
        others = [check for check in self._open(self.checks) if check.subject not in named]
        if others:
            subjects = dict.fromkeys(check.subject for check in others)
            parts = [_listed(subject, [one for one in others if one.subject == subject]) for subject in subjects]
            words.append(f"Not recommended: {'; '.join(parts)}." if self.recommended else f"{'; '.join(parts)}.")
        if self.passed:
            words.append("No problems found.")
        return " ".join(word[0].upper() + word[1:] for word in words)

    def __repr__(self) -> str:
        return f"Diagnosis({self.run!r}: {self.summary()})"

    def _repr_html_(self) -> str:
        rows = [(check.subject, check.name, check.number, check.words, check.word) for check in self.checks]
        return html_table(f"Diagnosis: {self.summary()}", rows, header=("of", "check", "value", "rule", ""))


def _listed(subject: str, checks: list[Check]) -> str:
    failed, open_ = ([one.name for one in checks if one.made is made] for made in (True, False))
    parts = [f"fails {'; '.join(failed)}"] if failed else []
    parts += [f"was not checked for {'; '.join(open_)}"] if open_ else []
    return f"{_SPOKEN.get(subject, subject)} {' and '.join(parts)}"


def diagnose_run(folder: Path) -> Diagnosis:
    """Read the posteriors of a run folder and check them.

    R-hat is rank-normalised and split, ESS bulk and tail (Vehtari et al. 2021); both over the class-centred weights and
    biases, the log joint, tau where it was sampled, and the predicted probabilities, which is what a reader looks at.
    E-BFMI: Betancourt (2016). A Gaussian is sound where its mean is at its optimum (the MAP, or E_q[grad U] = 0),
    measured in posterior sds, and its predictions are those of NUTS.

    Raises:
        BayescamError: the folder holds no posteriors.
        FileFormatError: a file in it is not what it should be.
    """
    chains, gaussian = folder / "posterior/nuts.nc", folder / "posterior/laplace.safetensors"
    if not chains.is_file() or not gaussian.is_file():
        raise BayescamError(f"{folder}: holds no posteriors (posterior/nuts.nc); give the folder of a complete run")
    comparison = FoundComparison.of(folder)
    files = {"laplace": gaussian, "refined": folder / "posterior/refined.safetensors"}
    names = [name for name, file in files.items() if file.is_file()]
    checks = []
    if comparison is None:
        checks.append(Check.skipped("comparison", "predictions against NUTS", "no comparison.json in this folder"))
    elif "refined" not in names and ("refined" in comparison.gaussians or comparison.verdict == "refine"):
        checks.append(Check.skipped("refined", "the posterior itself", "no posterior/refined.safetensors"))
    for name in names:
        checks += laplace_checks(cast(Any, name), load_laplace(files[name]))
        if comparison is not None:
            checks += importance_checks(comparison, name) + comparison_checks(comparison, name)
    of_chains = nuts_checks(chains)
    if (hierarchical := folder / "posterior/nuts_hierarchical.nc").is_file():
        of_chains += nuts_checks(hierarchical, subject="nuts_hierarchical")
    return Diagnosis(str(folder), (*of_chains, *checks), None if comparison is None else comparison.verdict)


def laplace_checks(subject: Literal["laplace", "refined"], laplace: Laplace) -> list[Check]:
    """The checks of a Gaussian posterior."""
    pivots = precision_pivots(laplace.covariance)
    rounding = pivots.numel() * torch.finfo(pivots.dtype).eps
    ratio = float(pivots.min() / pivots.max())  # NaN where one of them is
    share = float((laplace.covariance.diagonal().mean() * laplace.prior_precision).sqrt())
    checks = [
        Check.of(
            subject,
            "smallest / largest pivot of the precision",
            ratio,
            "above",
            rounding,
            f", the rounding of {pivots.numel()} numbers",
        ),
        Check.of(
            subject,
            "posterior sd / prior sd, root mean square",
            share,
            "below",
            MAX_PRIOR_SHARE,
            "; near 1 the prior decides, and tau with it",
            decides=False,
        ),
    ]
    return checks + (_refined_checks(subject, laplace) if laplace.refined else _mode_checks(subject, laplace))


def _mode_checks(subject: str, laplace: Laplace) -> list[Check]:
    decrement, sds = "Newton decrement at the MAP", " posterior sds"
    limit = MAX_NEWTON_DECREMENT * float(_trace_of_precision(laplace.covariance)) ** 0.5
    why = f", {MAX_NEWTON_DECREMENT:g} sqrt(trace of the precision); beyond it the mean is elsewhere"
    return [
        Check.of(subject, decrement, laplace.newton_decrement, "below", MAX_NEWTON_DECREMENT, sds),
        Check.of(subject, "gradient norm at the MAP", laplace.gradient_norm, "below", limit, why),
    ]


def _refined_checks(subject: str, laplace: Laplace) -> list[Check]:
    if laplace.refinement is not None:
        short = not laplace.refinement.converged
    else:
        short = any(note.startswith("refinement stopped") for note in laplace.notes)
    distance, sds = "distance of the mean from E_q[gradient] = 0", " posterior sds"
    stopped = "times refinement stopped short of its fixed point"
    return [
        Check.of(subject, distance, laplace.newton_decrement, "below", TOLERANCES[0], sds),
        Check.of(subject, stopped, float(short), "at most", 0),
    ]


def precision_pivots(covariance: Covariance) -> torch.Tensor:
    """How definite the precision is, read off its stored factor: Cholesky pivots (full), eigenvalues (kron), entries
    (diag). In exact arithmetic each is at least tau; beyond rounding of the largest, the smallest says nothing.
    """
    if isinstance(covariance, FullCovariance):
        return covariance.precision_cholesky.diagonal().square()
    return covariance.eigenvalues if isinstance(covariance, KronCovariance) else covariance.precision


def _trace_of_precision(covariance: Covariance) -> torch.Tensor:
    """Over the contrasts; |gradient| <= decrement x sqrt(trace)."""
    if isinstance(covariance, FullCovariance):
        return covariance.precision_cholesky.square().sum()
    return precision_pivots(covariance).sum()


def importance_checks(comparison: FoundComparison, name: str) -> list[Check]:
    """k-hat and KL of a Gaussian, over all its weights at once; they decide nothing.

    A KL of ``MAX_KL`` a parameter is that of a Gaussian whose every mean is off by 0.3 sd: 0.3^2 / 2.
    """
    found = comparison.importance(name)
    if found is None:
        why = "comparison.json holds none of it: compared without training images, or by an older bayescam"
        return [Check.skipped(name, part, why, decides=False) for part in ("Pareto k-hat", "KL to the posterior")]
    kl = found.kl / found.num_parameters
    size = f"; {found.kl:.4g} nat in all, give or take {found.kl_error:.2g}"
    if found.kl_is_lower_bound:
        size += f", at least: the best weights at hand, of {found.evidence_from}, have no good k-hat"
    khat = f"Pareto k-hat, median over {found.num_batches} x {found.num_draws} draws"
    limit, why = good_khat(found.num_draws), ", min(1 - 1 / log10 S, 0.7)"
    return [
        Check.of(name, khat, found.khat, "at most", limit, why, decides=False),
        Check.of(
            name,
            "KL to the posterior, nat a parameter",
            kl,
            "at most",
            MAX_KL,
            size,
            decides=False,
            only_a_bound=found.kl_is_lower_bound,
        ),
    ]


def comparison_checks(comparison: FoundComparison, name: str) -> list[Check]:
    """What ``comparison.json`` says of a Gaussian's predictions beside those of NUTS."""
    if name not in comparison.gaussians:
        return [Check.skipped(name, "predictions against NUTS", "comparison.json says nothing of it")]
    limit = max(MAX_TOTAL_VARIATION, 2 * comparison.predictive("nuts_half", "total_variation"))
    distance = comparison.predictive(name, "total_variation")
    why = f" (twice NUTS half against half, at least {MAX_TOTAL_VARIATION})"
    checks = [Check.of(name, "total variation to NUTS", distance, "at most", limit, why)]
    worse = "NLL less that of NUTS"
    if not comparison.has_labels(name):
        return [*checks, Check.skipped(name, worse, "compared without labels", decides=False)]
    difference = comparison.predictive(name, "nll_difference")
    limit = max(MAX_NLL_DIFFERENCE, 2 * abs(comparison.predictive("nuts_half", "nll_difference")))
    why = f" of 0 (twice NUTS half against half, at least {MAX_NLL_DIFFERENCE})"
    return [*checks, Check.of(name, worse, difference, "within", limit, why)]
