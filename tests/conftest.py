"""Shared fixtures: seeds, and the real development images where they are present."""

from __future__ import annotations

import os
import random
import zipfile
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: the problems are tiny, and the cores are shared

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MEDNIST_DEV = Path(os.environ.get("BAYESCAM_MEDNIST_DEV", REPOSITORY.parent / "shared/data/mednist-dev.zip"))


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  third-party code in tests may use the global generator
    torch.manual_seed(0)


@pytest.fixture
def gpu():
    """The machine's GPU, or a stand-in where it has none."""
    import torch

    from .stand_in_device import stand_in_device

    with nullcontext() if torch.cuda.is_available() else stand_in_device():
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tests never read or fill the user's cache."""
    os.environ["BAYESCAM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def mednist_dev(tmp_path_factory) -> Path:
    """The unzipped development subset of MedNIST: root/class/*.jpeg."""
    if not MEDNIST_DEV.is_file():
        pytest.skip(f"real development images absent: {MEDNIST_DEV} (set BAYESCAM_MEDNIST_DEV)")
    root = tmp_path_factory.mktemp("mednist")
    with zipfile.ZipFile(MEDNIST_DEV) as archive:
        archive.extractall(root)
    return root
