"""Is the Gaussian posterior good enough? Numbers beside their noise floors, and a verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayescam.diagnose.convergence import Convergence, convergence, probability_convergence
from bayescam.diagnose.importance import importances
from bayescam.diagnose.intervals import (
    Interval,
    count_groups,
    interval,
    resampled_mean,
    resampled_metrics,
    share_interval,
)
from bayescam.diagnose.weight_agreement import halves, weight_agreement
from bayescam.notebook import html_table
from bayescam.posterior.draws import Draws
from bayescam.posterior.images import TrainingImages, check_images, check_rows, whole_number
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.nuts import Nuts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Verdict = Literal["laplace", "refine", "nuts", "undecided"]

SPEAKERS: Mapping[str, str] = {
    "laplace": "laplace_full",
    "refine": "laplace_refined",
    "nuts": "nuts",
    "undecided": "laplace_refined",  # unchecked, and said to be
}
MAX_TOTAL_VARIATION = 0.01
MAX_NLL_DIFFERENCE = 0.01
MAX_RHAT = 1.05
MIN_ESS = 100.0
_ELEMENTS = 1 << 23


@dataclass(frozen=True, eq=False)
class Comparison:
    """Laplace (and refined, and the MAP plug-in) against NUTS on the images given.

    Args:
        verdict: "laplace" (close enough for predictions), "refine" (the refined one is), "nuts" (neither is),
            "undecided" (NUTS itself did not converge).
        words: the verdict in a sentence, with its numbers.
        convergence: of NUTS: "probabilities" and "lp", each with rhat, ess_bulk, ess_tail.
        predictive: for each of "map", "laplace", "refined": total_variation, agreement, mutual information and metric
            differences against NUTS, each with "_low" and "_high", its 90 % bootstrap interval over patients;
            "nuts_half" is NUTS half against half, the noise floor.
        weights: for "laplace" and "refined": ``WeightAgreement.summary`` and the ten worst weights.
        cams: the same for mean and sd of the centred CAMs; empty without maps.
        importance: k-hat over batches and KL (``diagnose.importance.Importance``); empty without training images.
            Information, never the gate.
        thresholds: what "close enough" and "converged" meant.
    """

    verdict: Verdict
    words: str
    convergence: Mapping[str, Convergence]
    predictive: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, Mapping[str, Any]]
    cams: Mapping[str, Mapping[str, float]]
    importance: Mapping[str, Mapping[str, Any]]
    thresholds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; what is not finite becomes None, as JSON has no word for it."""
        return json_safe(
            {
                "verdict": self.verdict,
                "words": self.words,
                "convergence": {name: asdict(one) for name, one in self.convergence.items()},
                "predictive": self.predictive,
                "weights": self.weights,
                "cams": self.cams,
                "importance": self.importance,
                "thresholds": self.thresholds,
            }
        )

    def __repr__(self) -> str:
        return f"Comparison(verdict={self.verdict!r}: {self.words})"

    def _repr_html_(self) -> str:
        shown = ("total_variation", "agreement", "nll_difference", "ece_difference")
        rows = [
            (name, *(_with_interval(row, key) if key in row else "–" for key in shown))
            for name, row in self.predictive.items()
        ]
        header = ("against NUTS", "total variation", "same class", "NLL difference", "ECE difference")
        return f"<p><b>{escape(self.verdict)}</b>: {escape(self.words)}</p>{html_table('', rows, header)}"


