"""Ground passes on graphs with collectives: nothing moves across one."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from plait.ir import Graph, Node
from plait.ir.effects import intervals, is_collective
from plait.passes import Context, make, run_pipeline

from tests.helpers import apply, graph

GROUND = ("normalise", "fold", "attention", "simplify", "share", "channels-last", "layout", "prune")
SEED = random.SystemRandom().randrange(1 << 30)


def ops(g: Graph) -> list[str]:
    return [n.op.name.split(".")[1] for n in g.nodes]


def ground(g: Graph) -> Graph:
    return run_pipeline(g, [make(n) for n in GROUND], Context(at="split"), verify="each-pass")[0]


def test_rules_do_not_look_through_a_collective() -> None:
    text = """def f(x: "f32[8,4]", y: "f32[8,4]"):
        {early}
        s, t0 = _c10d_functional.all_reduce.default(y, "sum", "g")
        {late}
        b = aten.permute.default(a, (1, 0))
        w, t1 = _c10d_functional.wait_tensor.default(s)
        return (b, w)
    """
    work = """p = aten.permute.default(x, (1, 0))
        a = aten.gelu.default(p)"""
    nothing = "n = aten.neg.default(x)"
    assert ops(ground(graph(text.format(early=nothing, late=work)))) == ["all_reduce", "gelu", "wait_tensor"]
    kept = ground(graph(text.format(early=work, late=nothing)))
    assert ops(kept) == ["permute", "gelu", "all_reduce", "permute", "wait_tensor"]


def test_views_and_numbers_are_seen_through_a_collective() -> None:
    made = ground(
        graph(
            """def f(x: "f32[8,4]", y: "f32[8,4]"):
        one = aten.full.default((8, 4), 1.0)
        p = aten.permute.default(x, (1, 0))
        s, t0 = _c10d_functional.all_reduce.default(y, "sum", "g")
        q = aten.permute.default(p, (1, 0))
        r = aten.tanh.default(q)
        m = aten.mul.Tensor(r, one)
        w, t1 = _c10d_functional.wait_tensor.default(s)
        return (m, w)
    """
        )
    )
    assert ops(made) == ["all_reduce", "tanh", "wait_tensor"]


def test_equal_work_is_done_once_where_it_is_first_needed() -> None:
    step = apply(
        make("share"),
        graph(
            """def f(x: "f32[8,4]", y: "f32[8,4]"):
        a = aten.tanh.default(x)
        s, t0 = _c10d_functional.all_reduce.default(a, "sum", "g")
        b = aten.tanh.default(x)
        w, t1 = _c10d_functional.wait_tensor.default(s)
        v, t2 = _c10d_functional.wait_tensor.default(s, after=(t1,))
        r, t3 = _c10d_functional.all_reduce.default(a, "sum", "g", after=(t0,))
        u, t4 = _c10d_functional.wait_tensor.default(r, after=(t2,))
        return (b, w, v, u)
    """
        ),
    )
    assert ops(step.after) == ["tanh", "all_reduce", "wait_tensor", "wait_tensor", "all_reduce", "wait_tensor"]


def test_results_that_nobody_reads_do_not_take_their_collective_along() -> None:
    made = ground(
        graph(
            """def f(x: "f32[8,4]"):
        a = aten.tanh.default(x)
        s, t0 = _c10d_functional.all_reduce.default(a, "sum", "g")
        b = aten.exp.default(a)
        w, t1 = _c10d_functional.wait_tensor.default(s)
        return (x,)
    """
        )
    )
    assert ops(made) == ["tanh", "all_reduce", "wait_tensor"]


UNARY = ("neg", "abs", "relu", "exp", "tanh", "sigmoid", "gelu", "reciprocal", "clone", "alias")


def program(seed: int) -> Graph:
    """Random elementwise work, permutations and collectives, all of one size."""
    draw = random.Random(seed)
    lines = ['def f(x: "f32[6,6]", y: "f32[6,6]"):']
    values, pending, tokens = ["x", "y"], list[str](), {"g": "", "default": ""}

    def collective(text: str, out: str, group: str) -> None:
        after = f", after=({tokens[group]},)" if tokens[group] else ""
        lines.append(f"{out}, t{len(lines)} = _c10d_functional.{text}{after})")
        tokens[group] = f"t{len(lines) - 1}"

    for i in range(draw.randrange(8, 40)):
        out, kind = f"v{i}", draw.randrange(10)
        a, b = draw.choice(values), draw.choice(values)
        if kind == 0:
            collective(f'all_reduce.default({a}, "sum", "g"', out, "g")
            pending.append(out)
            continue
        if kind == 1 and pending:
            collective(f"wait_tensor.default({pending.pop(draw.randrange(len(pending)))}", out, "default")
        elif kind < 4:
            lines.append(f"{out} = aten.{draw.choice(('add', 'mul', 'sub'))}.Tensor({a}, {draw.choice((b, '1.0', '-1'))})")
        elif kind < 6:
            lines.append(f"{out} = aten.permute.default({a}, (1, 0))")
        else:
            lines.append(f"{out} = aten.{draw.choice(UNARY)}.default({draw.choice((a, values[-1]))})")
        values.append(out)
    for i, v in enumerate(pending):
        collective(f"wait_tensor.default({v}", f"w{i}", "default")
        values.append(f"w{i}")
    chosen = draw.sample(values[2:], k=min(4, len(values) - 2)) or ["x"]
    return graph("\n    ".join([*lines, f"return ({', '.join(dict.fromkeys(chosen))},)"]) + "\n")


def dear(nodes: list[Node]) -> Counter[str]:
    return Counter(n.op.name for n in nodes if n.op.name in ("aten.exp.default", "aten.tanh.default", "aten.gelu.default"))


@pytest.mark.parametrize("turn", range(20))
def test_random_graphs_keep_their_collectives_and_what_stands_between_them(turn: int) -> None:
    before = program(SEED + turn)
    after = ground(before)
    kept = [[n.op.name for n in g.nodes if is_collective(n)] for g in (before, after)]
    assert kept[0] == kept[1], f"seed {SEED + turn}"
    old, new = intervals(before), intervals(after)
    made = {v: old[n] for n in before.nodes for v in n.outputs}
    for n in after.nodes:
        assert all(made.get(v, new[n]) == new[n] for v in n.outputs), f"seed {SEED + turn}: {n} moved"
    for interval in range(len(kept[0]) + 1):
        work = [dear([n for n in g.nodes if where[n] == interval]) for g, where in ((before, old), (after, new))]
        assert work[1] <= work[0], f"seed {SEED + turn}: work came to interval {interval}"
