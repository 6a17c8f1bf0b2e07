"""Where does Laplace lie? Distance to NUTS, NLL and ECE of each method against the training set's size and tau.

    python scripts/laplace_vs_hmc.py --run runs/phantom-... --out laplace_vs_hmc/

Uses the cached features of a complete run; NUTS on every point is the line that the others are held to. Takes a minute
or two.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch

import bayescam as bc
from bayescam.diagnose.calibration import classification_metrics
from bayescam.report.style import COLOURS, NAMES, new_figure, plain
from bayescam.storage import atomic_path, load_tensors, write_text

METHODS = ("map", "laplace_diag", "laplace_kron", "laplace_full", "laplace_refined", "nuts")
MEASURES = {"tv": "mean total variation to NUTS", "nll": "NLL, nat", "ece": "ECE, 15 bins"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--taus", type=float, nargs="+", default=[0.01, 0.1, 1.0, 10.0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 500, 1000, 2000])
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    tensors, _ = load_tensors(parsed.run / "features.safetensors", kind="features")
    with (parsed.run / "split.csv").open(encoding="utf-8", newline="") as stream:
        split = np.array([row["split"] for row in csv.DictReader(stream)])
    train, test = ((tensors["features"][split == p], tensors["labels"][split == p]) for p in ("train", "test"))
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(parsed.seed))
    k = int(tensors["labels"].max()) + 1
    rows = []
    for size in sorted({min(size, len(order)) for size in parsed.sizes}):
        part = tuple(values[order[:size]] for values in train)
        for tau in parsed.taus:
            rows += [{"n": size, "tau": tau, **row} for row in measure(part, test, tau, k, parsed.samples, parsed.seed)]
            print_rows(rows[-len(METHODS) :])
    write_text(parsed.out / "laplace_vs_hmc.json", json.dumps(rows, indent=1))
    with atomic_path(parsed.out / "laplace_vs_hmc.png") as temporary:
        draw(rows).savefig(temporary, dpi=130, format="png")
    print(f"wrote {parsed.out}")


def measure(train, test, tau, num_classes, num_samples, seed):
    """One row a method on one training set at one tau."""
    fit = {
        name: bc.fit_laplace(*train, num_classes=num_classes, prior_precision=tau, structure=name.split("_")[1])
        for name in ("laplace_diag", "laplace_kron", "laplace_full")
    }
    fit["laplace_refined"] = fit["laplace_full"].refine(*train)
    nuts = bc.sample_nuts(fit["laplace_refined"], *train, num_samples=num_samples, seed=seed, progress=False)
    probs = {name: gaussian.predict_proba(test[0]) for name, gaussian in fit.items()}
    probs["map"] = torch.softmax(fit["laplace_full"].map_logits(test[0]), 1)
    probs["nuts"] = bc.predict_proba(nuts.draws, test[0]).double()
    return [
        {
            "method": name,
            "tv": float(0.5 * (probs[name] - probs["nuts"]).abs().sum(1).mean()),
            **classification_metrics(probs[name], test[1]),
        }
        for name in METHODS
    ]


def print_rows(rows) -> None:
    print(f"\nn = {rows[0]['n']}, tau = {rows[0]['tau']:g}\n| method | TV to NUTS | NLL | ECE |\n|---|---|---|---|")
    for row in rows:
        print(f"| {NAMES[row['method']]} | {row['tv']:.4f} | {row['nll']:.4f} | {row['ece']:.4f} |")


def draw(rows):
    """One row of panels a training size, one column a measure; x is tau."""
    sizes = sorted({row["n"] for row in rows})
    figure = new_figure(9, 2.5 * len(sizes))
    for line, n in zip(figure.subplots(len(sizes), 3, squeeze=False), sizes, strict=True):
        for axes, (measure_name, words) in zip(line, MEASURES.items(), strict=True):
            plain(axes, title=f"n = {n}", x="prior precision tau", y=words)
            for name in METHODS:
                points = [(row["tau"], row[measure_name]) for row in rows if row["n"] == n and row["method"] == name]
                width = 2.5 if name == "nuts" else 1.2
                axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=width, color=COLOURS[name], label=NAMES[name])
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    main()
