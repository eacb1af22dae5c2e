"""What becomes one kernel, what stays free, what is left to torch; and that it computes what the references do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from plait.codegen.compile import CodegenOptions, CompiledGraph, compile_graph
from plait.codegen.views import unravel
from plait.ir import parse_graph
from plait.runtime.check import check
from plait.runtime.plan import Call, Launch

from tests.helpers import check_graph


def run(text: str, *inputs: Any, exact: bool = False) -> CompiledGraph:
    """Compile a graph, check its plan, compare with interpretation by references, strides included."""
    graph = parse_graph(text)
    check_graph(graph)
    compiled = compile_graph(graph)
    check(compiled.plan)
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    wanted = graph.run(*copies)
    mine = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    got = compiled.executable(*mine)
    for g, w in zip([*got, *mine], [*wanted, *copies], strict=True):
        if not isinstance(w, torch.Tensor):
            assert g == w
            continue
        assert g.stride() == w.stride()
        torch.testing.assert_close(g, w, equal_nan=True, **({"rtol": 0, "atol": 0} if exact else {}))
    return compiled


def launches(compiled: CompiledGraph) -> int:
    return sum(isinstance(s, Launch) for s in compiled.plan.steps)


def calls(compiled: CompiledGraph) -> list[str]:
    return [s.op for s in compiled.plan.steps if isinstance(s, Call) and s.kind != "internal"]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_chain_with_two_results_is_one_kernel():
    compiled = run(
        """def f(x: "f32[5,16]", w: "f32[16]"):
        a = aten.add.Tensor(x, w)
        b = aten.tanh.default(a)
        c = aten.mul.Tensor(b, 2.0)
        return (b, c)
    """,
        rand(5, 16),
        rand(16, seed=1),
    )
    assert launches(compiled) == 1 and not calls(compiled)


@pytest.mark.parametrize("dim", [0, 1])
def test_softmax_is_one_kernel(dim: int):
    text = f"""def f(x: "f32[33,70]"):
        s = aten._softmax.default(x, {dim}, False)
        return (s,)
    """
    compiled = run(text, rand(33, 70))
    assert launches(compiled) == 1


def test_softmax_of_infinities_and_nan_is_torchs():
    x = rand(6, 40)
    x[0, 3], x[1, 5], x[2] = float("nan"), float("inf"), float("-inf")
    run(
        """def f(x: "f32[6,40]"):
        s = aten._softmax.default(x, 1, False)
        l = aten._log_softmax.default(x, 1, False)
        return (s, l)
    """,
        x,
    )


def source(compiled: CompiledGraph) -> str:
    return "".join(compiled.sources.values())


def test_softmax_keeps_a_row_of_powers_to_itself():
    text = """def f(x: "f32[33,{n}]"):
        s = aten._softmax.default(x, 1, False)
        return (s,)
    """
    kept = run(text.format(n=70), rand(33, 70))
    assert "float r0[70]" in source(kept) and kept.plan.arena == 0
    long = run(text.format(n=40000), rand(33, 40000))  # a row that is too long for the stack
    assert " r0[" not in source(long) and long.plan.arena


def test_a_value_that_is_returned_and_read_again_is_kept_and_stored():
    compiled = run(
        """def f(x: "f32[5,33]"):
        a = aten.exp.default(x)
        s = aten.sum.dim_IntList(a, (1,), True)
        y = aten.div.Tensor(a, s)
        return (a, y)
    """,
        rand(5, 33),
    )
    assert launches(compiled) == 1 and "float r0[33]" in source(compiled)


@pytest.mark.parametrize(("rows", "columns", "streams"), [(4096, 1024, True), (4099, 1023, True), (512, 512, False)])
def test_results_that_leave_the_caches_are_stored_past_them(rows: int, columns: int, streams: bool):
    text = f"""def f(x: "f32[{rows},{columns}]", w: "f32[{columns}]"):
        a = aten.mul.Tensor(x, w)
        s = aten.amax.default(a, (1,), True)
        y = aten.sub.Tensor(a, s)
        return (y,)
    """
    compiled = run(text, rand(rows, columns), rand(columns, seed=1), exact=True)
    assert ("stream(" in source(compiled)) == streams


def test_a_table_counts_only_with_the_rows_that_are_read():
    compiled = run(
        """def f(t: "f32[9000,1024]", i: "i64[512]"):
        y = aten.embedding.default(t, i)
        return (y,)
    """,
        rand(9000, 1024),
        torch.arange(512) * 17,
        exact=True,
    )
    assert "stream(" not in source(compiled)


def test_long_rows_are_reduced_along_the_row():
    compiled = run(
        """def f(x: "f32[40,9000]"):
        m = aten.amax.default(x, (1,))
        s = aten.sum.dim_IntList(x, (1,))
        return (m, s)
    """,
        rand(40, 9000).abs(),
    )
    assert launches(compiled) == 1 and "strided" not in source(compiled)


def test_channel_statistics_walk_planes_as_one_loop():
    compiled = run(
        """def f(x: "f32[4,24,30,50]"):
        v, m = aten.var_mean.correction(x, (0, 2, 3), correction=0, keepdim=True)
        y = aten.sub.Tensor(x, m)
        return (v, y)
    """,
        rand(4, 24, 30, 50),
    )
    assert launches(compiled) == 1 and "1500, [&]" in source(compiled)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i64"])
@pytest.mark.parametrize(("n", "m"), [(128, 256), (33, 150), (5, 3)])
def test_transposed_reads_go_through_tiles(dtype: str, n: int, m: int):
    x, y = rand(n, m).mul(9), rand(m, n, seed=1).mul(9)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16, "i64": torch.int64}[dtype]
    compiled = run(
        f"""graph(level="tensor", symbols={{"s0": (2, None, 8), "s1": (2, None, 8)}})
