"""Who is pictured: size, age, sex, bone density, build; drawn once per patient, shared by all their views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROWN = 17.0  # years; growth plates are closed from here on


@dataclass(frozen=True)
class Patient:
    """One patient. Lengths are relative to a man of 1.78 m; ``proportion`` (8,) are the free choices of nature."""

    number: int
    age: float
    sex: str
    size: float
    density: float
    build: float
    proportion: tuple[float, ...]

    @property
    def growing(self) -> bool:
        """Whether growth plates are open."""
        return self.age < GROWN - (1.5 if self.sex == "F" else 0.0)


def draw_patient(seed: int, number: int) -> Patient:
    """Patient ``number`` of the population ``seed``: a fifth are children from 4 years on, the old lose bone."""
    rng = np.random.default_rng([seed, 1, number])
    child = rng.random() < 0.2
    age = rng.uniform(4, GROWN) if child else rng.uniform(GROWN, 90)
    sex = "F" if rng.random() < 0.5 else "M"
    adult = (0.925 if sex == "F" else 1.0) * rng.normal(1, 0.035)
    size = adult * (0.42 + 0.58 * min(age / GROWN, 1.0) ** 0.9)
    loss = max(age - 50, 0) * (0.007 if sex == "F" else 0.004)
    density = float(np.clip(rng.normal(1.0, 0.08) - loss - (0.1 if child else 0), 0.6, 1.25))
    build = float(np.clip(np.exp(rng.normal(0, 0.13)), 0.75, 1.4))
    return Patient(number, float(age), sex, float(size), density, build, tuple(rng.normal(1, 0.05, 8)))
