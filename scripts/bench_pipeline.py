"""How long does each stage of `bayescam run` take, and how much memory? Prints one table a preset.

    python scripts/bench_pipeline.py --preset quick standard

Takes about the time of the runs themselves: a minute for quick, several for standard on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _printed import kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["quick", "standard"])
    parser.add_argument("--data", default="phantom")
    parser.add_argument("--config", type=Path, help="settings over the preset's, as TOML")
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    parser.add_argument("--out", type=Path, help="folder for the runs and a file of what is printed")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, kept(parsed.out, "bench_pipeline.md"):
        for preset in parsed.preset:
            out = (parsed.out or Path(scratch)) / preset
            command = [sys.executable, "-m", "bayescam", "run", "--data", parsed.data, "--preset", preset]
            command += ["--seed", str(parsed.seed)]
            settings = ["--config", str(parsed.config)] if parsed.config else []
            begun = time.perf_counter()
            subprocess.run([*command, *settings, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
            print_table(preset, json.loads((out / "timings.json").read_text()), time.perf_counter() - begun)


def print_table(preset: str, timings: dict, total: float) -> None:
    print(
        f"\npreset {preset}: {total:.1f} s in all, imports included\n\n| stage | s | peak so far, MiB |\n|---|---|---|"
    )
    for stage, row in timings["stages"].items():
        print(f"| {stage} | {row['seconds']:.1f} | {row['peak_memory_mib']:.0f} |")


if __name__ == "__main__":
    main()
