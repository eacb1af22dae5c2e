"""A mixture of experts as a layer: gate, slots, experts on their ranks, and back."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import BadMixture
from ...runtime import exchange as registered
from ...runtime.moe import KINDS
from .gates import GATES, GateLike, Routing, balance_loss, z_loss
from .placement import Compute, Group, LocalExperts, Placement

assert registered is not None  # importing it registers the exchange
_ops = cast(Any, torch.ops.plait)


class Capacity:
    """Places that each expert has for tokens of one rank: ceil(factor * k * S / E), exactly, or S, so that none is dropped.

    The factor is taken for the decimal that it prints as, None for no bound. More than S places would never be used.
    """

    def __init__(self, factor: float | None, choices: int, experts: int) -> None:
        """Raises BadMixture for a factor that is not above 0."""
        if factor is not None and not 0 < factor < float("inf"):
            raise BadMixture(what="capacity_factor", expected="a number above 0, or None to drop nothing", got=factor)
        self.factor = factor
        share = Fraction(1) if factor is None else min(Fraction(1), Fraction(str(factor)) * choices / experts)
        self._numerator, self._denominator = share.numerator, share.denominator

    def __call__(self, tokens: int) -> int:
        return -(-tokens * self._numerator // self._denominator)


def mix(tokens: Tensor, routing: Routing, compute: Compute, placement: Placement, capacity: int) -> Tensor:
    """Send tokens [S, h] to their experts and sum what comes back: [S, h].

    Of each expert, the first `capacity` pairs in the order of the routing are computed; the others add nothing. Sizes do not
    depend on the data. A collective where the group has several ranks: all of them must call it, with equal capacities.
    """
    choice, experts, name = routing.choice, placement.experts, placement.name
    if routing.whole:
        choice = _ops.moe_keep(choice, routing.order, experts, capacity, routing.by_choice)
    slot, _, rows = _ops.moe_slots(choice, choice.new_zeros(experts), capacity)
    buffer = _ops.moe_encode(tokens, choice, slot, None, experts, capacity)
    if name is None:
        buffer = compute(buffer, rows)
    else:
        buffer, arrived = _ops.all_to_all_capacity(buffer, rows, None, name)
        buffer, _ = _ops.all_to_all_capacity(compute(buffer, arrived), arrived, rows, name)
    return _ops.moe_decode(buffer, choice, slot, routing.weight)


class Experts(LocalExperts):
    """This rank's experts: two products with an activation between them, [G, C, width] -> [G, C, width].

    Parameters: `up` [L, width, hidden], `down` [L, hidden, width]; with `bias`, `up_bias` [L, hidden] and `down_bias`
    [L, width]; with `gated`, `gate` [L, width, hidden] (and `gate_bias`), and activation(x @ gate) * (x @ up) is what `down`
    reads. Each expert is initialised, as torch.nn.Linear would, from one number that torch's generator gives and its own
    number: with the same seed on all ranks, any number of ranks holds the same experts.

    Raises UnevenExperts, and BadMixture for an unknown activation.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate_bias: Tensor | None

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        group: Group | None = None,
        activation: str = "gelu",
        bias: bool = True,
        gated: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(Placement.of(experts, group))
        if activation not in KINDS:
            raise BadMixture(what="activation", expected=f"one of {', '.join(KINDS)}", got=repr(activation))
        self.activation = activation
        count = self.placement.local
        shapes = {"up": (width, hidden), "down": (hidden, width), "gate": (width, hidden)}
        for name, (before, after) in shapes.items():
            there = name != "gate" or gated
            made = torch.empty(count, before, after, device=device, dtype=dtype) if there else None
            added = torch.empty(count, after, device=device, dtype=dtype) if there and bias else None
            self.hold(name, made)
            self.hold(f"{name}_bias", added)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights. All ranks of the group must call it, with torch's generator in the same state."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        for local, number in enumerate(range(self.placement.experts)[self.placement.own]):
            generator = torch.Generator().manual_seed(seed + number)
            for name in ("up", "down", "gate"):
                weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
                for parameter in (weight, bias):
                    if parameter is not None:
                        drawn = torch.rand(parameter.shape[1:], generator=generator, device="cpu", dtype=torch.float64)
                        parameter[local].copy_((2 * drawn - 1) * weight.shape[1] ** -0.5)

    def forward(self, buffer: Tensor, rows: Tensor) -> Tensor:
        """Rows (first, end) of each group of the buffer [G, C, width] through expert g % L; the others are zero."""
        hidden = _ops.expert_mm(buffer, self.up, rows)
        if self.gate is None:
            hidden = _ops.expert_act(hidden, self.up_bias, None, rows, self.activation)
        else:
            if self.up_bias is not None:
                hidden = _ops.expert_act(hidden, self.up_bias, None, rows, "none")
            gate = _ops.expert_mm(buffer, self.gate, rows)
            hidden = _ops.expert_act(gate, self.gate_bias, hidden, rows, self.activation)
        result = _ops.expert_mm(hidden, self.down, rows)
        return result if self.down_bias is None else _ops.expert_act(result, self.down_bias, None, rows, "none")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.up.shape[1]} -> {self.up.shape[2]}, {self.activation}"


class MoE(nn.Module):
    """Tokens [.., width] through the experts that a gate chooses, weighted: [.., width].

    `gate` is a name of `GATES`, or a gate. Each expert has ceil(capacity_factor * k * S / E) places for the S tokens of each
    rank (None: S); tokens that find none of their experts with a place left come out as zeros, so put a residual around it.
    All ranks of `group` share the experts and must have equally many tokens.

    With `balance` or `z` above 0 the result is a pair: tokens, and the scalar balance * balance_loss + z * z_loss of this
    rank's tokens, to be added to the loss. `jitter` multiplies what the gate reads, while training, by random factors
    between 1 - jitter and 1 + jitter. Probabilities of halves are computed in float32.

    Raises UnevenExperts and BadMixture.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        gate: str | GateLike = "switch",
        capacity_factor: float | None = 1.25,
        group: Group | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        gated: bool = False,
        balance: float = 0.0,
        z: float = 0.0,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(gate, str):
            if gate not in GATES:
                raise BadMixture(what="gate", expected=f"one of {', '.join(GATES)}, or a gate", got=repr(gate))
            gate = GATES[gate]
        if not 1 <= gate.choices <= experts:
            raise BadMixture(what="experts", expected=f"at least the gate's {gate.choices} choices", got=experts)
        self.gate, self.capacity = gate, Capacity(capacity_factor, gate.choices, experts)
        self.balance, self.z, self.jitter = balance, z, jitter
        self.router = nn.Linear(width, experts, bias=False, device=device, dtype=dtype)
        self.experts = Experts(experts, width, hidden, group, activation, bias, gated, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x [.., width] -> the same shape, and an auxiliary loss where one is asked for."""
        tokens = x.reshape(-1, x.shape[-1])
        read = tokens
        if self.training and self.jitter:
            read = tokens * (1 + self.jitter * (2 * torch.rand_like(tokens) - 1))
        logits = self.router(read)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        probabilities = torch.softmax(logits, -1)
        routing = self.gate(probabilities)
        mixed = mix(tokens, routing, self.experts, self.experts.placement, self.capacity(tokens.shape[0]))
        mixed = mixed.reshape(x.shape)
        if not self.balance and not self.z:
            return mixed
        extra = self.balance * balance_loss(probabilities, routing.choice) if self.balance else logits.new_zeros(())
        return mixed, (extra + self.z * z_loss(logits) if self.z else extra)

    def extra_repr(self) -> str:
        return f"gate={self.gate}, capacity_factor={self.capacity.factor}"
