"""The CPU matmul template against torch, and the order of its sums against itself."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import sympy
import torch
from plait.codegen.kernel_ir import Buffer, Compute, Const, Load, Store
from plait.codegen.templates import matmul as mm
from plait.codegen.templates.launch import bind
from plait.codegen.templates.matmul import MatmulSpec, generate, workspace_elements
from plait.cost.device import host_isa
from plait.errors import InvalidMatmul

from tests.codegen.products import LAYOUTS, PLAIN, SOME, Product, integers, named, randn, run, stored, typed

SHAPES = [(1, 1, 1), (1, 33, 5), (2, 31, 17), (3, 64, 256), (5, 32, 257), (8, 100, 40), (12, 96, 300), (13, 5, 16),
          (16, 32, 31), (25, 65, 64), (64, 48, 513), (250, 40, 33), (7, 2100, 270)]  # fmt: skip


@pytest.mark.parametrize(
    "layout, dtype",
    [(x, "float32") for x in LAYOUTS] + [(x, "float64") for x in SOME],
    ids=lambda p: p if isinstance(p, str) else "-".join(p),
)
def test_equals_torch_on_every_layout_and_tail(compiled, layout, dtype):
    product = Product(compiled, typed(PLAIN, dtype), a=layout[0], b=layout[1])
    for m, n, k in SHAPES:
        a, b = integers(m, k).to(getattr(torch, dtype)), integers(k, n, seed=1).to(getattr(torch, dtype))
        torch.testing.assert_close(product(a, b), a @ b, rtol=0, atol=0)  # integers: exact in any order


def test_is_as_accurate_as_torch(compiled):
    for m, n, k in [(64, 96, 384), (32, 64, 5000)]:
        a, b = randn(m, k), randn(k, n)
        exact = a.double() @ b.double()
        assert (Product(compiled)(a, b) - exact).abs().max() <= 3 * (a @ b - exact).abs().max()


@pytest.mark.parametrize("empty", range(3))
def test_empty_axes(compiled, empty):
    m, n, k = (0 if i == empty else 5 for i in range(3))
    for layout in LAYOUTS:
        out = Product(compiled, a=layout[0], b=layout[1])(randn(m, k), randn(k, n))
        assert torch.equal(out, torch.zeros(m, n))


def test_nan_and_inf_reach_their_row_and_column_only(compiled):
    a, b = randn(20, 300), randn(300, 70)
    a[3, 280], b[7, 65] = torch.nan, torch.inf
    out = Product(compiled)(a, b)
    assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()
    assert out[4:, 65].isinf().all() and out[4:, :65].isfinite().all()


# ---- one order of the k-sum -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=[(150, 70, 600), (64, 200, 100)], ids=str)
def case(request, compiled):
    m, n, k = request.param
    a, b = randn(m, k), randn(k, n, seed=7)
    return a, b, Product(compiled)(a, b)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 12, 16, 64])
def test_chunks_of_rows_are_bit_equal_to_the_whole(compiled, case, chunk):
    a, b, whole = case
    for layout in ("k", "n", "packed"):
        product = Product(compiled, b=layout)
        assert torch.equal(torch.cat([product(x, b) for x in a.split(chunk)]), whole)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_threads_and_layouts_are_bit_equal(compiled, case, threads, layout):
    a, b, whole = case
    assert torch.equal(Product(compiled, threads=threads, a=layout[0], b=layout[1])(a, b), whole)


def test_permuted_rows_and_columns_are_bit_equal(compiled, case):
    a, b, whole = case
    rows, columns = torch.randperm(a.shape[0]), torch.randperm(b.shape[1])
    assert torch.equal(Product(compiled)(a[rows], b[:, columns]), whole[rows][:, columns])


def test_batches_are_bit_equal_to_single_products(compiled, case):
    a, b, whole = case
    out = Product(compiled, batch=1)(torch.stack([a, -a, a]), b[None])
    assert torch.equal(out, torch.stack([whole, -whole, whole]))


@pytest.mark.skipif(host_isa() != "x86-64-v4", reason="compares two instruction sets of one machine")
def test_instruction_sets_are_bit_equal(compiled, case):
    a, b, whole = case
    for layout in LAYOUTS:
        product = Product(compiled, a=layout[0], b=layout[1], isa="x86-64-v3")
        assert torch.equal(product(a, b), whole)
        for rows in range(1, 14):
            assert torch.equal(product(a[:rows], b), whole[:rows])


# ---- batch axes, tables and groups ------------------------------------------------------------------------------------


def test_two_batch_axes_of_attention_views(compiled):
    """q k^T and p v with heads as strided views and grouped key heads, nothing copied."""
    q, k = randn(2, 33, 4 * 16), randn(2, 33, 2 * 16)
    heads = q.view(2, 33, 4, 16).transpose(1, 2)
    keys = k.view(2, 33, 2, 16).transpose(1, 2)
    spec = replace(PLAIN, batch=2, b="k")
    out = torch.empty(2, 4, 33, 33)
    for head in range(0, 4, 2):  # two query heads share a key head: stride 0
        part, key = heads[:, head : head + 2], keys[:, head // 2 : head // 2 + 1].mT
        symbols = {"out_b0": out.stride(0), "out_b1": out.stride(1), "out_m": 33}
        run(compiled, spec, part, key, {"out": out[:, head:]}, n=33, symbols=symbols, threads=2)
    expected = heads @ keys.repeat_interleave(2, dim=1).mT
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", SOME, ids="-".join)
def test_batched(compiled, batch, layout):
    shape = (3, 4)[:batch]
    a, b = integers(*shape, 9, 40), integers(*shape, 40, 35, seed=1)
    product = Product(compiled, batch=batch, a=layout[0], b=layout[1])
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(product(a[:1], b), a[:1] @ b)


@pytest.mark.parametrize("a", ["k", "m"])
def test_rows_of_a_through_a_table(compiled, a):
    x, b, ids = randn(50, 300), randn(300, 40, seed=1), torch.randint(0, 50, (70,))
    if a == "k":
        whole = Product(compiled)(x[ids], b)
        assert torch.equal(Product(compiled, a=a, a_ids=True)(x, b, a_ids=ids), whole)
    else:  # rows in memory are k: the transposed product of gathered rows
        y = randn(70, 40, seed=2)
        whole = Product(compiled, a="m", b="n")(x[ids].mT, y)
        assert torch.equal(Product(compiled, a="m", b="n", a_ids=True)(x.mT, y, a_ids=ids), whole)


@pytest.mark.parametrize("b", ["k", "n"])
def test_rows_of_b_through_a_table(compiled, b):
    if b == "n":
        x, w, ids = randn(9, 70), randn(50, 40), torch.randint(0, 50, (70,))
        assert torch.equal(Product(compiled, b="n", b_ids=True)(x, w, b_ids=ids), Product(compiled, b="n")(x, w[ids]))
        return
    x, w, ids = randn(9, 30), randn(30, 50), torch.randint(0, 50, (40,))
    out = torch.empty(9, 40)
    spec, layout = replace(PLAIN, b="k", b_ids=True), stored(w, -2)
    symbols = {"out_m": 40, "out_b0": 0, "out_b1": 0}
    run(compiled, spec, x, layout, {"out": out, "b_ids": ids}, n=40, symbols=symbols, threads=2)
    assert torch.equal(out, Product(compiled)(x, w[:, ids]))


@pytest.mark.parametrize("b", ["k", "n", "packed"])
@pytest.mark.parametrize("choose", [False, True])
def test_groups_of_rows_choose_their_matrix(compiled, b, choose):
    x, w = randn(90, 48), randn(5, 48, 40, seed=1)
    offsets, which = torch.tensor([0, 7, 7, 60, 90]), torch.tensor([4, 0, 2, 2])
    tables = {"offsets": offsets} | ({"group_ids": which} if choose else {})
    out = Product(compiled, b=b, group="m", group_ids=choose)(x, w, out=torch.full((90, 40), torch.nan), **tables)
    plain = Product(compiled, b=b)
    for g, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        assert torch.equal(out[start:end], plain(x[start:end], w[which[g] if choose else g]))


def test_groups_along_k_give_one_product_each(compiled):
    x, y, offsets = randn(300, 20), randn(300, 40, seed=1), torch.tensor([0, 0, 130, 300])
    group = MatmulSpec(
        "by_k", (Store("out", mm.GROUP * 800 + mm.M * 40 + mm.N, mm.ACC),), PLAIN.buffers, a="m", b="n", group="k"
    )
    out = torch.full((3, 20, 40), torch.nan)
    run(compiled, group, x.mT, y, {"out": out, "offsets": offsets}, n=40, threads=2)
    plain = Product(compiled, a="m", b="n")
    for g, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        assert torch.equal(out[g], plain(x[start:end].mT, y[start:end]))


# ---- fused scalar code ------------------------------------------------------------------------------------------------


def test_epilogue_with_bias_activation_residual_scale_and_two_outputs(compiled):
    m, n, k = 30, 50, 64
    columns = sympy.Symbol("cols", integer=True)
    epilogue = (
        Load("bias_n", "float32", "bias", mm.N),
        Compute("biased", "float32", "add", (mm.ACC, "bias_n")),
        Const("zero", "float32", 0.0),
        Compute("active", "float32", "maximum", ("biased", "zero")),
        Load("scale_m", "float32", "scale", mm.M),
        Compute("scaled", "float32", "mul", ("active", "scale_m")),
        Load("res", "float32", "residual", mm.M * columns + mm.N),
        Compute("y", "float32", "add", ("scaled", "res")),
        Store("out", mm.M * columns + mm.N, "y"),
        Compute("positive", "bool", "gt", ("biased", "zero")),
        Store("mask", mm.N * 30 + mm.M, "positive"),  # transposed
    )
    names = [("bias", "float32", "read"), ("scale", "float32", "read"), ("residual", "float32", "read"),
             ("out", "float32", "write"), ("mask", "bool", "write")]  # fmt: skip
    spec = MatmulSpec("fused", epilogue, tuple(Buffer(*b) for b in names), (columns,))
    a, w = integers(m, k), integers(n, k, seed=1)
    given = {"bias": integers(n), "scale": integers(m), "residual": integers(m, n)}
    out, mask = torch.empty(m, n), torch.empty(n, m, dtype=torch.bool)
    run(compiled, spec, a, w.mT, given | {"out": out, "mask": mask}, n=n, symbols={"cols": n}, threads=2)
    before = a @ w.mT + given["bias"]
    assert torch.equal(out, before.relu() * given["scale"][:, None] + given["residual"])
    assert torch.equal(mask, (before > 0).mT)


def test_epilogue_scatters_rows_through_a_table(compiled):
    target = sympy.Symbol("row", integer=True)
    spec = MatmulSpec(
        "scatter",
        (Load("row", "int64", "to", mm.M), Store("out", target * 40 + mm.N, mm.ACC)),
        (Buffer("to", "int64", "read"), Buffer("out", "float32", "write")),
    )
    a, b, to = randn(25, 30), randn(30, 40), torch.randperm(25)
    out = torch.empty(25, 40)
    run(compiled, spec, a, stored(b, -2), {"to": to, "out": out}, n=40)
    assert torch.equal(out[to], Product(compiled)(a, b))


@pytest.mark.parametrize("a", ["k", "m"])
@pytest.mark.parametrize("ids", [False, True])
def test_prologue_computes_rows_of_a(compiled, a, ids):
    x, b, shift = randn(40, 300), randn(300, 40, seed=1), randn(300, seed=2)
    prologue = (Load("s", "float32", "shift", mm.K), Compute("sum", "float32", "add", (mm.A_VALUE, "s")))
    buffers = (*PLAIN.buffers, Buffer("shift", "float32", "read"))
    changes = {"prologue": prologue, "prologue_out": "sum", "buffers": buffers, "a": a}
    which = torch.randint(0, 40 if a == "k" else 300, (25,) if a == "k" else (300,))
    if not ids:
        out = Product(compiled, **changes)(x, b, shift=shift)
        assert torch.equal(out, Product(compiled)(x + shift, b))
        return
    out = Product(compiled, a_ids=True, **changes)(x, b, shift=shift, a_ids=which)
    gathered = x[which] if a == "k" else x[:, which]
    assert torch.equal(out, Product(compiled)(gathered + shift, b))


# ---- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", ["k", "packed"])
def test_workspace_is_as_large_as_needed_and_no_larger_is_touched(compiled, b):
    spec = replace(PLAIN, b=b)
    for m, n, k, threads in [(1, 1, 1, 1), (13, 33, 257, 2), (300, 64, 400, 2), (241, 2100, 300, 2)]:
        elements = workspace_elements(spec, m, n, k, threads)
        bound = [sympy.Symbol(s, integer=True, positive=True) for s in "mnk"]
        assert workspace_elements(spec, *bound, threads).subs(dict(zip(bound, (m, n, k), strict=True))) >= elements
        workspace = torch.full((elements + 1000,), 7.0)
        x, w, out = randn(m, k), randn(k, n), torch.empty(m, n)
        w = Product(compiled, b=b).pack(w) if b == "packed" else stored(w, -2)
        sizes = [m, n, k, k, w.stride(-1), threads, 0, 0, n]
        bind(compiled(spec)[1], named(spec).name, [x, w, out, workspace], sizes, threads)()
        assert (workspace[elements:] == 7).all()


def test_uses_no_more_threads_than_the_workspace_has_slots(compiled):
    m, n, k = 256, 256, 64
    workspace = torch.full((2 * workspace_elements(PLAIN, m, n, k, 1),), 7.0)
    x, w, out = randn(m, k), randn(n, k), torch.empty(m, n)
    bind(compiled(PLAIN)[1], named(PLAIN).name, [x, w, out, workspace], [m, n, k, k, k, 1, 0, 0, n], 4)()
    assert (workspace[workspace.numel() // 2 :] == 7).all()


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"dtype": "int16"}, "dtype is 'int16'"),
        ({"dtype": "int32"}, "a_dtype int32 is not summed in int32"),
        ({"dtype": "float64", "b_dtype": "int8"}, "b_dtype int8 is not summed in float64"),
        ({"dtype": "int32", "a_dtype": "int8", "b_dtype": "int8", "group": "k"}, "no groups along k"),
        ({"b": "packed", "b_ids": True}, "a packed B"),
        ({"batch": 1, "group": "m"}, "exclude"),
        ({"group_ids": True}, "group_ids"),
        ({"epilogue": ()}, "stores nothing"),
        ({"buffers": (Buffer("A", "float32", "write"),)}, "two arguments are called A"),
        ({"sizes": (sympy.Symbol("K"),)}, "two arguments are called K"),
    ],
)
def test_refuses_what_it_does_not_have(changes, why):
    with pytest.raises(InvalidMatmul, match=why):
        replace(PLAIN, **changes)


def test_source_is_deterministic():
    assert generate(PLAIN) == generate(replace(PLAIN))
    assert "mm_fused" in generate(PLAIN)
