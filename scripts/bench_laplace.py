"""How fast is `fit_laplace` beside one matrix product, Pyro and laplace-torch? Prints ratios of one run.

    python scripts/bench_laplace.py --width 128 512 --peers laplace-torch pyro

Needs `pip install bayescam[bench]` for the peers; at width 512 each of them takes minutes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from _printed import kept
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor

import bayescam as bc
from bayescam.posterior.images import check_images
from bayescam.posterior.laplace import curvature_at
from bayescam.posterior.map import find_map, whitening


def simulate(num_images: int, width: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features like a pooled ReLU layer's: correlated, non-negative; labels from a confident last layer."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_images, 32, generator=generator) @ torch.randn(32, width, generator=generator) / 6
    phi = torch.relu(hidden + 0.3 * torch.randn(num_images, width, generator=generator))
    weight = torch.randn(num_classes, width, generator=generator)
    logits = (phi - phi.mean(0)) @ weight.T
    return phi, (8 * logits / logits.std()).softmax(1).multinomial(1, generator=generator)[:, 0]


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """The shortest of ``repeats`` runs."""
    best = math.inf
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begun)
    return best


def dense_products(phi: Tensor, num_classes: int) -> None:
    """What the K(K-1)/2 unique blocks cost as plain matrix products: the floor without symmetry."""
    for _ in range(num_classes * (num_classes - 1) // 2):
        torch.mm(phi.T, phi)


def laplace_torch(phi: Tensor, labels: Tensor, fit: bc.Laplace, structure: str, batch: int) -> None:
    with warnings.catch_warnings(action="ignore"):
        from laplace import Laplace

        model = torch.nn.Sequential(torch.nn.Identity(), linear(fit))
        peer = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure=structure)
        peer.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(phi, labels), batch_size=batch))


def linear(fit: bc.Laplace) -> torch.nn.Linear:
    layer = torch.nn.Linear(fit.num_features, fit.num_classes)
    with torch.no_grad():
        layer.weight.copy_(fit.weight_mean)
        layer.bias.copy_(fit.bias_mean)
    return layer


def pyro_laplace(phi: Tensor, labels: Tensor, fit: bc.Laplace) -> str:
    """Pyro's own Hessian at our MAP; returns how it ended."""
    pyro.clear_param_store()
    guide = AutoLaplaceApproximation(
        functools.partial(bc.last_layer, num_classes=fit.num_classes, prior_precision=fit.prior_precision)
    )
    guide(phi, labels)
    with torch.no_grad():
        guide.loc.copy_(torch.cat([fit.weight_mean.flatten(), fit.bias_mean]))
    try:
        guide.laplace_approximation(phi, labels)
    except torch.linalg.LinAlgError:
        return "then LinAlgError"
    return ""


def compare(width: int, parsed: argparse.Namespace) -> None:
    num_images, num_classes, repeats = parsed.images, parsed.classes, parsed.repeats
    phi, labels = simulate(num_images, width, num_classes, parsed.seed)
    floor = seconds(lambda: dense_products(phi, num_classes), repeats)
    images = check_images(phi, labels)
    coordinates = whitening(images)
    mode = seconds(lambda: find_map(images, 1.0, coordinates), repeats)
    theta = find_map(images, 1.0, coordinates).theta
    curvature = seconds(lambda: curvature_at(images, theta, coordinates, 1.0, "full"), repeats)
    whole = seconds(lambda: bc.fit_laplace(phi, labels, prior_precision=1.0), repeats)
    fit = bc.fit_laplace(phi, labels, prior_precision=1.0)
    print(f"\nN = {num_images:,}, D = {width}, K = {num_classes}, float32, threads: {torch.get_num_threads()}")
    print("\n| what | s | over the products | over our Hessian | over our whole fit |\n|---|---|---|---|---|")
    rows = [("dense products of the unique blocks", floor, ""), ("ours: MAP alone", mode, "")]
    rows.append(("ours: Hessian and its Cholesky factor alone", curvature, ""))
    rows.append(("ours: fit_laplace(prior_precision=1.0), full", whole, f"decrement {fit.newton_decrement:.1e}"))
    for structure in ("kron", "diag"):
        took = seconds(
            functools.partial(bc.fit_laplace, phi, labels, prior_precision=1.0, structure=structure), repeats
        )
        rows.append((f"ours: {structure}", took, ""))
    if parsed.refine:
        found = fit.refine(phi, labels).refinement
        ended = f"{found.curvatures} Hessians, ELBO {found.elbo[-1]:.3f}, converged: {found.converged}"
        rows.append(("ours: refine, after the fit", seconds(functools.partial(fit.refine, phi, labels)), ended))
    show_row = functools.partial(show, floor=floor, curvature=curvature, whole=whole)
    for row in rows:
        show_row(*row)
    batches = parsed.batch if "laplace-torch" in parsed.peers else ()
    for structure, batch in itertools.product(("full", "kron", "diag"), batches):
        took = seconds(functools.partial(laplace_torch, phi, labels, fit, structure, batch))
        show_row(f"laplace-torch, {structure} (Hessian alone)", took, f"in batches of {batch}")
    if "pyro" in parsed.peers:
        ended: list[str] = []
        took = seconds(lambda: ended.append(pyro_laplace(phi, labels, fit)))
        show_row("Pyro laplace_approximation (Hessian alone)", took, ended[0])


