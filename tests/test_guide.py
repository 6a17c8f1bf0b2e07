"""The guide's blocks run one after another as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parent.parent / "docs/guide.md"


@pytest.mark.slow
def test_every_block_of_the_guide_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "guide.md", "exec"), scope)
    assert scope["comparison"].verdict in ("laplace", "refine", "nuts", "undecided")
    assert "r_hat" in capsys.readouterr().out
