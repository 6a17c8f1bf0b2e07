"""One chain: from its own seed to draws of theta and their statistics; stored and read back whole."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bayescam.errors import FileFormatError
from bayescam.posterior.nuts_kernel import LastLayerHmc, LastLayerNuts, Transition
from bayescam.posterior.nuts_potential import Potential
from bayescam.storage import load_tensors, save_tensors

STATISTICS = ("lp", "energy", "n_steps", "tree_depth", "acceptance_rate", "step_size", "diverging")
OVERDISPERSION = 1.5


@dataclass(frozen=True)
class ChainSettings:
    """How every chain is run.

    Args:
        kernel: "nuts" or "hmc".
        num_samples, num_warmup: draws kept and draws of adaptation before them.
        seed: of the run; each chain derives its own from it.
        target_accept: acceptance rate aimed at by dual averaging.
        max_tree_depth: doublings of a NUTS trajectory at most.
    """

    kernel: Literal["nuts", "hmc"]
    num_samples: int
    num_warmup: int
    seed: int
    target_accept: float = 0.8
    max_tree_depth: int = 10


@dataclass(frozen=True, eq=False)
class Chain:
    """The draws of one chain, S of them (fewer than asked for if it was interrupted).

    Args:
        index: which chain.
        theta: [weight, bias], (S, K, D+1), float64, the shift included.
        tau: prior precision of each draw, (S,).
        stats: the seven of ``STATISTICS``, each (S,).
        warmup_steps: gradients that warm-up took.
        seconds: wall time.
        finished: False if Ctrl-C cut it short.
    """

    index: int
    theta: Tensor
    tau: Tensor
    stats: dict[str, np.ndarray]
    warmup_steps: int
    seconds: float
    finished: bool

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the chain; ``fingerprint`` says which data and settings it belongs to."""
        tensors = {"theta": self.theta, "tau": self.tau}
        tensors |= {f"stats.{name}": torch.from_numpy(values) for name, values in self.stats.items()}
        metadata = {
            "kind": "chain",
            "fingerprint": fingerprint,
            "index": self.index,
            "warmup_steps": self.warmup_steps,
            "seconds": self.seconds,
            "finished": self.finished,
        }
        save_tensors(path, tensors, metadata)


def load_chain(path: Path, fingerprint: str) -> Chain | None:
    """A chain that ``Chain.save`` wrote for the same data and settings; None if it is of another run.

    Raises:
        FileFormatError: the file is broken or not a chain.
    """
    tensors, metadata = load_tensors(path, kind="chain")
    if metadata.get("fingerprint") != fingerprint:
        return None
    try:
        stats = {name: tensors[f"stats.{name}"].numpy() for name in STATISTICS}
        theta, tau = tensors["theta"], tensors["tau"]
        facts = {name: metadata[name] for name in ("index", "warmup_steps", "seconds", "finished")}
    except KeyError as error:
        raise FileFormatError(f"{path}: a chain without {error}; delete the file and sample again") from error
    return Chain(theta=theta, tau=tau, stats=stats, **facts)


def fingerprint(settings: ChainSettings, facts: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the settings, the plain facts and the bytes of the tensors that define the target."""
    digest = hashlib.sha256(repr((sorted(asdict(settings).items()), sorted(facts.items()))).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def sample_chain(
    potential: Potential,
    settings: ChainSettings,
    index: int,
    *,
    advance: Callable[[int, bool, Transition], None] | None = None,
) -> Chain:
    """Run one chain from an over-dispersed start, on one thread, with random numbers of its own.

    The start is 1.5 times as wide as the whitening Gaussian, so that R-hat can see chains that have not met. One thread
    makes the draws independent of the number of cores. Ctrl-C ends the chain early: ``finished`` is then False.

    Args:
        potential: the target.
        settings: kernel, lengths and seed.
        index: the chain, counted from 0.
        advance: called after every transition with (draw number, is warm-up, transition).
    """
    started = time.perf_counter()
    positions: list[Tensor] = []
    transitions: list[Transition] = []
    warmup_steps, finished = 0, True
    with _one_thread(), _own_stream(settings.seed, index, potential.device), torch.no_grad():
        try:
            kernel, params = _start(potential, settings)
            for i in range(settings.num_warmup + settings.num_samples):
                params = kernel.sample(params)
                if i < settings.num_warmup:
                    warmup_steps += kernel.transition.n_steps
                else:
                    positions.append(params["z"])
                    transitions.append(kernel.transition)
                if advance is not None:
                    advance(i, i < settings.num_warmup, kernel.transition)
        except KeyboardInterrupt:
            finished = False
            positions = positions[: len(transitions)]
        theta, tau, lp = _to_theta(potential, positions, transitions)
    stats = _statistics(transitions, lp)
    return Chain(index, theta, tau, stats, warmup_steps, time.perf_counter() - started, finished)


def _start(potential: Potential, settings: ChainSettings) -> tuple[LastLayerNuts | LastLayerHmc, dict[str, Tensor]]:
    kernel: LastLayerNuts | LastLayerHmc
    if settings.kernel == "nuts":
        kernel = LastLayerNuts(potential, target_accept=settings.target_accept, max_tree_depth=settings.max_tree_depth)
    else:
        kernel = LastLayerHmc(potential, target_accept=settings.target_accept)
    z = OVERDISPERSION * torch.randn(potential.dimension, dtype=torch.float64)
    params = {"z": z.to(potential.device)}
    kernel.initial_params = params
    with torch.enable_grad():
        kernel.setup(settings.num_warmup)
    return kernel, params


def _to_theta(
    potential: Potential, positions: list[Tensor], transitions: list[Transition]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of the whole theta: the contrast part that was walked, and a shift from its posterior, the prior."""
    device = potential.device
    z = torch.stack(positions) if positions else torch.empty(0, potential.dimension, device=device).double()
    values = torch.tensor([t.potential for t in transitions], dtype=torch.float64, device=device)
    theta, tau, lp = potential.unpack(z, values)
    num_classes, width = theta.shape[-2:]
    shift = torch.randn(len(theta), width, dtype=torch.float64).to(device) / tau.sqrt().unsqueeze(-1)
    theta = theta + shift.unsqueeze(-2) / num_classes**0.5
    prior = 0.5 * width * (tau / (2 * torch.pi)).log() - 0.5 * tau * shift.square().sum(-1)
    return theta, tau, lp + prior


def _statistics(transitions: list[Transition], lp: Tensor) -> dict[str, np.ndarray]:
    columns = list(zip(*transitions, strict=True)) if transitions else [()] * len(Transition._fields)
    types = (np.float64, np.float64, np.int64, np.int64, np.float64, np.float64, np.bool_)
    stats: dict[str, np.ndarray] = {
        name: np.asarray(column, dtype=dtype) for name, column, dtype in zip(STATISTICS, columns, types, strict=True)
    }
    return stats | {"lp": lp.cpu().numpy()}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _own_stream(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """A stream for each (seed, chain), in any order and any process; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1))
        yield
