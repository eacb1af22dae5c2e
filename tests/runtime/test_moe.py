"""The MoE ops against a program that takes one token at a time: values, gradients, pieces against the whole, tracing.

Loads are drawn uneven on purpose; hypothesis prints the seed of a case that fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait.ir import SymbolInfo, TensorType, op, size_symbol
from plait.ir.infer import _by_fake_tensors, by_rule
from plait.runtime import moe
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

assert moe is not None  # importing registers the ops
ops = torch.ops.plait
SEEDS = st.integers(0, 2**32 - 1)
EXAMPLES = settings(deadline=None, max_examples=40)


@dataclass
class Case:
    """Tokens that chose experts, and what the gate made of it."""

    choice: Tensor
    experts: int
    capacity: int
    g: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=self.g, dtype=dtype)

    def slots(self) -> tuple[Tensor, Tensor, Tensor]:
        return ops.moe_slots(self.choice, torch.zeros(self.experts, dtype=torch.int64), self.capacity)


def case(seed: int, *, tokens: int = 23, most_experts: int = 6) -> Case:
    """Uneven loads: some experts that nobody chooses, some that overflow, some pairs without an expert."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    experts, k, count = pick(1, most_experts), pick(1, 3), pick(0, tokens)
    load = torch.rand(experts + 1, generator=g) ** 4 + 1e-3
    load[1:][torch.rand(experts, generator=g) < 0.2] = 0
    choice = torch.multinomial(load, max(1, count * k), replacement=True, generator=g)[: count * k].view(count, k) - 1
    return Case(choice, experts, pick(1, max(1, count)), g)


def used_rows(c: Case, ranks: int, experts: int, capacity: int) -> Tensor:
    """[R * L, 2]: any ranges of rows, some empty, some full."""
    first = torch.randint(0, capacity + 1, (ranks * experts,), generator=c.g)
    end = torch.maximum(first, torch.randint(0, capacity + 1, (ranks * experts,), generator=c.g))
    full = torch.rand(ranks * experts, generator=c.g) < 0.2
    return torch.stack([torch.where(full, 0, first), torch.where(full, capacity, end)], 1)


# -- one token at a time ------------------------------------------------------------------------------------------------


def plain_keep(choice: Tensor, order: Tensor | None, experts: int, capacity: int, by_choice: bool) -> Tensor:
    tokens = range(choice.shape[0]) if order is None else order.tolist()
    ks = range(choice.shape[1])
    pairs = [(s, j) for j in ks for s in tokens] if by_choice else [(s, j) for s in tokens for j in ks]
    out, claimed = choice.clone(), [0] * experts
    for s, j in pairs:
        e = int(choice[s, j])
        if e >= 0:
            out[s, j] = e if claimed[e] < capacity else -1
            claimed[e] += 1
    return out


def plain_slots(choice: Tensor, used: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    slot, after = torch.full_like(choice, -1), used.clone()
    for s in range(choice.shape[0]):
        for j in range(choice.shape[1]):
            e = int(choice[s, j])
            if e >= 0 and after[e] < capacity:
                slot[s, j] = after[e]
                after[e] += 1
    return slot, after, torch.stack([used, after], 1)


def plain_encode(x: Tensor, choice: Tensor, slot: Tensor, weight: Tensor | None, experts: int, capacity: int) -> Tensor:
    buf = x.new_zeros(experts, capacity, x.shape[1])
    for s, j in (slot >= 0).nonzero().tolist():
        buf[choice[s, j], slot[s, j]] = x[s] if weight is None else x[s] * weight[s, j]
    return buf


def plain_decode(buf: Tensor, choice: Tensor, slot: Tensor, weight: Tensor | None) -> Tensor:
    y = buf.new_zeros(choice.shape[0], buf.shape[2])
    for s, j in (slot >= 0).nonzero().tolist():
        row = buf[choice[s, j], slot[s, j]]
        y[s] += row if weight is None else row * weight[s, j]
    return y


def plain_mm(x: Tensor, w: Tensor, rows: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], w.shape[2])
    for g, (first, end) in enumerate(rows.tolist()):
        for r in range(first, end):
            out[g, r] = x[g, r] @ w[g % w.shape[0]]
    return out


