"""One suite over every kind of class activation map: every posterior, raw and centred, CAM and effective maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayescam.explain.cam import CamPosterior
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts

K, D = 3, 4
POSTERIORS = ("diag", "kron", "full", "refined", "nuts")
each_posterior = pytest.mark.parametrize("name", POSTERIORS)
each_kind = pytest.mark.parametrize("centred", [True, False], ids=["centred", "raw"])


def _features(k=K, d=D, n=60):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % k
    return rng.normal(size=(n, d)) + 1.5 * rng.normal(size=(k, d))[labels], labels


def _posterior(name, k=K, d=D):
    features, labels = _features(k, d)
    structure = name if name in ("diag", "kron") else "full"
    laplace = fit_laplace(features, labels, num_classes=k, prior_precision=1.0, structure=structure)
    if name == "refined":
        return laplace.refine(features, labels)
    if name == "nuts":
        lengths = {"num_chains": 2, "num_samples": 20, "num_warmup": 20}
        return sample_nuts(laplace, features, labels, **lengths, progress=False).draws
    return laplace


@pytest.fixture(scope="module")
def posteriors():
    return {name: _posterior(name) for name in POSTERIORS}


def _maps(n=5, d=D, h=3, w=4, seed=0, dtype=torch.float64):
    return torch.randn(n, d, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _answers(maps, posterior, centred=True) -> dict[str, torch.Tensor]:
    """Everything a CAM posterior is asked for, image by image."""
    cam = CamPosterior(maps, posterior, centred=centred)
    region = torch.zeros(cam.shape, dtype=torch.bool)
    region[0] = True
    answers = {
        "mean": cam.mean,
        "sd": cam.sd,
        "low": cam.quantile(0.05),
        "high": cam.quantile(0.95),
        "exceedance": cam.exceedance(0.1),
    }
    answers["contrast"], answers["contrast_sd"] = cam.contrast(0, cam.num_classes - 1)
    if cam.shape[0] > 1:
        answers["outranks"] = cam.outranks(region, ~region, 1)
    return answers


def _assert_same(found, wanted, rows=slice(None), **tolerance):
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key][rows], msg=key, **tolerance)


@each_posterior
@each_kind
@pytest.mark.parametrize(
    ("n", "d", "h", "w", "k"), [(5, 4, 3, 4, 3), (1, 4, 1, 1, 3), (2, 1, 2, 2, 3), (2, 4, 2, 2, 2)]
)
def test_one_image_one_cell_one_feature_two_classes(name, centred, n, d, h, w, k):
    answers = _answers(_maps(n, d, h, w), _posterior(name, k, d), centred)
    for key, value in answers.items():
        assert len(value) == n, key
        assert bool(torch.isfinite(value).all()), key
    assert answers["mean"].shape == answers["sd"].shape == (n, k, h, w)
    assert bool((answers["sd"] >= 0).all())
    assert bool((answers["low"] <= answers["high"]).all())
    assert 0 <= float(answers["exceedance"].min()) <= float(answers["exceedance"].max()) <= 1


@each_posterior
@each_kind
def test_order_and_company_of_the_images_do_not_matter(posteriors, name, centred):
    maps = _maps(9)
    whole = _answers(maps, posteriors[name], centred)
    order = torch.tensor([8, 1, 0, 3, 2, 7, 6, 5, 4])
    _assert_same(_answers(maps[order], posteriors[name], centred), whole, order, rtol=1e-9, atol=1e-10)
    _assert_same(_answers(maps[3:4], posteriors[name], centred), whole, slice(3, 4), rtol=1e-9, atol=1e-10)
    chosen = CamPosterior(maps, posteriors[name], centred=centred).select([3])
    torch.testing.assert_close(chosen.mean, whole["mean"][3:4])


@each_posterior
@each_kind
def test_strided_maps_are_as_good_and_nothing_given_is_changed(posteriors, name, centred):
    maps = _maps()
    before = maps.clone()
    whole = _answers(maps, posteriors[name], centred)
    strided = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    _assert_same(_answers(strided, posteriors[name], centred), whole, rtol=1e-9, atol=1e-10)
    _assert_same(_answers(maps.requires_grad_(), posteriors[name], centred), whole)
    assert torch.equal(maps.detach(), before)
    assert maps.grad is None


@each_posterior
@each_kind
def test_float32_and_float64_agree_and_half_is_computed_in_float32(posteriors, name, centred):
    whole = _answers(_maps(), posteriors[name], centred)
    single = _answers(_maps(dtype=torch.float32), posteriors[name], centred)
    half = _answers(_maps(dtype=torch.float16), posteriors[name], centred)
    for key in ("mean", "sd", "low", "contrast"):
        torch.testing.assert_close(single[key].double(), whole[key], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(half[key].double(), whole[key], rtol=1e-2, atol=1e-2)


@each_posterior
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_its_image(posteriors, name, value):
    maps = _maps()
    maps[2, 1, 0, 0] = value
    with pytest.raises(ValueError, match="maps of image 2"):
        CamPosterior(maps, posteriors[name])


@each_posterior
@pytest.mark.parametrize(
    ("maps", "error"),
    [
        (None, TypeError),
        ([[1.0]], TypeError),
        (torch.zeros(2, D, 2, 2, dtype=torch.int64), TypeError),
        (torch.zeros(2, D, 2, 2, dtype=torch.complex64), TypeError),
        (torch.zeros(2, D, 2), ValueError),
        (torch.zeros(2, D, 0, 2), ValueError),
        (torch.zeros(2, D + 1, 2, 2), ValueError),
    ],
)
def test_what_are_no_maps_is_refused_by_name(posteriors, name, maps, error):
    with pytest.raises(error, match="maps"):
        CamPosterior(maps, posteriors[name])


@pytest.mark.parametrize("posterior", [None, "full", torch.zeros(3, 4)])
def test_what_is_no_posterior_is_refused_by_name(posterior):
    with pytest.raises(TypeError, match="posterior"):
        CamPosterior(_maps(), posterior)


@each_posterior
@each_kind
def test_a_black_map_is_certainly_nothing(posteriors, name, centred):
    cam = CamPosterior(torch.zeros(2, D, 2, 2, dtype=torch.float64), posteriors[name], centred=centred)
    assert float(cam.mean.abs().max()) == float(cam.sd.max()) == float(cam.exceedance(0.0).max()) == 0


@each_posterior
def test_no_image_no_map(posteriors, name):
    assert CamPosterior(_maps()[:0], posteriors[name]).mean.shape == (0, K, 3, 4)


@each_posterior
def test_the_average_over_the_cells_and_the_bias_is_the_logit(posteriors, name):
    """Raw maps: mean_u CAM_c(u) + b_c = logit_c (Zhou et al. 2016)."""
    maps, posterior = _maps(), posteriors[name]
    if name == "nuts":
        weight, bias = (part.mean(0) for part in posterior.flat())
    else:
        weight, bias = posterior.weight_mean, posterior.bias_mean
    cam = CamPosterior(maps, posterior, centred=False)
    torch.testing.assert_close(cam.mean.mean((2, 3)) + bias, maps.mean((2, 3)) @ weight.T + bias)
