"""The Gaussian nearest to the posterior in KL(q || posterior), by variational Newton from Laplace's (Opper and
Archambeau 2009).

With U = -log joint and q = Normal(m, Sigma), ELBO(q) = -E_q[U] + entropy. Bonnet's and Price's theorems give

    dELBO/dm = -E_q[grad U],    dELBO/dSigma = (Sigma^-1 - E_q[Hessian U]) / 2,

so the optimum has E_q[grad U] = 0 and Sigma^-1 = E_q[Hessian U]. U depends on theta through the logits of each
image alone, hence

    E_q[grad U] = sum_n w_n (E[p_n] - y_n) phi~_n^T + tau m,
    E_q[Hessian U] = sum_n w_n E[diag p_n - p_n p_n^T] (x) phi~_n phi~_n^T + tau I,

with expectations over K-dimensional Gaussians. For fixed Sigma the ELBO is concave in m: it is maximised over m
by L-BFGS in coordinates whitened by Sigma. Sigma is a fixed point of weights -> Sigma -> expected weights,
where the weights are, by structure,

    full   E[p_na p_nb], one for every image and pair of classes;
           Sigma^-1 = sum_ab q_ab q_ab^T (x) G_ab(weights) + tau I
    kron   mean_n E[p_na p_nb], the class factor, and E[tr Lambda_n], which weigh the feature factor; their product
           has the trace of E_q[H]. An approximate fixed point: within the family only the mean is optimal.
    diag   the precisions E_q[H_ii], the optimum of the mean-field family

all positive, so the iteration runs in their logarithms, accelerated by Anderson's method (Walker and Ni 2011),
one curvature a step. A step is kept only if the ELBO rises; one that does not is shortened. VBLL (Harrison,
Willes and Snoek 2024) trains a Jensen bound of this ELBO with class-wise covariances by SGD, and IVON (Shen et
al. 2024) a diagonal one; this is post hoc.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bayescam.parallel import size
from bayescam.posterior.covariance import Covariance, DiagCovariance, KronCovariance, contrast_basis
from bayescam.posterior.curvature import feature_gram, full_covariance
from bayescam.posterior.expectations import Moments, NormalRule, expected_loss, logit_scales, moments, normal_rule
from bayescam.posterior.images import TrainingImages, augment

if TYPE_CHECKING:
    from bayescam.posterior.laplace import Laplace

MAX_CURVATURES = 25
_ANDERSON_DEPTH = 6
_SHORTEST_STEP = 1 / 16
_CONVERGED_GAIN = 1e-4
_CONVERGED_CHANGE = 1e-3
_SMALLEST = 1e-30
_POINTS_IN_ALL = 1 << 23


@dataclass(frozen=True, eq=False)
class Refinement:
    """How the refinement went.

    Args:
        elbo: after every step kept the first being the start's.
        curvatures: how many Hessians (or their factors) were built.
        change: rms relative change that one more undamped step would make to the weights, weighed by size: 0 at
        the fixed point.
        rule_error: |ELBO by the rule that made the steps - ELBO by the judge's twice as many other points|, in
        nats.
        converged: whether the ELBO or the weights had stopped changing.
    """

    elbo: tuple[float, ...]
    curvatures: int
    change: float
    rule_error: float
    converged: bool


@dataclass(frozen=True, eq=False)
class _Rules:
    """The rule that makes the steps, and one of other points that judges them: no step can fit its judge."""

    work: NormalRule
    judge: NormalRule


@dataclass(frozen=True, eq=False)
class _State:
    theta: Tensor
    covariance: Covariance
    scales: Tensor
    elbo: float
    log_weights: Tensor
    proposal: Tensor


def refine(laplace: Laplace, images: TrainingImages, *, num_points: int | None = None) -> Laplace:
    """The KL-optimal Gaussian of the same structure, with its ELBO and a record of the steps.

    Args:
        laplace: the start.
        images: the training images it was fitted on.
        num_points: T of the rule; by default 1,024, and fewer where N is so large that errors average out over
        images.
    """
    theta = torch.cat([laplace.weight_mean, laplace.bias_mean[:, None]], dim=1)
    points = num_points or max(128, min(1024, _POINTS_IN_ALL // max(1, images.count())) // 2 * 2)
    rank = laplace.covariance.logit_rank
    rules = _Rules(normal_rule(rank, points), normal_rule(rank, 2 * points, seed=1))
    state = _assess(images, theta, laplace.covariance, rules, laplace.prior_precision, None)
    state, record = _climb(images, state, rules, laplace.prior_precision)
    return _result(laplace, images, state, rules, record)


def _climb(images: TrainingImages, state: _State, rules: _Rules, tau: float) -> tuple[_State, Refinement]:
    """Steps that raise the ELBO under one rule, until it or the weights stop changing."""
    elbos, built, converged = [state.elbo], 0, False
    history: list[tuple[Tensor, Tensor]] = []
    while built < MAX_CURVATURES and not converged:
        kept, step = None, 1.0
        candidate = _anderson(images, state.covariance, history) if len(history) > 1 else state.proposal
        while kept is None and built < MAX_CURVATURES and step >= _SHORTEST_STEP:
            trial = _try(images, state, candidate, rules, tau)
            built += 1
            history = [*history, (trial.log_weights, trial.proposal)][-_ANDERSON_DEPTH - 1 :]
            if trial.elbo >= state.elbo:
                kept = trial
            else:
                step /= 2
                candidate = torch.logaddexp(state.log_weights + math.log1p(-step), state.proposal + math.log(step))
        if kept is None:
            converged = built < MAX_CURVATURES
            break
        gain, state = kept.elbo - state.elbo, kept
        elbos.append(state.elbo)
        converged = gain < _CONVERGED_GAIN or _change(images, state) < _CONVERGED_CHANGE
    return state, Refinement(tuple(elbos), built, _change(images, state), 0.0, converged)


def elbo(images: TrainingImages, theta: Tensor, covariance: Covariance, loss: float, prior_precision: float) -> float:
    """-loss - KL(q || prior) with loss = E_q[-log p(y)], in nats."""
    trace, size = float(covariance.diagonal().sum()), theta.numel()
    quadratic = prior_precision * (float(theta.square().sum()) + trace)
    return -loss - 0.5 * (quadratic - size + covariance.log_det_precision() - size * math.log(prior_precision))


def maximise_mean(
    images: TrainingImages, theta: Tensor, covariance: Covariance, scales: Tensor, rule: NormalRule, tau: float
) -> Tensor:
    """The mean that maximises the ELBO at a fixed covariance, (K, D+1)."""
    norms: list[float] = []

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        moved = theta + covariance.unwhiten(torch.from_numpy(z).to(theta))
        loss, gradient = expected_loss(images, moved, covariance, scales, rule)
        whitened = covariance.whiten_gradient(gradient + tau * moved)
        norms.append(float(whitened.norm()))
        return loss + tau / 2 * float(moved.square().sum()), whitened.cpu().numpy()

    def stop(intermediate_result: object) -> None:
        if norms[-1] < max(_CONVERGED_CHANGE, 0.02 * min(norms[0], 1.0)):
            raise StopIteration

    size = covariance.whiten_gradient(theta).numel()
    options = {"maxcor": 20, "maxiter": 60, "ftol": 0.0, "gtol": _CONVERGED_CHANGE / math.sqrt(size)}
    best = minimize(objective, np.zeros(size), jac=True, method="L-BFGS-B", callback=stop, options=options)
    return theta + covariance.unwhiten(torch.from_numpy(best.x).to(theta))


def _try(images: TrainingImages, state: _State, log_weights: Tensor, rules: _Rules, tau: float) -> _State:
    covariance = _covariance(images, log_weights, state.covariance, tau)
    scales = logit_scales(images, covariance)
    theta = maximise_mean(images, state.theta, covariance, scales, rules.work, tau)
    return _assess(images, theta, covariance, rules, tau, log_weights, scales)


def _assess(
    images: TrainingImages,
    theta: Tensor,
    covariance: Covariance,
    rules: _Rules,
    tau: float,
    log_weights: Tensor | None,
    scales: Tensor | None = None,
) -> _State:
    scales = logit_scales(images, covariance) if scales is None else scales
    loss, _ = expected_loss(images, theta, covariance, scales, rules.judge)
    proposal = _log_weights(images, covariance, moments(images, theta, covariance, scales, rules.work), tau)
    bound = elbo(images, theta, covariance, loss, tau)
    return _State(theta, covariance, scales, bound, proposal if log_weights is None else log_weights, proposal)


def _log_weights(images: TrainingImages, covariance: Covariance, found: Moments, tau: float) -> Tensor:
    """The logarithms of the weights that determine a covariance of this structure, in one vector."""
    if found.products is not None:
        weights = found.products.flatten()
    elif found.summed_products is not None:
        weights = torch.cat([found.summed_products / images.weight(), found.spread.double()])
    else:
        weights = torch.zeros_like(covariance.diagonal())
        for span, phi in images.chunks():
            variance = found.mean[span] - found.square[span]
            if images.image_weights is not None:
                variance = variance * images.image_weights[span, None].to(variance)
            weights += (variance.T @ augment(phi).square()).double()
        weights = (images.total(weights) + tau).flatten()
    return weights.double().clamp(min=_SMALLEST).log()


def _covariance(images: TrainingImages, log_weights: Tensor, like: Covariance, tau: float) -> Covariance:
    """The covariance that a vector of log weights determines."""
    weights = log_weights.exp()
    if isinstance(like, DiagCovariance):
        return DiagCovariance(weights.reshape(like.precision.shape).clamp(min=tau), tau)
    if isinstance(like, KronCovariance):
        return _kron(images, weights, tau)
    pairs = images.num_classes * (images.num_classes - 1) // 2
    table = weights.clamp(max=0.25).reshape(-1, pairs).to(images.dtype)
    return full_covariance(images, lambda span, _: table[span], tau)


def _kron(images: TrainingImages, weights: Tensor, tau: float) -> KronCovariance:
    """B = sum_ab beta_ab (e_a - e_b)(e_a - e_b)^T and A = sum_n w_n s_n phi~ phi~^T / mean s, of E_q[H]'s trace."""
    k = images.num_classes
    a, b = torch.triu_indices(k, k, 1, device=weights.device)
    beta, spread = weights[: len(a)], weights[len(a) :]
    laplacian = weights.new_zeros(k, k)
    laplacian[a, b] = -beta
    laplacian += laplacian.T.clone()
    laplacian -= torch.diag(laplacian.sum(1))
    own = spread if images.image_weights is None else spread * images.image_weights
    mean = float(images.total(own.sum().reshape(1))) / images.weight()
    values, vectors = torch.linalg.eigh(feature_gram(images, spread) / mean)
    unit = torch.ones(k - 1).to(values)
    bare = KronCovariance(contrast_basis(k, like=values), unit, vectors, values.clamp(min=0), tau)
    return bare.with_classes(laplacian, 1.0)


