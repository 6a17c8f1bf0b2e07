"""The phantom as a dataset: records without files, drawn when asked for."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bayescam.data.dataset import Radiograph, RadiographDataset
from bayescam.data.phantom.roster import Case, Dials, roster
from bayescam.data.phantom.simulate import Simulated, radiograph

LICENCE = "simulated by bayescam: no patient, no restriction"


@dataclass(frozen=True)
class PhantomSource:
    """Draws the picture and the masks of a record from ``seed`` and ``dials`` alone."""

    seed: int
    dials: Dials
    cases: tuple[Case, ...]

    def drawn(self, record: Radiograph) -> Simulated:
        """The simulated radiograph behind ``record``."""
        return _drawn(self.cases[int(record.obs_id.rsplit("-", 1)[1])], self.seed, self.dials)

    def image(self, record: Radiograph) -> NDArray[np.float32]:
        """The picture (H, W) in [0, 1]."""
        return self.drawn(record).image

    def masks(self, record: Radiograph) -> dict[str, NDArray[np.bool_]]:
        """The truth: name -> bool (H, W)."""
        return self.drawn(record).masks

    def key(self, record: Radiograph) -> str:
        """A digest of all that decides the picture: the case, the seed, the dials and the simulator's own text."""
        case = self.cases[int(record.obs_id.rsplit("-", 1)[1])]
        return hashlib.sha256(f"{_simulator()} {self.seed} {self.dials} {case}".encode()).hexdigest()

    def recipe(self) -> dict[str, object]:
        """The arguments of ``phantom_dataset`` that make this source again in another process."""
        return {"num": len(self.cases), "seed": self.seed, "dials": asdict(self.dials)}


@cache
def _simulator() -> str:
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(text).hexdigest()


@lru_cache(maxsize=8)
def _drawn(case: Case, seed: int, dials: Dials) -> Simulated:
    return radiograph(case, seed, dials)


def phantom_dataset(num: int, seed: int, **dials: object) -> RadiographDataset:
    """``num`` simulated radiographs of the population ``seed``.

    The same (num, seed, dials) gives the same bytes, and record i does not depend on ``num``. There are two to three
    pictures a patient; a quarter of the patients appear under two parts.

    Args:
        num: how many radiographs.
        seed: which population.
        dials: the fields of ``bayescam.data.phantom.roster.Dials``.
    """
    settings = Dials(**dials)  # type: ignore[arg-type]
    cases = tuple(roster(num, seed, settings))
    records = tuple(
        Radiograph(
            obs_id=f"phantom-{seed}-{case.index:06d}",
            label=settings.parts.index(case.part),
            patient=f"{case.patient:05d}",
            study=f"study{case.study}",
            view=case.view,
        )
        for case in cases
    )
    return RadiographDataset(
        name="phantom",
        classes=settings.parts,
        records=records,
        root=None,
        licence=LICENCE,
        shareable=True,
        ignored={},
        source=PhantomSource(seed, settings, cases),
    )
