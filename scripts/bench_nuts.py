"""How fast is NUTS on the last layer, beside Pyro's and NumPyro's NUTS on the same model and data, in one run?

    python scripts/bench_nuts.py --size small    # N = 2,000, D = 16, K = 7: Pyro on the model, NumPyro, bayescam
    python scripts/bench_nuts.py --size medium   # N = 10,000, D = 64, K = 7: NumPyro, bayescam
    python scripts/bench_nuts.py --size mura --samples 750 --target-accept 0.7
                                                 # N = 36,808, D = 512, K = 7: bayescam, four chains, two processes

Minimum ESS per second, all set-up counted: for bayescam the Laplace fit, for NumPyro compilation. The ESS is the bulk
ESS over the centred weights and biases; beside it stands that of their squared deviations, which an sd is estimated
from and which NUTS near a Gaussian mixes less well. This process's CPU time stands beside the clock's: on a busy
machine it is the steadier of the two (it leaves out worker processes, so it means nothing with --num-workers). Means
and sds are held against each other in units of their Monte Carlo errors. Takes about a minute for small, minutes for
medium, a quarter of an hour for mura.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _printed import kept

from bayescam.diagnose.arviz_compat import ess, rhat
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import Nuts, sample_nuts
from bayescam.posterior.nuts_chain import ChainSettings, sample_chain
from bayescam.posterior.nuts_problem import Problem
from bayescam.storage import write_text

SIZES = {"tiny": (200, 4, 3), "small": (2000, 16, 7), "medium": (10_000, 64, 7), "mura": (36_808, 512, 7)}
TAU = 1.0


def data(n: int, d: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative features like a network's after its last ReLU, with a decaying spectrum; labels from the model."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1).float().rsqrt()
    mixing = torch.randn(d, d, generator=generator) / d**0.5
    features = ((torch.randn(n, d, generator=generator) * scale) @ mixing * d**0.5 * 0.5).relu()
    weight = torch.randn(k, d, generator=generator) / TAU**0.5
    proba = (features @ weight.T).softmax(1)
    return features, torch.multinomial(proba, 1, generator=generator)[:, 0]


def moments(draws: Draws) -> dict[str, np.ndarray]:
    centred = draws.centred().theta().double().numpy()
    squares = (centred - centred.mean((0, 1))) ** 2
    bulk, for_mean, for_sd = ess(centred, "bulk"), ess(centred, "mean"), ess(squares, "mean")
    sd = centred.std((0, 1))
    return {
        "mean": centred.mean((0, 1)),
        "mean_error": sd / np.sqrt(for_mean),
        "sd": sd,
        "sd_error": squares.std((0, 1)) / np.sqrt(for_sd) / (2 * sd),
        "ess": bulk,
        "ess_sd": for_sd,
        "rhat": rhat(centred) if len(centred) > 1 else np.full(centred.shape[-1], np.nan),
    }


def run_bayescam(features: torch.Tensor, labels: torch.Tensor, **options) -> tuple[Draws, dict]:
    begun = time.perf_counter()
    laplace = fit_laplace(features, labels, prior_precision=TAU)
    fitted = time.perf_counter() - begun
    run = sample_nuts(laplace, features, labels, **options)
    return run.draws, {"laplace_seconds": fitted, **cost(run)}


def cost(run: Nuts) -> dict[str, float]:
    return {
        "steps_per_draw": float(run.stats["n_steps"].mean()),
        "gradients": run.num_gradients,
        "gradients_per_second_and_chain": run.num_gradients / float(run.seconds.sum()),
        "acceptance_rate": float(run.stats["acceptance_rate"].mean()),
        "divergent": run.num_divergent,
        "chain_seconds": float(run.seconds.sum()),
    }


def python_share(features: torch.Tensor, labels: torch.Tensor, num_draws: int, seed: int) -> float:
    """Share of a chain's time outside the potential and its gradient: trees, leapfrogs and adaptation in Python."""
    from bayescam.posterior.images import check_images

    laplace = fit_laplace(features, labels, prior_precision=TAU)
    potential = Problem.of(laplace, check_images(features, labels), None).potential()
    spent, inner = [0.0], potential.value_and_gradient

    def timed(z: torch.Tensor) -> tuple[float, torch.Tensor]:
        begun = time.perf_counter()
        out = inner(z)
        spent[0] += time.perf_counter() - begun
        return out

    potential.value_and_gradient = timed  # type: ignore[method-assign]
    chain = sample_chain(potential, ChainSettings("nuts", num_draws, 50, seed=seed), 0)
    return 1 - spent[0] / chain.seconds


