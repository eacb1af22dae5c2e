"""Written-out attention becomes one op, which never holds the scores of all rows at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ir import Builder, Dim, Graph, Match, Node, Reason, Rule, Such, Value, Var, pattern
from .base import Context, Numerics, Pass, reassociates, register
from .operands import inner, number_of, view_type

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
_BMM, _PERMUTE, _CAST = "aten.bmm.default", "aten.permute.default", "aten._to_copy.default"
_IN_ORDER = ("aten.view.default", "aten._unsafe_view.default", "aten.clone.default", "aten.expand.default")
_ON_SCORES = (*_IN_ORDER, _CAST, "aten.mul.Tensor", "aten.div.Tensor", "aten.add.Tensor", "aten.where.self")
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)


@dataclass(frozen=True)
class _Masked:
    """Scores that take no part where `where` is `when`: they are replaced by `number`."""

    where: Value
    when: bool
    number: float


@dataclass(frozen=True)
class _Written:
    """softmax(scale * q @ k^T + biases) @ v for heads `lead` = (B, H): q holds [B, H, L, E], k [B, H, S, E], or [B, H, E, S]
    where it is `turned`, v [B, H, S, E]. Of keys and values there may be fewer heads."""

    q: Value
    k: Value
    v: Value
    turned: bool
    lead: tuple[Dim, ...]
    scale: float
    biases: tuple[Value | _Masked, ...]


def _readers(m: Match, v: Value) -> int:
    """How many read a value, assertions about its type (which torch.export leaves) aside."""
    nodes = m.graph.users.get(v, ())
    return sum(n.op.name != "aten._assert_tensor_metadata.default" for n in nodes) + (v in m.graph.results)


def _in_order(m: Match, v: Value) -> Value | None:
    """What a value is but for its shape and layout: the elements are the same ones in row-major order."""
    node = m.producer(v)
    if node is None or node.op.name not in _IN_ORDER:
        return None
    source = node.args[0]
    if node.op.name == "aten.expand.default" and source.tensor.numel != v.tensor.numel:
        return None
    return source


def _softmax(m: Match, v: Any) -> Node | None:
    """The softmax whose result a value is, through views, copies and a cast, each of them read only here."""
    while isinstance(v, Value) and _readers(m, v) == 1:
        node = m.producer(v)
        if node is None or node.op.name == "aten._softmax.default":
            return node
        cast = node.op.name == _CAST and v.tensor.dtype in _HALF
        v = node.args[0] if cast else _in_order(m, v)
    return None


def _shaped(m: Match, v: Value, shape: tuple[Dim, ...]) -> Value | None:
    """The first value of that shape which holds the elements of `v` in the same order; None where there is none."""
    found: Value | None = None
    at: Value | None = v
    while at is not None:
        if at.tensor.shape == shape:
            found = at
        at = _in_order(m, at)
    return found


def _swapped(m: Match, v: Value) -> Value | None:
    """The matrices that `v` holds transposed, through views and copies."""
    at: Value | None = v
    while at is not None:
        node = inner(m, _PERMUTE, at)
        if node is not None:
            rank = at.tensor.rank
            dims = tuple(d % rank for d in node["dims"])
            return node.args[0] if dims == (*range(rank - 2), rank - 1, rank - 2) else None
        at = _in_order(m, at)
    return None


def _ungrouped(m: Match, v: Value, shape: tuple[Dim, ...]) -> Value:
    """Keys or values before heads were repeated for the queries that share them; `v` itself where they were not."""
    at: Value | None = v
    while at is not None:
        node = inner(m, "aten.expand.default", at)
        if node is not None and at.tensor.rank == 5:
            flat = inner(m, ("aten.unsqueeze.default", "aten.view.default"), node.args[0])
            if flat is not None and node.args[0].tensor.shape[2] == 1 and at.tensor.shape[2] != 1:
                source = flat.args[0]
                same = source.tensor.shape == (shape[0], at.tensor.shape[1], *shape[2:])
                return source if same else v
        at = _in_order(m, at)
    return v


# -- scores -----------------------------------------------------------------------------------------------------------


class _Scores:
    """Takes the scores apart, from the softmax back to the product of queries and keys."""

    def __init__(self, m: Match, scores: Value) -> None:
        self.m = m
        self.shape = scores.tensor.shape
        self.dtype = scores.tensor.dtype
        self.scale = 1.0
        self.biases: list[Value | _Masked] = []
        self.product: Node | None = None
        self.why = self._walk(scores)

    def _walk(self, v: Value) -> Reason | None:
        shape = self.shape
        while True:
            if _readers(self.m, v) != 1:
                return Reason("something else reads the scores", v)
            node = self.m.producer(v)
            if node is None:
                return Reason("the scores are no product", v)
            if node.op.name == _BMM:
                self.product = node
                return None
            found = self._step(node, v, plain=v.tensor.shape == shape and self.scale == 1)
            if isinstance(found, Reason):
                return found
            v = found

    def _step(self, node: Node, v: Value, *, plain: bool) -> Value | Reason:
        """One op further back. `plain`: what is added here is added to the scores as the softmax sees them."""
        name = node.op.name
        if name in _IN_ORDER:
            source = _in_order(self.m, v)
            return Reason("the scores are repeated", v) if source is None else source
        if name == _CAST and node.args[0].tensor.dtype in _HALF and v.tensor.dtype is torch.float32:
            return node.args[0]
        if name in ("aten.mul.Tensor", "aten.div.Tensor"):
            return self._scaled(node, v)
        if name == "aten.add.Tensor" and plain and node["alpha"] == 1:
            for mine, other in ((node["self"], node["other"]), (node["other"], node["self"])):
                if isinstance(other, Value) and isinstance(mine, Value) and self._is_score(mine, v):
                    self.biases.append(other)
                    return mine
        if name == "aten.where.self" and plain:
            condition, yes, no = node.args
            for mine, other, when in ((no, yes, True), (yes, no, False)):
                number = number_of(self.m, other)
                if number is not None and isinstance(mine, Value) and self._is_score(mine, v):
                    if number not in (-math.inf, torch.finfo(v.tensor.dtype).min):
                        return Reason(f"masked scores become {number}, which others may be less than", v)
                    self.biases.append(_Masked(condition, when, float(number)))
                    return mine
        return Reason(f"{name} is no part of attention", v)

    def _scaled(self, node: Node, v: Value) -> Value | Reason:
        number, mine = number_of(self.m, node["other"]), node["self"]
        if number is None and node.op.name == "aten.mul.Tensor":
            number, mine = number_of(self.m, node["self"]), node["other"]
        if (
            number is None
            or not isinstance(mine, Value)
            or mine.tensor.shape != v.tensor.shape
            or mine.tensor.dtype != v.tensor.dtype
        ):
            return Reason("the scale of the scores is not known", v)
        if node.op.name == "aten.div.Tensor" and number == 0:
            return Reason("the scores are divided by zero", v)
        self.scale *= 1 / number if node.op.name == "aten.div.Tensor" else number
        return mine

    def _is_score(self, mine: Value, v: Value) -> bool:
        """Whether an operand may be the scores: as large as the result, and made of a product that is read only here."""
        if mine.tensor.numel != v.tensor.numel or _readers(self.m, mine) != 1 or (node := self.m.producer(mine)) is None:
            return False
        if node.op.name == _BMM:
            return True
        return node.op.name in _ON_SCORES and any(self._is_score(a, v) for a in node.inputs)


def _written(m: Match) -> _Written | Reason:
    """The parts of written-out attention, whose last product the matched node is."""
    soft = _softmax(m, m.node["self"])
    assert soft is not None, "the pattern asks for it"
    x: Value = soft["self"]
    rank, out = x.tensor.rank, m.node.out.tensor
    if out.dtype not in _DTYPES or out.device != "cpu":
        return Reason(f"{out} is not computed by attention")
    if rank not in (3, 4) or soft["dim"] % rank != rank - 1:
        return Reason("the softmax is not along the rows of [batch, heads, rows, keys]", x)
    scores = _Scores(m, x)
    if scores.why is not None or scores.product is None:
        return scores.why or Reason("the scores are no product", x)
    lead = (x.tensor.shape[0], 1) if rank == 3 else x.tensor.shape[:2]
    q, k, v = scores.product["self"], scores.product["mat2"], m.node["mat2"]
    rows, keys = x.tensor.shape[-2:]
    width = q.tensor.shape[2]
    if q.tensor.dtype != out.dtype or v.tensor.shape[2] != width:
        return Reason("queries and values are of different types or widths")
    if q.tensor.shape[1] != rows or k.tensor.shape[2] != keys or 0 in (*lead, rows, keys, width):
        return Reason("the scores are regrouped between the products, or empty")
    queries, values = _as_heads(m, q, (*lead, rows, width)), _as_heads(m, v, (*lead, keys, width))
    upright = _swapped(m, k)
    by_key = None if upright is None else _as_heads(m, upright, (*lead, keys, width))
    turned = by_key is None
    if by_key is None:
        by_key = _as_heads(m, k, (*lead, width, keys))
    if queries is None or by_key is None or values is None:
        return Reason("operands that are not [batch, heads, rows, width]")
    if not turned and isinstance(lead[1], int):
        shared = _ungrouped(m, by_key, (*lead, keys, width)), _ungrouped(m, values, (*lead, keys, width))
        if shared[0].tensor.shape[:2] == shared[1].tensor.shape[:2]:
            by_key, values = shared
    return _Written(queries, by_key, values, turned, lead, scores.scale, tuple(scores.biases))


def _as_heads(m: Match, v: Value, shape: tuple[Dim, ...]) -> Value | None:
    """A value that holds `v`, and is of that shape or can be viewed so."""
    return _shaped(m, v, shape) or (v if view_type(m, v, shape) is not None else None)


# -- rewriting --------------------------------------------------------------------------------------------------------


def _check(m: Match) -> Reason | None:
    found = _written(m)
    return found if isinstance(found, Reason) else None


def _view(b: Builder, v: Value, shape: tuple[Dim, ...]) -> Value:
    return v if v.tensor.shape == shape else b.call("aten.view.default", v, shape)


def _aligned(b: Builder, v: Value, rank: int) -> Value:
    """A bias of scores of that rank as one of [B, H, L, S]; three axes are [B, L, S]."""
    for _ in range(rank - v.tensor.rank):
        v = b.call("aten.unsqueeze.default", v, 0)
    for _ in range(4 - rank):
        v = b.call("aten.unsqueeze.default", v, 1)
    return v


def _full(b: Builder, value: float, dtype: torch.dtype) -> Value:
    return b.call("aten.full.default", (), value, dtype=dtype, device=torch.device("cpu"))


def _bias(b: Builder, bias: Value | _Masked, dtype: torch.dtype, rank: int) -> Value:
    """What is added to the scores, [B, H, L, S] or broadcast to it."""
    if isinstance(bias, _Masked):
        numbers = _full(b, bias.number, dtype), _full(b, 0.0, dtype)
        yes, no = numbers if bias.when else reversed(numbers)
        return b.call("aten.where.self", _aligned(b, bias.where, rank), yes, no)
    aligned = _aligned(b, bias, rank)
    return aligned if aligned.tensor.dtype is dtype else b.call(_CAST, aligned, dtype=dtype)


def _build(m: Match, b: Builder) -> Value:
    found = _written(m)
    assert isinstance(found, _Written), "the check has passed"
    soft = _softmax(m, m.node["self"])
    assert soft is not None, "the pattern asks for it"
    x, out = soft["self"], m.node.out.tensor
    rows, keys, width = x.tensor.shape[-2], x.tensor.shape[-1], out.shape[2]
    q, k, v = found.q, found.k, found.v
    q = _view(b, q, (*found.lead, rows, width))
    if found.turned:
        k = b.call(_PERMUTE, _view(b, k, (*found.lead, width, keys)), (0, 1, 3, 2))
    elif k.tensor.rank != 4:
        k = _view(b, k, (*found.lead, keys, width))
    if v.tensor.rank != 4:
        v = _view(b, v, (*found.lead, keys, width))
    dtype = torch.float32 if x.tensor.dtype is torch.float32 and out.dtype in _HALF else out.dtype
    mask: Value | None = None
    for bias in found.biases:
        one = _bias(b, bias, dtype, x.tensor.rank)
        mask = one if mask is None else b.call("aten.add.Tensor", mask, one)
    made = b.call(FLASH, q, k, v, 0.0, False, attn_mask=mask, scale=found.scale)[0]
    if mask is not None and not _is_bounded(found.biases):
        # a row that sees no key: softmax makes NaN of it, the fused op zeros
        top = b.call("aten.amax.default", mask, (-1,), True)
        blind = b.call("aten.eq.Scalar", top, -math.inf)
        made = b.call("aten.where.self", blind, _full(b, math.nan, out.dtype), made)
    return _view(b, b.call("aten.clone.default", made, memory_format=torch.contiguous_format), out.shape)


def _is_bounded(biases: tuple[Value | _Masked, ...]) -> bool:
    return len(biases) == 1 and isinstance(biases[0], _Masked) and math.isfinite(biases[0].number)


@register
@dataclass(frozen=True)
class Attention(Pass):
    """Compute attention that is written out as one op, which never holds the scores of all rows.

    Scores may be scaled, biased and masked between the products; nothing else may read them or the softmax.

    before:  s = bmm(q, k^T); p = softmax(s * c + mask, -1); o = bmm(p, v); return o
    after:   o = scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=c)[0]; return o
    """

    name: ClassVar[str] = "attention"
    preserves: ClassVar[frozenset[str]] = frozenset({"normalised"})

    def numerics(self) -> Numerics:
        return reassociates()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return ctx.rewrite(graph, RULES)


_WEIGHTS = Such("weights", lambda m, arg: _softmax(m, arg) is not None)
RULES: tuple[Rule, ...] = (Rule("written-attention", pattern(_BMM, _WEIGHTS, Var("v")), _build, _check),)
