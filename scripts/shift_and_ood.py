"""What happens under shift and on unknown images? NLL, ECE and OOD scores by method, corruption and severity.

    python scripts/shift_and_ood.py --run runs/phantom-... --out shift/ --members 3
    python scripts/shift_and_ood.py --run runs/mura-... --out shift/ --unknown chests/

The test images of a complete run, clean and under corruptions of five severities (bayescam/data/corruptions.py); as the
unknown all images below --unknown or, for a run on the phantom, knees and feet, which the network never saw. Two rows
that readers ask for are trained here, as the run trained its network: a deep ensemble (--members) and MC dropout
(--dropout before the last layer, masks drawn at prediction; Gal and Ghahramani 2016, arXiv:1506.02142). Every number
has its 90 % bootstrap interval over patients, the same patients for all methods and corruptions. The trainings take
--members + 1 times as long as the run's; the rest a few minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _networks import probabilities, trained, under_masks
from _printed import kept
from torch import Tensor

import bayescam as bc
from bayescam.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from bayescam.data.dataset import Radiograph, RadiographDataset
from bayescam.data.folder import SUFFIXES, is_clutter
from bayescam.data.phantom.clinic import OTHER_PARTS
from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.diagnose.calibration import entropy, mutual_information
from bayescam.diagnose.intervals import Interval, count_groups, interval, resampled_metrics
from bayescam.diagnose.uncertainty import ood_with_intervals
from bayescam.errors import BayescamError
from bayescam.report.shift import MARKS, shift_figure, title
from bayescam.stages.reading import reopen
from bayescam.stages.state import RunState
from bayescam.storage import atomic_path, write_text

METRICS = ("accuracy", "nll", "ece", "brier")
PASSES, DRAWS = 50, 500
# Probabilities (N, K) and, where a method has more than one set of weights, mutual information (N,).
Prediction = tuple[np.ndarray, np.ndarray | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--members", type=int, default=3, help="networks in the deep ensemble, 0 for none")
    parser.add_argument("--dropout", type=float, default=0.5, help="rate of the network with dropout, 0 for none")
    parser.add_argument("--unknown", type=Path, metavar="FOLDER", help="images of what the network was not taught")
    parser.add_argument("--num-unknown", type=int, default=200, help="of them at most, drawn by the seed")
    parser.add_argument("--limit", type=int, default=300, help="test images at most")
    parser.add_argument("--device", default="auto", help="of the networks")
    parser.add_argument("--seed", type=int, default=0, help="of the corruptions, the unknown images, masks and draws")
    parsed = parser.parse_args()
    with kept(parsed.out, "shift_and_ood.md"):
        measure(parsed)


def measure(parsed: argparse.Namespace) -> None:
    """Score, write, draw, print."""
    state = reopen(parsed.run, device=parsed.device)
    others = unknown_images(state, parsed)
    rows = state.rows("test")[: parsed.limit]
    clean, truth = state.pixels.batch(rows), (state.dataset.labels[rows], state.test_patients[: parsed.limit])
    predict = predictor(state, parsed)
    near = predict(clean)
    table = [{"corruption": "none", "severity": 0, **row} for row in score(near, *truth)]
    generator = torch.Generator().manual_seed(parsed.seed)
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            found = predict(corrupted(clean, name, severity, generator))
            table += [{"corruption": name, "severity": severity, **row} for row in score(found, *truth)]
    unknown = []
    if others is None:
        print("unknown images: left out; name a folder of images of what this network was not taught with --unknown\n")
    else:
        far = predict(others.pixels(state.image_size).batch(np.arange(len(others))))
        unknown = ood(near, far, truth[1], np.array([f"unknown {name}" for name in others.groups()]))
    bounded = partial(interval, num_groups=count_groups(truth[1]))
    shift = [{**row, **{name: bounded(row[name]) for name in METRICS}} for row in table]
    write_text(
        parsed.out / "shift_and_ood.json", json.dumps({"shift": shift, "ood": unknown}, indent=1, default=asdict)
    )
    with atomic_path(parsed.out / "shift_and_ood.png") as temporary:
        shift_figure(*for_figure(shift, unknown)).savefig(temporary, dpi=130, format="png")
    print(in_words(table, unknown, bounded))


def unknown_images(state: RunState, parsed: argparse.Namespace) -> RadiographDataset | None:
    """Some images of what the network was not taught; None where neither a folder nor the phantom has them."""
    if parsed.unknown is None:
        if state.config.data.spec != "phantom":
            return None
        return phantom_dataset(parsed.num_unknown, parsed.seed, parts=OTHER_PARTS)
    root = parsed.unknown
    files = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES and not is_clutter(path.name)]
    if not files:
        raise BayescamError(f"--unknown {root}: no images in it; name a folder of {', '.join(SUFFIXES)}")
    chosen = sorted(np.random.default_rng(parsed.seed).permutation(len(files))[: parsed.num_unknown])
    records = [Radiograph(files[i].relative_to(root).as_posix(), 0, path=files[i]) for i in chosen]
    return RadiographDataset("unknown", ("unknown",), tuple(records), root)


def predictor(state: RunState, parsed: argparse.Namespace) -> Callable[[Tensor], dict[str, Prediction]]:
    """What gives every method's prediction of images (N, 1, S, S); trains the networks that are no run's."""
    backbone, seed = state.backbone, parsed.seed

    def gaussian(posterior: bc.Laplace) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        draws = posterior.sample(DRAWS, seed=seed)
        return lambda images, phi: (posterior.predict_proba(phi), mutual_information(draws, phi))

    methods: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]] = {
        "cnn": lambda images, phi: (probabilities(backbone, images), None),
        "map": lambda images, phi: (torch.softmax(state.gaussians["laplace_full"].map_logits(phi), 1), None),
        **{name: gaussian(posterior) for name, posterior in state.gaussians.items()},
        "nuts": lambda images, phi: (
            bc.predict_proba(state.nuts.draws, phi),
            mutual_information(state.nuts.draws, phi),
        ),
    }
    if parsed.dropout:
        dropped = trained(state, state.config.seed, dropout=parsed.dropout)
        methods["mc_dropout"] = lambda images, phi: mixed(under_masks(dropped, images, PASSES, seed))
    if parsed.members:
        several = [trained(state, state.config.seed + member) for member in range(1, parsed.members + 1)]
        methods["deep_ensemble"] = lambda images, phi: mixed(
            torch.stack([probabilities(one, images) for one in several])
        )

    def predict(images: Tensor) -> dict[str, Prediction]:
        with backbone.evaluating():
            parts = [backbone.pool(backbone.maps(part.to(state.device))) for part in images.split(128)]
        phi = torch.cat(parts).cpu()
        found = {name: method(images, phi) for name, method in methods.items()}
        return {name: (p.double().numpy(), None if i is None else i.double().numpy()) for name, (p, i) in found.items()}

    return predict


def mixed(probs: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of (S, N, K) probabilities, and what knowing which of the S is right would tell: H(E p) - E H(p)."""
    return probs.mean(0), entropy(probs.mean(0)) - entropy(probs).mean(0)


