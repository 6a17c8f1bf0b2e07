"""The last layers of laplace-torch and vbll on features that are there, as ``predict(features) -> probabilities``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from last_layers.images import Sets
from torch import Tensor, nn

import bayescam as bc

VBLL_BATCH = 50


def laplace_torch(features: Sets, labels: Sets, fit: bc.Laplace, structure: str, link: str) -> Callable:
    """laplace-torch's Laplace posterior around our MAP, at our prior precision."""
    from laplace import Laplace

    layer = nn.Linear(fit.num_features, fit.num_classes)
    with torch.no_grad():
        layer.weight.copy_(fit.weight_mean)
        layer.bias.copy_(fit.bias_mean)
    peer = Laplace(
        nn.Sequential(nn.Identity(), layer),
        "classification",
        subset_of_weights="last_layer",
        hessian_structure=structure,
        prior_precision=fit.prior_precision,
    )
    peer.fit(
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features["train"], labels["train"]), batch_size=100)
    )
    return lambda phi: peer(phi, pred_type="glm", link_approx=link, n_samples=1000).double()


def vbll_layer(features: Sets, labels: Sets, num_classes: int, epochs: int, prior_scale: float, seed: int) -> tuple:
    """A fitted ``vbll`` layer as (predict, steps, its bound a quarter before the end, its bound).

    As its tutorial trains: AdamW without decay on the layer, batches of 50 (all 900 at once cost 18 times as much, most
    of it N x K x D x D products); the rate falls to nought, so that the bound settles.
    """
    import vbll

    torch.manual_seed(seed)
    inputs, targets = features["train"], labels["train"]
    count = len(targets)
    layer = vbll.DiscClassification(inputs.shape[1], num_classes, 1 / count, prior_scale=prior_scale)
    optimiser = torch.optim.AdamW(layer.parameters(), 1e-2, weight_decay=0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    bounds = {}
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(count).split(VBLL_BATCH):
            optimiser.zero_grad()
            layer(inputs[batch]).train_loss_fn(targets[batch]).backward()
            optimiser.step()
        rate.step()
        if epoch in (epochs - epochs // 4, epochs):
            with torch.no_grad():
                losses = [layer(inputs[b]).train_loss_fn(targets[b]) for b in torch.arange(count).split(VBLL_BATCH)]
            bounds[epoch] = -count * float(torch.stack(losses).mean())

    def predict(phi: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([layer.predictive(part, n_samples=1000) for part in phi.split(VBLL_BATCH)]).double()

    return predict, epochs * -(-count // VBLL_BATCH), bounds[epochs - epochs // 4], bounds[epochs]
