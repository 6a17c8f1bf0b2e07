"""The Gaussian nearest to the posterior in KL(q || posterior), by variational Newton from Laplace's (Opper and
Archambeau 2009).

With U = -log joint and q = Normal(m, Sigma), ELBO(q) = -E_q[U] + entropy. Bonnet's and Price's theorems give

    dELBO/dm = -E_q[grad U],    dELBO/dSigma = (Sigma^-1 - E_q[Hessian U]) / 2,

so the optimum has E_q[grad U] = 0 and Sigma^-1 = E_q[Hessian U]. U depends on theta through the logits of each
image alone, hence

    E_q[grad U] = sum_n w_n (E[p_n] - y_n) phi~_n^T + tau m,
    E_q[Hessian U] = sum_n w_n E[diag p_n - p_n p_n^T] (x) phi~_n phi~_n^T + tau I,

with expectations over K-dimensional Gaussians. For fixed Sigma the ELBO is concave in m: it is maximised over m by
L-BFGS in coordinates whitened by Sigma. What determines Sigma^-1 = H + tau I, its natural parameters, is by structure

    full   E[p_na p_nb], one for every image and pair of classes: H = sum_ab q_ab q_ab^T (x) G_ab
    kron   the factors of H = B (x) A; proposed are those of E_q[H]'s projection onto the family (``kronecker``)
    diag   the precisions E_q[H_ii] + tau themselves

and a step of length s moves them from where they are towards what is expected under q: a natural-gradient step (Khan
and Lin 2017), whose fixed point is the optimum within each family. Newton's whole step, s = 1, overshoots: where the
variance of a confident image's logits shrinks, so does its E[p_a p_b]. From Laplace's, far away, the first two steps
are whole; the later ones are half as long for "full", 0.7 for "kron", and whole for "diag", whose parameters average
over images. Two steps in a row show by the log sds of the images' margins how strongly the iteration pulls: if the
second is (1 - s L) of the first, the next is at most 2 / (1 + L) long, which shrinks pulls of 1 and of L > 1 alike. A
step is kept only if the ELBO rises; else it is halved.

The likelihood is log-concave, so for "full" and "diag" the ELBO is jointly concave in m and Sigma's Cholesky factor
(Challis and Barber 2013): there is one fixed point, the best Gaussian of all. For "kron" it is a local optimum.

ELBO, gradient and expectations come from one rule (``expectations``). The end is where a step, divided by its length,
moves the mean by less than a quarter of a posterior sd (over all parameters), changes the sds of the images'
margins by less than 1 % (rms) and the ELBO by less than .05 nats. VBLL (Harrison, Willes and Snoek 2024) trains a
Jensen bound of this ELBO with class-wise covariances by SGD, and IVON (Shen et al. 2024) a diagonal one; this is post
hoc.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayescam.parallel import memory
from bayescam.posterior.covariance import Covariance, DiagCovariance, KronCovariance
from bayescam.posterior.curvature import (
    class_curvature,
    feature_gram,
    full_covariance,
    kron_covariance,
    probabilities_at,
)
from bayescam.posterior.expectations import LogitRule, Moments, expected_loss, logit_rule, logit_scales, moments
from bayescam.posterior.images import TrainingImages, augment
from bayescam.posterior.kronecker import covariance_of, projected_factors
from bayescam.posterior.lbfgs import minimise

if TYPE_CHECKING:
    from bayescam.posterior.laplace import Laplace

MAX_CURVATURES = 25
TOLERANCES = (0.25, 0.01, 0.05)
_RULE_ERROR = 0.2
_STOPPED = "refinement stopped"
_UNSURE = "the rule of points leaves"
_WHOLE_STEPS = 2
_LATER_STEP = {"full": 0.5, "kron": 0.7, "diag": 1.0}
_SHORTEST_STEP = 1 / 16
_MEAN_GRADIENT = (5e-3, 5e-2)
_EVALUATIONS = 80
_POINTS = ((10_000, 128), (2_000, 256), (100, 512), (0, 2_048))


@dataclass(frozen=True, eq=False)
class Refinement:
    """How the refinement went, and how far it is from its fixed point.

    Args:
        elbo: after every step kept, the first being the start's.
        curvatures: how many Hessians (or their factors) were built.
        mean_change: what the last step, divided by its length, changed: the mean, sqrt(d^T Sigma^-1 d) in posterior
            sds.
        sd_change: likewise the logarithms of the sds of the training images' margins f_k - f_y, rms.
        elbo_change: likewise the ELBO, in nats.
        rule_error: |ELBO by this rule - ELBO by one of eight times as many other points|, in nats.
        converged: whether the three changes were below ``TOLERANCES``.
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
    """A Gaussian, its ELBO and gradient, its covariance's natural parameters and those expected under it."""

    theta: Tensor
    covariance: Covariance
    scales: Tensor
    elbo: float
    gradient: Tensor
    natural: Tensor
    proposal: Tensor


