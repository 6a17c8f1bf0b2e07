"""The fast kernels against Pyro's own: the same draws from the same random numbers."""

import math

import pytest
import torch
from pyro.infer.mcmc import HMC, MCMC, NUTS

from bayescam.posterior import nuts_kernel
from bayescam.posterior.covariance import contrast_basis
from bayescam.posterior.images import check_images
from bayescam.posterior.nuts_kernel import LastLayerHmc, LastLayerNuts, _log_add
from bayescam.posterior.nuts_potential import SoftmaxLikelihood, WhitenedPotential


def small_potential(dtype=torch.float64):
    torch.manual_seed(3)
    n, d, k = 60, 3, 4
    features, labels = torch.randn(n, d, dtype=torch.float64).abs(), torch.arange(n) % k
    mean = torch.randn(k, d + 1, dtype=torch.float64)
    basis = torch.kron(contrast_basis(k), torch.eye(d + 1, dtype=torch.float64)) * 0.5
    likelihood = SoftmaxLikelihood(check_images(features.to(dtype), labels))
    return WhitenedPotential(likelihood, mean=mean - mean.mean(0), basis=basis, prior_precision=0.7)


def walk(kernel, start, num_warmup, num_draws):
    torch.manual_seed(11)
    kernel.initial_params = {"z": start.clone()}
    kernel.setup(num_warmup)
    params = {"z": start.clone()}
    draws = []
    for _ in range(num_warmup + num_draws):
        params = kernel.sample(params)
        draws.append(params["z"].clone())
    return torch.stack(draws)


@pytest.mark.parametrize(
    ("ours", "pyros", "options"),
    [
        (LastLayerNuts, NUTS, {}),
        (LastLayerNuts, NUTS, {"max_tree_depth": 3}),
        (LastLayerHmc, HMC, {"trajectory_length": math.pi / 2}),
    ],
)
def test_draws_equal_pyros_own_kernel(ours, pyros, options, monkeypatch):
    """With the two further U-turn checks taken away, which Pyro does not make."""
    monkeypatch.setattr(nuts_kernel, "_turns_across", lambda earlier, later: False)
    potential = small_potential()
    start = torch.randn(potential.dimension, dtype=torch.float64)
    fast, stock = ours(potential, **options), pyros(potential_fn=potential, adapt_mass_matrix=False, **options)
    a, b = walk(fast, start, 25, 15), walk(stock, start, 25, 15)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert fast.step_size == pytest.approx(stock.step_size, rel=1e-6)
    assert fast._mean_accept_prob == pytest.approx(stock._mean_accept_prob, rel=1e-5)
    assert fast.diagnostics()["acceptance rate"] == stock.diagnostics()["acceptance rate"]


def test_kernel_runs_under_pyros_mcmc():
    potential = small_potential()
    kernel = LastLayerNuts(potential)
    mcmc = MCMC(kernel, 20, 20, initial_params={"z": torch.zeros(potential.dimension).double()}, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["z"].shape == (20, potential.dimension)


def test_transition_is_hamiltonian_and_counts_steps():
    potential = small_potential()
    kernel = LastLayerNuts(potential)
    start = torch.zeros(potential.dimension, dtype=torch.float64)
    kernel.initial_params = {"z": start}
    kernel.setup(30)
    params = {"z": start}
    for i in range(60):
        calls, inner = [0], potential.likelihood.value_and_gradient
        potential.likelihood.value_and_gradient = lambda t, c=calls, f=inner: (c.__setitem__(0, c[0] + 1), f(t))[1]
        params = kernel.sample(params)
        potential.likelihood.value_and_gradient = inner
        t = kernel.transition
        assert t.n_steps == calls[0]
        assert t.tree_depth == math.floor(math.log2(t.n_steps)) + 1
        assert t.potential == pytest.approx(potential.value_and_gradient(params["z"])[0], abs=1e-9)
        assert t.energy > t.potential
        assert 0 <= t.acceptance_rate <= 1
        assert t.step_size > 0 or i < 30


class StandardNormal:
    """U(z) = |z|^2 / 2: every coordinate has the period 2 pi."""

    dimension, device = 200, torch.device("cpu")

    def value_and_gradient(self, z):
        return 0.5 * torch.dot(z, z).item(), z.clone()

    def __call__(self, params):
        return 0.5 * params["z"].square().sum()


def test_no_whole_periods_are_walked():
    """15 steps of 0.42 close the circle; its ends have met again, and without the two checks 89 steps a draw follow."""
    torch.manual_seed(0)
    kernel = LastLayerNuts(StandardNormal())
    params = {"z": torch.randn(200, dtype=torch.float64)}
    kernel.initial_params = params
    kernel.setup(0)
    kernel._adapter.step_size = 0.42
    steps = []
    for _ in range(40):
        params = kernel.sample(params)
        steps.append(kernel.transition.n_steps)
    assert max(steps) <= 15


def test_divergence_is_recorded():
    potential = small_potential()
    kernel = LastLayerNuts(potential)
    kernel.initial_params = {"z": torch.zeros(potential.dimension, dtype=torch.float64)}
    kernel.setup(0)
    kernel._adapter.step_size = 1e4
    kernel.sample(kernel.initial_params)
    assert kernel.transition.diverging
    assert kernel.transition.n_steps == 1
    assert kernel.diagnostics()["divergences"] == [0]


def test_log_add_handles_impossible_states():
    assert _log_add(-math.inf, -math.inf) == -math.inf
    assert _log_add(-math.inf, 0.5) == 0.5
    assert _log_add(1.0, 2.0) == pytest.approx(math.log(math.exp(1) + math.exp(2)))
