"""Images in worker processes: what holds the interpreter's lock leaves threads nothing to gain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bayescam.data.image import ImageError
from bayescam.data.pixels import Geometry
from bayescam.errors import BayescamError


class WorkerError(BayescamError, RuntimeError):
    """A process that read or drew images died."""


def draw_in_processes(
    recipe: dict[str, Any], images: Sequence[str], size: int, target: Path, num_workers: int, description: str | None
) -> list[Geometry]:
    """Read or draw every image into its row of ``target``, an .npy of (N, S, S) uint16; the geometries in order.

    Each worker is a fresh interpreter that imports bayescam alone: no fork, no pickle, no __main__ guard. Row i is
    made by worker i modulo ``num_workers``; its pixels depend on neither.

    Args:
        recipe: what ``Source.recipe`` gave.
        images: N paths of files, or obs_ids of a simulator's records.
        size: S.
        target: the file, made before.
        num_workers: processes.
        description: of the bar, None for no bar.

    Raises:
        ImageError: an image that cannot be read.
        WorkerError: a worker ended early; the message has its last words.
    """
    with (
        tqdm(total=len(images), desc=description, unit="image", disable=None if description else True) as bar,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        work = _Work([None] * len(images), bar)
        jobs = []
        try:
            for first in range(num_workers):
                rows = list(range(first, len(images), num_workers))
                told = {"recipe": recipe, "rows": rows, "images": [images[i] for i in rows], "size": size}
                jobs.append(pool.submit(_watch, work, {**told, "target": str(target)}))
            failures = [words for job in jobs if (words := job.result()) is not None]
        except BaseException:
            work.stopping.set()
            for process in work.running:
                process.kill()
            raise
    if failures:
        raise WorkerError(f"a process that makes images ended early ({failures[0]}); --num-workers 1 does without any")
    return [geometry for geometry in work.geometries if geometry is not None]


@dataclass(eq=False)
class _Work:
    """What the threads share that each watch one worker."""

    geometries: list[Geometry | None]
    bar: tqdm
    running: list[subprocess.Popen[str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)


def _watch(work: _Work, job: dict[str, Any]) -> str | None:
    """Give one worker its job and take its geometries; its last words if it ended early."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as order, tempfile.TemporaryFile("w+") as said:
        json.dump(job, order)
        order.seek(0)
        if work.stopping.is_set():
            return None
        with _start(order, said) as process:
            work.running.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if isinstance(told, dict):
                    raise ImageError(told["path"], told["reason"])
                row, *numbers = told
                work.geometries[row] = Geometry(*numbers)
                with work.lock:
                    work.bar.update()
        if process.returncode == 0:
            return None
        said.seek(0)
        words = said.read().strip().splitlines()
        return words[-1] if words else f"status {process.returncode}; perhaps killed for memory"


def _start(order: Any, said: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "bayescam.data.draw_worker"],
        stdin=order,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path},
    )
