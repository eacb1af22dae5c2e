"""Parts of joined values are computed where they lie in them, and copied wherever that could be seen."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from plait.codegen.compile import CodegenOptions, CompiledGraph, compile_graph, trace
from plait.codegen.items import KernelItem
from plait.codegen.schedule import schedule
from plait.compiler.debugging.first_bad import _values_after
from plait.runtime.check import check
from plait.runtime.plan import Plan, from_json, to_json

from tests.helpers import graph, random_inputs

SEED = random.SystemRandom().randrange(1 << 30)
HEAD = 'def f(x: "f32[16,32]", y: "f32[16,32]", w: "f32[32,48]", v: "f32[48,8]"):\n'
PRODUCTS = "    a = aten.mm.default(x, w)\n    b = aten.mm.default(y, w)\n"
JOIN = "    c = aten.cat.default((a, b), 0)\n"
READERS = "    m = aten.mm.default(c, v)\n    p = aten.mm.default(a, v)\n    q = aten.mm.default(b, v)\n"


def copies(text: str) -> int:
    """Kernels that join values."""
    items = schedule(graph(text)).items
    return sum(isinstance(i, KernelItem) and any(n.op.name == "aten.cat.default" for n in i.nodes) for i in items)


def views(plan: Plan) -> int:
    """Views that kernels write."""
    modes = {k.name: k.access for k in plan.kernels}
    specs = {v.id: v for v in plan.values}
    steps = [s for s in plan.steps if hasattr(s, "kernel")]
    written = {b for s in steps for b, mode in zip(s.buffers, modes[s.kernel], strict=True) if mode != "read"}  # type: ignore[union-attr]
    return sum(specs[id].storage == "view" for id in written)


def agree(text: str, seed: int = 0) -> CompiledGraph:
    """Compile a graph, check its plan, compare bits with what it computes where nothing is joined in place."""
    g = graph(text)
    made = compile_graph(g)
    check(made.plan)
    assert from_json(to_json(made.plan)) == made.plan
    copied = compile_graph(g, CodegenOptions(), lambda _stage, rule, _node: rule != "join")
    assert not views(copied.plan) or g.writes
    inputs = random_inputs(g, seed)
    for _ in range(2):  # the second call finds the arena as the first left it
        mine, theirs = ([x.clone() for x in inputs] for _ in range(2))
        got, wanted = made.executable(*mine), copied.executable(*theirs)
        torch.testing.assert_close((list(got), mine), (list(wanted), theirs), rtol=0, atol=0, equal_nan=True)
    return made


def test_products_are_computed_where_they_are_joined() -> None:
    text = HEAD + PRODUCTS + JOIN + READERS + "    return (m, p, q)\n"
    assert copies(text) == 0
    made = agree(text)
    assert views(made.plan) == 2 and made.coverage.launches == 5 and made.coverage.free == 1
    expected = graph(text).run(*(inputs := random_inputs(graph(text))))
    torch.testing.assert_close(list(made.executable(*inputs)), list(expected))
    assert sorted(v.offset for v in made.plan.values if v.storage == "view") == [0, 16 * 48]


def test_a_joined_value_may_leave_the_graph() -> None:
    made = agree(HEAD + PRODUCTS + JOIN + READERS + "    return (c, m, p, q)\n")
    assert views(made.plan) == 2


def test_joined_values_are_parts_of_others() -> None:
    text = HEAD + PRODUCTS + "    c = aten.cat.default((a, b), 0)\n    d = aten.mm.default(y, w)\n"
    text += "    e = aten.cat.default((c, d), 0)\n    f = aten.mm.default(e, v)\n" + READERS + "    return (f, m, p, q)\n"
    assert copies(text) == 0 and views(agree(text).plan) == 3


@pytest.mark.parametrize(("order", "found"), [("(0, 1)", 2), ("(1, 0)", 0)])
def test_parts_that_lie_otherwise_than_the_joined_value_are_copied(order: str, found: int) -> None:
    text = HEAD + PRODUCTS + f"    s = aten.permute.default(a, {order})\n    t = aten.permute.default(b, {order})\n"
    text += f"    j = aten.cat.default((s, t), 0)\n    c = aten.permute.default(j, {order})\n"
    text += "    m = aten.gelu.default(c)\n    n = aten.sum.dim_IntList(m, (0,))\n"
    text += "    p = aten.mm.default(a, v)\n    q = aten.mm.default(b, v)\n    return (m, n, p, q)\n"
    assert views(agree(text).plan) == found


def test_turned_values_lie_one_behind_the_other_in_memory() -> None:
    """As `overlap-chunks` joins them, along the axis that is the outermost in memory."""
    text = """def f(x: "f32[4,8,16]", y: "f32[4,8,16]", z: "f32[4,16,16]"):
    a = aten.bmm.default(x, z)
    b = aten.bmm.default(y, z)
    s = aten.permute.default(a, (0, 2, 1))
    t = aten.permute.default(b, (0, 2, 1))
    u = aten.permute.default(s, (0, 2, 1))
    w = aten.permute.default(t, (0, 2, 1))
    j = aten.cat.default((u, w), 0)
    c = aten.permute.default(j, (0, 2, 1))
    m = aten.bmm.default(c, j)
    n = aten.bmm.default(s, a)
    return (m, n)
