"""`pack-weights`: weights that were rounded on the way into a product become codes, once they are constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...formats import Quantized, QuantizedType, quantize
from ...ir import Builder, Graph, Node, Reason, Value, prune
from ...ir.quantized_rules import LINEAR
from ..base import Context, Numerics, Pass, map_regions, reassociates, register
from .linears import Product, product_of
from .observe import Batch, Interpreter

ROUNDED, ROUNDED_ROWS = "plait.fake_quantize.default", "plait.fake_quantize_rows.default"


@dataclass(frozen=True)
class _Found:
    """A product by a rounded constant: rounded(weight * scale) / scale, or without scale; its input rounded or not."""

    product: Product
    x: Value
    weight: Value
    kind: QuantizedType
    scale: Value | None
    dynamic: bool


@register
@dataclass(frozen=True)
class PackWeights(Pass):
    """Hold constants that are rounded before a product as codes, which the product's kernel reads.

    What `rtn`, `awq` and `w8a8` make of weights that come in at each call, once `freeze` has made them constants.

    before:  w = constant; q = fake_quantize(w, "u4g128[N,K]"); y = linear(x, q, b)
    after:   y = quantized_linear(x, codes, scales, zeros, b, "u4g128[N,K]")
    """

    name: ClassVar[str] = "pack-weights"
    preserves: ClassVar[frozenset[str]] = frozenset(("normalised",))

    def numerics(self) -> Numerics:
        """The same rounded weights, summed in another order."""
        return reassociates()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        graph = map_regions(graph, lambda region: self.run(region, ctx))
        if not any(node.op.name == ROUNDED for node in graph.nodes):
            return graph
        builder, fired = Builder(graph), False
        for old in graph.nodes:
            node = builder.resolved(old)
            found = _find(graph, old)
            if isinstance(found, Reason):
                ctx.log.refuse("pack", old, found)
            if isinstance(found, _Found) and ctx.allowed("pack", old):
                made = _emit(builder, graph, old, found)
                builder.subst[old.out] = made
                ctx.log.put("pack", old.out, made)
                ctx.log.fire("pack")
                fired = True
            else:
                builder.append(node)
        return prune(builder.finish()) if fired else graph


def _find(graph: Graph, node: Node) -> _Found | Reason | None:
    made = product_of(graph, node)
    if made is None or made.turned:
        return None
    source, scale = graph.producers.get(made.weight), None
    if source is not None and source.op.name == "aten.div.Tensor" and isinstance(source.args[1], Value):
        scale = source.args[1]
        source = graph.producers.get(source.args[0])
    if source is None or source.op.name != ROUNDED:
        return None
    weight = source.args[0]
    for value in (weight, *(() if scale is None else (scale,))):
        if not _is_constant(graph, value):
            return Reason(f"{value.hint} is no constant", value)
    rows = graph.producers.get(made.x)
    dynamic = rows is not None and rows.op.name == ROUNDED_ROWS
    x = rows.args[0] if dynamic and rows is not None else made.x
    kind = QuantizedType.of(source["type"])
    if dynamic and (kind.layout != "bytes" or x.tensor.rank != 2):
        return Reason("rows of bytes by a weight of other codes, or more than rows")
    return _Found(made, x, weight, kind, scale, dynamic)


def _emit(builder: Builder, graph: Graph, node: Node, found: _Found) -> Value:
    builder.loc = node.loc.by("pack-weights")
    x, bias = builder.resolve(found.x), builder.resolve(found.product.bias)
    if found.scale is not None:
        inverse = builder.call("aten.reciprocal.default", builder.resolve(found.scale))
        x = builder.call("aten.mul.Tensor", x, inverse)
    parts = quantize(_value(graph, found.weight), found.kind)
    names = {name: builder.constant(part, f"{found.weight.hint}_{name}") for name, part in _parts(parts).items()}
    if found.dynamic:
        return _bytes(builder, x, names["codes"], names["scales"], bias)
    return builder.call(LINEAR, x, names["codes"], names["scales"], names.get("zeros"), bias, str(found.kind))


def _bytes(builder: Builder, x: Value, codes: Value, scales: Value, bias: Value | None) -> Value:
    """What `plait.dynamic_linear` decomposes into, which is behind the graph here."""
    call = builder.call
    wide = x if x.tensor.dtype is torch.float32 else call("aten._to_copy.default", x, dtype=torch.float32)
    top = call("aten.amax.default", call("aten.abs.default", wide), (1,), True)
    one = call("aten.full.default", (), 1.0, dtype=torch.float32, device=torch.device(x.tensor.device), pin_memory=False)
    scale = call("aten.where.self", call("aten.gt.Scalar", top, 0), call("aten.div.Tensor", top, 127), one)
    rounded = call("aten.clamp.default", call("aten.round.default", call("aten.div.Tensor", wide, scale)), -127, 127)
    rows = call("aten._to_copy.default", rounded, dtype=torch.int8)
    sums = call("aten._int_mm.default", rows, call("aten.permute.default", codes, (1, 0)))
    y = call("aten.mul.Tensor", call("aten._to_copy.default", sums, dtype=torch.float32), scale)
    y = call("aten.mul.Tensor", y, call("aten.view.default", scales, (codes.tensor.shape[0],)))
    if bias is not None:
        y = call("aten.add.Tensor", y, bias)
    return y if x.tensor.dtype is torch.float32 else call("aten._to_copy.default", y, dtype=x.tensor.dtype)


def _parts(q: Quantized) -> dict[str, Tensor]:
    return {name: part for name, part in zip(("codes", "scales", "zeros"), q[1:], strict=True) if part is not None}


def _is_constant(graph: Graph, value: Value) -> bool:
    node = graph.producers.get(value)
    if node is None:
        return False
    return node.op.name == "plait.constant" or (bool(node.inputs) and all(_is_constant(graph, v) for v in node.inputs))


def _value(graph: Graph, value: Value) -> Tensor:
    """What a value is that depends on constants only."""
    interpreter, batch = Interpreter(graph), Batch({}, {})

    def compute(v: Value) -> None:
        if v not in batch.values:
            node = graph.producers[v]
            for operand in node.inputs:
                compute(operand)
            interpreter.apply(node, batch)

    with torch.no_grad():
        compute(value)
    return batch.values[value]
