"""NUTS end to end: targets with known answers, statistics, chains that do not depend on how they are run.

Means and sds are judged in units of their Monte Carlo error with |t| < 5 over at most ~100 numbers: a false alarm under
the normal law has a probability below 1e-4.
"""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bayescam.diagnose.arviz_compat import ess
from bayescam.errors import FileFormatError
from bayescam.posterior import nuts_run
from bayescam.posterior.images import check_images
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.model import log_prior, negative_log_joint
from bayescam.posterior.nuts import Nuts, SamplingInterrupted, sample_nuts
from bayescam.posterior.nuts_chain import ChainSettings, sample_chain
from bayescam.posterior.nuts_run import WorkerError, chain_path

K, D = 3, 2


def data(n=60):
    torch.manual_seed(5)
    features = torch.randn(n, D, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=features @ torch.randn(D, K).double() * 2).sample()
    return features, labels


def fitted(n=60, tau=1.0, **options):
    features, labels = data(n)
    return fit_laplace(features, labels, num_classes=K, prior_precision=tau, **options), features, labels


def short(**options):
    laplace, features, labels = fitted()
    settings = {"num_chains": 2, "num_samples": 30, "num_warmup": 30, "progress": False}
    return sample_nuts(laplace, features, labels, **(settings | options))


def t_values(draws, mean, method="mean"):
    """(C, S, ...) draws -> (estimate - truth) / MCSE."""
    flat = draws.reshape(*draws.shape[:2], -1)
    effective = np.array([ess(flat[..., i], method) for i in range(flat.shape[-1])])
    return (flat.mean((0, 1)) - np.ravel(mean)) / (flat.std((0, 1)) / np.sqrt(effective))


def standard_error(draws):
    """(C, S, P) draws -> MCSE of their means and effective sample sizes, (P,) each."""
    effective = np.array([ess(draws[..., i], "mean") for i in range(draws.shape[-1])])
    return draws.std((0, 1)) / np.sqrt(effective), effective


class Gaussian:
    """A potential with known moments: z ~ Normal(0, covariance)."""

    def __init__(self, covariance):
        self.precision = torch.linalg.inv(covariance)
        self.dimension, self.device = len(covariance), torch.device("cpu")

    def value_and_gradient(self, z):
        slope = self.precision @ z
        return 0.5 * z.dot(slope).item(), slope

    def __call__(self, params):
        z = params["z"]
        return 0.5 * z @ self.precision @ z

    def unpack(self, z, potential):
        return z.unsqueeze(1).expand(-1, K, -1), torch.ones(len(z)).double(), -potential


class LogGamma(Gaussian):
    """A skewed one: exp(z_i) ~ Gamma(shape, 1) independently; E z = digamma(shape), Var z = trigamma(shape)."""

    def __init__(self, shape, dimension):
        self.shape, self.dimension, self.device = shape, dimension, torch.device("cpu")

    def value_and_gradient(self, z):
        return (z.exp() - self.shape * z).sum().item(), z.exp() - self.shape

    def __call__(self, params):
        return (params["z"].exp() - self.shape * params["z"]).sum()


@pytest.mark.parametrize(
    ("target", "kernel"),
    [
        ("skewed", "hmc"),
        ("gaussian", "hmc"),
        *(pytest.param(t, "nuts", marks=pytest.mark.slow) for t in ("skewed", "gaussian")),
    ],
)
def test_known_moments(target, kernel):
    torch.manual_seed(0)
    if target == "gaussian":
        root = torch.eye(5).double() + 0.4 * torch.randn(5, 5).double()
        potential, mean, variance = Gaussian(root @ root.T), np.zeros(5), (root @ root.T).diagonal().numpy()
    else:
        shape = torch.tensor(2.0).double()
        potential = LogGamma(2.0, 4)
        mean = np.full(4, torch.digamma(shape).item())
        variance = np.full(4, torch.polygamma(1, shape).item())
    positions = []
    for i in range(4):
        record = []
        inner = potential.unpack
        potential.unpack = lambda z, p, f=inner, r=record: (r.append(z), f(z, p))[1]
        sample_chain(potential, ChainSettings(kernel, 800, 200, seed=2), i)
        potential.unpack = inner
        positions.append(record[0])
    z = torch.stack(positions).numpy()
    assert np.abs(t_values(z, mean)).max() < 5
    assert np.abs(t_values((z - mean) ** 2, variance)).max() < 5


