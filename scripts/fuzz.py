"""Seeded mutation fuzz of what bayescam reads: whatever the bytes, a reader answers or raises bayescam's own error.

    python scripts/fuzz.py --rounds 200                 what tests/robustness/test_fuzz.py runs
    python scripts/fuzz.py --seconds 3600 --seed 7      the longer one
    python scripts/fuzz.py --reader netcdf --keep bad   one reader; the files that broke it are kept in bad/

Valid files are made first; then their bits, bytes, chunks, JSON nodes, TOML values and safetensors headers are changed.
Each reader runs in a process of its own, so that a crash of a C library is a finding and not the end. Exit status 1
when anything but an answer or a ``BayescamError`` came out.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HANG_SECONDS = 30
Reader = Callable[[Path], object]

# --- changing bytes -------------------------------------------------------------------------------------------------

ODD_VALUES = [
    None, True, 0, -1, 3, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), "", "x" * 300,
    "../../x", "\x00", "\ud800", "<b>", "{{7*7}}", [], {}, [[]], [None], {"a": 1}, ["x"], [1, 2], "nan", "full", "cpu",
]  # fmt: skip
ODD_BYTES = [
    b"\x00",
    b"\xff",
    b"\x80\x00\x00\x00",
    b"\x7f\xff\xff\xff",
    b"\n",
    b'"',
    b"{",
    b"]" * 9,
    b"[" * 20_000,
    b"1e999",
]


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four changes of bits, bytes or chunks."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.randint(1, 64)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            data[at : at + rng.choice([0, length])] = rng.choice(ODD_BYTES)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at // 2 : at // 2 + length]
        else:
            del data[at:]
    return bytes(data)


def mutate_tree(tree: object, rng: random.Random) -> object:
    """The same JSON-like tree with one node replaced, removed or given a neighbour."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(sorted(tree))
        changed = dict(tree)
        what = rng.random()
        if what < 0.1:
            del changed[key]
        elif what < 0.15:
            changed[str(rng.choice(ODD_VALUES))[:50]] = changed.pop(key)
        else:
            changed[key] = mutate_tree(tree[key], rng)
        return changed
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        at = rng.randrange(len(tree))
        return [*tree[:at], mutate_tree(tree[at], rng), *tree[at + rng.randrange(2) :]]
    if isinstance(tree, int | float) and not isinstance(tree, bool) and rng.random() < 0.5:
        return rng.choice([tree + 1, tree - 1, -tree, tree * 1000, float(tree), str(tree)])
    return rng.choice(ODD_VALUES)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(mutate_tree(json.loads(content), rng)).encode()


def mutate_toml(content: bytes, rng: random.Random) -> bytes:
    import tomli_w

    try:
        return tomli_w.dumps(mutate_tree(tomllib.loads(content.decode()), rng)).encode("utf-8", "backslashreplace")
    except (TypeError, ValueError, AttributeError):
        return mutate_bytes(content, rng)


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is changed as JSON, with the length that belongs to it."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.7:
        ours = json.loads(header["__metadata__"]["bayescam"])
        header["__metadata__"]["bayescam"] = json.dumps(mutate_tree(ours, rng))
    elif rng.random() < 0.5:
        names = [name for name in header if name != "__metadata__"]
        a, b = rng.choice(names), rng.choice(names)
        header[a], header[b] = header[b], header[a]
    else:
        header = mutate_tree(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutate_netcdf(content: bytes, rng: random.Random) -> bytes:
    """A NetCDF file with an object or attribute removed, renamed or replaced by something else."""
    import h5py

    buffer = io.BytesIO(content)
    with h5py.File(buffer, "a") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(names)
            if name not in file:
                continue
            kind = rng.randrange(4)
            if kind == 0:
                del file[name]
            elif kind == 1:
                file.move(name, f"{name}_{rng.randrange(9)}")
            elif kind == 2 and file[name].attrs:
                key = rng.choice(sorted(file[name].attrs))
                del file[name].attrs[key]
                file[name].attrs[key] = rng.choice([-1, 2.5, "x", "\ud800".encode("utf-8", "surrogatepass"), [1, 2]])
            else:
                parent = name.rpartition("/")[0]
                del file[name]
                value = rng.choice([3, "text", [1.5], [[1, 2], [3, 4]], float("nan"), [], ["a", "b"], 10**15])
                file[f"{parent}/{name.rpartition('/')[2]}"] = value
    return buffer.getvalue()


# --- what is read ---------------------------------------------------------------------------------------------------


def _features() -> tuple:
    import torch

    torch.manual_seed(0)
    labels = torch.arange(30) % 3
    return torch.randn(30, 4) + labels[:, None], labels


def _laplace(folder: Path) -> Reader:
    from bayescam.posterior.laplace import fit_laplace, load_laplace

    for structure in ("full", "kron", "diag"):
        fit_laplace(*_features(), structure=structure, prior_precision=1.0).save(folder / f"{structure}.safetensors")
    fit_laplace(*_features(), prior_precision=1.0).refine(*_features()).save(folder / "refined.safetensors")
    question = _features()[0]

    def read(path: Path) -> None:
        laplace = load_laplace(path)
        if laplace.num_features == question.shape[1]:
            laplace.predict_proba(question)

    return read


def _nuts(folder: Path) -> Reader:
    from bayescam.posterior.laplace import fit_laplace
    from bayescam.posterior.nuts import Nuts, sample_nuts

    lengths = {"num_chains": 2, "num_samples": 4, "num_warmup": 20}
    nuts = sample_nuts(fit_laplace(*_features(), prior_precision=1.0), *_features(), **lengths, progress=False)
    nuts.save(folder / "nuts.safetensors")
    return Nuts.load


def _chain(folder: Path) -> Reader:
    from bayescam.posterior.laplace import fit_laplace
    from bayescam.posterior.nuts import sample_nuts
    from bayescam.posterior.nuts_chain import load_chain
    from bayescam.storage import load_tensors

    laplace = fit_laplace(*_features(), prior_precision=1.0)
    sample_nuts(laplace, *_features(), num_chains=1, num_samples=4, num_warmup=20, folder=folder, progress=False)
    _, metadata = load_tensors(folder / "chain-0.safetensors", kind="chain")
    return lambda path: load_chain(path, metadata["fingerprint"])


def _backbone(folder: Path) -> Reader:
    from bayescam.backbone.network import Backbone

    Backbone("small", 3, image_size=32).save(folder / "backbone.safetensors", classes=["a", "b", "c"])
    return Backbone.load


def _weights(folder: Path) -> Reader:
    from bayescam.backbone.network import Backbone

    Backbone("small", 3, image_size=32).save(folder / "weights.safetensors", classes=["a", "b", "c"])
    return lambda path: Backbone("small", 3, str(path))


def _training(folder: Path) -> Reader:
    import numpy as np

    from bayescam.backbone.network import Backbone
    from bayescam.backbone.training import TrainingSettings, train_backbone
    from bayescam.data.pixels import Geometry, Pixels

    rng = np.random.default_rng(0)
    geometry = (Geometry.fit(32, 32, 32),) * 6
    pixels = Pixels(rng.integers(0, 65536, (6, 32, 32), dtype=np.uint16), geometry)
    rows = np.arange(6)

    def train(path: Path) -> None:
        train_backbone(
            Backbone("small", 3, image_size=32),
            pixels,
            rows % 3,
            train=rows,
            valid=rows[:3],
            settings=TrainingSettings(epochs=1, batch_size=6),
            seed=0,
            checkpoint=path,
            progress=False,
        )

    train(folder / "training.safetensors")
    return train


def _config(folder: Path) -> Reader:
    from bayescam.config import read_config, to_toml

    for preset in ("quick", "thorough"):
        config = read_config(None, {"preset": preset, "data.limit": 50, "data.root": str(folder)})
        (folder / f"{preset}.toml").write_text(to_toml(config))
    return lambda path: read_config(path, {"seed": 1})


def _run_json(folder: Path) -> Reader:
    from bayescam.runfolder import RunFolder, verified
    from bayescam.storage import write_text

    run = folder.parent / "run"
    run.mkdir()
    names = ("metrics.json", "posterior/laplace.safetensors")
    for name in names:
        write_text(run / name, "{}")
    RunFolder(run).complete({"seed": 0})
    (folder / "run.json").write_bytes((run / "run.json").read_bytes())

    def read(path: Path) -> None:
        (run / "run.json").write_bytes(path.read_bytes())
        verified(run, *names)

    return read


def _stages_json(folder: Path) -> Reader:
    from bayescam.runfolder import RunFolder, opened
    from bayescam.storage import write_text

    run = folder.parent / "stages"
    run.mkdir()
    with opened(run, None, {}, resume=False, overwrite=False) as (stages, _):
        for name in ("data", "train"):
            with stages.stage(name, [f"{name}.txt"]):
                write_text(run / f"{name}.txt", name)
    (folder / "stages.json").write_bytes((run / ".stages.json").read_bytes())

    def read(path: Path) -> None:
        (run / ".stages.json").write_bytes(path.read_bytes())
        with opened(run, None, {}, resume=True, overwrite=False) as (stages, _):
            again = RunFolder(stages.path)
            return [again.timings, *(again.done(name) for name in ("data", "train", "other"))]

    return read


def _comparison_json(folder: Path) -> Reader:
    from bayescam.pipeline import chosen_posterior

    (folder / "comparison.json").write_text(json.dumps({"verdict": "refine", "words": "w", "tv": {"x": 0.1}}))
    run = folder.parent / "compared"
    run.mkdir()

    def read(path: Path) -> object:
        (run / "comparison.json").write_bytes(path.read_bytes())
        return chosen_posterior(run)

    return read


def _netcdf(folder: Path) -> Reader:
    from bayescam.diagnose.diagnosis import nuts_checks
    from bayescam.diagnose.inference_data import load, save, save_dataset, to_inference_data
    from bayescam.posterior.laplace import fit_laplace
    from bayescam.posterior.nuts import sample_nuts
    from bayescam.storage import load_netcdf

    features, labels = _features()
    laplace = fit_laplace(features, labels, prior_precision=1.0)
    lengths = {"num_chains": 2, "num_samples": 4, "num_warmup": 20}
    nuts = sample_nuts(laplace, features, labels, **lengths, progress=False)
    idata = to_inference_data(nuts, features[:3], labels[:3], classes=["a", "b", "c"])
    save(idata, folder / "nuts.nc")
    save_dataset(idata.posterior, folder / "posterior.nc")

    def read(path: Path) -> None:
        load_netcdf(path)
        load(path)
        if path.name != "posterior.nc":
            nuts_checks(path)

    return read


Mutators = list[Callable[[bytes, random.Random], bytes]]
READERS: dict[str, tuple[Callable[[Path], Reader], Mutators]] = {
    "config": (_config, [mutate_bytes, mutate_toml]),
    "laplace": (_laplace, [mutate_bytes, mutate_safetensors]),
    "nuts": (_nuts, [mutate_bytes, mutate_safetensors]),
    "chain": (_chain, [mutate_bytes, mutate_safetensors]),
    "backbone": (_backbone, [mutate_bytes, mutate_safetensors]),
    "weights": (_weights, [mutate_bytes, mutate_safetensors]),
    "training": (_training, [mutate_bytes, mutate_safetensors]),
    "run": (_run_json, [mutate_bytes, mutate_json]),
    "stages": (_stages_json, [mutate_bytes, mutate_json]),
    "comparison": (_comparison_json, [mutate_bytes, mutate_json]),
    "netcdf": (_netcdf, [mutate_bytes, mutate_netcdf]),
}

IN_C = ["netcdf"]  # readers that a C library could crash: always in a process of their own

# --- the loop -------------------------------------------------------------------------------------------------------


class _Hang(BaseException):
    """A reader took longer than HANG_SECONDS."""


def _hang(*_: object) -> None:
    raise _Hang


def work(name: str, seed: int, first: int, rounds: int, seconds: float, keep: Path | None, journal: Path) -> int:
    """Fuzz one reader in this process from round ``first`` on; the journal always names the round that is running."""
    from bayescam.errors import BayescamError

    begun, outcomes = time.monotonic(), Counter()
    signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory() as temporary:
        seeds = Path(temporary) / "seeds"
        seeds.mkdir()
        prepare, mutators = READERS[name]
        read = prepare(seeds)
        files = sorted(seeds.iterdir())
        contents = [(file, file.read_bytes()) for file in files]
        for file in files:
            read(file)
        for number in range(first, rounds):
            if time.monotonic() - begun > seconds:
                break
            rng = random.Random(f"{name} {seed} {number}")
            file, content = rng.choice(contents)
            changed = rng.choice(mutators)(content, rng)
            journal.write_text(str(number))
            case = Path(temporary) / f"case{file.suffix}"
            case.write_bytes(changed)
            signal.alarm(HANG_SECONDS)
            try:
                read(case)
                outcomes["answered"] += 1
            except BayescamError as error:
                outcomes["refused"] += 1
                if "\n" in str(error):
                    outcomes["BUG"] += 1
                    print(f"{name} round {number}: an error of several lines: {str(error)!r}", flush=True)
            except (Exception, _Hang) as error:
                outcomes["BUG"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{where.filename}:{where.lineno}"
                print(f"{name} round {number}: {type(error).__name__}: {str(error)[:150]!r} at {place}", flush=True)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{name}-{seed}-{number}{file.suffix}").write_bytes(changed)
            finally:
                signal.alarm(0)
    print(f"{name}: " + (", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())) or "nothing run"))
    return outcomes["BUG"]


def supervise(name: str, arguments: argparse.Namespace) -> int:
    """Run ``work`` in a process of its own; when that is killed, count it and go on with the next round."""
    bugs, first = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        journal = Path(temporary) / "journal"
        while True:
            command = [sys.executable, __file__, "--reader", name, "--work", str(journal), "--first", str(first)]
            for option in ("seed", "rounds", "seconds", "keep"):
                value = getattr(arguments, option)
                command += [f"--{option}", str(value)] if value is not None else []
            status = subprocess.run(command, check=False).returncode
            if status >= 0:
                return bugs + status
            bugs += 1
            first = int(journal.read_text()) + 1
            print(f"{name} round {first - 1}: the process died by signal {-status}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", nargs="*", choices=READERS, default=list(READERS))
    parser.add_argument("--rounds", type=int, default=10**9, help="of each reader")
    parser.add_argument("--seconds", type=float, default=600, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that broke a reader")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.work is not None:
        name, rounds = parsed.reader[0], parsed.rounds
        return min(100, work(name, parsed.seed, parsed.first, rounds, parsed.seconds, parsed.keep, parsed.work))
    return int(sum([supervise(name, parsed) for name in parsed.reader]) > 0)


if __name__ == "__main__":
    sys.exit(main())
