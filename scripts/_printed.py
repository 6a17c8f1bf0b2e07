"""What a script prints, kept in a file as well."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from bayescam.storage import write_text


class _Both(io.TextIOBase):
    """Writes to the terminal and remembers."""

    def __init__(self) -> None:
        self.terminal, self.text = sys.stdout, io.StringIO()

    def write(self, words: str) -> int:
        self.text.write(words)
        return self.terminal.write(words)

    def flush(self) -> None:
        self.terminal.flush()


@contextmanager
def kept(folder: Path | None, name: str) -> Iterator[None]:
    """Print as always and, where a folder is named, leave the same text in its file ``name``."""
    if folder is None:
        yield
        return
    both = _Both()
    with redirect_stdout(both):
        yield
    write_text(folder / name, both.text.getvalue())
