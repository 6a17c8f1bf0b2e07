"""Training of the deterministic network: cross-entropy, AdamW, one cycle of the learning rate, mild augmentation.

Epoch e draws everything (order, augmentation, dropout) from seed and e alone, so that a run resumed after any epoch is
the run that was never interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bayescam.backbone.network import Backbone
from bayescam.data.pixels import Pixels
from bayescam.errors import BayescamError, FileFormatError
from bayescam.parallel import rank, share, size
from bayescam.storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    group: ProcessGroup | None = None,
) -> list[Epoch]:
    """Train ``backbone`` in place; the validation images are only looked at.

    With a group each rank takes its share of every batch: the gradient is the whole batch's, averaged by
    DistributedDataParallel; batch normalisation sees the rank's share alone, and rank 0's running statistics are kept.

    Args:
        backbone: on the device to train on.
        pixels: N images.
        labels: (N,).
        train, valid: indices into pixels.
        settings: how.
        seed: of everything random here.
        checkpoint: file that holds the state after each epoch; training goes on from it where it exists.
        progress: show a bar.
        group: a torch.distributed process group; every rank is given the same arguments, rank 0 writes the checkpoint.

    Raises:
        BayescamError: the loss is not finite, or batches are too small for the ranks.
        FileFormatError: the checkpoint is of another run.
    """
    targets = torch.as_tensor(labels, dtype=torch.long)
    backbone.net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        backbone.net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    history: list[Epoch] = []
    if min(settings.batch_size, len(train)) < 2 * size(group):
        raise BayescamError(
            f"train.batch_size is {settings.batch_size}, of {len(train)} images, for {size(group)} ranks; a batch is "
            f"shared among them, and batch normalisation needs two images a rank: let it be at least {2 * size(group)}"
        )
    if checkpoint is not None and checkpoint.is_file():
        history = _restore(backbone, optimizer, checkpoint, settings, seed, size(group))
    net: nn.Module = backbone if group is None else DistributedDataParallel(backbone, process_group=group)
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
            backbone, net, optimizer, pixels, targets, train, settings, epoch=epoch, seed=seed, group=group
        )
        valid_loss, valid_accuracy = _evaluate(backbone, pixels, targets, valid, settings.batch_size, group)
        history.append(Epoch(epoch, train_loss, train_accuracy, valid_loss, valid_accuracy))
        bar.set_postfix_str(f"train loss {train_loss:.3f}, valid accuracy {valid_accuracy:.3f}")
        if checkpoint is not None and rank(group) == 0:
            _store(backbone, optimizer, checkpoint, settings, seed, size(group), history)
    backbone.eval()
    return history


def _one_epoch(
    backbone: Backbone,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    pixels: Pixels,
    targets: Tensor,
    train: np.ndarray,
    settings: TrainingSettings,
    *,
    epoch: int,
    seed: int,
    group: ProcessGroup | None,
) -> tuple[float, float]:
    device = backbone.device
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = train[torch.randperm(len(train), generator=generator).numpy()]
    starts = range(0, len(order), settings.batch_size)
    total_steps = settings.epochs * len(starts)
    loss_sum, correct, used = 0.0, 0, 0
    backbone.net.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 100_003 + epoch + (rank(group) << 40))
        for step, start in enumerate(starts):
            batch = order[start : start + settings.batch_size]
            if len(batch) < 2 * size(group):
                continue  # batch normalisation needs two images a rank
            for parameters in optimizer.param_groups:
                parameters["lr"] = settings.learning_rate * one_cycle((epoch * len(starts) + step) / total_steps)
            own = share(len(batch), group)
            images = pixels.batch(batch[own]).to(device)
            if settings.augment:
                images = augment(images, torch.rand(6, len(batch), generator=generator)[:, own])
            target = targets[batch[own]].to(device)
            logits = net(images)
            loss = nn.functional.cross_entropy(logits, target)
            optimizer.zero_grad(set_to_none=True)
            (loss * (len(target) * size(group) / len(batch))).backward()
            optimizer.step()
            used += len(batch)
            loss_sum += float(loss.detach()) * len(target)
            correct += int((logits.argmax(1) == target).sum())
            if not math.isfinite(loss_sum):
                raise BayescamError(
                    f"training loss is not finite in epoch {epoch + 1}; lower train.learning_rate "
                    f"(now {settings.learning_rate:g})"
                )
    if group is not None:
        for buffer in backbone.net.buffers():
            dist.broadcast(buffer, group_src=0, group=group)
    return _means(loss_sum, correct, used, device, group)


def _means(
    loss: float, correct: int, count: int, device: torch.device, group: ProcessGroup | None
) -> tuple[float, float]:
    """The sums over this rank's images as means over all ``count`` images of all ranks."""
    sums = torch.tensor([loss, correct], dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(sums, group=group)
    return float(sums[0]) / count, float(sums[1]) / count


def one_cycle(t: float) -> float:
    """The learning rate's share of its peak at t in [0, 1]: up linearly over 20 %, down as a half cosine to 1 %."""
    if t < 0.2:
        return 0.1 + 0.9 * t / 0.2
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (t - 0.2) / 0.8))