def f(x: "{dtype}[s0,s1]", y: "{dtype}[s1,s0]"):
        t = aten.permute.default(y, (1, 0))
        a = aten.add.Tensor(x, t)
        return (a,)
    """,
        x.to(kind),
        y.to(kind),
        exact=True,
    )
    assert "transpose<" in source(compiled)


def test_planes_are_transposed_one_by_one():
    compiled = run(
        """def f(x: "f32[3,40,2,70]"):
        t = aten.permute.default(x, (0, 3, 2, 1))
        c = aten.clone.default(t, memory_format=torch.contiguous_format)
        return (c,)
    """,
        rand(3, 40, 2, 70),
        exact=True,
    )
    assert launches(compiled) == 1 and "transpose<" in source(compiled)


def test_a_sum_over_one_element_beside_a_transposed_read_is_not_tiled():
    run(
        """def f(x: "f32[64,64,1]", y: "f32[64,64]"):
        s = aten.sum.dim_IntList(x, (2,))
        t = aten.permute.default(y, (1, 0))
        a = aten.add.Tensor(s, t)
        return (a, s)
    """,
        rand(64, 64, 1),
        rand(64, 64, seed=1),
        exact=True,
    )


def test_positions_among_no_elements_divide_by_no_size():
    position = sympy.Symbol("i", integer=True, nonnegative=True)
    assert len(unravel(position, [3, 0, 2])) == 3
    assert len(unravel(position, [0, 0, 5])) == 3


def test_a_short_axis_is_not_tiled():
    compiled = run(
        """def f(x: "f32[200,3]"):
        t = aten.permute.default(x, (1, 0))
        c = aten.clone.default(t, memory_format=torch.contiguous_format)
        return (c,)
    """,
        rand(200, 3),
        exact=True,
    )
    assert "transpose<" not in source(compiled)


def test_column_sums_join_each_other_where_they_cannot_join_the_rows():
    compiled = run(
        """def f(g: "f32[40,64]", x: "f32[40,64]"):
        r = aten.sum.dim_IntList(g, (1,), True)
        y = aten.sub.Tensor(g, r)
        b = aten.sum.dim_IntList(g, (0,))
        p = aten.mul.Tensor(g, x)
        w = aten.sum.dim_IntList(p, (0,))
        return (y, b, w)
    """,
        rand(40, 64),
        rand(40, 64, seed=1),
    )
    assert launches(compiled) == 2


def test_long_columns_are_summed_in_chunks_of_rows():
    compiled = run(
        """def f(x: "f32[9000,130]"):
        s = aten.sum.dim_IntList(x, (0,))
        m = aten.amax.default(x, (0,))
        return (s, m)
    """,
        rand(9000, 130).abs(),
    )
    assert launches(compiled) == 1 and compiled.plan.arena == 2 * 71 * 130 * 4 // 64 * 64 + 64


def test_what_is_stored_beside_sums_down_is_computed_row_after_row_with_the_same_bits():
    """Column by column, stores at one place of every page would make the loads behind them wait."""
    text = """def f(x: "f32[4,640,{n}]", r: "f32[4,640,1]"):
        d = aten.mul.Tensor(x, r)
        e = aten.exp.default(d)
        s = aten.sum.dim_IntList(e, (1,))
        return (e, s)
    """
    x, r = rand(4, 640, 450), rand(4, 640, 1, seed=1)
    wide = run(text.format(n=450), x, r)
    assert launches(wide) == 1
    (source,) = wide.sources.values()
    rows, _, columns = source[: source.index("exp(")].rpartition("for (int64_t")
    assert "tiles" in columns and "tiles" in rows  # zeros for the sums, then the columns of each row
    narrow = compile_graph(parse_graph(text.format(n=40))).executable(x[:, :, 5:45].contiguous(), r)
    for a, b in zip(wide.executable(x, r), narrow, strict=True):
        assert torch.equal(a[..., 5:45], b)


def test_gradients_of_norms_that_nobody_asked_for_are_no_reason_for_a_fallback():
    compiled = run(
        """def f(g: "f32[9,16]", x: "f32[9,16]", m: "f32[9,1]", r: "f32[9,1]"):
        a, b, c = aten.native_layer_norm_backward.default(g, x, (16,), m, r, None, None, (True, False, False))
        return (a, b)
    """,
        *(rand(9, n, seed=i) for i, n in enumerate((16, 16, 1, 1))),
    )
    assert calls(compiled) == [] and launches(compiled) == 1


def test_wide_columns_are_summed_row_after_row_with_the_same_bits():
    """A row of sums in memory takes the rows of a chunk in the order in which a register would."""
    text = """def f(x: "f32[{n},{m}]", r: "f32[{n},1]"):
        d = aten.sub.Tensor(x, r)
        s = aten.sum.dim_IntList(d, (0,))
        k = aten.sum.dim_IntList(x, (0,), True)
        return (s, k)
    """
    x, r = rand(4100, 300), rand(4100, 1, seed=1)
    wide = run(text.format(n=4100, m=300), (8 * x).round(), (8 * r).round(), exact=True)
    assert launches(wide) == 1
    columns = compile_graph(parse_graph(text.format(n=4100, m=40))).executable(x[:, 5:45].contiguous(), r)
    whole = compile_graph(parse_graph(text.format(n=4100, m=300))).executable(x, r)
    for a, b in zip(whole, columns, strict=True):
        assert torch.equal(a[..., 5:45], b)


NORM_BACKWARD = """def f(g: "{d}[{n},{m}]", x: "{d}[{n},{m}]", w: "{d}[{m}]"):
        a = aten.mul.Tensor(g, w)
        p = aten.mul.Tensor(a, x)
        r = aten.sum.dim_IntList(p, ({last},), True)
        y = aten.sub.Tensor(a, r)
        q = aten.mul.Tensor(g, x)
        s = aten.sum.dim_IntList(q, ({rows},), {keep})
        b = aten.sum.dim_IntList(g, ({rows},))
        v = aten.sub.Tensor(w, b)
        return (y, s, b, v)
    """


@pytest.mark.parametrize(
    ("shape", "rows", "keep"), [((2100, 300), "0", False), ((3, 700, 260), "0, 1", True), ((2, 1100, 2, 150), "0, 1", False)]
)
def test_sums_down_many_rows_join_the_kernel_that_goes_along_them(shape: tuple[int, ...], rows: str, keep: bool):
    lead = len(rows.split(","))
    sizes, row = ", ".join(map(str, shape[:lead])), ", ".join(map(str, shape[lead:]))
    last = ", ".join(str(i) for i in range(lead, len(shape)))
    text = NORM_BACKWARD.format(d="f32", n=sizes, m=row, rows=rows, keep=keep, last=last)
    g, x, w = ((4 * rand(*s, seed=i)).round() for i, s in enumerate((shape, shape, shape[lead:])))
    compiled = run(text, g, x, w, exact=True)
    assert launches(compiled) == 2  # the last difference reads a finished sum


def test_joined_sums_have_the_bits_of_lonely_ones():
    shape = (2300, 270)
    text = NORM_BACKWARD.format(d="bf16", n=2300, m=270, rows="0", keep=False, last="1")
    alone = """def f(g: "bf16[2300,270]", x: "bf16[2300,270]", w: "bf16[270]"):
        q = aten.mul.Tensor(g, x)
        s = aten.sum.dim_IntList(q, (0,))
        return (s,)
    """
    given = [rand(*s, seed=i).bfloat16() for i, s in enumerate((shape, shape, shape[1:]))]
    joined = compile_graph(parse_graph(text))
    assert launches(joined) == 2
    assert torch.equal(joined.executable(*given)[1], compile_graph(parse_graph(alone)).executable(*given)[0])


@pytest.mark.parametrize(
    ("change", "joined"),
    [
        (("f32[2100,300]", "f32[2000,300]"), False),  # too few rows for all cores
        (("q = aten.mul.Tensor(g, x)", "q = aten.mul.Tensor(g, y)"), True),  # after the reduction along the rows
        (("b = aten.sum.dim_IntList(g, (0,))", "b = aten.amax.default(g, (0,))"), True),  # the other sum alone
    ],
)
def test_which_reductions_join_the_rows(change: tuple[str, str], joined: bool):
    text = NORM_BACKWARD.format(d="f32", n=2100, m=300, rows="0", keep=False, last="1").replace(*change)
    rows = 2000 if "2000" in text else 2100
    compiled = run(text, *((4 * rand(*s, seed=i)).round() for i, s in enumerate(((rows, 300), (rows, 300), (300,)))))
    assert ("rc < end" in source(compiled)) == joined


def test_residual_and_layer_norm_are_one_kernel():
    compiled = run(
        """def f(x: "f32[2,7,48]", y: "f32[2,7,48]", w: "f32[48]", b: "f32[48]"):
        a = aten.add.Tensor(x, y)
        n, mean, rstd = aten.native_layer_norm.default(a, (48,), w, b, 1e-05)
        return (a, n)
    """,
        rand(2, 7, 48),
        rand(2, 7, 48, seed=1),
        rand(48, seed=2),
        rand(48, seed=3),
    )
    assert launches(compiled) == 1


def test_layer_norm_keeps_its_digits_at_a_large_mean():
    graph = parse_graph("""def f(x: "f32[4,512]", w: "f32[512]"):
        n, mean, rstd = aten.native_layer_norm.default(x, (512,), w, w, 1e-05)
        return (n,)
    """)
    x, w = rand(4, 512) + 1000, torch.ones(512)
    got = compile_graph(graph).executable(x, w)[0]
    wanted = torch.nn.functional.layer_norm(x.double(), (512,), w.double(), w.double())
    eager = torch.nn.functional.layer_norm(x, (512,), w, w)
    assert (got - wanted).abs().max() <= 2 * (eager - wanted).abs().max() + 1e-6


def test_views_of_results_cost_nothing():
    compiled = run(
        """def f(x: "f32[4,6]"):
        a = aten.exp.default(x)
        t = aten.permute.default(a, (1, 0))
        s = aten.slice.Tensor(t, 0, 1, 4)
        v = aten.view.default(a, (2, 12))
        p, q = aten.split.Tensor(a, 3, 1)  # f32[4,3]{6,1}, f32[4,3]{6,1}
        return (t, s, v, q)
    """,
        rand(4, 6),
    )
    assert launches(compiled) == 1 and not calls(compiled)


def test_a_matmul_takes_bias_activation_and_residual_into_its_epilogue():
    compiled = run(
        """def f(x: "f32[2,9,16]", w: "f32[24,16]", b: "f32[24]", r: "f32[2,9,24]"):
        v = aten.view.default(x, (18, 16))
        t = aten.permute.default(w, (1, 0))
        y = aten.addmm.default(b, v, t)
        u = aten.view.default(y, (2, 9, 24))
        g = aten.gelu.default(u)
        z = aten.add.Tensor(g, r)
        return (z,)
    """,
        rand(2, 9, 16),
        rand(24, 16, seed=1),
        rand(24, seed=2),
        rand(2, 9, 24, seed=3),
    )
    assert launches(compiled) == 1 and not calls(compiled)


def test_equal_layers_share_their_kernels():
    body = "\n        ".join(
        line
        for i in range(4)
        for line in (
            f"m{i} = aten.mm.default({'x' if i == 0 else f'n{i - 1}'}, w)",
            f"n{i}, a{i}, b{i} = aten.native_layer_norm.default(m{i}, (16,), g, g, 1e-05)",
        )
    )
    compiled = run(
        f"""def f(x: "f32[8,16]", w: "f32[16,16]", g: "f32[16]"):
        {body}
        return (n3,)
    """,
        rand(8, 16),
        rand(16, 16, seed=1),
        rand(16, seed=2),
    )
    assert launches(compiled) == 8 and len(compiled.sources) == 2


def test_writes_come_after_every_reader():
    compiled = run(
        """def f(x: "f32[4,4]"):
        d = aten.div.Tensor(x, 2.0)
        t = aten.permute.default(x, (1, 0))
        m = aten.mm.default(t, d)
        s = aten.sum.default(x)
        x[...] = d
        return (m, s)
    """,
        rand(4, 4),
    )
    assert not calls(compiled)


def test_swapped_inputs_are_swapped():
    run(
        """def f(x: "f32[8]", y: "f32[8]"):
        a = aten.add.Tensor(x, y)
        x[...] = y
        y[...] = x
        return (a,)
    """,
        rand(8),
        rand(8, seed=1),
        exact=True,
    )


@pytest.mark.parametrize("bad", [-1, 10])
def test_row_ids_out_of_range_raise(bad: int):
    graph = parse_graph("""def f(w: "f32[10,4]", i: "i64[3]"):
        e = aten.embedding.default(w, i)
        return (e,)
    """)
    executable = compile_graph(graph).executable
    w = rand(10, 4)
    assert torch.equal(executable(w, torch.tensor([0, 9, 5]))[0], w[[0, 9, 5]])
    with pytest.raises(IndexError, match="out of range"):
        executable(w, torch.tensor([0, bad, 5]))
    assert torch.equal(executable(w, torch.tensor([1, 1, 1]))[0], w[[1, 1, 1]])


@pytest.mark.parametrize(("n", "m"), [(5, 7), (1, 3), (64, 2)])
def test_one_compilation_serves_all_sizes(n: int, m: int):
    compiled = run(
        """graph(level="tensor", symbols={"s0": (1, None, 8), "s1": (1, None, 8)})
