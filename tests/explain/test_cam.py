"""The laws of maps with a posterior: against dense covariances, against samples, and under symmetries."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bayescam.explain.cam import CamPosterior
from bayescam.explain.excursions import joint_exceedance
from bayescam.posterior.draws import Draws

from .posteriors import STRUCTURES, TAU, D, K, block, centre, make, random_maps

ALL = [(structure, centred) for structure in STRUCTURES for centred in (True, False)]
REGION_A = torch.tensor([[True, True, False], [False, False, False]])
REGION_B = torch.tensor([[False, False, False], [False, True, True]])


def _directions(centred: bool) -> torch.Tensor:
    return centre() if centred else torch.eye(K, dtype=torch.float64)


def _cells(maps: torch.Tensor, last: float = 0.0) -> torch.Tensor:
    return torch.nn.functional.pad(maps.flatten(2).mT, (0, 1), value=last)


@pytest.mark.parametrize(("structure", "centred"), ALL)
def test_mean_and_sd_are_those_of_the_dense_gaussian(structure, centred):
    posterior, dense = make(structure)
    maps = random_maps()
    cam = CamPosterior(maps, posterior, centred=centred)
    for c, direction in enumerate(_directions(centred)):
        mean = _cells(maps) @ (direction @ posterior.theta_mean)
        covariance = _cells(maps) @ block(dense, direction) @ _cells(maps).mT
        torch.testing.assert_close(cam.mean[:, c].flatten(1), mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            cam.sd[:, c].flatten(1), covariance.diagonal(dim1=1, dim2=2).sqrt(), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(("structure", "centred"), ALL)
def test_mean_over_cells_and_bias_is_the_logit(structure, centred):
    posterior, dense = make(structure)
    maps = random_maps()
    cam = CamPosterior(maps, posterior, centred=centred)
    directions = _directions(centred)
    phi = torch.nn.functional.pad(maps.mean((2, 3)), (0, 1), value=1.0)
    logits = phi @ (directions @ posterior.theta_mean).T
    torch.testing.assert_close(cam.mean.mean((2, 3)) + directions @ posterior.bias_mean, logits)
    mean, sd = cam.logit()
    torch.testing.assert_close(mean, logits)
    variance = torch.stack([((phi @ block(dense, a)) * phi).sum(1) for a in directions], 1)
    torch.testing.assert_close(sd**2, variance)


@pytest.mark.parametrize(("structure", "centred"), ALL)
def test_attribution_is_the_covariance_with_the_logit_and_averages_to_its_variance(structure, centred):
    posterior, dense = make(structure)
    maps = random_maps()
    cam = CamPosterior(maps, posterior, centred=centred)
    for c, direction in enumerate(_directions(centred)):
        cells = _cells(maps, 1.0)
        expected = (cells @ block(dense, direction) @ cells.mean(1, keepdim=True).mT)[..., 0]
        found = cam.attribution(c)
        torch.testing.assert_close(found.flatten(1), expected)
        torch.testing.assert_close(found.mean((1, 2)), cam.logit()[1][:, c] ** 2)


@pytest.mark.parametrize(("structure", "centred"), ALL)
def test_closed_forms_agree_with_20000_samples(structure, centred):
    """Five standard errors: sd within 5/sqrt(2S), probabilities within 2.5/sqrt(S), means within 5 sd/sqrt(S)."""
    posterior, _ = make(structure)
    num = 20_000
    cam = CamPosterior(random_maps(), posterior, centred=centred)
    sampled = CamPosterior(random_maps(), posterior.sample(num, seed=3), centred=centred)
    assert bool(((sampled.mean - cam.mean).abs() < 5 * cam.sd / math.sqrt(num)).all())
    assert float((sampled.sd / cam.sd - 1).abs().max()) < 5 / math.sqrt(2 * num)
    for found, exact in (
        (sampled.exceedance(0.3), cam.exceedance(0.3)),
        (sampled.relevance(0.5), cam.relevance(0.5)),
        (sampled.outranks(REGION_A, REGION_B, 2), cam.outranks(REGION_A, REGION_B, 2)),
    ):
        assert float((found - exact).abs().max()) < 2.5 / math.sqrt(num)
    spread = (sampled.quantile(0.9) - cam.quantile(0.9)) / cam.sd
    assert float(spread.abs().max()) < 5 * math.sqrt(0.9 * 0.1 / num) / 0.1755  # the normal density at its 90 % point
    torch.testing.assert_close(sampled.attribution(1), cam.attribution(1), atol=0.06 * float(cam.sd.max() ** 2), rtol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_union_and_intersection_maps_are_percentiles_of_the_dense_gaussian(structure):
    """Bykov et al. 2021 take percentiles of sampled explanations, high for the union, low for the intersection."""
    posterior, dense = make(structure)
    maps = random_maps()
    cam = CamPosterior(maps, posterior)
    for c, direction in enumerate(centre()):
        mean = _cells(maps) @ (direction @ posterior.theta_mean)
        sd = (_cells(maps) @ block(dense, direction) @ _cells(maps).mT).diagonal(dim1=1, dim2=2).sqrt()
        for q, z in ((0.05, -1.6448536269514722), (0.5, 0.0), (0.95, 1.6448536269514722)):
            torch.testing.assert_close(cam.quantile(q)[:, c].flatten(1), mean + z * sd)
    for q in (0.05, 0.95):
        level = float(cam.quantile(q)[1, 2, 1, 1])
        assert float(cam.exceedance(level)[1, 2, 1, 1]) == pytest.approx(1 - q)


@pytest.mark.parametrize("num", [3, 50])
def test_moments_from_draws_are_the_draws_own(num):
    posterior, _ = make("full")
    draws, maps = posterior.sample(num, seed=0), random_maps()
    cam = CamPosterior(maps, draws)
    values = torch.einsum("skd,ndij->snkij", draws.centred().weight[0], maps)
    torch.testing.assert_close(cam.mean, values.mean(0))
    torch.testing.assert_close(cam.sd, values.std(0))
    torch.testing.assert_close(cam.quantile(0.25), values.quantile(0.25, dim=0))
    torch.testing.assert_close(cam.exceedance(0.1), (values > 0.1).double().mean(0))
    torch.testing.assert_close(cam.contrast(1, 3)[0], (values[:, :, 1] - values[:, :, 3]).mean(0))
    torch.testing.assert_close(cam.contrast(1, 3)[1], (values[:, :, 1] - values[:, :, 3]).std(0))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_contrast_is_the_dense_difference_and_the_same_raw_or_centred(structure):
    posterior, dense = make(structure)
    maps = random_maps()
    direction = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    variance = (_cells(maps) @ block(dense, direction) @ _cells(maps).mT).diagonal(dim1=1, dim2=2)
    for centred in (True, False):
        mean, sd = CamPosterior(maps, posterior, centred=centred).contrast(1, 3)
        torch.testing.assert_close(mean.flatten(1), _cells(maps) @ (direction @ posterior.theta_mean))
        torch.testing.assert_close(sd.flatten(1), variance.sqrt())
    mean, sd = CamPosterior(maps, posterior).contrast(2, 2)
    assert float(mean.abs().max()) == float(sd.max()) == 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_outranks_is_the_dense_probability(structure):
    posterior, dense = make(structure)
    maps = random_maps()
    difference = maps[..., REGION_A].mean(-1) - maps[..., REGION_B].mean(-1)
    row = torch.nn.functional.pad(difference, (0, 1))
    for c, direction in enumerate(centre()):
        variance = ((row @ block(dense, direction)) * row).sum(1)
        expected = torch.special.ndtr(row @ (direction @ posterior.theta_mean) / variance.sqrt())
        cam = CamPosterior(maps, posterior)
        torch.testing.assert_close(cam.outranks(REGION_A, REGION_B, c), expected)
        torch.testing.assert_close(cam.outranks(REGION_B, REGION_A, c), 1 - expected)


def test_a_label_and_regions_of_each_image():
    posterior, _ = make("full")
    maps = random_maps(4)
    cam = CamPosterior(maps, posterior)
    labels = torch.tensor([2, 0, 2, 3])
    a = torch.stack([REGION_A, REGION_B, ~REGION_A, REGION_A])
    found = cam.outranks(a, REGION_B | REGION_A, labels)
    for n, label in enumerate(labels.tolist()):
        one = CamPosterior(maps[n : n + 1], posterior).outranks(a[n], REGION_B | REGION_A, label)
        torch.testing.assert_close(found[n : n + 1], one)
        torch.testing.assert_close(cam.attribution(labels)[n], cam.attribution(label)[n])
    mean, sd = cam.region(a, labels)
    values = torch.stack([cam.mean[n, c][a[n]].mean() for n, c in enumerate(labels.tolist())])
    torch.testing.assert_close(mean, values)
    assert bool((sd > 0).all())


def test_adding_a_vector_to_all_classes_changes_nothing():
    posterior, _ = make("full")
    draws, maps = posterior.sample(200, seed=0), random_maps()
    vector = 3 * torch.randn(1, 200, 1, D + 1, dtype=torch.float64)
    plain = CamPosterior(maps, draws)
    moved = CamPosterior(maps, Draws(draws.weight + vector[..., :-1], draws.bias + vector[..., -1]))
    torch.testing.assert_close(moved.mean, plain.mean)
    torch.testing.assert_close(moved.sd, plain.sd)
    torch.testing.assert_close(moved.exceedance(0.1), plain.exceedance(0.1))
    torch.testing.assert_close(moved.attribution(0), plain.attribution(0))
    gaussian = replace(posterior, weight_mean=posterior.weight_mean + vector[0, 0, :, :-1])
    torch.testing.assert_close(CamPosterior(maps, gaussian).mean, CamPosterior(maps, posterior).mean)


def test_the_prior_precision_of_the_shift_moves_raw_maps_only():
    posterior, _ = make("full")
    looser = replace(posterior, covariance=replace(posterior.covariance, prior_precision=TAU / 100))
    maps = random_maps()
    torch.testing.assert_close(CamPosterior(maps, looser).sd, CamPosterior(maps, posterior).sd)
    raw = CamPosterior(maps, looser, centred=False).sd / CamPosterior(maps, posterior, centred=False).sd
    assert float(raw.min()) > 1.5


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_prior_share_is_what_centring_takes_out(structure):
    posterior, _ = make(structure)
    maps = random_maps()
    raw, centred = CamPosterior(maps, posterior, centred=False), CamPosterior(maps, posterior)
    shift = maps.square().sum(1, keepdim=True) / (K * TAU)
    torch.testing.assert_close(raw.prior_share(), (shift / raw.sd.square()))
    torch.testing.assert_close(raw.prior_share(), 1 - centred.sd.square() / raw.sd.square())
    assert "only prior" in repr(raw)
    assert "only prior" not in repr(centred)


def test_permuting_classes_permutes_maps():
    posterior, _ = make("full")
    order = torch.tensor([2, 0, 3, 1])
    draws = posterior.sample(50, seed=0)
    permuted = Draws(draws.weight[:, :, order], draws.bias[:, :, order])
    maps = random_maps()
    torch.testing.assert_close(CamPosterior(maps, permuted).mean, CamPosterior(maps, draws).mean[:, order])
    torch.testing.assert_close(CamPosterior(maps, permuted).sd, CamPosterior(maps, draws).sd[:, order])
    diag, _ = make("diag")
    moved = replace(
        diag,
        weight_mean=diag.weight_mean[order],
        bias_mean=diag.bias_mean[order],
        covariance=replace(diag.covariance, precision=diag.covariance.precision[order]),
    )
    torch.testing.assert_close(CamPosterior(maps, moved).sd, CamPosterior(maps, diag).sd[:, order])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_batch_of_one_and_of_many_give_the_same(structure, monkeypatch):
    posterior, _ = make(structure)
    maps = random_maps(5)
    whole = CamPosterior(maps, posterior)
    monkeypatch.setattr("bayescam.explain.cam._CHUNK", 2 * maps[0].numel())
    chunked = CamPosterior(maps, posterior)
    single = CamPosterior(maps[3:4], posterior)
    for name in ("mean", "sd"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name))
        torch.testing.assert_close(getattr(single, name), getattr(whole, name)[3:4])
    torch.testing.assert_close(chunked.attribution(1), whole.attribution(1))
    torch.testing.assert_close(whole.select([3]).sd, single.sd)


def test_draws_are_worked_through_in_bounded_pieces(monkeypatch):
    posterior, _ = make("full")
    draws, maps = posterior.sample(40, seed=0), random_maps(5)
    whole = CamPosterior(maps, draws).quantile(0.3)
    monkeypatch.setattr("bayescam.explain.forms._NUMBERS", 100)
    torch.testing.assert_close(CamPosterior(maps, draws).quantile(0.3), whole)
    torch.testing.assert_close(CamPosterior(maps, draws).sd, CamPosterior(maps, draws.centred()).sd)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_float32_maps_give_float32_close_to_float64(structure):
    posterior, _ = make(structure)
    maps = random_maps()
    quick, exact = CamPosterior(maps.float(), posterior), CamPosterior(maps, posterior)
    assert quick.mean.dtype == quick.sd.dtype == quick.attribution(0).dtype == torch.float32
    assert CamPosterior(maps.half(), posterior).mean.dtype == torch.float32
    torch.testing.assert_close(quick.sd.double(), exact.sd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quick.exceedance(0.2).double(), exact.exceedance(0.2), rtol=1e-4, atol=1e-5)


def test_a_dead_cell_is_exactly_zero():
    posterior, _ = make("full")
    maps = random_maps()
    maps[0, :, 1, 2] = 0
    for source in (posterior, posterior.sample(20, seed=0)):
        cam = CamPosterior(maps, source)
        assert float(cam.mean[0, :, 1, 2].abs().max()) == float(cam.sd[0, :, 1, 2].max()) == 0
        assert float(cam.exceedance(0.0)[0, :, 1, 2].max()) == 0
        assert float(cam.exceedance(-1.0)[0, :, 1, 2].min()) == 1
        assert bool(torch.isfinite(cam.quantile(0.9)).all())
        assert bool(torch.isfinite(cam.prior_share()).all())


def test_no_images_give_no_maps():
    posterior, _ = make("full")
    cam = CamPosterior(random_maps(0), posterior)
    assert cam.mean.shape == cam.sd.shape == (0, K, 2, 3)
    assert cam.outranks(REGION_A, REGION_B, 0).shape == (0,)


@pytest.mark.parametrize(
    ("maps", "error", "words"),
    [
        (torch.zeros(2, D + 1, 2, 2), ValueError, "D = 7 features and the posterior 6"),
        (torch.zeros(2, D, 4), ValueError, r"\(N, D, h, w\)"),
        (torch.zeros(2, D, 0, 2), ValueError, "smaller than the network's stride"),
        (torch.zeros(2, D, 2, 2, dtype=torch.int64), TypeError, "floating-point"),
        (torch.full((2, D, 2, 2), math.nan), ValueError, "image 0 hold NaN"),
    ],
)
def test_wrong_maps_are_refused_in_words(maps, error, words):
    posterior, _ = make("diag")
    with pytest.raises(error, match=words):
        CamPosterior(maps, posterior)


def test_wrong_arguments_are_refused_in_words():
    posterior, _ = make("diag")
    cam = CamPosterior(random_maps(), posterior)
    with pytest.raises(ValueError, match="label is 4; the posterior has classes 0 to 3"):
        cam.attribution(K)
    for label in ("hand", None, 1.5, True):
        with pytest.raises(ValueError, match="label must be a whole number"):
            cam.attribution(label)
    with pytest.raises(TypeError, match=r"d must be a whole number, got 1\.5"):
        cam.contrast(0, 1.5)
    for statement in (cam.exceedance, cam.relevance, lambda t: joint_exceedance(cam, 0, t=t)):
        with pytest.raises(ValueError, match="t is nan"):
            statement(math.nan)
    with pytest.raises(ValueError, match="c is -1"):
        cam.contrast(-1, 0)
    with pytest.raises(ValueError, match="one an image"):
        cam.attribution([0, 1])
    with pytest.raises(ValueError, match="region_b is empty in image 0"):
        cam.outranks(REGION_A, torch.zeros(2, 3, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match="the same in image 0"):
        cam.outranks(REGION_A, REGION_A, 0)
    with pytest.raises(TypeError, match="region_a must be boolean"):
        cam.outranks(REGION_A.float(), REGION_B, 0)
    with pytest.raises(ValueError, match=r"region_a must be \(2, 3\)"):
        cam.outranks(torch.ones(7, 7, dtype=torch.bool), REGION_B, 0)
    with pytest.raises(ValueError, match="q is 1"):
        cam.quantile(1.0)
    with pytest.raises(ValueError, match="t is -1"):
        cam.relevance(-1.0)
    with pytest.raises(TypeError, match="Laplace or Draws"):
        CamPosterior(random_maps(), "laplace")
    with pytest.raises(ValueError, match="1 draw"):
        CamPosterior(random_maps(), posterior.sample(1, seed=0))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_results_stay_on_the_maps_device(structure):
    posterior, _ = make(structure)
    maps = random_maps()
    there, here = CamPosterior(maps.cuda(), posterior), CamPosterior(maps, posterior)
    for name in ("mean", "sd"):
        assert getattr(there, name).is_cuda
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name))
    torch.testing.assert_close(there.outranks(REGION_A, REGION_B, 1).cpu(), here.outranks(REGION_A, REGION_B, 1))
    torch.testing.assert_close(there.attribution(1).cpu(), here.attribution(1))


@pytest.mark.parametrize(("structure", "centred"), ALL)
def test_relative_is_the_map_less_its_own_mean(structure, centred):
    posterior, dense = make(structure)
    maps = random_maps()
    cam = CamPosterior(maps, posterior, centred=centred)
    relative = cam.relative()
    torch.testing.assert_close(relative.mean, cam.mean - cam.mean.mean((2, 3), keepdim=True))
    less = torch.eye(6, dtype=torch.float64) - 1 / 6  # of the cells, 2 x 3
    for c, direction in enumerate(_directions(centred)):
        covariance = less @ (_cells(maps) @ block(dense, direction) @ _cells(maps).mT) @ less
        sd = covariance.diagonal(dim1=1, dim2=2).sqrt()
        torch.testing.assert_close(relative.sd[:, c].flatten(1), sd, rtol=1e-9, atol=1e-12)
        above = torch.special.ndtr(relative.mean[:, c].flatten(1) / sd)
        torch.testing.assert_close(relative.exceedance(0.0)[:, c].flatten(1), above, rtol=1e-9, atol=1e-12)


def test_relative_leaves_a_flat_map_flat():
    flat = torch.rand(2, D, 1, 1, dtype=torch.float64).expand(2, D, 5, 7)
    flat = flat * (1 + 1e-9 * torch.rand(2, D, 5, 7, dtype=torch.float64))
    relative = CamPosterior(flat, make("full")[0]).relative()
    for values in (relative.mean, relative.sd, relative.exceedance(0.0)):
        assert not values.any()
