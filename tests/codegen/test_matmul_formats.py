"""Products on the template whose operands are not what they are summed in: halves and bytes in float32, bytes in int32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plait.codegen.cpp.build import DOTS, host_isa
from plait.runtime import machine
from torch.nn import functional as F

from tests.codegen.products import LAYOUTS, PLAIN, Product, randn, typed

pytestmark = pytest.mark.slow  # the compiler builds many drivers

HALVES = ["bfloat16", "float16"]
MIXED = [("float32", "int8"), ("float32", "uint8"), ("bfloat16", "int8"), ("float16", "uint8")]
BYTES = [("int8", "int8"), ("uint8", "int8"), ("int8", "uint8"), ("uint8", "uint8")]
SHAPES = [(1, 1, 1), (1, 33, 5), (2, 31, 17), (3, 64, 256), (4, 600, 9), (5, 32, 257), (6, 70, 519), (13, 5, 16),
          (25, 65, 64), (64, 48, 1030), (7, 2100, 270), (270, 40, 33)]  # fmt: skip

Compiled = Callable[..., Any]
dots = pytest.mark.skipif(DOTS not in machine.fitting({n: vars(t) for n, t in machine.TARGETS.items()}),
                          reason="this processor has no instructions for pairs of bfloat16 and for bytes")  # fmt: skip


def numbers(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers of a dtype, over its whole range where it is one of integers."""
    if dtype.endswith("int8"):
        low = 0 if dtype == "uint8" else -128
        made = torch.Generator().manual_seed(seed + sum(shape))
        return torch.randint(low, low + 256, shape, generator=made).to(getattr(torch, dtype))
    return randn(*shape, seed=seed).to(getattr(torch, dtype))


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in int64, as int32: it wraps."""
    return (a.long() @ b.long()).to(torch.int32)


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("dtypes", [(h, h) for h in HALVES] + MIXED, ids="-".join)
def test_floats_are_summed_as_if_they_had_been_float32(compiled: Compiled, layout: tuple[str, str], dtypes: Any) -> None:
    narrow = Product(compiled, typed(PLAIN, "float32", *dtypes), a=layout[0], b=layout[1], isa=host_isa())
    wide = Product(compiled, a=layout[0], b=layout[1])
    for m, n, k in SHAPES:
        a, b = numbers(dtypes[0], m, k), numbers(dtypes[1], k, n, seed=1)
        assert torch.equal(narrow(a, b), wide(a.float(), b.float())), (m, n, k)


@dots
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_pairs_of_bfloat16_are_summed_from_the_odd_one(compiled: Compiled, layout: tuple[str, str]) -> None:
    pairs = Product(compiled, typed(PLAIN, "float32", "bfloat16", "bfloat16"), a=layout[0], b=layout[1], isa=DOTS)
    wide = Product(compiled, a=layout[0], b=layout[1])
    for m, n, k in SHAPES:
        a, b = numbers("bfloat16", m, k), numbers("bfloat16", k, n, seed=1)
        got = pairs(a, b)
        if k <= 256:  # one block of either kernel
            x, y = (F.pad(z.float(), (0, k % 2)).unflatten(1, (-1, 2)).flip(2).flatten(1) for z in (a, b.mT))
            assert torch.equal(got, wide(x, y.mT)), (m, n, k)
        exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        assert ((got - exact).abs() <= 1e-7 * k**0.5 * size).all(), (m, n, k)


@pytest.mark.parametrize("isa", ["native", host_isa()])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("dtypes", BYTES, ids="-".join)
def test_bytes_are_summed_exactly(compiled: Compiled, layout: tuple[str, str], dtypes: Any, isa: str) -> None:
    product = Product(compiled, typed(PLAIN, "int32", *dtypes), a=layout[0], b=layout[1], isa=isa)
    for m, n, k in SHAPES:
        a, b = numbers(dtypes[0], m, k), numbers(dtypes[1], k, n, seed=1)
        assert torch.equal(product(a, b), exact(a, b)), (m, n, k)


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_bytes_do_not_saturate(compiled: Compiled, sign: int) -> None:
    a, b = torch.full((7, 4097), 255, dtype=torch.uint8), torch.full((4097, 33), 127 * sign, dtype=torch.int8)
    product = Product(compiled, typed(PLAIN, "int32", "uint8", "int8"))
    assert torch.equal(product(a, b), torch.full((7, 33), 4097 * 255 * 127 * sign, dtype=torch.int32))
    low = torch.full((7, 4097), -128, dtype=torch.int8)
    product = Product(compiled, typed(PLAIN, "int32", "int8", "int8"))
    assert torch.equal(product(low, low.mT.contiguous()), torch.full((7, 7), 4097 * 128 * 128, dtype=torch.int32))


@pytest.mark.parametrize("empty", range(3))
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16", "bfloat16"), ("int32", "int8", "int8")], ids="-".join)
def test_empty_axes(compiled: Compiled, empty: int, dtypes: tuple[str, str, str]) -> None:
    m, n, k = (0 if i == empty else 5 for i in range(3))
    for layout in LAYOUTS:
        product = Product(compiled, typed(PLAIN, *dtypes), a=layout[0], b=layout[1])
        out = product(numbers(dtypes[1], m, k), numbers(dtypes[2], k, n))
        assert torch.equal(out, torch.zeros(m, n, dtype=out.dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_arrives_as_the_float_that_it_is(compiled: Compiled, dtype: str) -> None:
    """Subnormal, infinite and undefined numbers too, from A and from B in every layout."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    one, many = torch.ones(1, 1, dtype=every.dtype), torch.ones(5, 1, dtype=every.dtype)
    for a, b in LAYOUTS:
        product = Product(compiled, typed(PLAIN, "float32", dtype, dtype), a=a, b=b, isa=host_isa())
        for rows in (one, many):
            out = product(rows, every[None])
            assert torch.equal(out.nan_to_num(7.5), every.float().nan_to_num(7.5).expand(rows.shape[0], -1))
            assert torch.equal(out.isnan(), every.isnan().expand(rows.shape[0], -1))
        out = product(every[:, None], one)[:, 0]
        assert torch.equal(out.nan_to_num(7.5), every.float().nan_to_num(7.5))


