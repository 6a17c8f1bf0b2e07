"""Training of the deterministic network: cross-entropy, AdamW, one cycle of the learning rate, mild augmentation.

Epoch e draws everything (order, augmentation, dropout) from seed and e alone, so that a run resumed after any epoch is
the run that was never interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayescam.backbone.network import Backbone
from bayescam.data.pixels import Pixels
from bayescam.errors import BayescamError, FileFormatError
from bayescam.storage import load_tensors, save_tensors


@dataclass(frozen=True)
class TrainingSettings:
    """How the network is trained.

    Args:
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the peak of the cycle.
        weight_decay: AdamW's.
        augment: shift (up to 8 %), turn (up to 15 degrees), scale (up to 12 %) and expose (up to 20 %) each image anew.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    augment: bool = True


@dataclass(frozen=True)
class Epoch:
    """One line of history.csv: means over images, in nats."""

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float


def train_backbone(
    backbone: Backbone,
    pixels: Pixels,
    labels: np.ndarray,
    *,
    train: np.ndarray,
    valid: np.ndarray,
    settings: TrainingSettings,
    seed: int,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> list[Epoch]:
    """Train ``backbone`` in place; the validation images are only looked at.

    Args:
        backbone: on the device to train on.
        pixels: N images.
        labels: (N,).
        train, valid: indices into pixels.
        settings: how.
        seed: of everything random here.
        checkpoint: file that holds the state after each epoch; training goes on from it where it exists.
        progress: show a bar.

    Raises:
        BayescamError: the loss is not finite.
        FileFormatError: the checkpoint is of another run.
    """
    targets = torch.as_tensor(labels, dtype=torch.long)
    backbone.net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        backbone.net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    history: list[Epoch] = []
    if checkpoint is not None and checkpoint.is_file():
        history = _restore(backbone, optimizer, checkpoint, settings, seed)
    bar = tqdm(
        range(len(history), settings.epochs),
        desc="training",
        unit="epoch",
        initial=len(history),
        total=settings.epochs,
        disable=None if progress else True,
    )
    for epoch in bar:
        train_loss, train_accuracy = _one_epoch(
            backbone, optimizer, pixels, targets, train, settings, epoch=epoch, seed=seed
        )
        valid_loss, valid_accuracy = _evaluate(backbone, pixels, targets, valid, settings.batch_size)
        history.append(Epoch(epoch, train_loss, train_accuracy, valid_loss, valid_accuracy))
        bar.set_postfix_str(f"train loss {train_loss:.3f}, valid accuracy {valid_accuracy:.3f}")
        if checkpoint is not None:
            _store(backbone, optimizer, checkpoint, settings, seed, history)
    backbone.eval()
    return history


def _one_epoch(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    pixels: Pixels,
    targets: Tensor,
    train: np.ndarray,
    settings: TrainingSettings,
    *,
    epoch: int,
    seed: int,
) -> tuple[float, float]:
    device = backbone.device
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = train[torch.randperm(len(train), generator=generator).numpy()]
    starts = range(0, len(order), settings.batch_size)
    total_steps = settings.epochs * len(starts)
    loss_sum, correct = 0.0, 0
    backbone.net.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 100_003 + epoch)
        for step, start in enumerate(starts):
            rows = order[start : start + settings.batch_size]
            if len(rows) < 2:
                continue  # batch normalisation needs two images
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * one_cycle((epoch * len(starts) + step) / total_steps)
            images = pixels.batch(rows).to(device)
            if settings.augment:
                images = augment(images, generator)
            target = targets[rows].to(device)
            logits = backbone(images)
            loss = nn.functional.cross_entropy(logits, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach()) * len(rows)
            correct += int((logits.argmax(1) == target).sum())
            if not math.isfinite(loss_sum):
                raise BayescamError(
                    f"training loss is not finite in epoch {epoch + 1}; lower train.learning_rate "
                    f"(now {settings.learning_rate:g})"
                )
    return loss_sum / len(order), correct / len(order)


def one_cycle(t: float) -> float:
    """The learning rate's share of its peak at t in [0, 1]: up linearly over 20 %, down as a half cosine to 1 %."""
    if t < 0.2:
        return 0.1 + 0.9 * t / 0.2
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (t - 0.2) / 0.8))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, 1, S, S) turned, scaled, shifted and exposed by its own random amount; never flipped."""
    n = images.shape[0]
    uniform = torch.rand(6, n, generator=generator).to(images.device) * 2 - 1
    angle, scale = uniform[0] * math.radians(15), 1 + 0.12 * uniform[1]
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    top = torch.stack([cosine, -sine, 0.16 * uniform[2]], dim=1)
    bottom = torch.stack([sine, cosine, 0.16 * uniform[3]], dim=1)
    grid = nn.functional.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    gain, gamma = 1 + 0.2 * uniform[4], 1 + 0.2 * uniform[5]
    return (moved.clamp(0, 1) ** gamma[:, None, None, None] * gain[:, None, None, None]).clamp(0, 1)


def _evaluate(
    backbone: Backbone, pixels: Pixels, targets: Tensor, rows: np.ndarray, batch_size: int
) -> tuple[float, float]:
    if len(rows) == 0:
        return math.nan, math.nan
    loss, correct = 0.0, 0
    with backbone.evaluating():
        for start in range(0, len(rows), 4 * batch_size):
            batch = rows[start : start + 4 * batch_size]
            logits = backbone(pixels.batch(batch).to(backbone.device)).cpu()
            loss += float(nn.functional.cross_entropy(logits, targets[batch], reduction="sum"))
            correct += int((logits.argmax(1) == targets[batch]).sum())
    return loss / len(rows), correct / len(rows)


def _store(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    path: Path,
    settings: TrainingSettings,
    seed: int,
    history: list[Epoch],
) -> None:
    tensors = {f"net.{name}": tensor for name, tensor in backbone.net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    metadata = {
        "kind": "training",
        "settings": vars(settings),
        "seed": seed,
        "history": [vars(row) for row in history],
    }
    save_tensors(path, tensors, metadata)


def _restore(
    backbone: Backbone, optimizer: torch.optim.Optimizer, path: Path, settings: TrainingSettings, seed: int
) -> list[Epoch]:
    tensors, metadata = load_tensors(path, kind="training")
    for field, now in (("seed", seed), ("settings", vars(settings))):
        if metadata.get(field) != now:
            raise FileFormatError(f"{path}: training was begun with another {field}; delete the file to begin anew")
    expected = _shapes(backbone)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(expected.items() ^ found.items())[0][0]
        raise FileFormatError(f"{path}: does not fit this network at {wrong!r}; delete the file to begin anew")
    try:
        history = [Epoch(**row) for row in metadata["history"]]
        for number, row in enumerate(history):
            if row.epoch != number or not all(isinstance(value, int | float) for value in vars(row).values()):
                raise ValueError(f"epoch {number} is {row}")
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: its history is broken ({error}); delete the file to begin anew") from error
    backbone.net.load_state_dict({name: tensors[f"net.{name}"] for name in backbone.net.state_dict()})
    count = len(list(backbone.net.parameters()))
    state = {i: {key: tensors[f"optimizer.{i}.{key}"] for key in _ADAM} for i in range(count)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return history


_ADAM = ("step", "exp_avg", "exp_avg_sq")


def _shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, by name."""
    shapes = {f"net.{name}": tuple(tensor.shape) for name, tensor in backbone.net.state_dict().items()}
    for index, parameter in enumerate(backbone.net.parameters()):
        for key in _ADAM:
            shapes[f"optimizer.{index}.{key}"] = () if key == "step" else tuple(parameter.shape)
    return shapes