@dataclass(frozen=True, eq=False)
class _Problem:
    images: TrainingImages
    rule: LogitRule
    tau: float
    metric: Covariance | None


def refine(laplace: Laplace, images: TrainingImages, *, num_points: int | None = None) -> Laplace:
    """The KL-optimal Gaussian of the same structure, with its ELBO and a record of the steps.

    Args:
        laplace: the start.
        images: the training images it was fitted on.
        num_points: T of the rule for what pairs of classes leave over; from 2,048 to 128, the fewer the more images
            there are for errors to average out over.

    Raises:
        ValueError: another number of images than the posterior was fitted to.
    """
    count = images.count()
    if count != laplace.num_train:
        raise ValueError(f"features holds {count} images, the posterior was fitted to {laplace.num_train}; give those")
    if num_points is None:
        num_points = next(points for least, points in _POINTS if count >= least)
    _check_memory(images, laplace.structure)
    rule = logit_rule(images, laplace.theta_mean, laplace.covariance, num_points, 0)
    problem = _Problem(images, rule, laplace.prior_precision, _metric(images, laplace))
    scales = logit_scales(images, laplace.covariance)
    state, record = _climb(problem, _assess(problem, laplace.theta_mean, laplace.covariance, scales, None))
    other = logit_rule(images, laplace.theta_mean, laplace.covariance, 8 * num_points, 1)
    loss, _ = expected_loss(images, state.theta, state.covariance, state.scales, other)
    bound = elbo(images, state.theta, state.covariance, loss, problem.tau)
    record = replace(record, rule_error=abs(bound - state.elbo))
    return agreed(_result(laplace, state, record, num_points), images)


def agreed(laplace: Laplace, images: TrainingImages) -> Laplace:
    """Rank 0's posterior on every rank."""
    if images.group is None:
        return laplace
    return replace(
        laplace,
        weight_mean=images.agreed(laplace.weight_mean.contiguous()),
        bias_mean=images.agreed(laplace.bias_mean.contiguous()),
        covariance=laplace.covariance.mapped(lambda value: images.agreed(value.contiguous())),
        log_evidence=images.agreed_number(laplace.log_evidence),
        gradient_norm=images.agreed_number(laplace.gradient_norm),
        newton_decrement=images.agreed_number(laplace.newton_decrement),
    )


def _metric(images: TrainingImages, laplace: Laplace) -> Covariance | None:
    """For "diag" the Kronecker covariance at the start; the others are metrics themselves."""
    if laplace.structure != "diag":
        return None
    curvature = class_curvature(images, probabilities_at(laplace.theta_mean, images))
    return kron_covariance(feature_gram(images), curvature, laplace.prior_precision, images.weight())


def _check_memory(images: TrainingImages, structure: str) -> None:
    """Refuse expectations that this machine's memory cannot hold: the pairs of classes of all images, three times, and
    for "kron" the weights that project them, (K-1)^2 (D+1)."""
    if structure == "diag":
        return
    k, width = images.num_classes, images.num_features + 1
    own = 3 * len(images.labels) * k * (k - 1) // 2 * torch.finfo(images.dtype).bits // 8
    need = own + (16 * k * k * width if structure == "kron" else 0)
    own_lack = torch.tensor(need - memory(images.device), dtype=torch.float64, device=images.device)
    lacking = images.largest(own_lack).item()
    held = need - lacking
    if lacking > 0:
        raise ValueError(
            f"refining structure {structure!r} needs {need / 2**30:.3g} GiB for {k} classes of {width - 1} features "
            f"and {len(images.labels)} images, this machine has {held / 2**30:.3g}; refine a fit of structure 'diag'"
        )


