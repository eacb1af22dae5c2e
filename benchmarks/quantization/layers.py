"""Losses of single layers, and of layers that meet again, beside AutoAWQ's algorithm (the oracles) and torchao's AWQ.

Each group stands alone as a model that reads the activations of the calibration text. All weights are judged at the same
place, on the same activations: a layer's result, the mixed values of attention, the product inside an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plait
import torch
from plait.passes.quantize.scheme import fitting
from torch import Tensor, nn
from torch.nn import functional as F

from .. import oracles, torchao_peer
from ..environments import NoPeer
from ..runner import Run
from .subjects import Subject, example, floats, remembered, resumed, small, smol

SCHEMES = ((4, 128), (3, 128))
GROUPS = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")


class Attend(nn.Module):
    """Queries, keys and values of `x` [batch, length, K], to what attention mixes."""

    def __init__(self, attention: Any, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.size, self.cos, self.sin = attention.size, nn.Buffer(cos), nn.Buffer(sin)

    def forward(self, x: Tensor) -> Tensor:
        turn = example("llama").rotate
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = turn(q, self.cos, self.sin), turn(k, self.cos, self.sin)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Gate(nn.Module):
    """The product inside an MLP."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = mlp.gate_proj, mlp.up_proj

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class Alone(nn.Module):
    """One layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Case:
    """A group of layers alone, and the batches [1, length, K] that it reads."""

    name: str
    model: nn.Module
    batches: tuple[Tensor, ...]

    @property
    def layers(self) -> list[nn.Linear]:
        """In the order in which they were made."""
        return [m for m in self.model.modules() if isinstance(m, nn.Linear)]

    def output(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What the group gives for `x` [tokens, K] with other weights."""
        names = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        given = {f"{n}.weight": w for n, w in zip(names, weights, strict=True)}
        return torch.func.functional_call(self.model, given, (x.unflatten(0, (len(self.batches), -1)),))


def cases(subject: Subject, numbers: Sequence[int], groups: Sequence[str] = GROUPS) -> list[Case]:
    """Groups of some layers of a Llama."""
    model: Any = subject.model
    read: dict[str, list[Tensor]] = {}
    hooks = []
    for i in numbers:
        for group in groups:
            first = {"self_attn": "self_attn.q_proj", "mlp": "mlp.gate_proj"}.get(group, group)
            seen = read.setdefault(f"{i}.{group}", [])
            layer = model.model.layers[i].get_submodule(first)
            hooks.append(layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach())))
    with torch.no_grad():
        for batch in subject.calibration:
            model(batch)
    for hook in hooks:
        hook.remove()
    length = subject.calibration[0].shape[1]
    found = []
    for name, batches in read.items():
        i, _, group = name.partition(".")
        part = model.model.layers[int(i)].get_submodule(group)
        if group == "self_attn":
            alone: nn.Module = Attend(part, model.model.cos[:length], model.model.sin[:length])
        else:
            alone = Gate(part) if group == "mlp" else Alone(part)
        found.append(Case(f"{subject.name}, layer {i}, {group}", alone.eval(), tuple(batches)))
    return found


def losses(case: Case, bits: int, group: int, run: Run) -> dict[str, Any]:
    """Mean squared errors at the group's result, by plait and by each peer."""
    run.say(f"{case.name}, W{bits} g{group}")
    weights = [layer.weight.detach() for layer in case.layers]
    x = torch.cat([b.flatten(0, -2) for b in case.batches])
    group = fitting(group, x.shape[1])
    wanted = case.output(x, weights)

    def loss(found: Sequence[Tensor]) -> float:
        return float((case.output(x, found) - wanted).pow(2).mean())

    def ours() -> float:
        scheme = f"awq-w{bits}g{group}"
        made = resumed(
            f"{case.name} {scheme}",
            lambda folder: plait.quantize(
                case.model, [(b,) for b in case.batches], scheme=scheme, want="any", resume=folder
            ),
        )
        module = floats(made.module())
        return loss([m.weight.detach() for m in module.modules() if isinstance(m, nn.Linear)])

    clip: Any = [False, False, True] if len(weights) == 3 else True

    def duo() -> float:
        return oracles.awq(x, weights, bits, group, case.output, duo=True, clip=clip).loss

    def key(what: str) -> str:
        return f"{case.name}, W{bits} g{group}, {what}"

    row: dict[str, Any] = {
        "plait": remembered("layers", key("plait"), ours),
        "rtn": oracles.rtn(x, weights, bits, group, case.output).loss,
        "AWQ": remembered("layers", key("AWQ"), lambda: oracles.awq(x, weights, bits, group, case.output, clip=clip).loss),
        "AutoAWQ": remembered("layers", key("AutoAWQ"), duo),
    }
    try:
        row["torchao"] = loss(torchao_peer.awq(x, weights, bits, group)[0])
    except NoPeer as why:
        run.notes.append(f"{case.name}: {why}")
    row = {k: float(f"{v:.4g}") for k, v in row.items()}
    return row | {"over the best peer": round(row["plait"] / min(row[p] for p in peers(row)), 4)}


def peers(row: dict[str, Any]) -> list[str]:
    """Those of a row that search."""
    return [p for p in ("AWQ", "AutoAWQ", "torchao") if p in row]


def measure(run: Run) -> dict[str, Any]:
    """Two layers each of the small Llama with outliers and of SmolLM2."""
    chosen = [*cases(small(outliers=True), (1, 4))]
    try:
        chosen += cases(smol(), (1, 20))
    except example("smollm2").NotInstalled as missing:
        run.notes.append(str(missing))
    return {f"{case.name}, W{b} g{g}": losses(case, b, g, run) for case in chosen for b, g in SCHEMES}


def figures(rows: dict[str, Any]) -> dict[str, str]:
    """For the summary."""
    above = [title for title, row in rows.items() if row["over the best peer"] > 1]
    worst = max(row["over the best peer"] for row in rows.values())
    return {
        "layers with a loss above a peer's": f"{len(above)} of {len(rows)}",
        "loss over the best peer's, at worst": f"{worst:.3f}",
    }


def holds(rows: dict[str, Any]) -> bool:
    """No loss is above that of any peer."""
    return all(row["over the best peer"] <= 1 for row in rows.values())
