"""Linear layers and the groups that they form: who reads one value, where that comes together, and what they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plait.compiler.export import capture_model
from plait.errors import NoLayerMatches
from plait.ir import Graph
from plait.passes.quantize.groups import Group, groups
from plait.passes.quantize.linears import Linear, chosen, linears, matches
from torch import Tensor, nn
from torch.nn import functional as F

C = 8


class Net(nn.Module):
    """Parts by name, and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *xs: Any) -> Any:
        return self.run(self, *xs)


def linear(k: int = C, n: int = C) -> nn.Linear:
    return nn.Linear(k, n)


def graph_of(net: nn.Module, *inputs: Any) -> Graph:
    return capture_model(net.eval(), inputs or (torch.randn(2, 5, C),)).graph


def grouped(graph: Graph, *wanted: str) -> list[Group]:
    found = linears(graph)
    return groups(graph, found, [one for one in found if not wanted or one.name in wanted])


def names(layers: Any) -> list[str]:
    return [one.name for one in layers]


def ops(nodes: Any) -> list[str]:
    return [node.op.name.removeprefix("aten.").partition(".")[0] for node in nodes]


# -- groups and joins ---------------------------------------------------------------------------------------------------


def test_layers_that_read_one_value_meet_in_attention_and_are_judged_behind_what_reads_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.n(x)
        return m.o(F.scaled_dot_product_attention(m.q(y), m.k(y), m.v(y))) + x

    net = Net(run, n=nn.LayerNorm(C), q=linear(), k=linear(), v=linear(), o=linear())
    first, second = grouped(graph_of(net))
    assert names(first.linears) == ["q", "k", "v"] and names(second.linears) == ["o"]
    assert ops(first.nodes) == ["linear", "linear", "linear", "scaled_dot_product_attention", "linear"]
    assert first.join is first.nodes[-1].out and first.results == (first.join,) and first.end is first.nodes[-1]
    assert second.join is second.linears[0].node.out and second.nodes == (second.linears[0].node,)
    assert not first.others and not first.carriers


def test_gate_and_up_are_judged_behind_their_product_and_others_read_on() -> None:
    net = Net(
        lambda m, x: (lambda y: m.d(F.silu(m.g(y)) * m.u(y)) + y)(m.n(x)),
        n=nn.LayerNorm(C),
        g=linear(),
        u=linear(),
        d=linear(),
    )
    first, _ = grouped(graph_of(net))
    assert names(first.linears) == ["g", "u"] and ops(first.nodes) == ["linear", "silu", "linear", "mul", "linear"]
    assert ops(first.others) == ["add"]


def test_views_and_rows_by_index_carry_channels() -> None:
    index = torch.tensor([1, 3])
    net = Net(
        lambda m, x: m.a(x.view(-1, C)[index]) + m.b(x.reshape(-1, C).index_select(0, index)) + m.c(x[:, :1].squeeze(1)),
        a=linear(), b=linear(), c=linear(),
    )  # fmt: skip
    (group,) = grouped(graph_of(net))
    assert sorted(names(group.linears)) == ["a", "b", "c"] and group.x.tensor.shape == (2, 5, C)
    assert set(ops(group.carriers)) >= {"view", "index", "index_select"}


@pytest.mark.parametrize("how", ["transpose", "columns", "select", "cut"])
def test_what_moves_channels_carries_none(how: str) -> None:
    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "transpose": lambda x: x[:5, :5].transpose(0, 1),
        "columns": lambda x: x[:, torch.arange(C).flip(0)],
        "select": lambda x: x.index_select(-1, torch.arange(C).flip(0)),
        "cut": lambda x: x[..., :5],
    }
    move = moves[how]
    net = Net(lambda m, x: m.a(x) + m.b(move(x)).sum(), a=linear(), b=linear(5 if how in ("transpose", "cut") else C))
    found = grouped(graph_of(net, torch.randn(6, C)))
    assert [names(group.linears) for group in found] in ([["a"], ["b"]], [["b"], ["a"]])
    (of_a,) = [group for group in found if names(group.linears) == ["a"]]
    assert of_a.others


