"""Loading kernels: missing ones are built in few runs of the compiler, shared drivers once, all of it found again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from plait.codegen import kernels
from plait.codegen.cache import Cache
from plait.codegen.compile import compile_graph
from plait.codegen.cpp.build import build
from plait.ir import parse_graph

PRODUCTS = """def f(x: "f32[6,8]", w: "f32[8,8]{1,8}", v: "f32[8,8]"):
    a = aten.mm.default(x, w)
    b = aten.relu.default(a)
    c = aten.mm.default(b, w)
    d = aten.tanh.default(c)
    e = aten.mm.default(d, v)
    return (e,)
"""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each run of the compiler was given."""
    seen: list[list[str]] = []

    def watched(sources: Mapping[str, str], *args: object, **how: object) -> dict[str, Path]:
        seen.append(sorted(sources))
        return build(sources, *args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "build", watched)
    return seen


def test_products_share_drivers_and_compilers(tmp_path: Path, runs: list[list[str]]) -> None:
    compiled = compile_graph(parse_graph(PRODUCTS))
    cache = Cache(tmp_path)
    found = kernels.load_kernels(compiled.sources, cache)
    assert found.keys() == compiled.sources.keys() and len(found) == 3
    shared = [r for r in runs if r[0].startswith("matmul_float_float_float")]
    assert sorted(r[0] for r in shared) == ["matmul_float_float_float_k_k_plain", "matmul_float_float_float_k_n_plain"]
    assert sorted(n for r in runs if r not in shared for n in r) == sorted(compiled.sources)
    before = len(runs)
    assert kernels.load_kernels(compiled.sources, Cache(tmp_path)) == found
    assert len(runs) == before


OTHER = """def f(x: "f32[6,8]", v: "f32[8,8]", z: "f32[5]"):
    b = aten.mm.default(x, v)
    c = aten.relu.default(z)
    return (b, c)
"""
ALONE = """def f(z: "f32[5]"):
    c = aten.relu.default(z)
    return (c,)
"""


def test_a_kernel_that_was_built_beside_a_product_loads_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.os, "sched_getaffinity", lambda pid: {0})  # one compiler for all
    together = compile_graph(parse_graph(OTHER))
    kernels.load_kernels(together.sources, Cache(tmp_path))
    script = (
        "import sys; from pathlib import Path; from plait.codegen import kernels; from plait.codegen.cache import Cache;"
        "from plait.codegen.compile import compile_graph; from plait.ir import parse_graph;"
        f"kernels.load_kernels(compile_graph(parse_graph({ALONE!r})).sources, Cache(Path({str(tmp_path)!r})))"
    )
    alone = compile_graph(parse_graph(ALONE))
    assert alone.sources.keys() <= together.sources.keys()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_products_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    x, w, v = torch.randn(6, 8), torch.randn(8, 8).t(), torch.randn(8, 8)
    (got,) = compile_graph(parse_graph(PRODUCTS)).executable(x, w, v)
    torch.testing.assert_close(got, torch.tanh(torch.relu(x @ w) @ w) @ v)


def test_a_kernel_whose_object_is_gone_is_built_again(tmp_path: Path, runs: list[list[str]]) -> None:
    compiled = compile_graph(parse_graph(PRODUCTS))
    kernels.load_kernels(compiled.sources, Cache(tmp_path))
    count = len(runs)
    shutil.rmtree(next(tmp_path.glob("v3/objects")))
    assert kernels.load_kernels(compiled.sources, Cache(tmp_path)).keys() == compiled.sources.keys()
    assert len(runs) == 2 * count


def test_graphs_that_share_kernels_build_the_rest_only(tmp_path: Path, runs: list[list[str]]) -> None:
    first = compile_graph(parse_graph(PRODUCTS))
    kernels.load_kernels(first.sources, Cache(tmp_path))
    del runs[:]
    more = compile_graph(parse_graph(PRODUCTS.replace("(e,)", "(e, aten.exp.default(a),)").replace(
        "    return (e, aten.exp.default(a),)", "    g = aten.exp.default(v)\n    return (e, g)")))  # fmt: skip
    kernels.load_kernels(more.sources, Cache(tmp_path))
    assert [n for r in runs for n in r] == sorted(more.sources.keys() - first.sources.keys())