def test_shapes_dtypes_and_statistics():
    nuts = short()
    assert nuts.draws.weight.shape == (2, 30, K, D)
    assert nuts.draws.bias.shape == (2, 30, K)
    assert set(nuts.stats) == {"lp", "energy", "n_steps", "tree_depth", "acceptance_rate", "step_size", "diverging"}
    assert all(values.shape == (2, 30) for values in nuts.stats.values())
    assert nuts.stats["diverging"].dtype == bool
    assert nuts.tau is None
    assert "2 chains x 30 draws" in repr(nuts)


def test_lp_is_the_models_log_joint_at_the_draw():
    laplace, features, labels = fitted(tau=0.6)
    images = check_images(features, labels, num_classes=K)
    nuts = sample_nuts(laplace, features, labels, num_chains=2, num_samples=20, num_warmup=20, progress=False)
    theta = torch.cat([nuts.draws.weight, nuts.draws.bias.unsqueeze(-1)], -1)
    value, _ = negative_log_joint(theta, images, 0.6)
    np.testing.assert_allclose(nuts.stats["lp"], -value.numpy(), rtol=1e-10)
    assert (nuts.stats["energy"] > 0).all()


@pytest.mark.slow
def test_kinetic_energy_has_its_chi_square_mean():
    laplace, features, labels = fitted()
    nuts = sample_nuts(laplace, features, labels, num_chains=4, num_samples=400, num_warmup=100, progress=False)
    shift = nuts.draws.theta().unflatten(-1, (-1,))
    weight, bias = nuts.draws.weight.sum(2) / K**0.5, nuts.draws.bias.sum(2, keepdim=True) / K**0.5
    shift = torch.cat([weight, bias], -1)
    contrast_lp = nuts.stats["lp"] - log_prior(shift, 1.0).numpy()
    kinetic = nuts.stats["energy"] + contrast_lp
    dimension = (K - 1) * (D + 1)
    assert (kinetic >= 0).all()
    assert np.abs(t_values(kinetic[..., None], dimension / 2)).max() < 5


@pytest.mark.slow
def test_shift_is_drawn_from_the_prior():
    laplace, features, labels = fitted(tau=0.25)
    nuts = sample_nuts(laplace, features, labels, num_chains=4, num_samples=500, num_warmup=50, progress=False)
    shift = (nuts.draws.weight.sum(2) / K**0.5).numpy()
    assert np.abs(t_values(shift, np.zeros(D))).max() < 5
    assert np.abs(t_values(shift**2, np.full(D, 4.0))).max() < 5


@pytest.mark.slow
def test_plain_and_whitened_and_refined_and_hmc_agree():
    laplace, features, labels = fitted(tau=0.3)
    plain = replace(laplace, covariance=fit_laplace(features, labels, prior_precision=0.3, structure="diag").covariance)
    runs = [
        sample_nuts(one, features, labels, num_samples=700, num_warmup=200, kernel=kernel, progress=False)
        for one, kernel in [
            (laplace, "nuts"),
            (plain, "nuts"),
            (laplace.refine(features, labels), "nuts"),
            (laplace, "hmc"),
        ]
    ]
    moments = []
    for run in runs:
        centred = run.draws.centred().theta().numpy()
        mean, sd = centred.mean((0, 1)), centred.std((0, 1))
        mean_error, effective = standard_error(centred)
        assert effective.min() > 300
        moments.append((mean, mean_error, sd, standard_error((centred - mean) ** 2)[0] / (2 * sd)))
    mean, mean_error, sd, sd_error = moments[0]
    for other_mean, other_mean_error, other_sd, other_sd_error in moments[1:]:
        assert (np.abs(mean - other_mean) / np.hypot(mean_error, other_mean_error)).max() < 5
        assert (np.abs(sd - other_sd) / np.hypot(sd_error, other_sd_error)).max() < 5


