"""A short, seeded run of ``scripts/fuzz.py``: no byte makes a reader raise anything but bayescam's own errors."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bayescam.backbone.network import Backbone
from bayescam.errors import FileFormatError
from bayescam.posterior.laplace import fit_laplace, load_laplace
from bayescam.posterior.nuts import Nuts, sample_nuts
from bayescam.storage import load_tensors, save_tensors

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/fuzz.py"


def _script():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


fuzz = _script()
COSTLY = ("mura", "folder", "mednist", "backbone", "training", "archive")  # whole trees and networks: fewer rounds


@pytest.mark.parametrize("name", [name for name in fuzz.READERS if name not in fuzz.IN_C])
def test_no_bytes_break_a_reader(name, tmp_path):
    rounds = 20 if name in COSTLY else 60
    broken = fuzz.work(name, 0, 0, rounds, seconds=60, keep=tmp_path / "bad", journal=tmp_path / "round")
    assert broken == 0, sorted((tmp_path / "bad").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.IN_C)
def test_no_bytes_break_a_reader_written_in_c(name, tmp_path):
    """In a process of its own: a crash of the library is counted too."""
    options = argparse.Namespace(seed=0, rounds=40, seconds=60, keep=tmp_path / "bad")
    assert fuzz.supervise(name, options) == 0, sorted((tmp_path / "bad").iterdir())


def _laplace_file(folder: Path) -> Path:
    labels = torch.arange(30) % 3
    fit_laplace(torch.randn(30, 4) + labels[:, None], labels, prior_precision=1.0).save(folder / "l.safetensors")
    return folder / "l.safetensors"


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def _pickle(path: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps(_Bomb()))


def _torch_save(path: Path) -> None:
    torch.save({"weight_mean": torch.zeros(3, 4), "bomb": _Bomb()}, path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _oversized(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"polyglot")


def _endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])


def _overlapping(path: Path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)
    path.write_bytes(content[:8] + header + content[8 + length :])


def _first_real(tensors):
    return next(tensor for _, tensor in sorted(tensors.items()) if tensor.is_floating_point())


def _changed(change):
    def apply(path: Path) -> None:
        with safe_open(str(path), "pt") as stored:
            kind = json.loads(stored.metadata()["bayescam"])["kind"]
        tensors, metadata = load_tensors(path, kind=kind)
        change(tensors, metadata)
        save_tensors(path, tensors, metadata)

    return apply


def _foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, str(path))


ATTACKS = {
    "absent": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "pickle": _pickle,
    "torch.save": _torch_save,
    "cut": _cut,
    "oversized": _oversized,
    "endless header": _endless_header,
    "overlapping": _overlapping,
    "foreign": _foreign,
    "another kind": _changed(lambda tensors, metadata: metadata.update(kind="other")),
    "missing tensor": _changed(lambda tensors, metadata: tensors.pop(min(tensors))),
    "wrong shape": _changed(lambda tensors, metadata: tensors.update({min(tensors): torch.zeros(7, 7, 7)})),
    "NaN": _changed(lambda tensors, metadata: _first_real(tensors).fill_(torch.nan)),
    "infinite": _changed(lambda tensors, metadata: _first_real(tensors).fill_(torch.inf)),
}
LAPLACE_ATTACKS = {
    "another structure": _changed(lambda tensors, metadata: metadata.update(structure="kron")),
    "unknown structure": _changed(lambda tensors, metadata: metadata.update(structure="cuda")),
    "no prior": _changed(lambda tensors, metadata: metadata.pop("prior_precision")),
    "negative prior": _changed(lambda tensors, metadata: metadata.update(prior_precision=-1.0)),
    "notes that are none": _changed(lambda tensors, metadata: metadata.update(notes=3)),
    "another type": _changed(lambda tensors, metadata: tensors.update(weight_mean=torch.zeros(3, 4).char())),
}


LOADERS = {"laplace": load_laplace, "backbone": lambda path: Backbone.load(path), "nuts": Nuts.load}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A whole file of each kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    path = _laplace_file(folder).rename(folder / "laplace.safetensors")
    Backbone("small", 3, image_size=32).save(folder / "backbone.safetensors", classes=["a", "b", "c"])
    features, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    lengths = {"num_chains": 2, "num_samples": 4, "num_warmup": 20}
    sample_nuts(load_laplace(path), features, labels, **lengths, progress=False).save(folder / "nuts.safetensors")
    return folder


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_checkpoint_that_is_none_is_refused_by_name_and_runs_no_code(
    attack, kind, checkpoints, tmp_path, monkeypatch
):
    """Each reader meets each attack on a file of its own kind and on files of the others."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "l.safetensors"
    shutil.copy(checkpoints / f"{kind}.safetensors", path)
    ATTACKS[attack](path)
    for load in LOADERS.values():
        with pytest.raises(FileFormatError, match=r"l\.safetensors") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("attack", LAPLACE_ATTACKS)
def test_a_gaussian_whose_metadata_lie_is_refused_by_name(attack, checkpoints, tmp_path):
    path = tmp_path / "l.safetensors"
    shutil.copy(checkpoints / "laplace.safetensors", path)
    LAPLACE_ATTACKS[attack](path)
    with pytest.raises(FileFormatError, match=r"l\.safetensors"):
        load_laplace(path)


def test_the_script_reports_a_bug_and_keeps_the_file(tmp_path, monkeypatch):
    def prepare(folder):
        (folder / "seed.txt").write_text("x" * 50)

        def read(path):
            if path.name != "seed.txt":
                raise ZeroDivisionError

        return read

    monkeypatch.setitem(fuzz.READERS, "toy", (prepare, [fuzz.mutate_bytes]))
    assert fuzz.work("toy", 0, 0, 5, 60, tmp_path / "bad", tmp_path / "round") == 5
    assert len(list((tmp_path / "bad").iterdir())) == 5
    assert "fuzz" not in sys.modules
