"""Graphs: SSA functions of typed values and nodes.

Everything here is immutable. A node keeps object identity (two random draws never merge); a graph indexes producers and
users on demand. Rewriting makes a new graph that shares the nodes it did not touch (see `rewrite.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch

from .op import REQUIRED, Op
from .types import TUPLE, OpaqueType, ScalarType, SymbolInfo, Symbols, TensorType, TokenType, ValueType, type_symbols

Arg = Any
"""An argument: Value, Graph (a region), None, number, str, sympy expression, torch dtype/device/layout/memory format, or
a tuple of these."""

LEVELS = ("tensor", "kernel")

_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One SSA result. `hint` is the name that the printer would like; equality is identity."""

    type: ValueType
    hint: str = ""

    def __repr__(self) -> str:
        return f"<{self.hint or 'value'}: {self.type}>"

    @property
    def tensor(self) -> TensorType:
        """The type as a tensor type. Raises TypeError for scalars, tokens and opaque values."""
        if not isinstance(self.type, TensorType):
            raise TypeError(f"{self!r} is no tensor")
        return self.type


@dataclass(frozen=True, slots=True)
class Loc:
    """Where a node came from: torch's stack trace text, the module path, and the rules that made it from other nodes."""

    stack: str = ""
    module: str = ""
    rules: tuple[str, ...] = ()

    @property
    def frame(self) -> tuple[str, int, str] | None:
        """(file, line, code) of the innermost user frame, None where nothing is known."""
        found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n\s*([^\n]*))?', self.stack)
        found = [f for f in found if not f[0].startswith("<eval_with_key>")]  # code that torch generated, with a counter
        if not found:
            return None
        users = [f for f in found if not f[0].startswith(_TORCH)]
        file, line, code = (users or found)[-1]
        return file, int(line), code.strip()

    @property
    def short(self) -> str:
        """`file.py:12` for listings, "" where nothing is known."""
        frame = self.frame
        return f"{frame[0].rsplit('/', 1)[-1]}:{frame[1]}" if frame else ""

    def by(self, rule: str) -> Loc:
        """This location, stamped with the rule that rewrote it."""
        return self if rule in self.rules else Loc(self.stack, self.module, (*self.rules, rule))


NOWHERE = Loc()


def flatten(arg: Arg) -> Iterator[Arg]:
    """Leaves of an argument, tuples opened."""
    if isinstance(arg, TUPLE):
        for a in arg:
            yield from flatten(a)
    else:
        yield arg


