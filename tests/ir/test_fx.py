"""Between fx and graphs: what capture gives comes in, and everything runs again from there."""

import pytest
import torch
from plait.errors import CannotImport
from plait.ir import Graph, Node, TensorType, Value, from_fx, op, to_fx
from plait.ir.types import SymbolInfo, size_symbol
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers import check_graph, graph


def traced(fn, *args, mode="symbolic"):
    return from_fx(make_fx(fn, tracing_mode=mode)(*args), "f")


def test_types_come_from_the_capture_and_runs_agree():
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w).sum(-1, keepdim=True)

    x, w = torch.randn(3, 4), torch.randn(4, 5)
    made = traced(fn, x, w, mode="fake")
    check_graph(made)
    assert [str(v.type) for v in made.outputs] == ["f32[3,1]"]
    assert torch.equal(made.run(x, w)[0], fn(x, w))


def test_symbolic_sizes():
    def fn(x: torch.Tensor) -> torch.Tensor:
        n, m = x.shape
        return x.reshape(n * m).new_zeros(n + 1, m // 2) + x.sum()

    made = traced(fn, torch.randn(4, 6))
    check_graph(made)
    assert len(made.symbols) == 2 and all(i.low >= 2 and i.hint in (4, 6) for i in made.symbols.values())
    for shape in ((4, 6), (7, 3), (2, 9)):
        x = torch.randn(shape)
        assert torch.equal(made.run(x)[0], fn(x))


def test_ranges_of_symbols():
    batch = torch.export.Dim("batch", min=3, max=20)
    program = torch.export.export(nn.Linear(4, 5), (torch.randn(6, 4),), dynamic_shapes={"input": {0: batch}})
    made = from_fx(program.graph_module, "f")
    (info,) = made.symbols.values()
    assert (info.low, info.high, info.hint) == (3, 20, 6)


def test_writes_become_explicit():
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.ops.aten.add.Tensor(x, y)
        torch.ops.aten.copy_.default(x, z)
        return z

    made = from_fx(make_fx(fn, tracing_mode="fake")(torch.ones(3), torch.ones(3)), "f")
    check_graph(made)
    assert [i for i, _ in made.writes] == [0] and not any(n.op.has("mutates") for n in made.nodes)
    x = torch.ones(3)
    made.run(x, torch.ones(3))
    assert torch.equal(x, torch.full((3,), 2.0))


def test_constants_keep_their_tensor():
    w = torch.randn(3)
    gm = make_fx(lambda x: x * w, tracing_mode="real")(torch.ones(3))
    for node in gm.graph.nodes:
        if node.op != "output":
            node.meta["val"] = torch.ones(3)
    made = from_fx(gm, "f")
    check_graph(made)
    assert [t is w or torch.equal(t, w) for t in made.constants.values()] == [True]


def test_random_ops_are_ordered():
    made = traced(lambda x: torch.rand_like(x) + torch.rand_like(x), torch.ones(3), mode="fake")
    check_graph(made)
    first, second = (n for n in made.nodes if n.token is not None)
    assert second.after == (first.token,)
    torch.manual_seed(3)
    got = made.run(torch.ones(3))[0]
    torch.manual_seed(3)
    assert torch.equal(got, torch.rand(3) + torch.rand(3))


def test_attention_without_dropout_draws_nothing():
    def fn(q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    made = traced(fn, torch.randn(2, 2, 4, 8), mode="fake")
    assert all(n.token is None for n in made.nodes)


def test_regions_come_in_and_run():
    class Branch(nn.Module):
        def forward(self, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(p, lambda x: x.sin(), lambda x: x.cos(), (x,))

    program = torch.export.export(Branch(), (torch.tensor(True), torch.randn(3)))
    made = from_fx(program.graph_module, "f")
    check_graph(made)
    x = torch.randn(3)
    assert torch.equal(made.run(torch.tensor(True), x)[0], x.sin())
    assert torch.equal(made.run(torch.tensor(False), x)[0], x.cos())
    assert [n.op.name for n in made.nodes] == ["plait.cond"]


def test_training_graphs_come_in():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model(x).square().mean(),)

    gm, _ = aot_export_module(Loss(), (torch.randn(3, 4),), trace_joint=True, output_loss_index=0)
    check_graph(from_fx(gm, "joint"))


def test_user_lines_travel():
    made = traced(lambda x: torch.sin(x), torch.ones(3), mode="fake")
    node = graph('def f(x: "f32[3]"):\n    a = aten.neg.default(x)\n    return (a,)\n').nodes[0]
    assert node.loc.frame is None
    back = to_fx(made)
    assert [n.target for n in back.graph.nodes if n.op == "call_function"] == [torch.ops.aten.sin.default]


def test_what_has_no_form_is_refused():
    def python_call(x: torch.Tensor) -> torch.Tensor:
        return x

    g = torch.fx.Graph()
    x = g.placeholder("x")
    x.meta["val"] = torch.ones(3)
    called = g.call_function(python_call, (x,))
    called.meta["val"] = torch.ones(3)
    g.output((called,))
    with pytest.raises(
        CannotImport, match="cannot import call of python_call: it is neither an ATen op nor known control flow"
    ):
        from_fx(torch.fx.GraphModule(nn.Module(), g))
    g = torch.fx.Graph()
    x = g.placeholder("x")
    x.meta["val"] = torch.ones(3)
    g.output((g.call_method("sin", (x,)),))
    with pytest.raises(CannotImport, match="fx node call_method"):
        from_fx(torch.fx.GraphModule(nn.Module(), g))
    root = nn.Module()
    root.thing = "text"
    g = torch.fx.Graph()
    g.output((g.get_attr("thing"),))
    with pytest.raises(CannotImport, match="attribute thing: it is a str"):
        from_fx(torch.fx.GraphModule(root, g))


def test_a_size_that_nothing_carries_cannot_run():
    s0 = size_symbol("s0")
    made = graph('def f(x: "f32[2]"):\n    return (x,)\n')
    lost = made.replace(outputs=(2 * s0,), symbols={s0: SymbolInfo(2)})
    with pytest.raises(CannotImport, match="size s0: no input or node of the graph carries it"):
        lost.to_fx()


def test_python_numbers():
    made = graph(
        'def f(x: "float", y: "int"):\n    a = py.mul(x, 2.0)  # float\n    b = py.sqrt(a)  # float\n    return (b, a)\n'
    )
    assert made.run(2.0, 3) == (2.0, 4.0)
    assert op("py.add").has("scalar")


def test_inputs_of_one_name_are_told_apart():
    kind = TensorType((2,), torch.float32, "cpu", (1,))
    x, y = Value(kind, "x"), Value(kind, "x")
    r = Value(kind, "r")
    g = Graph("f", (x, y), (Node(op("aten.sub.Tensor"), (x, y, 1), (r,)),), (r,))
    (got,) = g.run(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0]))
    assert got.tolist() == [2.0, 3.0]