def score(found: dict[str, Prediction], labels: np.ndarray, patients: np.ndarray) -> list[dict]:
    """The metrics of every method: of the sample, then of resamples of its patients, (1 + R,)."""
    resampled = {name: resampled_metrics(probs, labels, patients) for name, (probs, _) in found.items()}
    return [{"method": name, **{metric: one[metric] for metric in METRICS}} for name, one in resampled.items()]


def ood(
    near: dict[str, Prediction], far: dict[str, Prediction], near_patients: np.ndarray, far_patients: np.ndarray
) -> list[dict]:
    """Entropy and mutual information as scores: known test images against unknown ones."""
    rows = []
    for name in near:
        for measure, a, b in zip(MARKS, scores(*near[name]), scores(*far[name]), strict=True):
            if a is not None:
                found = ood_with_intervals(a, b, near_patients, far_patients)
                rows.append({"method": name, "score": measure, **found})
    return rows


def scores(probs: np.ndarray, information: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    return entropy(torch.from_numpy(probs)).numpy(), information


def for_figure(shift: list[dict], unknown: list[dict]) -> tuple[dict, dict]:
    """NLL by corruption, method and severity, and AUROC by method and score."""
    names = list(dict.fromkeys(row["method"] for row in shift))
    nll = {
        corruption: {
            name: [row["nll"] for row in shift if row["method"] == name and row["corruption"] in ("none", corruption)]
            for name in names
        }
        for corruption in CORRUPTIONS
    }
    auroc: dict[str, dict] = {}
    for row in unknown:
        auroc.setdefault(row["method"], {})[row["score"]] = row["auroc"]
    return nll, auroc


def in_words(table: list[dict], unknown: list[dict], bounded: Callable[[np.ndarray], Interval]) -> str:
    """One row a method: means over all corruptions and severities, and how well it tells unknown images."""
    columns = ["clean NLL", "shifted NLL", "clean ECE", "shifted ECE"]
    columns += [f"{what}, {measure}" for measure in MARKS for what in ("AUROC", "FPR95")]
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(row["method"] for row in table):
        own = [row for row in table if row["method"] == name]
        cells = []
        for metric in ("nll", "ece"):
            clean = [row[metric] for row in own if row["severity"] == 0]
            shifted = [row[metric] for row in own if row["severity"] > 0]
            cells += [f"{bounded(np.mean(values, axis=0)):.3f}" for values in (clean, shifted)]
        for measure in MARKS:
            far = [row for row in unknown if (row["method"], row["score"]) == (name, measure)]
            cells += [f"{far[0][key]:.3f}" if far else "-" for key in ("auroc", "fpr95")]
        lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
