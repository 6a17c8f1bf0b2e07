"""NUTS on the last layer: the referee of every other posterior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayescam.errors import FileFormatError
from bayescam.notebook import html_table
from bayescam.posterior.draws import Draws
from bayescam.posterior.images import check_images, whole_number
from bayescam.posterior.nuts_chain import STATISTICS, Chain, ChainSettings
from bayescam.posterior.nuts_problem import Problem
from bayescam.posterior.nuts_ranks import fits, gathered, run_chains_on_ranks
from bayescam.posterior.nuts_run import run_chains
from bayescam.storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from bayescam.posterior.laplace import Laplace

DEFAULT_TAU_PRIOR = (1.0, 0.1)


@dataclass(frozen=True, eq=False)
class Nuts:
    """What a run of NUTS or HMC left behind.

    Args:
        draws: weight (C, S, K, D), bias (C, S, K), the shift included.
        stats: lp (the log joint of the draw), energy (the Hamiltonian of the walked coordinates), n_steps (gradients),
            tree_depth (doublings begun), acceptance_rate, step_size, diverging; each (C, S).
        tau: prior precision of each draw (C, S) if it was sampled, else None.
        warmup_steps: gradients that each chain's warm-up took, (C,).
        seconds: wall time of each chain, (C,).
        settings: kernel, lengths, seed.
        class_weights: of a generalised likelihood, (K,), else None.
        prior_precision: tau, where it was not sampled.
        tau_prior: (shape, rate) of tau's Gamma prior, where it was.
    """

    draws: Draws
    stats: dict[str, np.ndarray]
    tau: Tensor | None
    warmup_steps: np.ndarray
    seconds: np.ndarray
    settings: ChainSettings
    class_weights: Tensor | None = None
    prior_precision: float | None = None
    tau_prior: tuple[float, float] | None = None

    @property
    def num_divergent(self) -> int:
        """Draws after a trajectory whose energy broke away."""
        return int(self.stats["diverging"].sum())

    @property
    def num_gradients(self) -> int:
        """Leapfrog steps in all, warm-up included."""
        return int(self.stats["n_steps"].sum() + self.warmup_steps.sum())

    def to(self, device: torch.device | str) -> Nuts:
        """The same run with its draws on another device."""
        return replace(
            self,
            draws=Draws(self.draws.weight.to(device), self.draws.bias.to(device)),
            tau=None if self.tau is None else self.tau.to(device),
            class_weights=None if self.class_weights is None else self.class_weights.to(device),
        )

    def save(self, path: Path | str) -> None:
        """Write draws, statistics and settings as one safetensors file."""
        tensors = {"weight": self.draws.weight, "bias": self.draws.bias}
        tensors |= {f"stats.{name}": torch.from_numpy(values) for name, values in self.stats.items()}
        tensors |= {"warmup_steps": torch.from_numpy(self.warmup_steps), "seconds": torch.from_numpy(self.seconds)}
        if self.tau is not None:
            tensors["tau"] = self.tau
        if self.class_weights is not None:
            tensors["class_weights"] = self.class_weights
        prior = {"prior_precision": self.prior_precision, "tau_prior": self.tau_prior}
        save_tensors(Path(path), tensors, {"kind": "nuts", "settings": asdict(self.settings), **prior})

    @classmethod
    def load(cls, path: Path | str) -> Nuts:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: absent, broken or another kind of file.
        """
        tensors, metadata = load_tensors(Path(path), kind="nuts")
        try:
            return cls(
                Draws(tensors["weight"], tensors["bias"]),
                {name: tensors[f"stats.{name}"].numpy() for name in STATISTICS},
                tensors.get("tau"),
                tensors["warmup_steps"].numpy(),
                tensors["seconds"].numpy(),
                ChainSettings(**metadata["settings"]),
                tensors.get("class_weights"),
                None if (tau := metadata.get("prior_precision")) is None else float(tau),
                None if (gamma := metadata.get("tau_prior")) is None else (float(gamma[0]), float(gamma[1])),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: not a whole NUTS run ({error}); sample again") from error

    def __repr__(self) -> str:
        chains, draws = self.stats["lp"].shape
        steps = self.stats["n_steps"].mean() if draws else float("nan")
        return (
            f"Nuts({chains} chains x {draws} draws, kernel={self.settings.kernel!r}, {steps:.1f} steps a draw, "
            f"{self.num_divergent} divergent, {self.seconds.sum():.1f} s)"
        )

    def _repr_html_(self) -> str:
        chains, draws = self.stats["lp"].shape
        rows = [
            ("kernel", self.settings.kernel),
            ("chains x draws", f"{chains} x {draws}"),
            ("gradients, warm-up included", self.num_gradients),
            ("divergent", self.num_divergent),
            ("acceptance rate", f"{self.stats['acceptance_rate'].mean():.2f}" if draws else "no draw"),
            ("prior precision", "fixed" if self.tau is None else "sampled"),
            ("seconds, all chains", f"{self.seconds.sum():.1f}"),
        ]
        return html_table("NUTS" if self.settings.kernel == "nuts" else "HMC", rows)


class SamplingInterrupted(KeyboardInterrupt):
    """Ctrl-C during sampling; nothing that was drawn is lost.

    Attributes:
        nuts: the chains that were complete, or what the first had drawn if none was; None if nothing was drawn.
        chains: every chain that has draws, complete or not.
    """

    def __init__(self, message: str, nuts: Nuts | None, chains: Sequence[Chain]) -> None:
        super().__init__(message)
        self.nuts = nuts
        self.chains = tuple(chains)


def sample_nuts(
    laplace: Laplace,
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    num_chains: int = 4,
    num_samples: int = 500,
    num_warmup: int = 150,
    kernel: Literal["nuts", "hmc"] = "nuts",
    tau_prior: tuple[float, float] | Literal["gamma"] | None = None,
    seed: int = 0,
    group: ProcessGroup | None = None,
    deal_chains: bool | None = None,
    num_workers: int = 0,
    folder: Path | None = None,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    progress: bool = True,
) -> Nuts:
    """Draw from the posterior of the last layer by Pyro's NUTS on Laplace-whitened contrasts.

    The target is the density of ``last_layer`` and ``fit_laplace``. With theta = Q eta + a common shift,
    eta = m + L^-T z is walked under an identity metric, and the shift, which softmax cannot see, is drawn from its
    prior exactly. Each chain starts 1.5 times as wide as ``laplace``, has a stream of its own from ``seed``, and runs
    on one thread, so the draws are the same on any number of cores and with any ``num_workers``.

    Args:
        laplace: supplies m, L, tau and the class weights; a refined one whitens best.
        features: phi (N, D) of the training images.
        labels: (N,) whole numbers 0..K-1.
        num_chains, num_samples, num_warmup: C, S and the draws of adaptation.
        kernel: "nuts", or "hmc" with trajectories of length pi/2.
        tau_prior: None keeps laplace's tau; (shape, rate) samples tau ~ Gamma(shape, rate) with the weights, and
            "gamma" means Gamma(1, rate 0.1).
        seed: of all chains.
        group: torch.distributed group; features and labels are this rank's shard and each rank gets the same draws.
        deal_chains: with a group, True gathers all images on every rank and deals the chains out, False lets every rank
            walk every chain on its own shard; None deals where the images take under a quarter of a rank's memory.
        num_workers: processes that run chains side by side; 0 runs them one after another in this one.
        folder: keeps ``chain-0.safetensors``... as each chain finishes; a later call with the same data and settings
            takes them up instead of drawing them again. With a group rank 0 alone keeps them.
        target_accept, max_tree_depth: of the kernel.
        progress: show a bar on a terminal.

    Raises:
        ValueError, TypeError: an argument cannot be used, or ``laplace`` is of other shapes.
        WorkerError: a worker process died; the chains that were complete lie in ``folder``.
        SamplingInterrupted: Ctrl-C; carries what was drawn.

    Source: Hoffman and Gelman (2014); Betancourt (2017), arXiv:1701.02434.
    """
    if deal_chains is not None and group is None:
        raise ValueError(f"deal_chains is {deal_chains} without a process group; give group, or leave it out")
    settings = _check_settings(
        num_chains, kernel, num_samples, num_warmup, seed, target_accept, max_tree_depth, num_workers, group
    )
    num_chains, num_workers = int(num_chains), int(num_workers)
    images = check_images(
        features,
        labels,
        num_classes=laplace.weight_mean.shape[0],
        class_weights=laplace.class_weights,
        group=group,
        facts={
            "num_chains": num_chains,
            "settings": settings,
            "tau_prior": tau_prior,
            "deal_chains": deal_chains,
            "laplace": [laplace.structure, *(f"{x:.4g}" for x in (laplace.prior_precision, laplace.theta_mean.norm()))],
        },
    )
    if group is not None and (fits(images) if deal_chains is None else deal_chains):
        images = gathered(images)
    problem = Problem.of(laplace, images, _check_tau_prior(tau_prior))
    with TemporaryDirectory(prefix="bayescam-") as temporary:
        kept = Path(temporary) if folder is None else Path(folder)
        if group is None:
            chains = run_chains(problem, settings, num_chains, num_workers, kept, progress=progress)
        else:
            chains = run_chains_on_ranks(problem, settings, num_chains, kept, group=group, progress=progress)
    if not all(chain.finished for chain in chains):
        raise _interrupted(chains, num_chains, settings, laplace, problem)
    return _gather(chains, settings, laplace, problem)


def _gather(chains: Sequence[Chain], settings: ChainSettings, laplace: Laplace, problem: Problem) -> Nuts:
    theta = torch.stack([chain.theta.to(laplace.weight_mean) for chain in chains])  # kept ones come from files
    stats = {name: np.stack([chain.stats[name] for chain in chains]) for name in STATISTICS}
    return Nuts(
        Draws(theta[..., :-1].contiguous(), theta[..., -1].contiguous()),
        stats,
        None if problem.tau_prior is None else torch.stack([chain.tau.to(theta) for chain in chains]),
        np.array([chain.warmup_steps for chain in chains]),
        np.array([chain.seconds for chain in chains]),
        settings,
        laplace.class_weights,
        laplace.prior_precision if problem.tau_prior is None else None,
        problem.tau_prior,
    )


def _interrupted(
    chains: Sequence[Chain], num_chains: int, settings: ChainSettings, laplace: Laplace, problem: Problem
) -> SamplingInterrupted:
    whole = [chain for chain in chains if chain.finished]
    begun = [chain for chain in chains if len(chain.theta)]
    kept = whole or begun[:1]
    nuts = _gather(kept, settings, laplace, problem) if kept else None
    drawn = ", ".join(f"chain {c.index}: {len(c.theta)} of {settings.num_samples}" for c in begun) or "no draw yet"
    interrupted = SamplingInterrupted(
        f"interrupted with {len(whole)} of {num_chains} chains complete ({drawn})", nuts, begun
    )
    interrupted.add_note("what was drawn is kept in this error's .nuts and .chains")
    return interrupted


def _check_tau_prior(tau_prior: tuple[float, float] | str | None) -> tuple[float, float] | None:
    if tau_prior is None:
        return None
    pair = DEFAULT_TAU_PRIOR if tau_prior == "gamma" else tau_prior
    if isinstance(pair, str) or len(pair) != 2 or not all(0 < float(x) < float("inf") for x in pair):
        raise ValueError(f"tau_prior must be None, 'gamma' or a positive (shape, rate), got {tau_prior!r}")
    return float(pair[0]), float(pair[1])


def _check_settings(
    num_chains: int,
    kernel: str,
    num_samples: int,
    num_warmup: int,
    seed: int,
    target_accept: float,
    max_tree_depth: int,
    num_workers: int,
    group: Any,
) -> ChainSettings:
    least = {"num_chains": 1, "num_samples": 1, "num_warmup": 1, "seed": 0, "max_tree_depth": 1, "num_workers": 0}
    given = dict(
        num_chains=num_chains,
        num_samples=num_samples,
        num_warmup=num_warmup,
        seed=seed,
        max_tree_depth=max_tree_depth,
        num_workers=num_workers,
    )
    whole = {name: whole_number(value, name, least[name]) for name, value in given.items()}
    if kernel not in ("nuts", "hmc"):
        raise ValueError(f"kernel is {kernel!r}; choose 'nuts' or 'hmc'")
    if not 0 < target_accept < 1:
        raise ValueError(f"target_accept is {target_accept}; it must lie between 0 and 1")
    if group is not None and num_workers:
        raise ValueError("num_workers and group exclude each other; give num_workers=0 with a process group")
    return ChainSettings(
        "hmc" if kernel == "hmc" else "nuts",
        whole["num_samples"],
        whole["num_warmup"],
        whole["seed"],
        float(target_accept),
        whole["max_tree_depth"],
    )