def show(name: str, took: float, remark: str, *, floor: float, curvature: float, whole: float) -> None:
    ratios = " | ".join(f"{took / other:.2f}" for other in (floor, curvature, whole))
    print(f"| {name} {remark} | {took:.3f} | {ratios} |", flush=True)


def exponents(parsed: argparse.Namespace) -> None:
    """Least-squares slopes of log time against log N, log D and log K, one varied at a time."""
    print("\n| varied | values | s | exponent |\n|---|---|---|---|")
    for name, values in {"N": (5000, 10_000, 20_000), "D": (128, 256, 512), "K": (4, 8, 16)}.items():
        took = []
        for value in values:
            size = {"N": 10_000, "D": 128, "K": 5} | {name: value}
            phi, labels = simulate(size["N"], size["D"], size["K"], parsed.seed)
            fit = functools.partial(bc.fit_laplace, phi, labels, num_classes=size["K"], prior_precision=1.0)
            took.append(seconds(fit, parsed.repeats))
        x, y = torch.tensor(values).double().log(), torch.tensor(took).double().log()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        print(f"| {name} | {values} | {', '.join(f'{t:.2f}' for t in took)} | {slope:.2f} |", flush=True)


def many_classes(parsed: argparse.Namespace) -> None:
    """1,000 classes of width 2,048: fit, draw, predict; beside kron, laplace-torch's."""
    num_images, batch = parsed.many, max(parsed.batch)
    phi, labels = simulate(num_images, 2048, 1000, parsed.seed)
    labels[:1000] = torch.arange(1000)[:num_images]
    print(f"\nN = {num_images:,}, D = 2,048, K = 1,000\n\n| what | fit, s | 20 draws, s | 100 images predicted, s |")
    print("|---|---|---|---|")
    for structure in ("kron", "diag"):
        begun = time.perf_counter()
        fit = bc.fit_laplace(phi, labels, num_classes=1000, prior_precision=1.0, structure=structure)
        took = time.perf_counter() - begun
        drawn = seconds(functools.partial(fit.sample, 20, seed=parsed.seed))
        predicted = seconds(functools.partial(fit.predict_proba, phi[:100]))
        print(f"| ours: {structure}, {peak()} | {took:.1f} | {drawn:.1f} | {predicted:.1f} |", flush=True)
    if "laplace-torch" in parsed.peers:
        theirs = seconds(lambda: laplace_torch(phi, labels, fit, "kron", batch))
        print(f"| laplace-torch, kron (Hessian alone) in batches of {batch}, {peak()} | {theirs:.1f} | | |", flush=True)


def peak() -> str:
    scale = 1 if sys.platform == "darwin" else 1024
    return f"peak memory so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20:,.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=36_808)
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--width", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--peers", nargs="*", choices=["laplace-torch", "pyro"], default=["laplace-torch", "pyro"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1024], help="images a batch of laplace-torch")
    parser.add_argument("--refine", action="store_true", help="also the Gaussian nearest in KL(q || posterior)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the simulated features and labels, and of the draws")
    parser.add_argument("--exponents", action="store_true", help="fit time against N, D and K")
    parser.add_argument("--many", type=int, default=0, metavar="N", help="1,000 classes at width 2,048 from N images")
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    parsed = parser.parse_args()
    with kept(parsed.out, "bench_laplace.md"):
        for width in parsed.width:
            compare(width, parsed)
        if parsed.exponents:
            exponents(parsed)
        if parsed.many:
            many_classes(parsed)
        print(peak())


if __name__ == "__main__":
    main()
