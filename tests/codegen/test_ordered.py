"""Scatters and scans: what eager gives, duplicates in eager's order, on C++ kernels and on interpreted Triton."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plait.codegen.compile import compile_graph
from plait.ir import parse_graph
from plait.runtime.plan import Launch

from tests.codegen.test_schedule import calls, launches, rand, run
from tests.codegen.test_triton_models import run_as_triton


def ids(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def spoilt(x: torch.Tensor) -> torch.Tensor:
    x.view(-1)[:: max(x.numel() // 3, 1)] = math.nan
    return x


ROWS = '"f32[5,17]", i: "i64[9]", s: "f32[9,17]"'
SAME = '"f32[5,17]", i: "i64[7,17]", s: "f32[7,17]"'
CASES: dict[str, tuple[str, str, tuple[torch.Tensor, ...]]] = {
    "index_add": (ROWS, "index_add.default(x, 0, i, s, alpha=2)", (rand(5, 17), ids(9, below=5), rand(9, 17, seed=1))),
    "last dimension": (
        '"f32[3,8]", i: "i64[20]", s: "f32[3,20]"',
        "index_add.default(x, -1, i, s)",
        (rand(3, 8), ids(20, below=8), rand(3, 20, seed=1)),
    ),
    "scatter": (SAME, "scatter.src(x, 0, i, s)", (rand(5, 17), ids(7, 17, below=5), rand(7, 17, seed=1))),
    "smaller index": (
        '"f32[5,17]", i: "i64[2,4]", s: "f32[7,17]"',
        "scatter.src(x, 1, i, s)",
        (rand(5, 17), ids(2, 4, below=17), rand(7, 17, seed=1)),
    ),
    "number": (SAME, "scatter.value(x, 0, i, 3.5)", (rand(5, 17), ids(7, 17, below=5), rand(7, 17))),
    "multiply": (SAME, "scatter.reduce(x, 0, i, s, reduce='multiply')", (rand(5, 17), ids(7, 17, below=5), rand(7, 17))),
    "scatter_add": (SAME, "scatter_add.default(x, 0, i, s)", (rand(5, 17), ids(7, 17, below=5), rand(7, 17, seed=1))),
    "amax": (SAME, "scatter_reduce.two(x, 0, i, s, 'amax')", (rand(5, 17), ids(7, 17, below=5), spoilt(rand(7, 17)))),
    "pairs of ids": (
        '"f32[5,6]", i: "i64[40]", s: "f32[40]"',
        "index_put.default(x, (i, i), s, True)",
        (rand(5, 6), ids(40, below=5) - 2, rand(40, seed=1)),
    ),
    "ids in the middle": (
        '"f32[3,5,4]", i: "i64[2,1]", s: "f32[4]"',
        "index_put.default(x, (None, i), s, True)",
        (rand(3, 5, 4), ids(2, 1, below=5), rand(4, seed=1)),
    ),
    "integers": (
        '"i64[5]", i: "i64[30]", s: "i64[30]"',
        "index_add.default(x, 0, i, s)",
        (torch.arange(5), ids(30, below=5), torch.arange(30)),
    ),
    "half types overwrite": (
        '"bf16[5,3]", i: "i64[4,3]", s: "bf16[4,3]"',
        "scatter.src(x, 0, i, s)",
        (rand(5, 3).bfloat16(), ids(4, 3, below=5), rand(4, 3).bfloat16()),
    ),
    "nothing to scatter": (
        '"f32[5,17]", i: "i64[0]", s: "f32[0,17]"',
        "index_add.default(x, 0, i, s)",
        (rand(5, 17), ids(0, below=5), rand(0, 17)),
    ),
    "cumsum of rows": ('"f32[6,33]"', "cumsum.default(x, 1)", (rand(6, 33),)),
    "cumsum of columns": ('"f32[6,33]"', "cumsum.default(x, 0)", (rand(6, 33),)),
    "cumsum of one row": ('"f32[70000]"', "cumsum.default(x, 0)", (rand(70000) + 1,)),
    "cumsum of bools": ('"bool[6,5]"', "cumsum.default(x, 1)", (rand(6, 5) > 0,)),
    "cumsum of half types": ('"bf16[6,50]"', "cumsum.default(x, 1)", (rand(6, 50).bfloat16(),)),
    "cumprod": ('"f64[3,4,5]"', "cumprod.default(x, 1)", (rand(3, 4, 5).double(),)),
}


def text(parameters: str, call: str) -> str:
    return f"def f(x: {parameters}):\n    y = aten.{call}\n    return (y,)\n"


@pytest.mark.parametrize("name", CASES)
def test_as_eager_does_it(name: str) -> None:
    parameters, call, inputs = CASES[name]
    compiled = run(text(parameters, call), *inputs, exact=name not in ("cumsum of rows", "cumsum of one row"))
    assert launches(compiled) == 1 and not calls(compiled)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("cumsum of one row", "half types overwrite")])
def test_as_triton(name: str, triton_checker) -> None:
    parameters, call, inputs = CASES[name]
    graph = parse_graph(text(parameters, call))
    results, kernels = run_as_triton(graph, list(inputs), triton_checker.interpreter, triton_checker.cache)
    assert kernels
    torch.testing.assert_close(results[0], graph.run(*inputs)[0], equal_nan=True)


def test_operands_are_computed_in_the_kernel() -> None:
    compiled = run(
        """def f(x: "f32[5,17]", i: "i64[9]", s: "f32[9,17]"):
        a = aten.mul.Tensor(x, 2.0)
        b = aten.exp.default(s)
        y = aten.index_add.default(a, 0, i, b)
        z = aten.cumsum.default(y, 1)
        return (z,)
    """,
        *(rand(5, 17), ids(9, below=5), rand(9, 17)),
    )
    assert launches(compiled) == 2 and not calls(compiled)


def test_sizes_that_are_symbols() -> None:
    source = """
