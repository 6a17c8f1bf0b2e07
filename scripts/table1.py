"""The study's Table 1 with our rows: which last-layer posterior predicts best, and what does it cost?

    python scripts/table1.py --data phantom --out table1/
    python scripts/table1.py --data mura --root MURA-v1.1 --backbone resnet18 --weights DEFAULT --out table1-mura/

Runs `bayescam run` once a data set and adds hierarchical NUTS (tau sampled). Our tau is tuned by evidence on the
training split; the study tuned its on the test set. About the time of the run plus a minute.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from _features import of_run

from bayescam.config import read_config
from bayescam.diagnose.intervals import Interval, metrics_with_intervals
from bayescam.pipeline import run
from bayescam.posterior.laplace import load_laplace
from bayescam.posterior.nuts import sample_nuts
from bayescam.posterior.predictive import predict_proba
from bayescam.report.wording import NAMES
from bayescam.stages.state import GAUSSIANS
from bayescam.storage import write_text

# Vilter and Daglaroglou (DTU), Table 1: MURA, 3,197 test images. Hours of fit and of prior tuning.
STUDY = {
    "cnn": (0.875, 0.647, 0.0741, "-"),
    "laplace_diag": (0.876, 0.600, 0.0727, "0.072 + 0.546 h"),
    "laplace_full": (0.875, 0.467, 0.0303, "0.063 + 0.351 h"),
    "laplace_kron": (0.875, 0.475, 0.0277, "0.074 + 0.709 h"),
}


def main() -> None:
    """Run, tabulate, write ``table1.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="phantom")
    parser.add_argument("--root")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone")
    parser.add_argument("--weights")
    parser.add_argument("--config", type=Path)
    parsed = parser.parse_args()
    overrides = {
        "data.spec": parsed.data,
        "data.root": parsed.root,
        "preset": parsed.preset,
        "seed": parsed.seed,
        "backbone.name": parsed.backbone,
        "backbone.weights": parsed.weights,
    }
    run(parsed.out / "run", parsed.config, overrides, resume=True)
    table = make_table(parsed.out / "run", parsed.seed)
    write_text(parsed.out / "table1.md", table)
    print(table)


def make_table(folder: Path, seed: int) -> str:
    """Table 1 of a complete run, the study's numbers beside, as Markdown."""
    metrics = json.loads((folder / "metrics.json").read_text())
    seconds = json.loads((folder / "posterior/fit_seconds.json").read_text())
    seconds["nuts"] = json.loads((folder / "timings.json").read_text())["stages"]["nuts"]["seconds"]
    methods = {
        name: {metric: Interval(**one) for metric, one in row.items()} for name, row in metrics["intervals"].items()
    }
    methods["nuts_hierarchical"], seconds["nuts_hierarchical"] = hierarchical(folder, seed, metrics["interval_level"])
    lines = [
        f"{metrics['num_train']} training, {metrics['num_test']} test images; tau = {metrics['prior_precision']:.3g}. "
        f"In brackets the {100 * metrics['interval_level']:.0f} % bootstrap interval over {metrics['resampled']}.",
        "Right: the study on MURA, whose prior was tuned on the test set.",
        "",
        "| method | accuracy | NLL | ECE | fit and tuning, s | study: accuracy | NLL | ECE | fit + tuning |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in methods.items():
        cost = f"{seconds[name]:.1f}" if name in seconds else "-"
        theirs = STUDY.get(name)
        right = f"{theirs[0]:.3f} | {theirs[1]:.3f} | {theirs[2]:.4f} | {theirs[3]}" if theirs else "- | - | - | -"
        title = NAMES.get(name, "NUTS, tau sampled")
        lines.append(f"| {title} | {row['accuracy']:.3f} | {row['nll']:.4f} | {row['ece']:.4f} | {cost} | {right} |")
    return "\n".join(lines) + "\n"


def hierarchical(folder: Path, seed: int, level: float) -> tuple[dict[str, Interval], float]:
    """Metrics and seconds of as much NUTS as the run had, with tau ~ Gamma(1, rate 0.1) sampled with the weights."""
    parts = of_run(folder)
    train, test = parts["train"], parts["test"]
    laplace = load_laplace(folder / GAUSSIANS["laplace_refined"])
    begun = time.perf_counter()
    sizes = asdict(read_config(folder / "config.toml", {}).nuts)
    nuts = sample_nuts(laplace, train.features, train.labels, tau_prior="gamma", seed=seed, **sizes)
    seconds = time.perf_counter() - begun
    probs = predict_proba(nuts.draws, test.features).double().numpy()
    return metrics_with_intervals(probs, test.labels.numpy(), test.patients, level=level), seconds


if __name__ == "__main__":
    main()
