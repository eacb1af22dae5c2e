"""Convolutions whose images lie channels-last, and the layout carried on to what they feed.

oneDNN reads such images, and writes such results, without a copy of its own. Values lie so until something needs the layout
that the program had: its results, random draws, views that would be copies. A convolution keeps its layout where its weight
is larger than its images and not the graph's own, and all do where the copies that are left would take longer than those
that are saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import InferenceFailed, NeedsSizeFact
from ..ir import Arg, Builder, Graph, Node, Reason, TensorType, Value, map_arg, seen
from ..ir.strides import is_row_major, lies_channels_last
from .base import Context, Numerics, Pass, map_regions, reassociates, register

CONVOLUTION = "aten.convolution.default"
_POOLS = ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d")
# Nanoseconds for an element (Zen 4, two threads, docs/design.md): what is charged for a copy in another layout, twice what
# large ones were measured to take; what oneDNN takes for its own copies of images and results; by how much torch's pools are
# faster channels-last.
_COPY, _CONVOLUTION, _POOL = 0.5, 1.1, 2.0
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those of oneDNN's convolution
_KEEP = ("convolution", "convolution_backward", "as_strided", "as_strided_copy", "as_strided_scatter",
         "view_as_real", "view_as_complex")  # fmt: skip


@register
@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Give convolutions on CPUs their images channels-last, and let what they compute lie so until something minds.

    before:  y = convolution(x, w); z = relu(y); return convolution(z, v)
    after:   y = convolution(clone(x, channels_last), w); z = relu(y); return clone(convolution(z, v), contiguous)
    """

    name: ClassVar[str] = "channels-last"
    preserves: ClassVar[frozenset[str]] = frozenset({"normalised"})

    def numerics(self) -> Numerics:
        return reassociates()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        graph = map_regions(graph, lambda region: self.run(region, ctx))
        seeds = {n for n in graph.nodes if n.op.name == CONVOLUTION and _refusal(n, graph) is None}
        seeds = {n for n in seeds if ctx.allowed("convolution", n)}
        if not seeds:
            return graph
        return _Carry(graph, ctx, seeds).run()


def _refusal(node: Node, graph: Graph) -> str | None:
    """Why a convolution keeps its layout."""
    x, weight, out = (v.tensor for v in (node["input"], node["weight"], node.out))
    if x.rank != 4 or x.dtype not in _DTYPES or torch.device(x.device).type != "cpu":
        return "not a two-dimensional one of floats on a CPU"
    if not is_row_major(out):
        return "its result is not channels-first"
    sizes = [seen(n, graph.symbols) for n in (x.numel, weight.numel, out.numel)]
    if any(n is None for n in sizes):
        return "of unknown size"
    image, taps, result = (n for n in sizes if n is not None)
    origin = graph.producers.get(node["weight"])
    owned = origin is not None and origin.op.name == "plait.constant"  # it will be laid out once
    return "its weight is larger than its images" if taps > image + result and not owned else None


