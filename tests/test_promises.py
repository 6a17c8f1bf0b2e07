"""``docs/promises.md`` names the tests that keep each promise: they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (ROOT / "docs/promises.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]


def _defined(file: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_all_ten_are_there():
    assert {int(number) for number, _, _ in ROWS} == set(range(1, 11))


@pytest.mark.parametrize(("number", "words", "tests"), ROWS, ids=[f"{row[0]}-{n}" for n, row in enumerate(ROWS)])
def test_each_promise_is_kept_by_tests_that_exist(number, words, tests):
    assert words.startswith("**")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named
    assert len(named) == tests.count("::")
    for file, name in named:
        assert name in _defined(file), f"promise {number}: {file} has no {name}"


def test_the_one_of_the_gpu_is_marked():
    test = _defined("tests/robustness/test_same_answer.py")["test_the_gpu_agrees_with_the_cpu"]
    assert "pytest.mark.gpu" in [ast.unparse(decorator) for decorator in test.decorator_list]
