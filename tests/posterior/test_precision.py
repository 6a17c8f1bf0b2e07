"""Where float32 products, a loose end of the descent or one hill of the evidence would be silently wrong."""

from __future__ import annotations

import math

import pytest
import torch

import bayescam as bc
from bayescam.errors import ConvergenceError
from bayescam.posterior.evidence import maximise

from .test_memory import Largest


def collinear(scale: float, num_images: int = 2000, width: int = 32, rank: int = 6):
    """float32 features of a lower rank than their number, and noisy labels of four classes."""
    hidden = torch.randn(num_images, rank) @ torch.randn(rank, width) / rank**0.5
    noise = torch.distributions.Gumbel(0.0, 1.0).sample((num_images, 4))
    return scale * hidden, (hidden[:, :4] + noise).argmax(1)


def agree(features, labels, **options):
    narrow = bc.fit_laplace(features, labels, **options)
    wide = bc.fit_laplace(features.double(), labels, **options)
    torch.testing.assert_close(narrow.weight_sd, wide.weight_sd, rtol=5e-3, atol=0)
    torch.testing.assert_close(narrow.bias_sd, wide.bias_sd, rtol=5e-3, atol=0)
    assert narrow.log_evidence == pytest.approx(wide.log_evidence, abs=0.05)
    assert max(narrow.newton_decrement, wide.newton_decrement) < 1e-3
    return narrow, wide


@pytest.mark.parametrize(
    ("structure", "scale", "tau"),
    [("full", 1.0, 1e-3), ("full", 30.0, 0.5), ("kron", 1.0, 1e-4), ("kron", 100.0, 1e-4), ("diag", 30.0, 1e-3)],
)
def test_collinear_features_under_a_weak_prior(structure, scale, tau):
    agree(*collinear(scale), prior_precision=tau, structure=structure)


@pytest.mark.parametrize("offset", [1e3, 3e3, 1e4])
def test_features_far_from_nought(offset):
    agree(torch.randn(60, 3) + offset, torch.randint(0, 3, (60,)), prior_precision=1.0)


def test_short_rows_beside_long_ones():
    """The Laplace posterior and the refined one, whose Hessian leaves rows out too."""
    features = torch.zeros(1500, 2)
    features[:1000, 0], features[1000:, 1] = 1000 * torch.rand(1000), 1.0
    labels = torch.zeros(1500, dtype=torch.int64)
    labels[:1000] = torch.randint(0, 2, (1000,))
    labels[1000:1003] = 1
    narrow, wide = agree(features, labels, prior_precision=0.1)
    refined = narrow.refine(features, labels).elbo, wide.refine(features.double(), labels).elbo
    assert refined[0] == pytest.approx(refined[1], abs=0.05)


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_separable_labels_under_a_weak_prior(structure, scale):
    """The end of the descent is known in logits too: there a thousandth of a posterior sd can be many."""
    generator = torch.Generator().manual_seed(20)
    features = scale * torch.randn(397, 5, generator=generator)
    labels = (features @ torch.randn(5, 7, generator=generator)).argmax(1)
    agree(features, labels, prior_precision=0.1, structure=structure)


def test_what_cannot_be_found_says_so(monkeypatch):
    monkeypatch.setattr("bayescam.posterior.map.NEWTON_STEPS", 1)
    with pytest.raises(ConvergenceError, match=r"Newton decrement is .* posterior sds.*raise prior_precision"):
        bc.fit_laplace(torch.randn(60, 3), torch.arange(60) % 3, prior_precision=1e-3)


def test_logits_that_no_digit_settles_are_refused():
    """Separable features of a hundred million under a weak prior: the logits' posterior sd is as large."""
    features = 1e8 * torch.randn(60, 3)
    with pytest.raises(ConvergenceError, match=r"MAP cannot be found: .*; standardise the features"):
        bc.fit_laplace(features, (features @ torch.randn(3, 3)).argmax(1), prior_precision=0.1)


def hills(tau):
    """Two maxima in log10 tau: 3 at -2, 5 at 3.3."""
    x = math.log10(tau)
    return max(3 - 4 * (x + 2) ** 2, 5 - 4 * (x - 3.3) ** 2)


def test_the_higher_of_two_maxima_is_found_and_the_other_named():
    choice = maximise(hills)
    assert math.log10(choice.prior_precision) == pytest.approx(3.3, abs=0.02)
    assert choice.hit is None
    assert [round(math.log10(tau)) for tau in choice.others] == [-2]
    assert len(choice.tried) <= 20
    assert maximise(lambda tau: -(math.log10(tau) ** 2)).others == ()


@pytest.mark.parametrize(("sign", "end"), [(1, "upper"), (-1, "lower")])
@pytest.mark.parametrize("bracket", [(0.5, 0.6), (1e-4, 1e4), (1.0, 30.0), (1e-300, 1e300)])
def test_the_end_that_was_hit_is_named(sign, end, bracket):
    choice = maximise(lambda tau: sign * math.log(tau), bracket)
    assert choice.hit == end
    assert choice.prior_precision == bracket[sign > 0]


def test_a_tau_that_cannot_be_computed_is_left_out():
    choice = maximise(lambda tau: -math.inf if tau < 0.05 else -(math.log(tau) ** 2))
    assert choice.prior_precision == pytest.approx(1.0, rel=0.05)


def test_evidence_leaves_out_what_float64_cannot_hold_and_says_so():
    features = torch.randn(60, 2, dtype=torch.float64)
    labels = (features[:, 0] > 0).long()
    fit = bc.fit_laplace(torch.cat([features, 1e6 * features], 1), labels, bracket=(1e-9, 1e3))
    assert math.isfinite(fit.log_evidence)
    assert any(note.startswith("left out of the search") for note in fit.notes)


def test_no_matrix_over_pairs_of_pairs_of_classes():
    """Memory beside the Hessian: K = 60 has 1,770 pairs, whose coefficients once took 1,770 x 1,770 numbers."""
    features, labels = torch.randn(60, 3), torch.arange(60)
    with Largest() as largest:
        bc.fit_laplace(features, labels, prior_precision=10.0)
    assert largest.numbers < 1770**2 // 8
