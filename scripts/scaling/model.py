"""The cost model: seconds of each stage as a few terms with coefficients >= 0, and the plan for many GPUs from it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from scaling.point import Found, Size
from scipy.optimize import nnls


def terms(stage: str, size: Size, passes: int) -> dict[str, float]:
    """What a stage's seconds are a sum of; E = D+1, M = (K-1)E, P = K(K-1)/2 pairs of classes."""
    e, k = size.width + 1, size.classes
    own, m, pairs = size.images / size.ranks, (k - 1) * e, k * (k - 1) // 2
    return {
        "check": {"N E / R": own * e},
        "gram": {"N E^2 / R": own * e * e, "E^3": e**3},
        "MAP": {
            "passes N E / R": passes * own * e,
            "passes N K E / R": passes * own * k * e,
            "passes K E^2": passes * k * e * e,
            "passes": passes,
        },
        "curvature": {"P N E^2 / R": pairs * own * e * e, "P E^2": pairs * e * e, "M^3": m**3},
    }[stage]


STAGES = ("check", "gram", "MAP", "curvature")


def messages(size: Size, passes: int) -> int:
    """Bytes that one rank all-reduces: two matrices of E^2, one a pair, and K E + 1 numbers a pass, all float64."""
    e, k = size.width + 1, size.classes
    return 8 * (e * e + k * (k - 1) // 2 * e * e + passes * (k * e + 1))


@dataclass(frozen=True)
class Model:
    """Seconds a unit of each term, by stage; seconds and seconds a byte of an all-reduce; the median of the passes."""

    seconds: dict[str, dict[str, float]]
    latency: float
    per_byte: float
    passes: int

    def predict(self, size: Size) -> float:
        """Seconds of a fit at a fixed prior precision."""
        compute = sum(
            self.seconds[stage][name] * amount
            for stage in STAGES
            for name, amount in terms(stage, size, self.passes).items()
        )
        return compute + (size.ranks > 1) * (self.latency * self.passes + self.per_byte * messages(size, self.passes))


def fit(points: list[tuple[Size, Found]]) -> Model:
    """Least squares of relative errors with coefficients >= 0, stage by stage; the wire from its own messages."""
    seconds = {}
    for stage in STAGES:
        rows = [terms(stage, size, found.passes) for size, found in points]
        took = np.array([found.seconds[stage] for _, found in points])
        matrix = np.array([list(row.values()) for row in rows]) / took[:, None]
        scale = matrix.max(0)
        seconds[stage] = dict(zip(rows[0], nnls(matrix / scale, np.ones(len(took)))[0] / scale, strict=True))
    wire = np.array([message for _, found in points for message in found.wire])
    latency = per_byte = 0.0
    if len(wire):
        matrix = np.stack([np.ones(len(wire)), wire[:, 0]], 1) / wire[:, 1:]
        scale = matrix.max(0)
        latency, per_byte = nnls(matrix / scale, np.ones(len(wire)))[0] / scale
    passes = round(statistics.median(found.passes for _, found in points))
    return Model(seconds, float(latency), float(per_byte), passes)


@dataclass(frozen=True)
class Hardware:
    """One GPU's share of a DGX H100 by NVIDIA's data sheets, and which part of each peak is assumed to be reached."""

    float32: float = 67e12
    tensor_bfloat16: float = 989e12
    memory: float = 3.35e12
    memory_size: float = 80e9
    host_link: float = 64e9
    network: float = 50e9
    latency: float = 50e-6
    cores: int = 14
    reached: float = 0.4


@dataclass(frozen=True)
class Step:
    """One line of the plan: what limits it, seconds, and bytes that each GPU sends."""

    name: str
    limit: str
    seconds: float
    sent: float = 0.0


def plan(size: Size, passes: int, decoded: float, image_flops: float, image_bytes: float, taus: int) -> list[Step]:
    """The stages of a run over ``size.images`` on ``size.ranks`` GPUs, each at the slowest of its limits.

    Args:
        size: N, D, K and the number of GPUs.
        passes: over the features, of one MAP.
        decoded: radiographs that a core reads in a second.
        image_flops, image_bytes: of one image through the backbone, and of its file.
        taus: prior precisions that the evidence tries.
    """
    gpu, own, e, k = Hardware(), size.images / size.ranks, size.width + 1, size.classes
    pairs, held = k * (k - 1) // 2, 4 * own * size.width
    rate = gpu.memory if held < 0.6 * gpu.memory_size else gpu.host_link
    where = "GPU memory" if rate == gpu.memory else "host link"
    ring = 2 * (size.ranks - 1) / size.ranks
    small, large = 8 * (k * e + 1), 8 * pairs * e * e

    def reduced(size_in_bytes: float, count: int) -> float:
        return count * (gpu.latency * math.log2(size.ranks) + ring * size_in_bytes / gpu.network)

    gram = 1.2 * e * e * own / (gpu.reached * gpu.float32)
    scan = held / (0.7 * rate)
    factor = ((k - 1) * e) ** 3 / 3 / (gpu.reached * gpu.float32)
    return [
        Step("read and decode", f"{gpu.cores} cores a GPU", own / (gpu.cores * decoded)),
        Step("read from storage", "network", own * image_bytes / gpu.network),
        Step("backbone, forward", "tensor cores", own * image_flops / (gpu.reached * gpu.tensor_bfloat16)),
        Step("Gram matrix", "float32", max(gram, scan) + reduced(8 * e * e, 1), ring * 8 * e * e),
        Step(
            f"MAP, {taus} prior precisions",
            where,
            taus * (passes * scan + reduced(small, passes)),
            taus * passes * ring * small,
        ),
        Step(
            f"Hessian, {taus} prior precisions",
            "float32",
            taus * (max(pairs * gram, scan) + factor + reduced(large, 1)),
            taus * ring * large,
        ),
    ]