@pytest.mark.parametrize("dtypes", [("float32", h, h) for h in HALVES] + [("int32", "int8", "int8")], ids="-".join)
@pytest.mark.parametrize("shape", [(150, 70, 600), (64, 200, 100)], ids=str)
def test_rows_threads_layouts_and_batches_change_no_bit(
    compiled: Compiled, dtypes: Any, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    spec = typed(PLAIN, *dtypes)
    a, b = numbers(dtypes[1], m, k), numbers(dtypes[2], k, n, seed=7)
    whole = Product(compiled, spec)(a, b)
    for layout, threads in itertools.product(LAYOUTS, (1, 2, 5)):
        product = Product(compiled, spec, threads=threads, a=layout[0], b=layout[1])
        assert torch.equal(product(a, b), whole)
        for chunk in (1, 2, 3, 5, 7, 12, 64):
            assert torch.equal(torch.cat([product(x, b) for x in a.split(chunk)]), whole)
    batched = Product(compiled, spec, batch=1)(torch.stack([a, a.flip(0)]), b[None])
    assert torch.equal(batched, torch.stack([whole, whole.flip(0)]))


def test_nan_and_inf_reach_their_row_and_column_only(compiled: Compiled) -> None:
    for layout in LAYOUTS:
        a, b = numbers("bfloat16", 20, 299), numbers("bfloat16", 299, 70)
        a[3, 280], b[7, 65] = torch.nan, torch.inf
        out = Product(compiled, typed(PLAIN, "float32", "bfloat16", "bfloat16"), a=layout[0], b=layout[1])(a, b)
        assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()
        assert out[4:, 65].isinf().all() and out[4:, :65].isfinite().all()
