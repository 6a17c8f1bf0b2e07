"""Do the maps point at the bones that the class is known by? Against the phantom's masks, with baselines beside them.

    python scripts/cam_localisation.py                        # about ten minutes on one core

Prints every metric of the maps' posterior mean and lower 5 % bound, of a network whose weights are random (its last
layer fitted all the same), and of maps that know nothing of any training (a bell in the centre, edges, brightness,
random last layer), with 95 % bootstrap intervals over patients: of all pictures, and of those whose bones lie off the
centre, where a bell in the centre is no help. Then the posterior's own hit rate beside the one observed, and what
shuffled labels and parts never seen in training do to maps and sds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _printed import kept
from torch import Tensor

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.data.dataset import RadiographDataset
from bayescam.data.phantom.clinic import OTHER_PARTS
from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.data.pixels import Pixels
from bayescam.explain.baselines import centre_gaussian, edges, random_cam
from bayescam.explain.localise import hit, score
from bayescam.explain.regions import hit_rate
from bayescam.explain.upsample import Upsampling, cells_of_mask
from bayescam.posterior.laplace import Laplace


@dataclass(frozen=True, eq=False)
class Model:
    """A network, its training features, and the posterior of its last layer."""

    backbone: bc.Backbone
    seen: bc.Features
    posterior: Laplace

    def maps(self, dataset: RadiographDataset, pixels: Pixels) -> tuple[bc.CamPosterior, Tensor]:
        """The maps' posterior and the probabilities of a data set."""
        features = self.backbone.extract(dataset, pixels=pixels, with_maps=True)
        assert features.maps is not None
        cam = bc.CamPosterior(features.maps.double(), self.posterior)
        return cam, self.posterior.predict_proba(features.features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2500)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--mask", default="evidence", help="which of the phantom's masks is the truth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    parsed = parser.parse_args()
    with kept(parsed.out, "cam_localisation.md"):
        localise(parsed)


def localise(parsed: argparse.Namespace) -> None:
    """Train, explain, and print every table."""
    train = bc.open_dataset("phantom", num=parsed.train, seed=parsed.seed)
    test = bc.open_dataset("phantom", num=parsed.test, seed=parsed.seed + 1)
    model, random = fitted(train, parsed.epochs, parsed.seed), fitted(train, 0, parsed.seed)
    size = model.backbone.image_size
    shown, labels, rows = test.pixels(size), torch.as_tensor(test.labels), torch.arange(len(test))
    cam, probs = model.maps(test, shown)
    print(
        f"accuracy {(probs.argmax(1) == labels).double().mean():.3f} on {len(test)} test images of other patients; "
        f"{parsed.train} training images, {parsed.epochs} epochs; maps of the true class"
    )
    images = shown.batch(rows.numpy())[:, 0].double()
    masks = torch.stack(
        [
            torch.from_numpy(geometry.to_square(test.masks(n)[parsed.mask].astype(np.float32)) > 0.5)
            for n, geometry in enumerate(shown.geometry)
        ]
    )
    wide = Upsampling.to_size(cam.shape, (size, size))
    maps = {
        "CAM, posterior mean": wide.values(cam.mean[rows, labels]),
        "CAM, lower 5 % bound": wide.values(cam.quantile(0.05)[rows, labels]),
        "CAM of random network": wide.values(random.maps(test, shown)[0].mean[rows, labels]),
        "random last layer": wide.values(random_cam(cam.maps)),
        "edges": edges(images),
        "brightness": images,
        "bell in the centre": centre_gaussian(len(test), (size, size)),
        "flat map": torch.ones_like(images),
    }
    print_scores(maps, masks, test.patients)
    off = off_centre(masks)
    print("\nthe half of them whose bones lie farthest from the centre:")
    print_scores({name: kind[off] for name, kind in maps.items()}, masks[off], [test.patients[n] for n in off.tolist()])
    print_hit_rates(cam, masks, labels)
    print_randomised(cam, model.seen, labels, parsed.seed)
    print_strangers(model, cam, probs, parsed)


def fitted(train: RadiographDataset, epochs: int, seed: int) -> Model:
    """A network trained for so many epochs (0: its first weights), and the refined posterior of its last layer."""
    torch.manual_seed(seed)
    backbone = bc.Backbone("small", len(train.classes))
    pixels, indices, held_out = train.pixels(backbone.image_size), np.arange(len(train)), len(train) // 8
    parts = {"train": indices[:-held_out], "valid": indices[-held_out:]}
    settings = TrainingSettings(epochs=epochs)
    train_backbone(backbone, pixels, train.labels, **parts, settings=settings, seed=seed)
    seen = backbone.extract(train, pixels=pixels)
    posterior = bc.fit_laplace(seen.features, seen.labels, num_classes=len(train.classes))
    return Model(backbone, seen, posterior.refine(seen.features, seen.labels))


