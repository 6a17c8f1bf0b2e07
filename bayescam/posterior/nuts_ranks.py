"""Chains over the ranks of a process group, in one of two ways.

Where every rank can hold all images, the shards are gathered once and the chains are dealt out: rank r runs every
R-th, and nothing is sent while they run. Where not, rank 0 walks every chain, and each evaluation of the potential is a
sum over all ranks' shards: K(D+1)+1 numbers out and as many back a leapfrog step.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from bayescam.parallel import from_first, memory, rank, size
from bayescam.posterior.hierarchical import HierarchicalPotential
from bayescam.posterior.images import TrainingImages, as_features
from bayescam.posterior.nuts_chain import STATISTICS, Chain, ChainSettings, sample_chain
from bayescam.posterior.nuts_potential import WhitenedPotential
from bayescam.posterior.nuts_problem import Problem
from bayescam.posterior.nuts_run import Progress, chain_path, kept_chain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SHARE = 0.25


def fits(images: TrainingImages) -> bool:
    """Whether a copy of all images on every rank takes less than a quarter of the memory, on the poorest machine."""
    need = images.count() * (images.num_features + 2 * images.num_classes) * torch.finfo(images.dtype).bits // 8
    fit = torch.tensor(float(need < _SHARE * memory(images.device)), device=images.device)
    dist.all_reduce(fit, op=dist.ReduceOp.MIN, group=images.group)
    return bool(fit)


def gathered(images: TrainingImages) -> TrainingImages:
    """All images on this rank, in the order of the ranks, as a problem of one process."""
    group = images.group
    own = torch.tensor([len(images.labels)], device=images.device)
    counts = [torch.empty_like(own) for _ in range(size(group))]
    dist.all_gather(counts, own, group=group)
    lengths = [int(count) for count in counts]
    features = as_features(images.features).to(images.device, images.dtype)
    weights = images.image_weights
    return TrainingImages(
        _rows_of_all(features, lengths, group),
        _rows_of_all(images.labels, lengths, group),
        images.num_classes,
        None if weights is None else _rows_of_all(weights, lengths, group),
    )


def _rows_of_all(rows: Tensor, lengths: list[int], group: ProcessGroup | None) -> Tensor:
    whole = rows.new_empty(sum(lengths), *rows.shape[1:])
    for source, part in enumerate(whole.split(lengths)):
        if source == rank(group):
            part.copy_(rows)
        dist.broadcast(part, group_src=source, group=group)
    return whole


def run_chains_on_ranks(
    problem: Problem,
    settings: ChainSettings,
    num_chains: int,
    folder: Path,
    *,
    group: ProcessGroup | None,
    progress: bool,
) -> list[Chain]:
    """All chains in their order, on every rank; rank 0 alone looks for finished ones in ``folder`` and keeps new ones.

    The chains are dealt out if ``problem`` holds all images, and walked by rank 0 with the others' help if it holds a
    shard.

    Raises:
        KeyboardInterrupt: Ctrl-C; what rank 0 had kept is kept.
    """
    dealt = problem.images.group is None
    mark = _mark_of_all(problem, settings, group)
    kept = {i: kept_chain(folder, i, mark) for i in range(num_chains)} if rank(group) == 0 else {}
    missing: list[int] = from_first([i for i, chain in kept.items() if chain is None], group, problem.images.device)
    bar = Progress(settings, num_chains, show=progress)
    chains: list[Chain] = []
    try:
        for index in sorted(set(range(num_chains)) - set(missing)):
            bar.skip()
            chains.append(_from(0, kept.get(index), index, problem, settings, group))
        potential = problem.potential() if missing else None
        ranks = size(group) if dealt else 1
        for begin in range(0, len(missing), ranks):
            heat = missing[begin : begin + ranks]
            assert potential is not None
            own = _own_chain(potential, settings, heat, bar, group, dealt=dealt)
            for source, index in enumerate(heat):
                chain = _from(source, own, index, problem, settings, group)
                chains.append(chain)
                if source != rank(group):
                    bar.skip()
                if rank(group) == 0:
                    chain.save(chain_path(folder, index), mark)
    finally:
        bar.close()
    return sorted(chains, key=lambda chain: chain.index)


def _own_chain(
    potential: WhitenedPotential | HierarchicalPotential,
    settings: ChainSettings,
    heat: list[int],
    bar: Progress,
    group: ProcessGroup | None,
    *,
    dealt: bool,
) -> Chain | None:
    """This rank's chain of a heat, or None; where chains are walked together, rank 0's, which the others serve."""
    lane = rank(group)
    if not dealt and lane > 0:
        potential.likelihood.serve()
    if lane >= len(heat):
        return None
    chain = sample_chain(potential, settings, heat[lane], advance=partial(bar.advance, heat[lane]))
    if not dealt:
        potential.likelihood.release()
    if not chain.finished:
        raise KeyboardInterrupt
    return chain


def _mark_of_all(problem: Problem, settings: ChainSettings, group: ProcessGroup | None) -> str:
    """The problem's fingerprint; over shards that of all of them."""
    mark = problem.fingerprint(settings)
    if problem.images.group is None:
        return mark
    own = torch.tensor(list(bytes.fromhex(mark)), dtype=torch.uint8, device=problem.images.device)
    heard = [torch.empty_like(own) for _ in range(size(group))]
    dist.all_gather(heard, own, group=group)
    return hashlib.sha256(b"".join(bytes(found.tolist()) for found in heard)).hexdigest()


def _from(
    source: int, chain: Chain | None, index: int, problem: Problem, settings: ChainSettings, group: ProcessGroup | None
) -> Chain:
    """The chain of rank ``source`` on every rank, sent as one vector of float64, where its whole numbers are exact."""
    s, cells = settings.num_samples, problem.mean.numel()
    message = torch.empty(s * cells + (1 + len(STATISTICS)) * s + 2, dtype=torch.float64, device=problem.images.device)
    if chain is not None and rank(group) == source:
        stats = [torch.from_numpy(chain.stats[name]) for name in STATISTICS]
        parts = [chain.theta, chain.tau, *stats, torch.tensor([chain.warmup_steps, chain.seconds], dtype=torch.float64)]
        message.copy_(torch.cat([part.to(message).flatten() for part in parts]))
    dist.broadcast(message, group_src=source, group=group)
    theta, tau, *columns, facts = message.split([s * cells, s, *[s] * len(STATISTICS), 2])
    types = {"n_steps": torch.int64, "tree_depth": torch.int64, "diverging": torch.bool}
    found = {
        name: column.to("cpu", types.get(name, torch.float64)).numpy()
        for name, column in zip(STATISTICS, columns, strict=True)
    }
    shape = (s, *problem.mean.shape)
    return Chain(index, theta.reshape(shape), tau.clone(), found, int(facts[0]), float(facts[1]), True)
