"""What does the posterior of a class activation map cost? Times an image, side by side in one run, with the sd's error.

    python scripts/bench_cam.py                      # D = 512, 7 x 7 cells, 7 classes; about two minutes on 2 cores
    python scripts/bench_cam.py --peers              # also torch-cam and pytorch-grad-cam ('bayescam[bench]')

Maps of all K classes are made each time, in float32, from feature maps that are already there; the peers make one
class's map from the image, so the network's forward pass is printed beside theirs. Each figure is the least of the
repeats. The sd error is the root mean square relative one, against the closed form of the full posterior in float64.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _printed import kept
from torch import Tensor

import bayescam as bc
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import Laplace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=512, help="D")
    parser.add_argument("--cells", type=int, default=7, help="h = w")
    parser.add_argument("--classes", type=int, default=7, help="K")
    parser.add_argument("--images", type=int, default=64, help="images in the batch")
    parser.add_argument("--train", type=int, default=4000, help="images the posterior is fitted on")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", action="store_true", help="time torch-cam and pytorch-grad-cam too")
    parser.add_argument("--seed", type=int, default=0, help="of the maps, the labels and the draws")
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    with kept(parsed.out, "bench_cam.md"):
        measure(parsed)


def measure(parsed: argparse.Namespace) -> None:
    """Print the tables."""
    print(
        f"torch {torch.__version__}, {platform.machine()}, {parsed.threads} threads; D = {parsed.features}, "
        f"{parsed.cells} x {parsed.cells} cells, K = {parsed.classes}, batch {parsed.images}, float32 maps\n"
    )
    closed_and_sampled(parsed)
    if parsed.peers:
        peers(parsed)


def closed_and_sampled(parsed: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(parsed.seed)
    scale = torch.linspace(0.1, 1, parsed.features)
    features = torch.rand(parsed.train, parsed.features, generator=generator) * scale
    teacher = torch.randn(parsed.features, parsed.classes, generator=generator)
    labels = (features @ teacher).softmax(1).multinomial(1, generator=generator)[:, 0]
    maps = torch.rand(parsed.images, parsed.features, parsed.cells, parsed.cells, generator=generator)
    maps = maps * scale[:, None, None]
    print("| what | ms an image | one image alone, ms | x mean CAM | sd error |\n|---|---|---|---|---|")
    weight = torch.randn(parsed.classes, parsed.features, generator=generator)
    own = per_image(lambda: weight @ maps.flatten(2), parsed.images, parsed.repeats)
    single = per_image(lambda: weight @ maps[:1].flatten(2), 1, parsed.repeats)
    print(f"| mean CAM, the matrix product alone | {own:.3f} | {single:.3f} | 1 | – |")
    for structure in ("diag", "kron", "full"):
        begun = time.perf_counter()
        posterior = bc.fit_laplace(
            features, labels, num_classes=parsed.classes, prior_precision=1.0, structure=structure
        )
        fitted = time.perf_counter()
        mean_sd_and_p(maps[:1], posterior)
        once = time.perf_counter() - fitted
        exact = bc.CamPosterior(maps[:4].double(), posterior).sd
        error = sd_error(bc.CamPosterior(maps[:4], posterior).sd, exact)
        cost = per_image(lambda posterior=posterior: mean_sd_and_p(maps, posterior), parsed.images, parsed.repeats)
        alone = per_image(lambda posterior=posterior: mean_sd_and_p(maps[:1], posterior), 1, 2 * parsed.repeats)
        cells = f"{cost:.3f} | {alone:.3f} | {cost / own:.0f} | {error:.0e}: float32"
        print(f"| mean, sd and P(CAM > 0), {structure} | {cells} |")
        if structure == "kron":
            print(f"|   the mark: 2 x mean + 0.5 ms | {2 * own + 0.5:.3f} | {2 * single + 0.5:.3f} | | |")
        if structure == "full":
            print("|   the mark | 5 | 5 | | |")
            print(f"|   once a posterior: fit {fitted - begun:.1f} s, factors {once:.1f} s | | | | |")
            for num in (100, 1000):
                sampled(posterior, maps, exact, num, own, parsed)


def sampled(posterior: Laplace, maps: Tensor, exact: Tensor, num: int, own: float, parsed: argparse.Namespace) -> None:
    """The maps of pre-drawn heads and their sample sd, straightforwardly."""
    begun = time.perf_counter()
    draws = posterior.sample(num, seed=parsed.seed).centred()
    drawing = time.perf_counter() - begun
    weight = draws.weight[0].float().flatten(0, 1)

    def maps_of_draws(images: Tensor) -> tuple[Tensor, Tensor]:
        values = (weight @ images.flatten(2)).unflatten(1, (num, parsed.classes))
        return values.mean(1), values.std(1)

    few = maps[: max(1, min(len(maps), 6400 // num))]
    cost = per_image(lambda: maps_of_draws(few), len(few), max(3, parsed.repeats // 5))
    alone = per_image(lambda: maps_of_draws(maps[:1]), 1, max(3, parsed.repeats // 3))
    error = sd_error(maps_of_draws(maps[: len(exact)])[1].unflatten(2, exact.shape[2:]), exact)
    print(
        f"| {num} sampled CAMs and their sd, drawn before | {cost:.3f} | {alone:.3f} | {cost / own:.0f} | {error:.1%} |"
    )
    print(f"|   drawing those {num}: {drawing:.2f} s | | | | |")
    ours = per_image(lambda: mean_and_sd(few, draws), len(few), max(3, parsed.repeats // 5))
    print(f"| mean and sd of those {num} draws by bayescam | {ours:.3f} | | {ours / own:.0f} | {error:.1%} |")


def peers(parsed: argparse.Namespace) -> None:
    """Plain maps of one class of one 224 x 224 image on ResNet-18, as the peers make them."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import CAM

    torch.manual_seed(parsed.seed)
    backbone = bc.Backbone("resnet18", parsed.classes).eval()
    image = torch.rand(1, 1, 224, 224)
    prepared = backbone._prepared(image)
    net = backbone.net
    features = torch.rand(500, backbone.num_features)
    labels = torch.arange(500) % parsed.classes
    posterior = bc.fit_laplace(features, labels, num_classes=parsed.classes, prior_precision=1.0, structure="kron")
    repeats = max(5, parsed.repeats // 2)

    def forward() -> Tensor:
        with backbone.evaluating():
            return backbone.maps(image)

    def ours() -> object:
        return mean_sd_and_p(forward(), posterior)

    print("\n| ResNet-18, one 224 x 224 image, forward included | ms |\n|---|---|")
    print(f"| forward alone | {per_image(forward, 1, repeats):.2f} |")
    with CAM(net, target_layer="layer4", fc_layer="fc") as extractor:

        def plain() -> object:
            with torch.no_grad():
                scores = net(prepared)
            return extractor(0, scores)

        print(f"| torch-cam CAM, one class, no uncertainty | {per_image(plain, 1, repeats):.2f} |")
    with GradCAM(model=net, target_layers=[net.layer4[-1]]) as extractor:
        targets = [ClassifierOutputTarget(0)]
        graded = per_image(lambda: extractor(input_tensor=prepared, targets=targets), 1, repeats)
        print(f"| pytorch-grad-cam Grad-CAM, one class, no uncertainty | {graded:.2f} |")
    print(f"| bayescam, {parsed.classes} classes, mean, sd and P, kron | {per_image(ours, 1, repeats):.2f} |")


def sd_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square relative error."""
    return float((found.double() / exact - 1).square().mean().sqrt())


def mean_sd_and_p(maps: Tensor, posterior: Laplace) -> tuple[Tensor, Tensor, Tensor]:
    cam = bc.CamPosterior(maps, posterior)
    return cam.mean, cam.sd, cam.exceedance(0.0)


def mean_and_sd(maps: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    cam = bc.CamPosterior(maps, draws)
    return cam.mean, cam.sd


def per_image(compute: Callable[[], object], images: int, repeats: int) -> float:
    """The least of the repeats, in ms an image, after one that is not counted."""
    compute()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        compute()
        times.append(time.perf_counter() - begun)
    return 1000 * min(times) / images


if __name__ == "__main__":
    main()
