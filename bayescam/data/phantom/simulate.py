"""Draw simulated radiographs with their truth: project the body, fly the photons, keep the masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bayescam.data.phantom.accessories import cast_thickness, hardware_solids, marker_solids
from bayescam.data.phantom.clinic import Examination, posed
from bayescam.data.phantom.patient import Patient, draw_patient
from bayescam.data.phantom.physics import detected, optical_density, transmission, windowed, with_scatter
from bayescam.data.phantom.projection import Canvas, Shadow, chords, project
from bayescam.data.phantom.roster import Case, Dials, exam_of, roster
from bayescam.data.phantom.solids import Array

TEXTURE = 0.16  # relative standard deviation of spongy bone along a ray
LEAK = 0.004  # share of the beam that passes the collimator's leaves


@dataclass(frozen=True)
class Simulated:
    """One simulated radiograph: ``image`` (H, W) float32 in [0, 1], ``masks`` name -> bool (H, W), and its making.

    Masks: ``bone``; ``joint``, discs around joint spaces; ``soft_tissue``, the whole patient; ``evidence``, the bones
    and joints at home in this part, where exposed; ``marker``, ``hardware``, ``cast``; ``collimation``, what is not
    exposed. All but evidence are of the objects, also behind the collimator.
    """

    case: Case
    patient: Patient
    exam: Examination
    image: NDArray[np.float32]
    masks: dict[str, NDArray[np.bool_]]


def simulate(num: int, seed: int, dials: Dials | None = None) -> Iterator[Simulated]:
    """The first ``num`` radiographs of the population ``seed`` in turn; image i does not depend on ``num``."""
    dials = dials or Dials()
    for case in roster(num, seed, dials):
        yield radiograph(case, seed, dials)


def radiograph(case: Case, seed: int, dials: Dials) -> Simulated:
    """Draw one case: the same case, seed and dials give the same bytes."""
    patient = draw_patient(seed, case.patient)
    exam = exam_of(case, patient, seed, dials)
    canvas = Canvas.of(exam.shape, exam.pixel)
    rng = np.random.default_rng([seed, 4, case.index])
    grain = rng.standard_normal((2, *exam.shape), np.float32)
    shadow, extra, masks = _thickness(patient, exam, canvas, dials.without)
    density = _density(exam, canvas, shadow, extra, grain)
    if dials.without:
        whole, worn, _ = _thickness(patient, exam, canvas, ())
        limits = _limits(exam, canvas, _density(exam, canvas, whole, worn, grain), worn)
    else:
        limits = _limits(exam, canvas, density, extra)
    grey = windowed(density, *limits, exam.window[2])
    if exam.shutter:
        grey = np.where(masks["collimation"], np.float32(0), grey)
    levels = np.float32(2**dials.bits - 1)
    grey = np.rint((1 - grey if exam.inverted else grey) * levels) / levels
    return Simulated(case, patient, exam, grey.astype(np.float32), masks)


def _thickness(
    patient: Patient, exam: Examination, canvas: Canvas, without: tuple[str, ...]
) -> tuple[Shadow, dict[str, Array], dict[str, NDArray[np.bool_]]]:
    """Millimetres of every material along the rays, what is worn apart, and the masks."""
    whole = posed(patient, exam)
    shadow = project(whole, canvas, exam.part, without)
    extra: dict[str, Array] = {}
    if exam.marker is not None and "marker" not in without:
        extra["lead"] = chords(marker_solids(exam.marker), canvas)
    if exam.hardware is not None and "hardware" not in without:
        extra[exam.hardware] = chords(hardware_solids(whole, exam), canvas)
    if exam.cast and "cast" not in without:
        extra["gypsum"] = cast_thickness(whole, canvas)
    nothing = np.zeros(exam.shape, bool)
    field = canvas.inside(exam.collimator)
    masks = {
        "bone": shadow.occupied > 0.3,
        "joint": shadow.joint,
        "soft_tissue": shadow.tissue > 0.5,
        "evidence": shadow.evidence & field,
        "marker": extra["lead"] > 0.1 if "lead" in extra else nothing,
        "hardware": extra[exam.hardware] > 0.1 if exam.hardware in extra else nothing,
        "cast": extra["gypsum"] > 0.3 if "gypsum" in extra else nothing,
        "collimation": ~field,
    }
    return shadow, extra, masks


def _density(exam: Examination, canvas: Canvas, shadow: Shadow, extra: dict[str, Array], grain: Array) -> Array:
    """Optical density (H, W) as the detector reports it."""
    texture = ndimage.gaussian_filter(grain[0], max(0.35 / exam.pixel, 0.5))
    texture *= np.float32(TEXTURE) / max(float(texture.std()), 1e-6)
    bone = shadow.cortical + shadow.spongy * np.clip(1 + texture, 0.3, 2)
    soft = np.maximum(shadow.envelope - shadow.air - bone, 0)
    primary = transmission({"bone": bone, "soft": soft, **extra}, exam.exposure.kilovolt)
    primary = primary * canvas.opening(exam.collimator, LEAK)
    signal = with_scatter(primary, exam.exposure, exam.pixel)
    counts = detected(signal, exam.exposure, exam.pixel, grain[1])
    return optical_density(counts, exam.exposure.photons)


def _limits(exam: Examination, canvas: Canvas, density: Array, extra: dict[str, Array]) -> tuple[float, float]:
    """The ends of the window: the lower quantile of the exposed field, the upper of its middle, without metal."""
    chosen = canvas.inside(exam.collimator)
    for material in ("lead", "steel", "titanium"):
        if material in extra:
            chosen = chosen & (extra[material] < 0.1)
    reach = 0.35 * exam.field
    middle = chosen & canvas.inside((-reach, -reach, reach, reach))
    low = float(np.quantile(density[chosen], exam.window[0]))
    high = float(np.quantile(density[middle if middle.any() else chosen], exam.window[1]))
    return low - 0.02, max(high, low + 0.2) + 0.05


def twin(case: Case, seed: int, dials: Dials, *without: str) -> Simulated:
    """The same radiograph without the named structures: bones become soft tissue, worn things air; noise is kept."""
    return radiograph(case, seed, replace(dials, without=(*dials.without, *without)))
