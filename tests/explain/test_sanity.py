"""What an error bar on a map must do: shrink with data, be the prior without, grow off the data, follow the labels."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("structure", ["full", "diag"])
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
