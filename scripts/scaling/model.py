"""The cost model: seconds of each stage as a few terms with coefficients >= 0, and the plan for many GPUs from it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from scaling.point import Found, Size
from scipy.optimize import nnls


def terms(stage: str, size: Size, passes: float) -> dict[str, float]:
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


NUTS = "NUTS"
STAGES = ("check", "gram", "MAP", "curvature")


def reduced(size: Size, passes: float) -> float:
    """Bytes that are all-reduced: the Gram matrix, one of its size a pair, K E + 1 numbers a pass, all float64."""
    e, k = size.width + 1, size.classes
    return 8 * (e * e + k * (k - 1) // 2 * e * e + passes * (k * e + 1))


def told(size: Size, passes: float) -> float:
    """Bytes that rank 0 broadcasts: where each pass is to be taken, K E numbers."""
    return 8 * passes * size.classes * (size.width + 1)


@dataclass(frozen=True)
class Model:
    """Seconds a unit of each term, by stage; seconds a message and a byte; exp of what times N, D+1 and K to which
    powers the passes are; the median of the messages that go with one."""

    seconds: dict[str, dict[str, float]]
    latency: float
    per_byte: float
    growth: tuple[float, ...]
    messages: float

    def passes(self, size: Size) -> float:
        """Over the features, of one MAP."""
        return math.exp(float(np.dot(self.growth, _logs(size))))

    def stage(self, name: str, size: Size) -> float:
        """Seconds of a stage without its messages."""
        amounts = terms(name, size, self.passes(size))
        return sum(self.seconds[name][term] * amount for term, amount in amounts.items())

    def predict(self, size: Size) -> float:
        """Seconds of a fit at a fixed prior precision."""
        passes = self.passes(size)
        sent = reduced(size, passes) + told(size, passes)
        wire = self.latency * self.messages * passes + self.per_byte * sent
        return sum(self.stage(name, size) for name in STAGES) + (size.ranks > 1) * wire


def _logs(size: Size) -> list[float]:
    return [1.0, math.log(size.images), math.log(size.width + 1), math.log(size.classes)]


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
    passes = np.log([found.passes for _, found in points])
    growth = np.linalg.lstsq(np.array([_logs(size) for size, _ in points]), passes, rcond=None)[0]
    counts = [(len(found.reduced) + len(found.told)) / found.passes for _, found in points if found.told]
    messages = statistics.median(counts) if counts else 0.0
    return Model(seconds, float(latency), float(per_byte), tuple(growth.tolist()), messages)


@dataclass(frozen=True)
class Hardware:
    """One GPU's share of a DGX H100 by NVIDIA's data sheets, and the shares of those peaks assumed to be reached.

    Args:
        float32, tensorfloat32: operations a second; the latter, on tensor cores, is torch's default for convolutions.
        memory, memory_size: bytes a second and bytes of the GPU's own memory.
        host_link, network: bytes a second, each way.
        cores: of the host, a GPU.
        latency: seconds of an all-reduce or broadcast among 2 ranks; log2(R) times that among R. Assumed.
        reached, streamed: shares of the arithmetic and of the bandwidths. Assumed.
        price: dollars an hour, with its share of the machine. Assumed.
    """

    float32: float = 67e12
    tensorfloat32: float = 495e12
    memory: float = 3.35e12
    memory_size: float = 80e9
    host_link: float = 64e9
    network: float = 50e9
    cores: int = 14
    latency: float = 20e-6
    reached: float = 0.4
    streamed: float = 0.7
    price: float = 3.0


@dataclass(frozen=True)
class Workload:
    """What is done to every image.

    Args:
        decoded: files that a core reads in a second, measured.
        image_bytes: of such a file.
        forward: operations of the backbone; training takes three times as many. ResNet-18 at 224 x 224.
        parameters: of the backbone.
        batch: images a GPU and step of training.
        passes: over the features while the evidence chooses the prior precision, by the features' width, measured.
        messages: that go with a pass, measured.
        curvatures: Hessians that the evidence builds, measured.
        refined: those of refinement, measured.
        expectations: expected losses of refinement, each over so many points an image, measured.
        leapfrogs: of NUTS, all ranks walking each chain together: 4 chains of 650 draws, 15 steps each.
    """

    decoded: float
    image_bytes: int
    passes: dict[int, int]
    messages: float
    curvatures: int
    refined: int
    expectations: int
    points: int = 128
    forward: float = 3.6e9
    parameters: float = 11.7e6
    batch: int = 256
    leapfrogs: int = 4 * 650 * 15


@dataclass(frozen=True)
class Step:
    """One line of the plan: what limits it, seconds, and bytes that each GPU sends."""

    name: str
    limit: str
    seconds: float
    sent: float = 0.0


def plan(size: Size, work: Workload, gpu: Hardware = Hardware()) -> list[Step]:
    """The stages of a run over ``size.images`` on ``size.ranks`` GPUs, each at the slowest of its limits (a roofline).

    A pass reads the features twice, for the logits and for the gradient; over the host link they come once, and are
    read from the GPU's memory the second time. Blocks of a Hessian are symmetric, and a fifth more than their halves is
    computed. Refinement needs each image's logits' covariance beside each Hessian, whole blocks, and prediction needs
    it once. An expected loss writes and reads the logits at all points of the images twice.
    """
    own, width, k = size.images / size.ranks, size.width + 1, size.classes
    pairs, held = k * (k - 1) // 2, 4.0 * own * size.width
    resident = held < 0.6 * gpu.memory_size
    scan = 2 * held / (gpu.streamed * gpu.memory) if resident else held / (gpu.streamed * gpu.host_link)
    where = "GPU memory" if resident else "host link"
    ring, hops = 2 * (size.ranks - 1) / size.ranks, math.log2(size.ranks)
    flops = gpu.reached * gpu.float32
    gram, cover = 1.2 * width * width * own / flops, 2.0 * width * width * own / flops

    def step(name: str, limit: str, seconds: float, sent: float = 0.0, messages: float = 1.0, times: float = 1) -> Step:
        waits = gpu.latency * hops * messages + sent / (gpu.streamed * gpu.network) if sent else 0.0
        return Step(name, limit, times * (seconds + waits), times * sent)

    forward = own * work.forward / (gpu.reached * gpu.tensorfloat32)
    matrix, point = ring * 8.0 * width * width, (ring + 1) * 8.0 * k * width
    cloud = 4 * 4.0 * own * work.points * k / (gpu.streamed * gpu.memory)
    factor = ((k - 1) * width) ** 3 / 3 / flops
    updates, passes, tried, refined = own / work.batch, work.passes[size.width], work.curvatures, work.refined
    return [
        step("read files", "network", own * work.image_bytes / (gpu.streamed * gpu.network)),
        step("decode files", f"{gpu.cores} cores a GPU", own / (gpu.cores * work.decoded)),
        step("one epoch of training", "tensor cores", 3 * forward / updates, ring * 4 * work.parameters, times=updates),
        step("features", "tensor cores", forward),
        step("Gram matrix", "float32", max(gram, scan), matrix),
        step(f"MAPs for the evidence, {passes} passes", where, scan, point, work.messages, passes),
        step(f"{tried} Hessians for it", "float32", max(pairs * gram, scan) + factor, pairs * matrix, times=tried),
        step(
            f"refinement, {refined} Hessians",
            "float32",
            max(pairs * (gram + cover), scan) + factor,
            pairs * matrix,
            times=refined,
        ),
        step(f"its {work.expectations} expected losses", "GPU memory", cloud, point, work.messages, work.expectations),
        step("predict every image", "float32", max(pairs * cover, scan)),
        step(f"{NUTS}, {work.leapfrogs:,} steps", where, scan, point, 2, work.leapfrogs),
    ]
