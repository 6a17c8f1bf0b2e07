"""What does a fit cost against images, features, classes and ranks, and what would 10^9 images on 64 GPUs cost?

    python scripts/bench_scale.py                    seconds, bytes all-reduced and memory against N, D, K and R
    python scripts/bench_scale.py --fit              and the cost model, checked on a point left out, and the plan
    python scripts/bench_scale.py --million          N to 10^6 at D = 512 from a memory map (a 2 GB file)
    python scripts/bench_scale.py --wide kron        1,000 classes at D = 2,048; --wide full: 7 classes
    python scripts/bench_scale.py --device cuda      the same on the GPU, and a row for each device

Every point is a process of its own (R of them under torchrun), one thread each unless --threads says otherwise, reading
its features from a memory map. Seconds are rank 0's; memory is the largest rank's anonymous memory above what it was
after the imports. The first takes a minute or two, the others minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from _printed import kept
from PIL import Image
from scaling import wide
from scaling.model import NUTS, STAGES, Hardware, Model, Workload, fit, plan, reduced, told
from scaling.point import Found, Size, simulate

import bayescam as bc

BASE = Size(20_000, 256, 7)
SWEEPS = {
    "N": [replace(BASE, images=n) for n in (10_000, 20_000, 40_000)],
    "D": [replace(BASE, width=d) for d in (64, 128, 256, 512)],
    "K": [replace(BASE, classes=k) for k in (3, 7, 14)],
    "R": [replace(BASE, images=40_000, ranks=r) for r in (1, 2)] + [replace(BASE, width=512, ranks=2)],
}
LEFT_OUT = Size(60_000, 384, 10, ranks=2)
WHOLE = Size(20_000, 512, 7, whole=True)
WIDE = Size(20_000, 2048, 7, structure="diag")
MILLION = (10_000, 100_000, 1_000_000)


def run(size: Size, folder: Path, seconds: float = 3600) -> Found:
    """Measure one point in processes of its own."""
    point = str(Path(__file__).with_name("scaling") / "point.py")
    command = [sys.executable, point, json.dumps(asdict(size)), str(folder)]
    if size.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size.ranks)]
        command[1:1] = launcher
    environment = os.environ | {"OMP_NUM_THREADS": str(size.threads)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    if done.returncode:
        sys.exit(f"{size} failed:\n{done.stderr[-2000:]}")
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def features(sizes: list[Size], folder: Path) -> None:
    """A file of features for each width."""
    for width in sorted({size.width for size in sizes}):
        if not (folder / f"phi-{width}.npy").exists():
            simulate(folder, max(size.images for size in sizes if size.width == width), width)


def show(name: str, size: Size, found: Found) -> None:
    stages = " | ".join(f"{found.seconds[stage]:.2f}" for stage in STAGES)
    moved = " | ".join(
        f"{sum(sent) / 2**20:.2f} in {len(sent)}" if sent else "0" for sent in (found.reduced, found.told)
    )
    print(
        f"| {name} | {size.images:,} | {size.width} | {size.classes} | {size.ranks} | "
        f"{sum(found.seconds.values()):.2f} | {stages} | {found.passes} | {moved} | "
        f"{found.memory_peak - found.memory_before:.0f} |",
        flush=True,
    )


def header() -> None:
    columns = [
        "varied",
        "N",
        "D",
        "K",
        "R",
        "s",
        *STAGES,
        "passes",
        "MiB all-reduced",
        "MiB broadcast",
        "MiB of memory",
    ]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def exponent(values: list[int], took: list[float]) -> float:
    """The least-squares slope of log time over log size."""
    return float(np.polyfit(np.log(values), np.log(took), 1)[0])


def sweep(folder: Path, device: str) -> list[tuple[Size, Found]]:
    """N, D, K and R, one at a time; each point is measured once."""
    known: dict[Size, Found] = {}
    header()
    for name, sizes in SWEEPS.items():
        for size in sizes:
            point = replace(size, device=device)
            if point.ranks > 1 and device == "cuda" and torch.cuda.device_count() < point.ranks:
                print(f"| {name} | {point.ranks} ranks need {point.ranks} GPUs, and there is one |")
                continue
            if point not in known:
                known[point] = run(point, folder)
            show(name, point, known[point])
    return list(known.items())


def report_fit(points: list[tuple[Size, Found]], left_out: Found) -> Model:
    """The coefficients, and predicted over measured on the point that they have not seen."""
    model = fit(points)
    print("\n| stage | term | ns a unit |\n|---|---|---|")
    for stage in STAGES:
        for name, value in model.seconds[stage].items():
            print(f"| {stage} | {name} | {1e9 * value:.3g} |")
    print(f"| all-reduce | message | {1e9 * model.latency:.3g} |\n| all-reduce | byte | {1e9 * model.per_byte:.3g} |")
    powers = " ".join(f"{name}^{power:.2f}" for name, power in zip("NEK", model.growth[1:], strict=True))
    print(f"\npasses over the features of one MAP: {math.exp(model.growth[0]):.3g} {powers}")
    print(f"messages that go with a pass, the median: {model.messages:.1f}")
    for size, found in [points[-1], (LEFT_OUT, left_out)]:
        ratios = [formula(size, found.passes) / sum(sent) for formula, sent in _sent(found)]
        print(f"bytes at {words(size)}: formula / counted {ratios[0]:.3f} all-reduced, {ratios[1]:.3f} broadcast")
    predicted, measured = model.predict(LEFT_OUT), sum(left_out.seconds.values())
    print(
        f"left out: {words(LEFT_OUT)}: predicted {predicted:.2f} s, measured {measured:.2f} s, "
        f"predicted / measured {predicted / measured:.2f}"
    )
    for stage in STAGES:
        own, took = model.stage(stage, LEFT_OUT), left_out.seconds[stage]
        passes = f", {model.passes(LEFT_OUT):.0f} of {left_out.passes} passes" if stage == "MAP" else ""
        print(f"  {stage}: predicted {own:.2f} s, measured {took:.2f} s{passes}")
    return model


def _sent(found: Found) -> list[tuple[Callable[[Size, float], float], list[int]]]:
    return [(reduced, found.reduced), (told, found.told)]


def words(size: Size) -> str:
    return f"N = {size.images:,}, D = {size.width}, K = {size.classes}, R = {size.ranks}"


def decoded(folder: Path) -> tuple[float, int]:
    """Radiographs that a core reads in a second, and bytes of a file: a phantom, 512 x 512, with the grain of film."""
    phantom = 255 * bc.open_dataset("phantom", num=7).image(0)
    picture = np.asarray(Image.fromarray(phantom.astype(np.uint8)).resize((512, 512)), dtype=np.float64)
    grain = np.random.default_rng(0).normal(0, 6, picture.shape)
    path = folder / "radiograph.jpg"
    Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    bc.read_image(path)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 2:
        bc.read_image(path)
        count += 1
    return count / (time.perf_counter() - begun), path.stat().st_size


def show_plan(model: Model, work: Workload) -> None:
    """10^9 images on 64 GPUs, by NVIDIA's figures for the H100 and what was measured here; and on cores like these."""
    gpu = Hardware()
    print(f"\n{work}\n{gpu}")
    for width in (512, 2048):
        size = Size(10**9, width, 7, ranks=64)
        print(f"\n| {words(size)} | limit | s | GPU hours | GB sent by a GPU |\n|---|---|---|---|---|")
        steps = plan(size, work)
        for step in steps:
            hours = step.seconds * size.ranks / 3600
            print(f"| {step.name} | {step.limit} | {step.seconds:,.1f} | {hours:,.2f} | {step.sent / 1e9:,.3f} |")
        rest = sum(step.seconds for step in steps if not step.name.startswith(NUTS)) * size.ranks / 3600
        print(f"all but {NUTS}: {rest:,.1f} GPU hours, ${rest * gpu.price:,.0f} at ${gpu.price:g} an hour")
        print(f"files {1e-12 * size.images * work.image_bytes:,.0f} TB, features {4e-12 * size.images * width:,.1f} TB")
    cores = Size(10**9, 512, 7, ranks=64)
    print(
        f"\nthe fitted model itself at {words(cores)}, on 64 such cores: {model.predict(cores) / 3600:.1f} h "
        "for one fit at a fixed prior precision"
    )


