"""Many classes and wide features, step by step: seconds and peak anonymous memory; ``bench_scale.py --wide``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from scaling.point import Found, watched
from torch import Tensor

import bayescam as bc

_T = TypeVar("_T")
SIZES = {"kron": (4000, 2048, 1000), "full": (4000, 2048, 7)}


def problem(images: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Non-negative correlated features and labels of a confident last layer, each class at least once."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(images, 32, generator=generator) @ torch.randn(32, width, generator=generator) / 6
    phi = torch.relu(hidden + 0.3 * torch.randn(images, width, generator=generator))
    logits = (phi - phi.mean(0)) @ torch.randn(width, classes, generator=generator)
    labels = (8 * logits / logits.std()).softmax(1).multinomial(1, generator=generator)[:, 0]
    labels[:classes] = torch.arange(classes)
    return phi, labels


def step(name: str, make: Callable[[], _T]) -> _T:
    """Make it, and print its row."""
    found, begun = Found(), time.perf_counter()
    with watched(found):
        made = make()
    print(f"| {name} | {time.perf_counter() - begun:.1f} | {found.memory_peak:,.0f} |", flush=True)
    return made


def steps(structure: str) -> None:
    """Fit, sample, predict, and the sd of class activation maps."""
    images, width, classes = SIZES[structure]
    phi, labels = problem(images, width, classes)
    title = f"N = {images:,}, D = {width}, K = {classes}, {structure}"
    print(f"\n| {title} | s | anonymous memory, MiB |\n|---|---|---|")
    fit = step(
        "fit_laplace(prior_precision=1.0)",
        lambda: bc.fit_laplace(phi, labels, num_classes=classes, prior_precision=1.0, structure=structure),
    )
    step("sample, 20 draws", lambda: fit.sample(20, seed=0))
    step("predict_proba, 100 images, pairwise", lambda: fit.predict_proba(phi[:100], method="pairwise"))
    step("predict_proba, 100 images, the default", lambda: fit.predict_proba(phi[:100]))
    maps = torch.relu(torch.randn(16, width, 7, 7, generator=torch.Generator().manual_seed(1)))
    step("CAM sd, 16 images of 7 x 7 cells, all classes", lambda: bc.CamPosterior(maps, fit).sd)