graph(level="tensor", symbols={"s0": (2, 64, 7), "s1": (2, 64, 5)})
def forward(x: "f32[s0,s1]", i: "i64[s0]", t: "f32[4,s1]"):
    y = aten.index_add.default(t, 0, i, x)
    z = aten.cumsum.default(x, 0)
    return (y, z)
"""
    for rows, columns in ((7, 5), (64, 33), (2, 2)):
        run(source, rand(rows, columns), ids(rows, below=4), rand(4, columns, seed=1))


def test_ids_out_of_range_raise() -> None:
    parameters, call, (x, i, s) = CASES["index_add"]
    compiled = compile_graph(parse_graph(text(parameters, call)))
    assert any(isinstance(step, Launch) for step in compiled.plan.steps)
    wrong = i.clone()
    wrong[3] = 5
    with pytest.raises(IndexError):
        compiled.executable(x, wrong, s)


def test_threads_do_not_change_a_bit() -> None:
    parameters, call, inputs = CASES["index_add"]
    compiled = compile_graph(parse_graph(text(parameters, call)))
    before = torch.get_num_threads()
    found: list[Any] = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(compiled.executable(*inputs)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("parameters", "call", "why"),
    [
        ('"f32[]", i: "i64[]", s: "f32[]"', "scatter.src(x, 0, i, s)", "different ranks"),
        ('"bf16[5]", i: "i64[9]", s: "bf16[9]"', "index_add.default(x, 0, i, s)", "round at every step"),
        ('"f32[5]", i: "i64[9]", s: "f32[9]"', "scatter_reduce.two(x, 0, i, s, 'mean')", "opened before"),
        ('"f32[]"', "cumsum.default(x, 0)", "a scan of a scalar"),
    ],
)
def test_what_stays_in_torch_says_why(parameters: str, call: str, why: str) -> None:
    ((_, reason),) = compile_graph(parse_graph(text(parameters, call))).coverage.reasons
    assert why in reason
