"""Options and fixtures that several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.graphs"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write generated text to the golden files, then pass")


@pytest.fixture(scope="session", autouse=True)
def failures_stay_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests make fail is written to a folder of theirs, also by the processes they start."""
    before = os.environ.get("PLAIT_DEBUG_DIR")
    os.environ["PLAIT_DEBUG_DIR"] = str(tmp_path_factory.mktemp("failures"))
    yield
    if before is None:
        del os.environ["PLAIT_DEBUG_DIR"]
    else:
        os.environ["PLAIT_DEBUG_DIR"] = before


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares text with the file `golden/name` beside the test."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing: run this test once with --update-golden"
        assert text == path.read_text(), f"{path.name} is out of date: if the change is meant, run with --update-golden"

    return check