def map_arg(arg: Arg, fn: Callable[[Arg], Arg]) -> Arg:
    """The argument with `fn` applied to each leaf; the same object where nothing changed."""
    if isinstance(arg, TUPLE):
        new = tuple(map_arg(a, fn) for a in arg)
        return new if any(a is not b for a, b in zip(new, arg, strict=True)) else arg
    return fn(arg)


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One application of an op.

    `args` has one entry for every parameter of the op, defaults filled in; `after` holds the tokens it waits for. An op
    with an effect has one output more than it returns: its token.
    """

    op: Op
    args: tuple[Arg, ...]
    outputs: tuple[Value, ...]
    after: tuple[Value, ...] = ()
    loc: Loc = NOWHERE
    inputs: tuple[Value, ...] = field(init=False)
    """Values among the arguments, in order, tokens excluded."""

    def __post_init__(self) -> None:
        found: list[Value] = []
        for arg in self.args:
            if isinstance(arg, Value):
                found.append(arg)
            elif isinstance(arg, tuple):
                found.extend(a for a in flatten(arg) if isinstance(a, Value))
        object.__setattr__(self, "inputs", tuple(found))

    def __getitem__(self, name: str) -> Arg:
        """The argument for parameter `name`."""
        return self.args[self.op.index[name]]

    def get(self, name: str, default: Arg = None) -> Arg:
        """The argument for parameter `name`, `default` where the op has no such parameter."""
        i = self.op.index.get(name)
        return default if i is None else self.args[i]

    @property
    def out(self) -> Value:
        """The first output."""
        return self.outputs[0]

    @property
    def results(self) -> tuple[Value, ...]:
        """Outputs without the token, which is the last of them."""
        outputs = self.outputs
        return outputs[:-1] if outputs and isinstance(outputs[-1].type, TokenType) else outputs

    @property
    def token(self) -> Value | None:
        """The token that orders later effects behind this node."""
        last = self.outputs[-1] if self.outputs else None
        return last if last is not None and isinstance(last.type, TokenType) else None

    @property
    def regions(self) -> tuple[Graph, ...]:
        """Nested graphs among the arguments."""
        return tuple(a for a in flatten(self.args) if isinstance(a, Graph))

    def with_args(self, args: tuple[Arg, ...], after: tuple[Value, ...] | None = None) -> Node:
        """The same application on other arguments; outputs keep their identity, so users need no change."""
        return Node(self.op, args, self.outputs, self.after if after is None else after, self.loc)

    def __repr__(self) -> str:
        outs = ", ".join(v.hint or "_" for v in self.outputs)
        return f"<{outs} = {self.op.name}>"


def bind(op: Op, args: Iterable[Arg], kwargs: Mapping[str, Arg] | None = None) -> tuple[Arg, ...]:
    """Arguments in the full order of `op`'s parameters, defaults filled in.

    Raises TypeError for a missing, surplus or unknown argument.
    """
    given = list(args)
    rest = dict(kwargs or {})
    if len(given) > len(op.params):
        raise TypeError(f"{op.name} takes {len(op.params)} arguments, {len(given)} given")
    for param in op.params[len(given) :]:
        if param.name in rest:
            given.append(rest.pop(param.name))
        elif param.default is REQUIRED:
            raise TypeError(f"{op.name} misses argument {param.name!r}")
        else:
            given.append(param.default)
    if rest:
        raise TypeError(f"{op.name} has no argument {sorted(rest)[0]!r}")
    return tuple(given)


@dataclass(frozen=True, eq=False)
class Graph:
    """One SSA function at one level.

    `outputs` are values or plain arguments (None, numbers, size expressions). `writes` maps positions of inputs to the
    values that they hold after the call (mutation of inputs, made explicit). `constants` are the tensors that
    `plait.constant` nodes name.
    """

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Arg, ...]
    writes: tuple[tuple[int, Value], ...] = ()
    level: str = "tensor"
    symbols: Symbols = field(default_factory=dict[sympy.Symbol, SymbolInfo])
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    @cached_property
    def producers(self) -> dict[Value, Node]:
        """Node that defines each value; inputs are absent."""
        return {v: n for n in self.nodes for v in n.outputs}

    @cached_property
    def users(self) -> dict[Value, tuple[Node, ...]]:
        """Nodes that read each value (tokens too), in order; absent where nobody does. Graph outputs are not users."""
        found: dict[Value, list[Node]] = {}
        for n in self.nodes:
            for v in dict.fromkeys((*n.inputs, *n.after)):
                found.setdefault(v, []).append(n)
        return {v: tuple(ns) for v, ns in found.items()}

    @cached_property
    def roots(self) -> dict[Value, Value]:
        """The value whose memory each result of a view shares, found through chains of views; absent for other values."""
        found: dict[Value, Value] = {}
        for n in self.nodes:
            if n.op.has("view") and n.inputs:
                base = found.get(n.inputs[0], n.inputs[0])
                found.update((v, base) for v in n.results)
        return found

    @cached_property
    def escapes(self) -> frozenset[Value]:
        """Values whose memory leaves the graph: results, and what results that are views share memory with."""
        return frozenset(self.roots.get(v, v) for v in self.results)

    @cached_property
    def results(self) -> frozenset[Value]:
        """Values that leave the graph: outputs and written-back values."""
        return frozenset([v for v in flatten(self.outputs) if isinstance(v, Value)] + [v for _, v in self.writes])

    def replace(self, **changes: Any) -> Graph:
        """A copy with fields replaced."""
        names = ("name", "inputs", "nodes", "outputs", "writes", "level", "symbols", "constants")
        fields: dict[str, Any] = {k: getattr(self, k) for k in names}
        fields.update(changes)
        return Graph(**fields)

    def __str__(self) -> str:
        from .text import print_graph

        return print_graph(self)

    def to_fx(self) -> torch.fx.GraphModule:
        """This graph as a runnable `torch.fx.GraphModule` (tensor level)."""
        from .fx import to_fx

        return to_fx(self)

    def run(self, *inputs: Any) -> tuple[Any, ...]:
        """Interpret the graph by its ops' references. Inputs named in `writes` are mutated."""
        return self.to_fx()(*inputs)


