"""Random training programs with MoE layers, as joint graphs, and random options of the overlap passes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from plait.ir import Graph, from_fx
from plait.runtime import exchange  # noqa: F401 (registers its op)
from plait.runtime.moe import KINDS
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.nn import functional as F

from tests.moe_programs import attention

KEEPING = ("tokens", "choices", "importance")


@dataclass(frozen=True)
class Layer:
    """What one layer computes: heads 0 is no attention; `keeping` is who claims places first."""

    heads: int
    norm: bool
    residual: bool
    k: int
    keeping: str
    factor: float
    normalised: bool
    hidden: int
    kind: str
    bias: bool
    gated: bool
    shared: bool
    weight_first: bool  # weights are applied before the experts
    balance: float


@dataclass(frozen=True)
class Plan:
    """A random program: sizes, dtype, layers. `flat`: tokens are [S, h] from the beginning."""

    seed: int
    batch: int
    length: int
    width: int
    experts: int
    flat: bool
    dtype: torch.dtype
    layers: tuple[Layer, ...]


def draw(
    seed: int, ranks: int = 1, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16), layers: int = 3
) -> Plan:
    """The program of a seed, for so many ranks, with at most so many layers."""
    r = random.Random(seed)
    width, experts, flat = r.choice((4, 6, 10, 16, 24)), ranks * r.randint(1, 4), r.random() < 0.3
    made = tuple(
        Layer(
            heads=0 if flat or r.random() < 0.4 else r.choice((1, 2)),
            norm=r.random() < 0.6,
            residual=r.random() < 0.7,
            k=r.randint(1, min(3, experts)),
            keeping=r.choice(KEEPING),
            factor=r.choice((0.3, 0.7, 1.0, 1.25, 2.0, 4.0)),
            normalised=r.random() < 0.5,
            hidden=r.choice((5, 8, 12, 33)),
            kind=r.choice(KINDS),
            bias=r.random() < 0.7,
            gated=r.random() < 0.4,
            shared=r.random() < 0.3,
            weight_first=r.random() < 0.15,
            balance=r.choice((0.0, 0.0, 0.02)) if experts > 1 else 0.0,
        )
        for _ in range(r.randint(1, layers))
    )
    return Plan(seed, r.randint(2, 13), r.choice((2, 3, 5)), width, experts, flat, r.choice(dtypes), made)


def options(seed: int) -> tuple[dict[str, Any], bool, bool]:
    """Options of overlap-chunks, whether it runs, and whether overlap-dw does."""
    r = random.Random(seed)
    chosen = {
        "count": r.choice((0, *range(1, 9))),
        "by": r.choice(("tokens", "tokens", "capacity")),
        "around": r.choice(("search", "layer", "all")),
        "backward": r.random() < 0.3,
    }
    chunks = r.random() < 0.9
    return chosen, chunks, not chunks or r.random() < 0.5


def parameters(plan: Plan, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """All parameters, those of experts for one rank of so many."""
    generator = torch.Generator().manual_seed(plan.seed)
    h, own = plan.width, plan.experts // ranks

    def make(*shape: int) -> Tensor:
        return (0.4 * torch.randn(*shape, generator=generator)).to(plan.dtype)

    found: list[Tensor] = []
    for layer in plan.layers:
        f = layer.hidden
        found += [make(h, 3 * h), make(h, h), make(h, plan.experts), make(h, f), make(f, h)]
        for shape in ((h, f), (f,), (h, f), (f, h), (h,)):
            found.append(make(plan.experts, *shape)[rank * own : (rank + 1) * own].clone())
    return [p.requires_grad_() for p in found]


NAMES = ("qkv", "out", "gate", "shared1", "shared2", "w1", "b1", "w3", "w2", "b2")


def _moe(x: Tensor, p: dict[str, Tensor], layer: Layer, experts: int, group: str) -> tuple[Tensor, Tensor]:
    """Tokens [S, h] through one mixture, and its auxiliary loss."""
    ops: Any = torch.ops.plait
    capacity = max(1, int(layer.factor * layer.k * x.shape[0] / experts))
    probabilities = torch.softmax((x @ p["gate"]).float(), -1)
    weight, choice = torch.topk(probabilities, layer.k)
    chosen = choice
    if layer.normalised:
        weight = weight / weight.sum(-1, keepdim=True)
    if layer.keeping == "choices":
        choice = ops.moe_keep(choice, None, experts, capacity, True)
    elif layer.keeping == "importance":
        order = torch.argsort(-probabilities.amax(-1), stable=True)
        choice = ops.moe_keep(choice, order, experts, capacity, layer.k > 1)
    slot, _, rows = ops.moe_slots(choice, torch.zeros(experts, dtype=torch.int64), capacity)
    weight = weight.to(x.dtype)
    if layer.weight_first:  # encode's weight has no gradient
        sent = ops.moe_encode(x, choice, slot, weight.detach(), experts, capacity)
    else:
        sent = ops.moe_encode(x, choice, slot, None, experts, capacity)
    received, coming = ops.all_to_all_capacity(sent, rows, None, group)
    other = ops.expert_mm(received, p["w3"], coming) if layer.gated else None
    bias = p["b1"] if layer.bias else None
    inner = ops.expert_act(ops.expert_mm(received, p["w1"], coming), bias, other, coming, layer.kind)
    made = ops.expert_mm(inner, p["w2"], coming)
    if layer.bias:
        made = ops.expert_act(made, p["b2"], None, coming, "none")
    back, _ = ops.all_to_all_capacity(made, coming, rows, group)
    y = ops.moe_decode(back, choice, slot, None if layer.weight_first else weight)
    if layer.shared:
        y = y + F.silu(x @ p["shared1"]) @ p["shared2"]
    share = (chosen.unsqueeze(-1) == torch.arange(experts)).float().mean((0, 1))
    return y, layer.balance * experts * (share * probabilities.mean(0)).sum()


def program(plan: Plan, group: str) -> Callable[..., Tensor]:
    """loss(x, *parameters)."""

    def loss(x: Tensor, *flat: Tensor) -> Tensor:
        extra = torch.zeros(())
        for i, layer in enumerate(plan.layers):
            p = dict(zip(NAMES, flat[len(NAMES) * i :], strict=False))
            if layer.heads:
                x = x + attention(x, p, layer.heads)
            y = F.layer_norm(x, (plan.width,)) if layer.norm else x
            y, more = _moe(y.reshape(-1, plan.width), p, layer, plan.experts, group)
            if layer.balance:
                extra = extra + more
            y = y.view(x.shape)
            x = x + y if layer.residual else y
        return (x.float() ** 2).mean() + extra

    return loss


def step(plan: Plan, group: str, rank: int = 0, ranks: int = 1) -> tuple[Graph, list[Tensor]]:
    """The joint graph of a training step, and inputs to run it on: x, all parameters, the tangent."""
    generator = torch.Generator().manual_seed(plan.seed + 1 + rank)
    shape = (plan.batch * plan.length, plan.width) if plan.flat else (plan.batch, plan.length, plan.width)
    x = torch.randn(*shape, generator=generator).to(plan.dtype)
    flat = parameters(plan, rank, ranks)
    loss = program(plan, group)
    traced = aot_export_joint_simple(lambda *a: (loss(*a),), [x, *flat], trace_joint=True)
    return from_fx(traced, "joint"), [x, *(p.detach() for p in flat), torch.ones(())]
