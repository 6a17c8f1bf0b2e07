"""Does the map betray a planted shortcut? The side marker's letter and corner are tied to the class, or are chance.

    python scripts/shortcut_marker.py                         # about five minutes on one core

Two networks are trained on hard phantom radiographs without augmentation: one whose markers tell the class in every
picture, and one whose markers are chance. Both then see the same new patients three times: with markers that tell the
class, with markers that tell another class, and without markers. A network that reads the marker fails on the second
and third; that it does is the proof. Then the posterior of the maps states with what probability the model looks at
the marker: that the marker's cells outrank the bones that the class is known by, and that the map's peak lies within a
cell of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _printed import kept
from torch import Tensor
from torch.nn.functional import max_pool2d

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.data.dataset import RadiographDataset
from bayescam.data.phantom.clinic import PARTS
from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.explain.localise import bootstrap_mean
from bayescam.explain.marker import MarkerRegions, marker_outranks, marker_regions
from bayescam.explain.regions import energy, hit_rate
from bayescam.posterior.laplace import Laplace
from bayescam.report.cam_figures import gallery_figure
from bayescam.report.cam_panels import case_panels
from bayescam.storage import atomic_path

NETWORKS = {"marker by chance": 0.0, "marker tied to the class": 1.0}
PICTURES: dict[str, dict[str, object]] = {
    "tells the class": {},
    "tells another": {"lie": 1},
    "taken out": {"without": ("marker",)},
}


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network and the posterior of its last layer."""

    backbone: bc.Backbone
    posterior: Laplace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=800, help="images to train on")
    parser.add_argument("--test", type=int, default=300, help="images whose maps are read")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--difficulty", type=float, default=1.0, help="0 to 1: a shortcut tempts where bones are hard")
    parser.add_argument("--parts", nargs="+", default=["elbow", "forearm", "humerus", "wrist"], choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for what is printed and a picture of each network's maps")
    parsed = parser.parse_args()
    with kept(parsed.out, "shortcut_marker.md"):
        measure(parsed)


def measure(parsed: argparse.Namespace) -> None:
    """Train both networks, print every table, draw."""
    pictures = {
        name: phantoms(parsed.test, parsed.seed + 1, parsed, shortcut=1.0, **dials) for name, dials in PICTURES.items()
    }
    models = {name: trained(tied, parsed) for name, tied in NETWORKS.items()}
    print(
        f"{len(parsed.parts)} classes, {parsed.train} training and {parsed.test} test pictures; 95 % intervals over "
        "patients\n"
    )
    print_accuracy(models, pictures)
    print_attention(models, pictures["tells the class"])
    if parsed.out:
        draw(models, pictures["tells the class"], parsed.out)


def phantoms(num: int, seed: int, parsed: argparse.Namespace, **dials: object) -> RadiographDataset:
    return phantom_dataset(num, seed, parts=tuple(parsed.parts), difficulty=parsed.difficulty, **dials)


def trained(tied: float, parsed: argparse.Namespace) -> Model:
    """A small network whose training pictures' markers are tied to the class or not, and its refined posterior."""
    torch.manual_seed(parsed.seed)
    train = phantoms(parsed.train, parsed.seed, parsed, shortcut=tied)
    backbone = bc.Backbone("small", len(train.classes))
    pixels, indices, held_out = train.pixels(backbone.image_size), np.arange(len(train)), parsed.train // 8
    settings = TrainingSettings(epochs=parsed.epochs, batch_size=32, augment=False)
    parts = {"train": indices[:-held_out], "valid": indices[-held_out:]}
    train_backbone(backbone, pixels, train.labels, **parts, settings=settings, seed=parsed.seed)
    seen = backbone.extract(train, pixels=pixels)
    posterior = bc.fit_laplace(seen.features, seen.labels, num_classes=len(train.classes))
    return Model(backbone, posterior.refine(seen.features, seen.labels))


def print_accuracy(models: dict[str, Model], pictures: dict[str, RadiographDataset]) -> None:
    """Accuracy by what the marker says, and how often the lying marker is believed."""
    print(f"| network, accuracy where the marker | {' | '.join(pictures)} | the lie is believed |\n{5 * '|---'}|")
    for name, model in models.items():
        cells = []
        for dataset in pictures.values():
            predicted = model.posterior.predict_proba(model.backbone.extract(dataset).features).argmax(1)
            cells.append(interval(predicted.numpy() == dataset.labels, dataset))
            if dataset is pictures["tells another"]:
                told = (dataset.labels + 1) % len(dataset.classes)
                believed = interval(predicted.numpy() == told, dataset)
        print(f"| {name} | {' | '.join(cells)} | {believed} |")


def print_attention(models: dict[str, Model], dataset: RadiographDataset) -> None:
    """With what probability each network looks at the marker, on the same pictures, of the class it predicts."""
    print(
        "\n| network | P(marker outranks bones) | pictures with it > 0.95 | posterior hit rate within a cell of the "
        f"marker | share of the evidence there | of the area |\n{6 * '|---'}|"
    )
    for name, model in models.items():
        cam, labels, regions = explained(model, dataset)
        some, chosen, kept = cam.select(regions.chosen), labels[regions.chosen], dataset.select(regions.chosen.numpy())
        outranks = marker_outranks(cam, regions, labels)[regions.chosen]
        near = max_pool2d(regions.marker.float(), 3, stride=1, padding=1) > 0
        seen = (outranks, outranks > 0.95, hit_rate(some, near, chosen), energy(some, near, chosen).median)
        cells = [interval(values.double().numpy(), kept) for values in seen]
        print(f"| {name} | {' | '.join(cells)} | {near.double().mean():.3f} |")
    print(f"\n{len(regions.chosen)} of {len(dataset)} pictures show both marker and bones of the class")


def explained(model: Model, dataset: RadiographDataset) -> tuple[bc.CamPosterior, Tensor, MarkerRegions]:
    """The maps' posterior, the predicted classes, and the regions."""
    pixels = dataset.pixels(model.backbone.image_size)
    shown = model.backbone.extract(dataset, pixels=pixels, with_maps=True)
    assert shown.maps is not None
    cam = bc.CamPosterior(shown.maps.double(), model.posterior)
    masks = [dataset.masks(number) for number in range(len(dataset))]
    return (
        cam,
        model.posterior.predict_proba(shown.features).argmax(1),
        marker_regions(masks, pixels.geometry, cam.shape),
    )


def interval(values: np.ndarray, dataset: RadiographDataset) -> str:
    low, high = bootstrap_mean(np.asarray(values, dtype=float), np.array(dataset.patients))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def draw(models: dict[str, Model], dataset: RadiographDataset, folder: Path) -> None:
    """The first two pictures of every class under each network, a PNG for each: their logits have no common scale."""
    first = np.concatenate([np.flatnonzero(dataset.labels == k)[:2] for k in range(len(dataset.classes))])
    some = dataset.select(first)
    for name, model in models.items():
        geometry = some.pixels(model.backbone.image_size).geometry
        cam, labels, regions = explained(model, some)
        outranks = marker_outranks(cam, regions, labels)
        cases = [
            case_panels(
                some.image(row),
                cam.select([row]),
                label=int(labels[row]),
                classes=some.classes,
                geometry=geometry[row],
                title="not both shown" if outranks[row].isnan() else f"marker p = {outranks[row]:.2f}",
            )
            for row in range(len(first))
        ]
        with atomic_path(folder / f"{name.replace(' ', '-')}.png") as temporary:
            gallery_figure(cases, title=name).savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    main()
