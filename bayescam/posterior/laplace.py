"""``Laplace``, the Gaussian posterior of a last layer, and ``fit_laplace``, which makes one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayescam import storage
from bayescam.errors import BayescamError, ConvergenceError, NotPositiveDefiniteError
from bayescam.notebook import html_table
from bayescam.parallel import together
from bayescam.posterior import predictive
from bayescam.posterior import refine as refinement
from bayescam.posterior.covariance import Covariance, DiagCovariance, FullCovariance, KronCovariance
from bayescam.posterior.curvature import (
    check_full_fits,
    class_curvature,
    diag_covariance,
    full_covariance,
    pair_products,
    probabilities_at,
)
from bayescam.posterior.draws import Draws
from bayescam.posterior.evidence import BRACKET, Choice, maximise
from bayescam.posterior.images import (
    TrainingImages,
    augment,
    check_class_weights,
    check_group,
    check_images,
    check_prior_precision,
    check_rows,
    device_of,
    whole_number,
)
from bayescam.posterior.laplace_file import SCALARS, STORED, read_laplace_file
from bayescam.posterior.map import NEWTON_STEPS, TOLERANCE, MapEstimate, find_map, newton_step, not_found, whitening
from bayescam.posterior.refine import Refinement

if TYPE_CHECKING:
    from pyro.infer.autoguide import AutoMultivariateNormal
    from torch.distributed import ProcessGroup

STRUCTURES = ("full", "kron", "diag")
CRITERIA = ("evidence", "elbo")


@dataclass(frozen=True, eq=False, repr=False)
class Laplace:
    """A Gaussian posterior over weight and bias: Laplace's around the MAP, or the refined one.

    q(theta) = Normal(mean, Sigma) over theta = [weight, bias]: for Laplace's the mean is the mode of the joint density
    and Sigma the inverse of its curvature there (``fit_laplace``); for the refined one both minimise KL(q || posterior)
    (``refine``). All tensors are float64.

    Args:
        weight_mean: (K, D).    bias_mean: (K,).
        covariance: Sigma, in one of three structures.
        prior_precision: tau.
        log_evidence: log p(y | tau) by Laplace at the MAP, constants included; a refined posterior keeps its start's.
        num_train: N.
        gradient_norm: |g|, g the gradient of U = -log joint at the MAP, or E_q[grad U] if refined.
        newton_decrement: how far the mean is from its optimum (the MAP, or E_q[grad U] = 0) in posterior sds, to second
            order: sqrt(g^T H^-1 g), by the Cholesky factor of H for "full". For "kron" and "diag" an estimate: by
            conjugate gradients on H at the MAP, and sqrt(g^T Sigma g) if refined.
        refined: whether this is the KL-optimal Gaussian.
        elbo: its evidence lower bound, log p(y | tau) - KL(q || posterior), None unless refined.
        notes: what a reader should know: an absent class, a prior that dominates, a bound that was hit.
        class_weights: (K,) of the generalised likelihood, or None.
        refinement: how ``refine`` went, where it was run in this process.

    Source: MacKay (1992), Neural Computation 4; Opper and Archambeau (2009), Neural Computation 21, for the refined
    one.
    """

    weight_mean: Tensor
    bias_mean: Tensor
    covariance: Covariance
    prior_precision: float
    log_evidence: float
    num_train: int
    gradient_norm: float
    newton_decrement: float
    refined: bool = False
    elbo: float | None = None
    notes: tuple[str, ...] = ()
    class_weights: Tensor | None = None
    refinement: Refinement | None = None

    def __repr__(self) -> str:
        kind = "refined Gaussian" if self.refined else "Laplace"
        score = f"log_evidence={self.log_evidence:.2f}" if self.elbo is None else f"elbo={self.elbo:.2f}"
        noted = f", notes: {'; '.join(self.notes)}" if self.notes else ""
        return (
            f"{kind}({self.structure}, classes={self.num_classes}, features={self.num_features}, "
            f"images={self.num_train}, prior_precision={self.prior_precision:.4g}, {score}{noted})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("structure", self.structure),
            ("classes, features", f"{self.num_classes}, {self.num_features}"),
            ("images fitted to", self.num_train),
            ("prior precision", f"{self.prior_precision:.4g}"),
            *(() if self.elbo is None else (("ELBO", f"{self.elbo:.2f}"),)),
            ("log evidence by Laplace" if self.refined else "log evidence", f"{self.log_evidence:.2f}"),
            ("Newton decrement, sds", f"{self.newton_decrement:.2g}"),
            *(("note", note) for note in self.notes),
        ]
        return html_table("Refined Gaussian" if self.refined else "Laplace posterior", rows)

    @property
    def structure(self) -> str:
        """ "full", "kron" or "diag": which correlations the covariance keeps."""
        return self.covariance.structure

    @property
    def num_classes(self) -> int:
        """K."""
        return self.weight_mean.shape[0]

    @property
    def num_features(self) -> int:
        """D."""
        return self.weight_mean.shape[1]

    @property
    def theta_mean(self) -> Tensor:
        """[weight, bias], (K, D+1)."""
        return torch.cat([self.weight_mean, self.bias_mean[:, None]], dim=1)

    @property
    def weight_sd(self) -> Tensor:
        """Marginal posterior sds of the weights, (K, D)."""
        return self.covariance.diagonal()[:, :-1].sqrt()

    @property
    def bias_sd(self) -> Tensor:
        """Marginal posterior sds of the biases, (K,)."""
        return self.covariance.diagonal()[:, -1].sqrt()

    @property
    def guide(self) -> AutoMultivariateNormal:
        """This posterior as a Pyro guide over the sites "weight" and "bias" of ``last_layer``.

        A new one each time, float64; ``Predictive`` and ``NeuTraReparam`` take it with float32 features too.

        Raises:
            ValueError: the structure is "kron" or "diag".
        """
        if not isinstance(self.covariance, FullCovariance):
            raise ValueError(f"guide needs structure 'full', this posterior is {self.structure!r}; use sample instead")
        from bayescam.posterior.guide import last_layer_guide

        return last_layer_guide(self.theta_mean, self.covariance)

    def sample(self, num_samples: int, *, seed: int) -> Draws:
        """Draws of weight (1, S, K, D) and bias (1, S, K).

        Args:
            num_samples: S >= 1.
            seed: of the generator, 0..2^64 - 1; the same seed gives the same draws on the same device.

        Raises:
            TypeError, ValueError: num_samples or seed is no whole number of that range.
        """
        size, seed = whole_number(num_samples, "num_samples", 1), whole_number(seed, "seed", 0)
        generator = torch.Generator(self.weight_mean.device).manual_seed(seed)
        theta = self.theta_mean + self.covariance.sample(size, generator)
        return Draws(theta[None, ..., :-1], theta[None, ..., -1])

    def logit_moments(self, features: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean (N, K) and covariance (N, K, K) of the centred logits f - mean_k f at features (N, D).

        Raises:
            TypeError, ValueError: features of another type or D, or not finite.
        """
        rows = augment(self._features(features))
        mean = rows @ self.theta_mean.T
        covariance = self.covariance.logit_covariance(rows)
        covariance = covariance - covariance.mean(-1, keepdim=True)
        covariance = covariance - covariance.mean(-2, keepdim=True)
        return mean - mean.mean(-1, keepdim=True), covariance

    def map_logits(self, features: Tensor | np.ndarray) -> Tensor:
        """Logits at the posterior mean (the MAP, unless refined): features (N, D) -> (N, K), float64.

        Raises:
            TypeError, ValueError: features of another type or D, or not finite.
        """
        return (augment(self._features(features)) @ self.theta_mean.T).double()

    def predict_proba(
        self,
        features: Tensor | np.ndarray,
        *,
        method: str = predictive.DEFAULT_METHOD,
        num_points: int | None = None,
    ) -> Tensor:
        """Posterior predictive class probabilities, E_q[softmax(weight phi + bias)]: features (N, D) -> (N, K).

        Args:
            features: phi, (N, D).
            method: "mc" (the default), "pairwise", "bridge" or "map": see ``predictive.gaussian_predict_proba``.
            num_points: of the "mc" rule, even; 1,024 without it.

        Raises:
            TypeError, ValueError: features of another type or D, or not finite; no such method; num_points that is odd,
                no whole number, or given with another method than "mc".
        """
        rows = self._features(features)
        return predictive.gaussian_predict_proba(self, rows, method=method, num_points=num_points)

    def _features(self, features: Tensor | np.ndarray) -> Tensor:
        return check_rows(features, self.num_features, self.weight_mean)

    def refine(
        self,
        features: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int],
        *,
        group: ProcessGroup | None = None,
        num_points: int | None = None,
    ) -> Laplace:
        """The Gaussian of this structure nearest to the posterior in KL(q || posterior), started from this one.

        With U = -log joint, it is where

            E_q[grad U] = 0    and    Sigma^-1 = E_q[Hessian U]

        ("diag": sigma_i^-2 = E_q[H_ii]; "kron": the Kronecker factors of E_q[H]), reached by variational Newton steps
        that are kept only if the ELBO rises. The module ``bayescam.posterior.refine`` derives it. One refinement takes
        at most 25 curvatures; ``.refinement`` says how it went, and a note where it stopped short.

        Args:
            features: phi (N, D), the training features that this posterior was fitted on.
            labels: (N,), theirs.
            group: a torch.distributed process group; features and labels are then this rank's shard.
            num_points: of the quasi-Monte Carlo rule for what pairs of classes leave over of each image's expectations;
                even; 2,048 or fewer without it, the fewer the more images there are.

        Raises:
            TypeError, ValueError: features, labels or num_points that cannot be used, or another number of images or
                features than the posterior was fitted to.
            NotPositiveDefiniteError: the expected Hessian has a direction whose curvature float64 cannot hold.
            RankError: another rank's shard was refused.

        Sources: Opper and Archambeau (2009), Neural Computation 21; Khan and Lin (2017), AISTATS, the steps. Nearest
        are VBLL (Harrison, Willes and Snoek 2024, ICLR), which trains a Jensen bound of this ELBO with class-wise
        covariances by SGD, and IVON (Shen et al. 2024, ICML), a diagonal Gaussian trained with the network.
        """
        if num_points is not None:
            num_points = whole_number(num_points, "num_points", 2)
        images = check_images(
            features, labels, num_classes=self.num_classes, class_weights=self.class_weights, group=group
        )
        if images.num_features != self.num_features:
            raise ValueError(f"features must be (N, {self.num_features}), got {tuple(images.features.shape)}")
        return refinement.refine(self, images, num_points=num_points)

    def to(self, device: torch.device | str) -> Laplace:
        """The same posterior on another device."""
        return replace(
            self,
            weight_mean=self.weight_mean.to(device),
            bias_mean=self.bias_mean.to(device),
            covariance=self.covariance.to(device),
            class_weights=None if self.class_weights is None else self.class_weights.to(device),
        )

    def save(self, path: Path | str) -> None:
        """Write the posterior as one safetensors file; no training data is in it.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            OSError: it cannot be written there.
        """
        tensors = {"weight_mean": self.weight_mean, "bias_mean": self.bias_mean}
        tensors |= {name: value for name, value in vars(self.covariance).items() if name in STORED[self.structure]}
        if self.class_weights is not None:
            tensors["class_weights"] = self.class_weights
        metadata = {name: getattr(self, name) for name in SCALARS} | {
            "kind": "laplace",
            "structure": self.structure,
            "notes": list(self.notes),
        }
        storage.save_tensors(Path(path), tensors, metadata)