def test_seed_decides_and_the_callers_stream_is_left_alone():
    laplace, features, labels = fitted()
    before = torch.get_rng_state()
    sample_nuts(laplace, features, labels, num_chains=1, num_samples=5, num_warmup=5, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = short(), short(), short(seed=1)
    assert torch.equal(a.draws.weight, b.draws.weight)
    assert not torch.equal(a.draws.weight, c.draws.weight)
    assert not torch.equal(a.draws.weight[0], a.draws.weight[1])
    longer = short(num_chains=3)
    assert torch.equal(longer.draws.weight[:2], a.draws.weight)


def test_eleven_chains_stay_in_order(tmp_path):
    nuts = short(num_chains=11, num_samples=3, num_warmup=5, folder=tmp_path)
    again = short(num_chains=11, num_samples=3, num_warmup=5, folder=tmp_path)
    for i in (1, 2, 10):
        one = nuts_run.load_chain(chain_path(tmp_path, i), _mark(tmp_path))
        assert torch.equal(one.theta[..., :-1], nuts.draws.weight[i])
        np.testing.assert_array_equal(one.stats["lp"], again.stats["lp"][i])


def _mark(folder):
    from bayescam.storage import load_tensors

    return load_tensors(chain_path(folder, 0), kind="chain")[1]["fingerprint"]


@pytest.mark.slow
def test_worker_processes_draw_the_same_from_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, bayescam as bc
            torch.manual_seed(5)
            features = torch.randn(60, 2, dtype=torch.float64)
            labels = torch.arange(60) % 3
            laplace = bc.fit_laplace(features, labels, prior_precision=1.0)
            options = dict(num_chains=3, num_samples=20, num_warmup=20, progress=False)
            alone = bc.sample_nuts(laplace, features, labels, **options)
            beside = bc.sample_nuts(laplace, features, labels, num_workers=2, **options)
            assert torch.equal(alone.draws.weight, beside.draws.weight)
            assert (alone.stats["lp"] == beside.stats["lp"]).all()
            print("the same")
            """
        )
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=root, env=_environment(root)
    )
    assert done.stdout.strip() == "the same", done.stderr


def _environment(root):
    import os

    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_dead_worker_is_named_and_the_other_chains_are_kept(tmp_path, monkeypatch):
    laplace, features, labels = fitted()
    options = {"num_chains": 2, "num_samples": 10, "num_warmup": 10, "folder": tmp_path, "progress": False}
    whole = sample_nuts(laplace, features, labels, **(options | {"folder": None}))
    real = subprocess.Popen

    def sabotaged(command, **rest):
        if command[-1] == "1":
            command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        return real(command, **rest)

    monkeypatch.setattr(nuts_run.subprocess, "Popen", sabotaged)
    with pytest.raises(WorkerError, match=r"chain 1 ended with status -9.*1 of 2 chains are complete"):
        sample_nuts(laplace, features, labels, num_workers=2, **options)
    monkeypatch.undo()
    assert chain_path(tmp_path, 0).is_file()
    assert not (tmp_path / "problem.safetensors").exists()
    again = sample_nuts(laplace, features, labels, **options)
    assert torch.equal(again.draws.weight, whole.draws.weight)


@pytest.mark.parametrize(
    ("stop_at", "complete", "kept"),
    [pytest.param(75, 1, 30, marks=pytest.mark.slow), (40, 0, 10), pytest.param(20, 0, 0, marks=pytest.mark.slow)],
)
def test_ctrl_c_keeps_what_was_drawn(stop_at, complete, kept, monkeypatch, tmp_path):
    seen = [0]
    advance = nuts_run.Progress.advance

    def press(self, *args):
        seen[0] += 1
        if seen[0] == stop_at + 1:
            raise KeyboardInterrupt
        advance(self, *args)

    monkeypatch.setattr(nuts_run.Progress, "advance", press)
    with pytest.raises(KeyboardInterrupt, match=f"{complete} of 3 chains complete") as caught:
        short(num_chains=3, folder=tmp_path)
    assert isinstance(caught.value, SamplingInterrupted)
    monkeypatch.undo()
    if not kept:
        assert caught.value.nuts is None
    else:
        assert caught.value.nuts.draws.weight.shape[:2] == (1, kept + (0 if complete else 1))
    whole = short(num_chains=3)
    assert torch.equal(short(num_chains=3, folder=tmp_path).draws.weight, whole.draws.weight)


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_and_keeps_their_draws(tmp_path):
    script = tmp_path / "long.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, threading
            import torch, bayescam as bc
            from bayescam.posterior import nuts_run
            from bayescam.posterior.nuts import SamplingInterrupted
            torch.manual_seed(5)
            features, labels = torch.randn(60, 2, dtype=torch.float64), torch.arange(60) % 3
            laplace = bc.fit_laplace(features, labels, prior_precision=1.0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job of a shell
            seen, advance = set(), nuts_run.Progress.advance
            def count(self, chain, draw, *rest):
                advance(self, chain, draw, *rest)
                if draw >= 60 and chain not in seen:
                    seen.add(chain)
                    if len(seen) == 2:
                        os.kill(os.getpid(), signal.SIGINT)
            nuts_run.Progress.advance = count
            try:
                bc.sample_nuts(laplace, features, labels, num_chains=3, num_samples=10**6, num_warmup=50, num_workers=2)
            except SamplingInterrupted as stopped:
                print([chain.index for chain in stopped.chains], stopped.nuts.draws.num_chains)
                print(all(len(chain.theta) > 5 for chain in stopped.chains))
            """
        )
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=root, env=_environment(root)
    )
    assert done.stdout.splitlines() == ["[0, 1] 1", "True"], done.stderr


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_draws_on_a_gpu_stay_there():
    laplace, features, labels = fitted()
    run = sample_nuts(
        laplace.to("cuda"), features.cuda(), labels.cuda(), num_chains=1, num_samples=8, num_warmup=20, progress=False
    )
    assert run.draws.weight.is_cuda
    assert run.num_divergent == 0


