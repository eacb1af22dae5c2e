"""Factors of channels move into constants where that keeps the function, and nowhere else.

Each model is captured in float64. A route found for a group of layers is applied with random positive factors, equal within
its classes: the constants that it names are divided, the columns of the layers multiplied. What the graph computes must not
change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from plait.compiler.debugging.interpret import interpret_wide
from plait.compiler.export import capture_model
from plait.ir import Builder, Graph, Reason, prune
from plait.passes.quantize.groups import Group, groups
from plait.passes.quantize.linears import Linear, linears
from plait.passes.quantize.routes import NONE, Edit, Route, input_route
from torch import Tensor, nn
from torch.nn import functional as F

C = 8
SEED = 5


def graph_of(model: nn.Module, *inputs: Any, dynamic_shapes: Any = None) -> Graph:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5)
    return capture_model(model.double().eval(), inputs, dynamic_shapes).graph


def routes(graph: Graph, ignore: tuple[str, ...] = ()) -> dict[str, tuple[Group, Route | Reason]]:
    """The route of each group, by the name of each of its layers."""
    found = linears(graph)
    wanted = [one for one in found if one.name not in ignore]
    made = [(group, input_route(graph, group, frozenset(wanted))) for group in groups(graph, found, wanted)]
    return {one.name: pair for pair in made for one in pair[0].linears}


def scaled(graph: Graph, group: Group, route: Route, held: frozenset[Linear], factors: Tensor) -> Graph:
    """The graph with the input of a group divided by factors on the route, and the columns of its layers multiplied: layers
    of `held` get weights of their own."""
    builder, columns = Builder(graph), torch.arange(len(factors))
    edits = [e.inverse() for e in route.edits]
    edits += [
        Edit(str(one.constant), columns[:, None] if one.turned else columns) for one in group.linears if one not in held
    ]
    for edit in edits:
        before = builder.constants[edit.constant]
        builder.constants[edit.constant] = edit.apply(before, factors)
        assert builder.constants[edit.constant].shape == before.shape
    own = {one.node: one for one in group.linears if one in held}
    for old in graph.nodes:
        node, one = builder.resolved(old), own.get(old)
        if one is None:
            builder.append(node)
            continue
        weight = builder.constants[str(one.constant)]
        weight = (weight.t() if one.turned else weight) * factors
        bias = builder.resolve(one.bias)
        builder.subst[old.out] = builder.call("aten.linear.default", builder.resolve(one.x), builder.constant(weight), bias)
    return prune(builder.finish())


def keeps_the_function(graph: Graph, inputs: tuple[Any, ...], ignore: tuple[str, ...] = ()) -> dict[str, Route | Reason]:
    """Check each route that was found on the inputs; the routes and reasons."""
    torch.manual_seed(SEED)
    expected = interpret_wide(graph, inputs)
    found = routes(graph, ignore)
    held = frozenset(one for group, _ in found.values() for one in group.linears if one.name not in ignore)
    for group, route in dict.fromkeys(found.values()):
        if isinstance(route, Route):
            factors = route.tied(torch.rand(len(route.classes), dtype=torch.float64) * 3 + 0.2)
            for got, want in zip(interpret_wide(scaled(graph, group, route, held, factors), inputs), expected, strict=True):
                if want.is_floating_point():
                    error = (got - want).abs().max() / want.abs().max()
                    assert error < 1e-12, f"seed {SEED}: {[one.name for one in group.linears]}: {error:.1e}"
                else:
                    assert torch.equal(got, want)
    return {name: route for name, (_, route) in found.items()}


def edited(route: Route | Reason) -> set[str]:
    """The constants that a route changes; fails with the reason where there is none."""
    assert isinstance(route, Route), route.why
    return {edit.constant for edit in route.edits}


def why(route: Route | Reason) -> str:
    assert isinstance(route, Reason), [edit.constant for edit in route.edits]
    return route.why


class Net(nn.Module):
    """Parts by name, and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.run = run

    def forward(self, *xs: Any) -> Any:
        return self.run(self, *xs)