def load_laplace(path: Path | str) -> Laplace:
    """Read what ``Laplace.save`` wrote.

    Raises:
        FileFormatError: absent, broken, foreign or of another kind.
    """
    tensors, facts = read_laplace_file(Path(path))
    tau, structure = float(facts["prior_precision"]), facts["structure"]
    stored = {name: tensors[name] for name in STORED[structure]}
    covariance: Covariance
    if structure == "full":
        covariance = FullCovariance(**stored, prior_precision=tau, num_classes=len(tensors["bias_mean"]))
    elif structure == "kron":
        covariance = KronCovariance(**stored, prior_precision=tau)
    else:
        covariance = DiagCovariance(**stored, prior_precision=tau)
    return Laplace(
        tensors["weight_mean"],
        tensors["bias_mean"],
        covariance,
        notes=tuple(facts["notes"]),
        class_weights=tensors.get("class_weights"),
        **{name: facts[name] for name in SCALARS},
    )


def fit_laplace(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    *,
    num_classes: int | None = None,
    prior_precision: float | str = "evidence",
    structure: str = "full",
    class_weights: Tensor | np.ndarray | Sequence[float] | None = None,
    group: ProcessGroup | None = None,
    bracket: tuple[float, float] = BRACKET,
) -> Laplace:
    """The Laplace posterior of a last layer on frozen features: MAP, Hessian there, Gaussian.

    With phi~ = (phi, 1), p_n = softmax(theta phi~_n) and w_n = 1, or the class weight of y_n,

        U(theta) = -sum_n w_n log p_n[y_n] - log Normal(theta; 0, I / tau),

    the mean is theta* = argmin U, and the inverse covariance there

        full   H = sum_n w_n (diag p_n - p_n p_n^T) (x) phi~_n phi~_n^T + tau I
        kron   (sum_n w_n (diag p_n - p_n p_n^T) / sum_n w_n) (x) (sum_n w_n phi~_n phi~_n^T) + tau I
        diag   the diagonal of H.

    log_evidence = -U(theta*) + P/2 log 2 pi - log det(inverse covariance) / 2.

    Args:
        features: phi (N, D), a tensor, array or memory map; float32 or float64 (float16 is computed in float32).
        labels: (N,) whole numbers in 0..K-1.
        num_classes: K; one more than the largest label without it.
        prior_precision: tau; "evidence" chooses it by Laplace's marginal likelihood, the MAP re-fitted at every value
            tried; "elbo" by the evidence lower bound of the refined posterior, to be trusted where Laplace is not.
        structure: "full", "kron" or "diag".
        class_weights: (K,) positive; the likelihood of image n is then raised to class_weights[y_n], alike in MAP,
            Hessian and evidence.
        group: a torch.distributed process group; features and labels are then this rank's shard.
        bracket: the smallest and largest tau that "evidence" and "elbo" may choose.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotPositiveDefiniteError, ConvergenceError: the numbers cannot be handled in this precision.
        RankError: another rank's shard was refused.

    Sources: MacKay (1992), Neural Computation 4; Ritter, Botev and Barber (2018), ICLR, for "kron"; Daxberger et al.
    (2021), NeurIPS, for Laplace on the last layer.
    """
    check_group(group)
    tau, ends = together(
        lambda: _check_choices(structure, prior_precision, bracket), group, device_of(features, labels)
    )
    images = check_images(
        features,
        labels,
        num_classes=num_classes,
        class_weights=class_weights,
        group=group,
        facts={"structure": structure, "prior_precision": tau or prior_precision, "bracket": ends},
    )
    weights = None if class_weights is None else check_class_weights(class_weights, images.num_classes, images.device)
    if structure == "full":
        check_full_fits(images)
    whitener = whitening(images, exact=structure == "kron")
    if tau is not None:
        fit = laplace_at(images, find_map(images, tau, whitener), whitener, tau, structure, weights)
    else:
        fit = _by_criterion(images, whitener, structure, weights, str(prior_precision), ends)
    return refinement.agreed(fit, images)


