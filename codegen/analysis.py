"""What each node of a graph is to the code generator: free view, inlined computation, unit of a kernel, or call.

A *unit* is a value that a kernel computes at every point of an iteration domain: an elementwise result that is stored or
shared, or a reduction. Other elementwise values are *inlined*: recomputed where they are read. *Aliases* are views of
values in memory. Everything else is a call of a torch op.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from ..ir import Dim, Graph, Node, ScalarType, TensorType, Value, dim
from ..ir.effects import intervals
from ..ir.strides import lies_channels_last
from ..ir.types import type_symbols
from ..runtime.panels import Panels
from ..runtime.pending import is_wait
from ..runtime.reordered import Reordered
from . import activations, library, pointwise, special  # noqa: F401 (all but the second register their lowerings)
from .allow import Allow, always
from .attention import Attention, attention_of
from .body import Body, Index, dtype_name
from .expert import Expert, expert_of
from .gpu_matmul import gpu_matmul_of
from .joined import JOIN, fills, places, summed_across
from .kernel_ir import DTYPES
from .lowering import CHEAP, POINTWISE, At
from .matmul import Chooser, Matmul, matmul_of, widened
from .moe import Moe, moe_of
from .ordered import Ordered, Scan, Scatter, ordered
from .reductions import ReduceSpec, reduction
from .target import CPU, Target
from .unread import rows_alone
from .views import INDEX_MAPS, MAPS, SPLITS, part_of_split

HELD_BACK = "held back by bisection"
_HEAVY = 8
_INLINE_BUDGET = 6
_TWICE = 64 << 20  # bytes of a weight that is kept in panels and as it is


@dataclass(frozen=True)
class Memory:
    """Where a value lies: strides and offset (elements) in the memory of `root`."""

    root: Value
    strides: tuple[Dim, ...]
    offset: Dim


@dataclass(eq=False)
class Unit:
    """One value computed by kernels. `domain` are the sizes it iterates over (a reduction's: of its input; a scatter's: of
    what is scattered). A matmul is a unit whose elements the template provides; what it reads besides its operands belongs
    to the epilogue. Attention, products of experts and what moves their rows are templates without one; `also` are what such
    a template, or what skips rows, computes besides."""

    value: Value
    node: Node
    domain: tuple[Dim, ...]
    reduce: ReduceSpec | None = None
    matmul: Matmul | None = None
    ordered: Ordered | None = None
    attention: Attention | None = None
    expert: Expert | None = None
    moe: Moe | None = None
    also: tuple[Value, ...] = ()
    reads: list[tuple[Value, Index]] = field(default_factory=list)
    symbols: tuple[sympy.Symbol, ...] = ()

    @property
    def values(self) -> tuple[Value, ...]:
        """All that it computes."""
        return (self.value, *self.also)

    @property
    def operands(self) -> tuple[Value, ...]:
        """What a template reads from memory; nothing for loops."""
        made = self.matmul or self.attention or self.expert or self.moe
        return () if made is None else made.operands

    @property
    def scratch(self) -> int:
        """How many of its kernel's last buffers are scratch of its own, where it is a template."""
        return 2 if self.expert is not None else len(self.moe.scratch) if self.moe is not None else 1

    @property
    def alone(self) -> bool:
        """Whether nothing shares its kernel."""
        return any(made is not None for made in (self.ordered, self.attention, self.expert, self.moe))


def _template(node: Node) -> Matmul | Attention | Expert | Moe | str | None:
    """A template's view of a node; a reason where the template does not take it; None for ops without one."""
    views = (view(node) for view in (gpu_matmul_of, matmul_of, attention_of, expert_of, moe_of))
    return next((found for found in views if found is not None), None)


def _is_number(node: Node) -> bool:
    """Whether every element of a node's result is one number that is known here: it is written where it is read."""
    return node.op.name == "aten.full.default" and not isinstance(node["fill_value"], Value)


