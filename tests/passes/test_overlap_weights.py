"""Weight gradients beside exchanges: nothing changes but the order, and the order hides what can be hidden."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plait.compiler.debugging.interpret import interpret
from plait.cost.communication import record
from plait.cost.estimate import Estimates, Rates
from plait.cost.profile import Table, Timing
from plait.ir import Builder, Graph, Value, verify
from plait.passes.base import Context
from plait.passes.overlap.cuts import EXCHANGE
from plait.passes.overlap.launches import exposed, is_start, timeline
from plait.passes.overlap.pieces import WAIT, asynchronous
from plait.passes.overlap.report import WeightsReport
from plait.passes.overlap.weights import OverlapDW, Problem, _Filled, _Parts, rethreaded

from tests import moe_programs as programs
from tests.moe_programs import Sizes

REDUCE = "_c10d_functional.all_reduce.default"


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    with programs.single_rank() as name:
        yield name


def costs(group: str, seconds_per_byte: float = 2e-9) -> Estimates:
    table = Table()
    for op in (EXCHANGE, REDUCE):
        for size in (1, 1 << 20):
            s = size * seconds_per_byte
            record(table, op, 2, size, "cpu/gloo", Timing(1, s, s, s, s))
    return Estimates(Rates(2e10, 1e10, 1e-6), table, ranks={group: 2})


def run(graph: Graph, figures: Estimates) -> tuple[Graph, WeightsReport]:
    said: list[WeightsReport] = []
    made = OverlapDW().run(graph, Context(at="joint", costs=figures, report=said.append))
    verify(made)
    return made, said[0]


def with_sums(graph: Graph, group: str) -> Graph:
    """The graph with every gradient summed over ranks at its end."""
    builder = Builder(graph)
    for node in graph.nodes:
        builder.append(node)
    outputs = list(graph.outputs)
    for i, v in enumerate(outputs[1:], 1):
        if isinstance(v, Value):
            started = builder.call(REDUCE, v, "sum", group)
            outputs[i] = builder.call(WAIT, started)
    return builder.finish(outputs=tuple(outputs))


@pytest.mark.parametrize("gate", programs.GATES)
def test_results_keep_their_bits(group: str, gate: str) -> None:
    graph, inputs = programs.step(Sizes(), gate, group)
    made, said = run(graph, costs(group))
    assert sorted(n.op.name for n in made.nodes) == sorted(n.op.name for n in asynchronous(graph).nodes)
    assert any(said.beside)
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)


def test_less_communication_is_exposed(group: str) -> None:
    graph, _ = programs.step(Sizes(batch=8, length=32, width=64, hidden=128, layers=3), "switch", group)
    figures = costs(group)
    made, said = run(graph, figures)
    before, after = timeline(asynchronous(graph), figures), timeline(made, figures)
    assert exposed(after) < exposed(before)
    assert after.seconds < before.seconds
    assert (said.seconds_after, said.exposed_after) == (after.seconds, exposed(after))


def test_weight_gradients_stand_between_launch_and_wait(group: str) -> None:
    graph, _ = programs.step(Sizes(batch=8, length=32, width=64, hidden=128), "switch", group)
    made, said = run(graph, costs(group))
    at = {n: i for i, n in enumerate(made.nodes)}
    starts = [n for n in made.nodes if is_start(n)]
    for start, names in zip(starts, said.beside, strict=True):
        first = min(at[u] for v in start.results for u in made.users.get(v, ()))
        for name in names:
            assert at[start] < min(at[n] for n in made.nodes if n.out.hint == name) < first


def test_sums_over_ranks_are_placed_anew(group: str) -> None:
    graph, inputs = programs.step(Sizes(batch=8, length=32, width=64, hidden=128), "switch", group)
    whole = with_sums(graph, group)
    made, said = run(whole, costs(group))
    assert said.seconds_after <= said.seconds_before
    sums = [n for n in made.nodes if n.op.name == REDUCE]
    assert len(sums) == sum(n.op.name == REDUCE for n in whole.nodes)
    for found, wanted in zip(interpret(made, inputs), interpret(whole, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)


def test_held_back_work_stays_where_it_is(group: str) -> None:
    graph, inputs = programs.step(Sizes(batch=8, length=32, width=64, hidden=128), "switch", group)
    _, said = run(graph, costs(group))
    first = next(names for names in said.beside if names)
    count = iter([True, True] + 99 * [False])  # the launches, and the first exchange that has work
    held: list[WeightsReport] = []
    ctx = Context(at="joint", costs=costs(group), report=held.append, allow=lambda *_: next(count))
    made = OverlapDW().run(graph, ctx)
    verify(made)
    assert [names for names in held[0].beside if names] == [first]
    assert sum(rule == "beside" and "held back" in str(why) for rule, _, why in ctx.log.refused) > 0
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)
    nothing = Context(at="joint", costs=costs(group), allow=lambda *_: False)
    assert OverlapDW().run(graph, nothing) is graph


def test_without_exchanges_or_figures_nothing_changes(group: str) -> None:
    graph, _ = programs.step(Sizes(), "switch", group)
    assert OverlapDW().run(graph, Context(at="joint")) is graph


def test_what_is_summed_over_ranks_is_computed_before_what_is_not(group: str) -> None:
    graph, inputs = programs.step(Sizes(batch=8, length=32, width=64, hidden=128, layers=1), "switch", group)
    builder = Builder(graph)
    for node in graph.nodes:
        builder.append(node)
    router = graph.outputs[3]  # the graph computes it behind the experts' gradients
    wait = builder.call(WAIT, builder.call(REDUCE, router, "sum", group))
    whole = asynchronous(builder.finish(outputs=tuple(wait if v is router else v for v in graph.outputs)))
    figures = costs(group, 1e-15)  # no wait is long enough for any work, so that all of it is left for the end
    order = _Filled(_Parts(whole, 1), set(Problem.of(whole, figures).nodes), figures, {}, early=False).run()
    at = {n: i for i, n in enumerate(order)}
    (started,) = [at[n] for n in order if n.op.name == REDUCE]
    experts = [n for n in order if n.op.name == "plait.expert_mm_weight.default"]
    assert len(experts) == 2
    assert all(at[n] > started for n in experts)
    made = rethreaded(whole, order)
    for found, wanted in zip(interpret(made, inputs), interpret(whole, inputs), strict=True):
        assert wanted is None or torch.equal(found, wanted)
