"""The chain from millimetres to grey values against closed forms."""

import numpy as np
import pytest
from scipy import stats

from bayescam.data.phantom import physics
from bayescam.data.phantom.physics import Exposure


def test_spectrum_is_a_distribution_that_hardens_with_voltage():
    assert physics.spectrum(60).sum() == pytest.approx(1)
    mean = [physics.spectrum(kv) @ physics.ENERGIES for kv in (50, 60, 75)]
    assert mean[0] < mean[1] < mean[2] < 75
    with pytest.raises(ValueError, match=r"kilovolt is 120.*between"):
        physics.spectrum(120)


def test_transmission_is_the_weighted_sum_of_exponentials():
    bone, soft = np.array([[0.0, 10.0], [3.0, 0.0]]), np.array([[0.0, 40.0], [25.0, 60.0]])
    found = physics.transmission({"bone": bone, "soft": soft}, 62.0)
    expected = np.zeros((2, 2))
    for share, at_bone, at_soft in zip(
        physics.spectrum(62.0), physics.MASS_ATTENUATION["bone"], physics.MASS_ATTENUATION["soft"], strict=True
    ):
        expected += share * np.exp(-(1.92 * at_bone * bone + 1.06 * at_soft * soft) / 10)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[0, 0] == pytest.approx(1)


def test_half_value_layer_of_soft_tissue_at_one_energy(monkeypatch):
    monkeypatch.setattr(physics, "SPECTRA", {50.0: (0, 1, 0, 0, 0), 75.0: (0, 1, 0, 0, 0)})
    layer = 10 * np.log(2) / (0.2688 * 1.06)
    thickness = layer * np.array([[0.0, 1, 2, 3]])
    np.testing.assert_allclose(physics.transmission({"soft": thickness}, 60), [[1, 0.5, 0.25, 0.125]], rtol=1e-5)


def test_beam_hardens():
    depth = np.array([[1.0, 2, 4, 8, 16]])
    per_mm = -np.log(physics.transmission({"bone": depth}, 60)) / depth
    assert (np.diff(per_mm[0]) < 0).all()


def test_metal_outshines_bone_and_bone_soft_tissue():
    one = np.array([[2.0]])
    order = ["lead", "steel", "titanium", "bone", "soft"]
    seen = [physics.transmission({name: one}, 60).item() for name in order]
    assert seen == sorted(seen)


def test_scatter_adds_its_share_of_an_even_field_and_keeps_the_total():
    exposure = Exposure(scatter_ratio=0.3, scatter_width=12)
    even = np.full((50, 62), 0.4, np.float32)
    np.testing.assert_allclose(physics.with_scatter(even, exposure, 1.0), 0.52, rtol=1e-5)
    spot = np.zeros((200, 200), np.float32)
    spot[100, 100] = 1
    assert physics.with_scatter(spot, exposure, 1.0).sum() == pytest.approx(1.3, rel=0.02)


@pytest.mark.parametrize("mean", [30.0, 400.0, 2e4])
def test_noise_is_poisson(mean):
    normal = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    exposure = Exposure(photons=mean, blur_width=1e-3)
    counts = physics.detected(np.ones((300, 400), np.float32), exposure, 1.0, normal)
    assert counts.mean() == pytest.approx(mean, abs=5 * np.sqrt(mean / counts.size))
    assert counts.var() == pytest.approx(mean, rel=0.02)
    grid = np.quantile(counts, [0.05, 0.25, 0.5, 0.75, 0.95])
    assert np.abs(grid - stats.poisson(mean).ppf([0.05, 0.25, 0.5, 0.75, 0.95])).max() <= max(1, 0.02 * np.sqrt(mean))


def test_blur_spreads_by_its_width_and_keeps_photons():
    signal = np.zeros((41, 41), np.float32)
    signal[20, 20] = 1
    exposure = Exposure(photons=1e6, blur_width=1.0)
    counts = physics.detected(signal, exposure, 0.5, np.zeros_like(signal))
    assert counts.sum() == pytest.approx(1e6, rel=1e-3)
    offset = (np.arange(41) - 20) * 0.5
    assert np.sqrt((counts.sum(axis=0) @ offset**2) / counts.sum()) == pytest.approx(1.0, rel=0.05)


def test_density_and_window():
    counts = np.array([[0.0, 1.0, 100.0, 1000.0]])
    np.testing.assert_allclose(
        physics.optical_density(counts, 1000), [[np.log(1000), np.log(1000), np.log(10), 0]], atol=1e-6
    )
    np.testing.assert_allclose(physics.windowed(np.array([-1.0, 1.0, 2.0, 9.0]), 1, 5, 0.5), [0, 0, 0.5, 1])