"""
    assert copies(text) == 0 and views(agree(text).plan) == 2


@pytest.mark.parametrize(
    "body",
    [
        PRODUCTS + "    c = aten.cat.default((a, b), 1)\n    m = aten.sum.dim_IntList(c, (0,))\n    return (m, c)\n",
        PRODUCTS + JOIN + READERS + "    return (m, p, q, a)\n",
        PRODUCTS + JOIN + "    m = aten.mm.default(c, v)\n    r = aten.view.default(b, (768,))\n    return (m, r)\n",
        PRODUCTS + "    c = aten.cat.default((a, a), 0)\n" + READERS + "    return (m, p, q)\n",
        "    c = aten.cat.default((x, y), 0)\n    m = aten.mm.default(c, w)\n    return (m,)\n",
        "    a = aten.neg.default(x)\n    c = aten.cat.default((a, y), 0)\n    m = aten.gelu.default(c)\n    return (m,)\n",
        PRODUCTS + "    d = aten.slice.Tensor(a, 0, 0, 8)\n" + JOIN.replace("a,", "d,") + READERS + "    return (m, p, q)\n",
        PRODUCTS + "    d, i = aten.sort.default(a)\n" + JOIN.replace("a,", "d,") + READERS + "    return (m, p, q)\n",
    ],
    ids=["inner", "returned", "view-returned", "twice", "inputs", "inlined", "half-of-a-root", "a-call"],
)  # fmt: skip
def test_what_stays_copied(body: str) -> None:
    assert views(agree(HEAD + body).plan) == 0


def test_a_part_of_two_joins_lies_in_the_first() -> None:
    text = HEAD + PRODUCTS + "    c = aten.cat.default((a, b), 0)\n    d = aten.cat.default((b, a), 0)\n"
    text += "    n = aten.mm.default(d, v)\n" + READERS + "    return (m, n, p, q)\n"
    assert copies(text) == 1 and views(agree(text).plan) == 2


@pytest.mark.parametrize(("rows", "found"), [(16, 2), (15, 0)])
def test_parts_begin_where_buffers_may(rows: int, found: int) -> None:
    text = f"""def f(x: "f32[{rows},4]", y: "f32[16,4]", w: "f32[4,5]", v: "f32[5,3]"):
    a = aten.mm.default(x, w)
    b = aten.mm.default(y, w)
    c = aten.cat.default((a, b), 0)
    m = aten.mm.default(c, v)
    return (m,)
"""
    assert views(agree(text).plan) == found


def test_sizes_that_only_the_call_tells_are_copied() -> None:
    text = """
graph(level="tensor", symbols={"s0": (2, 64, 8)})
def f(x: "f32[s0,16]", y: "f32[s0,16]", w: "f32[16,16]"):
    a = aten.mm.default(x, w)
    b = aten.mm.default(y, w)
    c = aten.cat.default((a, b), 0)
    m = aten.mm.default(c, w)
    return (m,)
