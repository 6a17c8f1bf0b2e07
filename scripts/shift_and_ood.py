"""What happens under shift and on unknown parts? NLL, ECE and OOD scores by method, corruption and severity.

    python scripts/shift_and_ood.py --run runs/phantom-... --out shift/ --members 3

Corruptions of five severities (blur, noise, rotation, exposure, occlusion) of a phantom run's test images; knees and
feet, which the network never saw, as the unknown. A deep ensemble (trained here, --members) and MC dropout on the
features are the rows that readers ask for. The ensemble takes --members trainings; the rest a minute or two.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.config import read_config
from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.data.pixels import Pixels
from bayescam.diagnose.calibration import classification_metrics, entropy, ood_scores
from bayescam.posterior.laplace import load_laplace
from bayescam.posterior.nuts import Nuts
from bayescam.report.style import COLOURS, NAMES, named_ticks, new_figure, plain
from bayescam.stages.state import GAUSSIANS
from bayescam.storage import atomic_path, write_text

SEVERITIES = (1, 2, 3, 4, 5)
DROPOUT, PASSES = 0.2, 50
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
    parsed = parser.parse_args()
    methods, pixels, labels, rows = load(parsed.run, parsed.members)
    rows = rows[: parsed.limit]
    generator = torch.Generator().manual_seed(0)
    clean = pixels.batch(rows)
    target = labels[rows]
    table = [{"corruption": "none", "severity": 0, **row} for row in score(methods, clean, target)]
    for name, corrupt in CORRUPTIONS.items():
        for severity in SEVERITIES:
            moved = corrupt(clean, severity, generator).clamp(0, 1)
            table += [{"corruption": name, "severity": severity, **row} for row in score(methods, moved, target)]
    outside = phantom_dataset(parsed.unknown, 0, parts=("knee", "foot")).pixels(pixels.images.shape[1])
    unknown = ood(methods, clean, outside.batch(np.arange(len(outside))))
    write_text(parsed.out / "shift_and_ood.json", json.dumps({"shift": table, "ood": unknown}, indent=1))
    with atomic_path(parsed.out / "shift_and_ood.png") as temporary:
        draw(table, unknown).savefig(temporary, dpi=130, format="png")
    print(in_words(table, unknown))


def draw(table, unknown):
    """NLL against severity, one panel a corruption, and how well each method tells unknown parts."""
    names = list(dict.fromkeys(row["method"] for row in table))
    colours = {name: COLOURS.get(name, other) for name, other in zip(names, itertools.cycle(OTHERS), strict=False)}
    figure = new_figure(10, 6)
    panels = figure.subplots(2, 3).ravel()
    clean = [row for row in table if row["severity"] == 0]
    for axes, corruption in zip(panels, CORRUPTIONS, strict=False):
        plain(axes, title=corruption, x="severity", y="NLL, nat")
        for name in names:
            found = [
                row for row in clean + table if row["method"] == name and row["corruption"] in ("none", corruption)
            ]
            points = sorted({(row["severity"], row["nll"]) for row in found})
            line = "--" if name in OTHER_NAMES else "-"
            title = OTHER_NAMES.get(name) or NAMES.get(name, name)
            axes.plot(*zip(*points, strict=True), line, marker="o", ms=3, lw=1.3, color=colours[name], label=title)
        axes.set_ylim(bottom=0)
    bars = plain(panels[-1], title="Parts never seen, by entropy", x="AUROC", y="")
    bars.barh(range(len(unknown)), [row["auroc"] for row in unknown], color=[colours[r["method"]] for r in unknown])
    named_ticks(bars, [OTHER_NAMES.get(r["method"]) or NAMES.get(r["method"], r["method"]) for r in unknown], axis="y")
    bars.set_xlim(0.5, 1)
    bars.invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return figure


def load(run: Path, members: int):
    """Methods as functions images -> probabilities, the run's pixels, labels and test rows."""
    config = read_config(run / "config.toml", {})
    dataset = bc.open_dataset(config.data.spec, root=config.data.root, num=config.data.phantom_images, seed=config.seed)
    backbone, classes = bc.Backbone.load(run / "backbone.safetensors")
    pixels = dataset.pixels(backbone.image_size)
    with (run / "split.csv").open(encoding="utf-8", newline="") as stream:
        split = np.array([row["split"] for row in csv.DictReader(stream)])
    gaussians = {name: load_laplace(run / file) for name, file in GAUSSIANS.items()}
    nuts = Nuts.load(run / "posterior/nuts.safetensors")

    def features(images):
        with backbone.evaluating():
            return torch.cat([backbone.pool(backbone.maps(part)) for part in images.split(128)])

    def dropped(images):
        generator = torch.Generator().manual_seed(0)
        phi, head = features(images), backbone.head
        keep = (torch.rand(PASSES, *phi.shape, generator=generator) >= DROPOUT) / (1 - DROPOUT)
        with torch.no_grad():
            return torch.softmax(head(phi * keep), -1).mean(0)

    methods = {
        "cnn": lambda images: torch.softmax(backbone.head(features(images)).detach(), 1),
        "mc_dropout": dropped,
        "map": lambda images: torch.softmax(gaussians["laplace_full"].map_logits(features(images)), 1),
        **{name: (lambda images, g=g: g.predict_proba(features(images))) for name, g in gaussians.items()},
        "nuts": lambda images: bc.predict_proba(nuts.draws, features(images)),
    }
    if members:
        methods["deep_ensemble"] = ensemble(config, pixels, dataset.labels, split, len(classes), members)
    return methods, pixels, dataset.labels, np.flatnonzero(split == "test")


def ensemble(config, pixels: Pixels, labels, split, num_classes, members):
    """The mean softmax of networks trained from other seeds (Lakshminarayanan et al. 2017)."""
    networks = []
    for member in range(1, members + 1):
        torch.manual_seed(config.seed + member)
        network = bc.Backbone(config.backbone.name, num_classes, image_size=pixels.images.shape[1])
        settings = TrainingSettings(**vars(config.train))
        train, valid = np.flatnonzero(split == "train"), np.flatnonzero(split == "valid")
        train_backbone(network, pixels, labels, train=train, valid=valid, settings=settings, seed=config.seed + member)
        networks.append(network)

    def predict(images):
        with torch.no_grad():
            return torch.stack([torch.softmax(network(images), 1) for network in networks]).mean(0)

    return predict


def score(methods, images, labels):
    return [{"method": name, **classification_metrics(f(images).double(), labels)} for name, f in methods.items()]


def ood(methods, inside, outside):
    """Predictive entropy as the score: known test images against unknown parts."""
    return [
        {"method": name, **ood_scores(entropy(f(inside).double()).numpy(), entropy(f(outside).double()).numpy())}
        for name, f in methods.items()
    ]


def in_words(table, unknown) -> str:
    names = list(dict.fromkeys(row["method"] for row in table))
    lines = ["| method | clean NLL | shifted NLL | clean ECE | shifted ECE | OOD AUROC | FPR95 |", "|---|" + "---|" * 6]
    for name in names:
        clean = next(row for row in table if row["method"] == name and row["severity"] == 0)
        shifted = [row for row in table if row["method"] == name and row["severity"] > 0]
        far = next(row for row in unknown if row["method"] == name)
        lines.append(
            f"| {name} | {clean['nll']:.3f} | {np.mean([r['nll'] for r in shifted]):.3f} | {clean['ece']:.3f} | "
            f"{np.mean([r['ece'] for r in shifted]):.3f} | {far['auroc']:.3f} | {far['fpr95']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