def plain_act(x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str) -> Tensor:
    import torch.nn.functional as F

    act = {"gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "relu": F.relu, "silu": F.silu,
           "none": lambda v: v}[kind]  # fmt: skip
    out = torch.zeros_like(x)
    for g, (first, end) in enumerate(rows.tolist()):
        for r in range(first, end):
            y = act(x[g, r] if bias is None else x[g, r] + bias[g % bias.shape[0]])
            out[g, r] = y if other is None else y * other[g, r]
    return out


# -- values -------------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(SEEDS, st.booleans(), st.booleans())
def test_keep_and_slots_are_those_of_the_plain_program(seed: int, ordered: bool, by_choice: bool) -> None:
    c = case(seed)
    order = torch.randperm(c.choice.shape[0], generator=c.g) if ordered else None
    kept = ops.moe_keep(c.choice, order, c.experts, c.capacity, by_choice)
    assert torch.equal(kept, plain_keep(c.choice, order, c.experts, c.capacity, by_choice))
    used = torch.randint(0, c.capacity + 1, (c.experts,), generator=c.g)
    for got, want in zip(ops.moe_slots(c.choice, used, c.capacity), plain_slots(c.choice, used, c.capacity), strict=True):
        assert torch.equal(got, want)
    slot, _, _ = ops.moe_slots(kept, torch.zeros(c.experts, dtype=torch.int64), c.capacity)
    assert torch.equal(slot >= 0, kept >= 0)  # what was kept has a place


def test_a_choice_that_is_no_expert_is_refused() -> None:
    for wrong in (3, -2):
        with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
            ops.moe_slots(torch.tensor([[wrong]]), torch.zeros(3, dtype=torch.int64), 4)
        with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
            ops.moe_keep(torch.tensor([[wrong]]), None, 3, 4, False)


@EXAMPLES
@given(SEEDS, st.booleans())
def test_encode_and_decode_are_those_of_the_plain_program(seed: int, weighted: bool) -> None:
    c = case(seed)
    slot, _, rows = c.slots()
    x, weight = c.normal(c.choice.shape[0], 5), c.normal(*c.choice.shape) if weighted else None
    buf = ops.moe_encode(x, c.choice, slot, weight, c.experts, c.capacity)
    assert torch.equal(buf, plain_encode(x, c.choice, slot, weight, c.experts, c.capacity))
    assert int((buf != 0).any(2).sum()) == int((rows[:, 1] - rows[:, 0]).sum())
    full = c.normal(c.experts, c.capacity, 5)
    assert torch.equal(ops.moe_decode(full, c.choice, slot, weight), plain_decode(full, c.choice, slot, weight))
    grad = c.normal(c.choice.shape[0], 5)
    want = torch.stack([(grad * plain_decode(full, c.choice[:, [j]], slot[:, [j]], None)).sum(1)
                        for j in range(slot.shape[1])], 1)  # fmt: skip
    torch.testing.assert_close(ops.moe_decode_weight(full, c.choice, slot, grad), want, rtol=1e-12, atol=1e-12)
    encoded, decoded = moe._encode_cuda(x, c.choice, slot, weight, c.experts, c.capacity), buf
    assert torch.equal(encoded, decoded)  # what CUDA devices compute


@EXAMPLES
@given(SEEDS, st.integers(1, 3), st.sampled_from(moe.KINDS))
def test_experts_are_those_of_the_plain_program(seed: int, ranks: int, kind: str) -> None:
    c = case(seed)
    experts, capacity = c.experts, int(torch.randint(1, 150, (), generator=c.g))
    rows = used_rows(c, ranks, experts, capacity)
    x, other, bias = c.normal(ranks * experts, capacity, 7), c.normal(ranks * experts, capacity, 9), c.normal(experts, 9)
    w = c.normal(experts, 7, 9) if seed % 2 else c.normal(experts, 9, 7).transpose(1, 2)
    want = plain_mm(x, w, rows)
    torch.testing.assert_close(ops.expert_mm(x, w, rows), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moe._mm_cuda(x, w, rows), want, rtol=1e-12, atol=1e-12)
    weight = x.new_zeros(experts, 7, 9)
    for g, (first, end) in enumerate(rows.tolist()):
        weight[g % experts] += x[g, first:end].t() @ other[g, first:end]
    torch.testing.assert_close(ops.expert_mm_weight(x, other, rows, experts), weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moe._mm_weight_cuda(x, other, rows, experts), weight, rtol=1e-12, atol=1e-12)
    for use_bias in (bias, None):
        for use_other in (other, None):
            got, want = (f(other, use_bias, use_other, rows, kind) for f in (ops.expert_act, plain_act))
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(moe._act_cuda(other, use_bias, use_other, rows, kind), want, rtol=1e-12, atol=1e-12)


