"""The weights worth plotting are found, whatever is added to all classes."""

from __future__ import annotations

import numpy as np
import pytest

from bayescam.diagnose.selectors import largest_effect, largest_shift, worst_rhat

C, S, K, D = 4, 200, 3, 5


@pytest.fixture
def draws():
    return np.random.default_rng(0).normal(size=(C, S, K, D))


def _shifted(values, seed=1):
    shape = list(values.shape)
    shape[-2] = 1
    return values + 10 * np.random.default_rng(seed).normal(size=shape)


def test_the_worst_mixed_weight(draws):
    draws[0, :, 1, 3] += 9
    draws -= draws.mean(2, keepdims=True)
    chosen, value = worst_rhat(draws, 3)
    assert (1, 3) in chosen
    assert value[0] > 1.5
    assert {d for _, d in chosen} == {3}
    again, other = worst_rhat(_shifted(draws), 3)
    assert again == chosen
    np.testing.assert_allclose(other, value, rtol=1e-3)  # ranks may swap at rounding


def test_the_weight_that_moved_most_and_by_how_many_sds(draws):
    draws -= draws.mean(2, keepdims=True)
    mean = draws.mean((0, 1))
    mean[2, 0] += 3
    chosen, value = largest_shift(mean, draws, 2)
    assert chosen[0] == (2, 0)
    assert value[0] == pytest.approx(2 / draws.std((0, 1), ddof=1)[2, 0])  # a third of 3 is the classes' mean
    assert largest_shift(_shifted(mean), _shifted(draws, 2), 2)[0] == chosen


def test_the_effect_counts_how_much_the_feature_varies():
    mean = np.zeros((K, D))
    mean[0, 1], mean[1, 2] = 3, 6
    features = np.random.default_rng(0).normal(size=(50, D)) * [1, 10, 1, 1, 1]
    chosen, value = largest_effect(mean, features, 4)
    assert chosen[0] == (0, 1)
    assert value[0] == pytest.approx(2 * features[:, 1].std())
    assert largest_effect(_shifted(mean), features, 4)[0] == chosen
    assert len(largest_effect(mean, features, 99)[0]) == K * D
