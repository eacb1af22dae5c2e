"""One interpreter process and one folder of compiled Triton kernels for a test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from plait.codegen.cache import Cache
from plait.codegen.triton.check import Checker
from plait.codegen.triton.interpret import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as made:
        yield made


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="session")
def triton_checker(interpreter: Interpreter, triton_cache: Cache) -> Checker:
    """`triton_checker.verify_kernel(kernel, inputs, sizes, expected)`: interpreted, and compiled for every target."""
    return Checker(interpreter, triton_cache)
