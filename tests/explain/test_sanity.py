"""What an error bar on a map must do: shrink with data, be the prior without, grow off the data, follow the labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayescam.backbone.network import Backbone
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.data.pixels import Pixels
from bayescam.explain.cam import CamPosterior
from bayescam.posterior.laplace import fit_laplace

K, D, TAU = 3, 5, 1.0


def _data(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(num, D, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(D, K, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    probabilities = torch.softmax(features @ teacher, dim=1)
    return features, torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _maps() -> torch.Tensor:
    return torch.rand(2, D, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_sd_shrinks_as_data_grow(structure):
    fits = [fit_laplace(*_data(n), num_classes=K, prior_precision=TAU, structure=structure) for n in (50, 500, 5000)]
    sds = [CamPosterior(_maps(), fit).sd for fit in fits]
    assert bool((sds[1] < sds[0]).all())
    assert bool((sds[2] < sds[1]).all())


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_four_times_the_same_data_and_prior_halve_the_sd(structure):
    features, labels = _data(60)
    once = fit_laplace(features, labels, num_classes=K, prior_precision=TAU, structure=structure)
    again = fit_laplace(
        features.repeat(4, 1), labels.repeat(4), num_classes=K, prior_precision=4 * TAU, structure=structure
    )
    one, four = CamPosterior(_maps(), once), CamPosterior(_maps(), again)
    torch.testing.assert_close(four.mean, one.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(four.sd, one.sd / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_without_evidence_the_sd_is_the_priors(structure):
    """Var of a centred cell under the prior: |A(u)|^2 (1 - 1/K) / tau; one faint image hardly moves it."""
    fit = fit_laplace(
        torch.full((1, D), 1e-6, dtype=torch.float64),
        torch.tensor([0]),
        num_classes=K,
        prior_precision=TAU,
        structure=structure,
    )
    maps = _maps()
    expected = (maps.square().sum(1, keepdim=True) * (1 - 1 / K) / TAU).sqrt().expand(-1, K, -1, -1)
    torch.testing.assert_close(CamPosterior(maps, fit).sd, expected, rtol=1e-6, atol=1e-6)


def test_the_sd_grows_in_directions_that_training_never_saw():
    features, labels = _data(2000)
    features[:, -1] = 0
    fit = fit_laplace(features, labels, num_classes=K, prior_precision=TAU)
    seen, unseen = torch.zeros(2, 1, D, 1, 1, dtype=torch.float64)
    seen[0, 0], unseen[0, -1] = 1, 1
    inside, outside = CamPosterior(seen, fit).sd, CamPosterior(unseen, fit).sd
    assert float(inside.max()) < 0.4 * float(outside.min())
    torch.testing.assert_close(outside, torch.full_like(outside, ((1 - 1 / K) / TAU) ** 0.5), rtol=1e-6, atol=0)


def test_shuffled_labels_take_the_map_away_and_its_sureness_with_it():
    features, labels = _data(2000)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(2))
    true = CamPosterior(_maps(), fit_laplace(features, labels, num_classes=K, prior_precision=TAU))
    false = CamPosterior(_maps(), fit_laplace(features, labels[order], num_classes=K, prior_precision=TAU))
    assert float((false.mean.abs() / false.sd).mean()) < 0.4 * float((true.mean.abs() / true.sd).mean())
    assert float((false.mean / false.sd).abs().mean()) < 2


@pytest.mark.slow
def test_randomised_weights_take_the_map_away():
    """Adebayo et al. 2018, first test: the network's layers drawn anew, the last layer fitted to them again."""
    pictures, labels = _blobs(160)
    trained, random = (_explained(_network(epochs), pictures, labels) for epochs in (6, 0))
    masks = (pictures[:40, 0] > 0.5).float()
    cells = torch.nn.functional.adaptive_avg_pool2d(masks[:, None], trained.shape)[:, 0].flatten(1).double()
    found = [_alike(cam.mean[torch.arange(40), labels[:40]].flatten(1), cells) for cam in (trained, random)]
    assert float(found[0]) > 0.5
    assert float(found[1]) < 0.5 * float(found[0])


@pytest.mark.slow
def test_pictures_unlike_any_in_training_have_wider_maps():
    pictures, labels = _blobs(160)
    backbone = _network(6)
    seen = _explained(backbone, pictures, labels)
    checks = (torch.arange(64) // 4 + torch.arange(64)[:, None] // 4) % 2 * torch.ones(40, 1, 1, 1)
    for strange in (torch.rand(40, 1, 64, 64), 1 - pictures[:40], checks):
        cam = CamPosterior(_maps_of(backbone, strange, pictures), seen.posterior)
        assert float(cam.sd.median()) > 2 * float(seen.sd.median())


def _blobs(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright disc (class 0), an upright (1) or a lying bar (2) somewhere in noise: (num, 1, 64, 64) and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % K
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    centre = 14 + 36 * torch.rand(num, 2, 1, 1, generator=generator)
    dy, dx = (y - centre[:, 0]).abs(), (x - centre[:, 1]).abs()
    shapes = torch.stack([dy**2 + dx**2 < 49, (dy < 12) & (dx < 3), (dy < 3) & (dx < 12)], 1)
    shown = shapes[torch.arange(num), labels].float()
    return (0.6 * shown + 0.4 * torch.rand(num, 64, 64, generator=generator))[:, None], labels


def _network(epochs: int) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone("small", K, image_size=64)
    pictures, labels = _blobs(160)
    pixels = Pixels((pictures[:, 0] * 65535).numpy().astype(np.uint16), ())
    settings = TrainingSettings(epochs=epochs, batch_size=16, augment=False)
    everything = {"train": np.arange(160), "valid": np.arange(0)}
    train_backbone(backbone, pixels, labels.numpy(), **everything, settings=settings, seed=0, progress=False)
    return backbone


def _maps_of(backbone: Backbone, pictures: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Feature maps, in units of the root mean square of the features of the pictures ``scale``."""
    with backbone.evaluating():
        size = backbone.maps(scale).mean((2, 3)).square().mean().sqrt()
        return (backbone.maps(pictures) / size).double()


def _explained(backbone: Backbone, pictures: torch.Tensor, labels: torch.Tensor) -> CamPosterior:
    """The maps of the first 40 pictures, the last layer fitted on all."""
    maps = _maps_of(backbone, pictures, pictures)
    return CamPosterior(maps[:40], fit_laplace(maps.mean((2, 3)), labels, num_classes=K, prior_precision=TAU))


def _alike(maps: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean correlation over images."""
    deviations = [values - values.mean(1, keepdim=True) for values in (maps, truth)]
    return torch.nn.functional.cosine_similarity(*deviations, dim=1).mean()
