"""Do the credible bands of class activation maps cover? Many independent simulated training sets, one frozen network.

    python scripts/cam_coverage.py --out runs/coverage        # about twenty minutes on one core, half of it drawing

A small network is trained once on phantom radiographs and frozen. Then the last layer is fitted again and again, each
time on a fresh training set of other patients, and its 50, 80 and 95 % bands on test images are compared with the
truth:

  head from the prior   labels drawn from a head that was itself drawn from the prior, at the phantoms' features. The
                        model is right, so an exact posterior covers 50, 80 and 95 % on average; what is missing is the
                        approximation's. (Bands from S independent draws cover (S - 1) / (S + 1) of it: 94.6 for 95 %.)
  one head, its labels  labels drawn from one fixed head, the one fitted to all training sets together. The model is
                        right, the prior is not: what a frequentist asks. Bands may cover more or less, according to
                        where that head lies in the prior.
  retrained             the phantoms' own labels and that same head as the truth; tau by evidence on every set. The
                        model is only an approximation, as in use, and the truth is itself a fit. Nominal coverage is
                        not to be expected.

The diagonal leaves the correlation of the features out, so its bands are too wide or too narrow by turns. Also printed:
the root mean square error of the maps' means over the sd that the posterior states, 1 where they agree. Intervals are
1.96 standard errors over the training sets. Writes ``coverage.csv`` and ``coverage.png``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _printed import kept
from torch import Tensor
from tqdm import tqdm

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.posterior.covariance import centring
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import Laplace
from bayescam.report.cam_coverage import coverage_figure
from bayescam.report.wording import NAMES
from bayescam.storage import atomic_path, write_csv

LEVELS = (0.5, 0.8, 0.95)
Sets = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Case:
    """One training set, the true weight (K, D), and tau or "evidence"."""

    features: Tensor
    labels: Tensor
    weight: Tensor
    prior_precision: float | str


@dataclass(frozen=True, eq=False)
class Coverage:
    """Of one posterior, set by set: share of cells in each band (R, 3), squared error of the means, variance (R,)."""

    shares: np.ndarray
    error: np.ndarray
    variance: np.ndarray

    def row(self) -> list[str]:
        spread = 1.96 * self.shares.std(0, ddof=1) / len(self.shares) ** 0.5
        cells = [f"{mean:.3f} ± {half:.3f}" for mean, half in zip(self.shares.mean(0), spread, strict=True)]
        return [*cells, f"{(self.error.mean() / self.variance.mean()) ** 0.5:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=50, help="independent training sets, R")
    parser.add_argument("--train", type=int, default=200, help="images in each")
    parser.add_argument("--test", type=int, default=60, help="images whose maps are checked")
    parser.add_argument("--teaching", type=int, default=1000, help="images the network is trained on")
    parser.add_argument("--epochs", type=int, default=10, help="of the network")
    parser.add_argument("--samples", type=int, default=500, help="NUTS draws")
    parser.add_argument("--warmup", type=int, default=150, help="NUTS transitions before them")
    parser.add_argument("--prior-precision", type=float, default=1.0, help="tau, and of the heads from the prior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for what is printed, the numbers and the picture")
    parsed = parser.parse_args()
    with kept(parsed.out, "cam_coverage.md"):
        measure(parsed)


def measure(parsed: argparse.Namespace) -> None:
    """Simulate, count, print one table a kind of truth."""
    sets, maps = simulated(parsed)
    print(
        f"{parsed.sets} sets of {parsed.train}, D = {maps.shape[1]}, {parsed.test} test images, {maps.shape[2:]} cells"
    )
    found: dict[str, dict[str, Coverage]] = {}
    for truth, cases in truths(sets, parsed).items():
        found[truth] = coverage(cases, maps, parsed)
        print(f"\n{truth}\n| posterior | 50 % | 80 % | 95 % | error of the means / sd |\n{5 * '|---'}|")
        for name, result in found[truth].items():
            print(f"| {NAMES[name]} | {' | '.join(result.row())} |", flush=True)
    if parsed.out:
        write(found, parsed.out)


def simulated(parsed: argparse.Namespace) -> tuple[Sets, Tensor]:
    """Features and labels of each training set, and the feature maps of the test images, of one frozen network."""
    torch.manual_seed(parsed.seed)
    teaching = bc.open_dataset("phantom", num=parsed.teaching, seed=parsed.seed)
    backbone = bc.Backbone("small", len(teaching.classes))
    indices = np.arange(len(teaching))
    train_backbone(
        backbone,
        teaching.pixels(backbone.image_size),
        teaching.labels,
        train=indices[: -parsed.teaching // 8],
        valid=indices[-parsed.teaching // 8 :],
        settings=TrainingSettings(epochs=parsed.epochs),
        seed=parsed.seed,
    )
    pool = bc.open_dataset("phantom", num=parsed.sets * parsed.train, seed=parsed.seed + 1)
    features = backbone.extract(pool)
    test = backbone.extract(bc.open_dataset("phantom", num=parsed.test, seed=parsed.seed + 2), with_maps=True)
    assert test.maps is not None
    scale = features.features.square().mean().sqrt()
    parts = (features.features / scale).double().split(parsed.train)
    return list(zip(parts, features.labels.split(parsed.train), strict=True)), (test.maps / scale).double()


def truths(sets: Sets, parsed: argparse.Namespace) -> dict[str, Iterator[Case]]:
    """The three kinds of truth, each a case for every set."""
    tau, generator = parsed.prior_precision, torch.Generator().manual_seed(parsed.seed)
    features, labels = torch.cat([f for f, _ in sets]), torch.cat([y for _, y in sets])
    population = bc.fit_laplace(features, labels, prior_precision=tau, structure="diag").theta_mean

    def case(features: Tensor, theta: Tensor) -> Case:
        probabilities = torch.softmax(features @ theta[:, :-1].T + theta[:, -1], dim=1)
        return Case(features, torch.multinomial(probabilities, 1, generator=generator)[:, 0], theta[:, :-1], tau)

    def prior_head() -> Tensor:
        return torch.randn(population.shape, generator=generator, dtype=torch.float64) / tau**0.5

    return {
        "head from the prior": (case(features, prior_head()) for features, _ in sets),
        "one head, its labels": (case(features, population) for features, _ in sets),
        "retrained": (Case(*part, population[:, :-1], "evidence") for part in sets),
    }


def coverage(cases: Iterator[Case], maps: Tensor, parsed: argparse.Namespace) -> dict[str, Coverage]:
    """For every posterior: the share of bands that hold the truth, over images, classes and cells, set by set."""
    shares, errors, variances = defaultdict(list), defaultdict(list), defaultdict(list)
    for case in tqdm(cases, total=parsed.sets, unit="set", disable=None):
        truth = torch.einsum("kl,ld,ndij->nkij", centring(len(case.weight)), case.weight, maps)
        for name, posterior in posteriors(case, parsed).items():
            cam = bc.CamPosterior(maps, posterior)
            bands = [(cam.quantile((1 - level) / 2), cam.quantile((1 + level) / 2)) for level in LEVELS]
            alive = cam.sd > 0
            shares[name].append(
                [float(((low <= truth) & (truth <= high))[alive].double().mean()) for low, high in bands]
            )
            errors[name].append(float((cam.mean - truth).square().mean()))
            variances[name].append(float(cam.sd.square().mean()))
    return {name: Coverage(*map(np.array, (shares[name], errors[name], variances[name]))) for name in shares}


def posteriors(case: Case, parsed: argparse.Namespace) -> dict[str, Laplace | Draws]:
    """Every posterior of one training set, at one tau."""
    num_classes = len(case.weight)
    full = bc.fit_laplace(
        case.features, case.labels, num_classes=num_classes, prior_precision=case.prior_precision, structure="full"
    )
    diag, kron = (
        bc.fit_laplace(
            case.features, case.labels, num_classes=num_classes, prior_precision=full.prior_precision, structure=other
        )
        for other in ("diag", "kron")
    )
    refined = full.refine(case.features, case.labels)
    nuts = bc.sample_nuts(
        refined,
        case.features,
        case.labels,
        num_chains=1,
        num_samples=parsed.samples,
        num_warmup=parsed.warmup,
        seed=parsed.seed,
        progress=False,
    )
    return {
        "laplace_diag": diag,
        "laplace_kron": kron,
        "laplace_full": full,
        "laplace_refined": refined,
        "nuts": nuts.draws,
    }


def write(found: dict[str, dict[str, Coverage]], folder: Path) -> None:
    rows = [
        [truth, name, number, *result.shares[number], result.error[number], result.variance[number]]
        for truth, posteriors in found.items()
        for name, result in posteriors.items()
        for number in range(len(result.shares))
    ]
    write_csv(folder / "coverage.csv", ["truth", "posterior", "set", *LEVELS, "squared_error", "variance"], rows)
    shares = {truth: {name: result.shares for name, result in named.items()} for truth, named in found.items()}
    with atomic_path(folder / "coverage.png") as temporary:
        coverage_figure(shares, LEVELS).savefig(temporary, dpi=130, format="png")


if __name__ == "__main__":
    main()
