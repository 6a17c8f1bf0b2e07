"""Where does Laplace lie? Distance to NUTS, NLL and ECE of each method against the training set's size and tau.

    python scripts/laplace_vs_hmc.py --run runs/phantom-... --out laplace_vs_hmc/

Uses the cached features of a complete run; NUTS on every point is the line that the others are held to. How far NUTS
can be trusted stands beside it: R-hat and ESS of its predicted probabilities, and the distance of one half of its
chains to the other, twice what noise does to its own; a point at which it has not converged (R-hat below 1.05, ESS
above 100) is marked. Every number has its 90 % bootstrap interval over the test patients. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from _features import Part, of_run
from _printed import kept
from torch import Tensor

import bayescam as bc
from bayescam.diagnose.compare import MAX_RHAT, MIN_ESS
from bayescam.diagnose.convergence import probability_convergence
from bayescam.diagnose.intervals import Interval, count_groups, interval, metrics_with_intervals, resampled_mean
from bayescam.diagnose.weight_agreement import halves
from bayescam.report.style import COLOURS, new_figure, plain
from bayescam.report.wording import NAMES
from bayescam.storage import atomic_path, write_text

METHODS = ("map", "laplace_diag", "laplace_kron", "laplace_full", "laplace_refined", "nuts")
MEASURES = {"tv": "total variation to NUTS", "nll": "NLL, nat", "ece": "ECE, 15 bins"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--taus", type=float, nargs="+", default=[0.01, 0.1, 1.0, 10.0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 500, 1000, 2000])
    parser.add_argument("--samples", type=int, default=300, help="a chain, of 4")
    parser.add_argument("--warmup", type=int, default=150, help="a chain, of 4")
    parser.add_argument("--seed", type=int, default=0, help="of the training images chosen, and of NUTS")
    parsed = parser.parse_args()
    with kept(parsed.out, "laplace_vs_hmc.md"):
        compare(parsed)


def compare(parsed: argparse.Namespace) -> None:
    """One table a training set and tau, as they come; then the file and the picture of all."""
    parts = of_run(parsed.run)
    train, test = parts["train"], parts["test"]
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(parsed.seed))
    num_classes = 1 + max(int(part.labels.max()) for part in parts.values())
    rows = []
    for size in sorted({min(size, len(order)) for size in parsed.sizes}):
        chosen = (train.features[order[:size]], train.labels[order[:size]])
        for tau in parsed.taus:
            found = measure(chosen, test, tau, num_classes, parsed)
            rows += [{"n": size, "tau": tau, **row} for row in found]
            print_rows(rows[-len(METHODS) :])
    write_text(parsed.out / "laplace_vs_hmc.json", json.dumps(rows, indent=1, default=asdict))
    with atomic_path(parsed.out / "laplace_vs_hmc.png") as temporary:
        draw(rows).savefig(temporary, dpi=130, format="png")
    summary(rows)


def measure(
    train: tuple[Tensor, Tensor], test: Part, tau: float, num_classes: int, parsed: argparse.Namespace
) -> list[dict]:
    """One row a method on one training set at one tau; "tv" of NUTS is that of its one half to the other."""
    fit = {
        name: bc.fit_laplace(*train, num_classes=num_classes, prior_precision=tau, structure=name.split("_")[1])
        for name in ("laplace_diag", "laplace_kron", "laplace_full")
    }
    fit["laplace_refined"] = fit["laplace_full"].refine(*train)
    how = {"num_samples": parsed.samples, "num_warmup": parsed.warmup, "seed": parsed.seed, "progress": False}
    draws = bc.sample_nuts(fit["laplace_refined"], *train, **how).draws
    probs = {name: gaussian.predict_proba(test.features) for name, gaussian in fit.items()}
    probs["map"] = torch.softmax(fit["laplace_full"].map_logits(test.features), 1)
    probs["nuts"] = bc.predict_proba(draws, test.features).double()
    first, second = (bc.predict_proba(half, test.features).double() for half in halves(draws))
    chains = probability_convergence(draws, test.features)
    trust = {
        "rhat": chains.rhat,
        "ess": chains.ess_bulk,
        "converged": chains.rhat < MAX_RHAT and chains.ess_bulk > MIN_ESS,
    }
    rows = []
    for name in METHODS:
        tv = away(first, second, test) if name == "nuts" else away(probs[name], probs["nuts"], test)
        found = metrics_with_intervals(probs[name].numpy(), test.labels.numpy(), test.patients)
        metrics = {metric: found[metric] for metric in ("accuracy", "nll", "ece", "brier")}
        rows.append({"method": name, "tv": tv, **metrics, **(trust if name == "nuts" else {})})
    return rows


def away(first: Tensor, second: Tensor, test: Part) -> Interval:
    """Total variation of two predictives of the test images."""
    values = resampled_mean(0.5 * (first - second).abs().sum(1).numpy(), test.patients)
    return interval(values, num_groups=count_groups(test.patients))


def print_rows(rows: list[dict]) -> None:
    """One table, NUTS last with what says how far it can be trusted."""
    print(f"\nn = {rows[0]['n']}, tau = {rows[0]['tau']:g}")
    print("| method | TV to NUTS | NLL | ECE | R-hat | ESS |\n|---|---|---|---|---|---|")
    for row in rows:
        trust = f"{row['rhat']:.3f} | {row['ess']:.0f}" if row["method"] == "nuts" else "- | -"
        name = NAMES[row["method"]]
        if row["method"] == "nuts":
            name += ", half against half" if row["converged"] else ", half against half, NOT CONVERGED"
        print(f"| {name} | {row['tv']:.4f} | {row['nll']:.4f} | {row['ece']:.4f} | {trust} |", flush=True)


def summary(rows: list[dict]) -> None:
    """Who is nearest to NUTS, and where NUTS cannot be trusted."""
    points = [rows[i : i + len(METHODS)] for i in range(0, len(rows), len(METHODS))]
    nearest = [min(point[:-1], key=lambda row: row["tv"].value)["method"] for point in points]
    counts = ", ".join(f"{NAMES[name]} at {nearest.count(name)}" for name in METHODS[:-1] if name in nearest)
    nuts = [point[-1] for point in points]
    ratios = [point[-2]["tv"].value / point[-1]["tv"].value for point in points]
    lost = [f"n = {row['n']}, tau = {row['tau']:g}" for row in nuts if not row["converged"]]
    print(f"\nnearest to NUTS, of {len(points)} points: {counts}")
    print(f"refined, its distance over NUTS half against half: {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"NUTS: R-hat at most {max(row['rhat'] for row in nuts):.3f}, ESS at least {min(r['ess'] for r in nuts):.0f}")
    print(f"not converged: {'; '.join(lost) or 'none'}")


def draw(rows: list[dict]):
    """One row of panels a training size, one column a measure; x is tau."""
    sizes = sorted({row["n"] for row in rows})
    figure = new_figure(9, 2.5 * len(sizes) + 0.3)
    panels = figure.subplots(len(sizes), len(MEASURES), squeeze=False)
    for line, n in zip(panels, sizes, strict=True):
        for axes, (measure_name, words) in zip(line, MEASURES.items(), strict=True):
            plain(axes, title=f"n = {n}", x="prior precision tau", y=words)
            for name in METHODS:
                curve(axes, [row for row in rows if row["n"] == n and row["method"] == name], measure_name)
            axes.set_xscale("log")
            if measure_name == "tv":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
    marks = {"NUTS, half against half": "--"}
    if not all(row.get("converged", True) for row in rows):
        marks["NUTS, not converged"] = "x"
    for label, style in marks.items():
        axes.plot([], [], style, color=COLOURS["nuts"], markersize=8, markeredgewidth=2, linewidth=1.6, label=label)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def curve(axes, own: list[dict], measure_name: str) -> None:
    """One method's line with its intervals; NUTS's distance to itself dashed, and a cross where it is lost."""
    taus, found = [row["tau"] for row in own], [row[measure_name] for row in own]
    name, colour = own[0]["method"], COLOURS[own[0]["method"]]
    floor = name == "nuts" and measure_name == "tv"
    style = {"linestyle": "--", "linewidth": 1.6} if floor else {"linewidth": 2.5 if name == "nuts" else 1.2}
    label = None if floor else NAMES[name]
    axes.plot(taus, [one.value for one in found], marker="o", markersize=3, color=colour, label=label, **style)
    axes.vlines(taus, [one.low for one in found], [one.high for one in found], color=colour, linewidth=0.8)
    lost = [(row["tau"], row[measure_name].value) for row in own if not row.get("converged", True)]
    if lost:
        axes.plot(*zip(*lost, strict=True), "x", color=colour, markersize=8, markeredgewidth=2)


if __name__ == "__main__":
    main()