def is_view(node: Node) -> bool:
    """True where torch itself would return a view of the first operand."""
    if node.op.name in SPLITS:
        return True
    if node.op.name not in INDEX_MAPS or node.op.name in ("aten.flip.default", "aten.repeat.default", "aten.roll.default"):
        return False
    source = node.args[0]
    if node.op.name in ("aten.reshape.default", "aten.flatten.using_ints"):
        return source.tensor.is_contiguous
    return node.op.has("view") or node.op.name == "aten._unsafe_view.default"


def _may_pass_on(node: Node) -> bool:
    """Whether a call may give its operands' memory: views, waits for what is not on its way, regions."""
    overload = node.op.overload
    return overload is None or is_wait(node.op.name) or any(r.alias_info for r in overload._schema.returns)


class Analysis:
    """Decisions about every node of a graph (composites already opened)."""

    def __init__(
        self,
        graph: Graph,
        *,
        generate: bool = True,
        target: Target = CPU,
        choose: Chooser | None = None,
        allow: Allow = always,
    ) -> None:
        self.choose = choose
        self.allow = allow
        self.chosen: dict[Node, str] = {}  # matmuls that a library was measured to run faster
        self.graph = graph
        self.generate = generate
        self.target = target
        self.device = target.device(graph)
        self.calls: dict[Node, tuple[str, str]] = {}
        self.memory: dict[Value, Memory] = {}
        self.aliases: dict[Value, Memory] = {}
        self.units: dict[Value, Unit] = {}
        self.inlined: dict[Value, Node] = {}
        self.weight: dict[Value, int] = {}
        self.streams: dict[Value, frozenset[Value]] = {}  # per inlined value: the values of its own size that it reads
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.interval = intervals(graph)  # work stays between the collectives that it stands between
        self.checks_rows = False
        self.unread: set[Value] = set()  # of which nobody reads rows that are not used: they are not cleared
        self.joined = set(summed_across(graph)) if generate else set[Value]()  # kernels of their own
        self.parts: dict[Value, tuple[Value, int]] = {}  # root -> what it lies in, and where
        self.panels: dict[Value, tuple[Value, Panels]] = {}  # by weight: what takes its place in products
        self.reordered: dict[Value, Reordered] = {}  # weights of convolutions, laid out for oneDNN
        self._classify()
        self._lent = self._lent_out()
        self._place()
        self.given = frozenset(self.memory[v].root for v in graph.results if v in self.memory)  # memory that a caller gets
        self._pack()
        self._find_unread()
        for unit in dict.fromkeys(self.units.values()):
            self._probe(unit)

    # -- what can be generated ----------------------------------------------------------------------------------------

    def _classify(self) -> None:
        known = {s for v in self.graph.inputs for s in type_symbols(v.type)}
        for node in self.graph.nodes:
            if node.op.name == "plait.constant":
                continue
            made = {s for v in node.results for s in type_symbols(v.type)}
            why = (
                self._refusal(node) or self._measured(node)
                if made <= known
                else "it gives sizes that are known only at run time"
            )
            known |= made
            if why is not None:
                chosen = node in self.chosen
                self.calls[node] = ("library", why) if chosen else library.kind_of(node, why, self.target.kind)

    def _measured(self, node: Node) -> str | None:
        """Why a library runs a matmul that the template could run: it was measured to be faster here."""
        made = matmul_of(node)
        found = self.choose(node, made) if self.choose is not None and isinstance(made, Matmul) else None
        if found is None:
            return None
        self.chosen[node], why = found
        return why

    def _refusal(self, node: Node) -> str | None:
        """Why no kernel can be generated for a node; None where one can."""
        name = node.op.name
        if not self.generate:
            return "code generation is switched off"
        if name not in POINTWISE and name not in SPLITS:
            found = reduction(node)
            if found is None:
                found = _template(node)
            if found is None:
                found = ordered(node)
            if found is None:
                return library.NO_KERNEL
            if isinstance(found, str):
                return found
        for v in (*node.inputs, *node.results):
            if not isinstance(v.type, TensorType):
                if isinstance(v.type, ScalarType) and v.type.kind == "int" and v.type.expr is not None:
                    continue
                return f"operand {v.type} is no tensor"
            if v.type.dtype.is_complex:
                return "complex numbers: kernels hold real ones"
            if dtype_name(v.type.dtype) not in DTYPES:
                return f"dtype {dtype_name(v.type.dtype)}"
            if v.type.device != self.device:
                return f"device {v.type.device}"
        if node.token is not None:
            return "it has an effect"
        if name == "aten.as_strided.default" and not self._fills_its_memory(node):
            return "it addresses memory that it was not given as a value"
        return library.refusal(node) or (None if self.allow("generate", node.op.name, node) else HELD_BACK)

    def _fills_its_memory(self, node: Node) -> bool:
        """Whether the source of an as_strided is computed here, row-major and whole, and the result lies inside it: then
        positions in memory are positions in the value."""
        source = node["self"]
        producer = self.graph.producers.get(source)
        if producer is None or producer.op.name in SPLITS or producer.op.has("view") or producer.op.name in INDEX_MAPS:
            return False
        numbers = (*source.tensor.shape, *node["size"], *node["stride"], node["storage_offset"] or 0)
        if not all(type(n) is int for n in numbers) or not source.tensor.is_contiguous or 0 in node["size"]:
            return False
        last = sum((n - 1) * s for n, s in zip(node["size"], node["stride"], strict=True)) + (node["storage_offset"] or 0)
        return last < source.tensor.numel

    # -- where values live --------------------------------------------------------------------------------------------

    def _wanted(self) -> set[Value]:
        """Values that must be in memory, or be views of memory."""
        wanted = {*self.graph.results, *self.joined}
        for _, copy in self.graph.writes:
            # what goes back to an input is finished before the first input changes: it may be made of any of them
            wanted.update(self.graph.producers[copy].inputs)
        for node in reversed(self.graph.nodes):
            if node in self.calls:
                wanted.update(node.inputs)
            elif (made := self._templated(node)) is not None:
                wanted.update(made.operands)
            elif is_view(node) and any(v in wanted for v in node.outputs):
                wanted.add(node.args[0])
        return wanted

    def _templated(self, node: Node) -> Matmul | Attention | Expert | Moe | None:
        """What a template computes. Where B of a product is bytes widened for it alone, the kernel reads the bytes."""
        made = _template(node)
        if not isinstance(made, Matmul):
            return None if isinstance(made, str) else made
        cast = widened(made, self.graph.producers, self.graph.users)
        if cast is None or cast in self.calls or cast.out in self.graph.results:
            return made
        return replace(made, b=cast.args[0])

    def _place(self) -> None:
        wanted = self._wanted()
        for v in self.graph.inputs:
            self._in_memory(v)
        for node in self.graph.nodes:
            if node.op.name == "plait.constant" or node in self.calls:
                for v in node.results:
                    self._in_memory(v)
            elif (node.op.name in INDEX_MAPS or node.op.name in SPLITS) and self._try_alias(node):
                continue
            else:
                for v in node.outputs:
                    self._compute(v, node, wanted)

    def _in_memory(self, v: Value) -> None:
        if isinstance(v.type, TensorType):
            self.memory[v] = Memory(v, v.type.strides, 0)

    def _try_alias(self, node: Node) -> bool:
        source = self.memory.get(node.args[0])
        if source is None or not is_view(node):
            return False
        for part, v in enumerate(node.outputs):
            zero = tuple(0 for _ in v.tensor.shape)
            at = At(Body(), node, zero, v.tensor, _no_read, _no_guard, _no_bounds)
            index = part_of_split(at, part) if node.op.name in SPLITS else MAPS[node.op.name](at)
            offset: Any = source.offset
            for i, s in zip(index, source.strides, strict=True):
                offset = offset + i * s
            self.memory[v] = Memory(source.root, v.tensor.strides, dim(sympy.sympify(offset)))
            self.aliases[v] = self.memory[v]
        return True

    def _lent_out(self) -> frozenset[Value]:
        """Values in whose memory results, what goes back to inputs, and what calls make may lie."""
        found: set[Value] = set()
        todo = [*self.graph.results, *self._written_back(), *(v for n in self.calls if _may_pass_on(n) for v in n.inputs)]
        while todo:
            v = todo.pop()
            node = self.graph.producers.get(v)
            if v not in found and node is not None and is_view(node):
                todo += node.inputs
            found.add(v)
        return frozenset(found)

    def _written_back(self) -> list[Value]:
        return [v for _, copy in self.graph.writes for v in self.graph.producers[copy].inputs]

    def _join(self, joined: Value, node: Node) -> bool:
        """Let kernels compute the parts of a joined value in its memory; False where they cannot.

        What computes a part has another size than the join, so that it stores the part, whoever reads the join: storing it
        there costs no more. A part that no kernel stores would have to be: those stay as they are.
        """
        at = places(node)
        if at is None or joined in self._written_back():
            return False
        homes = [self.memory.get(v) for v in node["tensors"]]
        found: dict[Value, tuple[Value, int]] = {}
        for part, home, offset in zip(node["tensors"], homes, at, strict=True):
            if home is None or home.offset != 0 or home.root not in self.units or home.root in self._lent:
                return False
            if home.root in self.parts or not fills(part.tensor, home.strides, home.root.tensor, joined.tensor):
                return False
            found[home.root] = joined, offset
        if len(found) < len(homes) or not self.allow("reuse", "join", node):
            return False
        self.parts.update(found)
        self.joined.add(joined)
        return True

    def _compute(self, v: Value, node: Node, wanted: set[Value]) -> None:
        if node.op.name == JOIN and self._join(v, node):
            self.units[v] = Unit(v, node, v.tensor.shape)
            self._in_memory(v)
            return
        spec, made, alone = reduction(node), self._templated(node), ordered(node)
        if isinstance(spec, ReduceSpec):
            self.units[v] = Unit(v, node, node.args[0].tensor.shape, reduce=spec)
            self._in_memory(v)
            return
        if isinstance(made, Matmul):
            self.units[v] = Unit(v, node, v.tensor.shape, matmul=made)
            self._in_memory(v)
            return
        if isinstance(made, Expert):
            self.units[v] = Unit(v, node, v.tensor.shape, expert=made)
            self._in_memory(v)
            return
        if isinstance(made, Attention | Moe):
            first, *also = node.outputs
            if v is first:
                attention, moe = (made, None) if isinstance(made, Attention) else (None, made)
                self.units[v] = Unit(v, node, v.tensor.shape, attention=attention, moe=moe, also=tuple(also))
            else:
                self.units[v] = self.units[first]
            self._in_memory(v)
            return
        if alone is not None:
            assert not isinstance(alone, str), "a node without a kernel is a call"
            first, *also = node.outputs
            domain = alone.domain if isinstance(alone, Scatter) else v.tensor.shape
            self.units[v] = Unit(v, node, domain, ordered=alone, also=tuple(also)) if v is first else self.units[first]
            self._in_memory(v)
            return
        free = node.op.name in INDEX_MAPS or node.op.name in SPLITS or _is_number(node)
        weight = 0 if free else 1 if node.op.name in CHEAP else _HEAVY
        weight += sum(self.weight.get(x, 0) for x in node.inputs)
        streams = self._streams(v, node)
        users = self.graph.users.get(v, ())
        again = weight * (len(users) - 1) <= _INLINE_BUDGET and len(streams) <= 1
        inline = v not in wanted and (len(users) == 1 or again)
        if any(self.interval[u] != self.interval[node] for u in users):  # only what costs less than to keep it may move
            inline = inline and weight <= _INLINE_BUDGET and len(streams) <= 1
        if inline and any(
            self._amplifies(v, u) and (weight >= _HEAVY or (weight and lies_channels_last(u.out.tensor))) for u in users
        ):
            inline = False  # channels-last even a cheap one, which every pixel would compute for each channel
        if inline and self.allow("inline", node.op.name, node):
            self.inlined[v] = node
            self.weight[v] = weight
            self.streams[v] = streams
        else:
            self.units[v] = Unit(v, node, v.tensor.shape)
            self._in_memory(v)

    def _streams(self, v: Value, node: Node) -> frozenset[Value]:
        """Values as large as `v` that computing it reads from memory."""
        found: set[Value] = set()
        for x in node.inputs:
            if x in self.inlined:
                found |= self.streams[x]
            elif isinstance(x.type, TensorType) and bool(x.type.numel == v.tensor.numel):
                found.add(x)
        return frozenset(found)

    def _amplifies(self, v: Value, user: Node) -> bool:
        """True where `user` reads elements of `v` many times over."""
        if not user.outputs or not isinstance(user.out.type, TensorType) or reduction(user) is not None:
            return False
        mine, theirs = v.tensor.numel, user.out.tensor.numel
        return bool(mine != theirs) and not (isinstance(mine, int) and isinstance(theirs, int) and theirs <= mine)

    def _find_unread(self) -> None:
        """Templates for GPUs compute whole buffers."""
        for v, unit in self.units.items():
            found = self.target.kind == "cpu" and rows_alone(v, self.graph)
            if found and self.allow("unread", "unread", unit.node):
                self.unread.add(v)

    # -- weights that the graph owns ------------------------------------------------------------------------------------

    def _pack(self) -> None:
        """Lay out weights of the graph's own for the template, once and not at each call. A weight that is read otherwise
        too is kept twice, up to some size. Templates for GPUs read weights as they are."""
        if self.target.kind != "cpu":
            return
        products: dict[Value, list[Unit]] = {}
        for unit in self.units.values():
            if unit.matmul is not None and unit.matmul.quantized is None:
                products.setdefault(self.memory[unit.matmul.b].root, []).append(unit)
        for weight, units in products.items():
            node = self.graph.producers.get(weight)
            if node is None or node.op.name != "plait.constant":
                continue
            first = units[0].matmul
            assert first is not None
            shape = (first.n, first.k) if first.b_layout == "k" else (first.k, first.n)
            alone = self._readers(weight) == len(units)
            small = weight.tensor.numel * weight.tensor.dtype.itemsize <= _TWICE
            if not (alone or small) or not all(self._whole(u, weight, shape, first.b_layout) for u in units):
                continue
            if self.allow("pack", "pack", node):
                panels = Panels(node.args[0], first.b_layout, int(first.n), int(first.k))
                kind = TensorType((panels.elements(weight.tensor.dtype),), weight.tensor.dtype, weight.tensor.device)
                self.panels[weight] = Value(kind, f"{weight.hint}_panels"), panels

    def _whole(self, unit: Unit, weight: Value, shape: tuple[Dim, ...], layout: str) -> bool:
        """Whether the matrix of a product is a whole weight, [N, K] or [K, N] row by row."""
        made = unit.matmul
        assert made is not None
        here = weight.tensor.shape == shape and weight.tensor.is_contiguous and self.memory[made.b].offset == 0
        return here and made.batch is None and made.b_layout == layout and made.ldb == shape[1] and made.n != 0 != made.k

    def _readers(self, weight: Value) -> int:
        """How many nodes read a value, or views of it."""
        count, todo = 0, [weight]
        while todo:
            v = todo.pop()
            for user in self.graph.users.get(v, ()):
                if any(w in self.aliases for w in user.outputs):
                    todo.extend(user.outputs)
                else:
                    count += 1
            count += v in self.graph.results
        return count

    # -- what units read ----------------------------------------------------------------------------------------------

    def _probe(self, unit: Unit) -> None:
        """Find which values a unit reads, at which index, by lowering it once over symbolic positions."""
        unit.symbols = tuple(sympy.Symbol(f"d{i}", integer=True, nonnegative=True) for i in range(len(unit.domain)))
        probe = Evaluator(self, Body())
        probe.leaf = lambda v, index: _record(probe, unit.reads, v, index)
        index = tuple(0 if n == 1 and type(n) is int else s for n, s in zip(unit.domain, unit.symbols, strict=True))
        if unit.attention is not None or unit.expert is not None:
            return
        if unit.moe is not None:
            self.checks_rows = self.checks_rows or unit.moe.checks
            return
        if isinstance(unit.ordered, Scatter):
            base = tuple(sympy.Symbol(f"e{i}", integer=True, nonnegative=True) for i in range(unit.value.tensor.rank))
            probe.read(unit.node.args[0], base)
            probe.scattered(unit, unit.ordered, index)
        else:
            probe.evaluate(unit, index)
            for v in unit.also:
                probe.compute(v, unit.node, index)
        self.checks_rows = self.checks_rows or probe.checked

    def resolve(self, value: Value) -> Memory:
        """Where `value` lies in memory."""
        return self.memory[value]