def compare_posteriors(
    laplace: Laplace,
    nuts: Nuts,
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    refined: Laplace | None = None,
    maps: Tensor | None = None,
    training: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    patients: Sequence[str] | np.ndarray | None = None,
    num_samples: int = 500,
    seed: int = 0,
) -> Comparison:
    """Compare Gaussian posteriors with NUTS where it matters, in predictions, and in weights and maps.

    Total variation of two predictives is 1/2 mean_n sum_k |p_nk - q_nk|. A Gaussian is close enough if it is at most
    max(.01, twice NUTS half against half) from NUTS and the mean NLL differs by at most
    max(.01, twice NUTS half against half) too: what NUTS's own halves do not agree on cannot tell it from a Gaussian.
    NUTS has converged if the R-hat of the predicted probabilities is below 1.05 and their ESS above 100.

    Args:
        laplace: the Gaussian around the MAP.
        nuts: the referee, of the same target.
        features: phi (N, D) of the evaluation images.
        labels: (N,), or None: then the verdict rests on total variation alone.
        refined: the KL-optimal Gaussian, if it was made.
        maps: feature maps (n, D, h, w) of some images, for the CAMs.
        training: features and labels of the training images, for k-hat and KL.
        patients: whose each image is, (N,), for the intervals; None takes images for independent.
        num_samples: draws of each Gaussian for its mutual information.
        seed: of those draws.

    Raises:
        TypeError: a posterior of another kind than its place asks for, or arrays of a type that cannot be meant.
        ValueError: shapes that do not belong together, or numbers that cannot be meant.
    """
    _check_kinds(laplace, nuts, refined)
    num_samples = whole_number(num_samples, "num_samples", 1)
    seed = whole_number(seed, "seed", 0)
    phi, truth = _check(laplace, nuts, features, labels)
    images = None if training is None else _training(laplace, training)
    groups = np.arange(len(phi)) if patients is None else np.asarray(patients)
    if groups.shape != (len(phi),):
        raise ValueError(f"patients must name one for each of the {len(phi)} images, got {groups.shape}")
    gaussians = {"laplace": laplace} if refined is None else {"laplace": laplace, "refined": refined}
    converged = {
        "probabilities": probability_convergence(nuts.draws, phi),
        "lp": convergence(nuts.stats["lp"]),
    }
    predictive = _predictive(laplace, gaussians, nuts.draws, phi, truth, groups, num_samples, seed)
    weights = {}
    for name, gaussian in gaussians.items():
        agreement = weight_agreement(gaussian, nuts.draws)
        weights[name] = {**agreement.summary(), "worst": agreement.worst()}
    weighed = {} if images is None else importances(gaussians, images, seed=seed)
    verdict, words = _verdict(converged["probabilities"], predictive)
    return Comparison(
        verdict,
        words,
        converged,
        predictive,
        weights,
        {} if maps is None else {name: _cams(maps, one, nuts.draws) for name, one in gaussians.items()},
        {name: asdict(one) for name, one in weighed.items()},
        {
            **limits(predictive),
            "rhat": MAX_RHAT,
            "ess": MIN_ESS,
        },
    )


