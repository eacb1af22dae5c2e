"""Channels in another order, and layers cut in two: the same function, by other constants."""

from __future__ import annotations

import pytest
import torch
from plait.compiler.debugging.interpret import interpret
from plait.compiler.export import capture_model
from plait.ir import Graph, Reason, verify
from plait.passes.quantize.channels import Sunk, reordered, sink, split
from plait.passes.quantize.groups import Group, groups
from plait.passes.quantize.linears import linears
from torch import Tensor, nn


class Gated(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12, bias), nn.Linear(8, 12, bias), nn.Linear(12, 8, bias)
        self.gain = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.relu(self.gate(h)) * self.up(h) * self.gain)


def whole_numbers(model: nn.Module) -> nn.Module:
    """Weights that are small integers: sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()
    return model.eval()


def captured(model: nn.Module, x: Tensor) -> tuple[Graph, dict[str, Group]]:
    graph = capture_model(whole_numbers(model), (x,)).graph
    found = linears(graph)
    return graph, {one.name: group for group in groups(graph, found, found) for one in group.linears}


X = torch.randint(-3, 4, (2, 5, 8), generator=torch.Generator().manual_seed(1)).float()


def equal(graph: Graph, other: Graph, x: Tensor) -> bool:
    verify(other)
    return torch.equal(interpret(graph, [x])[0], interpret(other, [x])[0])


@pytest.mark.parametrize("bias", [True, False])
def test_an_order_sinks_through_elementwise_ops_into_the_layers_before(bias: bool) -> None:
    model = Gated(bias)
    model.norm = nn.Identity()  # type: ignore[assignment]
    graph, by_name = captured(model, X)
    way = sink(graph, by_name["down"])
    assert isinstance(way, Sunk)
    names = {"gate.weight", "up.weight", "gain"} | ({"gate.bias", "up.bias"} if bias else set())
    assert dict(way.axes) == dict.fromkeys(names, 0)
    other = reordered(graph, by_name["down"], torch.randperm(12, generator=torch.Generator().manual_seed(2)))
    assert equal(graph, other, X)
    assert [n.op.name for n in other.nodes] == [n.op.name for n in graph.nodes]  # nothing is left to do at run time
    assert not torch.equal(other.constants["down.weight"], graph.constants["down.weight"])


def test_behind_a_norm_a_gather_stays() -> None:
    graph, by_name = captured(Gated(), X)
    group = by_name["gate"]
    assert group is by_name["up"]
    way = sink(graph, group)
    assert isinstance(way, Reason) and "layer_norm" in way.why
    other = reordered(graph, group, torch.arange(7, -1, -1))
    verify(other)
    assert [n.op.name for n in other.nodes].count("aten.index_select.default") == 1
    torch.testing.assert_close(interpret(other, [X])[0], interpret(graph, [X])[0], rtol=1e-5, atol=1e-4)


def test_what_does_not_sink_says_why() -> None:
    class Read(Gated):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            a = nn.functional.relu(self.gate(x))
            return self.down(a), a.sum()

    graph, by_name = captured(Read(), X)
    way = sink(graph, by_name["down"])
    assert isinstance(way, Reason) and "sum" in way.why

    class Softmax(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(x).softmax(-1))

    way = sink(*(lambda g, b: (g, b["down"]))(*captured(Softmax(), X)))
    assert isinstance(way, Reason) and "softmax" in way.why

    class Shared(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(self.gate(x).relu()[..., :8]))

    way = sink(*(lambda g, b: (g, b["down"]))(*captured(Shared(), X)))
    assert isinstance(way, Reason) and "gate.weight is read elsewhere" in way.why

    graph, by_name = captured(nn.Sequential(nn.Linear(8, 8)), X)
    way = sink(graph, by_name["0"])
    assert isinstance(way, Reason) and "input" in way.why
    with pytest.raises(ValueError, match="gate"):
        g, b = captured(Shared(), X)
        reordered(g, b["gate"], torch.arange(8))


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_layer_is_the_sum_of_two(at: int) -> None:
    graph, _ = captured(Gated(), X)
    down = next(one for one in linears(graph) if one.name == "down")
    other = split(graph, down, at)
    verify(other)
    torch.testing.assert_close(interpret(other, [X])[0], interpret(graph, [X])[0], rtol=1e-5, atol=1e-4)
    cut = [one.columns for one in linears(other) if one.name.startswith("down.")]
    assert cut == [at, 12 - at]
    with pytest.raises(ValueError, match="down has 12 channels"):
        split(graph, down, 12)
