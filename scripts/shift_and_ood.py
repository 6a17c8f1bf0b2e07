"""What happens under shift and on unknown parts? NLL, ECE and OOD scores by method, corruption and severity.

    python scripts/shift_and_ood.py --run runs/phantom-... --out shift/ --members 3

Corruptions of five severities (blur, noise, rotation, exposure, occlusion) of a phantom run's test images; knees and
feet, which the network never saw, as the unknown. A deep ensemble (trained here, --members) and MC dropout on the
features are the rows that readers ask for. Every number has its 90 % bootstrap interval over patients, the same
patients for all methods and corruptions. The ensemble takes --members trainings; the rest a minute or two.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.config import read_config
from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.data.pixels import Pixels
from bayescam.diagnose.calibration import entropy, mutual_information
from bayescam.diagnose.intervals import interval, resampled_metrics
from bayescam.diagnose.uncertainty import ood_with_intervals
from bayescam.posterior.laplace import load_laplace
from bayescam.posterior.nuts import Nuts
from bayescam.report.style import COLOURS, NAMES, named_ticks, new_figure, plain
from bayescam.runfolder import read_split
from bayescam.stages.state import GAUSSIANS
from bayescam.storage import atomic_path, write_text

SEVERITIES = (1, 2, 3, 4, 5)
METRICS = ("accuracy", "nll", "ece", "brier")
DROPOUT, PASSES, DRAWS = 0.2, 50, 500
OTHER_NAMES = {"mc_dropout": "MC dropout", "deep_ensemble": "deep ensemble"}
OTHERS = ("#8c564b", "#bcbd22")


def blur(images, severity, generator):
    sd = 0.6 * severity * images.shape[-1] / 128
    reach = max(1, int(3 * sd))
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sd) ** 2)
    kernel = line[:, None] * line[None] / line.sum() ** 2
    return functional.conv2d(functional.pad(images, [reach] * 4, mode="replicate"), kernel[None, None])


def noise(images, severity, generator):
    return images + 0.04 * severity * torch.randn(images.shape, generator=generator)


def rotation(images, severity, generator):
    angle = torch.tensor(15.0 * severity).deg2rad()
    matrix = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]])
    grid = functional.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def exposure(images, severity, generator):
    return images ** (1 + 0.35 * severity)


def occlusion(images, severity, generator):
    size = images.shape[-1]
    side = int(size * 0.12 * severity)
    covered = images.clone()
    corners = torch.randint(0, size - side + 1, (len(images), 2), generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    top, left = corners[:, 0, None, None], corners[:, 1, None, None]
    covered[((y >= top) & (y < top + side) & (x >= left) & (x < left + side))[:, None]] = 0
    return covered


CORRUPTIONS = {f.__name__: f for f in (blur, noise, rotation, exposure, occlusion)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--members", type=int, default=3, help="networks in the deep ensemble, 0 for none")
    parser.add_argument("--unknown", type=int, default=200, help="images of knees and feet")
    parser.add_argument("--limit", type=int, default=300, help="test images at most")
    parser.add_argument("--seed", type=int, default=0, help="of the corruptions, the unknown parts, dropout and draws")
    parsed = parser.parse_args()
    predict, pixels, labels, patients, rows = load(parsed.run, parsed.members, parsed.seed)
    rows = rows[: parsed.limit]
    generator = torch.Generator().manual_seed(parsed.seed)
    clean, truth = pixels.batch(rows), (labels[rows], patients[rows])
    table = [{"corruption": "none", "severity": 0, **row} for row in score(predict, clean, *truth)]
    for name, corrupt in CORRUPTIONS.items():
        for severity in SEVERITIES:
            moved = corrupt(clean, severity, generator).clamp(0, 1)
            table += [{"corruption": name, "severity": severity, **row} for row in score(predict, moved, *truth)]
    outside = phantom_dataset(parsed.unknown, parsed.seed, parts=("knee", "foot"))
    images = outside.pixels(pixels.images.shape[1]).batch(np.arange(len(outside)))
    unknown = ood(predict, clean, images, patients[rows], np.array(outside.groups()))
    shift = [{**row, **{name: interval(row[name]) for name in METRICS}} for row in table]
    write_text(
        parsed.out / "shift_and_ood.json", json.dumps({"shift": shift, "ood": unknown}, indent=1, default=asdict)
    )
    with atomic_path(parsed.out / "shift_and_ood.png") as temporary:
        draw(shift, unknown).savefig(temporary, dpi=130, format="png")
    print(in_words(table, unknown))


def draw(table, unknown):
    """NLL against severity, one panel a corruption, and how well each method tells unknown parts."""
    names = list(dict.fromkeys(row["method"] for row in table))
    colours = {name: COLOURS.get(name, other) for name, other in zip(names, itertools.cycle(OTHERS), strict=False)}
    figure = new_figure(10, 6.4)
    panels = figure.subplots(2, 3).ravel()
    for axes, corruption in zip(panels, CORRUPTIONS, strict=False):
        plain(axes, title=corruption, x="severity", y="NLL, nat")
        for place, name in enumerate(names):
            found = [row for row in table if row["method"] == name and row["corruption"] in ("none", corruption)]
            severity = [row["severity"] + 0.05 * (place - (len(names) - 1) / 2) for row in found]
            nll = [row["nll"] for row in found]
            line, colour = "--" if name in OTHER_NAMES else "-", colours[name]
            axes.plot(
                severity, [one.value for one in nll], line, marker="o", ms=3, lw=1.3, color=colour, label=title(name)
            )
            axes.vlines(severity, [one.low for one in nll], [one.high for one in nll], color=colour, lw=0.8)
        axes.set_ylim(bottom=0)
    axes = plain(panels[-1], title="Parts never seen: AUROC", x="", y="")
    axes.set_xlabel("dot: entropy; cross: mutual information", fontsize=8)
    for row in unknown:
        place = names.index(row["method"]) + (0.15 if row["score"] == "entropy" else -0.15)
        one, mark = row["auroc"], "o" if row["score"] == "entropy" else "x"
        axes.plot([one.value], [place], mark, ms=4, color=colours[row["method"]])
        axes.hlines([place], [one.low], [one.high], color=colours[row["method"]], lw=1.2)
    axes.axvline(0.5, color="0.6", lw=0.8, ls=":")
    named_ticks(axes, [title(name) for name in names], axis="y")
    axes.invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def title(name: str) -> str:
    return OTHER_NAMES.get(name) or NAMES.get(name, name)


def load(run: Path, members: int, seed: int):
    """What predicts, and the run's pixels, labels, patients and test rows.

    ``predict(images)`` gives each method's probabilities (N, K) and, where it has more than one set of weights, its
    mutual information (N,), float64.
    """
    config = read_config(run / "config.toml", {})
    dataset = bc.open_dataset(config.data.spec, root=config.data.root, num=config.data.phantom_images, seed=config.seed)
    backbone, classes = bc.Backbone.load(run / "backbone.safetensors")
    pixels = dataset.pixels(backbone.image_size)
    split, patients = map(np.array, read_split(run))
    full = load_laplace(run / GAUSSIANS["laplace_full"])
    nuts = Nuts.load(run / "posterior/nuts.safetensors")

    def gaussian(file):
        posterior = load_laplace(run / file)
        draws = posterior.sample(DRAWS, seed=seed)
        return lambda images, phi: (posterior.predict_proba(phi), mutual_information(draws, phi))

    def dropped(images, phi):
        generator = torch.Generator().manual_seed(seed)
        keep = (torch.rand(PASSES, *phi.shape, generator=generator) >= DROPOUT) / (1 - DROPOUT)
        return mixed(torch.softmax(backbone.head(phi * keep), -1))

    methods = {
        "cnn": lambda images, phi: (torch.softmax(backbone.head(phi), 1), None),
        "mc_dropout": dropped,
        "map": lambda images, phi: (torch.softmax(full.map_logits(phi), 1), None),
        **{name: gaussian(file) for name, file in GAUSSIANS.items()},
        "nuts": lambda images, phi: (bc.predict_proba(nuts.draws, phi), mutual_information(nuts.draws, phi)),
    }
    if members:
        networks = ensemble(config, pixels, dataset.labels, split, len(classes), members)
        methods["deep_ensemble"] = lambda images, phi: mixed(torch.stack([softmax(one, images) for one in networks]))

    def predict(images):
        with backbone.evaluating(), torch.no_grad():
            phi = torch.cat([backbone.pool(backbone.maps(part)) for part in images.split(128)])
            found = {name: method(images, phi) for name, method in methods.items()}
        return {name: [None if one is None else one.double().numpy() for one in pair] for name, pair in found.items()}

    return predict, pixels, dataset.labels, patients, np.flatnonzero(split == "test")


def mixed(probs):
    """The mean of (S, N, K) probabilities, and what knowing which of the S is right would tell: H(E p) - E H(p)."""
    return probs.mean(0), entropy(probs.mean(0)) - entropy(probs).mean(0)


def softmax(network, images):
    with network.evaluating():
        return torch.cat([torch.softmax(network(part), 1) for part in images.split(128)])


def ensemble(config, pixels: Pixels, labels, split, num_classes, members):
    """Networks trained from other seeds (Lakshminarayanan et al. 2017)."""
    networks = []
    for member in range(1, members + 1):
        torch.manual_seed(config.seed + member)
        network = bc.Backbone(config.backbone.name, num_classes, image_size=pixels.images.shape[1])
        settings = TrainingSettings(**vars(config.train))
        train, valid = np.flatnonzero(split == "train"), np.flatnonzero(split == "valid")
        train_backbone(network, pixels, labels, train=train, valid=valid, settings=settings, seed=config.seed + member)
        networks.append(network)
    return networks


def score(predict, images, labels, patients):
    """The metrics of every method: of the sample, then of resamples of its patients, (1 + R,)."""
    rows = []
    for name, (probs, _) in predict(images).items():
        found = resampled_metrics(probs, labels, patients)
        rows.append({"method": name, **{metric: found[metric] for metric in METRICS}})
    return rows


def ood(predict, inside, outside, inside_patients, outside_patients):
    """Entropy and mutual information as scores: known test images against unknown parts."""
    rows = []
    far = predict(outside)
    for name, near in predict(inside).items():
        for measure, a, b in zip(("entropy", "mutual information"), scores(*near), scores(*far[name]), strict=True):
            if a is not None:
                found = ood_with_intervals(a, b, inside_patients, outside_patients)
                rows.append({"method": name, "score": measure, **found})
    return rows


def scores(probs, information):
    return entropy(torch.from_numpy(probs)).numpy(), information


def in_words(table, unknown) -> str:
    columns = ["clean NLL", "shifted NLL", "clean ECE", "shifted ECE", "AUROC, entropy", "FPR95, entropy"]
    columns += ["AUROC, mutual information", "FPR95, mutual information"]
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(row["method"] for row in table):
        own = [row for row in table if row["method"] == name]
        cells = []
        for metric in ("nll", "ece"):
            clean = [row[metric] for row in own if row["severity"] == 0]
            shifted = [row[metric] for row in own if row["severity"] > 0]
            cells += [f"{interval(np.mean(values, axis=0)):.3f}" for values in (clean, shifted)]
        for measure in ("entropy", "mutual information"):
            far = [row for row in unknown if (row["method"], row["score"]) == (name, measure)]
            cells += [f"{far[0][key]:.3f}" if far else "-" for key in ("auroc", "fpr95")]
        lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
