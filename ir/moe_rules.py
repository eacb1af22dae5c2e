"""Inference and axis rules of the MoE ops (`runtime/moe.py`, where their axes have names).

Rows of buffers are numbers that other operands hold, so axes of rows and of experts stay whole. What chunks of tokens do to
`moe_slots` (a scan) and `moe_encode` (a scatter) is no matter of cutting and joining: these have no letter for tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from .axes import AxisMap, Call, axis_rule
from .facts import Facts
from .infer import Result, rule
from .types import Dim, TensorType


def _like(x: TensorType, *shape: Dim, dtype: torch.dtype | None = None) -> TensorType:
    return TensorType(shape, dtype or x.dtype, x.device)


def _summed(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@rule("plait.moe_keep.default")
def _keep(f: Facts, choice: Any, order: Any, experts: Any, capacity: Any, by_choice: Any) -> Result:
    return _like(choice, *choice.shape)


@rule("plait.moe_slots.default")
def _slots(f: Facts, choice: Any, used: Any, capacity: Any) -> Result:
    return _like(choice, *choice.shape), _like(used, *used.shape), _like(used, *used.shape, 2)


@rule("plait.moe_encode.default")
def _encode(f: Facts, x: Any, choice: Any, slot: Any, weight: Any, experts: Any, capacity: Any) -> Result:
    return _like(x, experts, capacity, x.shape[1])


@rule("plait.moe_decode.default")
def _decode(f: Facts, buf: Any, choice: Any, slot: Any, weight: Any) -> Result:
    return _like(buf, choice.shape[0], buf.shape[2])


@rule("plait.moe_decode_weight.default")
def _decode_weight(f: Facts, buf: Any, choice: Any, slot: Any, grad: Any) -> Result:
    return _like(buf, *choice.shape, dtype=torch.promote_types(_summed(buf.dtype), grad.dtype))


@rule("plait.expert_mm.default")
def _mm(f: Facts, x: Any, w: Any, rows: Any) -> Result:
    return _like(x, *x.shape[:2], w.shape[2])


@rule("plait.expert_mm_weight.default")
def _mm_weight(f: Facts, x: Any, grad: Any, rows: Any, experts: Any) -> Result:
    return _like(x, experts, x.shape[2], grad.shape[2])


@rule("plait.expert_act.default")
def _act(f: Facts, x: Any, bias: Any, other: Any, rows: Any, kind: str) -> Result:
    return _like(x, *x.shape)


@rule("plait.expert_act_backward.default")
def _act_backward(f: Facts, grad: Any, x: Any, bias: Any, other: Any, rows: Any, kind: str) -> Result:
    return _like(x, *x.shape), _like(x, 0) if other is None else _like(other, *other.shape)


@rule("plait.moe_join.default")
def _join(f: Facts, parts: Any, rows: Any) -> Result:
    return _like(parts[0], *parts[0].shape)


# -- axes ---------------------------------------------------------------------------------------------------------------


@axis_rule("plait.moe_encode.default")
def _encode_axes(c: Call) -> AxisMap:
    h, s, k = c.axis(c["x"].shape[1]), *c.axes(c["choice"])
    experts, capacity = c.axis(c["experts"]), c.axis(c["capacity"])
    pairs = [[s, k]] * (len(c.operands) - 1)
    return c.map([[s, h], *pairs], [[experts, capacity, h]], whole=[s, k, experts, capacity])


@axis_rule("plait.moe_decode.default")
def _decode_axes(c: Call) -> AxisMap:
    buf, s, k = c.axes(c["buf"]), *c.axes(c["choice"])
    return c.map([buf, *[[s, k]] * (len(c.operands) - 1)], [[s, buf[2]]], whole=[*buf[:2], k])


@axis_rule("plait.moe_decode_weight.default")
def _decode_weight_axes(c: Call) -> AxisMap:
    buf, s, k = c.axes(c["buf"]), *c.axes(c["choice"])
    return c.map([buf, [s, k], [s, k], [s, buf[2]]], [[s, k]], whole=buf[:2], reduced=buf[2:], combine="sum")


@axis_rule("plait.expert_mm.default")
def _mm_axes(c: Call) -> AxisMap:
    g, rows, a = c.axes(c["x"])
    # where every group has an expert of its own they are cut together
    own = c["x"].shape[0] == c["w"].shape[0]
    experts, b, two = g if own else c.axis(c["w"].shape[0]), c.axis(c["w"].shape[2]), c.axis(2)
    whole = [rows, two, *([] if own else [g, experts])]
    return c.map([[g, rows, a], [experts, a, b], [g, two]], [[g, rows, b]], whole=whole, reduced=[a], combine="sum")


@axis_rule("plait.expert_mm_weight.default")
def _mm_weight_axes(c: Call) -> AxisMap:
    g, rows, a = c.axes(c["x"])
    own = c["x"].shape[0] == c["experts"]
    experts, b, two = g if own else c.axis(c["experts"]), c.axis(c["grad"].shape[2]), c.axis(2)
    whole = [rows, two, *([] if own else [g, experts])]
    return c.map([[g, rows, a], [g, rows, b], [g, two]], [[experts, a, b]], whole=whole, sized=[("experts", [experts])])


@axis_rule("plait.expert_act.default", "plait.expert_act_backward.default")
def _act_axes(c: Call) -> AxisMap:
    g, rows, features = x = c.axes(c["x"])
    bias, two = c["bias"], c.axis(2)
    own = bias is None or bias.shape[0] == c["x"].shape[0]
    experts = g if own else c.axis(c["bias"].shape[0])
    operands = [x, *([] if bias is None else [[experts, features]]), *([] if c["other"] is None else [x]), [g, two]]
    whole = [rows, two, *([] if own else [g, experts])]
    if c.get("grad") is None:
        return c.map(operands, [x], whole=whole)
    return c.map([x, *operands], [x, [()] if c["other"] is None else x], whole=whole)


@axis_rule("plait.moe_join.default")
def _join_axes(c: Call) -> AxisMap:
    g, rows, _ = x = c.axes(c.operands[0])
    two, count = c.axis(2), len(c.operands) // 2
    return c.map([x] * count + [[g, two]] * count, [x], whole=[rows, two])
