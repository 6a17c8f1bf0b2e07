"""Each corruption does what it says, by how much it says, and nothing to what it must leave alone."""

from __future__ import annotations

import pytest
import torch

from bayescam.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(6, 1, 40, 40, generator=_generator(1))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_seed_gives_the_same_images_in_range_and_leaves_the_given_ones_alone(images, name):
    kept = images.clone()
    first, again = (corrupted(images, name, 3, _generator()) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == images.shape
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(images, kept)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_moves_the_images_farther(name):
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    smooth = (0.8 * torch.exp(-6 * (x**2 + 3 * (y - 0.2) ** 2))).expand(8, 1, 64, 64)
    away = [float((corrupted(smooth, name, s, _generator()) - smooth).abs().mean()) for s in SEVERITIES]
    assert away[0] > 0
    assert away == sorted(away)


def test_blur_keeps_a_constant_image_and_spreads_a_point_by_its_sd():
    flat = torch.full((1, 1, 33, 33), 0.4)
    torch.testing.assert_close(corrupted(flat, "blur", 5, _generator()), flat)
    point = torch.zeros(1, 1, 129, 129)
    point[0, 0, 64, 64] = 1
    spread = corrupted(point, "blur", 4, _generator())[0, 0].double()
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    places = torch.arange(129).double() - 64
    sd = float((spread.sum(0) * places.square()).sum().sqrt())
    assert sd == pytest.approx(0.6 * 4 * 129 / 128, rel=0.03)  # the Gaussian is cut at 3 sds


def test_noise_has_its_sd():
    grey = torch.full((4, 1, 64, 64), 0.5)
    assert float((corrupted(grey, "noise", 2, _generator()) - grey).std()) == pytest.approx(0.08, rel=0.03)


def test_rotation_turns_by_its_angle():
    bar = torch.zeros(1, 1, 101, 101)
    bar[0, 0, 50, 20:81] = 1
    turned = corrupted(bar, "rotation", 3, _generator())[0, 0].double()
    y, x = torch.meshgrid(*[torch.arange(101).double() - 50] * 2, indexing="ij")
    slope = float((turned * x * y).sum() / (turned * x * x).sum())
    assert abs(slope) == pytest.approx(1, rel=0.02)  # tan 45 degrees


def test_exposure_darkens_by_its_power(images):
    torch.testing.assert_close(corrupted(images, "exposure", 2, _generator()), images**1.7)


def test_occlusion_covers_a_square_of_its_side_and_nothing_else(images):
    covered = corrupted(images + 0.01, "occlusion", 3, _generator())
    black = covered == 0
    side = int(40 * 0.36)
    assert black.flatten(1).sum(1).tolist() == [side**2] * len(images)
    rows = black.any(3)[:, 0].sum(1)
    assert rows.tolist() == [side] * len(images)
    assert torch.equal(covered[~black], (images + 0.01).clamp(0, 1)[~black])
    assert len({tuple(one.nonzero()[0].tolist()) for one in black}) > 1, "each image has its own place"


@pytest.mark.parametrize(
    ("name", "severity", "shape", "words"),
    [
        ("fog", 1, (2, 1, 8, 8), "'fog' is unknown; take one of blur"),
        ("blur", 0, (2, 1, 8, 8), "severity must be one of"),
        ("blur", 1, (2, 8, 8), r"images must be \(N, 1, S, S\)"),
    ],
)
def test_what_cannot_be_done_is_refused(name, severity, shape, words):
    with pytest.raises(ValueError, match=words):
        corrupted(torch.zeros(shape), name, severity, _generator())
