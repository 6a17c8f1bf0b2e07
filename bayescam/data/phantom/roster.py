"""Who is pictured when: cases numbered from 0, so that case i is the same however many are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np

from bayescam.data.phantom.clinic import OTHER_PARTS, PARTS, VIEWS, Examination, examine, structures
from bayescam.data.phantom.patient import Patient


@dataclass(frozen=True)
class Dials:
    """What can be turned. Every dial but ``without`` changes the pictures' distribution.

    ``size``: pixels of the long side; ``difficulty``: 0 easy, 0.5 the standard, 1 hard; ``shortcut``: the share of
    pictures whose marker tells the class; ``lie``: how many classes further in ``parts`` the class is that it tells, 0
    for the truth; ``parts``: the classes; ``bits``: 8 or 16; ``monochrome1``: the share of pictures with dark bones;
    ``without``: names of bones, "marker", "hardware" or "cast" to leave out.
    """

    size: int = 128
    difficulty: float = 0.5
    shortcut: float = 0.0
    lie: int = 0
    parts: tuple[str, ...] = PARTS
    bits: int = 8
    monochrome1: float = 0.0
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ValueError(f"size is {self.size}; give at least 32 pixels")
        for name in ("difficulty", "shortcut", "monochrome1"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")
        if self.bits not in (8, 16):
            raise ValueError(f"bits is {self.bits}; give 8 or 16")
        if unknown := set(self.parts) - set(PARTS + OTHER_PARTS):
            raise ValueError(f"parts holds {sorted(unknown)}; choose from {', '.join(PARTS + OTHER_PARTS)}")
        for name in self.without:
            if name not in structures():
                near = get_close_matches(name, sorted(structures()), 3, 0.4) or ["marker", "radius", "scaphoid"]
                raise ValueError(f"without names {name!r}, which is no structure; did you mean {', '.join(near)}?")
        if not self.parts:
            raise ValueError(f"parts is empty; choose from {', '.join(PARTS + OTHER_PARTS)}")


@dataclass(frozen=True)
class Case:
    """One entry of the roster: picture ``index`` is ``view`` of ``part`` of a patient, in their study ``study``."""

    index: int
    patient: int
    study: int
    part: str
    view: str
    side: str


def roster(num: int, seed: int, dials: Dials) -> Iterator[Case]:
    """The first ``num`` cases: patients in turn, one or two studies each, one to three views a study.

    Every run of as many patients as there are parts has each part once, as first study; a quarter of the patients come
    back with another part.
    """
    if num < 1:
        raise ValueError(f"num is {num}; ask for at least one radiograph")
    if seed < 0:
        raise ValueError(f"seed is {seed}; give a whole number from 0 up")
    index = patient = 0
    while True:
        block, place = divmod(patient, len(dials.parts))
        first = np.random.default_rng([seed, 2, block]).permutation(len(dials.parts))[place]
        rng = np.random.default_rng([seed, 3, patient])
        chosen = [first]
        if rng.random() < 0.25 and len(dials.parts) > 1:
            chosen.append((first + rng.integers(1, len(dials.parts))) % len(dials.parts))
        for study, part in enumerate(dials.parts[k] for k in chosen):
            views = rng.permutation(VIEWS[part])[: rng.integers(1, len(VIEWS[part]) + 1)]
            side = "L" if rng.random() < 0.5 else "R"
            for view in views:
                if index == num:
                    return
                yield Case(index, patient, study + 1, part, str(view), side)
                index += 1
        patient += 1


def exam_of(case: Case, patient: Patient, seed: int, dials: Dials) -> Examination:
    """How the case was pictured."""
    rng = np.random.default_rng([seed, 5, case.index])
    inverted = bool(rng.random() < dials.monochrome1)
    exam = examine(
        rng,
        patient,
        case.part,
        case.view,
        case.side,
        size=dials.size,
        difficulty=dials.difficulty,
        shortcut=dials.shortcut,
        told=dials.parts[(dials.parts.index(case.part) + dials.lie) % len(dials.parts)] if dials.lie else case.part,
    )
    return replace(exam, inverted=inverted)