def linear(k: int = C, n: int = C, bias: bool = True) -> nn.Linear:
    return nn.Linear(k, n, bias=bias)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape) + 0.5)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, C)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rms(m: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.g


def cast_rms(m: Any, x: Tensor) -> Tensor:
    wide = x.float()
    return m.g * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Conv1D(nn.Module):
    """GPT-2's layer: weight [K, N]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.n, self.weight, self.bias = n, nn.Parameter(torch.randn(k, n)), parameter(n)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.n)


def two() -> dict[str, nn.Module]:
    return {"a": linear(), "b": linear()}


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, own: int, how: str) -> Tensor:
    """Attention of q [B, T, H D] with k and v [B, T, own D]; `how` heads that share values get them."""
    d = q.shape[-1] // heads
    q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))
    if how == "repeat":
        k, v = (t.repeat_interleave(heads // own, 1) for t in (k, v))
    elif how == "expand":
        k, v = (t[:, :, None].expand(-1, -1, heads // own, -1, -1).reshape(q.shape[0], heads, -1, d) for t in (k, v))
    elif how == "written":
        k, v = (t[:, :, None].expand(-1, -1, heads // own, -1, -1).reshape(q.shape[0], heads, -1, d) for t in (k, v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=how == "gqa" and heads != own)
    return y.transpose(1, 2).flatten(2)


def grouped(heads: int, own: int, how: str) -> Net:
    return Net(
        lambda m, x: m.o(attend(m.q(x), m.k(x), m.v(x), heads, own, how)),
        q=linear(C, 2 * heads), k=linear(C, 2 * own), v=linear(C, 2 * own), o=linear(2 * heads, C),
    )  # fmt: skip


def fused(how: str) -> Net:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.qkv(x)
        if how == "slice":
            q, k, v = y[..., :C], y[..., C : 2 * C], y[..., 2 * C :]
        elif how == "negative":
            q, k, v = y[..., -5 * C : C], y[..., C : 2 * C], y[..., -C:]
        elif how == "sizes":
            q, k, v = y.split([C, C, C], -1)
        else:
            q, k, v = y.split(C, -1) if how == "split" else y.chunk(3, -1)
        return m.o(attend(q, k, v, 4, 4, "gqa"))

    return Net(run, qkv=linear(C, 3 * C), o=linear())


# name: (model, the layers whose inputs are scaled, with the constants that change for each)
MOVES: dict[str, tuple[Callable[[], nn.Module], Mapping[str, set[str]]]] = {
    "layer norm": (
        lambda: Net(lambda m, x: (lambda y: m.a(y) * m.b(y))(m.n(x)), n=nn.LayerNorm(C), **two()),
        {"a": {"n.weight", "n.bias"}, "b": {"n.weight", "n.bias"}},
    ),
    "layer norm without bias": (
        lambda: Net(lambda m, x: m.a(m.n(x)), n=nn.LayerNorm(C, bias=False), a=linear()),
        {"a": {"n.weight"}},
    ),
    "native layer norm": (
        lambda: Net(
            lambda m, x: m.a(torch.native_layer_norm(x, [C], m.g, m.h, 1e-5)[0]), g=parameter(C), h=parameter(C), a=linear()
        ),
        {"a": {"g", "h"}},
    ),
    "rms norm": (lambda: Net(lambda m, x: m.a(m.n(x)), n=nn.RMSNorm(C), a=linear()), {"a": {"n.weight"}}),
    "rms norm written out": (lambda: Net(lambda m, x: m.a(rms(m, x)), g=parameter(C), a=linear()), {"a": {"g"}}),
    "rms norm with casts": (lambda: Net(lambda m, x: m.a(cast_rms(m, x)), g=parameter(C), a=linear()), {"a": {"g"}}),
    "gemma": (
        lambda: Net(lambda m, x: m.a(F.rms_norm(x, [C]) * (1.0 + m.g.float()).type_as(x)), g=parameter(C), a=linear()),
        {"a": {"g"}},
    ),
    "linear": (lambda: Net(lambda m, x: m.b(m.a(x)), **two()), {"b": {"a.weight", "a.bias"}}),
    "linear without bias": (lambda: Net(lambda m, x: m.b(m.a(x)), a=linear(bias=False), b=linear()), {"b": {"a.weight"}}),
    "addmm": (lambda: Net(lambda m, x: m.b(m.a(x)), a=Conv1D(C, 6), b=Conv1D(6, C)), {"b": {"a.weight", "a.bias"}}),
    "mm": (lambda: Net(lambda m, x: x.view(-1, C) @ m.w @ m.v, w=parameter(C, C), v=parameter(C, C)), {"v": {"w"}}),
    "mm of transposed weights": (
        lambda: Net(lambda m, x: x.view(-1, C) @ m.w.t() @ m.v.transpose(0, 1), w=parameter(6, C), v=parameter(C, 6)),
        {"v": {"w"}},
    ),
    "matmul of batched weights": (
        lambda: Net(lambda m, x: m.a(x @ m.w), w=nn.Parameter(torch.randn(1, C, C)), a=linear()),
        {"a": {"w"}},
    ),
    "matmul of permuted weights": (
        lambda: Net(lambda m, x: m.a(x[:, None] @ m.w.permute(1, 2, 0)), w=nn.Parameter(torch.randn(C, C, C)), a=linear()),
        {"a": {"w"}},
    ),
    "split": (lambda: fused("split"), {"o": {"qkv.weight", "qkv.bias"}}),
    "chunk": (lambda: fused("chunk"), {"o": {"qkv.weight", "qkv.bias"}}),
    "split by sizes": (lambda: fused("sizes"), {"o": {"qkv.weight", "qkv.bias"}}),
    "slice": (lambda: fused("slice"), {"o": {"qkv.weight", "qkv.bias"}}),
    "slice from the end": (lambda: fused("negative"), {"o": {"qkv.weight", "qkv.bias"}}),
    "attention": (lambda: grouped(4, 4, "gqa"), {"o": {"v.weight", "v.bias"}}),
    "enable_gqa": (lambda: grouped(4, 2, "gqa"), {"o": {"v.weight", "v.bias"}}),
    "expand": (lambda: grouped(4, 2, "expand"), {"o": {"v.weight", "v.bias"}}),
    "multi-query": (lambda: grouped(4, 1, "expand"), {"o": {"v.weight", "v.bias"}}),
    "gate and up": (
        lambda: Net(lambda m, x: m.d(F.silu(m.g(x)) * m.u(x)), g=linear(C, 12), u=linear(C, 12), d=linear(12, C)),
        {"d": {"u.weight", "u.bias"}},
    ),
    "gate and up, fused": (
        lambda: Net(
            lambda m, x: (lambda g, u: m.d(F.silu(g) * u))(*m.gu(x).chunk(2, -1)), gu=linear(C, 24), d=linear(12, C)
        ),
        {"d": {"gu.weight", "gu.bias"}},
    ),
    "relu": (lambda: Net(lambda m, x: m.b(F.relu(-m.a(x))), **two()), {"b": {"a.weight", "a.bias"}}),
    "sum of two layers": (
        lambda: Net(lambda m, x: m.c(m.a(x) + m.b(x)), c=linear(), **two()),
        {"c": {"a.weight", "a.bias", "b.weight", "b.bias"}},
    ),
    "sum of two pieces": (
        lambda: Net(lambda m, x: (lambda g, u: m.b(g + u))(*m.a(x).chunk(2, -1)), a=linear(C, 12), b=linear(6, C)),
        {"b": {"a.weight", "a.bias"}},
    ),
    "quotient": (
        lambda: Net(lambda m, x: m.b(m.a(x) / (1 + x.abs().sum(-1, keepdim=True)) / 3), **two()),
        {"b": {"a.weight", "a.bias"}},
    ),
    "constant by a value": (lambda: Net(lambda m, x: m.a(m.g / (1 + x.abs())), g=parameter(C), a=linear()), {"a": {"g"}}),
    "product with a constant": (lambda: Net(lambda m, x: m.a(x.tanh() * m.g), g=parameter(C), a=linear()), {"a": {"g"}}),
    "views that merge and cut axes": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).view(2, 5, 3, 4).view(10, 3, 2, 2).transpose(1, 2).flatten(1)),
            a=linear(C, 12),
            b=linear(12, C),
        ),
        {"b": {"a.weight", "a.bias"}},
    ),
    "casts": (
        lambda: Net(lambda m, x: m.b(m.a(x).to(torch.float64).contiguous().clone()), **two()),
        {"b": {"a.weight", "a.bias"}},
    ),
    "dropout": (
        lambda: Net(lambda m, x: m.b(F.dropout(m.a(x), 0.5, training=False)), **two()),
        {"b": {"a.weight", "a.bias"}},
    ),
    "merged rows": (
        lambda: Net(lambda m, x: m.b(m.a(x.view(-1, C)).view(*x.shape[:2], 2, 4).flatten(0, 1).flatten(1)), **two()),
        {"b": {"a.weight", "a.bias"}},
    ),
    "repeat_interleave": (lambda: grouped(4, 2, "repeat"), {"o": {"v.weight", "v.bias"}}),
    "attention written out": (lambda: grouped(4, 2, "written"), {"o": {"v.weight", "v.bias"}}),
    "a product of batches": (
        lambda: Net(lambda m, x: m.b(torch.bmm(x.softmax(1).transpose(1, 2), m.a(x))), **two()),
        {"b": {"a.weight", "a.bias"}},
    ),
    "a product with a row": (lambda: Net(lambda m, x: m.a(x[0, 0] @ m.w), w=parameter(C, C), a=linear()), {"a": {"w"}}),
    "rows by index": (
        lambda: Net(lambda m, x: m.b(m.a(x).view(-1, C)[torch.tensor([3, 0, 3])]), **two()),
        {"b": {"a.weight", "a.bias"}},
    ),
    "bias of every row": (
        lambda: Net(
            lambda m, x: m.a(torch.addmm(m.h, x.view(-1, C), m.w)), h=parameter(10, C), w=parameter(C, C), a=linear()
        ),
        {"a": {"h", "w"}},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_factors_move_into_constants(name: str) -> None:
    torch.manual_seed(SEED)
    make, wanted = MOVES[name]
    graph = graph_of(make(), x_of())
    found = keeps_the_function(graph, (x_of(),))
    assert {layer: edited(found[layer]) for layer in wanted} == wanted


def embedding_tied() -> nn.Module:
    net = Net(lambda m, i: m.b(m.a(m.e(i))), e=nn.Embedding(C, C), a=linear(bias=False), b=linear())
    net.a.weight = net.e.weight
    return net


def shared_norm() -> nn.Module:
    return Net(lambda m, x: m.a(m.n(x)) + m.b(m.n(x + 1)), n=nn.LayerNorm(C), **two())


# name: (model, the layer whose input cannot be scaled, part of the reason)
STAYS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "an input": (lambda: Net(lambda m, x: m.a(x), a=linear()), "a", "is an input of the graph"),
    "a result": (lambda: Net(lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), **two()), "b", "is a result of the graph"),
    "a view of it is a result": (
        lambda: Net(lambda m, x: (lambda y: (m.b(y), y))(m.a(x).view(-1, C)), **two()),
        "b",
        "is a result of the graph",
    ),
    "a result further up": (
        lambda: Net(lambda m, x: (lambda y: (m.b(y.relu()), y))(m.a(x)), **two()),
        "b",
        "is a result of the graph",
    ),
    "something else reads it": (
        lambda: Net(lambda m, x: (lambda y: m.b(y) + y)(m.a(x)), **two()),
        "b",
        "aten.add.Tensor reads",
    ),
    "something else reads it further up": (
        lambda: Net(lambda m, x: (lambda y: m.b(y.relu()) + y)(m.a(x)), **two()),
        "b",
        "aten.add.Tensor reads",
    ),
    "a norm used twice": (shared_norm, "a", "is read elsewhere too"),
    "a norm's weight read elsewhere": (
        lambda: Net(lambda m, x: m.a(m.n(x)) * m.n.weight, n=nn.LayerNorm(C), a=linear()),
        "a",
        "is read elsewhere too",
    ),
    "a norm's weight is a result": (
        lambda: Net(lambda m, x: (m.a(F.rms_norm(x, [C]) * m.g), m.g), g=torch.rand(C), a=linear()),
        "a",
        "is a result",
    ),
    "1 + w is a result": (
        lambda: Net(lambda m, x: (lambda g: (m.a(F.rms_norm(x, [C]) * g), g))(1 + m.g), g=torch.rand(C), a=linear()),
        "a",
        "is a result",
    ),
    "1 + w is read elsewhere": (
        lambda: Net(lambda m, x: (lambda g: m.a(F.rms_norm(x, [C]) * g) * g)(1 + m.g), g=torch.rand(C), a=linear()),
        "a",
        "is read elsewhere too",
    ),
    "a weight tied to an embedding": (embedding_tied, "b", "is read elsewhere too"),
    "a weight used twice": (
        lambda: Net(lambda m, x: m.b(m.a(x)) + m.a(x + 1), **two()),
        "b",
        "is read elsewhere too",
    ),
    "weight and bias of a norm are one": (
        lambda: Net(lambda m, x: m.a(F.layer_norm(x, [C], m.g, m.g)), g=parameter(C), a=linear()),
        "a",
        "twice",
    ),
    "a norm without a weight": (
        lambda: Net(lambda m, x: m.a(F.layer_norm(x, [C])), a=linear()),
        "a",
        "has no weight for each channel",
    ),
    "a norm over two axes": (
        lambda: Net(lambda m, x: m.a(m.n(x)), n=nn.LayerNorm([5, C]), a=linear()),
        "a",
        "has no weight for each channel",
    ),
    "a norm's weight comes in": (
        lambda: Net(lambda m, x: m.a(F.rms_norm(x, [C], x[0, 0].abs())), a=linear()),
        "a",
        "is no constant",
    ),
    "the mean of a norm": (
        lambda: Net(
            lambda m, x: m.a(torch.native_layer_norm(x, [C], m.g, m.g, 1e-5)[1].expand(-1, -1, C)),
            g=parameter(C),
            a=linear(),
        ),
        "a",
        "not the first result",
    ),
    "channels of a norm are rows": (
        lambda: Net(lambda m, x: m.a(m.n(x).transpose(1, 2)), n=nn.LayerNorm(C), a=linear(5)),
        "a",
        "vary between rows of a norm",
    ),
    "channels of a product are rows": (
        lambda: Net(lambda m, x: m.b(m.a(x).transpose(1, 2)), a=linear(), b=linear(5)),
        "b",
        "vary between rows of a product",
    ),
    "a product with a vector": (
        lambda: Net(lambda m, x: m.a(x.reshape(10, C)[:C] @ m.w), w=parameter(C), a=linear()),
        "a",
        "a product with a vector",
    ),
    "a layer with one result": (
        lambda: Net(lambda m, x: m.a(F.linear(x.reshape(10, C)[:C], m.w)), w=parameter(C), a=linear()),
        "a",
        "a product with a vector",
    ),
    "a weight that is computed": (
        lambda: Net(lambda m, x: m.a(x.view(-1, C) @ m.w.tanh()), w=parameter(C, C), a=linear()),
        "a",
        "a constant behind aten.tanh",
    ),
    "a weight from outside": (lambda: Net(lambda m, x: m.a(F.linear(x, x[0, 0].diag())), a=linear()), "a", "aten.diag"),
    "values that differ between batches": (
        lambda: Net(lambda m, x: m.b((x @ m.a(x.view(-1, C)[:C])).transpose(0, 1).flatten(1)), a=linear(C, 6), b=linear(12)),
        "b",
        "is broadcast",
    ),
    "repetition along the channels": (
        lambda: Net(lambda m, x: m.b(m.a(x).repeat_interleave(2)[:C]), **two()),
        "b",
        "a repetition",
    ),
    "a scaled bias": (
        lambda: Net(
            lambda m, x: m.a(torch.addmm(m.h, x.view(-1, C), m.w, beta=2)), h=parameter(C), w=parameter(C, C), a=linear()
        ),
        "a",
        "a scaled bias",
    ),
    "a bias that is broadcast": (
        lambda: Net(lambda m, x: m.a(torch.addmm(m.h, x.view(-1, C), m.w)), h=parameter(1), w=parameter(C, C), a=linear()),
        "a",
        "is broadcast along an axis",
    ),
    "a function that is not homogeneous": (
        lambda: Net(lambda m, x: m.b(m.a(x).tanh()), **two()),
        "b",
        "aten.tanh.default does not pass on",
    ),
    "a square": (lambda: Net(lambda m, x: (lambda y: m.b(y * y))(m.a(x)), **two()), "b", "twice"),
    "a value by itself": (lambda: Net(lambda m, x: (lambda y: m.b(y / y))(m.a(x)), **two()), "b", "twice"),
    "a value and itself": (lambda: Net(lambda m, x: (lambda y: m.b(torch.add(y, y)))(m.a(x)), **two()), "b", "twice"),
    "a number by a value": (lambda: Net(lambda m, x: m.b(2 / m.a(x)), **two()), "b", "does not pass on"),
    "a broadcast value by another": (
        lambda: Net(lambda m, x: m.b(m.a(x)[..., :1] / (1 + x.abs())), **two()),
        "b",
        "is broadcast along an axis",
    ),
    "a factor that is broadcast": (
        lambda: Net(lambda m, x: m.a(x.tanh() * m.g), g=parameter(1), a=linear()),
        "a",
        "does not pass on",
    ),
    "a residual": (lambda: Net(lambda m, x: m.b(m.a(x.tanh()) + x.tanh()), **two()), "b", "aten.tanh"),
    "a weighted sum": (
        lambda: Net(lambda m, x: m.c(torch.add(m.a(x), m.b(x), alpha=2)), c=linear(), **two()),
        "c",
        "aten.add.Tensor does not pass on",
    ),
    "a sum with a number": (lambda: Net(lambda m, x: m.b(m.a(x) + 1), **two()), "b", "aten.add.Tensor does not pass on"),
    "a stride": (lambda: Net(lambda m, x: m.b(m.a(x)[..., ::2]), a=linear(C, 12), b=linear(6)), "b", "a stride"),
    "a piece along another axis": (
        lambda: Net(lambda m, x: (lambda y: m.b(y[:, :3].tanh()) + m.c(y[:, 2:].relu()))(m.a(x)), c=linear(), **two()),
        "c",
        "a piece of the axis 1",
    ),
    "a piece of an axis along which factors are the same": (
        lambda: Net(lambda m, x: m.b(m.a(x)[:, :3].relu()), **two()),
        "b",
        "along which factors are the same",
    ),
    "scaled channels meet others": (
        lambda: Net(lambda m, x: m.b((lambda y: torch.cat([y, x], -1))(m.a(x))), a=linear(), b=linear(2 * C)),
        "b",
        "aten.cat.default does not pass on",
    ),
    "columns by index": (
        lambda: Net(lambda m, x: m.b(m.n(x).view(-1, C)[:, torch.arange(C).flip(0)]), n=nn.LayerNorm(C), b=linear()),
        "b",
        "aten.index",
    ),
    "columns by index_select": (
        lambda: Net(
            lambda m, x: m.b(m.n(x).view(-1, C).index_select(1, torch.arange(C).flip(0))), n=nn.LayerNorm(C), b=linear()
        ),
        "b",
        "aten.index",
    ),
    "elements by index": (
        lambda: Net(
            lambda m, x: m.b(m.n(x).view(-1, C)[torch.arange(C), torch.arange(C).flip(0)]), n=nn.LayerNorm(C), b=linear()
        ),
        "b",
        "aten.index",
    ),
    "a cast to integers": (
        lambda: Net(lambda m, x: m.b((m.a(x) * 10).to(torch.int64).to(torch.float64)), **two()),
        "b",
        "holds no floats",
    ),
    "values that are queries too": (
        lambda: Net(lambda m, x: (lambda y: m.b(F.scaled_dot_product_attention(y, x, y)))(m.a(x)), **two()),
        "b",
        "twice",
    ),
    "values broadcast to heads": (
        lambda: Net(
            lambda m, x: m.b(
                F.scaled_dot_product_attention(x[:, None].expand(-1, 2, -1, -1), x[:, None], m.a(x)[:, None])
                .transpose(1, 2)
                .flatten(2)
            ),
            a=linear(),
            b=linear(2 * C),
        ),
        "b",
        "",
    ),
    "attention whose rows are channels": (
        lambda: Net(lambda m, x: m.b(F.scaled_dot_product_attention(x, x, m.a(x)).transpose(1, 2)), a=linear(), b=linear(5)),
        "b",
        "vary along attention's rows",
    ),
    "an input that is its own bias": (
        lambda: Net(lambda m, x: (lambda y: F.linear(y, m.b.weight, y))(m.a(x[0, 0])), **two()),
        "b",
        "twice",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_factors_stay_where_they_would_change_something(name: str) -> None:
    torch.manual_seed(SEED)
    make, layer, reason = STAYS[name]
    x = torch.arange(C) if name == "a weight tied to an embedding" else x_of()
    found = keeps_the_function(graph_of(make(), x), (x,))
    assert reason in why(found[layer])


def classes(route: Route | Reason) -> list[int]:
    assert isinstance(route, Route), route.why
    return route.classes.tolist()


@pytest.mark.parametrize("how", ["gqa", "expand", "repeat", "written"])
def test_heads_that_share_values_share_their_factors(how: str) -> None:
    graph = graph_of(grouped(4, 2, how), x_of())
    assert classes(keeps_the_function(graph, (x_of(),))["o"]) == [0, 1, 0, 1, 2, 3, 2, 3]


def test_one_factor_where_a_value_is_spread_over_the_channels() -> None:
    net = Net(lambda m, x: m.b(m.a(x).expand(-1, -1, C)), a=linear(C, 1), b=linear())
    assert classes(keeps_the_function(graph_of(net, x_of()), (x_of(),))["b"]) == [0] * C


def test_a_layer_that_stays_float_takes_part() -> None:
    net = Net(lambda m, x: (lambda y: m.a(y) * m.b(y))(m.n(x)), n=nn.LayerNorm(C), **two())
    assert edited(keeps_the_function(graph_of(net, x_of()), (x_of(),), ignore=("b",))["a"]) == {"n.weight", "n.bias"}


@pytest.mark.parametrize("how", ["layer", "transposed", "result"])
def test_a_float_layer_whose_weight_is_not_its_own_keeps_its_input(how: str) -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.n(x)
        if how == "result":
            return m.a(y) + m.b(y), m.b.weight
        if how == "transposed":
            w = m.b.weight.t()
            return m.a(y) + y @ w + x @ w
        return m.a(y) + m.b(y) + m.b(x)

    graph = graph_of(Net(run, n=nn.LayerNorm(C), **two()), x_of())
    assert "a weight that is not its own" in why(keeps_the_function(graph, (x_of(),), ignore=("b", ""))["a"])


@pytest.mark.parametrize(
    "name", ["split", "slice", "expand", "multi-query", "merged rows", "gate and up, fused", "rms norm written out"]
)
def test_sizes_may_be_symbolic(name: str) -> None:
    make, wanted = MOVES[name]
    sizes = {0: torch.export.Dim("b"), 1: torch.export.Dim("t")}
    graph = graph_of(make(), x_of(), dynamic_shapes={"xs": (sizes,)})
    assert not graph.inputs[0].tensor.is_static
    found = keeps_the_function(graph, (x_of(3, 7, C),))
    assert {layer: edited(found[layer]) for layer in wanted} == wanted


def test_a_size_of_channels_must_be_known() -> None:
    net = Net(lambda m, x: m.b(m.a(x).transpose(0, 1).relu()), a=linear(), b=linear(4))
    graph = graph_of(net, x_of(4, C))
    assert isinstance(keeps_the_function(graph, (x_of(4, C),))["b"], Reason)


def test_an_edit_leaves_elements_without_a_factor() -> None:
    edit = Edit("w", torch.tensor([0, NONE, 1]), offset=1.0)
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert edit.apply(w, torch.tensor([2.0, 4.0])).tolist() == [3.0, 2.0, 15.0]
    assert edit.inverse().apply(edit.apply(w, torch.tensor([2.0, 4.0])), torch.tensor([2.0, 4.0])).tolist() == w.tolist()


# -- models of other people ---------------------------------------------------------------------------------------------


def tiny(kind: str) -> tuple[nn.Module, dict[str, set[str]]]:
    """A model of transformers with random weights, and the constants that change for some of its layers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=4, n_positions=12)
        model = transformers.GPT2LMHeadModel(config)
        return model, {
            "transformer.h.0.attn.c_attn": {"transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"},
            "transformer.h.0.attn.c_proj": {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"},
            "transformer.h.0.mlp.c_fc": {"transformer.h.0.ln_2.weight", "transformer.h.0.ln_2.bias"},
        }
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=12))
        at = "encoder.layer.0.attention"
        return model, {f"{at}.output.dense": {f"{at}.self.value.weight", f"{at}.self.value.bias"}}
    kinds = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "gemma": ("GemmaConfig", "GemmaForCausalLM"),
             "mixtral": ("MixtralConfig", "MixtralForCausalLM")}  # fmt: skip
    more = {"head_dim": 4} if kind == "gemma" else {"num_local_experts": 4} if kind == "mixtral" else {}
    config = getattr(transformers, kinds[kind][0])(**sizes, num_key_value_heads=2, max_position_embeddings=12, **more)
    config.use_cache = False
    model = getattr(transformers, kinds[kind][1])(config)
    layer = "model.layers.0"
    wanted = {f"{layer}.self_attn.{p}_proj": {f"{layer}.input_layernorm.weight"} for p in "qkv"}
    wanted[f"{layer}.self_attn.o_proj"] = {f"{layer}.self_attn.v_proj.weight"}
    if kind != "mixtral":
        wanted.update({f"{layer}.mlp.{p}_proj": {f"{layer}.post_attention_layernorm.weight"} for p in ("gate", "up")})
        wanted[f"{layer}.mlp.down_proj"] = {f"{layer}.mlp.up_proj.weight"}
    return model, wanted


