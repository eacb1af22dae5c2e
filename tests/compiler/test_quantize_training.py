"""Quantizing passes as options of torch.compile: training goes straight through rounding, frozen weights become codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import plait
import pytest
import torch
from plait.formats.quantized import QuantizedType, rounded
from plait.ir import parse_graph, structurally_equal
from plait.passes.base import Context, run_pipeline
from plait.passes.quantize.pack import PackWeights
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Straight(torch.autograd.Function):
    """A function whose gradient is taken for that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        return how(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def weight4(w: Tensor) -> Tensor:
    return rounded(w, QuantizedType(tuple(w.shape), 4, 32))


def weight8(w: Tensor) -> Tensor:
    scale = w.abs().amax(1, keepdim=True) / 127
    return (w / scale).round().clamp(-128, 127) * scale


def rows8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127) * scale


class Net(nn.Module):
    """Two layers around a norm; as a reference it rounds by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(F.gelu(self.a(x))))

    def by_hand(self, x: Tensor, weight: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> Tensor:
        def layer(one: nn.Linear, x: Tensor) -> Tensor:
            return F.linear(Straight.apply(x, rows), Straight.apply(one.weight, weight), one.bias)

        return layer(self.b, self.norm(F.gelu(layer(self.a, x))))


def same(x: Tensor) -> Tensor:
    return x


WAYS = {"rtn:bits=4,group=32,want=any": (weight4, same), "w8a8:want=any": (weight8, rows8)}


def gradients(net: Net, x: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    y = run(x)
    found = torch.autograd.grad(y.square().sum(), [*net.parameters(), x])
    return y, list(found)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_go_straight_through_rounding(way: str) -> None:
    net, x = Net(), torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(net, backend="plait", options={"passes": [way]})
    y, mine = gradients(net, x, compiled)
    want, theirs = gradients(net, x, lambda x: net.by_hand(x, *WAYS[way]))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    assert not torch.allclose(y, net(x), atol=1e-3)


def test_a_training_step_sees_new_weights() -> None:
    net, x = Net(), torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(net, backend="plait", options={"passes": ["rtn:bits=4,group=32,want=any"]})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses: list[float] = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("way", ["rtn:bits=4,group=32,want=any", "awq:bits=4,group=32,want=any", "w8a8:want=any"])
def test_frozen_weights_become_codes(way: str) -> None:
    net, x = Net().eval(), torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), plait.observe() as seen:
        y = torch.compile(net, backend="plait", options={"passes": [way], "freeze": True, "strict_kernels": True})(x)
        (record,) = seen.graphs
        want = net.by_hand(x, *WAYS[way]) if way in WAYS else net(x)
    torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-3 if way in WAYS else 0.5)
    assert record.graph is not None and record.coverage.fallback == 0
    large = {t.dtype for t in record.graph.constants.values() if t.numel() > 64 * 8}
    assert large == {torch.int8 if "w8a8" in way else torch.int32}


def test_what_is_not_taken_is_said() -> None:
    net, x = Net(), torch.randn(16, 64)
    with plait.observe() as seen:
        y = torch.compile(net, backend="plait", options={"passes": ["rtn:bits=4,group=32"]})(x)
    torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-4)
    assert any("its weight is an input" in why for why in seen.graphs[0].not_applied)


def test_parameters_stay_parameters_behind_a_forward_pass() -> None:
    net, x = Net().eval(), torch.randn(16, 64)
    with torch.no_grad(), plait.observe() as seen:
        torch.compile(net, backend="plait", options={"passes": ["awq:targets=a,want=any,bits=8,group=64"], "freeze": True})(
            x
        )
    assert seen.graphs[0].graph is not None and len(seen.graphs[0].graph.inputs) == 1


def test_pack_weights_before_and_after() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    graph = parse_graph(
        """
graph(level="tensor", symbols={})
def forward(x: "f32[3,64]", v: "f32[40,64]"):
    w = plait.constant("w")
    q = plait.fake_quantize.default(w, "u4g32[40,64]")
    r = plait.fake_quantize.default(v, "u4g32[40,64]")
    y = aten.linear.default(x, q)
    z = aten.linear.default(x, r)
    return (y, z)
""",
        constants={"w": weight},
    )
    after, (step,) = run_pipeline(graph, [PackWeights()], Context(at="split"), verify="each-pass")
    assert step.fired == {"pack": 1} and [str(why) for _, _, why in step.refused] == ["v is no constant"]
    assert [n.op.name for n in after.nodes if "linear" in n.op.name] == [
        "plait.quantized_linear.default",
        "aten.linear.default",
    ]
    x, v = torch.randn(3, 64), torch.randn(40, 64)
    for a, b in zip(after.run(x, v), graph.run(x, v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    again, _ = run_pipeline(after, [PackWeights()], Context(at="split"))
    assert structurally_equal(again, after)
