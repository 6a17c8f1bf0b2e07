"""Are the posteriors calibrated? Simulation-based calibration of NUTS, Laplace and refined on draws from the prior.

    python scripts/sbc.py --out runs/sbc --simulations 300        # about 10 minutes on 2 cores

Parameters from the prior, labels from the parameters, ranks of the truth among posterior draws, for two centred
weights, a bias, the squared norm and the log-likelihood. Writes ``ranks.json`` and ``ecdf.png``: the ECDF of the ranks
minus the uniform one, with a band that holds at 95 % at once. A line outside its band is a posterior that is wrong.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _printed import kept
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from bayescam.diagnose.sbc import Ranks, ecdf_difference, simulate_ranks
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts
from bayescam.storage import atomic_path, write_text


def samplers(num_classes: int, tau: float, num_draws: int) -> dict:
    """The three posteriors, each as a function (features, labels, seed) -> ``num_draws`` draws."""

    def laplace(features: Tensor, labels: Tensor, seed: int) -> Draws:
        return _fit(features, labels).sample(num_draws, seed=seed)

    def refined(features: Tensor, labels: Tensor, seed: int) -> Draws:
        return _fit(features, labels).refine(features, labels).sample(num_draws, seed=seed)

    def nuts(features: Tensor, labels: Tensor, seed: int) -> Draws:
        run = sample_nuts(
            _fit(features, labels),
            features,
            labels,
            num_chains=1,
            num_samples=3 * num_draws,
            num_warmup=150,
            seed=seed,
            progress=False,
        )
        return Draws(run.draws.weight[:, ::3], run.draws.bias[:, ::3])

    def _fit(features: Tensor, labels: Tensor):
        return fit_laplace(features, labels, num_classes=num_classes, prior_precision=tau)

    return {"nuts": nuts, "laplace": laplace, "refined": refined}


def picture(found: dict[str, Ranks]) -> Figure:
    """A row for each posterior, a column for each quantity."""
    columns = list(next(iter(found.values())).ranks)
    figure = Figure(figsize=(2.6 * len(columns), 2.3 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(columns), sharex=True, sharey="row", squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("rank of the truth / draws", fontsize=8)
    for row, (name, ranks) in zip(axes, found.items(), strict=True):
        for axis, column in zip(row, columns, strict=True):
            curve = ecdf_difference(ranks.ranks[column], ranks.num_draws)
            axis.fill_between(curve.points, curve.lower, curve.upper, color="0.85", step="post")
            axis.step(curve.points, curve.difference, where="post", color="C0" if curve.inside else "C3")
            axis.axhline(0, color="0.5", linewidth=0.6)
        row[0].set_ylabel(f"{name}\nECDF difference", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sbc"))
    parser.add_argument("--simulations", type=int, default=300)
    parser.add_argument("--draws", type=int, default=99, help="posterior draws a simulation")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--features", type=int, default=3)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--prior-precision", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    with kept(parsed.out, "sbc.txt"):
        measure(parsed)


def measure(parsed: argparse.Namespace) -> None:
    """Simulate, write, draw, print."""
    generator = torch.Generator().manual_seed(parsed.seed)
    features = torch.randn(parsed.images, parsed.features, generator=generator, dtype=torch.float64)
    found = simulate_ranks(
        features,
        parsed.classes,
        parsed.prior_precision,
        samplers(parsed.classes, parsed.prior_precision, parsed.draws),
        num_simulations=parsed.simulations,
        seed=parsed.seed,
    )
    rows = {
        name: {
            quantity: {"ranks": ranks.tolist(), "inside": ecdf_difference(ranks, one.num_draws).inside}
            for quantity, ranks in one.ranks.items()
        }
        for name, one in found.items()
    }
    settings = {name: str(value) for name, value in vars(parsed).items()}
    write_text(parsed.out / "ranks.json", json.dumps({"settings": settings, **rows}))
    figure = picture(found)
    with atomic_path(parsed.out / "ecdf.png") as path:
        FigureCanvasAgg(figure).print_png(str(path))
    for name, one in rows.items():
        outside = [quantity for quantity, row in one.items() if not row["inside"]]
        print(f"{name}: " + ("outside its band: " + ", ".join(outside) if outside else "inside all of its 95 % bands"))
    print(f"wrote {parsed.out / 'ranks.json'} and {parsed.out / 'ecdf.png'}")


if __name__ == "__main__":
    main()