def predictive_moments(draws: Draws, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean class probabilities (N, K) and mutual information H[E p] - E H[p] in nats (N,), over the draws."""
    weight, bias = draws.flat()
    s, k, d = weight.shape
    means, informations = [], []
    for phi in features.to(weight).split(max(1, _ELEMENTS // (s * k))):
        logits = torch.addmm(bias.reshape(-1), phi, weight.reshape(-1, d).T).unflatten(1, (s, k))
        proba = logits.softmax(-1)
        mean = proba.mean(1)
        within = torch.special.entr(proba).sum(-1).mean(1)
        means.append(mean)
        informations.append((torch.special.entr(mean).sum(-1) - within).clamp_min(0.0))
    return torch.cat(means), torch.cat(informations)


def total_variation(p: Tensor, q: Tensor) -> float:
    """1/2 mean_n sum_k |p_nk - q_nk| for class probabilities (N, K)."""
    return float((p - q).abs().sum(-1).mean() / 2)


def _predictive(
    laplace: Laplace,
    gaussians: Mapping[str, Laplace],
    draws: Draws,
    phi: Tensor,
    truth: Tensor | None,
    groups: np.ndarray,
    num_samples: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    proba, information = predictive_moments(draws, phi)
    reference = {"proba": proba, "information": information}
    plug_in = torch.addmm(laplace.bias_mean, phi, laplace.weight_mean.T).softmax(-1)
    rows = {"map": _against(reference, plug_in, torch.zeros_like(information), truth, groups)}
    for name, gaussian in gaussians.items():
        _, own = predictive_moments(gaussian.sample(num_samples, seed=seed), phi)
        rows[name] = _against(reference, gaussian.predict_proba(phi).to(proba), own.to(proba), truth, groups)
    first, second = (predictive_moments(half, phi) for half in halves(draws))
    rows["nuts_half"] = _against({"proba": second[0], "information": second[1]}, *first, truth, groups)
    return rows


def _against(
    reference: Mapping[str, Tensor], proba: Tensor, information: Tensor, truth: Tensor | None, groups: np.ndarray
) -> dict[str, float]:
    other, more = reference["proba"], information - reference["information"]
    by_image = {
        "total_variation": (proba - other).abs().sum(-1) / 2,
        "agreement": (proba.argmax(-1) == other.argmax(-1)).double(),
        "mutual_information_difference": more,
    }
    row: dict[str, float] = {}
    count = count_groups(groups)
    for name, values in by_image.items():
        row |= _with_bounds(name, resampled_mean(values.cpu().numpy(), groups), count)
    row["total_variation_max"] = float(by_image["total_variation"].max())
    row["mutual_information_rms"] = float(more.square().mean().sqrt())
    if truth is None:
        return row
    own, theirs = (resampled_metrics(p.cpu().numpy(), truth.cpu().numpy(), groups) for p in (proba, other))
    for name in ("nll", "ece", "brier", "accuracy"):
        row |= _with_bounds(name, own[name], count)
        row |= _with_bounds(f"{name}_difference", own[name] - theirs[name], count)
    return row


def _with_bounds(name: str, values: np.ndarray, num_groups: int) -> dict[str, float]:
    shares = name in ("agreement", "accuracy")
    found = (share_interval if shares else interval)(values, num_groups=num_groups)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _with_interval(row: Mapping[str, float], name: str) -> str:
    return f"{Interval(row[name], row[f'{name}_low'], row[f'{name}_high']):.4f}"


def limits(predictive: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How far from NUTS is close enough, in total variation and, with labels, in NLL: what two halves of NUTS's own
    draws differ by, twice, and at least .01."""
    half = predictive["nuts_half"]
    found = {"total_variation": max(MAX_TOTAL_VARIATION, 2 * half["total_variation"])}
    if "nll_difference" in half:
        found["nll_difference"] = max(MAX_NLL_DIFFERENCE, 2 * abs(half["nll_difference"]))
    return found


def _verdict(converged: Convergence, predictive: Mapping[str, Mapping[str, float]]) -> tuple[Verdict, str]:
    if not (converged.rhat < MAX_RHAT and converged.ess_bulk > MIN_ESS):
        return "undecided", (
            f"NUTS has not converged (R-hat {converged.rhat:.3f}, ESS {converged.ess_bulk:.0f} of the predicted "
            "probabilities), so nothing can be said about Laplace; draw more, or warm up longer."
        )
    allowed = limits(predictive)
    noise = f"NUTS half against half: {_distance(predictive['nuts_half'], {})}"
    laplace, refined = predictive["laplace"], predictive.get("refined")
    if _close(laplace, allowed):
        return "laplace", f"Laplace predicts like NUTS: {_distance(laplace, allowed)}. {noise}."
    far = f"Laplace does not predict like NUTS ({_distance(laplace, allowed)})"
    if refined is None:
        return "nuts", f"{far}; use NUTS, or try refine(). {noise}."
    if _close(refined, allowed):
        return "refine", f"{far}, but the refined Gaussian does ({_distance(refined, allowed)}). {noise}."
    return "nuts", f"{far}, nor does the refined Gaussian ({_distance(refined, allowed)}); use the NUTS draws. {noise}."


def _close(row: Mapping[str, float], allowed: Mapping[str, float]) -> bool:
    return all(abs(row[key]) <= limit for key, limit in allowed.items())


def _distance(row: Mapping[str, float], allowed: Mapping[str, float]) -> str:
    """The distances in words, each with its limit where there is one."""
    parts = []
    for key, words, shown in (("total_variation", "total variation", ".4f"), ("nll_difference", "NLL", "+z.4f")):
        if key in row:
            kept = "within" if abs(row[key]) <= allowed.get(key, 0.0) else "beyond"
            parts.append(f"{words} {row[key]:{shown}}" + (f", {kept} {allowed[key]:.4f}" if key in allowed else ""))
    return ("; " if allowed else ", ").join(parts)


def _cams(maps: Tensor, gaussian: Laplace, draws: Draws) -> dict[str, float]:
    """Centred CAMs: differences of mean (in NUTS sds) and of sd, each beside NUTS half against half."""
    from bayescam.explain.cam import CamPosterior

    own, reference = CamPosterior(maps, gaussian), CamPosterior(maps, draws)
    first, second = (CamPosterior(maps, half) for half in halves(draws))
    sd = reference.sd
    return {
        "mean_difference_rms": float(((own.mean - reference.mean) / sd).square().mean().sqrt()),
        "mean_difference_rms_half": float(((first.mean - second.mean) / sd).square().mean().sqrt()),
        "sd_ratio_median": float((sd / own.sd).median()),
        "sd_ratio_rms": float((sd / own.sd - 1).square().mean().sqrt()),
        "sd_ratio_rms_half": float((first.sd / second.sd - 1).square().mean().sqrt()),
    }


def _training(laplace: Laplace, training: tuple[Any, Any]) -> TrainingImages:
    """The images that ``laplace`` was fitted to."""
    if not isinstance(training, tuple | list) or len(training) != 2:
        raise TypeError(f"training must be (features, labels), got {type(training).__name__}")
    try:
        images = check_images(*training, num_classes=laplace.num_classes, class_weights=laplace.class_weights)
    except (TypeError, ValueError) as error:
        raise type(error)(f"training: {error}") from error
    if images.num_features != laplace.num_features or len(images.labels) != laplace.num_train:
        raise ValueError(
            f"training has features {tuple(images.features.shape)}, and laplace was fitted to "
            f"{(laplace.num_train, laplace.num_features)}; give those"
        )
    return images


def _check_kinds(laplace: Laplace, nuts: Nuts, refined: Laplace | None) -> None:
    for name, given, kind in (("laplace", laplace, Laplace), ("nuts", nuts, Nuts), ("refined", refined, Laplace)):
        if not isinstance(given, kind) and not (name == "refined" and given is None):
            raise TypeError(
                f"{name} must be a {kind.__name__}, got {type(given).__name__}; the order is laplace, nuts, features"
            )
    if refined is not None and refined.theta_mean.shape != laplace.theta_mean.shape:
        raise ValueError(
            f"refined has weights {tuple(refined.weight_mean.shape)} and laplace {tuple(laplace.weight_mean.shape)}; "
            "compare posteriors of one model"
        )


def _check(
    laplace: Laplace, nuts: Nuts, features: Tensor | np.ndarray, labels: Tensor | np.ndarray | None
) -> tuple[Tensor, Tensor | None]:
    shape, drawn = (laplace.num_classes, laplace.num_features), tuple(nuts.draws.weight.shape[2:])
    if drawn != shape:
        raise ValueError(f"nuts has weights {drawn} and laplace {shape}; compare posteriors of one model")
    finite = nuts.draws.weight.isfinite().all(-1).all(-1) & nuts.draws.bias.isfinite().all(-1)
    if not bool(finite.all()):
        chain, draw = (~finite).nonzero()[0].tolist()
        raise ValueError(f"nuts holds NaN or infinity in draw {draw} of chain {chain}; sample again")
    phi = check_rows(features, shape[1], laplace.weight_mean)
    if len(phi) == 0:
        raise ValueError("features holds no image (N = 0); give at least one")
    if labels is None:
        return phi, None
    truth = check_images(phi, labels, num_classes=shape[0]).labels
    return phi, truth


def json_safe(value: Any) -> Any:
    """The same with None for numbers that are not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {str(name): json_safe(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
