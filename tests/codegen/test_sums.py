"""Sums of rows have one order: their bits depend neither on what is computed beside them, nor on how many rows there are."""

from __future__ import annotations

import pytest
import torch
from plait.codegen.compile import compile_graph
from plait.ir import parse_graph


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compiled(text: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(compile_graph(parse_graph(text)).executable(*inputs))


@pytest.mark.parametrize("columns", [5, 16, 48, 64, 128, 200, 1000, 9000])
def test_what_is_summed_may_be_computed_on_the_way(columns: int) -> None:
    pieces, rows = 8, 2
    parts = [rand(rows, columns, seed=i) for i in range(pieces)]
    names = ", ".join(f"p{i}" for i in range(pieces))
    inputs = ", ".join(f'p{i}: "f32[{rows},{columns}]"' for i in range(pieces))
    (fused,) = compiled(
        f"""def f({inputs}, x: "f32[{pieces * rows},{columns}]"):
        whole = aten.cat.default(({names}), 0)
        y = aten.add.Tensor(x, whole)
        s = aten.sum.dim_IntList(y, (1,))
        return (s,)""",
        *parts, rand(pieces * rows, columns, seed=99),
    )  # fmt: skip
    (alone,) = compiled(
        f"""def f(y: "f32[{pieces * rows},{columns}]"):
        s = aten.sum.dim_IntList(y, (1,))
        return (s,)""",
        rand(pieces * rows, columns, seed=99) + torch.cat(parts),
    )
    assert torch.equal(fused, alone)


@pytest.mark.parametrize("op", ["aten.exp.default", "aten.tanh.default"])
@pytest.mark.parametrize("columns", [100, 512])
def test_expensive_ones_too(op: str, columns: int) -> None:
    x = rand(6, columns)
    made, fused = compiled(
        f"""def f(x: "f32[6,{columns}]"):
        y = {op}(x)
        s = aten.sum.dim_IntList(y, (1,))
        return (y, s)""",
        x,
    )
    (alone,) = compiled(
        f"""def f(y: "f32[6,{columns}]"):
        s = aten.sum.dim_IntList(y, (1,))
        return (s,)""",
        made,
    )
    assert torch.equal(fused, alone)


@pytest.mark.parametrize("columns", [64, 3000, 5000, 8192, 8193, 20000])
def test_a_row_does_not_depend_on_how_many_there_are(columns: int) -> None:
    x = rand(40, columns)

    def sums(rows: int) -> torch.Tensor:
        text = f"""def f(x: "f32[{rows},{columns}]"):
        s = aten.sum.dim_IntList(x, (1,))
        return (s,)"""
        return compiled(text, x[:rows])[0]

    whole = sums(40)
    for rows in (1, 2, 7, 8, 15, 16, 17):
        assert torch.equal(sums(rows), whole[:rows]), f"{rows} rows"


@pytest.mark.parametrize(("joined", "summed"), [(0, "()"), (0, "(0, 1)"), (1, "(0, 1, 2)"), (1, "(1, 2)"), (2, "(0, 1)")])
def test_a_sum_over_several_axes_of_joined_parts(joined: int, summed: str) -> None:
    shape, part = [9, 5, 48], [9, 5, 48]
    sizes = [2, shape[joined] - 3, 1]
    whole = rand(*shape)
    inputs = []
    for i, size in enumerate(sizes):
        part[joined] = size
        inputs.append(f'p{i}: "f32[{",".join(map(str, part))}]"')
    (parts,) = compiled(
        f"""def f({", ".join(inputs)}):
        whole = aten.cat.default((p0, p1, p2), {joined})
        y = aten.mul.Tensor(whole, whole)
        s = aten.sum.dim_IntList(y, {summed})
        return (s,)""",
        *(x.contiguous() for x in whole.split(sizes, joined)),
    )
    (alone,) = compiled(
        f"""def f(whole: "f32[9,5,48]"):
        y = aten.mul.Tensor(whole, whole)
        s = aten.sum.dim_IntList(y, {summed})
        return (s,)""",
        whole,
    )
    assert torch.equal(parts, alone)
