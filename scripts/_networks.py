"""The networks that readers ask for beside a last layer's posterior: a deep ensemble, and one with dropout."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn

import bayescam as bc
from bayescam.backbone.graph import last_linear
from bayescam.backbone.training import TrainingSettings, train_backbone
from bayescam.stages.state import RunState


def trained(state: RunState, seed: int, *, dropout: float = 0.0) -> bc.Backbone:
    """The run's network trained as the run trained it, from another seed or with dropout before its last layer."""
    network = state.new_backbone(seed)
    network = (with_dropout(network, dropout) if dropout else network).to(state.device)
    train_backbone(
        network,
        state.pixels,
        state.dataset.labels,
        train=state.rows("train"),
        valid=state.rows("valid"),
        settings=TrainingSettings(**asdict(state.config.train)),
        seed=seed,
    )
    return network


def with_dropout(backbone: bc.Backbone, rate: float) -> bc.Backbone:
    """The network given, changed: its last layer's inputs are dropped at this rate (the old ``backbone`` is spent)."""
    net = backbone.net
    parent, _, child = last_linear(net).rpartition(".")
    holder = net.get_submodule(parent)
    setattr(holder, child, nn.Sequential(nn.Dropout(rate), holder.get_submodule(child)))
    return bc.Backbone.from_module(net, image_size=backbone.image_size)


def under_masks(backbone: bc.Backbone, images: Tensor, passes: int, seed: int) -> Tensor:
    """Class probabilities (T, N, K) of images (N, 1, S, S) under T dropout masks, all else in eval mode.

    Masks are drawn after the feature maps alone, which so are made once.
    """
    device = backbone.device
    with backbone.evaluating(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        maps = torch.cat([backbone.maps(part.to(device)) for part in images.split(128)])
        torch.manual_seed(seed)
        for module in backbone.net.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        return torch.stack([torch.softmax(backbone.head(backbone.pool(maps)), 1) for _ in range(passes)]).cpu()


def probabilities(backbone: bc.Backbone, images: Tensor) -> Tensor:
    """Class probabilities (N, K) of images (N, 1, S, S), on the CPU."""
    with backbone.evaluating():
        return torch.cat([torch.softmax(backbone(part.to(backbone.device)), 1) for part in images.split(128)]).cpu()
