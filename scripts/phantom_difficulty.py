"""How hard is the phantom? Train a small CNN on it and print accuracy and confusions on patients it has not seen.

python scripts/phantom_difficulty.py --workers 2              # two minutes on 2 cores
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _printed import kept
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bayescam.data.phantom.clinic import PARTS
from bayescam.data.phantom.roster import Case, Dials, roster
from bayescam.data.phantom.simulate import radiograph
from bayescam.diagnose.intervals import metrics_with_intervals


def square(case: Case, *, seed: int, dials: Dials) -> np.ndarray:
    """One picture, centred on a black square, uint8 (S, S)."""
    image = radiograph(case, seed, dials).image
    out = np.zeros((dials.size, dials.size), np.uint8)
    top, left = ((dials.size - n) // 2 for n in image.shape)
    out[top : top + image.shape[0], left : left + image.shape[1]] = np.rint(255 * image)
    return out


def network(classes: int) -> nn.Sequential:
    """Four blocks of convolution, normalisation, ReLU and pooling; global average pooling; a linear head."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64), (64, 128)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def train(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, batch: int = 32) -> None:
    """AdamW on a one-cycle schedule, no augmentation."""
    steps = len(images) // batch
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * steps)
    for _ in tqdm(range(epochs), unit="epoch", disable=None):
        for rows in torch.randperm(len(images)).split(batch)[:steps]:
            optimiser.zero_grad()
            cross_entropy(net(images[rows]), labels[rows]).backward()
            optimiser.step()
            schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2500)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--difficulty", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    asked = parser.parse_args()
    with kept(asked.out, "phantom_difficulty.txt"):
        measure(asked)


def measure(asked: argparse.Namespace) -> None:
    """Draw, train, print."""
    torch.manual_seed(asked.seed)
    dials = Dials(size=asked.size, difficulty=asked.difficulty)
    cases = list(roster(asked.train + asked.test, asked.seed, dials))
    while cases[asked.train].patient == cases[asked.train - 1].patient:
        cases.pop(asked.train)  # no patient on both sides
    with ProcessPoolExecutor(asked.workers) as pool:
        drawn = pool.map(partial(square, seed=asked.seed, dials=dials), cases, chunksize=32)
        pictures = np.stack(list(tqdm(drawn, total=len(cases), unit="image", disable=None)))
    images = torch.from_numpy(pictures)[:, None].float().div(255).to(asked.device)
    labels = torch.tensor([PARTS.index(case.part) for case in cases], device=asked.device)
    net = network(len(PARTS)).to(asked.device)
    train(net, images[: asked.train], labels[: asked.train], asked.epochs)
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(some) for some in images[asked.train :].split(250)])
    truth, probs = labels[asked.train :].cpu(), logits.double().softmax(1).cpu()
    patients = np.array([str(case.patient) for case in cases[asked.train :]])
    found = metrics_with_intervals(probs.numpy(), truth.numpy(), patients)
    print(f"difficulty {asked.difficulty}: accuracy {found['accuracy']:.3f}, NLL {found['nll']:.3f}")
    print("(in brackets the 90 % bootstrap interval over patients)")
    confusion = torch.zeros(len(PARTS), len(PARTS), dtype=torch.long)
    confusion.index_put_((truth, probs.argmax(1)), torch.tensor(1), accumulate=True)
    for name, row in zip(PARTS, confusion.tolist(), strict=True):
        print(f"{name:>9}", *(f"{count:4d}" for count in row))


if __name__ == "__main__":
    main()
