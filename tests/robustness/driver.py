"""Runs the command line many times, each in a forked child that can be struck at any write or any moment.

As a script it is the server: it imports everything once, then forks a child for each case, a line of JSON.
``Driver`` is the client, for the tests.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CASE: dict[str, Any] = {}
BLANK = b"\x89PNG\r\n\x1a\n"
IMPORTED = (
    "arviz h5netcdf matplotlib.figure matplotlib.backends.backend_agg contourpy PIL.PngImagePlugin tomli_w torchvision "
    "bayescam.apply bayescam.cli bayescam.pipeline bayescam.data.folder bayescam.data.manifest bayescam.data.mura "
    "bayescam.data.commands bayescam.diagnose.compare bayescam.diagnose.inference_data bayescam.explain.cam "
    "bayescam.features_run bayescam.posterior.nuts bayescam.report.figures bayescam.report.html "
    "bayescam.report.model_card"
).split()
WRITES = 0


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit status (minus the signal, if one killed it), what it said, and how often it wrote."""

    status: int
    out: str
    err: str
    writes: int


class Driver:
    """A server process; ``run`` gives it one case and waits for the outcome."""

    def __init__(self, scratch: Path, *, prefix: tuple[str, ...] = ()) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self._scratch = scratch
        self._server = subprocess.Popen(
            [*prefix, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=scratch,
            env=environment,
            text=True,
        )

    def run(self, *arguments: str | Path, **case: Any) -> Outcome:
        """Run ``bayescam ARGUMENTS``.

        Args:
            arguments: of the command line.
            case: ``write`` (number, from 1), ``when`` ("before", "written", "after") and ``action`` ("kill", "full",
                "remove") strike at a write; ``seconds`` kills after so long; ``remove`` names the folder to remove;
                ``cache`` is the cache folder, ``limit`` the largest file in bytes.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        case = {key: str(value) if isinstance(value, Path) else value for key, value in case.items()}
        arguments = [os.fsencode(argument).decode("utf-8", "surrogateescape") for argument in arguments]
        order = {"arguments": arguments, "scratch": str(self._scratch), **case}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))

    def sketch(self, *arguments: str | Path, **case: Any) -> Outcome:
        """``run`` with blank figures, which take half the time of a tiny run."""
        return self.run(*arguments, sketch=True, **case)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        assert self._server.stdout is not None
        self._server.stdout.close()


def _strike(path: Path, when: str) -> None:
    if CASE.get("write") != WRITES or CASE["when"] != when:
        return
    if CASE["action"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif CASE["action"] == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    else:
        shutil.rmtree(CASE["remove"])


def _watched(atomic_path: Any) -> Any:
    @contextlib.contextmanager
    def watched(path: Path) -> Iterator[Path]:
        global WRITES
        WRITES += 1
        _strike(path, "before")
        with atomic_path(path) as temporary:
            yield temporary
            _strike(path, "written")
        _strike(path, "after")

    return watched


def _child(case: dict[str, Any], folder: Path) -> None:
    """Run the command line with its output in files; never returns."""
    for name, descriptor in (("out", 1), ("err", 2)):
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, descriptor)
    CASE.update(case)
    if "cache" in case:
        os.environ["BAYESCAM_CACHE"] = case["cache"]
    if "limit" in case:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], resource.RLIM_INFINITY))
    if "sketch" in case:
        from matplotlib.figure import Figure

        Figure.savefig = lambda self, file, **options: Path(file).write_bytes(BLANK)
    from bayescam.cli import main

    status = 99
    try:
        status = main(case["arguments"])
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            (folder / "writes").write_text(str(WRITES))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(case: dict[str, Any]) -> dict[str, Any]:
    folder = Path(case["scratch"])
    (folder / "writes").write_text("-1")
    child = os.fork()
    if child == 0:
        _child(case, folder)
    if "seconds" in case:
        time.sleep(case["seconds"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = {name: (folder / name).read_bytes().decode("utf-8", "backslashreplace") for name in ("out", "err")}
    return {"status": os.waitstatus_to_exitcode(status), "writes": int((folder / "writes").read_text()), **said}


def serve() -> None:
    """Import all that a run imports, then answer cases until the input ends."""
    import torch

    torch.set_num_threads(1)
    from bayescam import storage

    storage.atomic_path = _watched(storage.atomic_path)
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