def _climb(problem: _Problem, state: _State) -> tuple[_State, Refinement]:
    """Steps that raise the ELBO, until one changes nothing that matters."""
    images, later = problem.images, _LATER_STEP[state.covariance.structure]
    elbos, step, built, last = [state.elbo], 1.0, 0, None
    while True:
        trial = _try(problem, state, torch.lerp(state.natural, state.proposal, step))
        built += 1
        moved = _log_sd_change(images, state, trial) / step
        pull = _pull(images, moved, last)
        distance = images.agreed_number(trial.covariance.distance(trial.theta - state.theta))
        change = distance / step, _rms(images, moved), (trial.elbo - state.elbo) / step
        converged = all(abs(value) < limit for value, limit in zip(change, TOLERANCES, strict=True))
        if trial.elbo >= state.elbo:
            state, last = trial, (moved, step)
            elbos.append(state.elbo)
            step = min(step, later if built >= _WHOLE_STEPS else 1.0)
            if built > _WHOLE_STEPS + 1:
                step = min(step, 2 / (1 + max(pull, 1.0)))
        else:
            step = step / 2
        if converged or built == MAX_CURVATURES or step < _SHORTEST_STEP:
            return state, Refinement(tuple(elbos), built, *change, 0.0, converged)


def _log_sd_change(images: TrainingImages, before: _State, after: _State) -> Tensor:
    """log of the ratio of the sds of this rank's margins f_k - f_y, (N, K); NaN where there is none."""
    old, new = (state.covariance.relative_variance(state.scales, images.labels) for state in (before, after))
    own = torch.nn.functional.one_hot(images.labels, images.num_classes).bool()
    return (new / old).masked_fill(own | (old <= 0) | (new <= 0), math.nan).double().log() / 2


def _pull(images: TrainingImages, moved: Tensor, last: tuple[Tensor, float] | None) -> float:
    """L, if a step of length s left (1 - s L) of the whole step before it: by least squares over the margins."""
    if last is None:
        return 0.0
    before, step = last
    along, own = images.total(torch.stack([(moved * before).nansum(), before.square().nansum()])).tolist()
    return (1 - along / own) / step if own > 0 else 0.0


def _rms(images: TrainingImages, moved: Tensor) -> float:
    """Root mean square over all ranks' margins."""
    sums = torch.stack([moved.square().nansum(), (~moved.isnan()).sum().to(moved)])
    squared, count = images.total(sums).tolist()
    return math.sqrt(squared / max(count, 1.0))


def elbo(images: TrainingImages, theta: Tensor, covariance: Covariance, loss: float, prior_precision: float) -> float:
    """-loss - KL(q || prior) with loss = E_q[-log p(y)], in nats."""
    trace, size = float(covariance.diagonal().sum()), theta.numel()
    quadratic = prior_precision * (float(theta.square().sum()) + trace)
    return -loss - 0.5 * (quadratic - size + covariance.log_det_precision() - size * math.log(prior_precision))


