"""MoE layers in pieces: tokens go the same ways, forward and gradients keep their bits, ranges are chosen by cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plait.codegen.compile import compile_graph
from plait.compiler.debugging.interpret import interpret, replay
from plait.cost.communication import record
from plait.cost.estimate import Estimates, Rates
from plait.cost.profile import Table, Timing
from plait.ir import Builder, Graph, Reason, Value, verify
from plait.ir.reach import Reach
from plait.passes.base import Context
from plait.passes.overlap.chunks import OverlapChunks, _Search
from plait.passes.overlap.cuts import EXCHANGE, Layer, cutting, layers
from plait.passes.overlap.launches import expected
from plait.passes.overlap.pieces import START, WAIT, in_pieces, stages
from plait.passes.overlap.report import ChunksReport
from plait.passes.overlap.weights import OverlapDW

from tests import moe_programs as programs
from tests.moe_programs import GATES, Sizes

RATES = Rates(1e11, 1e10, 1e-6)


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    with programs.single_rank() as name:
        yield name


def forward(graph: Graph) -> list[Any]:
    return Reach(graph).needed([], [graph.outputs[0]])


def slow_link(group: str, seconds_per_byte: float) -> Estimates:
    """Estimates where a group is said to have two ranks, joined by a link of that speed."""
    table = Table()
    for size in (1, 1 << 20):
        seconds = size * seconds_per_byte
        record(table, EXCHANGE, 2, size, "cpu/gloo", Timing(1, seconds, seconds, seconds, seconds))
    return Estimates(RATES, table, ranks={group: 2})


def run(graph: Graph, costs: Estimates, **options: Any) -> tuple[Graph, ChunksReport]:
    said: list[ChunksReport] = []
    made = OverlapChunks(**options).run(graph, Context(at="joint", costs=costs, report=said.append))
    verify(made)
    return made, said[0]


def integers(seed: int) -> Any:
    """Draws small integers: their sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randint(-2, 3, shape, generator=generator).float()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_forward_and_gradients_keep_their_bits(group: str, gate: str, count: int) -> None:
    seed = 10 * count
    print(f"seed {seed}")
    graph, inputs = programs.step(Sizes(), gate, group, seed)
    made, said = run(graph, Estimates(RATES), count=count, around="all", backward=False)
    assert [layer.pieces for layer in said.layers] == [count, count]
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)


@pytest.mark.parametrize("gate", GATES)
def test_a_whole_step_in_pieces(group: str, gate: str) -> None:
    """Interpreted: torch's products of fewer rows may sum in another order."""
    count = 5
    graph, inputs = programs.step(Sizes(), gate, group, seed=50)
    made, said = run(graph, Estimates(RATES), count=count, around="step")
    assert [(layer.pieces, layer.layers) for layer in said.layers] == [(count, 4)] * 4
    assert sum(n.op.name == START for n in made.nodes) == 8 * count
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("gate", "count"), [("switch", 3), ("top2", 4), ("gshard", 8), ("batch-prioritised", 2)])
def test_a_whole_step_in_pieces_keeps_its_bits_when_compiled(group: str, gate: str, count: int) -> None:
    graph, inputs = programs.step(Sizes(), gate, group, seed=count)
    made, _ = run(graph, Estimates(RATES), count=count, around="step")
    found, wanted = (compile_graph(g).executable(*inputs) for g in (made, graph))
    for one, other in zip(found, wanted, strict=True):
        assert other is None or torch.equal(one, other)


@pytest.mark.parametrize(("gate", "factor"), list(itertools.product(GATES, (0.3, 4.0))))
def test_slots_drops_and_rows_are_those_of_the_whole(group: str, gate: str, factor: float) -> None:
    graph, inputs = programs.step(Sizes(capacity=factor, heads=0), gate, group, seed=3)
    made, _ = run(graph, Estimates(RATES), count=4, around="all")
    whole, pieces = replay(graph, inputs).values, replay(made, inputs).values
    wanted = [n for n in graph.nodes if n.op.name == "plait.moe_slots.default"]
    found = [n for n in made.nodes if n.op.name == "plait.moe_slots.default"]
    assert len(found) == 4 * len(wanted)
    for k, node in enumerate(wanted):
        mine = found[4 * k : 4 * k + 4]
        assert torch.equal(torch.cat([pieces[n.results[0]] for n in mine]), whole[node.results[0]])
        assert torch.equal(pieces[mine[-1].results[1]], whole[node.results[1]])
        dropped = int((whole[node.results[0]] < 0).sum())
        assert dropped > 0 if factor < 1 else gate in ("gshard", "batch-prioritised") or dropped == 0


def test_experts_without_tokens(group: str) -> None:
    sizes = Sizes(experts=16, batch=2, length=8, heads=0)
    graph, inputs = programs.step(sizes, "switch", group, seed=5)
    made, _ = run(graph, Estimates(RATES), count=2, around="all")
    counts = [v for n, v in ((n, replay(graph, inputs).values[n.results[1]]) for n in graph.nodes if "slots" in n.op.name)]
    assert all((used == 0).any() for used in counts)
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)


