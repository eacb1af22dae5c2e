"""Letter e: gradients through rounded weights and bytes, beside a straight-through reference in eager torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from plait.compiler.quantize.modules import QuantizedLinear
from plait.formats import QuantizedType
from plait.formats.quantized import rounded
from plait.passes.quantize.scheme import Format
from torch import Tensor, nn
from torch.nn import functional as F

from ..plait_seam import fresh
from ..runner import Outcome, Run
from .subjects import apart, put

APART = 1e-3
"""Relative difference that gradients may have: sums in another order, behind the same rounded numbers."""
LOSSES = 1e-3
STEPS = 10
WIDTH, INNER, OUT, ROWS = 64, 128, 32, 48
CASES = {"rtn:bits=4,want=any": "w4g128", "rtn:bits=3,group=32,want=any": "w3g32", "w8a8:want=any": "w8a8"}


class Net(nn.Module):
    """What is trained: two layers behind norms, one that stays between them, an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down, self.head = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


class Straight(nn.Module):
    """A linear layer whose weight, and for bytes its input, is rounded at each call; gradients go straight through."""

    def __init__(self, layer: nn.Linear, form: Format) -> None:
        super().__init__()
        self.weight, self.bias, self.form = layer.weight, layer.bias, form

    def forward(self, x: Tensor) -> Tensor:
        kind: QuantizedType = self.form.type_for(*self.weight.shape)
        weight = self.weight + (rounded(self.weight, kind) - self.weight).detach()
        if self.form.dynamic:
            scale = x.detach().abs().amax(-1, keepdim=True) / 127
            x = x + ((x / scale).round().clamp(-127, 127) * scale - x).detach()
        return F.linear(x, weight, self.bias)


def measure(run: Run) -> Outcome:
    """Every pass and the modules; a quick run takes one pass."""
    chosen = dict(list(CASES.items())[:1]) if run.quick else CASES
    detail: dict[str, Any] = {}
    for passes, form in chosen.items():
        run.say(passes)
        detail[passes] = beside(passes, Format.of(form))
    if not run.quick:
        for form in ("w4g32", "w8a8"):
            run.say(f"QuantizedLinear {form}")
            detail[f"QuantizedLinear {form}"] = modules(Format.of(form))
    furthest = max(row["gradients apart"] for row in detail.values())
    losses = max(row["losses apart"] for row in detail.values() if "losses apart" in row)
    figure = {
        "cases": len(detail),
        "gradients, furthest apart": f"{furthest:.1e}",
        f"losses of {STEPS} Adam steps, furthest apart": f"{losses:.1e}",
    }
    return Outcome(figure, furthest <= APART and losses <= LOSSES, detail)


def beside(passes: str, form: Format) -> dict[str, Any]:
    """A training step, then ten of Adam, through torch.compile and through the reference."""
    fresh()
    torch.manual_seed(0)
    net = Net()
    reference = copy.deepcopy(net)
    for name in ("up", "down", "head"):
        put(reference, name, Straight(getattr(reference, name), form))
    compiled = torch.compile(net, backend="plait", options={"passes": [passes]})
    x, target = torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUT)
    found, wanted = _gradients(compiled, x, target), _gradients(reference, x, target)
    losses = _trained(compiled, x, target), _trained(reference, x, target)
    return {
        "gradients apart": max(apart(found[n], wanted[n]) for n in wanted),
        "losses": [round(v, 6) for v in losses[0]],
        "losses apart": max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)),
    }


def modules(form: Format) -> dict[str, Any]:
    """Gradients around QuantizedLinear layers, compiled, beside those around the float layers that these stand for."""
    fresh()
    torch.manual_seed(0)
    net = Net()
    reference = copy.deepcopy(net)
    for name in ("up", "down"):
        held = QuantizedLinear.from_linear(
            getattr(net, name), form.type_for(*getattr(net, name).weight.shape), "int8" if form.dynamic else "float"
        )
        put(net, name, held)
        layer = held.dequantize()
        layer.weight.requires_grad_(False)
        put(reference, name, Straight(layer, form) if form.dynamic else layer)
    x, target = torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUT)
    found, wanted = _gradients(torch.compile(net, backend="plait"), x, target), _gradients(reference, x, target)
    return {"gradients apart": max(apart(found[n], wanted[n]) for n in wanted)}


def _loss(net: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(net(x), target)


def _gradients(net: Any, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Of the parameters, by name, and of the input."""
    x = x.clone().requires_grad_()
    net.zero_grad(set_to_none=True)
    _loss(net, x, target).backward()
    assert x.grad is not None
    found = {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return {**found, "input": x.grad}


def _trained(net: Any, x: Tensor, target: Tensor) -> list[float]:
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-3), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = _loss(net, x, target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses
