"""Plans with collectives: work stays between the collectives that the graph puts it between."""

from __future__ import annotations

import torch
from plait.codegen.compile import CodegenOptions, compile_graph
from plait.codegen.items import CallItem, KernelItem, Scheduled
from plait.codegen.schedule import schedule
from plait.codegen.waits import with_waits
from plait.ir.effects import intervals, is_collective
from plait.runtime.check import check

from tests.helpers import assert_structural_equal, graph


def scheduled(text: str) -> Scheduled:
    made = schedule(graph(text))
    in_order(made)
    return made


def in_order(made: Scheduled) -> None:
    """The collectives stand in the graph's order, and every step in the interval of what it computes; what a kernel
    recomputes may come from earlier intervals."""
    nodes = [n for n in made.graph.nodes if is_collective(n)]
    calls = [i.node for i in made.items if isinstance(i, CallItem) and i.node in set(nodes)]
    assert calls == nodes
    interval, now = intervals(made.graph), 0
    for item in made.items:
        if isinstance(item, KernelItem):
            assert max(interval[n] for n in item.nodes) == now, item.name
        elif isinstance(item, CallItem) and item.kind != "internal":
            assert interval[item.node] == now, item.node
            now += is_collective(item.node)


def steps(made: Scheduled) -> list[str]:
    """What each step computes: the ops of a kernel by name, or the op called."""
    found: list[str] = []
    for item in made.items:
        if isinstance(item, KernelItem):
            found.append(" ".join(sorted(n.op.name.split(".")[1] for n in item.nodes)))
        elif isinstance(item, CallItem):
            found.append(item.node.op.name.split(".")[1])
    return found


def test_kernels_stay_between_their_collectives() -> None:
    made = scheduled(
        """def f(x: "f32[40,8]", y: "f32[40,8]"):
        a = aten.tanh.default(x)
        s, t0 = _c10d_functional.all_reduce.default(a, "sum", "g")
        b = aten.exp.default(a)
        c = aten.tanh.default(y)
        w, t1 = _c10d_functional.wait_tensor.default(s)
        d = aten.mul.Tensor(w, b)
        e = aten.sub.Tensor(d, a)
        return (d, e, c)
    """
    )
    assert steps(made) == ["tanh", "all_reduce", "exp", "tanh", "wait_tensor", "mul sub"]


def test_readers_of_one_value_join_only_inside_an_interval() -> None:
    made = scheduled(
        """def f(x: "f32[40,8]", y: "f32[40,8]"):
        a = aten.sum.dim_IntList(x, (1,))
        s, t0 = _c10d_functional.all_reduce.default(y, "sum", "g")
        b = aten.amax.default(x, (1,))
        c = aten.amin.default(x, (1,))
        w, t1 = _c10d_functional.wait_tensor.default(s)
        d = aten.exp.default(x)
        return (a, b, c, d, w)
    """
    )
    assert steps(made) == ["sum", "all_reduce", "amax amin", "wait_tensor", "exp"]


def test_dear_work_is_done_where_it_stands_and_cheap_work_where_it_is_read() -> None:
    text = """def f(x: "f32[40,8]", y: "f32[40,8]"):
        s, t0 = _c10d_functional.all_reduce.default(y, "sum", "g")
        a = aten.{op}(x)
        w, t1 = _c10d_functional.wait_tensor.default(s)
        b = aten.add.Tensor(w, a)
        return (b,)
    """
    assert steps(scheduled(text.format(op="gelu.default"))) == ["all_reduce", "gelu", "wait_tensor", "add"]
    assert steps(scheduled(text.format(op="neg.default"))) == ["all_reduce", "wait_tensor", "add neg"]
    two = text.replace("aten.{op}(x)", "aten.mul.Tensor(x, y)")  # two tensors would have to live on, for one
    assert steps(scheduled(two)) == ["all_reduce", "mul", "wait_tensor", "add"]


def test_a_recomputed_value_does_not_read_a_result_before_its_wait() -> None:
    made = scheduled(
        """def f(x: "f32[40,8]", y: "f32[40,8]"):
        s, t0 = _c10d_functional.all_reduce.default(x, "sum", "g")
        w, t1 = _c10d_functional.wait_tensor.default(s)
        a = aten.neg.default(w)
        r, t2 = _c10d_functional.all_reduce.default(y, "sum", "g", after=(t0,))
        b = aten.mul.Tensor(a, y)
        v, t3 = _c10d_functional.wait_tensor.default(r, after=(t1,))
        c = aten.sub.Tensor(v, a)
        return (b, c)
    """
    )
    assert steps(made) == ["all_reduce", "wait_tensor", "all_reduce", "mul neg", "wait_tensor", "neg sub"]


def test_what_is_not_ready_waits_no_longer_than_it_must() -> None:
    made = scheduled(
        """def f(x: "f32[40,8]", y: "f32[40,8]"):
        a = aten.tanh.default(x)
        s, i = aten.sort.default(a)
        b = aten.exp.default(a)
        c = aten.mul.Tensor(a, b)
        t, j = aten.sort.default(y)
        return (s, c, t)
    """
    )
    assert steps(made) == ["exp mul tanh", "sort", "sort"]
    calls = [i.node for i in made.items if isinstance(i, CallItem)]
    assert [n.out.hint for n in calls] == ["s", "t"]


