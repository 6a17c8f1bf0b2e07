"""Which last-layer posterior predicts best on real radiographs? One table for each prior precision.

    python scripts/real_features.py --zip mednist-dev.zip --prior-precision 0.1 evidence

Trains a small CNN on 150 images a class, freezes it, and compares posteriors of its last layer on clean and shifted
test images (rotation, blur, noise): MAP, temperature, laplace-torch, vbll, ours, refined, NUTS. In brackets the 90 %
bootstrap interval over images, which name no patients. Peers need `pip install bayescam[bench]`; those absent are left
out. Takes minutes; vbll, the slowest row, most of them.
"""

from __future__ import annotations

import argparse
import io
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _printed import kept
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bayescam as bc
from bayescam.diagnose.intervals import interval, metrics_with_intervals, resampled_mean
from bayescam.posterior.temperature import fit_temperature

PER_CLASS, VALID, TEST = 150, 50, 500
VBLL_BATCH = 50
TestSet = dict[str, Tensor]


def read_images(archive: Path, rng: np.random.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Images of the sets train, valid, clean, shifted, and their labels."""
    images: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "clean": [], "shifted": []}
    labels: dict[str, list[int]] = {name: [] for name in images}
    with zipfile.ZipFile(archive) as stored:
        names = sorted(name for name in stored.namelist() if name.endswith(".jpeg"))
        classes = sorted({name.split("/")[-2] for name in names})
        for label, folder in enumerate(classes):
            own = [name for name in names if name.split("/")[-2] == folder]
            for rank, index in enumerate(rng.permutation(len(own))[: PER_CLASS + VALID + TEST]):
                image = Image.open(io.BytesIO(stored.read(own[index]))).convert("L")
                part = "train" if rank < PER_CLASS else "valid" if rank < PER_CLASS + VALID else "clean"
                images[part].append(np.asarray(image, np.float32) / 255)
                labels[part].append(label)
                if part == "clean":
                    turned = image.rotate(25).filter(ImageFilter.GaussianBlur(1.2))
                    noisy = np.asarray(turned, np.float32) / 255 + rng.normal(0, 0.1, turned.size[::-1])
                    images["shifted"].append(np.clip(noisy, 0, 1).astype(np.float32))
                    labels["shifted"].append(label)
    pixels = {name: torch.from_numpy(np.stack(part))[:, None] for name, part in images.items()}
    return pixels, {name: torch.tensor(part) for name, part in labels.items()}, len(classes)


def frozen_features(
    pixels: dict[str, Tensor], labels: Tensor, num_classes: int, width: int, seed: int
) -> dict[str, Tensor]:
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


def laplace_torch(features: TestSet, labels: TestSet, fit: bc.Laplace, structure: str, link: str) -> Callable:
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


def vbll_layer(features: TestSet, labels: TestSet, num_classes: int, epochs: int, prior_scale: float) -> tuple:
    """A fitted ``vbll`` layer as (predict, steps, its bound a quarter before the end, its bound).

    As its tutorial trains: AdamW without decay on the layer, batches of 50 (all 900 at once cost 18 times as much, most
    of it N x K x D x D products); the rate falls to nought, so that the bound settles.
    """
    import vbll

    torch.manual_seed(0)
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


class Table:
    """Rows as they come; distances to NUTS need NUTS first."""

    def __init__(self, features: TestSet, labels: TestSet, referee: dict[str, Tensor] | None) -> None:
        self.features, self.labels, self.referee = features, labels, referee
        columns = [f"{name} {what}" for name in ("clean", "shifted") for what in ("NLL", "ECE", "TV to NUTS")]
        print(f"\n| method | s | {' | '.join(columns)} |\n|---|{'---|' * (len(columns) + 1)}")

    def row(self, name: str, seconds: float, predict: Callable[[Tensor], Tensor]) -> None:
        cells = []
        for part in ("clean", "shifted"):
            proba = predict(self.features[part]).double()
            images = np.arange(len(proba))
            found = metrics_with_intervals(proba.numpy(), self.labels[part].numpy(), images)
            cells += [f"{found['nll']:.4f}", f"{found['ece']:.3f}"]
            if self.referee is None:
                cells.append("–")
            else:
                away = (proba - self.referee[part]).abs().sum(1).numpy() / 2
                cells.append(f"{interval(resampled_mean(away, images)):.4f}")
        print(f"| {name} | {seconds:.1f} | {' | '.join(cells)} |", flush=True)


def distance(first: Tensor, second: Tensor) -> float:
    """Mean total variation between two predictives."""
    return float((first - second).abs().sum(1).mean() / 2)


def compare(features: TestSet, labels: TestSet, num_classes: int, tau: float | str, chosen: argparse.Namespace) -> None:
    train = (features["train"], labels["train"])
    begun = time.perf_counter()
    fits = {"full": bc.fit_laplace(*train, prior_precision=tau)}
    took = {"full": time.perf_counter() - begun}
    tau = fits["full"].prior_precision
    print(f"\nprior precision {tau:.4g}, N = {len(train[1])}, D = {train[0].shape[1]}, K = {num_classes}")
    print("; ".join(fits["full"].notes))
    for structure in ("kron", "diag"):
        begun = time.perf_counter()
        fits[structure] = bc.fit_laplace(*train, prior_precision=tau, structure=structure)
        took[structure] = time.perf_counter() - begun
    refined, referee = {}, None
    for structure, fit in fits.items():
        begun = time.perf_counter()
        refined[structure] = fit.refine(*train)
        took[f"refined {structure}"] = time.perf_counter() - begun
    if chosen.draws:
        begun = time.perf_counter()
        nuts = bc.sample_nuts(
            refined["full"],
            *train,
            num_samples=chosen.draws,
            num_warmup=chosen.warmup,
            seed=chosen.seed,
            progress=False,
        )
        took["nuts"] = time.perf_counter() - begun
        referee = {part: bc.predict_proba(nuts.draws, features[part]) for part in ("clean", "shifted")}
    table = Table(features, labels, referee)
    map_logits = fits["full"].map_logits
    temperature = fit_temperature(map_logits(features["valid"]), labels["valid"])
    table.row("MAP", took["full"], lambda phi: map_logits(phi).softmax(1))
    table.row(
        f"MAP, temperature {temperature:.2f}", took["full"], lambda phi: (map_logits(phi) / temperature).softmax(1)
    )
    for structure, fit in fits.items():
        for method in ("pairwise", "bridge", "mc"):
            table.row(
                f"{structure}, {method}", took[structure], lambda p, f=fit, m=method: f.predict_proba(p, method=m)
            )
    for structure, fit in refined.items():
        record = fit.refinement
        ended = f"ELBO {fit.elbo:.2f} +- {record.rule_error:.2f}{'' if record.converged else ', not converged'}"
        name = f"{structure} refined ({record.curvatures} Hessians, {ended})"
        for method in ("pairwise", "bridge", "mc"):
            seconds = took[f"refined {structure}"]
            table.row(f"{name}, {method}", seconds, lambda p, f=fit, m=method: f.predict_proba(p, method=m))
    if referee is not None:
        table.row(f"NUTS, 4 x {chosen.draws}", took["nuts"], lambda phi: bc.predict_proba(nuts.draws, phi))
        for part in ("clean", "shifted"):
            half = [
                bc.predict_proba(bc.Draws(nuts.draws.weight[s], nuts.draws.bias[s]), features[part]) for s in HALVES
            ]
            print(f"NUTS half against half, {part}: total variation {distance(*half):.4f}")
    peers(table, features, labels, fits["full"], chosen)


HALVES = (slice(0, 2), slice(2, 4))


def peers(table: Table, features: TestSet, labels: TestSet, fit: bc.Laplace, chosen: argparse.Namespace) -> None:
    makers: dict[str, Callable[[], Callable]] = {
        "laplace-torch full, probit (its default link)": lambda: laplace_torch(features, labels, fit, "full", "probit"),
        "laplace-torch kron, probit (its defaults)": lambda: laplace_torch(features, labels, fit, "kron", "probit"),
        "laplace-torch kron, mc": lambda: laplace_torch(features, labels, fit, "kron", "mc"),
    }
    for name, make in makers.items():
        begun = time.perf_counter()
        with warnings.catch_warnings(action="ignore"):
            try:
                predict = make()
            except ImportError as missing:
                print(f"| {name}: absent ({missing.name}) |")
                continue
            table.row(name, time.perf_counter() - begun, predict)
    # vbll's prior variance is prior_scale * 2 / D.
    for prior, scale in (("its prior", 1.0), ("our prior", fit.num_features / (2 * fit.prior_precision))):
        if not chosen.vbll_epochs:
            continue
        begun = time.perf_counter()
        try:
            predict, steps, before, after = vbll_layer(features, labels, fit.num_classes, chosen.vbll_epochs, scale)
        except ImportError:
            print("| vbll: absent |")
            continue
        name = f"vbll dense, {prior}, {steps:,} steps (bound {after:.1f}, a quarter before {before:.1f})"
        table.row(name, time.perf_counter() - begun, predict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zip", type=Path, required=True, help="the development images, class/*.jpeg")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--prior-precision", nargs="+", default=["0.1", "1", "evidence"])
    parser.add_argument("--draws", type=int, default=500, help="a chain, of 4; 0 leaves NUTS out")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--vbll-epochs", type=int, default=240, help="0 leaves vbll out")
    parser.add_argument("--seed", type=int, default=0, help="of the images chosen, of the network, and of NUTS")
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    chosen = parser.parse_args()
    with kept(chosen.out, "real_features.md"):
        measure(chosen)


def measure(chosen: argparse.Namespace) -> None:
    """One table for each prior precision."""
    pixels, labels, num_classes = read_images(chosen.zip, np.random.default_rng(chosen.seed))
    features = frozen_features(pixels, labels["train"], num_classes, chosen.width, chosen.seed)
    for tau in chosen.prior_precision:
        compare(features, labels, num_classes, tau if tau in ("evidence", "elbo") else float(tau), chosen)


if __name__ == "__main__":
    main()
