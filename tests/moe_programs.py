"""Training steps of small programs with MoE layers, as joint graphs, for tests of the overlap passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from plait.ir import Graph, from_fx
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple

GATES = ("switch", "top2", "gshard", "batch-prioritised")


@contextmanager
def single_rank() -> Iterator[str]:
    """The name of a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Sizes:
    """Sizes of a program: batch, length, width, width of experts, experts, layers, heads (0: no attention)."""

    batch: int = 8
    length: int = 4
    width: int = 16
    hidden: int = 32
    experts: int = 4
    layers: int = 2
    heads: int = 2
    capacity: float = 1.25


def routed(x: Tensor, logits: Tensor, gate: str, experts: int, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """(choice, slot, weight, rows, capacity) of tokens x [S, h]."""
    k = 1 if gate in ("switch", "batch-prioritised") else 2
    capacity = int(factor * k * x.shape[0] / experts) or 1
    probabilities = torch.softmax(logits, -1)
    weight, choice = torch.topk(probabilities, k)
    if gate == "gshard":
        choice = torch.ops.plait.moe_keep(choice, None, experts, capacity, True)
    elif gate == "batch-prioritised":
        order = torch.argsort(-probabilities.amax(-1), stable=True)
        choice = torch.ops.plait.moe_keep(choice, order, experts, capacity, False)
    slot, _, rows = torch.ops.plait.moe_slots(choice, torch.zeros(experts, dtype=torch.int64), capacity)
    return choice, slot, weight, rows, capacity


def moe(x: Tensor, p: dict[str, Tensor], gate: str, sizes: Sizes, group: str) -> Tensor:
    """One MoE layer on x [B, T, h]."""
    tokens = x.reshape(-1, x.shape[-1])
    ops: Any = torch.ops.plait
    choice, slot, weight, rows, capacity = routed(tokens, tokens @ p["gate"], gate, sizes.experts, sizes.capacity)
    sent = ops.moe_encode(tokens, choice, slot, None, sizes.experts, capacity)
    received, coming = ops.all_to_all_capacity(sent, rows, None, group)
    inner = ops.expert_act(ops.expert_mm(received, p["w1"], coming), p["b1"], None, coming, "gelu")
    results = ops.expert_mm(inner, p["w2"], coming)
    back, _ = ops.all_to_all_capacity(results, coming, rows, group)
    return ops.moe_decode(back, choice, slot, weight).view(x.shape)


def attention(x: Tensor, p: dict[str, Tensor], heads: int) -> Tensor:
    b, t, h = x.shape
    q, k, v = (x @ p["qkv"]).view(b, t, 3, heads, h // heads).permute(2, 0, 3, 1, 4)
    scores = torch.softmax(q @ k.transpose(-1, -2) / (h // heads) ** 0.5, -1)
    return (scores @ v).transpose(1, 2).reshape(b, t, h) @ p["out"]


def parameters(sizes: Sizes, seed: int, make: Callable[..., Tensor] | None = None) -> list[dict[str, Tensor]]:
    """Parameters of all layers; `make(*shape)` draws one, by default normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    draw = make or (lambda *shape: 0.3 * torch.randn(*shape, generator=generator))
    h, f, e = sizes.width, sizes.hidden, sizes.experts
    shapes = {"qkv": (h, 3 * h), "out": (h, h), "gate": (h, e), "w1": (e, h, f), "b1": (e, f), "w2": (e, f, h)}
    return [{name: draw(*shape).requires_grad_() for name, shape in shapes.items()} for _ in range(sizes.layers)]


def program(sizes: Sizes, gate: str, group: str) -> Callable[..., Tensor]:
    """loss(x, *parameters): attention and an MoE layer, `layers` times, each with a residual."""
    names = ("qkv", "out", "gate", "w1", "b1", "w2")

    def loss(x: Tensor, *flat: Tensor) -> Tensor:
        for i in range(sizes.layers):
            p = dict(zip(names, flat[len(names) * i :], strict=False))
            if sizes.heads:
                x = x + attention(x, p, sizes.heads)
            x = x + moe(torch.nn.functional.layer_norm(x, (sizes.width,)), p, gate, sizes, group)
        return (x**2).mean()

    return loss


def step(sizes: Sizes, gate: str, group: str, seed: int = 0, draw: Any = None) -> tuple[Graph, list[Tensor]]:
    """The joint graph of a training step, and inputs to run it on: x, all parameters, the tangent."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(sizes.batch, sizes.length, sizes.width, generator=generator)
    flat = [p for layer in parameters(sizes, seed, draw) for p in layer.values()]
    loss = program(sizes, gate, group)
    traced = aot_export_joint_simple(lambda *a: (loss(*a),), [x, *flat], trace_joint=True)
    return from_fx(traced, "joint"), [x, *(p.detach() for p in flat), torch.ones(())]
