"""Mixture of experts: the ops of one rank, `plait::moe_*` and `plait::expert_*`, with references, fake kernels, gradients.

Words. S tokens of h features each choose k experts of E. `choice` [S, k] has the experts' ids in order of preference, -1
for none; `slot` [S, k] the row that each pair got in the expert's buffer, -1 for none. A buffer [G, C, h] has G groups of C
rows, group g for expert g % L of L; `rows` [G, 2] has (first, past the last) of its used rows, and rows outside are zero in
every result. The three are int64.

What the ops promise beyond their values: the bits of a row do not depend on which other rows are used, so tokens may be
taken in pieces, each with rows of its own, and joined again. On CUDA devices nothing waits for the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Rows that the CPU references compute at a time, counted from row 0 of a group: a row always lies at the same place of a
call of the same size, and so gets the same bits."""

_library = torch.library.Library("plait", "FRAGMENT")
_library.define("moe_keep(Tensor choice, Tensor? order, SymInt experts, SymInt capacity, bool by_choice) -> Tensor")
_library.define("moe_slots(Tensor choice, Tensor used, SymInt capacity) -> (Tensor slot, Tensor used, Tensor rows)")
_library.define(
    "moe_encode(Tensor x, Tensor choice, Tensor slot, Tensor? weight, SymInt experts, SymInt capacity) -> Tensor"
)
_library.define("moe_decode(Tensor buf, Tensor choice, Tensor slot, Tensor? weight) -> Tensor")
_library.define("moe_decode_weight(Tensor buf, Tensor choice, Tensor slot, Tensor grad) -> Tensor")
_library.define("expert_mm(Tensor x, Tensor w, Tensor rows) -> Tensor")
_library.define("expert_mm_weight(Tensor x, Tensor grad, Tensor rows, SymInt experts) -> Tensor")
_library.define("expert_act(Tensor x, Tensor? bias, Tensor? other, Tensor rows, str kind) -> Tensor")
_library.define(
    "expert_act_backward(Tensor grad, Tensor x, Tensor? bias, Tensor? other, Tensor rows, str kind) -> (Tensor, Tensor)"
)
_library.define("moe_join(Tensor[] parts, Tensor[] rows) -> Tensor")