def _anderson(images: TrainingImages, covariance: Covariance, history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson's extrapolation of log weights x -> g(x): the combination of past steps with the least residual."""
    points = torch.stack([x for x, _ in history], 1)
    values = torch.stack([g for _, g in history], 1)
    residual = values - points
    sizes = _once(images, covariance, (points[:, -1].exp() + values[:, -1].exp()) / 2).unsqueeze(1)
    change = residual.diff(dim=1)
    system = images.total(
        torch.cat([change, residual[:, -1:]], 1).T @ (sizes * torch.cat([change, residual[:, -1:]], 1))
    )
    mixing = torch.linalg.lstsq(system[:-1, :-1].cpu(), system[:-1, -1:].cpu(), driver="gelsd").solution.to(system)
    return values[:, -1] - (values.diff(dim=1) @ mixing).squeeze(1)


def _once(images: TrainingImages, covariance: Covariance, sizes: Tensor) -> Tensor:
    """Sizes of the weights, those of no single image divided by the ranks, which hold them all alike."""
    pairs = images.num_classes * (images.num_classes - 1) // 2
    common = {"full": 0, "kron": pairs, "diag": len(sizes)}[covariance.structure]
    return torch.cat([sizes[:common] / size(images.group), sizes[common:]])


def _change(images: TrainingImages, state: _State) -> float:
    """sqrt of the size-weighted mean of squared log changes that one more step would make."""
    sizes = _once(images, state.covariance, state.proposal.exp())
    sums = torch.stack([(sizes * (state.proposal - state.log_weights).square()).sum(), sizes.sum()])
    squared, total = images.total(sums).tolist()
    return math.sqrt(squared / total)


def _result(laplace: Laplace, images: TrainingImages, state: _State, rules: _Rules, record: Refinement) -> Laplace:
    loss, gradient = expected_loss(images, state.theta, state.covariance, state.scales, rules.work)
    bound = elbo(images, state.theta, state.covariance, loss, laplace.prior_precision)
    gradient = gradient + laplace.prior_precision * state.theta
    notes = laplace.notes
    if not record.converged:
        notes = (*notes, f"refinement stopped after {record.curvatures} curvatures with the ELBO still rising")
    return replace(
        laplace,
        weight_mean=state.theta[:, :-1].contiguous(),
        bias_mean=state.theta[:, -1].contiguous(),
        covariance=state.covariance,
        refined=True,
        elbo=state.elbo,
        gradient_norm=float(gradient.norm()),
        newton_decrement=float(state.covariance.whiten_gradient(gradient).norm()),
        notes=notes,
        refinement=replace(record, rule_error=abs(bound - state.elbo)),
    )
