"""One chain in a process of its own: ``python -m bayescam.posterior.nuts_worker PROBLEM FOLDER INDEX``."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from bayescam.posterior.nuts_chain import sample_chain
from bayescam.posterior.nuts_kernel import Transition
from bayescam.posterior.nuts_problem import load_problem
from bayescam.posterior.nuts_run import chain_path


def main(arguments: list[str]) -> None:
    """Sample the chain, a JSON line on stdout for each transition, and leave it in the folder.

    Its caller stops it by SIGINT, which a process started in the background would else ignore.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target, folder, index = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    problem, settings, mark = load_problem(target)

    def report(draw: int, warming: bool, transition: Transition) -> None:
        sys.stdout.write(json.dumps([draw, warming, *transition]) + "\n")
        sys.stdout.flush()

    chain = sample_chain(problem.potential(), settings, index, advance=report)
    if len(chain.theta):
        chain.save(chain_path(folder, index), mark)


if __name__ == "__main__":
    main(sys.argv[1:])