def run_pyro(features: torch.Tensor, labels: torch.Tensor, samples: int, seed: int) -> tuple[Draws, dict]:
    import pyro
    from pyro.infer import MCMC, NUTS

    from bayescam.posterior.model import last_layer

    pyro.set_rng_seed(seed)
    steps: list[int] = []
    kernel = NUTS(last_layer)
    build = kernel._build_basetree
    kernel._build_basetree = lambda *a: (steps.append(1), build(*a))[1]
    mcmc = MCMC(kernel, num_samples=samples, warmup_steps=samples, disable_progbar=True)
    mcmc.run(features, labels, num_classes=int(labels.max()) + 1, prior_precision=TAU)
    drawn = mcmc.get_samples(group_by_chain=True)
    return Draws(drawn["weight"], drawn["bias"]), {"steps_per_draw": len(steps) / (2 * samples)}


def run_numpyro(features: torch.Tensor, labels: torch.Tensor, samples: int, seed: int) -> tuple[Draws, dict]:
    import jax
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    def model(phi, y, k):
        weight = numpyro.sample("weight", dist.Normal(0, TAU**-0.5).expand([k, phi.shape[1]]).to_event(2))
        bias = numpyro.sample("bias", dist.Normal(0, TAU**-0.5).expand([k]).to_event(1))
        numpyro.sample("y", dist.Categorical(logits=phi @ weight.T + bias), obs=y)

    mcmc = MCMC(NUTS(model), num_warmup=samples, num_samples=samples, progress_bar=False)
    phi, y = jax.numpy.asarray(features.numpy()), jax.numpy.asarray(labels.numpy())
    mcmc.run(jax.random.PRNGKey(seed), phi, y, int(labels.max()) + 1, extra_fields=("num_steps",))
    drawn = mcmc.get_samples(group_by_chain=True)
    weight, bias = (torch.from_numpy(np.array(drawn[name])) for name in ("weight", "bias"))
    return Draws(weight, bias), {"steps_per_draw": float(np.mean(mcmc.get_extra_fields()["num_steps"]))}