def _summed(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of `dtype` are added and weighted in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; tracing sees no op where it has it already."""
    return x if x.dtype is dtype else x.to(dtype)


# -- gates --------------------------------------------------------------------------------------------------------------


def _places(claims: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Claims [n] of experts, -1 for none: how many earlier ones each has [n], and how many each expert has [experts]."""
    key = claims + 1
    ordered, source = key.sort(stable=True)
    bounds = torch.arange(experts + 1, device=claims.device)
    starts = torch.searchsorted(ordered, bounds)
    counts = torch.searchsorted(ordered, bounds, right=True) - starts
    places = torch.arange(claims.numel(), device=claims.device) - starts.gather(0, ordered)
    return torch.empty_like(places).scatter_(0, source, places), counts[1:]


def moe_keep(choice: Tensor, order: Tensor | None, experts: int, capacity: int, by_choice: bool) -> Tensor:
    """`choice` [S, k] with -1 where the expert was full already.

    Tokens claim rows in `order`, a permutation [S] (None: as they come); `by_choice`: all first choices before all second
    ones (GShard, section 2.2), otherwise all choices of a token before the next token's. Raises IndexError or RuntimeError
    on a CPU for ids outside -1 .. experts - 1.
    """
    turn = choice if order is None else choice.index_select(0, order)
    claims = (turn.t() if by_choice else turn).reshape(-1)
    places, _ = _places(claims, experts)
    places = places.view(*turn.t().shape).t() if by_choice else places.view(turn.shape)
    kept = torch.where(places < capacity, turn, -1)
    return kept.contiguous() if order is None else torch.empty_like(choice).index_copy_(0, order, kept)


def moe_slots(choice: Tensor, used: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Next free rows for pairs in the order of tokens: `slot` [S, k], `used` [E] afterwards, `rows` [E, 2] that are new.

    The first pair of an expert gets row `used` [E] of it. A scan along tokens: pieces that hand `used` on give the slots of
    the whole. Pairs of a full expert get -1.
    """
    flat = choice.reshape(-1)
    places, counts = _places(flat, used.numel())
    places = places + used.gather(0, flat.clamp(min=0))
    slot = torch.where((flat >= 0) & (places < capacity), places, -1).view(choice.shape)
    after = (used + counts).clamp(max=capacity)
    return slot, after, torch.stack([used, after], 1)


# -- between tokens and buffers -----------------------------------------------------------------------------------------


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    """Rows x [n, h] times weight [n], multiplied in the wider dtype, not narrower than float32."""
    wide = torch.promote_types(_summed(x.dtype), weight.dtype)
    return x.to(wide) * weight.to(wide).unsqueeze(1)


def _encode_cpu(x: Tensor, choice: Tensor, slot: Tensor, weight: Tensor | None, experts: int, capacity: int) -> Tensor:
    """Tokens [S, h] copied to their rows, times weight [S, k] where there is one: [E, C, h], zero elsewhere."""
    token, k = (slot >= 0).nonzero(as_tuple=True)
    found = x.index_select(0, token)
    if weight is not None:
        found = _weighted(found, weight[token, k]).to(x.dtype)
    buf = x.new_zeros(experts * capacity, x.shape[1])
    buf.index_copy_(0, choice[token, k] * capacity + slot[token, k], found)
    return buf.view(experts, capacity, x.shape[1])


def _encode_cuda(x: Tensor, choice: Tensor, slot: Tensor, weight: Tensor | None, experts: int, capacity: int) -> Tensor:
    # how many pairs there are is not known here: those without a row write one that is cut off
    spare = experts * capacity
    at = torch.where(slot >= 0, choice * capacity + slot, spare)
    buf = x.new_zeros(spare + 1, x.shape[1])
    for j in range(slot.shape[1]):
        buf.index_copy_(0, at[:, j], x if weight is None else _weighted(x, weight[:, j]).to(x.dtype))
    return buf[:spare].clone().view(experts, capacity, x.shape[1])


def _found(buf: Tensor, choice: Tensor, slot: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(j, rows [S, h] that the j-th pairs of tokens got, zero where they got none)."""
    flat = buf.reshape(-1, buf.shape[2])
    at = (choice * buf.shape[1] + slot).clamp(min=0)
    zero = buf.new_zeros(())
    for j in range(slot.shape[1]):
        yield j, torch.where((slot[:, j] >= 0).unsqueeze(1), flat.index_select(0, at[:, j]), zero)


def moe_decode(buf: Tensor, choice: Tensor, slot: Tensor, weight: Tensor | None) -> Tensor:
    """Rows of a buffer [E, C, h] back at their tokens: [S, h], the sum over a token's pairs, in order, of weight * row.

    Halves are added in float32 and rounded once. Dropped pairs add nothing, whatever their weights are.
    """
    wide = _summed(buf.dtype) if weight is None else torch.promote_types(_summed(buf.dtype), weight.dtype)
    y = buf.new_zeros((choice.shape[0], buf.shape[2]), dtype=wide)
    if buf.numel():
        for j, row in _found(buf, choice, slot):
            y += row if weight is None else _weighted(row, torch.where(slot[:, j] >= 0, weight[:, j], 0))
    return y.to(buf.dtype)


def _halved(x: Tensor) -> Tensor:
    """x [n, h] summed along h, in an order that depends on h alone: [n]."""
    total = x.new_zeros(x.shape[0])
    while x.shape[1]:
        half = x.shape[1] // 2
        if x.shape[1] % 2:
            total = total + x[:, -1]
        x = x[:, :half] + x[:, half : 2 * half]
    return total


def moe_decode_weight(buf: Tensor, choice: Tensor, slot: Tensor, grad: Tensor) -> Tensor:
    """Dot product of each token's grad [S, h] with the rows that it got: [S, k], in float32 for halves; 0 for dropped."""
    wide = torch.promote_types(_summed(buf.dtype), grad.dtype)
    out = buf.new_zeros(choice.shape, dtype=wide)
    if buf.numel():
        for j, row in _found(buf, choice, slot):
            out[:, j] = torch.where(slot[:, j] >= 0, _halved(row.to(wide) * grad.to(wide)), 0)
    return out


# -- experts ------------------------------------------------------------------------------------------------------------


def _mask(rows: Tensor, capacity: int) -> Tensor:
    """[G, C, 1]: whether a row is used."""
    at = torch.arange(capacity, device=rows.device)
    return ((at >= rows[:, :1]) & (at < rows[:, 1:])).unsqueeze(2)


def _blocks(rows: Tensor, capacity: int) -> Iterator[tuple[int, int, int, int]]:
    """(group, first row of a block, first and past the last used row in it) of all blocks with used rows."""
    for g, (first, end) in enumerate(rows.tolist()):
        if not 0 <= first <= end <= capacity:
            raise IndexError(f"group {g} uses rows {first}:{end} of {capacity}")
        for start in range(first - first % BLOCK, end if first < end else 0, BLOCK):
            yield g, start, max(first, start), min(end, start + BLOCK)


def _mm_cpu(x: Tensor, w: Tensor, rows: Tensor) -> Tensor:
    """Used rows of x [G, C, a] by their experts' w [L, a, b]: [G, C, b]."""
    groups, capacity, _ = x.shape
    out = x.new_zeros(groups, capacity, w.shape[2])
    held = x.new_zeros(BLOCK, x.shape[2])  # libraries choose kernels by sizes and by where memory begins
    for g, start, first, end in _blocks(rows, capacity):
        held[first - start : end - start] = x[g, first:end]
        out[g, first:end] = (held @ w[g % w.shape[0]])[first - start : end - start]
    return out


def _by_expert(x: Tensor, experts: int) -> Tensor:
    """[G, C, a] to [L, R * C, a]: the rows of each expert together."""
    return x.reshape(-1, experts, *x.shape[1:]).transpose(0, 1).reshape(experts, -1, x.shape[2])


def _mm_cuda(x: Tensor, w: Tensor, rows: Tensor) -> Tensor:
    groups, capacity, _ = x.shape
    experts = w.shape[0]
    y = torch.bmm(_by_expert(x, experts), w).view(experts, groups // experts, capacity, w.shape[2])
    return torch.where(_mask(rows, capacity), y.transpose(0, 1).reshape(groups, capacity, w.shape[2]), 0)


def _mm_weight_cpu(x: Tensor, grad: Tensor, rows: Tensor, experts: int) -> Tensor:
    """x^T grad over the used rows of each expert's groups, in their order: x [G, C, a], grad [G, C, b] -> [L, a, b]."""
    out = x.new_zeros(experts, x.shape[2], grad.shape[2])
    for g, (first, end) in enumerate(rows.tolist()):
        if not 0 <= first <= end <= x.shape[1]:
            raise IndexError(f"group {g} uses rows {first}:{end} of {x.shape[1]}")
        if first < end:
            out[g % experts].addmm_(x[g, first:end].t(), grad[g, first:end])
    return out


def _mm_weight_cuda(x: Tensor, grad: Tensor, rows: Tensor, experts: int) -> Tensor:
    used = _mask(rows, x.shape[1])
    left, right = (_by_expert(torch.where(used, v, 0), experts) for v in (x, grad))
    return torch.bmm(left.transpose(1, 2), right)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = x.sigmoid()  # torch's op for this has no derivative of its own
    return grad * (s * (1 + x * (1 - s)))


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (torch.ops.aten.gelu.default, torch.ops.aten.gelu_backward.default),
    "gelu_tanh": (
        lambda x: torch.ops.aten.gelu.default(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward.default(grad, x, approximate="tanh"),
    ),
    "relu": (torch.ops.aten.relu.default, lambda grad, x: torch.ops.aten.threshold_backward.default(grad, x, 0)),
    "silu": (torch.ops.aten.silu.default, _silu_backward),
    "none": (lambda x: x, lambda grad, x: grad),
}
KINDS = tuple(_ACTIVATIONS)


def _activation(kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    if kind not in _ACTIVATIONS:
        raise ValueError(f"expert_act has no kind {kind!r}: one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[kind]


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [G, C, f] plus the bias [L, f] of each group's expert."""
    if bias is None:
        return x
    return (x.unflatten(0, (-1, bias.shape[0])) + _as(bias, x.dtype).unsqueeze(1)).flatten(0, 1)


def _act_cpu(x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str) -> Tensor:
    """act(x + bias) * other on used rows: x and other [G, C, f], bias [L, f] -> [G, C, f]. `kind` is one of KINDS.

    Raises ValueError for another one.
    """
    act, _ = _activation(kind)
    out = x.new_zeros(x.shape)
    for g, start, first, end in _blocks(rows, x.shape[1]):
        block = slice(start, start + BLOCK)
        y = act(x[g, block] if bias is None else x[g, block] + bias[g % bias.shape[0]].to(x.dtype))
        y = y if other is None else y * other[g, block]
        out[g, first:end] = y[first - start : end - start]
    return out


def _act_cuda(x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str) -> Tensor:
    act, _ = _activation(kind)
    y = act(_with_bias(x.contiguous(), bias))
    return torch.where(_mask(rows, x.shape[1]), y if other is None else y * other, 0).to(x.dtype)


def _slopes(grad: Tensor, before: Tensor, other: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Gradients of what is activated and of `other`, in float32 for halves, of all rows that are given."""
    act, slope = _activation(kind)
    wide = _summed(before.dtype)
    grad, before = _as(grad, wide), _as(before, wide)
    if other is None:
        return slope(grad, before), None
    return slope(grad * _as(other, wide), before), grad * act(before)


def _act_backward_cpu(
    grad: Tensor, x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of `other` where act(x + bias) * other has the gradient `grad` [G, C, f]; the second has no
    elements where there is no `other`. Halves are computed in float32 and rounded once."""
    _activation(kind)
    dx, dother = x.new_zeros(x.shape), x.new_empty(0) if other is None else other.new_zeros(other.shape)
    for g, start, first, end in _blocks(rows, x.shape[1]):
        block, used = slice(start, start + BLOCK), slice(first - start, end - start)
        before = x[g, block] if bias is None else x[g, block] + bias[g % bias.shape[0]].to(x.dtype)
        mine, theirs = _slopes(grad[g, block], before, None if other is None else other[g, block], kind)
        dx[g, first:end] = mine[used]
        if theirs is not None:
            dother[g, first:end] = theirs[used]
    return dx, dother


def _act_backward_cuda(
    grad: Tensor, x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    used = _mask(rows, x.shape[1])
    dx, dother = _slopes(grad, _with_bias(x, bias), other, kind)
    dx = _as(torch.where(used, dx, 0), x.dtype).contiguous()
    if other is None or dother is None:
        return dx, x.new_empty(0)
    return dx, _as(torch.where(used, dother, 0), other.dtype).contiguous()


def _join_cpu(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """One buffer [G, C, h] of the used rows of all parts, whose ranges are disjoint."""
    out = parts[0].new_zeros(parts[0].shape)
    for part, used in zip(parts, rows, strict=True):
        for g, (first, end) in enumerate(used.tolist()):
            out[g, first:end] = part[g, first:end]
    return out


def _join_cuda(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    out = parts[0].new_zeros(parts[0].shape)
    for part, used in zip(parts, rows, strict=True):
        out = torch.where(_mask(used, part.shape[1]), part, out)
    return out


# -- registration: references and fake kernels --------------------------------------------------------------------------


def _fake_slots(choice: Tensor, used: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return choice.new_empty(choice.shape), used.new_empty(used.shape), used.new_empty(used.shape[0], 2)


def _fake_act(x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str) -> Tensor:
    _activation(kind)
    return x.new_empty(x.shape)


def _fake_act_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    _activation(kind)
    return x.new_empty(x.shape), x.new_empty(0) if other is None else other.new_empty(other.shape)


for _name, _cpu, _cuda, _fake in (
    ("moe_keep", moe_keep, moe_keep, lambda choice, order, experts, capacity, by_choice: choice.new_empty(choice.shape)),
    ("moe_slots", moe_slots, moe_slots, _fake_slots),
    ("moe_encode", _encode_cpu, _encode_cuda, lambda x, choice, slot, weight, experts, capacity: x.new_empty(
        experts, capacity, x.shape[1])),
    ("moe_decode", moe_decode, moe_decode, lambda buf, choice, slot, weight: buf.new_empty(choice.shape[0], buf.shape[2])),
    ("moe_decode_weight", moe_decode_weight, moe_decode_weight, lambda buf, choice, slot, grad: buf.new_empty(
        choice.shape, dtype=torch.promote_types(_summed(buf.dtype), grad.dtype))),
    ("expert_mm", _mm_cpu, _mm_cuda, lambda x, w, rows: x.new_empty(x.shape[0], x.shape[1], w.shape[2])),
    ("expert_mm_weight", _mm_weight_cpu, _mm_weight_cuda, lambda x, grad, rows, experts: x.new_empty(
        experts, x.shape[2], grad.shape[2])),
    ("expert_act", _act_cpu, _act_cuda, _fake_act),
    ("expert_act_backward", _act_backward_cpu, _act_backward_cuda, _fake_act_backward),
    ("moe_join", _join_cpu, _join_cuda, lambda parts, rows: parts[0].new_empty(parts[0].shape)),
):  # fmt: skip
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"plait::{_name}", _fake, lib=_library)

# -- gradients ----------------------------------------------------------------------------------------------------------

_ops = torch.ops.plait


def _save_encode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, choice, slot, weight = inputs[:4]
    ctx.save_for_backward(choice, slot, weight, x if weight is not None and ctx.needs_input_grad[3] else None)


def _encode_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    choice, slot, weight, x = ctx.saved_tensors
    dx = _ops.moe_decode(grad, choice, slot, weight) if ctx.needs_input_grad[0] else None
    dweight = None if x is None else _as(_ops.moe_decode_weight(grad, choice, slot, x), weight.dtype)
    return dx, None, None, dweight, None, None


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    buf, choice, slot, weight = inputs
    ctx.save_for_backward(choice, slot, weight, buf if weight is not None and ctx.needs_input_grad[3] else None)
    ctx.sizes = buf.shape[:2]


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    choice, slot, weight, buf = ctx.saved_tensors
    dbuf = _ops.moe_encode(grad, choice, slot, weight, *ctx.sizes) if ctx.needs_input_grad[0] else None
    dweight = None if buf is None else _as(_ops.moe_decode_weight(buf, choice, slot, grad), weight.dtype)
    return dbuf, None, None, dweight


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(v for v in inputs if v is None or isinstance(v, Tensor)))


def _decode_weight_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    buf, choice, slot, outer = ctx.saved_tensors
    dbuf = _as(_ops.moe_encode(outer, choice, slot, grad, buf.shape[0], buf.shape[1]), buf.dtype)
    return dbuf, None, None, _as(_ops.moe_decode(buf, choice, slot, grad), outer.dtype)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, rows = ctx.saved_tensors
    dx = _ops.expert_mm(grad, w.transpose(1, 2), rows) if ctx.needs_input_grad[0] else None
    dw = _ops.expert_mm_weight(x, grad, rows, w.shape[0]) if ctx.needs_input_grad[1] else None
    return dx, dw, None


def _mm_weight_backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
    x, grad, rows = ctx.saved_tensors
    return _ops.expert_mm(grad, outer.transpose(1, 2), rows), _ops.expert_mm(x, outer, rows), None, None


def _save_act(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.kind = inputs[-1]


def _act_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, bias, other, rows = ctx.saved_tensors
    dx, dother = _ops.expert_act_backward(grad, x, bias, other, rows, ctx.kind)
    dbias = None if bias is None else _as(dx.unflatten(0, (-1, bias.shape[0])).sum((0, 2)), bias.dtype)
    return dx, dbias, None if other is None else dother, None, None


def _act_twice_backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
    """By torch's own formulas, over whole buffers."""
    *floats, rows = ctx.saved_tensors
    names = ("grad", "x", "bias", "other")
    given = {name: v for name, v in zip(names, floats, strict=True) if v is not None}

    def whole(some: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _act_backward_cuda(some["grad"], some["x"], some.get("bias"), some.get("other"), rows, ctx.kind)

    pull: Any = torch.func.vjp(whole, given)[1]
    (found,) = pull(outer)
    return (*map(found.get, names), None, None)


def _save_join(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1])


def _join_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    used = ctx.saved_tensors
    return [_ops.moe_join([grad], [rows]) for rows in used], [None] * len(used)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


for _name, _backward, _save in (
    ("moe_keep", lambda ctx, grad: (None,) * 5, _save_nothing),
    ("moe_slots", lambda ctx, *grads: (None,) * 3, _save_nothing),
    ("moe_encode", _encode_backward, _save_encode),
    ("moe_decode", _decode_backward, _save_decode),
    ("moe_decode_weight", _decode_weight_backward, _save_all),
    ("expert_mm", _mm_backward, _save_all),
    ("expert_mm_weight", _mm_weight_backward, _save_all),
    ("expert_act", _act_backward, _save_act),
    ("expert_act_backward", _act_twice_backward, _save_act),
    ("moe_join", _join_backward, _save_join),
):
    torch.library.register_autograd(f"plait::{_name}", _backward, setup_context=_save, lib=_library)