def _record(probe: Evaluator, reads: list[tuple[Value, Index]], v: Value, index: Index) -> str:
    if not any(w is v and i == index for w, i in reads):
        reads.append((v, index))
    return probe.body.load(f"leaf{len(reads)}", dtype_name(v.tensor.dtype), 0)


def _no_read(value: Value, index: Index) -> str:
    raise AssertionError("index maps read nothing")


def _no_bounds(row: str, size: Any) -> Any:
    raise AssertionError("index maps check nothing")


@contextmanager
def _no_guard(mask: str) -> Iterator[None]:
    yield


class Evaluator:
    """Computes elements of values into a body. `leaf(value, index)` reads what is neither inlined nor in registers."""

    def __init__(self, analysis: Analysis, body: Body) -> None:
        self.analysis = analysis
        self.body = body
        self.mask: str | None = None
        self.checked = False
        self.leaf: Any = None

    def read(self, value: Value, index: Index) -> str:
        """An element of `value` in its own dtype."""
        node = self.analysis.inlined.get(value)
        if node is None and value in self.analysis.aliases and self.analysis.memory[value].root in self.analysis.units:
            node = self.analysis.graph.producers[value]  # a view of a computed value: it may be in a register here
        return self.leaf(value, index) if node is None else self.compute(value, node, index)

    def compute(self, value: Value, node: Node, index: Index) -> str:
        """Lower one elementwise node at `index`, rounded to the value's dtype."""
        result = node.outputs.index(value)
        at = At(self.body, node, index, value.tensor, self.read, self.guard, self.bounds, result)
        if node.op.name in SPLITS:
            return self.read(node.args[0], part_of_split(at, result))
        return self.body.cast(POINTWISE[node.op.name](at), dtype_name(value.tensor.dtype))

    def evaluate(self, unit: Unit, index: Index) -> str:
        """A unit's value at `index` of its domain; for reductions and scans the element that is accumulated."""
        if unit.matmul is not None:
            return self.body.cast(unit.matmul.element(self, unit.node, index), dtype_name(unit.value.tensor.dtype))
        if isinstance(unit.ordered, Scan):
            return self.body.cast(self.body.up(self.read(unit.node.args[0], index)), unit.ordered.dtype)
        if unit.reduce is None:
            return self.compute(unit.value, unit.node, index)
        source = TensorType(unit.domain, unit.node.args[0].tensor.dtype)
        return unit.reduce.map(At(self.body, unit.node, index, source, self.read, self.guard, self.bounds))

    def scattered(self, unit: Unit, made: Scatter, index: Index) -> tuple[Index, str]:
        """Where the point `index` of a scatter writes, and what."""
        domain = TensorType(unit.domain, unit.value.tensor.dtype)
        at = At(self.body, unit.node, index, domain, self.read, self.guard, self.bounds)
        return made.place(at), self.body.cast(made.element(at), dtype_name(unit.value.tensor.dtype))

    @contextmanager
    def guard(self, mask: str) -> Iterator[None]:
        """Reads inside happen only where `mask` (and every outer mask) holds."""
        outer = self.mask
        self.mask = mask if outer is None else self.body.op("and", outer, mask)
        yield
        self.mask = outer

    def bounds(self, row: str, size: Any) -> Any:
        """`row` as an index below `size`: clamped, and reported where it lies outside."""
        self.checked = True
        last = self.body.index(sympy.sympify(size) - 1)
        zero = self.body.const(0, "int64")
        self.report(self.body.op("or", self.body.op("lt", row, zero), self.body.op("gt", row, last)))
        inside = self.body.op("maximum", self.body.op("minimum", row, last), zero)
        return self.body.symbol(inside)

    def report(self, outside: str) -> None:
        """Called with the condition under which a row id is out of range."""
