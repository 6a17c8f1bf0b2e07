"""Where does Laplace lie? Distance to NUTS, NLL and ECE of each method against the training set's size and tau.

    python scripts/laplace_vs_hmc.py --run runs/phantom-... --out laplace_vs_hmc/

Uses the cached features of a complete run; NUTS on every point is the line that the others are held to. Every number
has its 90 % bootstrap interval over the test patients. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import bayescam as bc
from bayescam.diagnose.intervals import interval, metrics_with_intervals, resampled_mean
from bayescam.report.style import COLOURS, NAMES, new_figure, plain
from bayescam.runfolder import read_split
from bayescam.storage import atomic_path, load_tensors, write_text

METHODS = ("map", "laplace_diag", "laplace_kron", "laplace_full", "laplace_refined", "nuts")
MEASURES = {"tv": "total variation to NUTS", "nll": "NLL, nat", "ece": "ECE, 15 bins"}


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
    split, patients = map(np.array, read_split(parsed.run))
    patients = patients[split == "test"]
    train, test = ((tensors["features"][split == p], tensors["labels"][split == p]) for p in ("train", "test"))
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(parsed.seed))
    k = int(tensors["labels"].max()) + 1
    rows = []
    for size in sorted({min(size, len(order)) for size in parsed.sizes}):
        part = tuple(values[order[:size]] for values in train)
        for tau in parsed.taus:
            found = measure(part, test, patients, tau, k, parsed.samples, parsed.seed)
            rows += [{"n": size, "tau": tau, **row} for row in found]
            print_rows(rows[-len(METHODS) :])
    write_text(parsed.out / "laplace_vs_hmc.json", json.dumps(rows, indent=1, default=asdict))
    with atomic_path(parsed.out / "laplace_vs_hmc.png") as temporary:
        draw(rows).savefig(temporary, dpi=130, format="png")
    print(f"wrote {parsed.out}")


def measure(train, test, patients, tau, num_classes, num_samples, seed):
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
    rows = []
    for name in METHODS:
        away = 0.5 * (probs[name] - probs["nuts"]).abs().sum(1).numpy()
        tv = interval(resampled_mean(away, patients))
        found = metrics_with_intervals(probs[name].numpy(), test[1].numpy(), patients)
        rows.append(
            {"method": name, "tv": tv, **{metric: found[metric] for metric in ("accuracy", "nll", "ece", "brier")}}
        )
    return rows


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
            for name in METHODS[:-1] if measure_name == "tv" else METHODS:
                own = [row for row in rows if row["n"] == n and row["method"] == name]
                taus, found = [row["tau"] for row in own], [row[measure_name] for row in own]
                width = 2.5 if name == "nuts" else 1.2
                axes.plot(
                    taus, [one.value for one in found], "o-", ms=3, lw=width, color=COLOURS[name], label=NAMES[name]
                )
                axes.vlines(taus, [one.low for one in found], [one.high for one in found], color=COLOURS[name], lw=0.8)
            axes.set_xscale("log")
            if measure_name == "tv":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    main()