def test_a_join_that_something_else_reads_is_judged_itself() -> None:
    net = Net(lambda m, x: (lambda y: m.d(y) + y)(m.g(x) * m.u(x)), g=linear(), u=linear(), d=linear())
    first, _ = grouped(graph_of(net))
    assert names(first.linears) == ["g", "u"] and ops(first.nodes)[-1] == "mul"


def test_layers_without_a_join_are_judged_at_their_own_results() -> None:
    net = Net(lambda m, x: (m.a(x), m.b(x)), a=linear(), b=linear())
    (group,) = grouped(graph_of(net))
    assert group.join is None and group.results == tuple(one.node.out for one in group.linears)
    assert group.nodes == tuple(one.node for one in group.linears)


def test_a_join_behind_too_many_nodes_is_none() -> None:
    def run(m: Any, x: Tensor, steps: int) -> Tensor:
        a = m.a(x)
        for _ in range(steps):
            a = a.sin()
        return a + m.b(x)

    for steps, near in ((250, True), (260, False)):
        net = Net(lambda m, x, steps=steps: run(m, x, steps), a=linear(), b=linear())
        (group,) = grouped(graph_of(net))
        assert (group.join is not None) is near


def test_a_join_is_none_where_random_numbers_are_drawn_on_the_way() -> None:
    net = Net(lambda m, x: torch.bernoulli(m.a(x).sigmoid()) + m.b(x), a=linear(), b=linear())
    (group,) = grouped(graph_of(net))
    assert group.join is None


def test_a_layer_that_feeds_its_neighbour() -> None:
    net = Net(lambda m, x: m.a(x) * m.c(F.relu(m.b(x))), a=linear(), b=linear(), c=linear())
    first, second = grouped(graph_of(net))
    assert names(first.linears) == ["c"] and names(second.linears) == ["a", "b"]
    assert first.linears[0].node in second.nodes


def test_a_group_holds_all_layers_of_its_value_and_comes_for_one_that_is_wanted() -> None:
    net = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=linear(), b=linear(), c=linear())
    graph = graph_of(net)
    assert [names(group.linears) for group in grouped(graph, "a")] == [["a", "b"]]
    assert [names(group.linears) for group in grouped(graph, "c")] == [["c"]]


def test_a_reader_of_one_value_twice_is_another() -> None:
    net = Net(lambda m, x: F.linear(x, m.a.weight, x), a=linear())
    (group,) = grouped(graph_of(net, torch.randn(C)))
    assert names(group.linears) == ["a"]


# -- what is a layer ----------------------------------------------------------------------------------------------------


def test_products_that_are_layers() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        flat = x.view(-1, C)
        return m.a(flat) + flat @ m.w + flat @ m.u.t() + torch.addmm(m.h, flat, m.v) + torch.mm(flat, m.z.transpose(0, 1))

    net = Net(
        run,
        a=linear(),
        **{n: nn.Parameter(torch.randn(C, 6 if n == "h" else C)) for n in "wuvz"},
        h=nn.Parameter(torch.randn(C)),
    )
    found = {one.name: one for one in linears(graph_of(net))}
    assert {name: one.turned for name, one in found.items()} == {"a": False, "w": True, "u": False, "v": True, "z": False}
    assert found["v"].bias is not None and found["a"].bias is not None and found["w"].bias is None


def test_products_that_are_none() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        flat = x.view(-1, C)
        return (
            torch.addmm(m.h, flat, m.v, beta=2) + torch.addmm(m.h, flat, m.v, alpha=2) + torch.addmm(m.g, flat, m.v)
            + flat @ flat.t() @ flat + (flat @ m.h)[:, None] + flat @ m.v.tanh() + flat @ m.b[0] + flat @ m.i.float()
        ).sum()  # fmt: skip

    parts = {"h": (C,), "v": (C, C), "g": (10, C), "b": (2, C, C)}
    net = Net(run, **{n: nn.Parameter(torch.randn(*s)) for n, s in parts.items()})
    net.register_buffer("i", torch.ones(C, C, dtype=torch.int64))
    assert linears(graph_of(net)) == []


def test_rows_and_columns() -> None:
    net = Net(lambda m, x: m.a(x).view(-1, 3) @ m.w, a=linear(C, 3), w=nn.Parameter(torch.randn(3, 5)))
    a, w = linears(graph_of(net))
    assert (a.rows, a.columns, w.rows, w.columns) == (3, C, 5, 3)


