"""Constant folding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..ir import Builder, Graph, Node, Reason, Value, contiguous_strides, flatten, map_arg
from ..ir.infer import type_of
from .base import Context, Pass, map_regions, option, register

#: Makes tensors from numbers alone: kernels compute them where they are read, which is cheaper than loading a constant.
_CREATION = frozenset(
    f"aten.{n}"
    for n in ("full.default", "arange.start_step", "arange.default", "arange.start", "scalar_tensor.default",
              "zeros.default", "ones.default", "eye.default", "linspace.default")
)  # fmt: skip

#: Results made from numbers alone are folded up to this many elements.
TINY = 16


@register
@dataclass(frozen=True)
class Fold(Pass):
    """Compute what depends on constants only, by the ops' references on CPU.

    Views of constants stay views. A result that is one number everywhere becomes `full`. Results may not be larger than
    `max_elements`, except where they are no larger than the constants that die with them.

    before:  w = constant; a = permute(w, (1, 0)); b = mul(a, 2.0); c = add(x, b); return c
    after:   b = constant; c = add(x, b); return c
    """

    name: ClassVar[str] = "fold"
    preserves: ClassVar[frozenset[str]] = frozenset({"normalised"})
    max_elements: int = option(1 << 16, doc="largest result to fold, in elements")
    max_created: int = option(
        1 << 12, doc="largest tensor to make from numbers (arange, full) in order to fold what reads it"
    )

    def run(self, graph: Graph, ctx: Context) -> Graph:
        graph = map_regions(graph, lambda region: self.run(region, ctx))
        if not any(n.op.name == "plait.constant" or n.op.name in _CREATION for n in graph.nodes):
            return graph
        return _Folding(graph, ctx, self).run()


class _Folding:
    """One sweep over one graph. `known` maps values to what they hold; views and created tensors are known, not folded.

    `loaded` are known values that depend on a constant, not on numbers alone.
    """

    def __init__(self, graph: Graph, ctx: Context, limits: Fold) -> None:
        self.graph = graph
        self.ctx = ctx
        self.limits = limits
        self.builder = Builder(graph)
        self.known: dict[Value, torch.Tensor] = {}
        self.loaded: set[Value] = set()

    def run(self) -> Graph:
        fired = False
        for old in self.graph.nodes:
            node = self.builder.resolved(old)
            if not self.learn(node) and self.fold(old, node):
                fired = True
            else:
                self.builder.append(node)
        return self.builder.finish() if fired else self.graph

    def learn(self, node: Node) -> bool:
        """Note what a constant, a created tensor or a view of a known value holds. True where it stays in the graph."""
        if node.op.name == "plait.constant":
            tensor = self.graph.constants[node.args[0]]
            plain = not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu" and not tensor.requires_grad
            if plain and type_of(tensor) == node.out.type:
                self.known[node.out] = tensor
                self.loaded.add(node.out)
            return True
        if node.op.name in _CREATION and not node.inputs:
            out = node.out.tensor
            size = out.numel
            if out.device == "cpu" and isinstance(size, int) and size <= self.limits.max_created and _is_plain(node):
                self.known.update(zip(node.results, self.evaluate(node), strict=True))
            return True
        if node.op.has("view") and node.op.returns == 1 and self.inputs_known(node):
            self.remember(node, self.evaluate(node))
            return True
        return False

    def remember(self, node: Node, results: tuple[torch.Tensor, ...]) -> None:
        self.known.update(zip(node.results, results, strict=True))
        if any(v in self.loaded for v in node.inputs):
            self.loaded.update(node.results)

    def inputs_known(self, node: Node) -> bool:
        return bool(node.inputs and node.results) and all(v in self.known for v in node.inputs) and _is_plain(node)

    def fold(self, old: Node, node: Node) -> bool:
        """Replace a node by what it computes; False where it stays."""
        if not self.inputs_known(node):
            return False
        reason = self.why_not(node)
        if reason is not None:
            self.ctx.log.refuse("fold", old, reason)
            return False
        results = self.evaluate(node)
        if any(type_of(t) != v.type for t, v in zip(results, node.results, strict=True)):
            self.ctx.log.refuse("fold", old, Reason("its result has another layout than was captured"))
            return False
        if not any(v in self.loaded for v in node.inputs) and not all(_is_uniform(t) or t.numel() <= TINY for t in results):
            self.ctx.log.refuse("fold", old, Reason("it is made from numbers alone: kernels compute it where they read it"))
            self.remember(node, results)
            return False
        if not self.ctx.allowed("fold", old):
            return False
        self.builder.loc = node.loc.by("fold")
        for v, tensor in zip(node.results, results, strict=True):
            new = self.emit(v, tensor)
            self.builder.subst[v] = new
            self.ctx.log.put("fold", v, new)
            self.known[new] = tensor
            self.loaded.add(new)
        self.ctx.log.fire("fold")
        return True

    def why_not(self, node: Node) -> Reason | None:
        if node.token is not None or node.op.has("data_dependent") or node.regions:
            return Reason(f"{node.op.name} has effects, regions or a shape that depends on data")
        if any(not v.tensor.is_static for v in (*node.results, *node.inputs)):
            return Reason("a size is symbolic")
        made = sum(_bytes(v) for v in node.results)
        elements = max((int(v.tensor.numel) for v in node.results), default=0)
        dying = sum(_bytes(v) for v in self.constants_of(node) if self.dies_with(v, node))
        if elements > self.limits.max_elements and made > dying:
            return Reason(f"its {elements} elements are more than max_elements={self.limits.max_elements}")
        return None

    def constants_of(self, node: Node) -> set[Value]:
        """Constants that a node reads, through views."""
        found: set[Value] = set()
        for v in node.inputs:
            producer = self.builder.producers.get(v)
            while producer is not None and producer.op.has("view"):
                v = producer.inputs[0]
                producer = self.builder.producers.get(v)
            if producer is not None and producer.op.name == "plait.constant":
                found.add(v)
        return found

    def dies_with(self, constant: Value, node: Node) -> bool:
        """True where nothing but `node`, and views that only it reads, reads the constant."""
        todo, outs = [constant], set(node.outputs)
        while todo:
            v = todo.pop()
            if v in self.graph.results:
                return False
            for user in self.graph.users.get(v, ()):
                if user.op.has("view"):
                    todo.extend(user.results)
                elif not outs & set(user.outputs):
                    return False
        return True

    def evaluate(self, node: Node) -> tuple[torch.Tensor, ...]:
        args = [map_arg(a, lambda leaf: self.known[leaf] if isinstance(leaf, Value) else leaf) for a in node.args]
        positional = [a for a, p in zip(args, node.op.params, strict=True) if not p.keyword_only]
        named = {p.name: a for a, p in zip(args, node.op.params, strict=True) if p.keyword_only}
        with _disable_current_modes(), torch.no_grad():  # real tensors, also while torch traces
            found = node.op.reference(*positional, **named)
        return tuple(found) if isinstance(found, list | tuple) else (found,)

    def emit(self, v: Value, tensor: torch.Tensor) -> Value:
        if _is_uniform(tensor):
            made: Value = self.builder.call(
                "aten.full.default", tuple(tensor.shape), tensor.reshape(-1)[0].item(), hint=v.hint, dtype=tensor.dtype,
                device=torch.device("cpu"), pin_memory=False,
            )  # fmt: skip
            return made
        return self.builder.constant(tensor, content_name(v.hint or "folded", tensor))


def _is_uniform(tensor: torch.Tensor) -> bool:
    """True where all elements have the same bits and the layout is that of `full`, strides of sizes of 1 included."""
    if tensor.numel() == 0 or tensor.stride() != contiguous_strides(tensor.shape) or tensor.dtype.is_complex:
        return False
    data = tensor.reshape(-1).view(torch.uint8).view(tensor.numel(), -1)
    return bool((data == data[0]).all())


def content_name(hint: str, tensor: torch.Tensor) -> str:
    """A name for a constant that depends on what it holds: equal names in different regions mean equal tensors."""
    plain = tensor.contiguous().reshape(-1)
    digest = hashlib.sha1(repr((tensor.dtype, tuple(tensor.shape), tensor.stride())).encode())
    digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return f"{hint}_{digest.hexdigest()[:8]}"


def _is_plain(node: Node) -> bool:
    """True where no argument is a size expression or a region."""
    return not node.regions and not any(isinstance(leaf, sympy.Basic) for leaf in flatten(node.args))


def _bytes(v: Value) -> int:
    kind: Any = v.tensor
    return int(kind.numel) * kind.dtype.itemsize