def off_centre(masks: Tensor) -> Tensor:
    """The images of a mask whose centroid is farther from the picture's centre than the median one's."""
    chosen = masks.flatten(1).any(1).nonzero().flatten()
    sides = [(torch.arange(side).double() + 0.5) / side - 0.5 for side in masks.shape[1:]]
    some = masks[chosen].double()
    shares = some / some.sum((1, 2), keepdim=True)
    distance = torch.hypot((shares.sum(2) * sides[0]).sum(1), (shares.sum(1) * sides[1]).sum(1))
    return chosen[distance > distance.median()]


def print_scores(maps: dict[str, Tensor], masks: Tensor, patients: list) -> None:
    table = score(maps, masks, patients=patients)
    metrics = list(dict.fromkeys(row.metric for row in table))
    first = table[0]
    print(f"{first.num} images scored, {first.skipped} without a mask or with a full one\n")
    print(f"| map | {' | '.join(metrics)} | dead maps |\n|{'---|' * (len(metrics) + 2)}")
    for name in maps:
        rows = [row for row in table if row.maps == name]
        cells = [f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in rows]
        print(f"| {name} | {' | '.join(cells)} | {rows[0].dead} |")


def print_hit_rates(cam: bc.CamPosterior, masks: Tensor, labels: Tensor) -> None:
    """The posterior hit rate, averaged, beside the observed one, both on the cells."""
    cells = torch.stack([cells_of_mask(mask, cam.shape) for mask in masks])
    chosen = (cells.flatten(1).any(1) & ~cells.flatten(1).all(1)).nonzero().flatten()
    some = cam.select(chosen)
    stated = hit_rate(some, cells[chosen], labels[chosen])
    seen = hit(some.mean[torch.arange(len(chosen)), labels[chosen]], cells[chosen])
    print(
        f"\nposterior hit rate on cells, mean of {len(chosen)} images: {stated.mean():.3f}; "
        f"of the mean map: {seen.mean():.3f}"
    )
    sure = stated > 0.9
    if bool(sure.any()):
        print(f"where it is above 0.9 ({int(sure.sum())} images) the mean map hits in {seen[sure].mean():.3f}")


def print_randomised(cam: bc.CamPosterior, seen: bc.Features, labels: Tensor, seed: int) -> None:
    """The same features with their labels shuffled: maps should lose what they said, and say how unsure they are."""
    shuffled = seen.labels[torch.randperm(len(seen.labels), generator=torch.Generator().manual_seed(seed + 1))]
    tau = cam.posterior.prior_precision
    random = bc.fit_laplace(seen.features, shuffled, num_classes=cam.num_classes, prior_precision=tau)
    rows, other = torch.arange(cam.num_images), bc.CamPosterior(cam.maps, random)
    true, false = cam.mean[rows, labels].flatten(1), other.mean[rows, labels].flatten(1)
    alike = torch.nn.functional.cosine_similarity(true - true.mean(1, True), false - false.mean(1, True)).mean()
    ratio = [(c.mean.abs() / c.sd).median() for c in (cam, other)]
    print(
        f"\nlabels shuffled: correlation of the maps with those of the true labels {alike:.3f}; "
        f"median |mean| / sd {ratio[0]:.2f} -> {ratio[1]:.2f}"
    )


def print_strangers(model: Model, cam: bc.CamPosterior, probs: Tensor, parsed: argparse.Namespace) -> None:
    """Knees and feet, which no training has seen: the maps of the class that is predicted all the same."""
    strange = phantom_dataset(max(14, parsed.test // 3), parsed.seed + 2, parts=OTHER_PARTS)
    other, guessed = model.maps(strange, strange.pixels(model.backbone.image_size))
    for name, maps, chances in (("test images", cam, probs), ("foot and knee", other, guessed)):
        sd = maps.sd[torch.arange(maps.num_images), chances.argmax(1)]
        print(
            f"{name}: median sd of a cell {sd.median():.2f} logits, of the logit "
            f"{maps.logit()[1].gather(1, chances.argmax(1, True)).median():.2f}; "
            f"mean probability of the predicted class {chances.amax(1).mean():.3f}"
        )


if __name__ == "__main__":
    main()
