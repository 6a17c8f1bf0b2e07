"""The README's library example runs as it stands, and its commands are the ones CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_library_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^(laplace|refine|nuts) - ", printed)
    assert "P(upper half outranks lower half): tensor(" in printed


def test_ci_does_what_the_readme_says():
    ci = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    assert '.venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest -m ""' in README
    assert 'pip install --quiet -e ".[test]"' in ci
    assert '.venv/bin/python -m pytest -m ""' in ci


def test_every_local_link_and_picture_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (REPOSITORY / target).exists(), target
