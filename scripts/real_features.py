"""Which last-layer posterior predicts best on real radiographs? One table for each prior precision.

    python scripts/real_features.py --zip mednist-dev.zip --prior-precision 0.1 evidence

Trains a small CNN on 150 images a class (--images), freezes it, and compares posteriors of its last layer on clean and
shifted test images (rotation, blur, noise): MAP, temperature, laplace-torch, vbll, ours, refined, NUTS. In brackets the
90 % bootstrap interval over images, which name no patients. Peers need `pip install bayescam[bench]`; those absent are
left out. Takes minutes; vbll, the slowest row, most of them.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _printed import kept
from last_layers.images import Sets, add_arguments, frozen_features, read_images
from last_layers.peers import laplace_torch, vbll_layer
from torch import Tensor

import bayescam as bc
from bayescam.diagnose.compare import total_variation
from bayescam.diagnose.intervals import interval, metrics_with_intervals, resampled_mean
from bayescam.diagnose.weight_agreement import halves
from bayescam.posterior.temperature import bound_hit, fit_temperature


class Table:
    """Rows as they come; distances to NUTS need NUTS first."""

    def __init__(self, features: Sets, labels: Sets, referee: dict[str, Tensor] | None) -> None:
        self.features, self.labels, self.referee = features, labels, referee
        columns = [f"{name} {what}" for name in ("clean", "shifted") for what in ("NLL", "ECE", "TV to NUTS")]
        print(f"\n| method | s | {' | '.join(columns)} |\n|---|{'---|' * (len(columns) + 1)}")

    def row(self, name: str, seconds: float, predict: Callable[[Tensor], Tensor]) -> None:
        cells = []
        for part in ("clean", "shifted"):
            proba = predict(self.features[part]).double()
            images = np.arange(len(proba))
            found = metrics_with_intervals(proba.numpy(), self.labels[part].numpy(), images)
            cells += [f"{found['nll']:.4f}", f"{found['ece']:.3f}"]
            if self.referee is None:
                cells.append("–")
            else:
                away = (proba - self.referee[part]).abs().sum(1).numpy() / 2
                cells.append(f"{interval(resampled_mean(away, images), num_groups=len(images)):.4f}")
        print(f"| {name} | {seconds:.1f} | {' | '.join(cells)} |", flush=True)


def compare(features: Sets, labels: Sets, num_classes: int, tau: float | str, chosen: argparse.Namespace) -> None:
    train = (features["train"], labels["train"])
    begun = time.perf_counter()
    fits = {"full": bc.fit_laplace(*train, prior_precision=tau)}
    took = {"full": time.perf_counter() - begun}
    tau = fits["full"].prior_precision
    print(f"\nprior precision {tau:.4g}, N = {len(train[1])}, D = {train[0].shape[1]}, K = {num_classes}")
    print("; ".join(fits["full"].notes))
    for structure in ("kron", "diag"):
        begun = time.perf_counter()
        fits[structure] = bc.fit_laplace(*train, prior_precision=tau, structure=structure)
        took[structure] = time.perf_counter() - begun
    refined, referee = {}, None
    for structure, fit in fits.items():
        begun = time.perf_counter()
        refined[structure] = fit.refine(*train)
        took[f"refined {structure}"] = time.perf_counter() - begun
    if chosen.draws:
        begun = time.perf_counter()
        nuts = bc.sample_nuts(
            refined["full"],
            *train,
            num_samples=chosen.draws,
            num_warmup=chosen.warmup,
            seed=chosen.seed,
            progress=False,
        )
        took["nuts"] = time.perf_counter() - begun
        referee = {part: bc.predict_proba(nuts.draws, features[part]) for part in ("clean", "shifted")}
    table = Table(features, labels, referee)
    map_logits = fits["full"].map_logits
    temperature = fit_temperature(map_logits(features["valid"]), labels["valid"])
    table.row("MAP", took["full"], lambda phi: map_logits(phi).softmax(1))
    name = f"MAP, temperature {temperature:.2f}{' (its bound)' if bound_hit(temperature) else ''}"
    table.row(name, took["full"], lambda phi: (map_logits(phi) / temperature).softmax(1))
    for structure, fit in fits.items():
        for method in ("pairwise", "bridge", "mc"):
            table.row(
                f"{structure}, {method}", took[structure], lambda p, f=fit, m=method: f.predict_proba(p, method=m)
            )
    for structure, fit in refined.items():
        record = fit.refinement
        ended = f"ELBO {fit.elbo:.2f} +- {record.rule_error:.2f}{'' if record.converged else ', not converged'}"
        name = f"{structure} refined ({record.curvatures} Hessians, {ended})"
        for method in ("pairwise", "bridge", "mc"):
            seconds = took[f"refined {structure}"]
            table.row(f"{name}, {method}", seconds, lambda p, f=fit, m=method: f.predict_proba(p, method=m))
    if referee is not None:
        table.row(f"NUTS, 4 x {chosen.draws}", took["nuts"], lambda phi: bc.predict_proba(nuts.draws, phi))
        for part in ("clean", "shifted"):
            half = [bc.predict_proba(one, features[part]) for one in halves(nuts.draws)]
            print(f"NUTS half against half, {part}: total variation {total_variation(*half):.4f}")
    peers(table, features, labels, fits["full"], chosen)


def peers(table: Table, features: Sets, labels: Sets, fit: bc.Laplace, chosen: argparse.Namespace) -> None:
    makers: dict[str, Callable[[], Callable]] = {
        "laplace-torch full, probit (its default link)": lambda: laplace_torch(features, labels, fit, "full", "probit"),
        "laplace-torch kron, probit (its defaults)": lambda: laplace_torch(features, labels, fit, "kron", "probit"),
        "laplace-torch kron, mc": lambda: laplace_torch(features, labels, fit, "kron", "mc"),
    }
    for name, make in makers.items():
        begun = time.perf_counter()
        with warnings.catch_warnings(action="ignore"):
            try:
                predict = make()
            except ImportError as missing:
                print(f"| {name}: absent ({missing.name}) |")
                continue
            table.row(name, time.perf_counter() - begun, predict)
    # vbll's prior variance is prior_scale * 2 / D.
    for prior, scale in (("its prior", 1.0), ("our prior", fit.num_features / (2 * fit.prior_precision))):
        if not chosen.vbll_epochs:
            continue
        begun = time.perf_counter()
        try:
            predict, steps, before, after = vbll_layer(
                features, labels, fit.num_classes, chosen.vbll_epochs, scale, chosen.seed
            )
        except ImportError:
            print("| vbll: absent |")
            continue
        name = f"vbll dense, {prior}, {steps:,} steps (bound {after:.1f}, a quarter before {before:.1f})"
        table.row(name, time.perf_counter() - begun, predict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zip", type=Path, required=True, help="the development images, class/*.jpeg")
    add_arguments(parser)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--prior-precision", nargs="+", default=["0.1", "1", "evidence"])
    parser.add_argument("--draws", type=int, default=500, help="a chain, of 4; 0 leaves NUTS out")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--vbll-epochs", type=int, default=240, help="0 leaves vbll out")
    parser.add_argument("--seed", type=int, default=0, help="of the images chosen, of the network, of vbll and of NUTS")
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    chosen = parser.parse_args()
    with kept(chosen.out, "real_features.md"):
        measure(chosen)


def measure(chosen: argparse.Namespace) -> None:
    """One table for each prior precision."""
    pixels, labels, num_classes = read_images(chosen.zip, chosen.images, np.random.default_rng(chosen.seed))
    features = frozen_features(pixels, labels["train"], num_classes, chosen.width, chosen.seed)
    for tau in chosen.prior_precision:
        compare(features, labels, num_classes, tau if tau in ("evidence", "elbo") else float(tau), chosen)


if __name__ == "__main__":
    main()