"""
    assert views(agree(text).plan) == 0


@pytest.mark.parametrize("written", ["a", "c"])
def test_what_goes_back_to_an_input_is_copied(written: str) -> None:
    text = 'def f(x: "f32[16,32]", y: "f32[16,32]", w: "f32[32,32]", i: "f32[16,32]", j: "f32[32,32]"):\n'
    text += PRODUCTS + "    c = aten.cat.default((a, b), 0)\n    m = aten.mm.default(c, w)\n    n = aten.mm.default(b, w)\n"
    text += f"    {'i' if written == 'a' else 'j'}[...] = {written}\n    return (m, n)\n"
    made = agree(text)
    assert len([v for v in made.plan.values if v.storage == "view"]) == 1  # the write-back


def test_parts_that_are_on_their_way_stay_as_they_are() -> None:
    """While a collective reads one part the other is computed beside it."""
    text = (
        HEAD
        + """    a = aten.mm.default(x, w)
    s, t = _c10d_functional.all_reduce.default(a, "sum", "g")
    b = aten.mm.default(y, w)
    c = aten.cat.default((a, b), 0)
    m = aten.mm.default(c, v)
    z, u = _c10d_functional.wait_tensor.default(s)
    return (m, z)
"""
    )
    compiled = compile_graph(graph(text))
    check(compiled.plan)
    assert views(compiled.plan) == 2


def test_bisection_can_hold_a_join_back() -> None:
    asked: list[Any] = []

    def allow(stage: str, rule: str, node: Any) -> bool:
        asked.append((stage, rule, node.op.name)) if rule == "join" else None
        return rule != "join"

    text = HEAD + PRODUCTS + JOIN + READERS + "    return (m, p, q)\n"
    held = trace(graph(text), CodegenOptions(), allow)
    assert asked == [("reuse", "join", "aten.cat.default")] and not views(held.compiled.plan)


class Program:
    """Writes the text of a random graph over 16, 32 and 48 rows: products, loops, views, joins, writes to inputs."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.lines: list[str] = []
        self.values = {n: [f"x{n}"] for n in (16, 32, 48)}

    def any(self, rows: int) -> str:
        return self.draw.choice(self.values[rows][-4:])

    def new(self, rows: int, call: str) -> None:
        self.lines.append(f"v{len(self.lines)} = {call}")
        self.values[rows].append(f"v{len(self.lines) - 1}")

    def step(self) -> None:
        rows, what = self.draw.choice((16, 16, 32, 48)), self.draw.randrange(9)
        if what < 3:
            self.new(rows, f"aten.mm.default({self.any(rows)}, w)")
        elif what == 3:
            self.new(rows, f"aten._softmax.default({self.any(rows)}, -1, False)")
        elif what == 4:
            self.new(rows, f"aten.add.Tensor({self.any(rows)}, {self.any(rows)})")
        elif what == 5:
            self.new(rows, f"aten.{self.draw.choice(('gelu', 'relu', 'tanh'))}.default({self.any(rows)})")
        elif what == 6:
            self.new(16, f"aten.slice.Tensor({self.any(32)}, 0, {self.draw.choice(('0, 16', '16, 32'))})")
        else:
            first, second = self.draw.choice(((16, 16), (16, 16), (16, 32), (32, 16)))
            self.new(first + second, f"aten.cat.default(({self.any(first)}, {self.any(second)}), 0)")

    def text(self) -> str:
        for _ in range(self.draw.randrange(8, 30)):
            self.step()
        written = [f"x{n}[...] = {self.any(n)}" for n in (16, 32, 48) if self.draw.random() < 0.3]
        outputs = [v for n in (16, 32, 48) if (v := self.any(n))[0] == "v"]
        inputs = ", ".join(f'x{n}: "f32[{n},12]"' for n in (16, 32, 48))
        end = f"return ({''.join(f'{v}, ' for v in outputs)})"
        return "\n    ".join([f'def f({inputs}, w: "f32[12,12]"):', *self.lines, *written, end]) + "\n"


@pytest.mark.parametrize("turn", range(30))
def test_random_graphs_keep_their_bits(turn: int) -> None:
    seed = SEED + turn
    print(f"seed {seed}")
    agree(Program(seed).text(), seed)


def test_random_graphs_have_joins_in_place() -> None:
    made = [schedule(graph(Program(seed).text())) for seed in range(30)]
    assert sum(home not in m.graph.inputs for m in made for home, _ in m.stored.values()) > 10
    assert any(copies(Program(seed).text()) for seed in range(30))


def test_parts_are_compared_where_only_the_joined_value_is_read() -> None:
    """The search for the first bad node sees a part as soon as it is computed."""
    text = HEAD + PRODUCTS + JOIN + "    m = aten.mm.default(c, v)\n    return (m,)\n"
    traced = trace(graph(text))
    seen = [[v.hint for v in _values_after(traced, random_inputs(graph(text)), count)] for count in (1, 2, 3)]
    assert list(map(sorted, seen)) == [["a"], ["a", "b"], ["m"]]