def _check_choices(
    structure: str, prior_precision: float | str, bracket: tuple[float, float]
) -> tuple[float | None, tuple[float, float]]:
    """tau, or None where a criterion is to choose it, and the bracket."""
    if structure not in STRUCTURES:
        raise ValueError(f"structure is {structure!r}; choose one of {', '.join(STRUCTURES)}")
    if isinstance(prior_precision, str) and prior_precision not in CRITERIA:
        raise ValueError(
            f"prior_precision is {prior_precision!r}; give a positive number or one of {', '.join(CRITERIA)}"
        )
    tau = None if isinstance(prior_precision, str) else check_prior_precision(prior_precision)
    return tau, _check_bracket(bracket)


def _check_bracket(bracket: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (math.nan, math.nan) if isinstance(bracket, str) else (float(end) for end in bracket)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise ValueError(f"bracket is {bracket!r}; it must be two positive, finite, increasing prior precisions")
    return low, high


def _by_criterion(
    images: TrainingImages,
    whitener: KronCovariance,
    structure: str,
    class_weights: Tensor | None,
    criterion: str,
    bracket: tuple[float, float],
) -> Laplace:
    """The fit at the tau that maximises log evidence or the refined ELBO.

    A tau at which the numbers cannot be handled is left out, and the fit says so.
    """
    best: Laplace | None = None
    highest = -math.inf
    start: Tensor | None = None
    failures: dict[float, BayescamError] = {}

    def evaluate(tau: float) -> float:
        nonlocal best, highest, start
        tau = images.agreed_number(tau)
        try:
            mode = find_map(images, tau, whitener, start=start)
            fit = laplace_at(images, mode, whitener, tau, structure, class_weights)
            score = fit.log_evidence if criterion == "evidence" else _bound(refinement.refine(fit, images))
            score = images.agreed_number(score)
        except (ConvergenceError, NotPositiveDefiniteError) as error:
            failures[tau] = error
            return -math.inf
        start = mode.theta
        if score > highest:
            best, highest = fit, score
        return score

    choice = maximise(evaluate, bracket)
    if best is None:
        raise failures[choice.prior_precision]
    return replace(best, notes=(*best.notes, *_choice_notes(choice, criterion, failures)))


def _choice_notes(choice: Choice, criterion: str, failures: Collection[float]) -> Iterator[str]:
    """What a reader should know of the search over tau."""
    if choice.hit is not None:
        tau = f"prior_precision = {choice.prior_precision:g}"
        yield f"{criterion} still rises at the {choice.hit} end of the bracket, {tau}"
    if choice.others:
        taus = ", ".join(f"{tau:.2g}" for tau in choice.others)
        yield f"{criterion} has another maximum near prior_precision = {taus}, lower than the one chosen"
    if failures:
        taus = ", ".join(f"{tau:.2g}" for tau in sorted(failures))
        yield f"left out of the search, as float64 cannot hold their Hessian or MAP: prior_precision = {taus}"


def _bound(refined: Laplace) -> float:
    assert refined.elbo is not None
    return refined.elbo


def laplace_at(
    images: TrainingImages,
    mode: MapEstimate,
    whitener: KronCovariance,
    prior_precision: float,
    structure: str,
    class_weights: Tensor | None,
) -> Laplace:
    """The Gaussian around a mode, with Laplace's evidence -U + P/2 log 2 pi - log det(H)/2."""
    mode, covariance = _settled(images, mode, whitener, prior_precision, structure)
    log_evidence = -mode.value + mode.theta.numel() / 2 * math.log(2 * math.pi) - covariance.log_det_precision() / 2
    return Laplace(
        mode.theta[:, :-1].contiguous(),
        mode.theta[:, -1].contiguous(),
        covariance,
        prior_precision,
        log_evidence,
        images.count(),
        float(mode.gradient.norm()),
        mode.decrement,
        notes=tuple(_notes(images, mode.theta)),
        class_weights=class_weights,
    )


def _settled(
    images: TrainingImages, mode: MapEstimate, whitener: KronCovariance, prior_precision: float, structure: str
) -> tuple[MapEstimate, Covariance]:
    """The mode and the covariance there.

    For "full" the decrement is the exact one, by the Cholesky factor; where it is above the tolerance after all, Newton
    steps with that factor go on, in float64.
    """
    covariance = curvature_at(images, mode.theta, whitener, prior_precision, structure)
    if structure != "full":
        return mode, covariance
    for _ in range(NEWTON_STEPS):
        whitened = covariance.whiten_gradient(mode.gradient)
        mode = replace(mode, decrement=images.agreed_number(float(whitened.norm())))
        if mode.decrement < TOLERANCE:
            return mode, covariance
        images = replace(images, widened=True)
        mode = newton_step(mode, covariance.unwhiten(whitened), images, prior_precision)
        covariance = curvature_at(images, mode.theta, whitener, prior_precision, structure)
    raise not_found(mode.decrement, mode.value)


def curvature_at(
    images: TrainingImages, theta: Tensor, whitener: KronCovariance, prior_precision: float, structure: str
) -> Covariance:
    """The inverse Hessian at theta (K, D+1) in one of the structures."""
    images = replace(images, widened=True) if structure == "kron" else images
    probabilities = probabilities_at(theta, images)
    if structure == "full":
        return full_covariance(images, lambda span, phi: pair_products(probabilities(span, phi)), prior_precision)
    if structure == "kron":
        whitener = replace(whitener, prior_precision=prior_precision)
        return whitener.with_classes(class_curvature(images, probabilities), images.weight())
    return diag_covariance(images, probabilities, prior_precision)


def _notes(images: TrainingImages, theta: Tensor) -> Iterator[str]:
    """What the data cannot say: classes without an image, and labels that a plane separates."""
    counts = images.total(torch.bincount(images.labels, minlength=images.num_classes))
    for label in (counts == 0).nonzero().flatten().tolist():
        yield f"class {label} has no training image: the prior alone speaks for it"
    wrong = torch.zeros((), dtype=torch.int64, device=images.device)
    for span, phi in images.chunks():
        logits = torch.addmm(theta[:, -1].to(phi), phi, theta[:, :-1].T.to(phi))
        wrong += (logits.argmax(-1) != images.labels[span]).sum()
    if int(images.total(wrong)) == 0:
        yield (
            "prior-dominated: the training images are linearly separable, so the likelihood has no maximum "
            "and the prior sets the scale of the logits"
        )
