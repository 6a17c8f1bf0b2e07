"""The stages of a run, in order. Each stage writes files; the next reads them, so a resumed run is the straight run."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayescam import __version__
from bayescam.config import read_config
from bayescam.parallel import from_first, joined, rank
from bayescam.runfolder import AlreadyComplete, RunFolder, of_images, opened, sealed
from bayescam.stages.fitting import features, laplace, nuts, train
from bayescam.stages.judging import arviz, compare, predict
from bayescam.stages.reading import read
from bayescam.stages.retraining import retrain
from bayescam.stages.showing import cams, pictures
from bayescam.stages.state import RunState
from bayescam.storage import read_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The stages on which all ranks work; what comes after them is small, and rank 0's alone.
_SHARED = (read, train, features, laplace, nuts)


def default_out(spec: str) -> Path:
    """``runs/<data>-<date>-<time>``."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(spec).stem)[:40].strip("-.") or "data"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def run(
    out: Path,
    config_file: Path | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> str:
    """All stages from radiographs to report in the folder ``out``; returns what to tell the user.

    Under ``torchrun`` every rank calls this: rank 0 leads and alone writes, the others work beside it through the heavy
    stages and read what it wrote, so the folder must be on a disk that all of them see; they return "".

    Raises:
        UsageError: a setting or the folder is not usable; nothing was begun.
        BayescamError: a stage cannot be done; what was finished stays and ``resume`` goes on from it.
    """
    with joined() as group:
        if rank(group) > 0:
            _follow(group)
            return ""
        try:
            with opened(out, config_file, overrides or {}, resume=resume, overwrite=overwrite) as (folder, config):
                from_first(str(out.absolute()), group)
                state = RunState(folder, config, group)
                for stage in _SHARED:
                    stage(state)
                state.group = None
                for stage in (predict, compare, cams, arviz, retrain, pictures):
                    stage(state)
                folder.complete({"bayescam": __version__, "seed": config.seed, "preset": config.preset})
                return _farewell(out)
        except AlreadyComplete:
            from_first(None, group)
            return f"{out}: this run is complete; nothing to do"


def _follow(group: ProcessGroup | None) -> None:
    """What every rank but the first does of a run."""
    out = from_first(None, group)
    if out is not None:
        state = RunState(RunFolder(Path(out)), read_config(Path(out) / "config.toml", {}), group)
        for stage in _SHARED:
            stage(state)


def report_again(path: Path) -> list[Path]:
    """Draw the figures and write the report and the model card of a complete run anew; ``run.json`` follows."""
    from bayescam.report.pages import write_pages

    sealed(of_images(path))
    facts = read_json(path / "run.json")
    written = write_pages(path)
    RunFolder(path).complete({key: facts.get(key) for key in ("bayescam", "seed", "preset")})
    return written


def _farewell(out: Path) -> str:
    comparison = read_json(out / "comparison.json")
    table = (out / "table.md").read_text(encoding="utf-8")
    return f"{table}\nVerdict: {comparison['verdict']}. {comparison['words']}\nwrote {out} (open {out / 'report.html'})"