@pytest.mark.parametrize("count", [2, 5])
def test_cut_by_capacity_forward_and_backward(group: str, count: int) -> None:
    graph, inputs = programs.step(Sizes(), "top2", group, seed=7, draw=integers(7))
    made, said = run(graph, Estimates(RATES), count=count, by="capacity", backward=True)
    assert [(layer.pieces, layer.axis) for layer in said.layers] == [(count, "capacity")] * 4
    assert sum(n.op.name == START for n in made.nodes) == 8 * count
    loss, *gradients = interpret(made, inputs)
    wanted, *others = interpret(graph, inputs)
    assert torch.equal(loss, wanted)
    for found, other in zip(gradients, others, strict=True):
        if other is not None:
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_every_exchange_is_waited_for(group: str) -> None:
    graph, _ = programs.step(Sizes(), "switch", group)
    made, _ = run(graph, Estimates(RATES), count=3, around="layer")
    assert not any(n.op.name == EXCHANGE for n in made.nodes)
    waited = {n.inputs[0] for n in made.nodes if n.op.name == WAIT}
    for node in made.nodes:
        if node.op.name == START:
            assert waited & set(node.results)
            assert all(u.op.name == WAIT for v in node.results for u in made.users.get(v, ()))


def test_pieces_are_launched_before_the_first_is_waited_for(group: str) -> None:
    graph, _ = programs.step(Sizes(layers=1), "switch", group)
    made, _ = run(graph, Estimates(RATES), count=3, around="all")
    order = [n.op.name for n in made.nodes if n.op.name in (START, WAIT)]
    assert order[:4] == [START] * 3 + [WAIT]


def test_a_fast_link_leaves_layers_whole_and_a_slow_one_cuts_them(group: str) -> None:
    graph, _ = programs.step(Sizes(batch=8, length=64, width=64, hidden=128), "switch", group)
    _, fast = run(graph, slow_link(group, 1e-15))
    _, slow = run(graph, slow_link(group, 1e-8))
    assert [layer.pieces for layer in fast.layers] == [1] * 4
    assert all(layer.why for layer in fast.layers)
    assert any("pieces are expected to take" in layer.why for layer in fast.layers)
    assert any(layer.pieces > 1 for layer in slow.layers)
    assert all(layer.cut < layer.whole for layer in slow.layers if layer.pieces > 1)


def test_the_range_grows_into_the_computation_around_the_layer(group: str) -> None:
    graph, _ = programs.step(Sizes(batch=8, length=64, width=64, hidden=64), "switch", group)
    _, narrow = run(graph, slow_link(group, 1e-8), around="layer")
    _, wide = run(graph, slow_link(group, 1e-8))
    assert sum(layer.nodes for layer in wide.layers) > sum(layer.nodes for layer in narrow.layers)
    assert sum(layer.cut for layer in narrow.layers) > 0


def one_layer(graph: Graph) -> Layer:
    return layers(graph, forward(graph))[0]


def test_gates_that_need_the_whole_batch_run_between_stages(group: str) -> None:
    for gate, whole in (("switch", False), ("batch-prioritised", True), ("gshard", True)):
        graph, _ = programs.step(Sizes(layers=1), gate, group)
        how = cutting(graph, forward(graph)[:-2], [one_layer(graph)])
        assert not isinstance(how, Reason)
        cut, between = ({n.op.name for n in nodes} for nodes in (how.cut, how.between))
        assert {"aten.topk.default", "plait.moe_slots.default"} <= cut
        assert ("plait.moe_keep.default" in between) is whole


def test_a_layer_whose_experts_mix_rows_says_so(group: str) -> None:
    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ops: Any = torch.ops.plait
        choice, slot, weight, rows, capacity = programs.routed(x, x @ w, "switch", 4, 1.0)
        received, coming = ops.all_to_all_capacity(ops.moe_encode(x, choice, slot, None, 4, capacity), rows, None, group)
        mixed = received.cumsum(1)
        back, _ = ops.all_to_all_capacity(mixed, coming, rows, group)
        return (ops.moe_decode(back, choice, slot, weight) ** 2).mean()

    from plait.ir import from_fx
    from torch._functorch.aot_autograd import aot_export_joint_simple

    inputs = [torch.randn(16, 8), torch.randn(8, 4, requires_grad=True)]
    graph = from_fx(aot_export_joint_simple(lambda *a: (loss(*a),), inputs, trace_joint=True), "joint")
    made, said = run(graph, slow_link(group, 1e-6))
    assert said.layers[0].pieces == 1
    assert "may mix rows" in said.layers[0].why
    launched = sum(n.op.name == START for n in made.nodes)  # and waited for all the same
    assert launched == sum(n.op.name == EXCHANGE for n in graph.nodes) > 0


