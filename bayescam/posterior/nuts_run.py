"""Chains one after another in this process, or side by side in worker processes; each kept in a file as it finishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from bayescam.errors import BayescamError
from bayescam.posterior.nuts_chain import Chain, ChainSettings, load_chain, sample_chain
from bayescam.posterior.nuts_kernel import Transition
from bayescam.posterior.nuts_problem import Problem


class WorkerError(BayescamError, RuntimeError):
    """A process that ran a chain died."""


class Progress:
    """A bar over all transitions of all chains, with step size, divergences and time left."""

    def __init__(self, settings: ChainSettings, num_chains: int, *, show: bool) -> None:
        self._length = settings.num_warmup + settings.num_samples
        self._divergent = 0
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=num_chains * self._length,
            desc=settings.kernel.upper(),
            unit="draw",
            disable=None if show else True,
            mininterval=0.5,
        )

    def advance(self, chain: int, draw: int, warming: bool, transition: Transition) -> None:
        """Count one transition."""
        with self._lock:
            self._divergent += transition.diverging and not warming
            if self._bar.update():
                self._bar.set_postfix_str(
                    f"chain {chain}{' warm-up' if warming else ''} {draw + 1}, step {transition.step_size:.2f}, "
                    f"{transition.n_steps} leapfrogs, {self._divergent} divergent",
                    refresh=False,
                )

    def skip(self) -> None:
        """A chain that was taken from its file."""
        self._bar.update(self._length)

    def close(self) -> None:
        self._bar.close()


def chain_path(folder: Path, index: int) -> Path:
    return folder / f"chain-{index}.safetensors"


def run_chains(
    problem: Problem,
    settings: ChainSettings,
    num_chains: int,
    num_workers: int,
    folder: Path,
    *,
    progress: bool,
) -> list[Chain]:
    """All chains in their order; after Ctrl-C those that have draws, some with ``finished`` False.

    Args:
        problem: the target.
        settings: of every chain.
        num_chains: C.
        num_workers: processes; 0 for none.
        folder: keeps a file for each finished chain, and is asked for chains of an earlier call.
        progress: show a bar on a terminal.
    """
    mark = problem.fingerprint(settings)
    kept = {i: chain for i in range(num_chains) if (chain := kept_chain(folder, i, mark)) is not None}
    bar = Progress(settings, num_chains, show=progress)
    for _ in kept:
        bar.skip()
    missing = [i for i in range(num_chains) if i not in kept]
    try:
        if num_workers and missing:
            drawn = _in_processes(problem, settings, missing, num_workers, folder, mark, bar)
        else:
            drawn = _in_turn(problem, settings, missing, folder, mark, bar)
    finally:
        bar.close()
    return sorted([*kept.values(), *drawn], key=lambda chain: chain.index)


def kept_chain(folder: Path, index: int, mark: str) -> Chain | None:
    """A finished chain that an earlier call with the same data and settings left in ``folder``, or None."""
    path = chain_path(folder, index)
    chain = load_chain(path, mark) if path.is_file() else None
    return chain if chain is not None and chain.finished else None


def _in_turn(
    problem: Problem, settings: ChainSettings, indices: Sequence[int], folder: Path, mark: str, bar: Progress
) -> list[Chain]:
    potential = problem.potential() if indices else None
    chains: list[Chain] = []
    for index in indices:
        assert potential is not None
        chain = sample_chain(potential, settings, index, advance=partial(bar.advance, index))
        chains.append(chain)
        if not chain.finished:
            break
        chain.save(chain_path(folder, index), mark)
    return chains


def _in_processes(
    problem: Problem,
    settings: ChainSettings,
    indices: Sequence[int],
    num_workers: int,
    folder: Path,
    mark: str,
    bar: Progress,
) -> list[Chain]:
    """Each chain in a fresh interpreter that imports bayescam alone: no fork, no pickle, no __main__ guard."""
    target = folder / "problem.safetensors"
    problem.save(target, settings)
    running: dict[int, subprocess.Popen[str]] = {}
    stopping = threading.Event()
    try:
        with ThreadPoolExecutor(num_workers) as pool:
            jobs = [pool.submit(_watch, target, folder, i, running, stopping, bar) for i in indices]
            try:
                reports = [job.result() for job in jobs]
            except KeyboardInterrupt:
                stopping.set()
                for process in list(running.values()):
                    process.send_signal(signal.SIGINT)
                reports = [job.result() for job in jobs]
    finally:
        target.unlink(missing_ok=True)
    died = [report for report in reports if report is not None]
    chains = [load_chain(path, mark) for i in indices if (path := chain_path(folder, i)).is_file()]
    if died and not stopping.is_set():
        done = sum(chain is not None and chain.finished for chain in chains)
        raise WorkerError(
            f"{died[0]}; {done} of {len(indices)} chains are complete in {folder}; call again with the same "
            "folder to go on, with fewer workers if memory ran out"
        )
    return [chain for chain in chains if chain is not None]


def _watch(
    target: Path,
    folder: Path,
    index: int,
    running: dict[int, subprocess.Popen[str]],
    stopping: threading.Event,
    bar: Progress,
) -> str | None:
    """Run one worker to its end, passing on its progress; None, or what went wrong."""
    if stopping.is_set():
        return None
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "bayescam.posterior.nuts_worker", str(target), str(folder), str(index)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        running[index] = process
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            draw, warming, *numbers = json.loads(line)
            bar.advance(index, draw, warming, Transition(*numbers))
        said = process.stderr.read().strip().splitlines()
    del running[index]
    if process.returncode == 0:
        return None
    reason = said[-1] if said else "no message: killed from outside, perhaps for memory"
    return f"the process of chain {index} ended with status {process.returncode} ({reason})"