@EXAMPLES
@given(SEEDS, st.integers(1, 3), st.sampled_from(moe.KINDS))
def test_gradients_of_activations_are_those_of_the_plain_program(seed: int, ranks: int, kind: str) -> None:
    c = case(seed)
    groups, capacity = ranks * c.experts, int(torch.randint(1, 150, (), generator=c.g))
    rows = used_rows(c, ranks, c.experts, capacity)
    grad, x, other = (c.normal(groups, capacity, 9) for _ in range(3))
    bias = c.normal(c.experts, 9)
    for use_bias in (bias, None):
        for use_other in (other, None):
            wrt = [v.clone().requires_grad_() for v in (x, use_other) if v is not None]
            y = plain_act(wrt[0], use_bias, wrt[1] if use_other is not None else None, rows, kind)
            want = torch.autograd.grad(y, wrt, grad) if y.requires_grad else [torch.zeros_like(v) for v in wrt]
            for made in (ops.expert_act_backward, moe._act_backward_cuda):
                got = made(grad, x, use_bias, use_other, rows, kind)
                assert len(wrt) == 2 or got[1].shape == (0,)
                for a, b in zip(got, want, strict=False):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
                    assert a[~moe._mask(rows, capacity).expand_as(a)].eq(0).all()


@pytest.mark.parametrize("kind", moe.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_activations_are_rounded_once(kind: str, dtype: torch.dtype) -> None:
    c = Case(torch.empty(0, 1, dtype=torch.int64), 2, 3, torch.Generator().manual_seed(11))
    rows = torch.tensor([[0, 70], [5, 66], [2, 2], [64, 69]])
    grad, x, other = (c.normal(4, 70, 9, dtype=dtype) for _ in range(3))
    bias = c.normal(2, 9, dtype=dtype)
    before, gate = ((v.double().requires_grad_()) for v in (moe._with_bias(x, bias), other))
    y = plain_act(before, None, gate, rows, kind)
    want = torch.autograd.grad(y, (before, gate), grad.double())
    bound = torch.finfo(dtype).eps / 2 * (1 if dtype.itemsize == 2 else 8)  # in float32 each step rounds
    for made in (ops.expert_act_backward, moe._act_backward_cuda):
        for got, exact in zip(made(grad, x, bias, other, rows, kind), want, strict=True):
            assert got.dtype is dtype
            torch.testing.assert_close(got.double(), exact, rtol=1.01 * bound, atol=2e-6)


def test_an_activation_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"'tanh': one of gelu"):
        ops.expert_act(torch.zeros(1, 1, 1), None, None, torch.zeros(1, 2, dtype=torch.int64), "tanh")
    with pytest.raises(ValueError, match=r"'tanh': one of gelu"):
        ops.expert_act_backward(*torch.zeros(2, 1, 1, 1), None, None, torch.zeros(1, 2, dtype=torch.int64), "tanh")


