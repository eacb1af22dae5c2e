"""Rules of the house that a reader relies on: imports go one way, packaging is complete, loading needs no compiler."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each folder may import those before it; runtime stands apart and imports the errors and the number formats only.
ORDER = ("errors", "config", "formats", "ir", "cost", "passes", "codegen", "compiler")
EXTRA = {"codegen": {"runtime"}, "compiler": {"runtime"}}
APART = {"passes": {"codegen"}, "codegen": {"passes"}}  # neither knows of the other
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def allowed(folder: str) -> set[str]:
    if folder == "runtime":
        return {"errors", "formats", "runtime"}
    if folder == "formats":
        return {"errors", "formats"}
    before = set(ORDER[: ORDER.index(folder) + 1])
    return (before | EXTRA.get(folder, set())) - APART.get(folder, set())


def imported(path: Path) -> set[str]:
    """Top folders of plait that a module imports, relative imports resolved, also inside functions."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            target = (*base, *(node.module or "").split(".")) if node.module else base
            names = [(*target, a.name) for a in node.names] if not target or not target[0] else [target]
            found |= {n[0] for n in names if n and n[0] and n[0] != "__version__"}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {n.split(".")[1] for n in names if n.startswith("plait.")}
    return found


@pytest.mark.parametrize("folder", [*ORDER[2:], "runtime"])
def test_imports_go_one_way(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported(path) - allowed(folder))
        for path in (ROOT / folder).rglob("*.py")
        if imported(path) - allowed(folder)
    }
    assert wrong == {}


def test_errors_and_config_stand_alone() -> None:
    assert imported(ROOT / "errors.py") == set()
    assert imported(ROOT / "config.py") == {"errors"}


def test_the_rule_notices_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "ir").mkdir()
    wrong = tmp_path / "ir" / "wrong.py"
    wrong.write_text(
        "def f():\n    from ..passes.base import Pass\n    from .. import codegen\n    from .graph import Graph\n"
    )
    assert imported(wrong) == {"passes", "codegen", "ir"}


def test_every_package_is_listed() -> None:
    folders = {p.parent for top in (*ORDER[2:], "runtime") for p in (ROOT / top).rglob("__init__.py")}
    expected = {"plait", *("plait." + ".".join(p.relative_to(ROOT).parts) for p in folders)}
    assert set(PACKAGES["packages"]) == expected


def test_every_data_file_is_listed() -> None:
    missing: list[str] = []
    for package in PACKAGES["packages"]:
        folder = ROOT.joinpath(*package.split(".")[1:])
        patterns = PACKAGES["package-data"].get(package, [])
        for path in folder.iterdir() if folder != ROOT else []:
            if (
                path.is_file()
                and path.suffix not in (".py", ".pyc", ".so")
                and not any(fnmatch.fnmatch(path.name, p) for p in patterns)
            ):
                missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_loading_does_not_import_the_compiler() -> None:
    code = (
        "import sys, plait; plait.load\n"
        "light = 'errors', 'formats', 'runtime'\n"
        "print([m for m in sys.modules if m.startswith('plait.') and m.split('.')[1] not in light])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.stdout.strip() == "[]", run.stderr
