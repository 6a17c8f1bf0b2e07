"""Honest difficulty: a small network learns the parts, not perfectly, and mistakes neighbours for one another."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bayescam.data.phantom.clinic import PARTS
from bayescam.data.phantom.roster import Dials
from bayescam.data.phantom.simulate import simulate

TRAIN, TEST, SIZE = 1200, 400, 48
NEIGHBOURS = {
    "finger": {"hand"},
    "hand": {"finger", "wrist"},
    "wrist": {"hand", "forearm"},
    "forearm": {"wrist", "elbow", "humerus"},
    "elbow": {"forearm", "humerus"},
    "humerus": {"elbow", "shoulder", "forearm"},
    "shoulder": {"humerus"},
}


def pictures():
    images, labels = np.zeros((TRAIN + TEST, 1, SIZE, SIZE), np.float32), []
    drawn = list(simulate(TRAIN + TEST, 11, Dials(size=SIZE)))
    known = drawn[TRAIN - 1].case.patient
    drawn = [one for index, one in enumerate(drawn) if index < TRAIN or one.case.patient != known]
    for index, one in enumerate(drawn):
        height, width = one.image.shape
        top, left = (SIZE - height) // 2, (SIZE - width) // 2
        images[index, 0, top : top + height, left : left + width] = one.image
        labels.append(PARTS.index(one.case.part))
    return torch.from_numpy(images[: len(drawn)]), torch.tensor(labels)


def network():
    layers = []
    for before, after in ((1, 16), (16, 32), (32, 64), (64, 64)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(PARTS)))


@pytest.mark.slow
def test_small_network_is_good_not_perfect_and_confuses_neighbours():
    images, labels = pictures()
    net, epochs, batch = network(), 5, 32
    optimiser = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=epochs * (TRAIN // batch))
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(batch)[: TRAIN // batch]:
            optimiser.zero_grad()
            cross_entropy(net(images[rows]), labels[rows]).backward()
            optimiser.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        guess = net(images[TRAIN:]).argmax(1)
    truth = labels[TRAIN:]
    accuracy = (guess == truth).double().mean().item()
    assert 0.75 < accuracy < 0.985
    wrong = [(PARTS[t], PARTS[g]) for t, g in zip(truth.tolist(), guess.tolist(), strict=True) if t != g]
    near = sum(g in NEIGHBOURS[t] for t, g in wrong) / len(wrong)
    by_chance = sum(len(one) for one in NEIGHBOURS.values()) / (len(PARTS) * (len(PARTS) - 1))
    print(
        f"accuracy {accuracy:.3f}, {near:.2f} of {len(wrong)} mistakes between neighbours (by chance {by_chance:.2f})"
    )
    assert near > 1.5 * by_chance
