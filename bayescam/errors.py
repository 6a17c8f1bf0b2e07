"""The errors that mean 'the world is not as asked': the command line prints them as one line and exits 1."""

from __future__ import annotations


class BayescamError(Exception):
    """Something outside the program is wrong; the message names the thing and the next step."""


class UsageError(BayescamError):
    """The command line or a configuration asks for something impossible (exit status 2)."""


class NotPositiveDefiniteError(BayescamError, ArithmeticError):
    """A curvature matrix has a direction in which the posterior does not fall off."""


class ConvergenceError(BayescamError, ArithmeticError):
    """An optimisation stopped away from its optimum; the message has the number that is too large."""


class FileFormatError(BayescamError, ValueError):
    """A file is absent, broken, foreign or of another kind; the message names it."""


class RankError(BayescamError, RuntimeError):
    """Another rank of a process group died, failed or disagrees.

    Args:
        told: whether another rank has already said why.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told
