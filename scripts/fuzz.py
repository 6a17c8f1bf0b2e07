"""Can a file make a reader crash? Seeded mutation fuzz: whatever the bytes, it answers or raises bayescam's own error.

    python scripts/fuzz.py --rounds 200                 what tests/robustness/test_fuzz.py runs
    python scripts/fuzz.py --seconds 3600 --seed 7      the longer one
    python scripts/fuzz.py --reader netcdf --out bad    one reader; bad/ keeps its report and the files that broke it

Valid files are made first; then their bits, bytes, chunks, JSON nodes, TOML values and safetensors headers are changed.
Each reader runs in a process of its own, so that a crash of a C library is a finding and not the end. Exit status 1
when anything but an answer or a ``BayescamError`` came out.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from _printed import kept
from fuzzing import data_files, own_files
from fuzzing.mutators import (
    Mutator,
    mutate_bytes,
    mutate_gzip,
    mutate_json,
    mutate_lines,
    mutate_netcdf,
    mutate_npy,
    mutate_png,
    mutate_safetensors,
    mutate_toml,
    mutate_zip,
)

HANG_SECONDS = 30  # of work; asleep, ten times as long: a machine that is busy elsewhere is no hang

Prepare = Callable[[Path], Callable[[Path], object]]
READERS: dict[str, tuple[Prepare, list[Mutator]]] = {
    "image": (data_files.image, [mutate_bytes, mutate_png]),
    "dicom": (data_files.dicom, [mutate_bytes]),
    "manifest": (data_files.manifest, [mutate_bytes, mutate_lines]),
    "fracatlas": (data_files.fracatlas, [mutate_bytes, mutate_lines]),
    "folder": (data_files.folder_layout, [mutate_bytes, mutate_lines]),
    "mednist": (data_files.mednist_layout, [mutate_bytes, mutate_lines]),
    "mura": (data_files.mura_layout, [mutate_bytes, mutate_lines]),
    "archive": (data_files.archive, [mutate_bytes, mutate_gzip, mutate_zip]),
    "features": (data_files.features, [mutate_bytes, mutate_zip]),
    "features_csv": (data_files.features_csv, [mutate_bytes, mutate_lines]),
    "pixels": (data_files.pixels, [mutate_bytes, mutate_npy]),
    "config": (own_files.config, [mutate_bytes, mutate_toml]),
    "laplace": (own_files.laplace, [mutate_bytes, mutate_safetensors]),
    "nuts": (own_files.nuts, [mutate_bytes, mutate_safetensors]),
    "chain": (own_files.chain, [mutate_bytes, mutate_safetensors]),
    "backbone": (own_files.backbone, [mutate_bytes, mutate_safetensors]),
    "weights": (own_files.weights, [mutate_bytes, mutate_safetensors]),
    "training": (own_files.training, [mutate_bytes, mutate_safetensors]),
    "run": (own_files.run_json, [mutate_bytes, mutate_json]),
    "stages": (own_files.stages_json, [mutate_bytes, mutate_json]),
    "settings": (own_files.settings_json, [mutate_bytes, mutate_json]),
    "comparison": (own_files.comparison_json, [mutate_bytes, mutate_json]),
    "netcdf": (own_files.netcdf, [mutate_bytes, mutate_netcdf]),
}

IN_C = ["netcdf"]  # readers that a C library could crash: always in a process of their own

# --- the loop -------------------------------------------------------------------------------------------------------


class _Hang(BaseException):
    """A reader worked longer than HANG_SECONDS, or slept ten times as long."""


def _hang(*_: object) -> None:
    raise _Hang


def work(name: str, seed: int, first: int, rounds: int, seconds: float, keep: Path | None, journal: Path) -> int:
    """Fuzz one reader in this process from round ``first`` on; the journal always names the round that is running."""
    from bayescam.errors import BayescamError

    outcomes: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    with tempfile.TemporaryDirectory() as temporary:
        seeds = Path(temporary) / "seeds"
        seeds.mkdir()
        prepare, mutators = READERS[name]
        read = prepare(seeds)
        files = sorted(seeds.iterdir())
        contents = [(file, file.read_bytes()) for file in files]
        for file in files:
            read(file)
        begun = time.monotonic()
        for number in range(first, rounds):
            if time.monotonic() - begun > seconds:
                break
            rng = random.Random(f"{name} {seed} {number}")
            file, content = rng.choice(contents)
            changed = rng.choice(mutators)(content, rng)
            journal.write_text(str(number))
            case = Path(temporary) / f"case{file.suffix}"
            case.write_bytes(changed)
            signal.alarm(10 * HANG_SECONDS)
            signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
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
                signal.setitimer(signal.ITIMER_PROF, 0)
    print(f"{name}: " + (", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())) or "nothing run"))
    return outcomes["BUG"]


def supervise(name: str, arguments: argparse.Namespace) -> int:
    """Run ``work`` in a process of its own; when that is killed, count it and go on with the next round."""
    bugs, first = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        journal = Path(temporary) / "journal"
        while True:
            command = [sys.executable, __file__, "--reader", name, "--work", str(journal), "--first", str(first)]
            for option in ("seed", "rounds", "seconds"):
                command += [f"--{option}", str(getattr(arguments, option))]
            command += ["--out", str(arguments.keep)] if arguments.keep is not None else []
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
                for line in running.stdout:
                    print(line, end="", flush=True)
            status = running.returncode
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
    parser.add_argument(
        "--out", type=Path, dest="keep", help="folder for what is printed and for the files that broke a reader"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.work is not None:
        name, rounds = parsed.reader[0], parsed.rounds
        return min(100, work(name, parsed.seed, parsed.first, rounds, parsed.seconds, parsed.keep, parsed.work))
    with kept(parsed.keep, "fuzz.txt"):
        bugs = sum([supervise(name, parsed) for name in parsed.reader])
    return int(bugs > 0)


if __name__ == "__main__":
    sys.exit(main())