def f(x: "f32[s0,s1,16]", w: "f32[16,16]"):
        v = aten.view.default(x, (s0*s1, 16))
        y = aten.mm.default(v, w)
        u = aten.view.default(y, (s0, s1, 16))
        a, b, c = aten.native_layer_norm.default(u, (16,), None, None, 1e-05)
        k = aten.sum.dim_IntList(a, (0,))
        t = aten.permute.default(a, (1, 0, 2))
        l = aten.clone.default(t, memory_format=torch.contiguous_format)
        return (k, l, s0*2)
    """,
        rand(n, m, 16),
        rand(16, 16, seed=1),
    )
    assert not calls(compiled)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_empty_and_single_elements(shape: tuple[int, int]):
    n, m = shape
    run(
        f"""def f(x: "f32[{n},{m}]"):
        a = aten.exp.default(x)
        s = aten.sum.dim_IntList(a, (1,))
        t = aten.sum.default(a)
        p = aten.prod.default(a)
        c = aten.cat.default((a, x), 1)
        return (a, s, t, p, c)
    """,
        rand(n, m),
    )


@pytest.mark.parametrize(("rows", "columns"), [(3, 40000), (1, 100001), (70000, 3), (9000, 1)])
def test_long_sums_are_as_exact_as_torchs(rows: int, columns: int):
    graph = parse_graph(f"""def f(x: "f32[{rows},{columns}]"):
        a = aten.sum.dim_IntList(x, (1,))
        b = aten.sum.dim_IntList(x, (0,))
        c = aten.mean.default(x)
        m = aten.amax.default(x)
        return (a, b, c, m)
    """)
    x = rand(rows, columns)
    compiled = compile_graph(graph)
    exact = (x.double().sum(1), x.double().sum(0), x.double().mean(), x.double().amax())
    scale = (x.abs().sum(1), x.abs().sum(0), x.abs().mean(), x.abs().amax())
    for got, wanted, size in zip(compiled.executable(x), exact, scale, strict=True):
        assert ((got - wanted).abs() <= 1e-6 * size + 1e-30).all()


def test_reductions_do_not_depend_on_the_number_of_threads():
    graph = parse_graph("""def f(x: "f32[200000]", y: "f32[300,1000]"):
        a = aten.sum.default(x)
        b = aten.sum.dim_IntList(y, (0,))
        c = aten._softmax.default(y, 1, False)
        return (a, b, c)
    """)
    executable = compile_graph(graph).executable
    x, y = rand(200000), rand(300, 1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = executable(x, y)
        torch.set_num_threads(2)
        two = executable(x, y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def test_batched_rows_equal_single_rows_bit_for_bit():
    def block(n: int) -> Sequence[torch.Tensor]:
        graph = parse_graph(f"""def f(x: "f32[{n},64]", w: "f32[64,64]", g: "f32[64]"):
        y = aten.mm.default(x, w)
        z = aten.gelu.default(y)
        a, b, c = aten.native_layer_norm.default(z, (64,), g, g, 1e-05)
        s = aten._softmax.default(a, 1, False)
        return (s,)
    """)
        run_it = compile_graph(graph).executable
        return [run_it(part, w, g)[0] for part in x.split(n)]

    x, w, g = rand(12, 64), rand(64, 64, seed=1), rand(64, seed=2)
    whole = block(12)[0]
    for n in (1, 3, 4):
        assert torch.equal(torch.cat(list(block(n))), whole)


def test_bfloat16_rounds_where_eager_rounds():
    x = rand(40, 40).to(torch.bfloat16)
    run(
        """def f(x: "bf16[40,40]"):
        a = aten.mul.Tensor(x, x)
        b = aten.add.Tensor(a, x)
        c = aten.div.Tensor(b, 3.0)
        d = aten.relu.default(c)
        return (c, d)
    """,
        x,
        exact=True,
    )


def test_what_cannot_be_generated_says_why():
    graph = parse_graph("""def f(x: "c64[4]", y: "f32[4]"):
        a = aten.mul.Tensor(x, x)
        b = aten.logcumsumexp.default(y, 0)
        return (a, b)
    """)
    reasons = dict(compile_graph(graph).coverage.reasons)
    assert "complex" in reasons["aten.mul.Tensor"]
    assert "scan of pairs" in reasons["aten.logcumsumexp.default"]


def test_results_without_elements_and_scalars_need_no_library():
    for text, inputs in (
        ('def f(x: "f32[0,3]"):\n    y = aten._softmax.default(x, 1, False)\n    return (y,)\n', (rand(0, 3),)),
        ('def f(x: "f32[0,3]"):\n    a = aten.exp.default(x)\n    y = aten.as_strided.default(a, (0, 2), (2, 1), 0)\n'
         "    return (y,)\n", (rand(0, 3),)),
        ('def f(x: "f32[4,5]", i: "i64[0]"):\n    y = aten.gather.default(x, 1, i)\n    return (y,)\n',
         (rand(4, 5), torch.empty(0, dtype=torch.int64))),
        ('def f(x: "f32[]"):\n    y, i = aten.max.dim(x, 0, False)\n    return (y, i)\n', (rand(),)),
        ('def f(x: "bool[4,5]"):\n    y, i = aten.max.dim(x, 1, False)\n    return (y, i)\n', (rand(4, 5) > 0,)),
        ('def f(x: "f32[4,5]"):\n    y = aten.constant_pad_nd.default(x, (-1, 2, 3, -2), 1.5)\n    return (y,)\n',
         (rand(4, 5),)),
        ('def f(x: "f32[4,5]", s: "f32[3]"):\n    y = aten.diagonal_scatter.default(x, s, 2)\n    return (y,)\n',
         (rand(4, 5), rand(3))),
        ('def f(x: "f32[4,5]", s: "f32[2]"):\n    y = aten.diagonal_scatter.default(x, s, -2)\n    return (y,)\n',
         (rand(4, 5), rand(2))),
    ):  # fmt: skip
        assert not calls(run(text, *inputs))


def test_memory_is_addressed_only_inside_a_value_that_is_computed_here():
    head = 'def f(x: "f32[3,3]"):\n    a = aten.mul.Tensor(x, 2.0)\n'
    inside = run(head + "    y = aten.as_strided.default(a, (2, 2), (1, 3), 1)\n    return (y,)\n", rand(3, 3))
    assert not calls(inside)
    of_input = run(head + "    y = aten.as_strided.default(x, (2, 2), (1, 3), 1)\n    return (y, a)\n", rand(3, 3))
    assert "memory" in dict(of_input.coverage.reasons)["aten.as_strided.default"]


def test_effects_keep_their_order():
    compiled = run(
        """def f(x: "f32[4]"):
        a, t0 = aten.rand.default((4,), dtype=torch.float32, device=device("cpu"))  # f32[4], token(random)
        b, t1 = aten.randn.default((4,), dtype=torch.float32, device=device("cpu"), after=(t0,))  # f32[4], token(random)
        c = aten.mul.Tensor(a, 0.0)
        d = aten.mul.Tensor(b, 0.0)
        return (c, d)
    """,
        rand(4),
    )
    assert calls(compiled) == ["aten.rand.default", "aten.randn.default"]


def test_measured_matmuls_go_to_the_fastest(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    from plait.codegen import tuning
    from plait.cost.profile import Choice, Table, Timing

    graph = parse_graph("""def f(x: "f32[6,32]", w: "f32[48,32]", b: "f32[48]"):
        t = aten.permute.default(w, (1, 0))
        y = aten.addmm.default(b, x, t)
        z = aten.relu.default(y)
        return (z,)
    """)
    x, w, b = rand(6, 32), rand(48, 32, seed=1), rand(48, seed=2)
    monkeypatch.setattr(tuning, "open_table", lambda path: Table(tmp_path / "profile.json"))

    def faster(name: str) -> Any:
        def choose(problem: Any, table: Table, threads: int, folder: Any) -> Choice:
            for i, each in enumerate(tuning.candidate_names(problem)):
                seconds = 1e-6 if each == name else 1e-5 * (i + 1)
                timing = Timing(20, seconds, seconds, seconds, seconds, 0, False)
                table.record(problem.key(threads), each, timing)
            return Choice(name, table.get(problem.key(threads))[name], False)

        return choose

    expected = {"template": [], "mkl": ["aten.addmm.default"], "onednn": ["mkldnn._linear_pointwise.default"]}
    for name, wanted in expected.items():
        monkeypatch.setattr(tuning, "choose_matmul", faster(name))
        compiled = compile_graph(graph, CodegenOptions(measured=True))
        check(compiled.plan)
        assert calls(compiled) == wanted
        torch.testing.assert_close(compiled.executable(x, w, b)[0], torch.relu(torch.addmm(b, x, w.T)))
        if wanted:
            assert "measured" in compiled.coverage.reported[0].reason


@pytest.mark.parametrize("correction", [0, 1])
def test_a_view_of_no_elements_is_reduced(correction: int):
    run(
        f"""def f(x: "f32[5,0,0]"):
        a = aten.add.Tensor(x, 1)
        v = aten.view.default(a, (5, 1, 0, 0))
        r = aten.var.correction(v, (0,), correction={correction})
        return (r,)
    """,
        rand(5, 0, 0),
    )


def test_lists_that_share_a_number_are_loops_of_their_own():
    """One loop over all of them would read and write more streams than a processor follows."""
    compiled = run(
        """def f(x: "f32[64,16]", y: "f32[64,16]", rate: "f32[]"):
        a = aten.mul.Tensor(x, rate)
        b = aten.mul.Tensor(y, rate)
        return (a, b)
    """,
        rand(64, 16),
        rand(64, 16, seed=1),
        rand(),
        exact=True,
    )
    assert launches(compiled) == 2
    assert len(compiled.sources) == 1


def test_a_known_number_is_written_where_it_is_read():
    nodes = "\n".join(f"        y{i} = aten.mul.Tensor(x{i}, w)" for i in range(40))
    inputs = ", ".join(f'x{i}: "f32[8]"' for i in range(40))
    compiled = run(
        f"""def f({inputs}):
        w = aten.full.default((), 0.25, dtype=torch.float32)
{nodes}
        return ({", ".join(f"y{i}" for i in range(40))},)
    """,
        *(rand(8, seed=i) for i in range(40)),
        exact=True,
    )
    assert launches(compiled) == 40
    assert all("0.25f" in text for text in compiled.sources.values())
