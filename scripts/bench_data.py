"""How many images a second are read, from files, from the cache and from the phantom, beside torchvision's ImageFolder?

    python scripts/bench_data.py                      simulated PNG files of 256 pixels
    python scripts/bench_data.py --data FOLDER        the user's own class folders

Every line reads the same files in the same run, into squares of --size pixels; ImageFolder stretches them (its usual
Resize), bayescam letterboxes them. The last column is the ratio to ImageFolder in one process. Takes about a minute.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _printed import kept
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Grayscale, Resize, ToTensor

from bayescam.data.dataset import open_dataset
from bayescam.data.image import read_image
from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.data.pixels import letterboxed


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of some times."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def write_phantom(root: Path, num: int, seed: int) -> Path:
    """Simulated radiographs of 256 pixels as class folders of 8-bit PNG."""
    dataset = phantom_dataset(num, seed, size=256)
    for i, record in enumerate(dataset.records):
        folder = root / dataset.classes[record.label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(255 * dataset.image(i)).astype(np.uint8)).save(folder / f"{i:06d}.png")
    return root


def image_folder(root: Path, size: int, workers: int) -> Callable[[], object]:
    """One pass over all files as tensors."""
    transform = Compose([Grayscale(), Resize((size, size), antialias=True), ToTensor()])
    loader = DataLoader(ImageFolder(str(root), transform), batch_size=64, num_workers=workers)
    return lambda: sum(len(images) for images, _ in loader)


def file_lines(root: Path, size: int, repeats: int) -> tuple[int, dict[str, float]]:
    """What each way of reading the files takes."""
    dataset, cores = open_dataset(root), os.cpu_count() or 1
    paths = [record.path for record in dataset.records if record.path is not None]
    lines = {"ImageFolder + Pillow, 1 process": seconds(image_folder(root, size, 0), repeats)}
    lines[f"ImageFolder + Pillow, {cores} workers"] = seconds(image_folder(root, size, cores), repeats)
    lines["bayescam read_image, letterbox, 1 thread"] = seconds(
        lambda: [letterboxed(read_image(path), size) for path in paths], repeats
    )
    lines["bayescam hash of the contents"] = seconds(lambda: open_dataset(root).groups(), repeats)

    def pixels(cache: Path) -> object:
        return open_dataset(root).pixels(size, cache=cache, progress=False).batch(np.arange(len(paths)))

    def cold() -> object:
        with tempfile.TemporaryDirectory() as cache:
            return pixels(Path(cache))

    lines[f"bayescam pixels(), {cores} processes, no cache"] = seconds(cold, repeats)
    with tempfile.TemporaryDirectory() as cache:
        pixels(Path(cache))
        lines["bayescam pixels(), from the cache"] = seconds(lambda: pixels(Path(cache)), repeats)
    return len(paths), lines


def phantom_lines(num: int, size: int, seed: int) -> dict[str, float]:
    """Drawing the phantom, with the processes' start."""
    dataset = phantom_dataset(num, seed)

    def drawn(workers: int) -> object:
        with tempfile.TemporaryDirectory() as cache:
            return dataset.pixels(size, num_workers=workers, cache=Path(cache), progress=False)

    cores = os.cpu_count() or 1
    return {
        "bayescam phantom, 1 process": seconds(lambda: drawn(1), 1),
        f"bayescam phantom, {cores} processes": seconds(lambda: drawn(cores), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="class folders (default: simulated ones)")
    parser.add_argument("--num", type=int, default=3000, help="simulated images")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the simulated images")
    parser.add_argument("--out", type=Path, help="folder for a file of what is printed")
    asked = parser.parse_args()
    with kept(asked.out, "bench_data.txt"):
        measure(asked)


def measure(asked: argparse.Namespace) -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        root = asked.data or write_phantom(Path(folder), asked.num, asked.seed)
        num, lines = file_lines(root, asked.size, asked.repeats)
    reference = num / next(iter(lines.values()))
    print(f"{num} files, squares of {asked.size}, {os.cpu_count()} cores")
    rates = {name: num / took for name, took in lines.items()}
    rates |= {name: asked.num / took for name, took in phantom_lines(asked.num, asked.size, asked.seed + 1).items()}
    print(f"{'':<44} {'images/s':>9} {'ratio':>7}")
    for name, rate in rates.items():
        print(f"{name:<44} {rate:>9.0f} {rate / reference:>7.2f}")


if __name__ == "__main__":
    main()
