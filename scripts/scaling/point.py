"""One point of ``bench_scale.py``, measured by every rank: python scripts/scaling/point.py SIZE FOLDER.

Rank 0 prints one line of JSON: seconds by stage, passes over the features, bytes sent, peak memory.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bayescam.parallel import joined, rank, share
from bayescam.posterior import laplace, refine
from bayescam.posterior.images import TrainingImages, check_images
from bayescam.posterior.laplace import laplace_at
from bayescam.posterior.map import find_map, whitening

_ROWS = 20_000
_RANK = 32


@dataclass(frozen=True)
class Size:
    """N images, D features, K classes on R ranks of so many threads, on a device, as a structure.

    ``whole``: not a fit at a fixed prior precision, but the choice of it by the evidence, and refinement.
    """

    images: int
    width: int
    classes: int
    ranks: int = 1
    threads: int = 1
    device: str = "cpu"
    structure: str = "full"
    whole: bool = False


@dataclass
class Found:
    """What was measured: the time of each stage on rank 0 in s, counts, memory of the largest rank in MiB.

    ``passes`` are a MAP's or, of a whole fit, the evidence's, over the features; ``curvatures`` and ``refined`` the
    Hessians of the evidence and of refinement, ``expectations`` the latter's expected losses; ``reduced`` and ``told``
    the bytes of each all-reduce and broadcast.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    processor: float = 0.0
    passes: int = 0
    curvatures: int = 0
    refined: int = 0
    expectations: int = 0
    reduced: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    wire: list[tuple[int, float]] = field(default_factory=list)
    memory_before: float = 0.0
    memory_peak: float = 0.0


def simulate(folder: Path, images: int, width: int) -> None:
    """``phi-<width>.npy``, correlated and non-negative like a pooled ReLU layer's, written in pieces."""
    path, rng = folder / f"phi-{width}.npy", np.random.default_rng(width)
    phi = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(images, width))
    mixing = rng.standard_normal((_RANK, width), dtype=np.float32) / 6
    for start in range(0, images, _ROWS):
        rows = min(_ROWS, images - start)
        noise = 0.3 * rng.standard_normal((rows, width), dtype=np.float32)
        phi[start : start + rows] = np.maximum(rng.standard_normal((rows, _RANK), dtype=np.float32) @ mixing + noise, 0)
    phi.flush()


def label(phi: np.ndarray, classes: int) -> Tensor:
    """Labels drawn from a confident last layer, each class at least once, the same whatever the number of ranks."""
    rng = np.random.default_rng(classes)
    weight = rng.standard_normal((phi.shape[1], classes), dtype=np.float32)
    mean = phi[:_ROWS].mean(0)
    scale = 8 / ((phi[:_ROWS] - mean) @ weight).std()
    pieces = []
    for start in range(0, len(phi), _ROWS):
        logits = scale * ((phi[start : start + _ROWS] - mean) @ weight)
        pieces.append((logits + rng.gumbel(size=logits.shape)).argmax(1))
    labels = np.concatenate(pieces)
    labels[:classes] = np.arange(classes)
    return torch.from_numpy(labels)