def workload(model: Model, points: list[tuple[Size, Found]], folder: Path) -> Workload:
    """What the plan needs to know of a run, measured."""
    whole, wide_map = run(WHOLE, folder), run(WIDE, folder)
    print(
        f"\n{words(WHOLE)}: evidence {whole.seconds['evidence']:.1f} s, {whole.passes} passes, {whole.curvatures} "
        f"Hessians; refinement {whole.seconds['refine']:.1f} s, {whole.refined} Hessians, "
        f"{whole.expectations} expected losses\n"
        f"{words(WIDE)}: a MAP {wide_map.seconds['MAP']:.1f} s, {wide_map.passes} passes"
    )
    narrow = next(found for size, found in points if replace(size, device="cpu") == replace(BASE, width=WHOLE.width))
    passes = {WHOLE.width: whole.passes, WIDE.width: round(whole.passes * wide_map.passes / narrow.passes)}
    return Workload(*decoded(folder), passes, model.messages, whole.curvatures, whole.refined, whole.expectations)


def million(folder: Path, images: list[int]) -> None:
    """Time and anonymous memory over N to 10^6; other programs disturb processor time (both threads) less."""
    sizes = [Size(n, 512, 7, threads=2) for n in images]
    features(sizes, folder)
    header()
    found = []
    for size in sizes:
        found.append(run(size, folder))
        show("N", size, found[-1])
        print(
            f"  anonymous memory {found[-1].memory_peak:.0f} MiB in all, {found[-1].memory_before:.0f} before; "
            f"processor time {found[-1].processor:.1f} s",
            flush=True,
        )
    print(f"exponent of time over N: {exponent(images, [sum(point.seconds.values()) for point in found]):.2f}")
    print(f"exponent of processor time over N: {exponent(images, [point.processor for point in found]):.2f}")


