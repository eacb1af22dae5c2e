"""How trees of loops become programs: shapes of nests that the hand-built cases leave out, widths of indices, refusals."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from plait.codegen.kernel_ir import Acc, Accumulate, Buffer, Const, Index, Kernel, Stmt
from plait.codegen.triton.check import Checker
from plait.codegen.triton.indices import bounds, fits_int32, index_text
from plait.codegen.triton.printer import print_kernel
from plait.errors import IndexNotPrintable, InvalidKernel
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, ModularIndexing

from tests.codegen.kernels import D, I, J, K, M, N, R, S, T, load, op, parallel, reads, serial, store, writes

F32 = "float32"


def kernel(*body: Stmt, buffers: tuple[Buffer, ...] | None = None, sizes=(M, N)) -> Kernel:
    return Kernel("k", buffers or (*reads("x"), *writes("out")), sizes, body)


def whole(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()


def test_an_accumulator_may_be_updated_by_several_loops(triton_checker: Checker) -> None:
    """Lane by lane in two loops, and once per round in a third."""
    tree = kernel(
        parallel(
            I, M,
            Acc("total", F32, "sum"), Acc("m", "int64", "argmax", F32),
            serial(
                R, N,
                load("a", "x", I * N + R), Accumulate("total", "a"), Index("p", R), Accumulate("m", "a", "p"), vector=True,
            ),
            serial(S, N, load("b", "x", I * N + S), Accumulate("total", "b"), vector=True),
            serial(
                T, 2, load("c", "x", I * N + T), Accumulate("total", "c"), Index("q", T + 100), Accumulate("m", "c", "q")
            ),
            store("out", I, "total"), store("best", I, "m"),
        ),
        buffers=(*reads("x"), *writes("out"), *writes("best", dtype="int64")),
    )  # fmt: skip
    x = whole(3, 21)
    expected = {"out": x.sum(1) * 2 + x[:, :2].sum(1), "best": x.argmax(1)}
    triton_checker.verify_kernel(tree, {"x": x}, {"M": 3, "N": 21}, expected)


def test_a_serial_loop_inside_lanes_keeps_one_value_per_lane(triton_checker: Checker) -> None:
    tree = kernel(
        parallel(
            I, M,
            serial(
                R, N,
                Acc("s", F32, "sum"),
                serial(K, 4, load("a", "x", (I * N + R) * 4 + K), Accumulate("s", "a")),
                store("out", I * N + R, "s"), vector=True,
            ),
        )
    )  # fmt: skip
    x = whole(3, 19, 4)
    triton_checker.verify_kernel(tree, {"x": x}, {"M": 3, "N": 19}, {"out": x.sum(2)})


def test_a_vector_loop_inside_lanes_is_a_plain_loop(triton_checker: Checker) -> None:
    tree = kernel(
        parallel(
            I, M,
            serial(
                R, N,
                Acc("s", F32, "sum"),
                serial(K, 4, load("a", "x", (I * N + R) * 4 + K), Accumulate("s", "a"), vector=True),
                store("out", I * N + R, "s"), vector=True,
            ),
        )
    )  # fmt: skip
    x = whole(2, 19, 4)
    triton_checker.verify_kernel(tree, {"x": x}, {"M": 2, "N": 19}, {"out": x.sum(2)})


def test_scalars_at_the_root_are_shared_within_one_program(triton_checker: Checker) -> None:
    """A loop that reads a sum cannot run before all of it is known, so both are one program."""
    tree = kernel(
        Acc("s", F32, "sum"),
        serial(R, N, load("a", "x", R), Accumulate("s", "a"), vector=True),
        parallel(J, N, load("b", "x", J), op("c", "sub", "b", "s"), store("out", J, "c"), vector=True),
        sizes=(N,),
    )
    (source,) = print_kernel(tree)
    assert source.grid == 1
    x = whole(37)
    triton_checker.verify_kernel(tree, {"x": x}, {"N": 37}, {"out": x - x.sum()})


def test_constants_at_the_root_do_not_tie_nests_together() -> None:
    shared = kernel(
        Const("two", F32, 2.0),
        parallel(I, M, load("a", "x", I), op("b", "mul", "a", "two"), store("out", I, "b")),
    )
    assert [s.grid for s in print_kernel(shared)] == [["ceildiv", "M", "XBLOCK"]]
    apart = kernel(
        parallel(I, M, load("a", "x", I), store("out", I, "a")),
        parallel(J, N, load("b", "x", J), store("out", J, "b")),
    )
    assert [(s.name, s.sizes) for s in print_kernel(apart)] == [("k_0", ("M",)), ("k_1", ("N",))]


def test_an_unvarying_store_and_an_atomic_count(triton_checker: Checker) -> None:
    tree = Kernel(
        "k",
        (*reads("x"), Buffer("count", "int32", "read_write"), *writes("last")),
        (N,),
        (
            Const("one", "int32", 1),
            parallel(I, N, load("a", "x", 0), store("last", 3, "a"), store("count", 0, "one", atomic=True)),
        ),
    )
    x = whole(1)
    last = torch.full((5,), math.nan)
    inputs = {"x": x, "count": torch.tensor([5], dtype=torch.int32), "last": last}
    expected = torch.where(torch.arange(5) == 3, x, last)
    triton_checker.verify_kernel(tree, inputs, {"N": 29}, {"count": torch.tensor([34], dtype=torch.int32), "last": expected})


def test_a_scalar_meets_a_tile(triton_checker: Checker) -> None:
    tree = Kernel(
        "k",
        (*reads("x", "y"), *writes("out", dtype="bool")),
        (N,),
        (
            Const("zero", F32, 0.0),
            parallel(
                I, N,
                load("a", "x", I), load("b", "y", 0), op("p", "ne", "a", "zero", dtype="bool"),
                op("q", "ne", "b", "zero", dtype="bool"), op("r", "xor", "p", "q", dtype="bool"), store("out", I, "r"),
            ),
        ),
    )  # fmt: skip
    x = whole(40)
    triton_checker.verify_kernel(tree, {"x": x, "y": torch.ones(1)}, {"N": 40}, {"out": x == 0})


def test_a_nest_without_iterations_still_prints_and_compiles(triton_checker: Checker) -> None:
    index = I * 6 + J * 2 + K * 5
    tree = kernel(parallel(I, 4, parallel(J, 0, parallel(K, 3, load("a", "x", index), store("out", index, "a")))), sizes=())
    out = torch.ones(3)
    (source,) = triton_checker.verify_kernel(tree, {"x": out, "out": out}, {}, {"out": out})
    assert source.programs({}) == 0


def test_axes_of_one_element_vanish() -> None:
    tree = kernel(
        parallel(I, 1, parallel(J, 6, parallel(K, 1, load("a", "x", I * 100 + J + K * 7), store("out", J, "a")))), sizes=()
    )
    (source,) = print_kernel(tree)
    assert "tl.load(x + j, mask=xmask, other=0.0)" in source.text and source.config.tiles == (("XBLOCK", 8),)


def test_axes_that_address_memory_in_order_are_not_split() -> None:
    index = I * N * D + J * D + K
    tree = kernel(
        parallel(I, M, parallel(J, N, parallel(K, D, load("a", "x", index), store("out", index + 5, "a")))), sizes=(M, N, D)
    )
    (source,) = print_kernel(tree)
    assert "x + xindex" in source.text and "out + (xindex + 5)" in source.text and "//" not in source.text


def test_the_vector_axis_varies_fastest(triton_checker: Checker) -> None:
    tree = kernel(
        parallel(J, N, parallel(I, M, load("a", "x", I * N + J), store("out", I * N + J, "a")), vector=True),
    )
    (source,) = print_kernel(tree)
    assert "x + xindex" in source.text
    x = whole(5, 9)
    triton_checker.verify_kernel(tree, {"x": x}, {"M": 5, "N": 9}, {"out": x})


def test_names_that_the_module_uses_are_changed(triton_checker: Checker) -> None:
    names = {"x": "tl", "out": "_tanh"}
    tree = Kernel(
        "k",
        (*reads("tl"), *writes("_tanh")),
        (N,),
        (
            parallel(
                sympy.Symbol("xindex", integer=True), N,
                load("XBLOCK", names["x"], sympy.Symbol("xindex", integer=True)), op("xmask", "tanh", "XBLOCK"),
                store(names["out"], sympy.Symbol("xindex", integer=True), "xmask"),
            ),
        ),
    )  # fmt: skip
    x = whole(9)
    triton_checker.verify_kernel(tree, {"tl": x}, {"N": 9}, {"_tanh": torch.tanh(x)}, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("extent", "stride", "wide"), [(1 << 20, 4, False), (1 << 20, 4096, True), (1 << 32, 1, True)])
def test_indices_are_as_wide_as_constants_need(extent: int, stride: int, wide: bool) -> None:
    tree = kernel(parallel(I, extent, load("a", "x", I * stride), store("out", I, "a")), sizes=())
    assert ("to(tl.int64)" in print_kernel(tree)[0].text) is wide


@pytest.mark.parametrize(("step", "wide"), [(1, False), (1 << 12, True)])
def test_loop_counters_are_as_wide_as_constants_need(step: int, wide: bool) -> None:
    body = serial(K, 1 << 20, load("a", "x", I * N + K * step), Accumulate("s", "a"))
    tree = kernel(parallel(I, M, Acc("s", F32, "sum"), body, store("out", I, "s")))
    assert ("range(tl.cast(0, tl.int64), 1048576)" in print_kernel(tree)[0].text) is wide


def test_ranges_of_expressions() -> None:
    ranges = {I: (0, 9), J: (-3, 4), N: (0, math.inf)}
    assert bounds(2 * I - J + 1, ranges) == (-3, 22)
    assert bounds(I * J, ranges) == (-27, 36)
    assert bounds(FloorDiv(J, 2), ranges) == (-2, 2)
    assert bounds(Mod(I, 4), ranges) == (0, 3)
    assert bounds(ModularIndexing(I, 2, 3), ranges) == (0, 2)
    assert bounds(Max(I, N), ranges) == (0, math.inf)
    assert bounds(Min(I, N), ranges) == (0, 9)
    assert bounds(sympy.Symbol("unknown", integer=True) + 1, ranges) == (-math.inf, math.inf)
    assert fits_int32(I * 200_000_000, ranges) and not fits_int32(I * 300_000_000, ranges)
    assert not fits_int32(I * 300_000_000 - I * 290_000_000 + N * 0 + J, {**ranges, I: (0, 10**6)})


def test_division_of_what_may_be_negative_keeps_pythons_sign(triton_checker: Checker) -> None:
    assert index_text(FloorDiv(I, N), str, {I: (0, 5), N: (0, 5)}) == "i // N"
    assert index_text(FloorDiv(I - 2, 3), str, {I: (0, 5)}) == "_floordiv_index(i - 2, 3)"
    tree = kernel(
        parallel(
            I, N,
            Index("down", FloorDiv(I - 7, 3)), Index("rest", Mod(I - 7, 3)), Index("most", Max(I - 7, 0)),
            store("q", I, "down"), store("r", I, "rest"), store("m", I, "most"),
        ),
        buffers=writes("q", "r", "m", dtype="int64"), sizes=(N,),
    )  # fmt: skip
    i = torch.arange(20) - 7
    triton_checker.verify_kernel(tree, {}, {"N": 20}, {"q": i // 3, "r": i % 3, "m": i.clamp(min=0)})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (store("out", I, "ghost"), "ghost is read where it is not defined"),
        (load("a", "x", sympy.Symbol("elsewhere")), "elsewhere is read where it is not defined"),
        (Accumulate("nobody", "one"), "nobody is not an accumulator"),
        (op("a", "sin", "one", dtype="int64"), "sin has no meaning for int64"),
        (store("out", I, "one", atomic=True), "atomic addition of int8"),
        (Const("out", "int64", 1), "out names two things"),
    ],
)
def test_invalid_kernels_are_refused(body: Stmt, why: str) -> None:
    small = "int8" if "atomic" in why else "int64"
    with pytest.raises(InvalidKernel, match=why):
        print_kernel(kernel(Const("one", small, 1), parallel(I, M, body)))


def test_an_argmax_needs_positions() -> None:
    inner = serial(R, N, load("a", "x", R), Accumulate("m", "a"), vector=True)
    with pytest.raises(InvalidKernel, match="argmax into m has no index"):
        print_kernel(kernel(parallel(I, M, Acc("m", "int64", "argmax", F32), inner, store("out", I, "m"))))


def test_indices_that_are_not_integer_arithmetic_are_refused() -> None:
    with pytest.raises(IndexNotPrintable, match="sin"):
        print_kernel(kernel(parallel(I, M, load("a", "x", sympy.sin(I)), store("out", I, "a"))))
