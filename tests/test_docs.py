"""Documentation that cannot go stale: examples run, generated pages equal the code, links lead somewhere."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from plait.compiler import docs

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of the fenced blocks whose info string is exactly `language`."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [(page.read_text()[: m.start()].count("\n") + 2, m[1]) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # Dynamo imports the modules of the functions that it captures
    for line, text in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), vars(module))


def test_the_text_form_has_examples() -> None:
    assert len(blocks(ROOT / "docs" / "ir.md", "python")) >= 8


def test_generated_pages_are_up_to_date() -> None:
    assert docs.outdated() == [], "run `make docs`"


def test_an_outdated_page_is_noticed(tmp_path: Path) -> None:
    docs.write(tmp_path)
    assert docs.outdated(tmp_path) == []
    (tmp_path / "errors.md").write_text((tmp_path / "errors.md").read_text().replace("P0101", "P9999"))
    (tmp_path / "cli.md").unlink()
    assert docs.outdated(tmp_path) == ["errors.md", "cli.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [m for m in re.findall(r"\]\(([^)#\s]+)", text) if not m.startswith(("http:", "https:"))]
    missing = [link for link in links if not (page.parent / link).exists()]
    if "Written by" not in text:
        named = re.findall(r"`((?:ir|passes|codegen|runtime|compiler|cost|tests|docs|examples|benchmarks)/[\w/.-]*)`", text)
        missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []
