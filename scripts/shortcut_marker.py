"""Does the map betray a planted shortcut? The side marker's letter and corner are tied to the class, or are chance.

    python scripts/shortcut_marker.py                         # about five minutes on 2 cores

Two networks are trained on phantom radiographs, one with the marker tied to the class in every picture. On new pictures
of the same kind the posterior of the map states with what probability the model looks at the marker: that the cells it
lies in outrank the bones that the class is known by, and that the map's peak lies in them. One line of verdict each.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.data.dataset import RadiographDataset
from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.explain.regions import energy, hit_rate
from bayescam.explain.upsample import mask_shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1000, help="images to train on")
    parser.add_argument("--test", type=int, default=200, help="images whose maps are read")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--difficulty", type=float, default=1.0, help="0 to 1: a shortcut tempts where bones are hard")
    parser.add_argument("--augment", action="store_true", help="shift and turn in training")
    parser.add_argument(
        "--least", type=float, default=0.04, help="a cell is the marker's from this share of its area on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    print(
        "| marker | accuracy | the same, marker taken out | P(marker outranks bones), median | images with it > 0.95 | "
        "posterior hit rate on the marker | energy there | area there | verdict |\n" + 9 * "|---" + "|"
    )
    for name, tied in (("by chance", 0.0), ("tied to the class", 1.0)):
        print(f"| {name} | {row(tied, parsed)} |")


def row(tied: float, parsed: argparse.Namespace) -> str:
    """Train with the marker tied or not, then read the maps of the predicted classes."""
    torch.manual_seed(parsed.seed)
    train = phantom_dataset(parsed.train, parsed.seed, shortcut=tied, difficulty=parsed.difficulty)
    test = phantom_dataset(parsed.test, parsed.seed + 1, shortcut=tied, difficulty=parsed.difficulty)
    bare = phantom_dataset(
        parsed.test, parsed.seed + 1, shortcut=tied, difficulty=parsed.difficulty, without=("marker",)
    )
    backbone = bc.Backbone("small", len(train.classes))
    indices, held_out = np.arange(len(train)), parsed.train // 8
    pixels = train.pixels(backbone.image_size)
    settings = TrainingSettings(epochs=parsed.epochs, augment=parsed.augment)
    parts = {"train": indices[:-held_out], "valid": indices[-held_out:]}
    train_backbone(backbone, pixels, train.labels, **parts, settings=settings, seed=parsed.seed)
    seen = backbone.extract(train, pixels=pixels)
    posterior = bc.fit_laplace(seen.features, seen.labels, num_classes=len(train.classes))
    posterior = posterior.refine(seen.features, seen.labels)
    shown, hidden = backbone.extract(test, with_maps=True), backbone.extract(bare)
    predicted = posterior.predict_proba(shown.features).argmax(1)
    accuracy = (predicted == shown.labels).double().mean()
    without = (posterior.predict_proba(hidden.features).argmax(1) == shown.labels).double().mean()
    assert shown.maps is not None
    marker, bones, chosen = regions(test, shown.maps.shape[2:], backbone.image_size, parsed.least)
    cam, labels = bc.CamPosterior(shown.maps[chosen].double(), posterior), predicted[chosen]
    outranks = cam.outranks(marker, bones, labels)
    hits, inside = hit_rate(cam, marker, labels), energy(cam, marker, labels).median
    looks = float((outranks > 0.95).double().mean())
    verdict = "looks at the marker" if looks > 0.5 else "does not rest on the marker"
    return (
        f"{accuracy:.3f} | {without:.3f} | {outranks.median():.3f} | {looks:.0%} of {len(chosen)} | "
        f"{hits.mean():.3f} | {inside.mean():.3f} | {marker.double().mean():.3f} | {verdict}"
    )


def regions(dataset: RadiographDataset, shape: tuple, size: int, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of the marker, cells of the class's own bones outside it, and the images that have both."""
    geometry = dataset.pixels(size).geometry
    marker, bones = [], []
    for number in range(len(dataset)):
        masks = dataset.masks(number)
        marker.append(mask_shares(masks["marker"], tuple(shape), geometry[number]) >= least)
        bones.append((mask_shares(masks["evidence"], tuple(shape), geometry[number]) >= 0.3) & ~marker[-1])
    cells, others = torch.stack(marker), torch.stack(bones)
    chosen = (cells.flatten(1).any(1) & others.flatten(1).any(1)).nonzero().flatten()
    return cells[chosen], others[chosen], chosen


if __name__ == "__main__":
    main()