@dataclass(frozen=True)
class Program:
    """Named graphs with an entry, e.g. `forward` and `backward` after a split."""

    graphs: Mapping[str, Graph]
    entry: str


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True where two constants hold the same bits in the same shape; NaN equals itself."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    x, y = (t.detach().contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b))
    return bool(torch.equal(x, y))


def structurally_equal(a: Graph, b: Graph) -> bool:
    """True where both graphs compute the same, value names and locations aside."""
    return difference(a, b) is None


def difference(a: Graph, b: Graph) -> str | None:
    """The first structural difference in words, None for equal graphs."""
    pair: dict[Value, Value] = {}

    def same(x: Arg, y: Arg) -> bool:
        if isinstance(x, Value) or isinstance(y, Value):
            return isinstance(x, Value) and isinstance(y, Value) and pair.get(x) is y
        if isinstance(x, TUPLE) and isinstance(y, TUPLE):
            return len(x) == len(y) and all(map(same, x, y))
        if isinstance(x, Graph) and isinstance(y, Graph):
            return structurally_equal(x, y)
        if isinstance(x, float | complex) and isinstance(y, float | complex):
            return repr(x) == repr(y)  # NaN equals itself, 0.0 is not -0.0
        return type(x) is type(y) and bool(x == y)

    def link(xs: tuple[Value, ...], ys: tuple[Value, ...], where: str) -> str | None:
        if len(xs) != len(ys):
            return f"{where}: {len(xs)} against {len(ys)} values"
        for x, y in zip(xs, ys, strict=True):
            if x.type != y.type:
                return f"{where}: type {x.type} against {y.type}"
            pair[x] = y
        return None

    if a.level != b.level:
        return f"level {a.level} against {b.level}"
    if (found := link(a.inputs, b.inputs, "inputs")) is not None:
        return found
    if len(a.nodes) != len(b.nodes):
        return f"{len(a.nodes)} against {len(b.nodes)} nodes"
    for i, (m, n) in enumerate(zip(a.nodes, b.nodes, strict=True)):
        if m.op is not n.op:
            return f"node {i}: {m.op.name} against {n.op.name}"
        if not same(m.args, n.args):
            return f"node {i} ({m.op.name}): arguments differ"
        if not same(m.after, n.after):
            return f"node {i} ({m.op.name}): order differs"
        if (found := link(m.outputs, n.outputs, f"node {i} ({m.op.name})")) is not None:
            return found
    if not same(a.outputs, b.outputs):
        return "outputs differ"
    if len(a.writes) != len(b.writes) or not all(
        i == j and pair.get(v) is w for (i, v), (j, w) in zip(a.writes, b.writes, strict=False)
    ):
        return "writes differ"
    if set(a.constants) != set(b.constants):
        return "constants differ"
    for name, tensor in a.constants.items():
        if not same_tensor(tensor, b.constants[name]):
            return f"constant {name!r} differs"
    return None


def symbols_in(what: Any) -> set[sympy.Symbol]:
    """Size symbols in types, expressions, regions, and tuples of these."""
    found: set[sympy.Symbol] = set()
    for leaf in flatten(what):
        if isinstance(leaf, TensorType):
            found |= leaf.symbols()
        elif isinstance(leaf, ScalarType):
            found |= type_symbols(leaf)
        elif isinstance(leaf, sympy.Expr):
            found |= leaf.free_symbols
        elif isinstance(leaf, Graph):
            for node in leaf.nodes:
                found |= symbols_in((node.args, *(v.type for v in node.results)))
            found |= symbols_in((leaf.outputs, *(v.type for v in leaf.inputs)))
    return found


__all__ = [
    "LEVELS", "NOWHERE", "Arg", "Graph", "Loc", "Node", "OpaqueType", "Program", "ScalarType", "TensorType", "TokenType",
    "Value", "bind", "difference", "flatten", "map_arg", "same_tensor", "structurally_equal", "symbols_in",
]  # fmt: skip
