"""Common subexpression elimination."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..ir import Arg, Builder, Graph, Node, Reason, Value
from ..ir.infer import type_of
from .base import Context, Pass, map_regions, option, register


@register
@dataclass(frozen=True)
class Share(Pass):
    """Compute equal things once: equal pure applications, with operands of commutative ops in any order, and constants of
    equal content. Effects are never merged: two random draws are two draws.

    before:  a = add(x, y); b = add(y, x); return mul(a, b)
    after:   a = add(x, y); return mul(a, a)
    """

    name: ClassVar[str] = "share"
    preserves: ClassVar[frozenset[str]] = frozenset({"normalised"})
    max_compared: int = option(1 << 20, doc="largest constants to compare by content, in elements; larger ones by address")

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return _Sharing(map_regions(graph, lambda region: self.run(region, ctx)), ctx, self.max_compared).run()


class _Sharing:
    def __init__(self, graph: Graph, ctx: Context, max_compared: int) -> None:
        self.graph = graph
        self.ctx = ctx
        self.max_compared = max_compared
        self.builder = Builder(graph)
        self.seen: dict[Any, Node] = {}
        self.order: dict[Value, int] = {}  # a fixed order among values, for operands of commutative ops
        self.leaving: set[Value] = set()  # values of the new graph that leave it

    def run(self) -> Graph:
        for v in self.graph.inputs:
            self.order[v] = len(self.order)
        fired = False
        for old in self.graph.nodes:
            node = self.builder.resolved(old)
            key = self.key(node)
            first = self.seen.get(key) if key is not None else None
            if first is not None and self.merge(first, node, old):
                fired = True
                continue
            if key is not None:
                self.seen.setdefault(key, node)
            self.builder.append(node)
            for v in node.outputs:
                self.order[v] = len(self.order)
                if v in self.graph.results:
                    self.leaving.add(v)
        return self.builder.finish() if fired else self.graph

    def merge(self, first: Node, node: Node, old: Node) -> bool:
        """Let the results of `first` stand for those of an equal node; False where that must not be."""
        if any(a.type != b.type for a, b in zip(first.outputs, node.outputs, strict=True)):
            self.ctx.log.refuse("equal", old, Reason("equal applications were captured with different layouts"))
            return False
        for a, b in zip(first.results, node.results, strict=True):
            if self.escapes(a) and self.escapes(b):
                self.ctx.log.refuse("equal", old, Reason("two outputs would share memory", b))
                return False
        if not self.ctx.allowed("equal", old):
            return False
        for a, b in zip(first.results, node.results, strict=True):
            self.builder.subst[b] = a
            self.ctx.log.put("equal", b, a)
            if b in self.graph.results:
                self.leaving.add(a)
        self.ctx.log.fire("equal")
        return True

    def escapes(self, v: Value) -> bool:
        """True where the memory of a value leaves the graph."""
        return v in self.leaving or self.graph.roots.get(v, v) in self.graph.escapes

    def key(self, node: Node) -> Any:
        """Equal keys mean equal results; None where a node must not be merged."""
        if node.token is not None or node.after or not node.outputs:
            return None
        if node.op.name == "plait.constant":
            return self.constant_key(self.graph.constants[node.args[0]], node.out)
        args = [self.arg_key(a) for a in node.args]
        if node.op.has("commutative") and all(isinstance(a, int) for a in args[:2]) and node.get("alpha", 1) == 1:
            args[:2] = sorted(args[:2])
        return node.op.name, tuple(args)

    def arg_key(self, arg: Arg) -> Any:
        if isinstance(arg, Value):
            return self.order[arg]
        if isinstance(arg, tuple):
            return ("tuple", *(self.arg_key(a) for a in arg))
        if isinstance(arg, Graph):
            return "region", id(arg)
        if isinstance(arg, float):
            return "float", "nan" if arg != arg else (arg, math.copysign(1.0, arg))
        if isinstance(arg, sympy.Basic):
            return "size", arg
        return type(arg).__name__, arg

    def constant_key(self, tensor: torch.Tensor, out: Value) -> Any:
        place = (tensor.data_ptr(), tuple(tensor.stride()), out.type, str(tensor.device))
        if tensor.numel() > self.max_compared or tensor.device.type != "cpu" or type_of(tensor) != out.type:
            return "constant at", place, tensor.requires_grad
        if tensor.requires_grad:
            return "parameter", id(tensor)
        data = tensor.detach().contiguous().reshape(-1)
        return "constant", out.type, data.view(torch.uint8).numpy().tobytes() if data.numel() else b""