def measure(name: str, sampler: Callable[[], tuple[Draws, dict]]) -> tuple[dict, dict]:
    begun, begun_cpu = time.perf_counter(), time.process_time()
    draws, facts = sampler()
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - begun_cpu
    found = moments(draws)
    row = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "draws": draws.num_chains * draws.num_samples,
        "min_ess": float(found["ess"].min()),
        "min_ess_sd": float(found["ess_sd"].min()),
        "min_ess_per_second": float(found["ess"].min()) / seconds,
        "min_ess_sd_per_second": float(found["ess_sd"].min()) / seconds,
        "min_ess_per_cpu_second": float(found["ess"].min()) / cpu_seconds,
        "rhat_max": float(np.max(found["rhat"])),
        **facts,
    }
    print(f"{name:10s} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return row, found


def agreement(ours: dict, theirs: dict) -> dict[str, float]:
    """Differences in standard errors, root mean square and worst; about 1 and 3 to 4 where only noise differs."""
    mean = (ours["mean"] - theirs["mean"]) / np.hypot(ours["mean_error"], theirs["mean_error"])
    sd = (ours["sd"] - theirs["sd"]) / np.hypot(ours["sd_error"], theirs["sd_error"])
    return {
        "mean_rms": float(np.sqrt(np.mean(mean**2))),
        "mean_max": float(np.abs(mean).max()),
        "sd_rms": float(np.sqrt(np.mean(sd**2))),
        "sd_max": float(np.abs(sd).max()),
    }


def profile(features: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
    laplace = fit_laplace(features, labels, prior_precision=TAU)
    profiler = cProfile.Profile()
    profiler.runcall(
        sample_nuts, laplace, features, labels, num_chains=1, num_samples=200, num_warmup=100, seed=seed, progress=False
    )
    pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--peers", nargs="*", choices=["pyro", "numpyro"], help="default: those that the size can bear")
    parser.add_argument("--peer-samples", type=int, default=200, help="draws, and as many of warm-up, of each peer")
    parser.add_argument("--samples", type=int, default=500, help="draws a chain of bayescam")
    parser.add_argument("--kernel", choices=["nuts", "hmc"], default="nuts", help="of bayescam")
    parser.add_argument("--target-accept", type=float, default=0.8, help="of bayescam")
    parser.add_argument("--num-workers", type=int, help="processes of bayescam (default: 2 for mura, else 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of every chain")
    parser.add_argument("--profile", action="store_true", help="print where one chain's time goes, and stop")
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed, and for the numbers as JSON")
    parsed = parser.parse_args()
    with kept(parsed.out, "bench_nuts.txt"):
        compare(parsed)


def compare(parsed: argparse.Namespace) -> None:
    """Time bayescam and the peers one after the other, and print."""
    features, labels = data(*SIZES[parsed.size], parsed.seed)
    if parsed.profile:
        return profile(features, labels, parsed.seed)
    workers = parsed.num_workers if parsed.num_workers is not None else 2 * (parsed.size == "mura")
    by_size = {"tiny": ["pyro", "numpyro"], "small": ["pyro", "numpyro"], "medium": ["numpyro"], "mura": []}
    peers = by_size[parsed.size] if parsed.peers is None else parsed.peers
    print(f"N, D, K = {SIZES[parsed.size]}, float32, prior precision {TAU}, threads: {torch.get_num_threads()}")
    rows, found = {}, {}
    run = {"pyro": run_pyro, "numpyro": run_numpyro}
    options = {"num_samples": parsed.samples, "kernel": parsed.kernel, "target_accept": parsed.target_accept}
    options["seed"] = parsed.seed
    rows["bayescam"], found["bayescam"] = measure(
        "bayescam", lambda: run_bayescam(features, labels, num_workers=workers, **options)
    )
    rows["bayescam"]["python_share"] = python_share(features, labels, 20 if parsed.size == "mura" else 200, parsed.seed)
    print(f"share of a chain's time outside the potential: {rows['bayescam']['python_share']:.2f}")
    for name in peers:
        rows[name], found[name] = measure(
            name, lambda name=name: run[name](features, labels, parsed.peer_samples, parsed.seed)
        )
        keys = ("min_ess_per_second", "min_ess_sd_per_second", "min_ess_per_cpu_second")
        ratio, for_sd, by_cpu = (rows["bayescam"][key] / rows[name][key] for key in keys)
        rows[name]["bayescam_is_faster_by"] = ratio
        rows[name]["bayescam_is_faster_for_sds_by"] = for_sd
        rows[name]["agreement"] = agreement(found["bayescam"], found[name])
        rows[name]["bayescam_is_faster_by_cpu_time"] = by_cpu
        print(f"bayescam / {name}: minimum ESS per second {ratio:.1f} x, for sds {for_sd:.1f} x")
        print(f"  minimum ESS per CPU second {by_cpu:.1f} x")
        print(f"  differences in standard errors: {rows[name]['agreement']}")
    if parsed.out is not None:
        write_text(parsed.out / "bench_nuts.json", json.dumps({"size": SIZES[parsed.size], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