def test_layers_in_branches_are_no_layers_of_the_graph() -> None:
    net = Net(
        lambda m, x: torch.cond(x.sum() > 0, lambda t: m.a(t), lambda t: m.b(t) * 2, (m.c(x),)),
        a=linear(),
        b=linear(),
        c=linear(),
    )
    assert names(linears(graph_of(net))) == ["c"]


# -- names --------------------------------------------------------------------------------------------------------------


def test_weights_of_one_module_have_names_of_their_own() -> None:
    inner = Net(
        lambda m, x: x.view(-1, C) @ m.first @ m.second,
        first=nn.Parameter(torch.randn(C, C)),
        second=nn.Parameter(torch.randn(C, C)),
    )
    net = Net(lambda m, x: m.ffn(x), ffn=inner)
    assert names(linears(graph_of(net))) == ["ffn.first", "ffn.second"]


def test_weights_read_twice_by_one_module_have_names_of_their_own() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        flat = x.view(-1, C)
        return flat @ m.first + flat @ m.second + torch.cat([m.first, m.second]).sum()

    inner = Net(run, first=nn.Parameter(torch.randn(C, C)), second=nn.Parameter(torch.randn(C, C)))
    found = linears(graph_of(Net(lambda m, x: m.ffn(x), ffn=inner)))
    assert len(set(names(found))) == 2


def test_a_module_that_is_called_twice_has_one_name() -> None:
    net = Net(lambda m, x: m.inner.a(m.inner.a(x)), inner=nn.ModuleDict({"a": linear()}))
    assert names(linears(graph_of(net))) == ["inner.a", "inner.a"]


def test_modules_that_share_a_weight_have_their_own_names() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=linear(), b=linear())
    net.b.weight = net.a.weight
    assert names(linears(graph_of(net))) == ["a", "b"]


def test_a_head_that_is_tied_to_an_embedding_has_its_own_name() -> None:
    net = Net(lambda m, i: m.lm_head(m.embed(i)), embed=nn.Embedding(C, C), lm_head=nn.Linear(C, C, bias=False))
    net.lm_head.weight = net.embed.weight
    assert names(linears(graph_of(net, torch.arange(C)))) == ["lm_head"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("Linear", True),
        ("model.layers.0.mlp.gate", True),
        ("mlp.gate", True),
        ("gate", True),
        ("ate", False),
        ("mlp", False),
        ("model.layers.0", False),
        ("re:.*gate$", True),
        ("re:model", True),
        ("re:gate", False),
        ("re:.*[.]1[.]", False),
    ],
)
def test_patterns(pattern: str, expected: bool) -> None:
    assert matches("model.layers.0.mlp.gate", (pattern,)) is expected
    assert matches("model.layers.0.mlp.gate", ("nothing", pattern)) is expected
    assert not matches("model.layers.0.mlp.gate", ())


def layers_of_two() -> list[Linear]:
    net = Net(lambda m, x: m.head(m.inner.a(x)), inner=nn.ModuleDict({"a": linear()}), head=linear())
    return linears(graph_of(net))


def test_targets_without_what_is_ignored() -> None:
    found = layers_of_two()
    assert names(chosen(found, ("Linear",), ())) == ["inner.a", "head"]
    assert names(chosen(found, ("Linear",), ("head", "nothing"))) == ["inner.a"]
    assert names(chosen(found, ("a", "re:he"), ())) == ["inner.a", "head"]


@pytest.mark.parametrize(
    ("targets", "ignore"), [(("q_proj",), ()), (("head", "q_proj"), ()), (("Linear",), ("re:.*",)), ((), ())]
)
def test_nothing_that_matches(targets: tuple[str, ...], ignore: tuple[str, ...]) -> None:
    with pytest.raises(NoLayerMatches, match=r"inner\.a, head"):
        chosen(layers_of_two(), targets, ignore)


def test_a_model_without_layers() -> None:
    with pytest.raises(NoLayerMatches, match="it has no linear layer"):
        chosen(linears(graph_of(Net(lambda m, x: x.sin()))), ("Linear",), ())


def test_a_long_list_of_names_is_cut() -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Sequential(*(linear() for _ in range(11))))
    with pytest.raises(NoLayerMatches, match="and 3 more"):
        chosen(linears(graph_of(net)), ("q_proj",), ())
