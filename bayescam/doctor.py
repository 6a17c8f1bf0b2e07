"""What this machine offers a run: versions, device, and whether the pieces fit together."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bayescam import __version__
from bayescam.errors import UsageError
from bayescam.storage import printable

_PACKAGES = (
    "torch",
    "torchvision",
    "pyro-ppl",
    "arviz",
    "numpy",
    "scipy",
    "xarray",
    "h5netcdf",
    "matplotlib",
    "pillow",
    "safetensors",
)


@dataclass(frozen=True)
class Check:
    """One line of ``bayescam doctor``."""

    name: str
    passed: bool
    words: str


def environment(device: str, ranks: int = 1) -> dict[str, Any]:
    """What ``environment.json`` holds: versions, device, threads and ranks; nothing that names the user."""
    import torch

    facts: dict[str, Any] = {
        "bayescam": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "ranks": ranks,
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def resolve_device(device: str) -> str:
    """ "auto" is cuda where there is one, else cpu.

    Raises:
        UsageError: no such device, or it is not there, or not for so many ranks.
    """
    import torch

    from bayescam.parallel import check_gpus

    if device == "mps":
        raise UsageError("--device mps: has no float64, which the posterior needs; say --device cpu")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {printable(device)}: unknown; say auto, cpu, cuda or cuda:0")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    used = "cuda" if device == "auto" else device
    try:
        torch.zeros(1, device=used)
    except (RuntimeError, AssertionError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: not usable here ({reason}); say --device cpu") from error
    check_gpus(device)
    return used


def examine() -> list[Check]:
    """All checks, none of which raises."""
    checks = [
        Check("bayescam", True, __version__),
        Check("python", sys.version_info >= (3, 11), platform.python_version()),
    ]
    checks += [_package(name) for name in _PACKAGES]
    checks += [_torch_pair(), _device(), _cache()]
    return checks


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package(name: str) -> Check:
    found = _version(name)
    return Check(name, found is not None, found or f"not installed: pip install {name}")


def _torch_pair() -> Check:
    try:
        import_module("torch")
        import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        if "torchvision::nms" in str(error):
            return Check(
                "torch with torchvision",
                False,
                "they are of different builds (a CPU-only torch with the ordinary torchvision): "
                "pip install --force-reinstall torch torchvision",
            )
        return Check("torch with torchvision", False, f"does not import: {str(error).splitlines()[0]}")
    return Check("torch with torchvision", True, "fit together")


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", False, str(error).splitlines()[0])
    if torch.cuda.is_available():
        return Check("device", True, f"cuda: {torch.cuda.get_device_name(0)}")
    return Check("device", True, f"cpu, {torch.get_num_threads()} threads (no usable GPU)")


def _cache() -> Check:
    from bayescam.data.dataset import cache_folder

    folder = Path(cache_folder())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return Check("cache folder", False, f"{folder}: {error.strerror}; set BAYESCAM_CACHE to a folder you can write")
    return Check("cache folder", True, str(folder))
