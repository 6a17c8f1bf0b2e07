"""Short chains: silent on the truth, loud on a wrong Gaussian, honest when they did not move.

The bounds hold at 95 % over all weights at once; the seeds are fixed, and a false alarm of the first test had a
probability of about .05 when its seed was chosen.
"""

from dataclasses import replace

import pytest
import torch

from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts
from bayescam.posterior.short_chains import short_chains

K, D = 4, 3


def data(n, scale=1.0):
    torch.manual_seed(4)
    features = torch.randn(n, D, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=scale * features @ torch.randn(D, K).double()).sample()
    return features, labels


def test_nearly_gaussian_posterior_shows_no_error():
    features, labels = data(1500)
    laplace = fit_laplace(features, labels, num_classes=K, prior_precision=1.0)
    found = short_chains(laplace, features, labels, num_chains=256, num_transitions=8)
    assert found.reliable
    assert found.mean_error.max() < 0.05
    assert found.sd_error.max() < 0.05
    assert 0.6 < found.acceptance_rate < 0.999
    assert "reliable" in repr(found)


@pytest.mark.slow
def test_wrong_mean_and_wrong_sd_are_found():
    features, labels = data(1500)
    laplace = fit_laplace(features, labels, num_classes=K, prior_precision=1.0)
    step = 2.0 * laplace.weight_sd * torch.tensor([1.0, -1.0, 0.0, 0.0]).double().unsqueeze(1)
    off = replace(laplace, weight_mean=laplace.weight_mean + step)
    assert short_chains(off, features, labels, num_chains=128).mean_error.max() > 0.5
    wide = replace(
        laplace,
        covariance=replace(laplace.covariance, precision_cholesky=laplace.covariance.precision_cholesky / 2),
    )
    found = short_chains(wide, features, labels, num_chains=256)
    assert found.sd_error.min() > 0.3
    assert found.log_sd_ratio.mean() == pytest.approx(-torch.log(torch.tensor(2.0)).item(), abs=0.15)


@pytest.mark.slow
def test_ends_where_nuts_is():
    features, labels = data(60, scale=4.0)
    laplace = fit_laplace(features, labels, num_classes=K, prior_precision=0.1)
    nuts = sample_nuts(laplace, features, labels, num_samples=1000, progress=False).draws.centred()
    found = short_chains(laplace, features, labels, num_chains=1024, num_transitions=25)
    end = found.end.centred()
    sd = nuts.weight.std((0, 1))
    # 1,024 chains: standard errors of 1/32 of an sd for the mean and about 1/45 for the sd; NUTS adds half as much.
    assert ((end.weight.mean((0, 1)) - nuts.weight.mean((0, 1))) / sd).abs().max() < 5 / 28
    assert (end.weight.std((0, 1)) / sd - 1).abs().max() < 5 / 35
    assert found.mean_error.max() > 0


def test_chains_that_cannot_move_are_called_unreliable():
    features, labels = data(200)
    laplace = fit_laplace(features, labels, num_classes=K, prior_precision=1.0)
    narrow = replace(
        laplace,
        covariance=replace(laplace.covariance, precision_cholesky=laplace.covariance.precision_cholesky * 300),
    )
    found = short_chains(narrow, features, labels, num_chains=16, num_transitions=1)
    assert found.start.weight.shape == (1, 16, K, D)
    still = replace(found, correlation=torch.ones(K, D + 1))
    assert not still.reliable
    assert "unreliable" in repr(still)


def test_seed_and_shift():
    features, labels = data(100)
    laplace = fit_laplace(features, labels, num_classes=K, prior_precision=0.5)
    a, b = (short_chains(laplace, features, labels, num_chains=16, num_transitions=2) for _ in range(2))
    assert torch.equal(a.end.weight, b.end.weight)
    torch.testing.assert_close(a.start.weight.mean(2), a.end.weight.mean(2))


def test_wrong_arguments():
    features, labels = data(50)
    laplace = fit_laplace(features, labels, num_classes=K, prior_precision=1.0)
    with pytest.raises(TypeError, match=r"num_transitions must be a whole number, got 2\.5"):
        short_chains(laplace, features, labels, num_transitions=2.5)
    with pytest.raises(ValueError, match="num_chains is 2"):
        short_chains(laplace, features, labels, num_chains=2)
    with pytest.raises(ValueError, match="fitted on 3"):
        short_chains(laplace, features[:, :2], labels)
    diag = fit_laplace(features, labels, num_classes=K, prior_precision=1.0, structure="diag")
    with pytest.raises(ValueError, match="'diag'"):
        short_chains(diag, features, labels)