def test_a_write_in_place_does_not_wait_for_a_collective() -> None:
    text = """def f(p: "f32[40,8]", g: "f32[40,8]"):
        s, t0 = _c10d_functional.all_reduce.default(g, "sum", "g")
        new = aten.sub.Tensor(p, g)
        {early}
        w, t1 = _c10d_functional.wait_tensor.default(s)
        {late}
        out = aten.mul.Tensor(w, old)
        p[...] = new
        return (out,)
    """
    old = "old = aten.exp.default(p)"
    before = scheduled(text.format(early=old, late=""))
    assert "clone" not in " ".join(steps(before))
    after = scheduled(text.format(early="", late=old))  # it reads the old value once the collective has ended
    assert steps(after) == ["all_reduce", "sub", "wait_tensor", "exp mul", "clone"]


def test_what_a_collective_reads_is_not_written_in_place() -> None:
    made = scheduled(
        """def f(p: "f32[40,8]", g: "f32[40,8]"):
        s, t0 = _c10d_functional.all_reduce.default(p, "sum", "g")
        new = aten.sub.Tensor(p, g)
        w, t1 = _c10d_functional.wait_tensor.default(s)
        p[...] = new
        return (w,)
    """
    )
    assert steps(made) == ["all_reduce", "sub", "wait_tensor", "clone"]


def test_every_collective_gets_a_wait_before_its_result_is_read() -> None:
    text = """def f(x: "f32[40,8]", y: "f32[40,8]"):
        a, t0 = _c10d_functional.all_reduce.default(x, "sum", "g")
        b, t1 = _c10d_functional.all_reduce.default(y, "sum", "g", after=(t0,))
        c, t2 = _c10d_functional.all_reduce.default(y, "max", "g", after=(t1,))
        v = aten.permute.default(a, (1, 0))
        m = aten.mul.Tensor(a, 2.0)
        w, t3 = _c10d_functional.wait_tensor.default(a)
        d = aten.add.Tensor(w, m)
        return (v, d, b)
    """
    want = graph(
        """def f(x: "f32[40,8]", y: "f32[40,8]"):
        a, t0 = _c10d_functional.all_reduce.default(x, "sum", "g")
        b, t1 = _c10d_functional.all_reduce.default(y, "sum", "g", after=(t0,))
        c, t2 = _c10d_functional.all_reduce.default(y, "max", "g", after=(t1,))
        a1, t3 = _c10d_functional.wait_tensor.default(a)
        v = aten.permute.default(a1, (1, 0))
        m = aten.mul.Tensor(a1, 2.0)
        w, t4 = _c10d_functional.wait_tensor.default(a, after=(t3,))
        d = aten.add.Tensor(w, m)
        b1, t5 = _c10d_functional.wait_tensor.default(b, after=(t4,))
        c1, t6 = _c10d_functional.wait_tensor.default(c, after=(t5,))
        return (v, d, b1)
    """
    )
    assert_structural_equal(with_waits(graph(text)), want)
    assert with_waits(want) is want
    check(compile_graph(graph(text)).plan)
    check(compile_graph(graph(text), CodegenOptions(generate=False)).plan)


def test_memory_that_a_collective_reads_is_used_again_after_its_wait() -> None:
    text = """def f(x: "f32[64,64]"):
        a = aten.tanh.default(x)
        v = aten.permute.default(a, (1, 0))
        h = aten.slice.Tensor(v, 0, 0, 32)
        s, t0 = _c10d_functional.all_reduce.default(h, "sum", "g")
        {first}
        {second}
        c = aten.sum.dim_IntList(b, (0,))
        d = aten.sum.dim_IntList(b, (1,))
        return (w, c, d)
    """
    wait, work = "w, t1 = _c10d_functional.wait_tensor.default(s)", "b = aten.sigmoid.default(x)"
    early = compile_graph(graph(text.format(first=wait, second=work))).plan
    late = compile_graph(graph(text.format(first=work, second=wait))).plan
    check(early)
    check(late)
    assert (early.arena, late.arena) == (64 * 64 * 4, 2 * 64 * 64 * 4)


def test_what_is_waited_for_without_a_start_is_the_operand_itself() -> None:
    made = compile_graph(
        graph(
            """def f(x: "f32[64,64]"):
        a = aten.tanh.default(x)
        w, t0 = _c10d_functional.wait_tensor.default(a)
        b = aten.exp.default(x)
        s = aten.sum.dim_IntList(b, (1,))
        u = aten.sum.dim_IntList(w, (1,))
        v = aten.mul.Tensor(b, w)
        return (v, s, u, w)
    """
        )
    )
    check(made.plan)
    x = torch.randn(64, 64)
    v, s, u, w = made.executable(x)
    torch.testing.assert_close((v, s, u, w), (x.exp() * x.tanh(), x.exp().sum(1), x.tanh().sum(1), x.tanh()))
