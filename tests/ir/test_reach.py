"""What waits for what in a graph; weight gradients apart from the rest of a backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from plait.compiler.debugging.interpret import interpret
from plait.ir import Graph, Value, from_fx
from plait.ir.reach import Reach, deferrable
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple


def layers(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return ((torch.relu(torch.tanh(x @ w1) @ w2) @ w3) ** 2).sum()


def joint(f: Callable[..., Tensor], *inputs: Tensor) -> Graph:
    return from_fx(aot_export_joint_simple(lambda *a: (f(*a),), list(inputs), trace_joint=True))


def gradients(graph: Graph, first: int = 2) -> list[Value]:
    """Results from the first weight's gradient on."""
    return [v for v in graph.outputs[first:] if isinstance(v, Value)]


INPUTS = tuple(torch.randn(8, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(4))


def test_independent_nodes_are_those_that_may_run_at_once() -> None:
    graph = joint(layers, *INPUTS)
    reach = Reach(graph)
    by = {node.out.hint: node for node in graph.nodes}
    assert reach.waits(by["relu"], by["mm"]) and not reach.waits(by["mm"], by["relu"])
    assert reach.waits(by["mm"], by["mm"]) and not reach.independent(by["mm"], by["mm"])
    assert reach.independent(by["mm_3"], by["mm_4"])  # dW and dX of one layer


def test_weight_gradients_are_what_the_rest_of_the_backward_does_not_need() -> None:
    graph = joint(layers, *INPUTS)
    later = deferrable(graph, Reach(graph), (), gradients(graph))
    assert [node.op.name for node in later if not node.op.has("view")] == ["aten.mm.default"] * 3
    assert not {node.out for node in later} & set(graph.outputs[:2])


def test_putting_them_off_to_the_end_changes_nothing() -> None:
    graph = joint(layers, *INPUTS)
    later = deferrable(graph, Reach(graph), (), gradients(graph))
    moved = graph.replace(nodes=(*(n for n in graph.nodes if n not in later), *later))
    inputs = (*(x.detach() for x in INPUTS), torch.ones(()))
    for found, wanted in zip(interpret(moved, inputs), interpret(graph, inputs), strict=True):
        assert torch.equal(found, wanted)


def test_without_an_input_gradient_only_what_waits_keeps_work_in_place() -> None:
    graph = joint(layers, INPUTS[0].detach(), *INPUTS[1:])
    reach = Reach(graph)
    everything = deferrable(graph, reach, (), gradients(graph, 1))
    chain = next(node for node in graph.nodes if node.op.name == "aten.tanh_backward.default")
    some = deferrable(graph, reach, (chain,), gradients(graph, 1))
    assert chain in everything and chain not in some
    assert set(everything) - set(some) == set(reach.needed([chain])) & set(everything)