def augment(images: Tensor, amounts: Tensor) -> Tensor:
    """Each image (N, 1, S, S) turned, scaled, shifted and exposed by its own uniform ``amounts`` (6, N) in [0, 1).

    Never flipped.
    """
    uniform = amounts.to(images.device) * 2 - 1
    angle, scale = uniform[0] * math.radians(15), 1 + 0.12 * uniform[1]
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    top = torch.stack([cosine, -sine, 0.16 * uniform[2]], dim=1)
    bottom = torch.stack([sine, cosine, 0.16 * uniform[3]], dim=1)
    grid = nn.functional.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    gain, gamma = 1 + 0.2 * uniform[4], 1 + 0.2 * uniform[5]
    return (moved.clamp(0, 1) ** gamma[:, None, None, None] * gain[:, None, None, None]).clamp(0, 1)


def _evaluate(
    backbone: Backbone,
    pixels: Pixels,
    targets: Tensor,
    rows: np.ndarray,
    batch_size: int,
    group: ProcessGroup | None,
) -> tuple[float, float]:
    if len(rows) == 0:
        return math.nan, math.nan
    loss, correct, own = 0.0, 0, rows[share(len(rows), group)]
    with backbone.evaluating():
        for start in range(0, len(own), 4 * batch_size):
            batch = own[start : start + 4 * batch_size]
            logits = backbone(pixels.batch(batch).to(backbone.device)).cpu()
            loss += float(nn.functional.cross_entropy(logits, targets[batch], reduction="sum"))
            correct += int((logits.argmax(1) == targets[batch]).sum())
    return _means(loss, correct, len(rows), backbone.device, group)


def _store(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    path: Path,
    settings: TrainingSettings,
    seed: int,
    ranks: int,
    history: list[Epoch],
) -> None:
    tensors = {f"net.{name}": tensor for name, tensor in backbone.net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    metadata = {
        "kind": "training",
        "settings": vars(settings),
        "seed": seed,
        "ranks": ranks,
        "history": [vars(row) for row in history],
    }
    save_tensors(path, tensors, metadata)


def _restore(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    path: Path,
    settings: TrainingSettings,
    seed: int,
    ranks: int,
) -> list[Epoch]:
    tensors, metadata = load_tensors(path, kind="training")
    for field, now in (("seed", seed), ("settings", vars(settings))):
        if metadata.get(field) != now:
            raise FileFormatError(f"{path}: training was begun with another {field}; delete the file to begin anew")
    if metadata.get("ranks") != ranks:
        raise FileFormatError(
            f"{path}: training was begun on {metadata.get('ranks')} ranks and goes on with {ranks}, whose batch "
            "normalisation and augmentation differ; start as many, or delete the file to begin anew"
        )
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