@pytest.mark.parametrize("kind", ["llama", "gemma", "mixtral", "gpt2", "bert"])
def test_models_of_transformers(kind: str) -> None:
    torch.manual_seed(SEED)
    model, wanted = tiny(kind)
    model.config.use_cache = False
    tokens = torch.randint(20, (2, 7))
    graph = graph_of(model, tokens)
    found = keeps_the_function(graph, (tokens,))
    assert {layer: edited(found[layer]) for layer in wanted} == wanted
    if kind == "gemma":  # its head is tied to the embedding, and the norm before it is nobody else's
        assert edited(found["lm_head"]) == {"model.norm.weight"}


class Experts(nn.Module):
    """A mixture of experts: each row goes to its two best ones."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.n = nn.RMSNorm(C)
        self.router = linear(C, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate": linear(C, 6), "up": linear(C, 6), "down": linear(6, C)}) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        share, best = self.router(y).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(best == i)
            part = y[row]
            part = expert["down"](F.silu(expert["gate"](part)) * expert["up"](part))
            out = out.index_add(0, row, part * share[row, place, None])
        return out


def test_experts_that_take_rows_by_index() -> None:
    torch.manual_seed(SEED)
    graph = graph_of(Experts(), x_of(20, C))
    found = keeps_the_function(graph, (x_of(20, C),))
    for i in range(3):
        assert (
            edited(found[f"experts.{i}.gate"]) == edited(found[f"experts.{i}.up"]) == edited(found["router"]) == {"n.weight"}
        )
        assert edited(found[f"experts.{i}.down"]) == {f"experts.{i}.up.weight", f"experts.{i}.up.bias"}