def test_rows_outside_the_buffer_are_refused() -> None:
    with pytest.raises(IndexError, match="group 1 uses rows 0:5 of 4"):
        ops.expert_mm(torch.zeros(2, 4, 3), torch.zeros(1, 3, 3), torch.tensor([[0, 4], [0, 5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_added_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    c = Case(torch.tensor([[0, 1, 2]]), 3, 1, torch.Generator().manual_seed(0))
    slot, _, _ = c.slots()
    buf, weight = c.normal(3, 1, 64, dtype=torch.float32).to(dtype), c.normal(1, 3, dtype=torch.float32)
    got = ops.moe_decode(buf, c.choice, slot, weight)
    assert got.dtype is dtype
    assert torch.equal(got, ops.moe_decode(buf.float(), c.choice, slot, weight).to(dtype))
    assert ops.moe_decode_weight(buf, c.choice, slot, got).dtype is torch.float32


# -- pieces against the whole -------------------------------------------------------------------------------------------


def cuts(c: Case, size: int, pieces: int) -> list[int]:
    inner = sorted(int(i) for i in torch.randint(0, size + 1, (pieces - 1,), generator=c.g))
    return [0, *inner, size]


@EXAMPLES
@given(SEEDS, st.integers(2, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_tokens_in_pieces_give_the_bits_of_the_whole(seed: int, pieces: int, dtype: torch.dtype) -> None:
    """A layer of experts over all tokens, and over pieces of them that hand the used rows on: every row is the same."""
    c = case(seed, tokens=300)
    tokens, h, f = c.choice.shape[0], 24, 40
    x, weight = c.normal(tokens, h, dtype=dtype), c.normal(*c.choice.shape, dtype=dtype)
    w1, b1 = c.normal(c.experts, h, f, dtype=dtype), c.normal(c.experts, f, dtype=dtype)
    w2 = c.normal(c.experts, f, h, dtype=dtype)

    def layer(x: Tensor, choice: Tensor, slot: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        buf = ops.moe_encode(x, choice, slot, None, c.experts, c.capacity)
        hidden = ops.expert_act(ops.expert_mm(buf, w1, rows), b1, None, rows, "gelu_tanh")
        return buf, ops.expert_mm(hidden, w2, rows)

    slot, used, rows = c.slots()
    buf, out = layer(x, c.choice, slot, rows)
    y = ops.moe_decode(out, c.choice, slot, weight)
    dweight = ops.moe_decode_weight(out, c.choice, slot, x)
    at, parts, found = torch.zeros(c.experts, dtype=torch.int64), [], []
    bounds = cuts(c, tokens, pieces)
    for first, end in pairwise(bounds):
        part, at, piece = ops.moe_slots(c.choice[first:end], at, c.capacity)
        assert torch.equal(part, slot[first:end])
        parts.append((*layer(x[first:end], c.choice[first:end], part, piece), piece))
        done = (c.choice[first:end], part, weight[first:end])
        found.append((ops.moe_decode(parts[-1][1], *done), ops.moe_decode_weight(parts[-1][1], *done[:2], x[first:end])))
    assert torch.equal(at, used)
    ranges = [p[2] for p in parts]
    assert torch.equal(ops.moe_join([p[0] for p in parts], ranges), buf)
    assert torch.equal(ops.moe_join([p[1] for p in parts], ranges), out)
    assert torch.equal(moe._join_cuda([p[1] for p in parts], ranges), out)
    assert torch.equal(torch.cat([p[0] for p in found]), y)
    assert torch.equal(torch.cat([p[1] for p in found]), dweight)


@EXAMPLES
@given(SEEDS, st.sampled_from(moe.KINDS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_gradients_of_rows_in_pieces_have_the_bits_of_the_whole(seed: int, kind: str, dtype: torch.dtype) -> None:
    c = case(seed)
    capacity = int(torch.randint(1, 150, (), generator=c.g))
    rows = used_rows(c, 2, c.experts, capacity)
    grad, x, other = (c.normal(2 * c.experts, capacity, 13, dtype=dtype) for _ in range(3))
    bias = c.normal(c.experts, 13, dtype=dtype)
    middle = rows[:, 0] + (torch.rand(rows.shape[0], generator=c.g) * (rows[:, 1] - rows[:, 0] + 1)).long()
    pieces = [torch.stack([rows[:, 0], middle], 1), torch.stack([middle, rows[:, 1]], 1)]
    parts = [ops.expert_act_backward(grad, x, bias, other, piece, kind) for piece in pieces]
    for i, want in enumerate(ops.expert_act_backward(grad, x, bias, other, rows, kind)):
        assert torch.equal(ops.moe_join([p[i] for p in parts], pieces), want)


# -- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    print("seed", seed)
    c = case(seed, tokens=5, most_experts=3)
    slot, _, rows = c.slots()
    wants = lambda *shape: c.normal(*shape).requires_grad_()  # noqa: E731
    x, weight, buf = wants(c.choice.shape[0], 3), wants(*c.choice.shape), wants(c.experts, c.capacity, 3)
    checks = {"check_batched_grad": False, "atol": 1e-6}
    assert gradcheck(lambda x: ops.moe_encode(x, c.choice, slot, None, c.experts, c.capacity), (x,), **checks)
    assert gradcheck(lambda x, w: ops.moe_encode(x, c.choice, slot, w, c.experts, c.capacity), (x, weight), **checks)
    assert gradcheck(lambda b: ops.moe_decode(b, c.choice, slot, None), (buf,), **checks)
    assert gradcheck(lambda b, w: ops.moe_decode(b, c.choice, slot, w), (buf, weight), **checks)
    assert gradcheck(lambda b, g: ops.moe_decode_weight(b, c.choice, slot, g), (buf, x), **checks)
    assert gradcheck(lambda *p: ops.moe_join(list(p), [rows, rows.flip(1)]), (buf, wants(*buf.shape)), **checks)


@pytest.mark.parametrize("kind", moe.KINDS)
def test_gradients_of_experts_are_those_of_finite_differences(kind: str) -> None:
    c = Case(torch.empty(0, 1, dtype=torch.int64), 2, 3, torch.Generator().manual_seed(7))
    rows = torch.tensor([[0, 3], [1, 2], [2, 2], [0, 2]])
    wants = lambda *shape: c.normal(*shape).requires_grad_()  # noqa: E731
    x, w, bias, other = wants(4, 3, 2), wants(2, 2, 3), wants(2, 2), wants(4, 3, 2)
    assert gradcheck(lambda x, w: ops.expert_mm(x, w, rows), (x, w))
    assert gradcheck(lambda x, w: ops.expert_mm(x, w.transpose(1, 2), rows), (x, wants(2, 5, 2)))
    assert gradcheck(lambda x, g: ops.expert_mm_weight(x, g, rows, 2), (x, wants(4, 3, 5)))
    assert gradcheck(lambda x: ops.expert_act(x, None, None, rows, kind), (x,))
    assert gradcheck(lambda x, b, o: ops.expert_act(x, b, o, rows, kind), (x, bias, other))
    assert torch.autograd.gradgradcheck(lambda x, w: ops.expert_mm(x, w, rows), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, b, o: ops.expert_act(x, b, o, rows, kind), (x, bias, other))
    assert torch.autograd.gradgradcheck(lambda x: ops.expert_act(x, None, None, rows, kind), (x,))
    grad = wants(4, 3, 2)
    assert gradcheck(lambda g, x, b, o: ops.expert_act_backward(g, x, b, o, rows, kind), (grad, x, bias, other))
    assert gradcheck(lambda g, x: ops.expert_act_backward(g, x, None, None, rows, kind)[0], (grad, x))
    assert torch.autograd.gradgradcheck(lambda g, x: ops.expert_act_backward(g, x, None, None, rows, kind)[0], (grad, x))


def test_rows_that_are_not_used_have_no_say() -> None:
    """Not a number outside the used rows reaches neither values nor gradients."""
    rows = torch.tensor([[1, 3], [0, 0]])
    x = torch.full((2, 4, 3), torch.nan)
    x[0, 1:3] = 1.0
    x.requires_grad_()
    w, b = torch.ones(2, 3, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    y = ops.expert_mm(ops.expert_act(x, b, x.detach(), rows, "gelu"), w, rows)
    y.backward(torch.where(y.isnan() | (y == 0), torch.nan, 1.0))
    for found in (y, x.grad, w.grad, b.grad):
        assert found is not None and found.isfinite().all()


# -- tracing ------------------------------------------------------------------------------------------------------------


def model(x: Tensor, choice: Tensor, order: Tensor, gate: Tensor, w1: Tensor, b1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    experts, capacity = w1.shape[0], 6
    kept = ops.moe_keep(choice, order, experts, capacity, True)
    slot, _, rows = ops.moe_slots(kept, choice.new_zeros(experts), capacity)
    buf = ops.moe_encode(x, kept, slot, None, experts, capacity)
    hidden = ops.expert_act(ops.expert_mm(buf, w1, rows), b1, ops.expert_mm(buf, w3, rows), rows, "silu")
    return ops.moe_decode(ops.moe_join([ops.expert_mm(hidden, w2, rows)], [rows]), kept, slot, gate)


def arguments() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    floats = [torch.randn(s, generator=g) for s in ((9, 8), (9, 2), (4, 8, 5), (4, 5), (4, 8, 5), (4, 5, 8))]
    x, gate, *weights = (v.requires_grad_() for v in floats)
    return x, torch.randint(0, 4, (9, 2), generator=g), torch.randperm(9, generator=g), gate, *weights


def gradients(fn: object, args: tuple[Tensor, ...]) -> list[Tensor]:
    y = fn(*args)  # type: ignore[operator]
    return [y, *torch.autograd.grad(y.square().sum(), [a for a in args if a.requires_grad])]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_compile_takes_all_of_it_in_one_graph() -> None:
    args = arguments()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(gradients(compiled, args), gradients(model, args))


def test_the_joint_graph_has_ops_of_plait_and_of_aten_alone() -> None:
    joint = aot_export_joint_simple(lambda *args: (model(*args),), arguments(), trace_joint=True)
    names = {str(n.target) for n in joint.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert {"plait.moe_encode.default", "plait.moe_decode_weight.default", "plait.expert_mm_weight.default"} <= names
    assert all(n.startswith(("plait.", "aten.")) for n in names), names
    assert {"plait.expert_act.default", "plait.expert_act_backward.default"} <= names
    assert not {"aten.sigmoid.default", "aten.where.self", "aten.arange.default"} & names  # rows that are used alone
    assert not any("assert" in n for n in names)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_values_and_gradients(mode: str) -> None:
    args = arguments()
    traced = make_fx(lambda *args: gradients(model, args), tracing_mode=mode)(*args)
    same(traced(*args), gradients(model, args))


def trained(arg: object) -> object:
    return arg.clone().requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def test_opcheck() -> None:
    x, choice, order, gate, w1, b1, _, _ = (a.detach() for a in arguments())
    slot, used, rows = ops.moe_slots(choice, choice.new_zeros(4), 6)
    buf = ops.moe_encode(x, choice, slot, None, 4, 6)
    hidden = ops.expert_mm(buf, w1, rows)
    for target, args in (
        (ops.moe_keep, (choice, order, 4, 6, True)), (ops.moe_keep, (choice, None, 4, 6, False)),
        (ops.moe_slots, (choice, used, 6)), (ops.moe_encode, (x, choice, slot, gate, 4, 6)),
        (ops.moe_decode, (buf, choice, slot, gate)), (ops.moe_decode, (buf, choice, slot, None)),
        (ops.moe_decode_weight, (buf, choice, slot, x)), (ops.expert_mm, (buf, w1, rows)),
        (ops.expert_mm_weight, (buf, hidden, rows, 4)), (ops.expert_act, (hidden, b1, hidden, rows, "silu")),
        (ops.expert_act_backward, (hidden, hidden, b1, hidden, rows, "silu")),
        (ops.expert_act_backward, (hidden, hidden, None, None, rows, "gelu")),
        (ops.moe_join, ([buf.clone().requires_grad_(), buf.clone()], [rows, rows.new_zeros(4, 2)])),
    ):  # fmt: skip
        opcheck(target, tuple(trained(a) for a in args))


def test_the_op_table_finds_them() -> None:
    for name in ("moe_keep", "moe_slots", "moe_encode", "moe_decode", "moe_decode_weight", "expert_mm", "expert_mm_weight",
                 "expert_act", "expert_act_backward", "moe_join"):  # fmt: skip
        found = op(f"plait.{name}.default")
        assert found.effect is None and not found.traits, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_infer_what_fake_kernels_do(dtype: torch.dtype) -> None:
    s0, symbols = size_symbol("s0"), {size_symbol("s0"): SymbolInfo(2, 64, 7)}
    floats = lambda *shape: TensorType(shape, dtype)  # noqa: E731
    ints = lambda *shape: TensorType(shape, torch.int64)  # noqa: E731
    pairs, rows = (ints(s0, 2), ints(s0, 2)), ints(6, 2)
    x, buf, weight = floats(s0, 5), floats(6, 9, 5), TensorType((s0, 2), torch.float32)
    for name, args in (
        ("moe_keep", (pairs[0], ints(s0), 6, 9, True)), ("moe_slots", (pairs[0], ints(6), 9)),
        ("moe_encode", (x, *pairs, weight, 6, 9)), ("moe_encode", (x, *pairs, None, 6, s0)),
        ("moe_decode", (buf, *pairs, weight)), ("moe_decode_weight", (buf, *pairs, x)),
        ("expert_mm", (buf, floats(3, 5, 8), rows)), ("expert_mm", (buf, floats(3, 8, 5).with_(shape=(3, 5, 8)), rows)),
        ("expert_mm_weight", (buf, floats(6, 9, 4), rows, 3)), ("expert_act", (buf, floats(3, 5), buf, rows, "gelu")),
        ("expert_act_backward", (buf, buf, floats(3, 5), buf, rows, "gelu")),
        ("expert_act_backward", (buf, buf, None, None, rows, "relu")),
        ("moe_join", ((buf, buf), (rows, rows))),
    ):  # fmt: skip
        found, target = by_rule(op(f"plait.{name}.default"), args, symbols), op(f"plait.{name}.default")
        types = found if isinstance(found, tuple) else (found,)
        assert types == _by_fake_tensors(target, args, symbols), name