def anonymous() -> float:
    """Anonymous resident memory of this process in MiB: what a memory map does not count to."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


@contextmanager
def watched(found: Found) -> Iterator[None]:
    """Sample the anonymous memory (of a GPU: torch's own count) every 10 ms, count passes and bytes sent."""
    ended, chunks = threading.Event(), TrainingImages.chunks
    reduce, tell = dist.all_reduce, dist.broadcast

    def sample() -> None:
        while not ended.wait(0.01):
            found.memory_peak = max(found.memory_peak, anonymous())

    def counting_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        found.reduced.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **options)

    def counting_tell(tensor: Tensor, *args: Any, **options: Any) -> Any:
        found.told.append(tensor.numel() * tensor.element_size())
        return tell(tensor, *args, **options)

    def counting_chunks(self: TrainingImages, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        found.passes += 1
        return chunks(self, rows)

    found.memory_before = anonymous()
    sampler = threading.Thread(target=sample)
    sampler.start()
    dist.all_reduce, dist.broadcast, TrainingImages.chunks = counting_reduce, counting_tell, counting_chunks
    try:
        yield
    finally:
        dist.all_reduce, dist.broadcast, TrainingImages.chunks = reduce, tell, chunks
        ended.set()
        sampler.join()


def timed(found: Found, stage: str, make: Callable[[], Any], device: str) -> Any:
    begun = time.perf_counter()
    made = make()
    if device == "cuda":
        torch.cuda.synchronize()
    found.seconds[stage] = time.perf_counter() - begun
    return made


def measure(size: Size, folder: Path) -> Found:
    """A fit stage by stage, on the ranks that ``torchrun`` started."""
    torch.set_num_threads(size.threads)
    found = Found()
    phi = np.load(folder / f"phi-{size.width}.npy", mmap_mode="r")[: size.images]
    labels = label(phi, size.classes)
    with joined() as group:
        own = share(size.images, group)
        features: Any = torch.from_numpy(phi[own].copy()).cuda() if size.device == "cuda" else phi[own]
        processor = time.process_time()
        with watched(found):
            passes = (_whole if size.whole else _fixed)(size, features, labels[own], group, found)
        found.passes, found.processor = passes, time.process_time() - processor
        if size.device == "cuda":
            found.memory_peak = torch.cuda.max_memory_allocated() / 2**20
        if group is not None:
            found.wire = wire(sorted(set(found.reduced)), torch.device(size.device))
            peak = torch.tensor([found.memory_peak])
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            found.memory_peak = float(peak)
        if rank(group) == 0:
            print(json.dumps(asdict(found)), flush=True)
    return found


def _fixed(size: Size, features: Any, labels: Tensor, group: Any, found: Found) -> int:
    """A fit at prior precision 1: check, Gram matrix, MAP, curvature; the passes of its MAP."""
    images = timed(
        found, "check", lambda: check_images(features, labels, num_classes=size.classes, group=group), size.device
    )
    whitener = timed(found, "gram", lambda: whitening(images), size.device)
    before = found.passes
    mode = timed(found, "MAP", lambda: find_map(images, 1.0, whitener), size.device)
    passes = found.passes - before
    timed(found, "curvature", lambda: laplace_at(images, mode, whitener, 1.0, size.structure, None), size.device)
    return passes


def _whole(size: Size, features: Any, labels: Tensor, group: Any, found: Found) -> int:
    """The prior precision by the evidence, then refinement; the passes of the former, its Hessians' among them."""
    structure: Any = size.structure
    curvature_at, expected_loss = laplace.curvature_at, refine.expected_loss

    def counting(*args: Any) -> Any:
        found.curvatures += 1
        return curvature_at(*args)

    def expecting(*args: Any) -> Any:
        found.expectations += 1
        return expected_loss(*args)

    laplace.curvature_at, refine.expected_loss = counting, expecting
    fit = timed(
        found,
        "evidence",
        lambda: laplace.fit_laplace(features, labels, num_classes=size.classes, structure=structure, group=group),
        size.device,
    )
    passes = found.passes
    refined = timed(found, "refine", lambda: fit.refine(features, labels, group=group), size.device)
    found.refined = refined.refinement.curvatures
    return passes


def wire(sizes: list[int], device: torch.device) -> list[tuple[int, float]]:
    """Median seconds of an all-reduce of each size in bytes."""
    found = []
    for size in sizes:
        message, took = torch.zeros(size // 8, dtype=torch.float64, device=device), []
        for _ in range(9):
            begun = time.perf_counter()
            dist.all_reduce(message)
            if device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - begun)
        found.append((size, statistics.median(took)))
    return found


if __name__ == "__main__":
    measure(Size(**json.loads(sys.argv[1])), Path(sys.argv[2]))
