"""Do the maps point at the bones that the class is known by? Against the phantom's masks, with baselines beside them.

    python scripts/cam_localisation.py                        # about three minutes on 2 cores

Prints every metric of the maps' posterior mean and lower 5 % bound and of maps that know nothing of the training (a
bell in the centre, edges, brightness, random weights), with 95 % bootstrap intervals over patients; then the
posterior's own hit rate beside the one observed, and what randomising labels does to maps and sds.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

import bayescam as bc
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.explain.baselines import centre_gaussian, edges, random_cam
from bayescam.explain.localise import hit, score
from bayescam.explain.regions import hit_rate
from bayescam.explain.upsample import Upsampling, cells_of_mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--mask", default="evidence", help="which of the phantom's masks is the truth")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    torch.manual_seed(parsed.seed)
    train = bc.open_dataset("phantom", num=parsed.train, seed=parsed.seed)
    test = bc.open_dataset("phantom", num=parsed.test, seed=parsed.seed + 1)
    backbone = bc.Backbone("small", len(train.classes))
    size, indices, held_out = backbone.image_size, np.arange(parsed.train), parsed.train // 8
    pixels = train.pixels(size)
    parts = {"train": indices[:-held_out], "valid": indices[-held_out:]}
    settings = TrainingSettings(epochs=parsed.epochs)
    train_backbone(backbone, pixels, train.labels, **parts, settings=settings, seed=parsed.seed)
    seen = backbone.extract(train, pixels=pixels)
    posterior = bc.fit_laplace(seen.features, seen.labels, num_classes=len(train.classes))
    posterior = posterior.refine(seen.features, seen.labels)
    shown = test.pixels(size)
    features = backbone.extract(test, pixels=shown, with_maps=True)
    assert features.maps is not None
    cam, rows = bc.CamPosterior(features.maps.double(), posterior), torch.arange(len(test))
    images = shown.batch(rows.numpy())[:, 0].double()
    masks = torch.stack(
        [
            torch.from_numpy(geometry.to_square(test.masks(n)[parsed.mask].astype(np.float32)) > 0.5)
            for n, geometry in enumerate(shown.geometry)
        ]
    )
    wide = Upsampling.to_size(cam.shape, (size, size))
    maps = {
        "CAM, posterior mean": wide.values(cam.mean[rows, features.labels]),
        "CAM, lower 5 % bound": wide.values(cam.quantile(0.05)[rows, features.labels]),
        "random weights": wide.values(random_cam(cam.maps)),
        "edges": edges(images),
        "brightness": images,
        "bell in the centre": centre_gaussian(len(test), (size, size)),
    }
    print_scores(maps, masks, test.patients)
    print_hit_rates(cam, masks, features.labels)
    print_randomised(cam, seen, features.labels)


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


def print_randomised(cam: bc.CamPosterior, seen: bc.Features, labels: Tensor) -> None:
    """The same features with their labels shuffled: maps should lose what they said, and say how unsure they are."""
    shuffled = seen.labels[torch.randperm(len(seen.labels), generator=torch.Generator().manual_seed(1))]
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


if __name__ == "__main__":
    main()
