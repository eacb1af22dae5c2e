"""Rows of buffers that nobody reads are not cleared; results and whoever reads whole buffers find zeros there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plait.codegen.analysis import Analysis
from plait.codegen.compile import CodegenOptions, compile_graph, trace
from plait.codegen.unread import received_alone
from plait.ir import Builder, Value, parse_graph
from plait.runtime import exchange
from plait.runtime.pending import EXCHANGES

assert exchange is not None  # registers the op

HEAD = 'def f(x: "f32[4,9,8]", w: "f32[4,8,8]", r: "i64[4,2]", s: "i64[4,2]", b: "f32[4,9,8]"):\n'
ACT = '    z = plait.expert_act.default(y, None, None, r, "gelu")\n'
BACKWARD = '    d, e = plait.expert_act_backward.default(y, b, None, y, r, "silu")\n'
MM = "    y = plait.expert_mm.default(x, w, r)\n"


def unread(body: str, head: str = HEAD) -> list[str]:
    """Hints of what is not cleared."""
    analysis = Analysis(parse_graph(head + body))
    return sorted(v.hint for v in analysis.unread)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (MM + ACT + "    return (z,)\n", ["y"]),
        (MM + ACT + "    o = plait.expert_mm.default(z, w, r)\n    return (o,)\n", ["y", "z"]),
        (MM + "    g = plait.expert_mm_weight.default(x, y, r, 4)\n    return (g,)\n", ["y"]),
        (MM + '    z = plait.expert_act.default(b, None, y, r, "silu")\n    return (z,)\n', ["y"]),
        (MM + "    j = plait.moe_join.default((y, b), (r, s))\n    return (j,)\n", ["y"]),
        (MM + "    j = plait.moe_join.default((b, y), (r, s))\n    return (j,)\n", []),  # by other rows
        (MM + "    j = plait.moe_join.default((y, y), (r, s))\n    return (j,)\n", []),
        (MM + '    z = plait.expert_act.default(y, None, None, s, "gelu")\n    return (z,)\n', []),
        (MM + BACKWARD + "    o = plait.expert_mm.default(d, w, r)\n    return (o, e)\n", ["d", "y"]),
        (MM + BACKWARD + "    o = plait.expert_mm.default(e, w, r)\n    return (o, d)\n", ["e", "y"]),
        (MM + BACKWARD + "    o = plait.expert_mm.default(d, w, s)\n    return (o,)\n", ["e", "y"]),
        (MM + ACT + "    return (y, z)\n", []),  # the caller reads all of it
        (MM + ACT + "    a = aten.relu.default(y)\n    return (z, a)\n", []),
        (MM + ACT + "    v = aten.view.default(y, (36, 8))\n    a = aten.relu.default(v)\n    return (z, a)\n", []),
        (MM + "    o = plait.expert_mm.default(b, y, r)\n    return (o,)\n", []),  # as weights (of a shape that fits them)
    ],
)
def test_what_is_not_cleared(body: str, found: list[str]) -> None:
    if "default(b, y" in body:
        head = 'def f(x: "f32[4,8,8]", w: "f32[4,8,8]", r: "i64[4,2]", b: "f32[4,9,8]"):\n'
        assert unread(body, head) == found
        return
    assert unread(body) == found


@pytest.mark.parametrize(
    ("encode", "found"),
    [("c, p, None, 4, 9", ["y"]), ("d, p, None, 4, 9", []), ("c, q, None, 4, 9", []), ("c, p, None, 5, 9", []),
     ("c, p, None, 4, 10", [])],
)  # fmt: skip
def test_rows_of_encoded_tokens_are_those_of_their_slots(encode: str, found: list[str]) -> None:
    e = encode.split(", ")[3]
    assert found == unread(
        "    p, v, r = plait.moe_slots.default(c, u, 9)\n"
        f"    y = plait.moe_encode.default(x, {encode})\n"
        f"    j = plait.moe_join.default((y,), ({'r' if e == '4' else 'k'},))\n    return (j, v)\n",
        'def f(x: "f32[6,8]", c: "i64[6,1]", d: "i64[6,1]", q: "i64[6,1]", u: "i64[4]", k: "i64[5,2]"):\n',
    )


@pytest.mark.parametrize(
    ("expected", "read", "found"),
    [
        (False, lambda b, v, m, i: b.call("plait.expert_mm.default", v, i.w, m), True),
        (True, lambda b, v, m, i: b.call("plait.expert_mm.default", v, i.w, i.rows), True),
        (False, lambda b, v, m, i: b.call("plait.expert_mm.default", v, i.w, i.rows), False),  # not those that came
        (False, lambda b, v, m, i: v, False),  # the caller reads all of it
        (False, lambda b, v, m, i: b.call("aten.relu.default", v), False),
        (True, lambda b, v, m, i: b.call("plait.moe_decode.default", v, i.choice, i.slot, None), True),
        (False, lambda b, v, m, i: b.call("plait.moe_decode.default", v, i.choice, i.slot, None), False),
    ],
)
def test_rows_that_nothing_came_for(expected: bool, read: Callable[..., Any], found: bool) -> None:
    kinds = {"x": "f32[4,9,8]", "w": "f32[4,8,8]", "c": "i64[6,1]", "u": "i64[4]"}
    head = ", ".join(f'{name}: "{kind}"' for name, kind in kinds.items())
    start = parse_graph(f"def f({head}):\n    p, v, r = plait.moe_slots.default(c, u, 9)\n    return (p, r)\n")
    x, w, choice, _ = start.inputs
    builder = Builder(start)
    for node in start.nodes:
        builder.append(node)
    slot, rows = (v for v in start.outputs if isinstance(v, Value))
    b, n = builder.call("plait.all_to_all_capacity_start.default", x, rows, rows if expected else None, "0")
    v, m = (builder.call("_c10d_functional.wait_tensor.default", started) for started in (b, n))
    result = read(builder, v, m, SimpleNamespace(w=w, choice=choice, slot=slot, rows=rows))
    graph = builder.finish(outputs=(result, m))
    exchange = next(n for n in graph.nodes if n.op.name in EXCHANGES)
    assert received_alone(exchange, graph) is found


def test_memory_that_is_not_cleared_changes_no_result() -> None:
    """Arenas are filled with not-a-numbers between calls."""
    text = (
        'def f(x: "f32[6,8]", c: "i64[6,1]", w: "f32[4,8,8]"):\n'
        "    u = aten.full.default((4,), 0, dtype=torch.int64)\n"
        "    p, v, r = plait.moe_slots.default(c, u, 9)\n"
        "    a = plait.moe_encode.default(x, c, p, None, 4, 9)\n"
        "    y = plait.expert_mm.default(a, w, r)\n"
        '    z = plait.expert_act.default(y, None, None, r, "gelu")\n'
        "    o = plait.expert_mm.default(z, w, r)\n"
        "    g = plait.expert_mm_weight.default(z, y, r, 4)\n    return (o, g)\n"
    )
    graph = parse_graph(text)
    made = compile_graph(graph)
    held = trace(graph, CodegenOptions(), lambda stage, _rule, _node: stage != "unread").compiled
    g = torch.Generator().manual_seed(0)
    x, w, c = torch.randn(6, 8, generator=g), torch.randn(4, 8, 8, generator=g), torch.tensor([[0], [2], [0], [2], [2], [1]])
    want = held.executable(x, c, w)
    for _ in range(2):
        got = made.executable(x, c, w)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        for frame in made.executable._idle:
            frame.arena.view(torch.uint8).fill_(0xFF)
    assert made.executable._idle, "the arena of a call was not kept"
    assert len(made.sources) == len(held.sources)
