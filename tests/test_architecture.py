"""The order of the folders, and what no file of the package may do, read off the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bayescam"
ORDER = ["data", "backbone", "posterior", "explain", "diagnose", "report"]
FOUNDATION = {"errors", "storage", "parallel", "notebook"}
TOP = {"pipeline", "runfolder", "config", "cli", "doctor", "apply", "features_run", "stages", "__init__", "__main__"}
AT_HOME = {"pyro": {"posterior"}, "matplotlib": {"report"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_folder_imports_only_from_those_above_it(path):
    room = _room(path)
    assert room in {*ORDER, *FOUNDATION, *TOP}, f"{path} is in no known room"
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "bayescam" or len(parts) < 2 or room in TOP or parts[1] == "__version__":
            continue
        if room in FOUNDATION:
            assert parts[1] in FOUNDATION, f"{path} imports {name}"
        else:
            allowed = {*ORDER[: ORDER.index(room) + 1], *FOUNDATION}
            assert parts[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_in_their_room(path):
    for name in _imports(path):
        library = name.split(".")[0]
        if library in AT_HOME:
            assert _room(path) in AT_HOME[library], f"{path} imports {name}"
        if library.startswith("arviz"):
            assert path == PACKAGE / "diagnose/arviz_compat.py", f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_code_runs_from_a_file(path):
    forbidden_imports = {"pickle", "dill", "shelve", "marshal", "yaml", "joblib"}
    for name in _imports(path):
        assert name.split(".")[0] not in forbidden_imports, f"{path} imports {name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "torch.load", "torch.save", "os.system", "os.popen"}, f"{path}: {called}"
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            assert not (keyword.arg in {"shell", "allow_pickle"} and value is True), f"{path}: {called}"
            assert not (keyword.arg == "weights_only" and value is False), f"{path}: {called}"
