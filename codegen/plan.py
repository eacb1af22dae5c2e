"""From a scheduled graph to a plan: storage of every value, argument templates, arena, outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch

from ..ir import Graph, Node, OpaqueType, ScalarType, TensorType, Value, flatten
from ..runtime import plan as P
from ..runtime.pending import is_start, is_wait
from .allow import Allow, always
from .body import dtype_name
from .items import AliasItem, CallItem, KernelItem, Scheduled
from .memory import Arena, Block, plan_arena
from .size_expr import prefix, product

_SCALARS = {"int": "int64", "float": "float64", "bool": "bool"}


class _Planner:
    def __init__(self, scheduled: Scheduled, kernels: Mapping[str, P.KernelSpec], allow: Allow) -> None:
        self.allow = allow
        self.scheduled = scheduled
        self.graph = scheduled.graph
        self.kernels = kernels
        self.ids: dict[Value, int] = {}
        self.specs: dict[Value, P.ValueSpec] = {}
        self.regions: list[tuple[str, P.Plan]] = []
        self.alias = {i.value: i for i in scheduled.items if isinstance(i, AliasItem)}
        self.borrowed = dict(_views_by_calls(scheduled))
        self.returned = {self.root(v) for v in flatten(self.graph.outputs) if isinstance(v, Value)}

    def root(self, value: Value) -> Value:
        """The value whose memory `value` lives in."""
        while True:
            if value in self.alias:
                value = self.alias[value].of
            elif value in self.scheduled.stored:
                value, _ = self.scheduled.stored[value]
            elif value in self.borrowed:
                value = self.borrowed[value]
            else:
                return value

    def id(self, value: Value) -> int:
        if value not in self.ids:
            self.ids[value] = len(self.ids)
        return self.ids[value]

    # -- values -------------------------------------------------------------------------------------------------------

    def define(self, value: Value, storage: str, ref: Any = None, offset: Any = 0) -> None:
        kind = value.type
        if isinstance(kind, TensorType):
            shape, strides = tuple(map(prefix, kind.shape)), tuple(map(prefix, kind.strides))
            spec = P.ValueSpec(self.id(value), dtype_name(kind.dtype), kind.device, shape, strides, storage, ref, offset)
        elif isinstance(kind, ScalarType):
            name = kind.expr.name if isinstance(kind.expr, sympy.Symbol) else None
            spec = P.ValueSpec(self.id(value), _SCALARS[kind.kind], "cpu", (), (), "scalar", name)
        else:
            spec = P.ValueSpec(self.id(value), "opaque", "cpu", (), (), "handle", None)
        self.specs[value] = spec

    def nbytes(self, value: Value) -> Any:
        """Bytes from the first to past the last element, as a prefix expression."""
        kind = value.tensor
        if kind.is_contiguous:
            return product([*map(prefix, kind.shape), kind.dtype.itemsize])
        if 0 in kind.shape:
            return 0  # whatever its other sizes are
        span: list[Any] = ["add", 1]
        for n, s in zip(kind.shape, kind.strides, strict=True):
            span.append(product([["add", prefix(n), -1] if not isinstance(n, int) else n - 1, prefix(s)]))
        if all(isinstance(x, int) for x in span[1:]):
            return sum(span[1:]) * kind.dtype.itemsize
        return product([span, kind.dtype.itemsize])

    def place_values(self) -> Arena:
        for i, v in enumerate(self.graph.inputs):
            if isinstance(v.type, TensorType):
                self.define(v, "input", i)
        for v, made in self.scheduled.laid_out.items():
            self.define(v, "constant", made.name)
        first: dict[Value, int] = {}
        last: dict[Value, int] = {}
        used = _used_until(self.scheduled)
        for step, item in enumerate(self.scheduled.items):
            if isinstance(item, CallItem):
                for v in item.node.results:
                    if not isinstance(v.type, OpaqueType):
                        self.define(v, "handle")
                for v in (*item.node.inputs, *used.get(step, ())):
                    first.setdefault(self.root(v), step)
                    last[self.root(v)] = step
            elif isinstance(item, KernelItem):
                for v in item.buffers:
                    first.setdefault(self.root(v), step)
                    last[self.root(v)] = step
        for node in self.graph.nodes:
            if node.op.name == "plait.constant" and (node.out in first or node.out in self.returned):
                self.define(node.out, "constant", node.args[0])
        late = {s.name for s in self.symbols() if s.input < 0}  # the arena is made before they are known
        blocks: list[Block] = []
        for v, step in first.items():
            if v in self.specs or not isinstance(v.type, TensorType):
                continue
            if v in self.returned or any(s.name in late for s in v.tensor.symbols()):
                self.define(v, "fresh")
            else:
                blocks.append(Block(v, self.nbytes(v), step, last[v]))
        arena = plan_arena(blocks, lambda v: self.allow("reuse", "reuse", self.graph.producers.get(v)))
        for block in blocks:
            self.define(block.key, "arena", None, arena.offsets[block.key])
        for value, (home, offset) in self.scheduled.stored.items():
            self.define(value, "view", self.id(home), offset)
        for item in self.scheduled.items:
            if isinstance(item, AliasItem) and item.of in self.specs:  # else fused away with what it is a view of
                self.define_alias(item)
        return arena

    def define_alias(self, item: AliasItem) -> None:
        base, offset = item.of, prefix(item.offset)
        self.define(item.value, "view", self.id(base), offset)

    # -- steps --------------------------------------------------------------------------------------------------------

    def argument(self, arg: Any) -> dict[str, Any]:
        if isinstance(arg, Value):
            return {"v": self.id(arg)}
        if isinstance(arg, sympy.Expr):
            return {"e": prefix(arg)}
        if isinstance(arg, tuple):
            return {"l": [self.argument(a) for a in arg]}
        if isinstance(arg, torch.dtype):
            return {"d": dtype_name(arg)}
        if isinstance(arg, torch.device):
            return {"dev": str(arg)}
        if isinstance(arg, torch.layout):
            return {"lay": str(arg).removeprefix("torch.")}
        if isinstance(arg, torch.memory_format):
            return {"mf": str(arg).removeprefix("torch.")}
        if isinstance(arg, Graph):
            name = f"{arg.name}.{len(self.regions)}"
            self.regions.append((name, self.region(arg)))
            return {"g": name}
        return {"c": arg}

    def region(self, graph: Graph) -> P.Plan:
        from .schedule import schedule_calls

        return build_plan(schedule_calls(graph), {})

    def step(self, item: Any) -> P.Launch | P.Call | None:
        if isinstance(item, KernelItem):
            return P.Launch(item.name, tuple(self.id(v) for v in item.buffers), tuple(map(prefix, item.sizes)))
        if isinstance(item, CallItem):
            return self.call(item.node, item.kind, item.reason)
        return None

    def call(self, node: Node, kind: str, reason: str) -> P.Call:
        positional = tuple(self.argument(a) for a, p in zip(node.args, node.op.params, strict=True) if not p.keyword_only)
        named = tuple(
            (p.name, self.argument(a))
            for a, p in zip(node.args, node.op.params, strict=True)
            if p.keyword_only and not (a is None and p.default is None)
        )
        outs = tuple(None if isinstance(v.type, OpaqueType) else self.id(v) for v in node.results)
        return P.Call(node.op.name, positional, named, outs, kind, reason, node.loc.short)

    # -- the ends -----------------------------------------------------------------------------------------------------

    def inputs(self) -> tuple[P.InputSpec, ...]:
        found: list[P.InputSpec] = []
        for i, v in enumerate(self.graph.inputs):
            name = v.hint or f"input{i}"
            if isinstance(v.type, TensorType):
                kind = v.type
                found.append(
                    P.InputSpec(name, "tensor", dtype_name(kind.dtype), kind.device, tuple(map(prefix, kind.shape)),
                                tuple(map(prefix, kind.strides)))
                )  # fmt: skip
            elif isinstance(v.type, ScalarType):
                expr = prefix(v.type.expr) if v.type.expr is not None and v.type.kind == "int" else None
                found.append(P.InputSpec(name, v.type.kind, expr=expr))
            else:
                found.append(P.InputSpec(name, "none"))
        return tuple(found)

    def symbols(self) -> tuple[P.SymbolSpec, ...]:
        found: dict[str, P.SymbolSpec] = {}
        ranges = self.graph.symbols

        def note(symbol: Any, position: int, d: int | None) -> None:
            if isinstance(symbol, sympy.Symbol) and symbol.name not in found:
                info = ranges.get(symbol)
                low, high = (info.low, info.high) if info is not None else (0, None)
                found[symbol.name] = P.SymbolSpec(symbol.name, position, d, low, high)

        for i, v in enumerate(self.graph.inputs):
            if isinstance(v.type, ScalarType):
                note(v.type.expr, i, None)
        for i, v in enumerate(self.graph.inputs):
            if isinstance(v.type, TensorType):
                for d, n in enumerate(v.type.shape):
                    note(n, i, d)
        for node in self.graph.nodes:
            for v in node.results:
                if isinstance(v.type, ScalarType):
                    note(v.type.expr, -1, None)
        return tuple(found.values())

    def output(self, arg: Any) -> P.OutputSpec:
        if isinstance(arg, Value):
            if isinstance(arg.type, ScalarType) and arg not in self.specs:
                return P.OutputSpec("size", expr=prefix(arg.type.expr))
            if isinstance(arg.type, OpaqueType):
                return P.OutputSpec("none")
            return P.OutputSpec("value", ref=self.id(arg))
        if isinstance(arg, sympy.Expr):
            return P.OutputSpec("size", expr=prefix(arg))
        return P.OutputSpec("none") if arg is None else P.OutputSpec("constant", const=arg)

    def run(self) -> P.Plan:
        arena = self.place_values()
        steps = tuple(s for s in map(self.step, self.scheduled.items) if s is not None)
        outputs = tuple(self.output(a) for a in self.graph.outputs)
        values = tuple(sorted(self.specs.values(), key=lambda s: s.id))
        return P.Plan(
            self.inputs(),
            self.symbols(),
            values,
            steps,
            outputs,
            tuple(self.kernels.values()),
            arena.size,
            tuple(self.regions),
            sizes=arena.sizes,
        )


def _used_until(scheduled: Scheduled) -> Mapping[int, Sequence[Value]]:
    """What collectives read, by the steps that wait for them: until then it must stay as it is."""
    read: dict[Value, tuple[Value, ...]] = {}
    found: dict[int, list[Value]] = defaultdict(list)
    for step, item in enumerate(scheduled.items):
        if not isinstance(item, CallItem):
            continue
        if is_start(item.node.op.name):
            read.update(dict.fromkeys(item.node.results, item.node.inputs))
        elif is_wait(item.node.op.name):
            found[step] += read.get(item.node.args[0], ())
    return found


def _views_by_calls(scheduled: Scheduled) -> Iterator[tuple[Value, Value]]:
    """(result, operand) of calls that return views, or the operand as it is, as a wait does for what is not on its way: the
    operand's memory must live as long as the result is read."""
    started = {v for i in scheduled.items if isinstance(i, CallItem) and is_start(i.node.op.name) for v in i.node.results}
    for item in scheduled.items:
        if not isinstance(item, CallItem):
            continue
        if item.node.op.has("view") or (is_wait(item.node.op.name) and item.node.args[0] not in started):
            source = next((v for v in item.node.inputs if isinstance(v.type, TensorType)), None)
            if source is not None:
                yield from ((v, source) for v in item.node.results)


def build_plan(scheduled: Scheduled, kernels: Mapping[str, P.KernelSpec], allow: Allow = always) -> P.Plan:
    """The plan that runs a scheduled graph. `kernels` are the printed functions that its items launch, by name."""
    return build_plan_with_ids(scheduled, kernels, allow)[0]


def build_plan_with_ids(
    scheduled: Scheduled, kernels: Mapping[str, P.KernelSpec], allow: Allow = always
) -> tuple[P.Plan, Mapping[Value, int]]:
    """The plan, and its number of each value of the graph."""
    planner = _Planner(scheduled, kernels, allow)
    return planner.run(), planner.ids