def maximise_mean(
    images: TrainingImages,
    theta: Tensor,
    covariance: Covariance,
    scales: Tensor,
    rule: LogitRule,
    tau: float,
    metric: Covariance | None = None,
) -> Tensor:
    """The mean that maximises the ELBO at a fixed covariance, (K, D+1), by L-BFGS in coordinates whitened by a metric.

    The metric is to be near the ELBO's own curvature in the mean, E_q[Hessian U]^-1: the covariance itself, unless that
    is diagonal, which knows nothing of the features' correlations. It stops where the whitened gradient, the distance
    left in posterior sds, is a fiftieth of the first, within .005 and .05.
    """
    metric = metric or covariance
    first = math.inf

    def objective(z: Tensor) -> tuple[float, Tensor]:
        moved = images.agreed(theta + metric.unwhiten(z))
        loss, gradient = expected_loss(images, moved, covariance, scales, rule)
        return loss + tau / 2 * float(moved.square().sum()), metric.whiten_gradient(gradient + tau * moved)

    def near(norm: float) -> bool:
        nonlocal first
        first = norm if first == math.inf else first
        least, most = _MEAN_GRADIENT
        return norm < min(max(0.02 * first, least), most)

    origin = torch.zeros_like(metric.whiten_gradient(theta))
    found = minimise(objective, origin, near=near, evaluations=_EVALUATIONS, agree=images.agreed_number)
    return images.agreed(theta + metric.unwhiten(found))


def _try(problem: _Problem, state: _State, natural: Tensor) -> _State:
    images, rule, tau = problem.images, problem.rule, problem.tau
    covariance = _covariance(images, natural, state.covariance, tau)
    scales = logit_scales(images, covariance)
    theta = maximise_mean(images, state.theta, covariance, scales, rule, tau, problem.metric)
    return _assess(problem, theta, covariance, scales, natural)


def _assess(problem: _Problem, theta: Tensor, covariance: Covariance, scales: Tensor, natural: Tensor | None) -> _State:
    images, tau = problem.images, problem.tau
    loss, gradient = expected_loss(images, theta, covariance, scales, problem.rule)
    expected = moments(images, theta, covariance, scales, problem.rule)
    proposal = _natural(images, covariance, expected, tau)
    bound = images.agreed_number(elbo(images, theta, covariance, loss, tau))
    made_by = proposal if natural is None else natural
    return _State(theta, covariance, scales, bound, gradient + tau * theta, made_by, proposal)


def _natural(images: TrainingImages, covariance: Covariance, found: Moments, tau: float) -> Tensor:
    """The natural parameters expected under q, in one vector."""
    if found.products is not None:
        if isinstance(covariance, KronCovariance):
            return projected_factors(images, covariance, found.products)
        return found.products.flatten()
    precision = torch.zeros_like(covariance.diagonal())
    for span, phi in images.chunks():
        variance = found.variances[span]
        if images.image_weights is not None:
            variance = variance * images.image_weights[span, None].to(variance)
        precision += (variance.T @ augment(phi).square()).double()
    return (images.total(precision) + tau).flatten()


def _covariance(images: TrainingImages, natural: Tensor, like: Covariance, tau: float) -> Covariance:
    """The covariance of these natural parameters."""
    if isinstance(like, DiagCovariance):
        return DiagCovariance(natural.reshape(like.precision.shape).clamp(min=tau), tau)
    if isinstance(like, KronCovariance):
        return covariance_of(natural, images.num_classes, tau)
    table = natural.clamp(max=0.25).reshape(len(images.labels), -1)
    return full_covariance(images, lambda span, _: table[span], tau)


def _how_it_ended(record: Refinement, num_points: int) -> Iterator[str]:
    """What a reader should know of a refinement that is not at its end, or whose rule is too coarse."""
    finer = f"give refine more num_points than {num_points}"
    if not record.converged:
        onwards = "refine the result again" if record.curvatures == MAX_CURVATURES else finer
        yield (
            f"{_STOPPED} after {record.curvatures} curvatures short of its fixed point: one step moved the mean by "
            f"{record.mean_change:.2g} sds, the margins' sds by {100 * record.sd_change:.2g} % and the ELBO by "
            f"{record.elbo_change:.2g} nats; {onwards}"
        )
    if record.rule_error > _RULE_ERROR:
        yield f"{_UNSURE} the ELBO uncertain by {record.rule_error:.2g} nats; {finer}"


def _result(laplace: Laplace, state: _State, record: Refinement, num_points: int) -> Laplace:
    earlier = (note for note in laplace.notes if not note.startswith((_STOPPED, _UNSURE)))
    notes = (*earlier, *_how_it_ended(record, num_points))
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
