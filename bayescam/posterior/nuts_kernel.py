"""Pyro's NUTS and HMC on one flat vector "z" with an identity metric: the same draws, a fraction of the overhead.

Pyro's own ``sample`` walks dictionaries of sites through ``pyro.sample``, autograd and 0-dim tensors at every leapfrog
step, which costs several times the likelihood of a small last layer. The two subclasses keep Pyro's set-up, step-size
search and dual averaging, and take the random numbers in Pyro's order, so that their draws equal the parent class's
(``tests/posterior/test_nuts_kernel.py``); they also keep the statistics that Pyro drops. NUTS differs in one thing: it
looks for U-turns across neighbouring halves of a trajectory too, as Stan does since 2.21. Whitening makes all periods
nearly equal, and where a doubling spans a whole period the two ends have met again and Pyro's check sees no turn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.infer.mcmc import HMC, NUTS
from torch import Tensor

from bayescam.posterior.nuts_potential import Potential

MAX_ENERGY_ERROR = 1000.0  # Pyro's and Stan's threshold of a divergence


class Transition(NamedTuple):
    """What one draw cost and how it went; the names are ArviZ's.

    ``energy`` is the Hamiltonian of the accepted point, ``tree_depth`` the number of doublings begun,
    ``acceptance_rate`` the mean Metropolis probability over the trajectory (Stan's accept_stat).
    """

    potential: float
    energy: float
    n_steps: int
    tree_depth: int
    acceptance_rate: float
    step_size: float
    diverging: bool


class State(NamedTuple):
    """A point of phase space: position, momentum and the gradient at the position, each (M,)."""

    z: Tensor
    r: Tensor
    gradient: Tensor


class Point(NamedTuple):
    """A candidate draw."""

    z: Tensor
    gradient: Tensor
    potential: float
    energy: float


class Span(NamedTuple):
    """A stretch of a trajectory: its ends in order of time, and the sum of its momenta."""

    left: State
    right: State
    r_sum: Tensor


class Tree(NamedTuple):
    """A trajectory built by doubling; ``log_weight`` is the log of its summed density relative to the start."""

    left: State
    right: State
    proposal: Point
    r_sum: Tensor
    log_weight: float
    turning: bool
    diverging: bool
    sum_accept: float
    n_steps: int


def leapfrog(potential: Potential, state: State, step: float) -> tuple[State, float]:
    """One velocity-Verlet step under the identity metric; the new state and its potential energy."""
    r = torch.add(state.r, state.gradient, alpha=-0.5 * step)
    z = torch.add(state.z, r, alpha=step)
    value, gradient = potential.value_and_gradient(z)
    return State(z, r.add_(gradient, alpha=-0.5 * step), gradient), value


def _hamiltonian(value: float, r: Tensor) -> float:
    energy = value + 0.5 * torch.dot(r, r).item()
    return math.inf if math.isnan(energy) else energy


def _log_add(a: float, b: float) -> float:
    low, high = (a, b) if a < b else (b, a)
    return high if high == -math.inf else high + math.log1p(math.exp(low - high))


def _is_turning(left: Tensor, right: Tensor, r_sum: Tensor) -> bool:
    rho = r_sum - 0.5 * (left + right)
    return torch.dot(left, rho).item() <= 0 or torch.dot(right, rho).item() <= 0


def _turns_across(earlier: Tree | Span, later: Tree | Span) -> bool:
    """Whether a half of a trajectory with its neighbour's nearest point makes a U-turn: Stan's two further checks."""
    meets, met = later.left.r, earlier.right.r
    return _is_turning(earlier.left.r, meets, earlier.r_sum + meets) or _is_turning(
        met, later.right.r, met + later.r_sum
    )


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


class _Walk:
    """What both kernels share: the momentum, the cache of Pyro's kernel and the end of a draw."""

    transition: Transition

    def _start(self, params: dict[str, Tensor]) -> tuple[State, float, float]:
        z, value, gradient = self._fetch_from_cache()  # type: ignore[attr-defined]
        if z is None:
            potential, gradient = self.potential_fn.value_and_gradient(params["z"])  # type: ignore[attr-defined]
            self._cache(params, params["z"].new_tensor(potential), {"z": gradient})  # type: ignore[attr-defined]
            z, value, gradient = self._fetch_from_cache()  # type: ignore[attr-defined]
        position = z["z"].detach()
        r = torch.normal(torch.zeros_like(position), torch.ones_like(position))
        potential = float(value)
        return State(position, r, gradient["z"]), potential, _hamiltonian(potential, r)

    def _finish(self, point: Point, tree: tuple[int, int, float, bool], accepted: bool) -> dict[str, Tensor]:
        n_steps, depth, accept, diverging = tree
        step_size = float(self.step_size)  # type: ignore[attr-defined]
        self.transition = Transition(point.potential, point.energy, n_steps, depth, accept, step_size, diverging)
        z, gradient = {"z": point.z}, {"z": point.gradient}
        if accepted:
            self._cache(z, point.z.new_tensor(point.potential), gradient)  # type: ignore[attr-defined]
        self._t += 1
        if self._t > self._warmup_steps:  # type: ignore[attr-defined]
            n = self._t - self._warmup_steps  # type: ignore[attr-defined]
            self._accept_cnt = getattr(self, "_accept_cnt", 0) + accepted
            if diverging:
                self._divergences.append(n - 1)  # type: ignore[attr-defined]
        else:
            n = self._t
            self._adapter.step(self._t, z, point.z.new_tensor(accept), gradient)  # type: ignore[attr-defined]
        self._mean_accept_prob += (accept - self._mean_accept_prob) / n
        return dict(z)

    _t: int
    _mean_accept_prob: float


class LastLayerNuts(_Walk, NUTS):
    """Pyro's multinomial NUTS (Betancourt 2017) for a ``Potential`` over the one site "z".

    Args:
        potential: U with its closed-form gradient.
        target_accept: the acceptance rate that dual averaging aims at.
        max_tree_depth: doublings at most.
    """

    def __init__(self, potential: Potential, *, target_accept: float = 0.8, max_tree_depth: int = 10) -> None:
        super().__init__(
            potential_fn=potential,
            adapt_mass_matrix=False,
            target_accept_prob=target_accept,
            max_tree_depth=max_tree_depth,
        )

    def _leaf(self, state: State, direction: int, start_energy: float) -> Tree:
        step = self.step_size if direction == 1 else -self.step_size
        new, value = leapfrog(self.potential_fn, state, step)
        energy = _hamiltonian(value, new.r)
        log_weight = start_energy - energy
        return Tree(
            left=new,
            right=new,
            proposal=Point(new.z, new.gradient, value, energy),
            r_sum=new.r,
            log_weight=log_weight,
            turning=False,
            diverging=-log_weight > MAX_ENERGY_ERROR,
            sum_accept=min(1.0, _exp(log_weight)),
            n_steps=1,
        )

    def _subtree(self, state: State, direction: int, depth: int, start_energy: float) -> Tree:
        """2^depth leapfrog steps from ``state`` in one direction, cut short where they turn or diverge."""
        if depth == 0:
            return self._leaf(state, direction, start_energy)
        first = self._subtree(state, direction, depth - 1, start_energy)
        if first.turning or first.diverging:
            return first
        edge = first.right if direction == 1 else first.left
        second = self._subtree(edge, direction, depth - 1, start_energy)
        log_weight = _log_add(first.log_weight, second.log_weight)
        take_second = 0.0 if log_weight == -math.inf else math.exp(second.log_weight - log_weight)
        chosen = second if _bernoulli(take_second) else first
        earlier, later = (first, second) if direction == 1 else (second, first)
        left, right, r_sum = earlier.left, later.right, first.r_sum + second.r_sum
        turning = second.turning or _is_turning(left.r, right.r, r_sum) or _turns_across(earlier, later)
        return Tree(
            left=left,
            right=right,
            proposal=chosen.proposal,
            r_sum=r_sum,
            log_weight=log_weight,
            turning=turning,
            diverging=second.diverging,
            sum_accept=first.sum_accept + second.sum_accept,
            n_steps=first.n_steps + second.n_steps,
        )

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One draw: double the trajectory until it turns, choosing a point with biased progressive sampling."""
        start, potential, start_energy = self._start(params)
        walked = Span(start, start, start.r)
        point = Point(start.z, start.gradient, potential, start_energy)
        log_weight, sum_accept, n_steps, depth = 0.0, 0.0, 0, 0
        accepted = diverging = False
        while depth < self._max_tree_depth:
            direction = int(_bernoulli(0.5))
            edge = walked.right if direction == 1 else walked.left
            tree = self._subtree(edge, direction, depth, start_energy)
            depth += 1
            sum_accept, n_steps = sum_accept + tree.sum_accept, n_steps + tree.n_steps
            diverging = tree.diverging
            if tree.diverging or tree.turning:
                break
            if torch.rand((), dtype=torch.float64).item() < _exp(tree.log_weight - log_weight):
                accepted, point = True, tree.proposal
            earlier, later = (walked, tree) if direction == 1 else (tree, walked)
            crossing = _turns_across(earlier, later)
            walked = Span(earlier.left, later.right, earlier.r_sum + later.r_sum)
            if crossing or _is_turning(walked.left.r, walked.right.r, walked.r_sum):
                break
            log_weight = _log_add(log_weight, tree.log_weight)
        return self._finish(point, (n_steps, depth, sum_accept / n_steps, diverging), accepted)


class LastLayerHmc(_Walk, HMC):
    """Pyro's HMC for a ``Potential`` over the one site "z".

    Args:
        potential: U with its closed-form gradient.
        target_accept: the acceptance rate that dual averaging aims at.
        trajectory_length: integration time; pi/2 is a quarter of the period of a whitened Gaussian.
    """

    def __init__(
        self, potential: Potential, *, target_accept: float = 0.8, trajectory_length: float = 0.5 * math.pi
    ) -> None:
        super().__init__(
            potential_fn=potential,
            adapt_mass_matrix=False,
            target_accept_prob=target_accept,
            trajectory_length=trajectory_length,
        )

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One draw: a trajectory of fixed length, accepted by Metropolis' rule."""
        state, potential, start_energy = self._start(params)
        point = Point(state.z, state.gradient, potential, start_energy)
        n_steps, value = self.num_steps, potential
        for _ in range(n_steps):
            state, value = leapfrog(self.potential_fn, state, self.step_size)
        energy = _hamiltonian(value, state.r)
        accept = min(1.0, _exp(start_energy - energy))
        accepted = torch.rand((), dtype=torch.float64).item() < accept
        if accepted:
            point = Point(state.z, state.gradient, value, energy)
        diverging = energy - start_energy > MAX_ENERGY_ERROR
        return self._finish(point, (n_steps, 0, accept, diverging), accepted)


def _bernoulli(probability: float) -> bool:
    return torch.bernoulli(torch.tensor(probability, dtype=torch.float64)).item() == 1.0
