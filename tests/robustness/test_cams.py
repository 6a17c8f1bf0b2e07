"""One suite over every kind of class activation map: every posterior, raw and centred, CAM and effective maps."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bayescam.backbone.network import Backbone
from bayescam.errors import BayescamError
from bayescam.explain.cam import CamPosterior
from bayescam.explain.gradcam import explanation_maps
from bayescam.posterior.laplace import fit_laplace, load_laplace
from bayescam.posterior.nuts import Nuts, sample_nuts

K, D = 3, 4
SLOW = tuple(pytest.param(name, marks=pytest.mark.slow) for name in ("refined_diag", "refined_kron"))
GAUSSIANS = ("diag", "kron", "full", "refined", *SLOW)
each_posterior = pytest.mark.parametrize("name", [*GAUSSIANS, "draws", "nuts"])
each_kind = pytest.mark.parametrize("centred", [True, False], ids=["centred", "raw"])


def _features(k=K, d=D, n=60):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % k
    return rng.normal(size=(n, d)) + 1.5 * rng.normal(size=(k, d))[labels], labels


@functools.cache
def _posterior(name, k=K, d=D):
    features, labels = _features(k, d)
    structure = {"refined": "full", "draws": "full", "nuts": "full"}.get(name, name.removeprefix("refined_"))
    laplace = fit_laplace(features, labels, num_classes=k, prior_precision=1.0, structure=structure)
    if name.startswith("refined"):
        return laplace.refine(features, labels)
    if name == "draws":
        return laplace.sample(40, seed=5)
    if name == "nuts":
        lengths = {"num_chains": 2, "num_samples": 20, "num_warmup": 20}
        return sample_nuts(laplace, features, labels, **lengths, progress=False).draws
    return laplace


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
def test_order_and_company_of_the_images_do_not_matter(name, centred):
    maps = _maps(9)
    whole = _answers(maps, _posterior(name), centred)
    order = torch.tensor([8, 1, 0, 3, 2, 7, 6, 5, 4])
    _assert_same(_answers(maps[order], _posterior(name), centred), whole, order, rtol=1e-9, atol=1e-10)
    _assert_same(_answers(maps[3:4], _posterior(name), centred), whole, slice(3, 4), rtol=1e-9, atol=1e-10)
    chosen = CamPosterior(maps, _posterior(name), centred=centred).select([3])
    torch.testing.assert_close(chosen.mean, whole["mean"][3:4])


@each_posterior
@each_kind
def test_strided_maps_are_as_good_and_nothing_given_is_changed(name, centred):
    maps = _maps()
    before = maps.clone()
    whole = _answers(maps, _posterior(name), centred)
    strided = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    _assert_same(_answers(strided, _posterior(name), centred), whole, rtol=1e-9, atol=1e-10)
    array = before.numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings(action="ignore"):  # torch's, that it cannot keep such a promise
        frozen = torch.from_numpy(array)
    _assert_same(_answers(frozen, _posterior(name), centred), whole, rtol=0, atol=0)
    assert torch.equal(torch.from_numpy(array.copy()), before)
    _assert_same(_answers(maps.requires_grad_(), _posterior(name), centred), whole)
    assert torch.equal(maps.detach(), before)
    assert maps.grad is None


@each_posterior
@each_kind
def test_float32_and_float64_agree_and_half_is_computed_in_float32(name, centred):
    whole = _answers(_maps(), _posterior(name), centred)
    single = _answers(_maps(dtype=torch.float32), _posterior(name), centred)
    half = _answers(_maps(dtype=torch.float16), _posterior(name), centred)
    for key in ("mean", "sd", "low", "contrast"):
        torch.testing.assert_close(single[key].double(), whole[key], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(half[key].double(), whole[key], rtol=1e-2, atol=1e-2)


@each_posterior
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_its_image(name, value):
    maps = _maps()
    maps[2, 1, 0, 0] = value
    with pytest.raises(ValueError, match="maps of image 2"):
        CamPosterior(maps, _posterior(name))


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
def test_what_are_no_maps_is_refused_by_name(name, maps, error):
    with pytest.raises(error, match="maps"):
        CamPosterior(maps, _posterior(name))


@pytest.mark.parametrize("posterior", [None, "full", torch.zeros(3, 4)])
def test_what_is_no_posterior_is_refused_by_name(posterior):
    with pytest.raises(TypeError, match="posterior"):
        CamPosterior(_maps(), posterior)


@each_posterior
@each_kind
def test_a_black_map_is_certainly_nothing(name, centred):
    cam = CamPosterior(torch.zeros(2, D, 2, 2, dtype=torch.float64), _posterior(name), centred=centred)
    assert float(cam.mean.abs().max()) == float(cam.sd.max()) == float(cam.exceedance(0.0).max()) == 0


@each_posterior
def test_no_image_no_map(name):
    assert CamPosterior(_maps()[:0], _posterior(name)).mean.shape == (0, K, 3, 4)


@each_posterior
def test_the_average_over_the_cells_and_the_bias_is_the_logit(name):
    """Raw maps: mean_u CAM_c(u) + b_c = logit_c (Zhou et al. 2016)."""
    maps, posterior = _maps(), _posterior(name)
    if name in ("draws", "nuts"):
        weight, bias = (part.mean(0) for part in posterior.flat())
    else:
        weight, bias = posterior.weight_mean, posterior.bias_mean
    cam = CamPosterior(maps, posterior, centred=False)
    torch.testing.assert_close(cam.mean.mean((2, 3)) + bias, maps.mean((2, 3)) @ weight.T + bias)


@each_posterior
@each_kind
def test_asked_twice_it_gives_the_same_bits_and_uses_no_global_random_numbers(name, centred):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = _answers(_maps(), _posterior(name), centred)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    _assert_same(_answers(_maps(), _posterior(name), centred), first, rtol=0, atol=0)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_maps_of_a_stored_posterior_are_the_same(name, tmp_path):
    _posterior(name).save(tmp_path / "laplace.safetensors")
    again = load_laplace(tmp_path / "laplace.safetensors")
    _assert_same(_answers(_maps(), again), _answers(_maps(), _posterior(name)), rtol=0, atol=0)


def test_maps_of_stored_draws_are_the_same(tmp_path):
    features, labels = _features()
    lengths = {"num_chains": 2, "num_samples": 20, "num_warmup": 20}
    nuts = sample_nuts(fit_laplace(features, labels, prior_precision=1.0), features, labels, **lengths, progress=False)
    nuts.save(tmp_path / "nuts.safetensors")
    again = Nuts.load(tmp_path / "nuts.safetensors")
    _assert_same(_answers(_maps(), again.draws), _answers(_maps(), nuts.draws), rtol=0, atol=0)


class _Tail(nn.Module):
    """A network with layers between its maps and the last one, as Grad-CAM is for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, stride=2)
        self.drop = nn.Dropout(0.5)
        self.middle = nn.Linear(5 * 9, D)
        self.last = nn.Linear(D, K)

    def forward(self, images):
        hidden = torch.flatten(torch.relu(self.conv(images)), 1)
        return self.last(torch.relu(self.middle(self.drop(hidden))))


