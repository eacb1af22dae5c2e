"""Mixtures of experts against a reference that goes token by token, on one rank and on two."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plait.compiler.moe import (
    GATES,
    Capacity,
    Experts,
    Gate,
    MoE,
    Routing,
    balance_loss,
    gather_state_dict,
    split_state_dict,
    z_loss,
)
from plait.errors import BadMixture, UnevenExperts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

ops: Any = torch.ops.plait
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "none": lambda x: x,
}


def claims(choice: list[list[int]], importance: list[float], order: str) -> list[tuple[int, int]]:
    """Pairs (token, j) in the order in which they claim places."""
    tokens, ranks = range(len(choice)), range(len(choice[0]))
    if order == "tokens":
        return [(s, j) for s in tokens for j in ranks]
    if order == "importance":
        tokens = sorted(tokens, key=lambda s: -importance[s])  # stable
    return [(s, j) for j in ranks for s in tokens]


def routed(gate: Gate, probabilities: Tensor, capacity: int) -> tuple[list[list[int]], list[list[int]]]:
    """(choice, slot) of each token, in plain Python; slot -1 where it is dropped."""
    p = probabilities.tolist()
    choice = [sorted(range(len(row)), key=lambda e: -row[e])[: gate.choices] for row in p]
    taken = [0] * len(p[0])
    kept = set()
    for s, j in claims(choice, [max(row) for row in p], gate.order):
        if taken[choice[s][j]] < capacity:
            taken[choice[s][j]] += 1
            kept.add((s, j))
    taken = [0] * len(p[0])
    slot = [[-1] * gate.choices for _ in p]
    for s, row in enumerate(choice):
        for j, e in enumerate(row):
            if (s, j) in kept:
                slot[s][j] = taken[e]
                taken[e] += 1
    return choice, slot


def expert(experts: Experts, e: int, x: Tensor) -> Tensor:
    """What one expert computes of a token [width]."""

    def added(y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + bias[e]

    act = ACTIVATIONS[experts.activation]
    hidden = added(x @ experts.up[e], experts.up_bias)
    if experts.gate is None:
        hidden = act(hidden)
    else:
        hidden = act(added(x @ experts.gate[e], experts.gate_bias)) * hidden
    return added(hidden @ experts.down[e], experts.down_bias)


def reference(layer: MoE, x: Tensor) -> Tensor:
    """The layer's result for tokens [S, width], token by token."""
    gate = layer.gate
    assert isinstance(gate, Gate)
    probabilities = torch.softmax(x @ layer.router.weight.t(), -1)
    choice, slot = routed(gate, probabilities, layer.capacity(len(x)))
    out = []
    for s in range(len(x)):
        y = torch.zeros_like(x[s])
        total = sum(probabilities[s, e] for e in choice[s]) if gate.normalised else 1
        for e, place in zip(choice[s], slot[s], strict=True):
            if place >= 0:
                y = y + probabilities[s, e] / total * expert(layer.experts, e, x[s])
        out.append(y)
    return torch.stack(out)


def skewed(layer: MoE, x: Tensor, favoured: int, never: int) -> None:
    """Make many tokens choose one expert and none another, through a feature that is the same in all tokens."""
    with torch.no_grad():
        x[:, 0] = 1
        layer.router.weight[favoured, 0] = 1.5
        layer.router.weight[never, 0] = -50


