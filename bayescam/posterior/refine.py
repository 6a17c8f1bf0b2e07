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
one curvature a step. ELBO, gradient and weights come from one rule (``expectations``). A step is kept only if the
ELBO rises; one that does not is followed by a plain step, then by shorter ones. The end is where an undamped step
moves the mean by less than a quarter of a posterior sd (the length of the whole step, over all parameters), changes
the sds of the images' margins by less than 1 % (rms) and the ELBO by less than .05 nats. VBLL (Harrison, Willes and
Snoek 2024) trains a Jensen bound of this ELBO with class-wise covariances by SGD, and IVON (Shen et al. 2024) a
diagonal one; this is post hoc.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayescam.parallel import size
from bayescam.posterior.covariance import Covariance, DiagCovariance, KronCovariance, contrast_basis
from bayescam.posterior.curvature import feature_gram, full_covariance
from bayescam.posterior.expectations import LogitRule, Moments, expected_loss, logit_rule, logit_scales, moments
from bayescam.posterior.images import TrainingImages, augment
from bayescam.posterior.lbfgs import minimise

if TYPE_CHECKING:
    from bayescam.posterior.laplace import Laplace

MAX_CURVATURES = 25
TOLERANCES = (0.25, 0.01, 0.05)
_ANDERSON_DEPTH = 6
_SHORTEST_STEP = 1 / 16
_FURTHEST = 5.0
_MEAN_GRADIENT = (5e-3, 5e-2)
_EVALUATIONS = 80
_SMALLEST = 1e-30
_POINTS = ((10_000, 128), (2_000, 256), (0, 512))


@dataclass(frozen=True, eq=False)
class Refinement:
    """How the refinement went, and how far it is from its fixed point.

    Args:
        elbo: after every step kept, the first being the start's.
        curvatures: how many Hessians (or their factors) were built.
        mean_change: what the last undamped step changed: the mean, sqrt(d^T Sigma^-1 d) in posterior sds.
        sd_change: likewise the logarithms of the sds of the training images' margins f_k - f_y, rms.
        elbo_change: likewise the ELBO, in nats.
        rule_error: |ELBO by this rule - ELBO by one of twice as many other points|, in nats.
        converged: whether the three changes were below ``TOLERANCES``, the step being a plain one.
    """

    elbo: tuple[float, ...]
    curvatures: int
    mean_change: float
    sd_change: float
    elbo_change: float
    rule_error: float
    converged: bool


@dataclass(frozen=True, eq=False)
class _State:
    """A Gaussian, its ELBO and gradient, the log weights that made its covariance and those expected under it."""

    theta: Tensor
    covariance: Covariance
    scales: Tensor
    elbo: float
    gradient: Tensor
    log_weights: Tensor
    proposal: Tensor


@dataclass(frozen=True, eq=False)
class _Problem:
    images: TrainingImages
    rule: LogitRule
    tau: float


def refine(laplace: Laplace, images: TrainingImages, *, num_points: int | None = None) -> Laplace:
    """The KL-optimal Gaussian of the same structure, with its ELBO and a record of the steps.

    Args:
        laplace: the start.
        images: the training images it was fitted on.
        num_points: T of the rule for what pairs of classes leave over; from 512 to 128, the fewer the more images
            there are for errors to average out over.
    """
    num_points = num_points or next(points for least, points in _POINTS if images.count() >= least)
    rule = logit_rule(images, laplace.theta_mean, laplace.covariance, num_points, 0)
    problem = _Problem(images, rule, laplace.prior_precision)
    scales = logit_scales(images, laplace.covariance)
    state, record = _climb(problem, _assess(problem, laplace.theta_mean, laplace.covariance, scales, None))
    other = logit_rule(images, laplace.theta_mean, laplace.covariance, 2 * num_points, 1)
    loss, _ = expected_loss(images, state.theta, state.covariance, state.scales, other)
    bound = elbo(images, state.theta, state.covariance, loss, problem.tau)
    record = replace(record, rule_error=abs(bound - state.elbo))
    return _result(laplace, state, record)


def _climb(problem: _Problem, state: _State) -> tuple[_State, Refinement]:
    """Steps that raise the ELBO, until an undamped one changes nothing that matters."""
    elbos = [state.elbo]
    history: list[tuple[Tensor, Tensor]] = []
    candidate, plain, step, built = state.proposal, True, 1.0, 0
    while True:
        trial = _try(problem, state, candidate)
        built += 1
        history = [*history, (trial.log_weights, trial.proposal)][-_ANDERSON_DEPTH - 1 :]
        if step == 1.0:
            change = _change(problem.images, state, trial)
        settled = all(abs(value) < limit for value, limit in zip(change, TOLERANCES, strict=True))
        converged = settled and plain and step == 1.0
        kept = trial.elbo >= state.elbo
        if kept:
            state, step = trial, 1.0
            elbos.append(state.elbo)
            plain = settled or len(history) < 2
        else:
            plain, step = True, step / 2 if plain else 1.0
        if converged or built == MAX_CURVATURES or step < _SHORTEST_STEP:
            return state, Refinement(tuple(elbos), built, *change, 0.0, converged)
        if not plain:
            candidate = _anderson(problem.images, state.covariance, history)
        elif step == 1.0:
            candidate = state.proposal
        else:
            candidate = torch.logaddexp(state.log_weights + math.log1p(-step), state.proposal + math.log(step))