@pytest.fixture(scope="module")
def tail():
    torch.manual_seed(0)
    return Backbone.from_module(_Tail(), maps="conv", image_size=8)


def _images(n=5, dtype=torch.float32):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
class TestEffectiveMaps:
    """Maps of a network whose last layer is not reached by an average: Grad-CAM and HiResCAM."""

    @each_posterior
    def test_order_and_company_of_the_images_do_not_matter(self, tail, method, name):
        images, order = _images(), torch.tensor([4, 1, 0, 3, 2])
        whole = _answers(explanation_maps(tail, images, method=method), _posterior(name))
        turned = _answers(explanation_maps(tail, images[order], method=method), _posterior(name))
        _assert_same(turned, whole, order, rtol=1e-5, atol=1e-6)
        alone = _answers(explanation_maps(tail, images[2:3], method=method), _posterior(name))
        _assert_same(alone, whole, slice(2, 3), rtol=1e-5, atol=1e-6)

    def test_the_network_and_the_images_stay_as_they_were_and_twice_is_once(self, tail, method):
        images, state = _images(), torch.get_rng_state()
        before, weights = images.clone(), {name: value.clone() for name, value in tail.state_dict().items()}
        tail.train()
        first = explanation_maps(tail, images, method=method)
        assert tail.training
        tail.eval()
        assert torch.equal(explanation_maps(tail, images, method=method), first)
        assert not first.requires_grad
        assert torch.equal(images, before)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, weights[name]) for name, value in tail.state_dict().items())
        assert all(parameter.grad is None for parameter in tail.parameters())

    def test_strided_images_and_a_network_in_float64_agree(self, tail, method):
        import copy

        whole = explanation_maps(tail, _images(), method=method)
        strided = _images().repeat_interleave(2, dim=3)[..., ::2]
        assert not strided.is_contiguous()
        torch.testing.assert_close(explanation_maps(tail, strided, method=method), whole, rtol=1e-5, atol=1e-6)
        double = explanation_maps(copy.deepcopy(tail).double(), _images(dtype=torch.float64), method=method)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), whole, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_refused(self, tail, method, value):
        images = _images()
        images[1, 0, 2, 2] = value
        with pytest.raises(BayescamError, match="NaN or infinite"):
            explanation_maps(tail, images, method=method)