def test_without_figures_nothing_changes(group: str) -> None:
    graph, _ = programs.step(Sizes(), "switch", group)
    assert OverlapChunks().run(graph, Context(at="joint")) is graph


def test_layers_in_different_numbers_of_pieces_compile_together(group: str) -> None:
    graph, inputs = programs.step(Sizes(), "switch", group)
    whole, nodes = compile_graph(graph), forward(graph)
    first, second = layers(graph, nodes)
    at = {n: i for i, n in enumerate(nodes)}
    hows = [
        cutting(graph, nodes[: at[second.dispatch] - 8], [first]),
        cutting(graph, nodes[at[second.dispatch] - 2 :], [second]),
    ]
    parts = [(how, count) for how, count in zip(hows, (2, 3), strict=True) if not isinstance(how, Reason)]
    assert len(parts) == 2
    made = in_pieces(graph, parts)
    for found, wanted in zip(compile_graph(made).executable(*inputs), whole.executable(*inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)


def test_held_back_layers_stay_whole(group: str) -> None:
    graph, inputs = programs.step(Sizes(), "switch", group)
    allowed = iter([True, False])
    ctx = Context(at="joint", costs=Estimates(RATES), allow=lambda _p, rule, _n: rule != "chunks" or next(allowed))
    made = OverlapChunks(count=2, around="all", backward=False).run(graph, ctx)
    verify(made)
    assert sum(n.op.name == "plait.moe_slots.default" for n in made.nodes) == 3
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)


def test_the_plan_is_the_fastest_with_weight_gradients_behind_it(group: str) -> None:
    graph, inputs = programs.step(Sizes(batch=8, length=64, width=64, hidden=128, layers=3), "switch", group)
    figures, said = slow_link(group, 4e-9), list[ChunksReport]()
    ctx = Context(at="joint", costs=figures, report=said.append, then=(OverlapDW(),))
    made = OverlapChunks().run(graph, ctx)
    steps = dict(said[0].steps)
    assert len(steps) > 2
    assert expected(ctx.ahead(made), figures) == pytest.approx(min(steps.values()))
    for options in ({"around": "layer"}, {"around": "all", "count": 2}, {"around": "step", "count": 8}):
        other = OverlapChunks(**options).run(graph, dataclasses.replace(ctx, report=lambda _: None))
        assert min(steps.values()) <= 1.05 * expected(ctx.ahead(other), figures)  # up to ranges that were not looked at
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)


def test_looking_ahead_leaves_no_trace(group: str) -> None:
    graph, _ = programs.step(Sizes(), "switch", group)
    asked: list[str] = []
    said: list[Any] = []

    def allow(name: str, _rule: str, _node: Any) -> bool:
        asked.append(name)
        return True

    ctx = Context(at="joint", costs=slow_link(group, 1e-8), report=said.append, allow=allow, current="overlap-chunks")
    OverlapChunks().run(graph, dataclasses.replace(ctx, then=(OverlapDW(),)))
    assert set(asked) == {"overlap-chunks"}
    assert [type(s) for s in said] == [ChunksReport]


def test_exchanges_do_not_stay_behind_sums_that_all_pieces_add_to(group: str) -> None:
    graph, inputs = programs.step(Sizes(batch=8), "switch", group)
    builder = Builder(graph)
    gradients = {v for v in graph.outputs[1:] if isinstance(v, Value)}
    summed: dict[Value, Value] = {}
    for node in graph.nodes:
        builder.append(node)
        for v in node.results:
            if v in gradients:
                summed[v] = builder.call("_c10d_functional.all_reduce.default", v, "sum", group)
    outputs = [builder.call(WAIT, summed[v]) if isinstance(v, Value) and v in summed else v for v in graph.outputs]
    whole = builder.finish(outputs=tuple(outputs))
    counts: list[int] = []
    for one in (graph, whole):
        how = cutting(one, one.nodes, layers(one, one.nodes))
        assert not isinstance(how, Reason)
        counts.append(stages(one, how).count)
    assert counts[0] == counts[1]  # one more stage would hold nothing but exchanges, of all pieces at once
    made, _ = run(whole, Estimates(RATES), count=2, around="step")
    for found, wanted in zip(interpret(made, inputs), interpret(whole, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)


def test_a_layer_that_is_whole_for_the_sake_of_the_step_says_so(group: str) -> None:
    graph, _ = programs.step(Sizes(batch=8, length=64, width=64, hidden=128), "switch", group)
    search = _Search(graph, forward(graph), forward(graph), OverlapChunks(), slow_link(group, 1e-8))
    plans = search.plans()
    (cut,) = (r for r in plans["single layers"][:1])
    assert cut.pieces > 1
    assert f"in {cut.pieces} pieces it is expected to take" in plans["nothing in pieces"][0].reports()[0].why
