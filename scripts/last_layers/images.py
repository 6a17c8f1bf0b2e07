"""Real radiographs and the features of a small network of them, for what compares posteriors of its last layer."""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PER_CLASS, VALID, TEST = 150, 50, 500
Sets = dict[str, Tensor]  # by "train", "valid", "clean", "shifted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many images of each class are taken."""
    words = "training, validation and test images a class"
    parser.add_argument("--images", type=int, nargs=3, default=[PER_CLASS, VALID, TEST], metavar="N", help=words)


def read_images(archive: Path, per_class: list[int], rng: np.random.Generator) -> tuple[Sets, Sets, int]:
    """Images of the sets train, valid, clean and shifted (turned by 25 degrees, blurred, noisy), and their labels."""
    train, valid, test = per_class
    images: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "clean": [], "shifted": []}
    labels: dict[str, list[int]] = {name: [] for name in images}
    with zipfile.ZipFile(archive) as stored:
        names = sorted(name for name in stored.namelist() if name.endswith(".jpeg"))
        classes = sorted({name.split("/")[-2] for name in names})
        for label, folder in enumerate(classes):
            own = [name for name in names if name.split("/")[-2] == folder]
            for rank, index in enumerate(rng.permutation(len(own))[: train + valid + test]):
                image = Image.open(io.BytesIO(stored.read(own[index]))).convert("L")
                part = "train" if rank < train else "valid" if rank < train + valid else "clean"
                images[part].append(np.asarray(image, np.float32) / 255)
                labels[part].append(label)
                if part == "clean":
                    turned = image.rotate(25).filter(ImageFilter.GaussianBlur(1.2))
                    noisy = np.asarray(turned, np.float32) / 255 + rng.normal(0, 0.1, turned.size[::-1])
                    images["shifted"].append(np.clip(noisy, 0, 1).astype(np.float32))
                    labels["shifted"].append(label)
    pixels = {name: torch.from_numpy(np.stack(part))[:, None] for name, part in images.items()}
    return pixels, {name: torch.tensor(part) for name, part in labels.items()}, len(classes)


def frozen_features(pixels: Sets, labels: Tensor, num_classes: int, width: int, seed: int) -> Sets:
    """Features of every set by a small CNN with global average pooling, trained on the set "train"."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, width)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(body, nn.Linear(width, num_classes))
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(15):
        for batch in torch.randperm(len(labels)).split(50):
            optimiser.zero_grad()
            cross_entropy(network(pixels["train"][batch]), labels[batch]).backward()
            optimiser.step()
    network.eval()
    with torch.no_grad():
        return {name: torch.cat([body(part) for part in images.split(500)]) for name, images in pixels.items()}