def _change(images: TrainingImages, before: _State, after: _State) -> tuple[float, float, float]:
    """Of the mean in posterior sds, of the log sds of the images' margins (rms), and of the ELBO."""
    old, new = (state.covariance.relative_variance(state.scales, images.labels) for state in (before, after))
    own = torch.nn.functional.one_hot(images.labels, images.num_classes).bool() | (old <= 0) | (new <= 0)
    ratio = (new / old).masked_fill(own, 1.0).double().log() / 2
    sums = torch.stack([ratio.square().sum(), (~own).sum().to(ratio)])
    squared, count = images.total(sums).tolist()
    moved = after.covariance.distance(after.theta - before.theta)
    return moved, math.sqrt(squared / max(count, 1.0)), after.elbo - before.elbo


def elbo(images: TrainingImages, theta: Tensor, covariance: Covariance, loss: float, prior_precision: float) -> float:
    """-loss - KL(q || prior) with loss = E_q[-log p(y)], in nats."""
    trace, size = float(covariance.diagonal().sum()), theta.numel()
    quadratic = prior_precision * (float(theta.square().sum()) + trace)
    return -loss - 0.5 * (quadratic - size + covariance.log_det_precision() - size * math.log(prior_precision))


def maximise_mean(
    images: TrainingImages, theta: Tensor, covariance: Covariance, scales: Tensor, rule: LogitRule, tau: float
) -> Tensor:
    """The mean that maximises the ELBO at a fixed covariance, (K, D+1), by L-BFGS in whitened coordinates.

    It stops where the whitened gradient, the distance left in posterior sds, is a fiftieth of the first, within
    .005 and .05.
    """
    first = math.inf

    def objective(z: Tensor) -> tuple[float, Tensor]:
        moved = theta + covariance.unwhiten(z)
        loss, gradient = expected_loss(images, moved, covariance, scales, rule)
        return loss + tau / 2 * float(moved.square().sum()), covariance.whiten_gradient(gradient + tau * moved)

    def near(norm: float) -> bool:
        nonlocal first
        first = norm if first == math.inf else first
        least, most = _MEAN_GRADIENT
        return norm < min(max(0.02 * first, least), most)

    origin = torch.zeros_like(covariance.whiten_gradient(theta))
    found = minimise(objective, origin, near=near, evaluations=_EVALUATIONS)
    return theta + covariance.unwhiten(found)


def _try(problem: _Problem, state: _State, log_weights: Tensor) -> _State:
    images, rule, tau = problem.images, problem.rule, problem.tau
    covariance = _covariance(images, log_weights, state.covariance, tau)
    scales = logit_scales(images, covariance)
    theta = maximise_mean(images, state.theta, covariance, scales, rule, tau)
    return _assess(problem, theta, covariance, scales, log_weights)


def _assess(
    problem: _Problem, theta: Tensor, covariance: Covariance, scales: Tensor, log_weights: Tensor | None
) -> _State:
    images, tau = problem.images, problem.tau
    loss, gradient = expected_loss(images, theta, covariance, scales, problem.rule)
    expected = moments(images, theta, covariance, scales, problem.rule)
    proposal = _log_weights(images, covariance, expected, tau)
    made_by = proposal if log_weights is None else log_weights
    bound = elbo(images, theta, covariance, loss, tau)
    return _State(theta, covariance, scales, bound, gradient + tau * theta, made_by, proposal)


def _log_weights(images: TrainingImages, covariance: Covariance, found: Moments, tau: float) -> Tensor:
    """The logarithms of the weights that determine a covariance of this structure, in one vector."""
    if found.products is not None:
        weights = found.products.flatten()
    elif found.summed_products is not None:
        weights = torch.cat([found.summed_products / images.weight(), found.spread.double()])
    else:
        weights = torch.zeros_like(covariance.diagonal())
        for span, phi in images.chunks():
            variance = found.variances[span]
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
    return values[:, -1] - (values.diff(dim=1) @ mixing).squeeze(1).clamp(-_FURTHEST, _FURTHEST)


def _once(images: TrainingImages, covariance: Covariance, sizes: Tensor) -> Tensor:
    """Sizes of the weights, those of no single image divided by the ranks, which hold them all alike."""
    pairs = images.num_classes * (images.num_classes - 1) // 2
    common = {"full": 0, "kron": pairs, "diag": len(sizes)}[covariance.structure]
    return torch.cat([sizes[:common] / size(images.group), sizes[common:]])


def _result(laplace: Laplace, state: _State, record: Refinement) -> Laplace:
    notes = laplace.notes
    if not record.converged:
        notes = (
            *notes,
            f"refinement stopped after {record.curvatures} curvatures short of its fixed point: one step moved the "
            f"mean by {record.mean_change:.2g} sds and the ELBO by {record.elbo_change:.2g} nats",
        )
    return replace(
        laplace,
        weight_mean=state.theta[:, :-1].contiguous(),
        bias_mean=state.theta[:, -1].contiguous(),
        covariance=state.covariance,
        refined=True,
        elbo=state.elbo,
        gradient_norm=float(state.gradient.norm()),
        newton_decrement=float(state.covariance.whiten_gradient(state.gradient).norm()),
        notes=notes,
        refinement=record,
    )
