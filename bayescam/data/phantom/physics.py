"""From thickness to grey values: polyenergetic Beer-Lambert, scatter, detector blur, Poisson noise, logarithm, window.

Mass attenuation coefficients: J. H. Hubbell and S. M. Seltzer, "Tables of X-Ray Mass Attenuation Coefficients",
NISTIR 5632, NIST Standard Reference Database 126, tables 3 (titanium, iron, lead) and 4 (cortical bone and soft tissue
after ICRU 44).
Gypsum (CaSO4 2H2O) is the mass-weighted sum of its elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.floating]

ENERGIES = np.array([30.0, 40.0, 50.0, 60.0, 80.0])  # keV
# g/cm^3
DENSITY = {"bone": 1.92, "soft": 1.06, "titanium": 4.54, "steel": 7.87, "lead": 11.35, "gypsum": 1.1}
# cm^2/g at ENERGIES; "steel" is iron, "gypsum" set plaster with its pores (density above)
MASS_ATTENUATION = {
    "bone": (1.331, 0.6655, 0.4242, 0.3148, 0.2229),
    "soft": (0.3790, 0.2688, 0.2264, 0.2048, 0.1823),
    "titanium": (4.972, 2.214, 1.213, 0.7661, 0.4052),
    "steel": (8.176, 3.629, 1.958, 1.205, 0.5952),
    "lead": (30.32, 14.36, 8.041, 5.021, 2.419),
    "gypsum": (1.562, 0.7621, 0.4730, 0.3426, 0.2341),
}
# Share of photons in each bin at the tube voltages in kV between which an exposure is interpolated: round figures with
# the shape of a tungsten anode behind 2.5 mm of aluminium, chosen for realism, not measured.
SPECTRA = {50.0: (0.34, 0.48, 0.18, 0.0, 0.0), 75.0: (0.16, 0.29, 0.28, 0.21, 0.06)}


@dataclass(frozen=True)
class Exposure:
    """How one picture is taken: tube voltage in kV, photons per open pixel, scatter and blur (widths in mm)."""

    kilovolt: float = 60.0
    photons: float = 20_000.0
    scatter_ratio: float = 0.15
    scatter_width: float = 18.0
    blur_width: float = 0.3


def spectrum(kilovolt: float) -> Array:
    """The share of detected energy in each bin (5,): S(E) E, summing to 1, S linear between the tabulated voltages."""
    (low, soft), (high, hard) = SPECTRA.items()
    mix = (kilovolt - low) / (high - low)
    if not 0 <= mix <= 1:
        raise ValueError(f"kilovolt is {kilovolt}; give one between {low} and {high}, where the spectra are tabulated")
    weight = ((1 - mix) * np.array(soft) + mix * np.array(hard)) * ENERGIES
    return weight / weight.sum()


def transmission(thickness: Mapping[str, Array], kilovolt: float) -> Array:
    """The primary signal over the open beam: sum_E w_E exp(-sum_m rho_m (mu/rho)_m(E) t_m / 10), float32.

    Args:
        thickness: material -> t_m (H, W) in mm.
        kilovolt: tube voltage in kV.
    """
    weights = spectrum(kilovolt)
    maps = [
        (np.asarray(value, np.float32), DENSITY[name] / 10, MASS_ATTENUATION[name]) for name, value in thickness.items()
    ]
    total = np.zeros(maps[0][0].shape, np.float32)
    for index, weight in enumerate(weights):
        if weight == 0:
            continue
        depth = sum(value * np.float32(density * table[index]) for value, density, table in maps)
        total += np.float32(weight) * np.exp(-depth)
    return total


def with_scatter(primary: Array, exposure: Exposure, pixel: float) -> Array:
    """Primary plus scatter: a broad Gaussian of the primary (width in mm), scaled by the scatter-to-primary ratio.

    Computed on 4 x 4 means, for a Gaussian many pixels wide; ``pixel`` is the pixel size in mm.
    """
    height, width = primary.shape
    padded = np.pad(primary, ((0, -height % 4), (0, -width % 4)), mode="edge")
    coarse = padded.reshape(padded.shape[0] // 4, 4, padded.shape[1] // 4, 4).mean(axis=(1, 3))
    coarse = ndimage.gaussian_filter(coarse, exposure.scatter_width / (4 * pixel), mode="nearest", truncate=2.5)
    fine = np.repeat(np.repeat(coarse, 4, axis=0), 4, axis=1)
    fine = ndimage.uniform_filter(fine, 5, mode="nearest")
    return primary + np.float32(exposure.scatter_ratio) * fine[:height, :width]


def detected(signal: Array, exposure: Exposure, pixel: float, normal: Array) -> Array:
    """Photon counts: the blurred signal's Poisson quantiles at the standard normals ``normal`` (H, W).

    N = round(l + sqrt(l) z + (z^2 - 1) / 6), the Cornish-Fisher quantile of a Poisson of mean l (Cornish and Fisher
    1938): with the noise given as common random numbers, pictures that differ in one structure share it elsewhere.
    """
    mean = exposure.photons * ndimage.gaussian_filter(signal, exposure.blur_width / pixel, mode="nearest", truncate=3)
    return np.maximum(np.rint(mean + np.sqrt(mean) * normal + (normal * normal - 1) / 6), 0).astype(np.float32)


def optical_density(counts: Array, photons: float) -> Array:
    """-log of counts over the open beam: attenuation, so that bone is bright; at least one count."""
    return -np.log(np.maximum(counts, 1) / np.float32(photons)).astype(np.float32)


def windowed(density: Array, low: float, high: float, gamma: float) -> Array:
    """Grey in [0, 1]: ((d - low) / (high - low)) clipped, to the power ``gamma``."""
    return np.clip((density - np.float32(low)) / np.float32(high - low), 0, 1) ** np.float32(gamma)