def devices(folder: Path) -> None:
    """One row a device."""
    header()
    show("cpu", BASE, run(BASE, folder))
    if torch.cuda.is_available():
        show(torch.cuda.get_device_name(), size := replace(BASE, device="cuda"), run(size, folder))
    else:
        print("| cuda | there is no GPU on this machine |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="the cost model, its check and the plan for 10^9 images")
    parser.add_argument(
        "--million", type=int, nargs="*", metavar="N", help="N to 10^6 at D = 512 from a memory map, two threads"
    )
    parser.add_argument("--wide", choices=list(wide.SIZES), help="K = 1,000 (kron) or K = 7 (full), both at D = 2,048")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, help="where the features' files go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    parsed = parser.parse_args()
    with kept(parsed.out, "bench_scale.md"):
        measure(parsed)


def measure(parsed: argparse.Namespace) -> None:
    """Print what the options ask for."""
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        folder = Path(name)
        if parsed.wide:
            return wide.steps(parsed.wide)
        if parsed.million is not None:
            return million(folder, parsed.million or list(MILLION))
        sizes = [size for sizes in SWEEPS.values() for size in sizes]
        features([*sizes, LEFT_OUT, *([WHOLE, WIDE] if parsed.fit else [])], folder)
        if parsed.device == "cuda" and not torch.cuda.is_available():
            sys.exit("--device cuda: there is no GPU on this machine")
        points = sweep(folder, parsed.device)
        devices(folder)
        if parsed.fit:
            model = report_fit(points, run(LEFT_OUT, folder))
            show_plan(model, workload(model, points, folder))


if __name__ == "__main__":
    main()