def test_kept_chains_of_another_run_are_not_taken(tmp_path):
    first = short(folder=tmp_path)
    other = short(folder=tmp_path, seed=3)
    assert not torch.equal(first.draws.weight, other.draws.weight)
    assert torch.equal(other.draws.weight, short(seed=3).draws.weight)


def test_save_and_load(tmp_path):
    nuts = short(tau_prior="gamma")
    nuts.save(tmp_path / "nuts.safetensors")
    again = Nuts.load(tmp_path / "nuts.safetensors")
    assert torch.equal(again.draws.weight, nuts.draws.weight)
    assert torch.equal(again.tau, nuts.tau)
    assert again.settings == nuts.settings
    assert repr(again) == repr(nuts)
    assert (again.prior_precision, again.tau_prior) == (nuts.prior_precision, nuts.tau_prior) == (None, (1.0, 0.1))
    for name, values in nuts.stats.items():
        np.testing.assert_array_equal(again.stats[name], values)
    short(folder=tmp_path)
    with pytest.raises(FileFormatError, match="holds a 'chain'"):
        Nuts.load(chain_path(tmp_path, 0))


def test_hierarchical_draws_tau():
    nuts = short(tau_prior="gamma", num_samples=100)
    assert nuts.tau.shape == (2, 100)
    assert (nuts.tau > 0).all()
    assert nuts.tau.std() > 0


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_samples": 0}, ValueError, "num_samples is 0"),
        ({"num_chains": 0}, ValueError, "num_chains is 0"),
        ({"num_warmup": 0}, ValueError, "num_warmup is 0"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be a whole number"),
        ({"kernel": "gibbs"}, ValueError, "choose 'nuts' or 'hmc'"),
        ({"tau_prior": (0, 1)}, ValueError, "tau_prior"),
        ({"tau_prior": "flat"}, ValueError, "tau_prior"),
        ({"target_accept": 1.0}, ValueError, "target_accept is 1.0"),
        ({"num_workers": -1}, ValueError, "num_workers is -1"),
        ({"group": object(), "num_workers": 2}, ValueError, "exclude each other"),
    ],
)
def test_wrong_arguments(options, error, said):
    with pytest.raises(error, match=said):
        short(**options)


def test_data_that_does_not_fit():
    laplace, features, labels = fitted()
    with pytest.raises(ValueError, match="laplace was fitted on 2"):
        sample_nuts(laplace, torch.randn(60, 5), labels)
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        sample_nuts(laplace, features, labels + 1)
    broken = features.clone()
    broken[7, 1] = float("nan")
    with pytest.raises(ValueError, match=r"features\[7, 1\] is nan"):
        sample_nuts(laplace, broken, labels)
