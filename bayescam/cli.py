"""The command line: thin. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bayescam import __version__
from bayescam.errors import BayescamError, RankError, UsageError
from bayescam.storage import printable

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _wait_briefly()
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return WRONG_USAGE
    try:
        _check_working_directory()
        if os.environ.get("WORLD_SIZE", "1") != "1" and parsed.command != "run":
            return _not_shared(parsed)
        return parsed.handler(parsed)
    except KeyboardInterrupt as interrupt:
        how_far = str(interrupt) or "interrupted"
        return _say_and(INTERRUPTED, parsed, f"{how_far}; what was finished is kept (see --resume)")
    except UsageError as error:
        return _say_and(WRONG_USAGE, parsed, str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except RankError as error:
        return FAILED if error.told else _say_and(FAILED, parsed, str(error))
    except BayescamError as error:
        return _say_and(FAILED, parsed, str(error))
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        words = _in_words(error)
        if words is None:
            raise
        return _say_and(FAILED, parsed, words)


def _wait_briefly() -> None:
    """Let threads that wait for one another give back their core after some 10,000 looks, before torch starts them.

    GNU's OpenMP looks 300,000 times. Where others work on the same cores the thread waited for then gets none, and
    small products take many times as long. What the user has set holds.

    Source: GOMP_SPINCOUNT in the manual of GNU libgomp.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _check_working_directory() -> None:
    """MKL, which torch loads, ends the process where the working directory is gone."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(f"the working directory is gone ({error.strerror}); cd to another one") from error


def _say_and(status: int, parsed: argparse.Namespace, message: str) -> int:
    if parsed.debug:
        traceback.print_exc()
    print(f"bayescam: {_own_name()}{printable(' '.join(message.split()), 2000)}", file=sys.stderr)
    return status


def _not_shared(parsed: argparse.Namespace) -> int:
    """Rank 0 refuses what ranks would all do over again."""
    if os.environ.get("RANK", "0") != "0":
        return WRONG_USAGE
    message = f"{parsed.command} is for one process, and torchrun started several; it shares out `run` alone"
    return _say_and(WRONG_USAGE, parsed, message)


def _own_name() -> str:
    """ "rank 3: " before what one of several processes says."""
    return f"rank {os.environ.get('RANK', '?')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


_WAYS = {
    errno.ENOSPC: "make room, then go on (a run: --resume)",
    errno.EDQUOT: "make room, then go on (a run: --resume)",
    errno.EFBIG: "raise the limit on file sizes, then go on (a run: --resume)",
    errno.EACCES: "get the right to it, or name another place",
    errno.EPERM: "get the right to it, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOMEM: "free memory or give smaller numbers",
}


def _in_words(error: Exception) -> str | None:
    """What went wrong and the next step; None for an error in the program itself."""
    if isinstance(error, OSError):
        if error.errno is None or error.strerror is None:
            return str(error)
        name = error.filename2 or error.filename  # of a renaming, the name it was to have
        where = "" if name is None else f"{os.fsdecode(name)}: "
        return f"{where}{error.strerror}; {_WAYS.get(error.errno, 'name another place')}"
    if isinstance(error, ValueError):
        return f"{error} (--debug shows where)"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "alloc" in str(error):
        return f"not enough memory ({error}); free some, or take fewer or smaller images (--limit, data.image_size)"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bayescam",
        description="Which body part an X-ray shows, how sure the network is, and how sure it is of where it looked.",
        epilog="Begin with: bayescam run",
    )
    parser.add_argument("--version", action="version", version=f"bayescam {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_run(commands)
    _add_predict(commands)
    _add_explain(commands)
    from bayescam.data.commands import add_parser as add_data
    from bayescam.features_run import add_parser as add_posterior

    add_posterior(commands)
    _add_diagnose(commands)
    add_data(commands)
    _add_report(commands)
    _add_doctor(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="train, freeze, fit the posterior, check it by NUTS, explain, report",
        description="The whole way from a folder of radiographs to a report with a verdict.",
    )
    parser.add_argument(
        "--data", help="phantom (the default), mednist, mura, a folder of class folders, a manifest.csv"
    )
    parser.add_argument("--root", help="where mednist or mura lies")
    parser.add_argument("--out", type=Path, help="the run folder (default: runs/<data>-<date>-<time>)")
    parser.add_argument("--preset", choices=("quick", "standard", "thorough"), help="how much work (default: standard)")
    parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument(
        "--seeds", type=int, metavar="R", help="train R more networks and report how far they differ (default: 0)"
    )
    parser.add_argument("--device", help="auto (the default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--backbone", help="small (the default), study, or a torchvision name such as resnet18")
    parser.add_argument("--weights", help="torchvision weights name, or a .safetensors file to start from")
    parser.add_argument("--limit", type=int, help="at most so many images, whole patients at a time")
    parser.add_argument(
        "--on-bad", choices=("raise", "skip"), help="what to do with unreadable images (default: raise)"
    )
    parser.add_argument("--num-workers", type=int, help="images read side by side (default: one a core)")
    parser.add_argument(
        "--show-patients",
        action="store_true",
        default=None,
        help="write patient ids into the run's files as they are, not as pseudonyms",
    )
    parser.add_argument("--config", type=Path, help="a TOML file of settings, such as a run's config.toml")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.set_defaults(handler=_run)


def _run(parsed: argparse.Namespace) -> int:
    from bayescam.pipeline import default_out, run

    overrides = {
        "data.spec": parsed.data,
        "data.root": parsed.root,
        "preset": parsed.preset,
        "seed": parsed.seed,
        "seeds": parsed.seeds,
        "device": parsed.device,
        "backbone.name": parsed.backbone,
        "backbone.weights": parsed.weights,
        "data.limit": parsed.limit,
        "data.on_bad": parsed.on_bad,
        "data.num_workers": parsed.num_workers,
        "data.show_patients": parsed.show_patients,
    }
    if parsed.resume and parsed.overwrite:
        raise UsageError("--resume and --overwrite exclude each other: say one")
    if parsed.resume and parsed.out is None:
        raise UsageError("--resume needs --out: name the folder of the interrupted run")
    out = parsed.out or default_out(parsed.data or "phantom")
    said = run(out, parsed.config, overrides, resume=parsed.resume, overwrite=parsed.overwrite)
    if said:
        print(said)
    return DONE


def _add_predict(commands: Any) -> None:
    parser = commands.add_parser("predict", help="class probabilities of new images, with credible intervals")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="radiographs: PNG, JPEG, TIFF, BMP or DICOM")
    parser.add_argument("--run", type=Path, required=True, help="a complete run folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, ...")
    parser.set_defaults(handler=_predict)


def _predict(parsed: argparse.Namespace) -> int:
    import json

    from bayescam.apply import load_run, predict_images, prediction_table

    predictions = predict_images(load_run(parsed.run, device=parsed.device), parsed.images)
    if parsed.json:
        print(json.dumps([p.to_dict() for p in predictions], indent=1))
    else:
        print(prediction_table(predictions))
    return DONE


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser("explain", help="where the network looked in new images, and how sure that is")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="radiographs: PNG, JPEG, TIFF, BMP or DICOM")
    parser.add_argument("--run", type=Path, required=True, help="a complete run folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--label", help="the class to explain (default: each image's most probable one)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures of an earlier call")
    parser.set_defaults(handler=_explain)


def _explain(parsed: argparse.Namespace) -> int:
    from bayescam.apply import explain_images, load_run

    loaded = load_run(parsed.run, device=parsed.device)
    for line in explain_images(loaded, parsed.images, parsed.out, label=parsed.label, overwrite=parsed.overwrite):
        print(line)
    return DONE


def _add_diagnose(commands: Any) -> None:
    parser = commands.add_parser(
        "diagnose",
        help="convergence of a run's NUTS and quality of its Gaussians, pass or fail",
        description="Check the posteriors of a run, each number against its threshold, and say whether NUTS and the "
        "posterior that the verdict recommends pass. Exits 0 whatever it finds, unless --strict.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 where NUTS or the recommended posterior fails a check"
    )
    parser.set_defaults(handler=_diagnose)


def _diagnose(parsed: argparse.Namespace) -> int:
    import json

    from bayescam.diagnose.diagnosis import diagnose_run
    from bayescam.runfolder import sealed

    if (parsed.run / "run.json").is_file():
        sealed(parsed.run)
    diagnosis = diagnose_run(parsed.run)
    print(json.dumps(diagnosis.to_dict(), indent=1) if parsed.json else diagnosis.text())
    if parsed.strict and not diagnosis.sound:
        raise BayescamError(f"{parsed.run}: not sound (--strict). {diagnosis.summary()}")
    return DONE


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="draw figures/ and write report.html and MODEL_CARD.md of a run again")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.set_defaults(handler=_report)


def _report(parsed: argparse.Namespace) -> int:
    from bayescam.pipeline import report_again

    for path in report_again(parsed.run):
        print(f"wrote {path}")
    return DONE


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="versions, device, and whether the pieces fit together")
    parser.set_defaults(handler=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    from bayescam.doctor import examine

    checks = examine()
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.words}")
    return DONE if all(check.passed for check in checks) else FAILED