def gradients(layer: nn.Module, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
    return dict(zip(["x", *(n for n, _ in layer.named_parameters())], grads, strict=True))


GATES_TESTED = {**GATES, "prioritised-2": Gate(2, "importance", normalised=True), "top3": Gate(3)}


@pytest.mark.parametrize("factor", [0.5, 1.25, None])
@pytest.mark.parametrize("name", GATES_TESTED)
def test_layers_compute_what_tokens_taken_one_by_one_do(name: str, factor: float | None) -> None:
    torch.manual_seed(0)
    layer = MoE(8, 12, 6, GATES_TESTED[name], factor, dtype=torch.float64)
    x = torch.randn(40, 8, dtype=torch.float64)
    skewed(layer, x, favoured=1, never=4)
    x.requires_grad_()
    y, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found, wanted = gradients(layer, y, x), gradients(layer, expected, x)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-11, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
    for key, grad in found.items():
        assert "experts" not in key or not grad[4].any(), key  # of an expert that nobody chose


@pytest.mark.parametrize("order", ["tokens", "choices", "importance"])
@pytest.mark.parametrize("choices", [1, 2, 3])
def test_slots_and_drops(order: Any, choices: int) -> None:
    torch.manual_seed(2)
    gate = Gate(choices, order)
    probabilities = torch.softmax(torch.randn(50, 5) + torch.tensor([2.0, 1, 0, 0, -40]), -1)
    capacity = 9
    routing = gate(probabilities)
    assert routing.whole == (order == "importance" or (order == "choices" and choices > 1))
    choice = routing.choice
    if routing.whole:
        choice = ops.moe_keep(choice, routing.order, 5, capacity, routing.by_choice)
    slot, used, rows = ops.moe_slots(choice, torch.zeros(5, dtype=torch.int64), capacity)
    expected_choice, expected_slot = routed(gate, probabilities, capacity)
    assert routing.choice.tolist() == expected_choice
    assert slot.tolist() == expected_slot
    loads = [sum(e == c and s >= 0 for cs, ss in zip(expected_choice, expected_slot, strict=True)
                 for c, s in zip(cs, ss, strict=True)) for e in range(5)]  # fmt: skip
    assert used.tolist() == loads and rows.tolist() == [[0, n] for n in loads]
    assert max(loads) == capacity and any(s < 0 for ss in expected_slot for s in ss), "the test needs drops"


def test_important_tokens_keep_their_places_and_equal_ones_come_in_order() -> None:
    probabilities = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4], [0.7, 0.3]])
    routing = GATES["batch-prioritised"](probabilities)
    assert routing.order is not None and routing.order.tolist() == [1, 3, 0, 2]
    assert ops.moe_keep(routing.choice, routing.order, 2, 3, False).flatten().tolist() == [0, 0, -1, 0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_kinds_of_experts(activation: str, bias: bool, gated: bool) -> None:
    torch.manual_seed(3)
    layer = MoE(6, 10, 4, "top2", 0.8, activation=activation, bias=bias, gated=gated, dtype=torch.float64)
    x = torch.randn(24, 6, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found, wanted = gradients(layer, y, x), gradients(layer, expected, x)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-11, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_capacity_is_exact() -> None:
    assert Capacity(1.25, 1, 8)(64) == 10
    assert Capacity(1.1, 1, 10)(100) == 11  # 1.1 * 100 / 10 is above 11 in floats
    assert Capacity(0.01, 1, 8)(5) == 1
    assert Capacity(1.0, 2, 3)(10) == 7
    assert Capacity(None, 2, 4)(10) == Capacity(7.0, 2, 4)(10) == 10
    for factor in (0.3, 1.7, 2.45):
        for tokens in range(1, 60):
            found = Capacity(factor, 2, 7)(tokens)
            assert found == min(tokens, math.ceil(round(factor * 100) * 2 * tokens / 700 - 1e-9)), (factor, tokens)


def test_auxiliary_losses() -> None:
    torch.manual_seed(4)
    layer = MoE(8, 8, 4, "top2", balance=0.3, z=0.7, dtype=torch.float64)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    y, extra = layer(x)
    assert torch.equal(y, MoE.forward(_without_losses(layer), x)) and y.shape == x.shape
    logits = layer.router(x.flatten(0, 1))
    p = torch.softmax(logits, -1)
    chosen = [e for row in p.tolist() for e in sorted(range(4), key=lambda e: -row[e])[:2]]
    balance = 4 * sum(chosen.count(e) / len(chosen) * p[:, e].mean() for e in range(4))
    torch.testing.assert_close(extra, 0.3 * balance + 0.7 * logits.exp().sum(-1).log().pow(2).mean())
    even = torch.full((8, 4), 0.25)
    assert balance_loss(even, torch.arange(8).view(8, 1) % 4).item() == 1
    assert balance_loss(torch.eye(4)[[2] * 8], torch.full((8, 1), 2)).item() == 4
    assert z_loss(torch.zeros(3, 1)).item() == 0
    extra.backward()
    assert layer.router.weight.grad is not None and layer.router.weight.grad.any()


def _without_losses(layer: MoE) -> MoE:
    plain = copy.copy(layer)
    plain.balance = plain.z = 0.0
    return plain


def test_jitter_only_while_training() -> None:
    torch.manual_seed(5)
    layer, x = MoE(8, 8, 4, jitter=0.5), torch.randn(30, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_halves_route_in_float32() -> None:
    torch.manual_seed(6)
    layer, x = MoE(8, 8, 4, "top2", None), torch.randn(30, 8)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    found = half(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), copy.deepcopy(half).float()(x.bfloat16().float()), rtol=0.05, atol=0.02)


def test_a_gate_may_be_any_function() -> None:
    class Alternating:
        choices = 1

        def __call__(self, probabilities: Tensor) -> Routing:
            tokens = torch.arange(len(probabilities)).unsqueeze(1)
            return Routing(torch.where(tokens % 3 == 0, -1, tokens % 2), torch.ones(len(tokens), 1))

    torch.manual_seed(7)
    layer, x = MoE(4, 4, 2, Alternating(), None), torch.randn(12, 4)
    y = layer(x)
    for s in range(12):
        expected = torch.zeros(4) if s % 3 == 0 else expert(layer.experts, s % 2, x[s])
        torch.testing.assert_close(y[s], expected, msg=lambda m, s=s: f"token {s}: {m}")


def test_marks_survive_copies_and_casts() -> None:
    layer = MoE(4, 4, 2)
    for made in (layer, copy.deepcopy(layer), copy.deepcopy(layer).double(), copy.deepcopy(layer).to_empty(device="cpu")):
        marked = {n for n, p in made.named_parameters() if getattr(p, "plait_local", False)}
        assert marked == {n for n, _ in made.named_parameters() if n.startswith("experts.")} and len(marked) == 4


def test_state_of_one_rank_is_whole() -> None:
    layer = MoE(4, 4, 2)
    state = layer.state_dict()
    for made in (gather_state_dict(layer), split_state_dict(layer, state)):
        assert made.keys() == state.keys() and all(torch.equal(made[k], state[k]) for k in state)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"gate": "swich"}, "gate must be one of switch"),
        ({"capacity_factor": 0.0}, "capacity_factor must be a number above 0"),
        ({"capacity_factor": math.inf}, "capacity_factor"),
        ({"activation": "mish"}, "activation must be one of gelu"),
        ({"gate": Gate(5)}, "experts must be at least the gate's 5 choices"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(BadMixture, match=words):
        MoE(4, 4, 4, **arguments)


def test_experts_must_be_spread_evenly() -> None:
    torch.distributed.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    try:
        with pytest.raises(UnevenExperts, match="4 experts cannot be spread evenly over 3 ranks"):
            MoE(4, 4, 4, group=torch.distributed.group.WORLD)
        held = MoE(4, 4, 6, group=torch.distributed.group.WORLD).experts
        assert held.up.shape[0] == 2 and held.placement.own == slice(2, 4)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("gate", GATES)
def test_training_lowers_the_loss(gate: str) -> None:
    torch.manual_seed(8)
    layer, target = MoE(8, 16, 4, gate, balance=0.01), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    x = torch.randn(128, 8)
    wanted = target(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), 2e-2)
    losses = []
    for _ in range(40):
        y, extra = layer(x)
        loss = F.mse_loss(y, wanted)
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
