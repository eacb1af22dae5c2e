"""The catalogue of errors: every entry is complete, unique, documented, and raised by some test."""

from __future__ import annotations

import ast
import inspect
import re
import string
from pathlib import Path

import pytest
from plait.errors import PlaitError, catalogue

ROOT = Path(__file__).parent.parent
CLASSES = catalogue()


def names(template: str) -> set[str]:
    """Fields of a format string."""
    return {re.split(r"[.\[]", field)[0] for _, field, _, _ in string.Formatter().parse(template) if field}


def exceptions_under_test(tree: ast.AST) -> set[str]:
    """Names inside the arguments of `raises(...)` and of `parametrize(...)`, which feeds it, and codes such as "P0701",
    which tests of the command line look for."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\bP\d{4}\b", node.value))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("raises", "parametrize")
        ):
            for inner in (x for arg in node.args for x in ast.walk(arg)):
                found |= {inner.id} if isinstance(inner, ast.Name) else set()
                found |= {inner.attr} if isinstance(inner, ast.Attribute) else set()
    return found


@pytest.fixture(scope="module")
def tested() -> set[str]:
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__)]
    return set().union(*(exceptions_under_test(ast.parse(p.read_text())) for p in files))


def test_codes_are_unique_and_well_formed() -> None:
    codes = [c.code for c in CLASSES]
    assert sorted({c for c in codes if codes.count(c) > 1}) == []
    assert [c for c in codes if not re.fullmatch(r"P\d{4}", c)] == []


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_an_entry_is_complete(cls: type[PlaitError]) -> None:
    own = vars(cls)
    assert {"code", "message", "fix"} <= own.keys(), "an entry has a code, a message and a way out of its own"
    assert inspect.getdoc(cls) != inspect.getdoc(PlaitError) and inspect.getdoc(cls)
    assert cls.message and cls.fix
    first = cls.message.lstrip("{}")[0]
    assert not first.isupper(), "messages are lower case"
    given = {name: name.upper() for name in names(cls.message) | names(cls.fix)}
    text = str(cls(source="model.py:7", **given))
    assert text.startswith(f"[{cls.code}] ") and "at model.py:7" in text and "way out: " in text


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_some_test_raises_it(cls: type[PlaitError], tested: set[str]) -> None:
    assert {cls.__name__, cls.code} & tested, f"no test expects {cls.__name__} with pytest.raises"


def test_every_entry_is_on_the_page() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    assert [c.__name__ for c in CLASSES if f"### {c.code} {c.__name__}\n" not in page] == []


def test_the_library_raises_every_entry() -> None:
    """An entry that nothing raises is a promise that nobody keeps."""
    found = [p for p in ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(ROOT).parts)]
    sources = [p for p in found if p.name != "errors.py"]
    text = "\n".join(p.read_text() for p in sources)
    assert [c.__name__ for c in CLASSES if not re.search(rf"\b{c.__name__}\b", text)] == []
