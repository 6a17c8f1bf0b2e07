"""Peaks, hit rates, energy and joint regions: against closed forms, independent integrals and hand counts."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import multivariate_normal

from bayescam.explain.cam import CamPosterior
from bayescam.explain.excursions import joint_exceedance
from bayescam.explain.regions import energy, hit_rate, peak_probability
from bayescam.explain.upsample import Upsampling
from bayescam.posterior.draws import Draws

from .posteriors import STRUCTURES, D, K, make, random_maps

LEFT = torch.tensor([[True, False, False], [True, False, False]])
NUM = 20_000


def _two_cells(structure: str = "full"):
    posterior, _ = make(structure)
    maps = random_maps(3, size=(1, 2))
    cam = CamPosterior(maps, posterior)
    rows, _ = next(cam.rows())
    return cam, cam.mean[:, 1, 0], cam.forms.covariance(rows, rows, cam.directions[1])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_with_two_cells_the_hit_rate_is_the_closed_form_outranks(structure):
    cam, _, _ = _two_cells(structure)
    first = torch.tensor([[True, False]])
    found = hit_rate(cam, first, 1, num_samples=NUM)
    torch.testing.assert_close(found, cam.outranks(first, ~first, 1), atol=2.5 / math.sqrt(NUM), rtol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_joint_exceedance_is_the_orthant_probability(structure):
    """Two cells: the likelier one keeps its own probability, the other gets P(both > t), here by Genz's integration."""
    cam, mean, covariance = _two_cells(structure)
    for n in range(3):
        both = multivariate_normal(-mean[n].numpy(), covariance[n].numpy()).cdf([0.0, 0.0])
        single = cam.exceedance(0.0)[n, 1, 0]
        found = joint_exceedance(cam, 1, num_samples=NUM)[n, 0]
        torch.testing.assert_close(found.max(), single.max(), atol=2.5 / math.sqrt(NUM), rtol=0)
        assert float(found.min()) == pytest.approx(float(both), abs=2.5 / math.sqrt(NUM))


def test_joint_exceedance_is_at_most_pointwise_and_falls_with_the_level():
    posterior, _ = make("kron")
    cam = CamPosterior(random_maps(), posterior)
    joint = joint_exceedance(cam, 2, num_samples=NUM)
    assert bool((joint <= cam.exceedance(0.0)[:, 2] + 2.5 / math.sqrt(NUM)).all())
    assert bool((joint_exceedance(cam, 2, t=0.5, num_samples=NUM) <= joint + 1e-12).all())
    upsampling = Upsampling.to_size((2, 3), (8, 12))
    fine = joint_exceedance(cam, 2, upsampling=upsampling)
    assert fine.shape == (3, 8, 12)
    assert bool((fine.amin((1, 2)) <= joint.amin((1, 2)) + 0.03).all())


def test_joint_exceedance_of_draws_by_hand():
    weight = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    weight[0, :, 0] = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    draws = Draws(weight, torch.zeros(1, 4, 2, dtype=torch.float64))
    maps = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2)
    cam = CamPosterior(maps, draws, centred=False)
    assert sorted(joint_exceedance(cam, 0)[0, 0].tolist()) == [0.5, 0.75]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sampled_statements_agree_between_gaussian_and_its_draws(structure):
    posterior, _ = make(structure)
    maps = random_maps()
    cam, sampled = CamPosterior(maps, posterior), CamPosterior(maps, posterior.sample(NUM, seed=5))
    labels = torch.tensor([0, 3, 0])
    peaks = peak_probability(cam, labels, num_samples=NUM)
    torch.testing.assert_close(peaks.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(peaks, peak_probability(sampled, labels), atol=3.6 / math.sqrt(NUM), rtol=0)
    torch.testing.assert_close(
        hit_rate(cam, LEFT, labels, num_samples=NUM), (peaks * LEFT).sum((1, 2)), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        energy(cam, LEFT, labels, num_samples=NUM).median, energy(sampled, LEFT, labels).median, atol=0.02, rtol=0
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_float32_maps_are_sampled_like_float64(structure):
    posterior, _ = make(structure)
    maps = random_maps()
    quick, exact = (hit_rate(CamPosterior(m, posterior), LEFT, 1) for m in (maps.float(), maps))
    assert quick.dtype == torch.float32
    torch.testing.assert_close(quick.double(), exact, atol=2e-3, rtol=0)


def test_energy_of_draws_is_counted_by_hand():
    posterior, _ = make("full")
    draws, maps = posterior.sample(200, seed=1), random_maps()
    values = torch.einsum("sd,ndij->nsij", draws.centred().weight[0, :, 2], maps).clamp(min=0)
    total = values.sum((2, 3))
    share = torch.where(total > 0, (values * LEFT).sum((2, 3)) / total, 0)
    found = energy(CamPosterior(maps, draws), LEFT, 2, probability=0.8)
    torch.testing.assert_close(found.median, share.quantile(0.5, dim=1))
    torch.testing.assert_close(found.low, share.quantile(0.1, dim=1))
    torch.testing.assert_close(found.high, share.quantile(0.9, dim=1))


def test_a_flat_map_never_hits_and_ties_share():
    posterior, _ = make("diag")
    maps = random_maps(1)[:, :, :1, :1].expand(1, D, 2, 3).clone()
    assert float(peak_probability(CamPosterior(maps, posterior.sample(50, seed=0)), 0).sum()) == 0
    assert float(hit_rate(CamPosterior(torch.zeros_like(maps), posterior), LEFT, 0)) == 0
    assert float(energy(CamPosterior(torch.zeros_like(maps), posterior), LEFT, 0).high) == 0
    maps[..., 0] *= 2
    tied = peak_probability(CamPosterior(maps, posterior.sample(50, seed=0)), 0)[0]
    torch.testing.assert_close(tied[0], tied[1])
    torch.testing.assert_close(tied[:, 1], tied[:, 2])
    assert float(tied.sum()) == pytest.approx(1)


def test_one_image_and_many_give_the_same_statement(monkeypatch):
    posterior, _ = make("kron")
    cam = CamPosterior(random_maps(4), posterior)
    whole = peak_probability(cam, 1)
    torch.testing.assert_close(peak_probability(cam.select([2]), 1), whole[2:3])
    monkeypatch.setattr("bayescam.explain.regions._NUMBERS", 1)
    torch.testing.assert_close(peak_probability(cam, 1), whole)


def test_shifting_all_classes_changes_no_statement():
    posterior, _ = make("full")
    draws, maps = posterior.sample(100, seed=0), random_maps()
    moved = Draws(draws.weight + torch.randn(1, 100, 1, D, dtype=torch.float64), draws.bias)
    for statement in (peak_probability, joint_exceedance):
        torch.testing.assert_close(
            statement(CamPosterior(maps, moved), 0), statement(CamPosterior(maps, draws), 0), atol=1e-12, rtol=0
        )


def test_wrong_masks_are_refused_in_words():
    cam = CamPosterior(random_maps(), make("diag")[0])
    with pytest.raises(ValueError, match="mask is empty in image 0"):
        hit_rate(cam, torch.zeros(2, 3, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match="mask is full in image 0"):
        energy(cam, torch.ones(2, 3, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match="probability is 1"):
        energy(cam, LEFT, 0, probability=1.0)
    with pytest.raises(ValueError, match="at least 100"):
        hit_rate(cam, LEFT, 0, num_samples=5)
    with pytest.raises(ValueError, match=f"label is {K}"):
        hit_rate(cam, LEFT, K)
