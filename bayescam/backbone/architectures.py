"""Networks made here: ``small`` for the phantom and 2 cores, ``study`` as in the study the project goes back to."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Five convolutions to an 8 x 8 map (at 128 x 128), global average pooling, one linear layer.

    Args:
        num_classes: K.
        num_features: D, the channels of the last map.
    """

    def __init__(self, num_classes: int, num_features: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, 16, kernel=5, stride=2),
            nn.MaxPool2d(2),
            *_block(16, 32),
            *_block(32, 64),
            nn.MaxPool2d(2),
            *_block(64, 96),
            nn.MaxPool2d(2),
            *_block(96, num_features),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.features(images)), 1))


class StudyCNN(nn.Module):
    """The study's network: four 5 x 5 convolutions 16-32-64-128, then 2048-1024-512-84-K, for 224 x 224 images.

    Source: Vilter and Daglaroglou (DTU), body parts on MURA; dropout 0.2 between the fully connected layers.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = (1, 16, 32, 64, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(4)
        widths = (2048, 1024, 512, 84)
        tail: list[nn.Module] = []
        for before, after in pairwise(widths):
            tail += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.2)]
        self.tail = nn.Sequential(*tail)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tail(torch.flatten(self.pool(self.features(images)), 1)))


def _block(before: int, after: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    ]
