"""Do the credible bands of class activation maps cover? Many independent simulated training sets, one frozen network.

    python scripts/cam_coverage.py                            # about ten minutes on 2 cores
    python scripts/cam_coverage.py --sets 40 --nuts 40        # more sets, NUTS on all of them

A small network is trained once on phantom radiographs and frozen. Then the last layer is fitted again and again, each
time on a fresh training set of other patients, and its 50, 80 and 95 % bands on test images are compared with the
truth:

  known head       labels drawn from a head that was itself drawn from the prior, at the phantoms' features. The model
                   is right, so an exact posterior covers 50, 80 and 95 % on average; what is missing is the
                   approximation's.
  population head  the phantoms' own labels; the truth is the head fitted to all training sets together. The model is
                   only an approximation, as in use.

Also printed: the root mean square error of the maps' means over the sd that the posterior states, 1 where they agree.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.posterior.covariance import centring
from bayescam.storage import write_csv

LEVELS = (0.5, 0.8, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=20, help="independent training sets")
    parser.add_argument("--train", type=int, default=200, help="images in each")
    parser.add_argument("--test", type=int, default=60, help="images whose maps are checked")
    parser.add_argument("--nuts", type=int, default=5, help="sets on which NUTS runs too")
    parser.add_argument("--epochs", type=int, default=8, help="of the network")
    parser.add_argument("--prior-precision", type=float, default=1.0, help="tau, and of the known heads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table as CSV here")
    parsed = parser.parse_args()
    sets, maps = simulated(parsed)
    rows = []
    for truth, cases in (("known head", known_heads(sets, parsed)), ("population head", population_head(sets, parsed))):
        table = coverage(cases, maps, parsed)
        print(
            f"\n{truth}\n| posterior | sets | 50 % | 80 % | 95 % | error of the means / mean sd |\n"
            "|---|---|---|---|---|---|"
        )
        for name, (num, shares, ratio) in table.items():
            print(f"| {name} | {num} | " + " | ".join(f"{share:.3f}" for share in shares) + f" | {ratio:.2f} |")
            rows.append([truth, name, num, *shares, ratio])
    if parsed.out:
        write_csv(parsed.out, ["truth", "posterior", "sets", *LEVELS, "error_over_sd"], rows)


def simulated(parsed: argparse.Namespace) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Features and labels of each training set, and the feature maps of the test images, of one frozen network."""
    torch.manual_seed(parsed.seed)
    teaching = bc.open_dataset("phantom", num=700, seed=parsed.seed)
    backbone = bc.Backbone("small", len(teaching.classes))
    indices = np.arange(len(teaching))
    train_backbone(
        backbone,
        teaching.pixels(backbone.image_size),
        teaching.labels,
        train=indices[:-100],
        valid=indices[-100:],
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


Case = tuple[Tensor, Tensor, Tensor]  # features, labels, the true weight (K, D)


def known_heads(sets: list[tuple[Tensor, Tensor]], parsed: argparse.Namespace) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(parsed.seed)
    classes = int(max(labels.max() for _, labels in sets)) + 1
    for features, _ in sets:
        theta = torch.randn(classes, features.shape[1] + 1, generator=generator, dtype=torch.float64)
        theta /= parsed.prior_precision**0.5
        probabilities = torch.softmax(features @ theta[:, :-1].T + theta[:, -1], dim=1)
        yield features, torch.multinomial(probabilities, 1, generator=generator)[:, 0], theta[:, :-1]


def population_head(sets: list[tuple[Tensor, Tensor]], parsed: argparse.Namespace) -> Iterator[Case]:
    features, labels = torch.cat([f for f, _ in sets]), torch.cat([y for _, y in sets])
    truth = bc.fit_laplace(features, labels, prior_precision=parsed.prior_precision, structure="diag").weight_mean
    for part in sets:
        yield *part, truth


def coverage(cases: Iterator[Case], maps: Tensor, parsed: argparse.Namespace) -> dict:
    """For every posterior: sets, coverage of the bands over sets, images, classes and cells, error over sd."""
    shares, means, sds = defaultdict(list), defaultdict(list), defaultdict(list)
    for number, (features, labels, truth) in enumerate(cases):
        centred = torch.einsum("kl,ld,ndij->nkij", centring(len(truth)), truth, maps)
        for name, fit in posteriors(features, labels, len(truth), number < parsed.nuts, parsed).items():
            cam = bc.CamPosterior(maps, fit())
            bands = [(cam.quantile((1 - level) / 2), cam.quantile((1 + level) / 2)) for level in LEVELS]
            shares[name].append([float(((low <= centred) & (centred <= high)).double().mean()) for low, high in bands])
            means[name].append(cam.mean - centred)
            sds[name].append(cam.sd)
    return {
        name: (
            len(shares[name]),
            np.mean(shares[name], axis=0),
            float(torch.stack(means[name]).square().mean().sqrt() / torch.stack(sds[name]).square().mean().sqrt()),
        )
        for name in shares
    }


def posteriors(
    features: Tensor, labels: Tensor, num_classes: int, with_nuts: bool, parsed: argparse.Namespace
) -> dict[str, Callable]:
    """Each posterior of one training set, made when called."""

    def laplace(structure: str):
        return bc.fit_laplace(
            features, labels, num_classes=num_classes, prior_precision=parsed.prior_precision, structure=structure
        )

    full = laplace("full")
    refined = full.refine(features, labels)
    named: dict[str, Callable] = {
        "Laplace, diag": lambda: laplace("diag"),
        "Laplace, kron": lambda: laplace("kron"),
        "Laplace, full": lambda: full,
        "refined, full": lambda: refined,
    }
    if with_nuts:
        named["NUTS"] = lambda: (
            bc.sample_nuts(
                refined, features, labels, num_chains=2, num_samples=250, seed=parsed.seed, progress=False
            ).draws
        )
    return named


if __name__ == "__main__":
    main()