class _Carry:
    """The graph built anew with its values in new layouts. `spent` are nanoseconds for copies, `saved` those that libraries
    then take less."""

    def __init__(self, graph: Graph, ctx: Context, seeds: set[Node]) -> None:
        self.graph, self.ctx, self.seeds = graph, ctx, seeds
        self.builder = Builder(graph)
        self.now: dict[Value, Value] = {}  # values whose layout changed
        self.first: dict[Value, Value] = {}  # by value of the old graph: in the layout that it had there
        self.last: dict[Value, Value] = {}  # by value of the new graph: channels-last
        self.spent = self.saved = 0.0

    def run(self) -> Graph:
        try:
            for node in self.graph.nodes:
                self.builder.loc = node.loc.by("channels-last")
                if node in self.seeds:
                    self.convolution(node)
                else:
                    self.other(node)
            results = tuple(map_arg(a, self.original) for a in self.graph.outputs)
            writes = tuple((i, self.original(v)) for i, v in self.graph.writes)
        except NeedsSizeFact as error:
            return self.refused(str(error))
        if self.spent > self.saved:
            return self.refused(f"copies of {self.spent / 1e3:.0f} µs would save {self.saved / 1e3:.0f} µs")
        for old, new in self.now.items():
            self.ctx.log.put("convolution", old, new)
        self.ctx.log.fire("convolution", len(self.seeds))
        return self.builder.finish(outputs=results, writes=writes)

    def refused(self, why: str) -> Graph:
        for node in self.graph.nodes:
            if node in self.seeds:
                self.ctx.log.refuse("convolution", node, Reason(why))
        return self.graph

    def convolution(self, node: Node) -> None:
        x: Value = node["input"]
        image = self.channels_last(self.now.get(x, x))
        names = (p.name for p in node.op.params)
        args = tuple(image if n == "input" else self.restored_in(a) for n, a in zip(names, node.args, strict=True))
        self.put(node, args)
        self.saved += _CONVOLUTION * (self.size(x) + self.size(node.out))

    def restored_in(self, arg: Arg) -> Arg:
        """An argument with its tensors in the layouts that they had."""
        return map_arg(arg, lambda v: self.original(v) if isinstance(v, Value) else v)

    def other(self, node: Node) -> None:
        if not any(v in self.now for v in node.inputs):
            self.builder.append(node)
            return
        if self.follows(node):
            args = tuple(map_arg(a, lambda v: self.now.get(v, v) if isinstance(v, Value) else v) for a in node.args)
            if node.op.has("elementwise"):
                args = self.alike(args, node)
            mark = self.builder.mark()
            try:
                self.put(node, args)
            except (InferenceFailed, NeedsSizeFact):  # a view that would be a copy
                self.builder.rewind(mark)
            else:
                if node.op.name.split(".")[1] in _POOLS and _lies_last(self.now[node.outputs[0]]):
                    self.saved += _POOL * (self.size(node.inputs[0]) + self.size(node.outputs[0]))
                return
        args = tuple(map(self.restored_in, node.args))
        self.builder.append(node.with_args(args))

    def follows(self, node: Node) -> bool:
        """Whether an op means the same for tensors in any layout, and is as fast in another one."""
        namespace, name, *_ = node.op.name.split(".")
        if namespace != "aten" or name in _KEEP or node.op.has("control_flow"):
            return False
        if node.op.has("view") and any(self.graph.roots.get(v, v) in self.graph.escapes for v in node.outputs):
            return False  # results that share memory must go on to do so
        tensors = all(isinstance(v.type, TensorType) for v in node.outputs)  # numbers may be what the layout says
        return node.token is None and not node.after and bool(node.outputs) and tensors

    def alike(self, args: tuple[Arg, ...], node: Node) -> tuple[Arg, ...]:
        """Operands as large as the result in one layout, so that it is the result's too."""
        full = [v for v in node.inputs if v.tensor.shape == node.out.tensor.shape] if len(node.outputs) == 1 else []
        if not any(_lies_last(self.now.get(v, v)) for v in full):
            return args
        wanted = {self.now.get(v, v) for v in full}
        return tuple(map_arg(a, lambda v: self.channels_last(v) if v in wanted else v) for a in args)

    def put(self, node: Node, args: tuple[Arg, ...]) -> None:
        """A node on other arguments, its results in the layouts that torch gives them."""
        made = self.builder.call(node.op, *args, hint=node.outputs[0].hint)
        for old, new in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=True):
            if not isinstance(new, Value):
                raise NeedsSizeFact(op=node.op.name, fact="a result that is no tensor")
            self.now[old] = new

    def channels_last(self, v: Value) -> Value:
        if _lies_last(v):
            return v
        if v not in self.last:
            self.spent += _COPY * self.size(v)
            self.last[v] = self.builder.call("aten.clone.default", v, memory_format=torch.channels_last)
        return self.last[v]

    def original(self, v: Value) -> Value:
        """A value of the old graph in the layout that it had there."""
        new = self.now.get(v)
        if new is None or new.type == v.type:
            return v if new is None else new
        if v not in self.first:
            self.spent += _COPY * self.size(v)
            self.first[v] = self.restored(v, new)
        return self.first[v]

    def restored(self, v: Value, new: Value) -> Value:
        kind = v.tensor
        if is_row_major(kind):
            return self.builder.call("aten.clone.default", new, memory_format=torch.contiguous_format)
        order = sorted(range(kind.rank), key=lambda d: -(seen(kind.strides[d], self.graph.symbols) or 0))
        turned = self.builder.call("aten.permute.default", new, tuple(order))
        if not is_row_major(turned.tensor):
            turned = self.builder.call("aten.clone.default", turned, memory_format=torch.contiguous_format)
        back = self.builder.call("aten.permute.default", turned, tuple(order.index(d) for d in range(kind.rank)))
        if back.type != v.type:
            raise NeedsSizeFact(op="aten.clone.default", fact=f"how to lay out {v.type} again")
        return back

    def size(self, v: Value) -> int:
        return seen(v.tensor.numel, self.graph.symbols) or 0


def _lies_last(v: Value) -> bool:
    return isinstance(v.type, TensorType) and lies_channels_last(v.type)


__all__ = ["ChannelsLast"]
