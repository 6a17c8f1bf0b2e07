"""One line of a diagnosis, and what ``comparison.json`` must hold for some of them."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from bayescam.diagnose.compare import Verdict
from bayescam.errors import FileFormatError
from bayescam.storage import printable, read_json

_HUGE = sys.float_info.max
Relation = Literal["below", "at most", "above", "at least", "within"]
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "below": operator.lt,
    "at most": operator.le,
    "above": operator.gt,
    "at least": operator.ge,
    "within": lambda value, threshold: abs(value) <= threshold,
}


@dataclass(frozen=True)
class Check:
    """One line: a number, what it must be, whether it is.

    Args:
        subject: "nuts", "nuts_hierarchical", "laplace", "refined" or "comparison".
        name: what is measured.
        value: the number; NaN where the check could not be made.
        rule: the threshold in words, or why the check could not be made.
        passed: None where the check could not be made, or the number is too unsure to pass.
        threshold: the number that ``rule`` says.
        fails_at: where there is a second one, from which on a failure decides.
        decides: whether a failure here fails the whole; k-hat and KL look at all weights at once, and condemn most
            Gaussians that predict well.
        where: the scalar that ``value`` is of: its chain, label, feature, image.
        made: False where the check could not be made.
    """

    subject: str
    name: str
    value: float
    rule: str
    passed: bool | None
    threshold: float | None = None
    fails_at: float | None = None
    decides: bool = True
    where: Mapping[str, str | int] | None = None
    made: bool = True

    @classmethod
    def of(
        cls,
        subject: str,
        name: str,
        value: float,
        relation: Relation,
        threshold: float,
        more: str = "",
        *,
        fails_at: float | None = None,
        decides: bool = True,
        only_a_bound: bool = False,
        where: Mapping[str, str | int] | None = None,
    ) -> Check:
        """Hold ``value`` against ``threshold``; a number that is not finite fails.

        Args:
            subject, name, value, threshold, where: as above.
            relation: of the value to the threshold: "below", "at most", "above", "at least", "within" (of nought).
            more: words after the threshold.
            fails_at: what is beyond the threshold, but not beyond this, is a note.
            decides: as above.
            only_a_bound: the true number may lie beyond the threshold where this one does not: no pass then.
        """
        holds, finite = _HOLDS[relation], math.isfinite(value)
        passed = finite and holds(value, threshold)
        rule = f"{relation} {threshold:.4g}"
        if fails_at is not None:
            decides = passed or not (finite and holds(value, fails_at))
            rule += f", FAIL unless {relation} {fails_at:.4g}"
        told = None if passed and only_a_bound else passed
        return cls(subject, name, value, rule + more, told, threshold, fails_at, decides, where)

    @classmethod
    def skipped(cls, subject: str, name: str, why: str, *, decides: bool = True) -> Check:
        """A check that could not be made: never a pass."""
        return cls(subject, name, math.nan, f"not checked: {why}", None, decides=decides, made=False)

    @property
    def word(self) -> str:
        """ "pass", "FAIL", "note" (beyond its threshold, but decides nothing), "skip" (could not be made) or "info"."""
        if not self.made:
            return "skip"
        if self.passed is None:
            return "info"
        return "pass" if self.passed else "FAIL" if self.decides else "note"

    @property
    def number(self) -> str:
        """The value as it is printed."""
        return f"{self.value:.4g}" if self.made else "-"

    @property
    def words(self) -> str:
        """The rule, and which scalar the number is of."""
        if not self.where:
            return self.rule
        return f"{self.rule}; {', '.join(f'{name} {printable(str(one), 80)}' for name, one in self.where.items())}"


@dataclass(frozen=True)
class FoundImportance:
    """The numbers of ``diagnose.importance.Importance`` as a file holds them; infinite where it has null."""

    khat: float
    num_batches: int
    num_draws: int
    kl: float
    kl_error: float
    kl_is_lower_bound: bool
    evidence_from: str
    num_parameters: int


@dataclass(frozen=True)
class FoundComparison:
    """``comparison.json`` of a run, each number checked where it is asked for.

    Args:
        path: the file, for messages.
        content: what it holds.
        verdict: its verdict.
    """

    path: Path
    content: Mapping[str, Any]
    verdict: Verdict

    @classmethod
    def of(cls, folder: Path) -> FoundComparison | None:
        """The comparison of a run folder, or None where there is none.

        Raises:
            FileFormatError: something else than a comparison.
        """
        path = folder / "comparison.json"
        if not path.is_file():
            return None
        content = read_json(path)
        found = cls(path, content, content.get("verdict"))  # type: ignore[arg-type]
        if found.verdict not in get_args(Verdict):
            raise found._wrong("verdict", found.verdict, f"one of {', '.join(get_args(Verdict))}")
        found._table("predictive")
        for name in found._table("importance") if "importance" in content else ():
            found.importance(name)
        return found

    @property
    def gaussians(self) -> list[str]:
        """Those of "laplace" and "refined" that were compared."""
        return [name for name in ("laplace", "refined") if name in self._table("predictive")]

    def has_labels(self, name: str) -> bool:
        return "nll_difference" in self._table("predictive", name)

    def predictive(self, name: str, number: str) -> float:
        """One number of one row of the predictive distances."""
        return self._number(self._table("predictive", name).get(number), "predictive", name, number)

    def importance(self, name: str) -> FoundImportance | None:
        """k-hat and KL of a Gaussian; None where they were not made, or not as they are now."""
        if "importance" not in self.content or name not in self._table("importance"):
            return None
        found = self._table("importance", name)
        shapes = found.get("khat")
        if not isinstance(shapes, list) or not shapes:
            raise self._wrong(f"importance/{name}/khat", shapes, "a list of numbers")
        khat = [math.inf if one is None else self._number(one, "importance", name, "khat") for one in shapes]
        if "num_parameters" not in found:
            return None

        def number(key: str) -> float:
            # JSON has no word for an infinite number, which weights that rest on one draw have: it stands as null.
            value = found.get(key, "missing")
            return math.inf if value is None else self._number(value, "importance", name, key)

        if not isinstance(source := found.get("evidence_from"), str):
            raise self._wrong(f"importance/{name}/evidence_from", source, "a name")
        counts = {key: number(key) for key in ("num_draws", "num_parameters")}
        for key, value in counts.items():
            if not 1 <= value < math.inf:
                raise self._wrong(f"importance/{name}/{key}", value, "at least 1")
        return FoundImportance(
            khat=float(np.median(khat)),
            num_batches=len(khat),
            num_draws=int(counts["num_draws"]),
            kl=number("kl"),
            kl_error=number("kl_error"),
            kl_is_lower_bound=found.get("kl_is_lower_bound") is not False,
            evidence_from=printable(source, 80),
            num_parameters=int(counts["num_parameters"]),
        )

    def _table(self, *keys: str) -> Mapping[str, Any]:
        found: Any = self.content
        for at, key in enumerate(keys):
            found = found.get(key)
            if not isinstance(found, dict):
                raise self._wrong("/".join(keys[: at + 1]), found, "a table")
        return found

    def _number(self, value: Any, *keys: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_HUGE < value < _HUGE:
            raise self._wrong("/".join(keys), value, "a number")
        return float(value)

    def _wrong(self, name: str, value: Any, expected: str) -> FileFormatError:
        return FileFormatError(
            f"{self.path}: {name} is {printable(repr(value), 80)}, not {expected}; restore it or run again"
        )
