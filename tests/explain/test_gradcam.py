"""Effective maps against autograd's textbook Grad-CAM and HiResCAM, and in the networks that people use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayescam.backbone.network import Backbone
from bayescam.errors import BayescamError
from bayescam.explain.cam import CamPosterior
from bayescam.explain.gradcam import completeness_gap, effective_maps, explanation_maps

from .posteriors import make

CHANNELS, D, K, SIZE = 3, 6, 4, (2, 3)


def _tail(*, bias: bool = True, smooth: bool = True) -> nn.Sequential:
    act = nn.Tanh() if smooth else nn.ReLU()
    layers = [nn.Flatten(), nn.Linear(CHANNELS * 6, 8, bias=bias), act, nn.Dropout(0.5), nn.Linear(8, D, bias=bias)]
    return nn.Sequential(*layers, nn.ReLU()).double().eval()


def _maps(num: int = 4) -> Tensor:
    return torch.rand(num, CHANNELS, *SIZE, dtype=torch.float64)


def _gradients(pool: nn.Module, maps: Tensor, weight: Tensor, label: int) -> Tensor:
    leaf = maps.clone().requires_grad_()
    (pool(leaf) @ weight[label]).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_maps_are_the_textbooks_times_the_number_of_cells(method):
    """Grad-CAM: sum_k (mean gradient_k) A_k, before ReLU; HiResCAM: sum_k gradient_k A_k; here by reverse mode."""
    pool, maps, posterior = _tail(), _maps(), make("full")[0]
    found = CamPosterior(effective_maps(pool, maps, method=method), posterior, centred=False).mean
    for label in range(K):
        gradient = _gradients(pool, maps, posterior.weight_mean, label)
        weights = gradient.mean((2, 3), keepdim=True) if method == "gradcam" else gradient
        torch.testing.assert_close(found[:, label], 6 * (weights * maps).sum(1))


def test_contrasts_and_spread_are_those_of_each_drawn_network():
    """The posterior of the map is the spread of Grad-CAMs of networks with their heads drawn from the posterior."""
    pool, maps, posterior = _tail(), _maps(2), make("kron")[0]
    draws = posterior.sample(300, seed=0)
    cam = CamPosterior(effective_maps(pool, maps), draws, centred=False)
    each = torch.stack(
        [(6 * _gradients(pool, maps, weight, 1).mean((2, 3), keepdim=True) * maps).sum(1) for weight in draws.weight[0]]
    )
    torch.testing.assert_close(cam.mean[:, 1], each.mean(0))
    torch.testing.assert_close(cam.sd[:, 1], each.std(0))


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_after_global_average_pooling_they_are_the_maps_themselves(method):
    maps = _maps()
    torch.testing.assert_close(effective_maps(lambda a: a.mean((2, 3)), maps, method=method), maps)


def test_hirescam_is_complete_for_piecewise_linear_tails_without_biases_and_not_in_general():
    maps = _maps()
    plain = _tail(bias=False, smooth=False)
    hires = effective_maps(plain, maps, method="hirescam")
    assert float(completeness_gap(plain, maps, hires).max()) < 1e-12
    posterior = make("full")[0]
    cam = CamPosterior(hires, posterior, centred=False)
    logits = plain(maps) @ posterior.weight_mean.T + posterior.bias_mean
    torch.testing.assert_close(cam.mean.mean((2, 3)) + posterior.bias_mean, logits)
    biased = _tail()
    assert float(completeness_gap(biased, maps, effective_maps(biased, maps, method="hirescam")).min()) > 1e-3


def test_pieces_of_any_size_give_the_same(monkeypatch):
    pool, maps = _tail(), _maps(5)
    whole = effective_maps(pool, maps)
    monkeypatch.setattr("bayescam.explain.gradcam._NUMBERS", 40)
    torch.testing.assert_close(effective_maps(pool, maps), whole)
    torch.testing.assert_close(effective_maps(pool, maps[2:3]), whole[2:3])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small", 64),
        ("resnet18", 64),
        ("mobilenet_v3_small", 64),
        pytest.param("densenet121", 64, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 64, marks=pytest.mark.slow),
        pytest.param("study", 224, marks=pytest.mark.slow),
        pytest.param("alexnet", 96, marks=pytest.mark.slow),
        pytest.param("vgg11", 64, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_networks_people_use_give_maps_and_stay_as_they_were(name, size):
    backbone = Backbone(name, K, image_size=size).train()
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.rand(2, 1, size, size)
    found = explanation_maps(backbone, images)
    assert found.shape[:2] == (2, backbone.num_features)
    assert bool(torch.isfinite(found).all())
    assert all(module.training for module in backbone.net.modules())
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    with backbone.evaluating():
        maps = backbone.maps(images)
        if backbone.is_average:
            torch.testing.assert_close(found, maps)
            logits = backbone.head(found.mean((2, 3)))
            torch.testing.assert_close(logits, backbone(images), rtol=1e-3, atol=1e-4)
        else:
            gradient = torch.func.jacrev(lambda a: backbone.head(backbone.pool(a))[0, 1])(maps[:1])
            hires = explanation_maps(backbone, images[:1], method="hirescam")
            for effective, weights in ((found[:1], gradient.mean((2, 3), keepdim=True)), (hires, gradient)):
                expected = (weights * maps[:1]).sum(1) * maps[0, 0].numel()
                cam = torch.einsum("d,ndij->nij", backbone.head.weight[1], effective)
                torch.testing.assert_close(cam, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_users_own_network():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 5, 3, stride=2)
            self.middle = nn.Linear(5 * 9, 7)
            self.last = nn.Linear(7, K)

        def forward(self, x):
            return self.last(torch.relu(self.middle(torch.flatten(torch.relu(self.conv(x)), 1))))

    backbone = Backbone.from_module(Own(), maps="conv", image_size=8)
    assert explanation_maps(backbone, torch.rand(3, 1, 8, 8)).shape == (3, 7, 3, 3)


def test_wrong_input_is_refused_in_words():
    backbone = Backbone("resnet18", K, image_size=64)
    with pytest.raises(ValueError, match="choose 'gradcam' or 'hirescam'"):
        explanation_maps(backbone, torch.rand(1, 1, 64, 64), method="scorecam")
    with pytest.raises(BayescamError, match="NaN"):
        explanation_maps(backbone, torch.full((1, 1, 64, 64), torch.nan))
    with pytest.raises(BayescamError, match="too small"):
        explanation_maps(Backbone("alexnet", K), torch.rand(1, 1, 16, 16))
    with pytest.raises(BayescamError, match="one cell of its map stands for 32 x 32 pixels"):
        explanation_maps(backbone, torch.rand(1, 1, 31, 40))
    with pytest.raises(ValueError, match=r"images must be \(N, 1, S, S\), got \(1, 3, 64, 64\)"):
        explanation_maps(backbone, torch.rand(1, 3, 64, 64))
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        explanation_maps(backbone, torch.zeros(1, 1, 64, 64, dtype=torch.uint8))
