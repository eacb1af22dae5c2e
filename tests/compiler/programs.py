"""Modules whose gradients are easy to get wrong in a compiler, each with a reason, and passes that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from plait.ir import Builder, Graph
from plait.passes.base import Context, Pass
from torch import nn
from torch.utils.checkpoint import checkpoint

# -- passes that change nothing ---------------------------------------------------------------------------------------


def rebuild(graph: Graph) -> Graph:
    """Every node that can be inferred made anew: new values, new types, no fx node to inherit from."""
    builder = Builder(graph)
    for old in graph.nodes:
        node = builder.resolved(old)
        if node.op.name == "plait.constant" or node.op.has("control_flow"):
            builder.append(node)
            continue
        made = builder.call(node.op, *node.args, loc=node.loc)
        results = (made,) if node.op.returns == 1 else made
        builder.subst.update(zip(node.results, results, strict=True))
    return builder.finish()


@dataclass(frozen=True)
class ForwardIdentity(Pass):
    name: ClassVar[str] = "forward-identity"
    at: ClassVar[Any] = "forward"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return graph


@dataclass(frozen=True)
class JointIdentity(ForwardIdentity):
    name: ClassVar[str] = "joint-identity"
    at: ClassVar[Any] = "joint"


@dataclass(frozen=True)
class SplitIdentity(ForwardIdentity):
    name: ClassVar[str] = "split-identity"
    at: ClassVar[Any] = "split"


@dataclass(frozen=True)
class ForwardRebuild(ForwardIdentity):
    name: ClassVar[str] = "forward-rebuild"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return rebuild(graph)


@dataclass(frozen=True)
class JointRebuild(ForwardRebuild):
    name: ClassVar[str] = "joint-rebuild"
    at: ClassVar[Any] = "joint"


@dataclass(frozen=True)
class SplitRebuild(ForwardRebuild):
    name: ClassVar[str] = "split-rebuild"
    at: ClassVar[Any] = "split"


PASSES = {p.name: p for p in (ForwardIdentity(), JointIdentity(), SplitIdentity(), ForwardRebuild(), JointRebuild(),
                              SplitRebuild())}  # fmt: skip

# -- programs ---------------------------------------------------------------------------------------------------------


class NoGradSpan(nn.Module):
    """The mean must not carry gradients, the rest must."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        with torch.no_grad():
            scale = h.abs().mean() + self.b(x).sin()
            with torch.enable_grad():
                shift = self.b(h)
        return h * scale + shift


class WriteUnderNoGrad(nn.Module):
    """In eager the gradient of `h` stays that of the linear layer, although its value was clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        with torch.no_grad():
            h.clamp_(min=0)
        return h * 3


class InPlaceRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.net(x) * x).add_(1).mul_(2)


class BatchNorm(nn.Module):
    """Running statistics and the batch counter are buffers that the program writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.a(x)))


class Dropout(nn.Module):
    """The same seed must drop the same elements as in eager."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(6, 6), nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.tanh(self.a(self.drop(x))))


class Tied(nn.Module):
    """One weight, used twice: its gradient is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class PartialWrite(nn.Module):
    """A constant is lifted into the graph; the overwritten column gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        h[:, 0] = 0
        h[1:, 2] = x[1:, 3]
        return h.exp()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: torch.sin(self.b(torch.tanh(self.a(y)))), x, use_reentrant=False)


class CheckpointedDropout(nn.Module):
    """Recomputation must drop the same elements again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(6, 6), nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: torch.sin(self.drop(torch.tanh(self.a(y)))), x, use_reentrant=False)


class Straight(torch.autograd.Function):
    """Rounding whose gradient is that of the identity: the backward is no derivative of the forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Straight.apply(self.a(x)).tanh()


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return h * h.detach() + h.detach().sin()


class Embedded(nn.Module):
    """Repeated indices add up in the gradient; the padding row gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=2)
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = (x[:, 0] * 7).long() % 9
        return self.a(self.table(index)) * x


class ViewOfBuffer(nn.Module):
    """A view of a buffer is written, and the buffer is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen[0].add_(x.detach().mean(0))
        self.seen.view(-1)[6:].mul_(0.5).add_(1)
        return self.a(x) * self.seen.sum(0)


class ManyOutputs(nn.Module):
    """Outputs that the loss does not use, an output twice, and a None."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = torch.sigmoid(self.a(x))
        return {"out": h, "unused": self.b(h), "again": h, "view": h.t(), "none": None, "size": x.shape[0]}


class Branches(nn.Module):
    """A branch on a value, with gradients through both arms."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return torch.cond(h.sum() > 0, lambda h: h.sin(), lambda h: h * h, (h,))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(6, 18), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(1, -1, 3, 2, 3).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(-1, 6))


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (NoGradSpan, WriteUnderNoGrad, InPlaceRelu, BatchNorm, Dropout, Tied, PartialWrite, Checkpointed,
                CheckpointedDropout, StraightThrough, Detached, Embedded, ViewOfBuffer, ManyOutputs, Branches, Attention)
}  # fmt: skip

#: Programs that have no faithful form before autograd: passes there report so and the rest compiles.
NO_FORWARD_CAPTURE = {"WriteUnderNoGrad", "Checkpointed", "CheckpointedDropout", "StraightThrough"}
