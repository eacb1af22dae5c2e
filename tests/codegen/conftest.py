"""What is made once for a test session: an interpreter process, a folder of Triton kernels, products on the template."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from plait.codegen.cache import Cache
from plait.codegen.cpp.build import build
from plait.codegen.templates.matmul import OPERANDS, MatmulSpec, generate, generate_pack
from plait.codegen.triton.check import Checker
from plait.codegen.triton.interpret import Interpreter

from tests.codegen.products import LAYOUTS, PLAIN, SOME, named, typed


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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, Path]]:
    """The shared object of a spec, or of the kernel that packs a dtype; built once, the common ones together."""
    folder = tmp_path_factory.mktemp("kernels")
    plain = [replace(PLAIN, a=a, b=b) for a, b in LAYOUTS]
    some = [replace(PLAIN, a=a, b=b) for a, b in SOME]
    common = {"native": plain + [typed(s, "float64") for s in some] + [replace(s, batch=n) for s in some for n in (1, 2)]}
    packing = {f"pack_{d}": generate_pack(f"pack_{d}", d, "n") for d in dict.fromkeys(itertools.chain(*OPERANDS.values()))}
    built: dict[str, dict[str, Path]] = {}

    def get(spec: MatmulSpec | str, isa: str = "native") -> tuple[str, Path]:
        if isa not in built:
            sources = {s.name: generate(s) for s in map(named, common.get(isa, plain))}
            built[isa] = build(sources | packing, folder, isa=isa)
        name = spec if isinstance(spec, str) else named(spec).name
        if name not in built[isa]:
            built[isa] |= build({name: generate(named(spec))}, folder, isa=isa)
        return name, built[isa][name]

    return get
