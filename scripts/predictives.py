"""Which predictive of a Gaussian posterior is nearest to NUTS? Total variation over training sets, tau and shift.

    python scripts/predictives.py --zip mednist-dev.zip
    python scripts/predictives.py --run runs/phantom-...

Fits the last layer to the first images of each class and measures "mc", "pairwise", "bridge" and "map" (of Laplace and
of the refined Gaussian, both full) against NUTS: on the features of a small CNN and its clean and shifted test images,
as in ``real_features.py``, or on those of a complete run. In brackets how far NUTS is from itself, half against half.
Takes minutes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from _features import of_run
from _printed import kept
from last_layers.images import PER_CLASS, Sets, add_arguments, frozen_features, read_images

import bayescam as bc
from bayescam.diagnose.compare import total_variation
from bayescam.diagnose.weight_agreement import halves

METHODS = ("mc", "pairwise", "bridge", "map")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--zip", type=Path, help="the development images, class/*.jpeg")
    source.add_argument("--run", type=Path, help="a complete run, whose features are used")
    add_arguments(parser)
    parser.add_argument("--width", type=int, default=32, help="D of the network trained on --zip")
    parser.add_argument("--per-class", type=int, nargs="+", default=[15, PER_CLASS], help="training images")
    parser.add_argument("--prior-precision", nargs="+", default=["0.01", "0.1", "1", "10", "evidence"])
    parser.add_argument("--draws", type=int, default=300, help="a chain, of 4")
    parser.add_argument("--seed", type=int, default=0, help="of the images chosen, of the network, and of NUTS")
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    chosen = parser.parse_args()
    with kept(chosen.out, "predictives.md"):
        measure(chosen)


def measure(chosen: argparse.Namespace) -> None:
    """One row a training set, prior precision and kind of test image; then how often each was the nearest."""
    features, labels = of_a_run(chosen) if chosen.run else of_images(chosen)
    num_classes = int(labels.max()) + 1
    columns = [f"{gaussian}, {method}" for gaussian in ("Laplace", "refined") for method in METHODS]
    print(f"D = {features['train'].shape[1]}, K = {num_classes}\n")
    print(f"| N | tau | test images | {' | '.join(columns)} | [NUTS] |\n|---|---|---|{'---|' * (len(columns) + 1)}")
    found = []
    for per_class in chosen.per_class:
        first = torch.cat([(labels == k).nonzero().flatten()[:per_class] for k in range(num_classes)])
        train = (features["train"][first], labels[first])
        for tau in chosen.prior_precision:
            found += distances(train, features, num_classes, tau if tau == "evidence" else float(tau), chosen)
    summary(found)


def of_images(chosen: argparse.Namespace) -> tuple[Sets, torch.Tensor]:
    """Features of the sets train, clean and shifted, and the labels of train."""
    pixels, labels, num_classes = read_images(chosen.zip, chosen.images, np.random.default_rng(chosen.seed))
    return frozen_features(pixels, labels["train"], num_classes, chosen.width, chosen.seed), labels["train"]


def of_a_run(chosen: argparse.Namespace) -> tuple[Sets, torch.Tensor]:
    """Features of train and test, and the labels of train."""
    parts = of_run(chosen.run)
    return {"train": parts["train"].features, "clean": parts["test"].features}, parts["train"].labels


def distances(
    train: tuple[torch.Tensor, torch.Tensor],
    features: Sets,
    num_classes: int,
    tau: float | str,
    chosen: argparse.Namespace,
) -> list[list[float]]:
    """Total variation to NUTS: for clean and for shifted images, Laplace by each method, then refined."""
    fit = bc.fit_laplace(*train, num_classes=num_classes, prior_precision=tau)
    refined = fit.refine(*train)
    draws = bc.sample_nuts(refined, *train, num_samples=chosen.draws, seed=chosen.seed, progress=False).draws
    found = []
    for part in [name for name in ("clean", "shifted") if name in features]:
        phi = features[part]
        referee = bc.predict_proba(draws, phi).double()
        away = [
            total_variation(gaussian.predict_proba(phi, method=method).double(), referee)
            for gaussian in (fit, refined)
            for method in METHODS
        ]
        floor = total_variation(*(bc.predict_proba(half, phi) for half in halves(draws)))
        chosen_by = " (evidence)" if tau == "evidence" else ""
        cells = " | ".join(f"{value:.4f}" for value in away)
        print(
            f"| {len(train[1])} | {fit.prior_precision:.3g}{chosen_by} | {part} | {cells} | [{floor:.4f}] |", flush=True
        )
        found.append(away)
    return found


def summary(found: list[list[float]]) -> None:
    """How often each method is the nearest, and its geometric mean and largest distance."""
    for gaussian, start in (("Laplace", 0), ("refined", len(METHODS))):
        own = np.array(found)[:, start : start + len(METHODS)]
        nearest = Counter(own.argmin(1).tolist())
        print(f"\n{gaussian}, {len(own)} rows:")
        for place, method in enumerate(METHODS):
            mean, largest = np.exp(np.log(own[:, place]).mean()), own[:, place].max()
            print(f"- {method}: nearest in {nearest[place]}, geometric mean {mean:.4f}, largest {largest:.4f}")


if __name__ == "__main__":
    main()
