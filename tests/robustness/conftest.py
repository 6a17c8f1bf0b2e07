"""A tiny data set and the settings of a run of a few seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SETTINGS = """
preset = "quick"
seed = 3
device = "cpu"
[data]
spec = {spec}
image_size = 32
[train]
epochs = 2
batch_size = 16
[posterior]
num_samples = 20
[nuts]
num_chains = 2
num_samples = 10
num_warmup = 20
[explain]
num_images = 3
"""


def draw(label: int, seed: int, size: int = 40) -> np.ndarray:
    """A grey picture whose bright third says the label."""
    picture = np.random.default_rng([label, seed]).integers(0, 90, (size, size))
    picture[:, label * size // 3 : (label + 1) * size // 3] += 120
    return picture.astype(np.uint8)


def fill(root: Path, classes: list[str | bytes], each: int = 30) -> Path:
    """``root/class/number.png``; a class name may be bytes."""
    for label, name in enumerate(classes):
        folder = root / (name if isinstance(name, str) else name.decode("utf-8", "surrogateescape"))
        folder.mkdir(parents=True)
        for number in range(each):
            Image.fromarray(draw(label, number)).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """90 images of three classes."""
    return fill(tmp_path_factory.mktemp("tiny") / "images", ["elbow", "hand", "wrist"])


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> Callable[[Path], Path]:
    """A configuration file for a run of a few seconds on a data set."""
    folder = tmp_path_factory.mktemp("settings")

    def write(spec: Path, **changes: str) -> Path:
        import json

        text = SETTINGS.format(spec=json.dumps(str(spec)))
        for old, new in changes.items():
            assert f"{old} = " in text
            text = "\n".join(f"{old} = {new}" if line.startswith(f"{old} = ") else line for line in text.splitlines())
        file = folder / f"{len(list(folder.iterdir()))}.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def new_driver(tmp_path_factory):
    """Makes drivers that are closed when the session ends; the module is loaded by its path."""
    path = Path(__file__).with_name("driver.py")
    spec = importlib.util.spec_from_file_location("driver", path)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["driver"] = module
    spec.loader.exec_module(module)
    made = []

    def make(**options):
        made.append(module.Driver(tmp_path_factory.mktemp("driver"), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def driver(new_driver):
    return new_driver()
