"""Between torch.fx and graphs: `from_fx` imports a captured GraphModule, `to_fx` makes any tensor-level graph runnable."""

from __future__ import annotations

import cmath
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch._higher_order_ops.effects import with_effects
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from ..errors import CannotImport
from . import size_ops
from .effects import advance, effect_of, order_after
from .graph import NOWHERE, Arg, Graph, Loc, Node, Value, bind
from .infer import type_of
from .op import OVERLOAD, Op, of, op
from .types import LIST, TUPLE, ScalarType, SymbolInfo, Symbols, TensorType, TokenType, dim, size_expr

_HIGHER_ORDER = {
    "cond": "plait.cond",
    "while_loop": "plait.while_loop",
    "while_loop_stack_output": "plait.while_loop_stack_output",
    "scan": "plait.scan",
    "invoke_subgraph": "plait.call",
}

# Python functions that fx graphs call on symbolic numbers, by name in `py.*`
_PYTHON: dict[Callable[..., Any], str] = {
    fn: f"py.{name}"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "eq", "ne", "lt", "le", "gt", "ge",
                 "and_", "or_", "xor", "not_", "abs", "lshift", "rshift")
    for fn in (getattr(operator, name),)
}  # fmt: skip
_PYTHON.update(
    {getattr(torch, name): f"py.{name}" for name in ("sym_float", "sym_int", "sym_not", "sym_max", "sym_min", "sym_ite")}
)
_PYTHON[round] = "py.round"
for _name in ("sqrt", "sin", "cos", "tan", "exp", "log", "log2", "floor", "ceil", "trunc"):
    for _home in (f"_sym_{_name}", f"sym_{_name}"):
        if hasattr(torch, _home):
            _PYTHON[getattr(torch, _home)] = f"py.{_name}"


@dataclass
class FxLinks:
    """What each fx node stands for: `values` a value (for several results each has its `getitem`), `calls` the call behind
    values by its first output, `writes` the position of the input that a `copy_` writes. What fx keeps in `meta` and graphs
    do not travels along these links. Nodes of regions are among them."""

    values: dict[FxNode, Value] = field(default_factory=dict[FxNode, Value])
    calls: dict[FxNode, Value] = field(default_factory=dict[FxNode, Value])
    writes: dict[FxNode, int] = field(default_factory=dict[FxNode, int])


class _Importer:
    """One GraphModule on its way into a Graph. `taken` are symbols gathered for the whole program."""

    def __init__(self, gm: GraphModule, name: str, symbols: Symbols, constants: dict[str, torch.Tensor],
                 links: FxLinks | None = None) -> None:  # fmt: skip
        self.links = FxLinks() if links is None else links
        self.gm = gm
        self.name = name
        self.symbols = symbols
        self.constants = constants
        self.env: dict[FxNode, Arg] = {}
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self.writes: dict[int, Value] = {}
        self.tokens: dict[str, Value] = {}
        self.outputs: tuple[Arg, ...] = ()
        self.used: dict[str, torch.Tensor] = {}
        self.tuples: dict[FxNode, tuple[Arg, ...]] = {}
        self.offsets: set[sympy.Symbol] = set()

    def run(self) -> Graph:
        for n in self.gm.graph.nodes:
            handler = getattr(self, f"do_{n.op}", None)
            if handler is None:
                raise CannotImport(what=f"fx node {n.op}", why="only functional graphs are imported", source=_source(n))
            handler(n)
        return Graph(self.name, tuple(self.inputs), tuple(self.nodes), self.outputs, tuple(sorted(self.writes.items())),
                     symbols=self.symbols, constants=self.used)  # fmt: skip

    def note_symbols(self, value: Any, n: FxNode) -> None:
        """Record ranges and hints of the symbols in a fake value of node `n`. Raises CannotImport where it is no number and
        no strided tensor."""
        sizes: Iterable[Any] = (value,)
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:
                layout = str(value.layout).removeprefix("torch.")
                raise CannotImport(what=f"a tensor of layout {layout}", why="graphs hold strided tensors", source=_source(n))
            sizes = (*value.shape, *value.stride())
        for s in sizes:
            if isinstance(s, torch.SymInt):
                self._note(s, n)

    def _note(self, size: torch.SymInt, n: FxNode) -> None:
        node: Any = size.node
        if node.is_nested_int():
            why = "each row of a nested tensor has its own"
            raise CannotImport(what="the size of a ragged dimension", why=why, source=_source(n))
        env: Any = node.shape_env
        for symbol in size_expr(size).free_symbols:
            if symbol in self.symbols:
                continue
            bounds = env.var_to_range.get(symbol)
            low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 0
            high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None
            values = getattr(env, "backed_var_to_val", None)
            hint = (env.var_to_val if values is None else values).get(symbol)
            if high is not None and high >= 2**62:
                high = None
            self.symbols[symbol] = SymbolInfo(max(low, 0), high, int(hint) if hint is not None and hint.is_Integer else None)

    def do_placeholder(self, n: FxNode) -> None:
        val = n.meta.get("val", n.meta.get("example_value"))
        self.note_symbols(val, n)
        value = Value(type_of(val), n.name)
        self.inputs.append(value)
        self.env[n] = value
        self.links.values[n] = value

    def do_get_attr(self, n: FxNode) -> None:
        target: Any = self.gm
        for part in str(n.target).split("."):
            target = getattr(target, part)
        if isinstance(target, GraphModule):
            self.env[n] = _Importer(target, str(n.target), self.symbols, self.constants, self.links).run()
        elif isinstance(target, torch.Tensor):
            self.env[n] = self.constant(str(n.target), target, n)
        else:
            raise CannotImport(what=f"attribute {n.target}", why=f"it is a {type(target).__name__}", source=_source(n))

    def constant(self, name: str, tensor: torch.Tensor, n: FxNode) -> Value:
        key, i = name, 0
        while key in self.constants and self.constants[key] is not tensor:
            i += 1
            key = f"{name}_{i}"
        self.constants[key] = self.used[key] = tensor
        val = n.meta.get("val")
        value = Value(type_of(tensor if val is None else val), n.name)
        self.nodes.append(Node(op("plait.constant"), (key,), (value,), loc=_loc(n)))
        self.links.values[n] = value
        return value

    def arg(self, a: Any) -> Arg:
        """An fx argument as plait's: values, expressions, plain data, tuples."""
        if isinstance(a, FxNode):
            got = self.env[a]
            if isinstance(got, Value) and isinstance(got.type, ScalarType) and got.type.expr is not None:
                return dim(got.type.expr)
            return got
        if isinstance(a, (LIST, TUPLE)):
            return tuple(self.arg(x) for x in a)
        if a.__class__ is slice:
            return tuple(self.arg(x) for x in (a.start, a.stop, a.step))
        return a

    def do_call_function(self, n: FxNode) -> None:
        target = n.target
        val = n.meta.get("val")
        if self._about_offsets(n, val):
            return
        self.note_symbols(val, n)
        if target is operator.getitem:
            self.env[n] = self.getitem(n)
            return
        if isinstance(val, torch.SymInt) and not _is_item(target):
            self.env[n] = dim(val)
            return
        if isinstance(val, int) and not isinstance(val, bool) and target in _PYTHON:
            self.env[n] = val
            return
        if target is torch.ops.aten.copy_.default and self._write(n):
            return
        if target is torch.ops.prims._make_token.default or target is torch.ops.prims._sink_tokens.default:
            self.env[n] = None
            return
        if target is with_effects:
            self.env[n] = self.tuples[n] = self.effectful(n, n.meta["val"])
            return
        found, args = self.resolve(n)
        self.env[n] = self.emit(n, found, args, val)

    def _about_offsets(self, n: FxNode, val: Any) -> bool:
        """Whether a node only speaks of where in its storage a view begins that depends on data.

        Types carry no such offset, so that its symbol is bound nowhere, and no value can depend on it. What torch asserts
        of it follows from what it asserts of the slice. Raises CannotImport where it is computed with.
        """
        if n.target is torch.ops.aten.sym_storage_offset.default and isinstance(val, torch.SymInt):
            self.offsets |= size_expr(val).free_symbols - self.symbols.keys()
        if not self.offsets:
            return False
        mine = any(isinstance(a, sympy.Expr) and a.free_symbols & self.offsets for a in map(self.arg, n.args))
        if isinstance(val, torch.SymInt) and size_expr(val).free_symbols & self.offsets and not _is_item(n.target):
            self.env[n] = size_expr(val)
        elif mine and n.target in _PYTHON and isinstance(val, bool | torch.SymBool):
            self.env[n] = True
        elif mine:
            why = "it computes with the storage offset of a view that depends on data"
            raise CannotImport(what=f"call of {n.target}", why=why, source=_source(n))
        else:
            asserts = n.target is torch.ops.aten._assert_scalar.default
            return asserts and isinstance(n.args[0], FxNode) and self.env[n.args[0]] is True
        return True

    def effectful(self, n: FxNode, val: tuple[Any, ...]) -> tuple[Arg, ...]:
        """The op below `with_effects`, ordered by tokens of ours. Torch's tokens, empty tensors, stand for nothing: the one
        that is given is the one that comes back."""
        token, target, *rest = n.args
        name = getattr(target, "__name__", str(target))
        if not isinstance(target, OpOverload):
            raise CannotImport(what=f"call of {name} with effects", why="it is no op with a schema", source=_source(n))
        found = of(target)
        if found.effect is None:
            why = "torch does not know its effect in this process (torch.library._register_effectful_op)"
            raise CannotImport(what=f"call of {name} with effects", why=why, source=_source(n))
        args = bind(found, [self.arg(a) for a in rest], {k: self.arg(v) for k, v in n.kwargs.items()})
        single = found.returns in (0, 1, None)
        results = self.emit(n, found, args, val[1] if single else val[1:])
        return (self.arg(token), results) if single else (self.arg(token), *results)

    def getitem(self, n: FxNode) -> Arg:
        arguments: tuple[Any, ...] = n.args
        source, i = arguments
        if isinstance(source, FxNode) and source in self.tuples:
            got = self.tuples[source][i]
            if isinstance(got, Value) and (source.target is not with_effects or i):  # torch's tokens stand for nothing
                self.links.values[n] = got
            return got
        return self.arg(source)[i]

    def _write(self, n: FxNode) -> bool:
        target, value = self.arg(n.args[0]), self.arg(n.args[1])
        if target not in self.inputs or not isinstance(value, Value):
            return False
        i = self.inputs.index(target)
        if value.type != target.type:
            value = self.emit(n, op("aten.copy.default"), (target, value, False), n.meta["val"])
        self.writes[i] = value
        self.env[n] = value
        self.links.writes[n] = i
        return True

    def resolve(self, n: FxNode) -> tuple[Op, tuple[Arg, ...]]:
        """The op that an fx node applies, and its bound arguments."""
        target: Any = n.target
        args = [self.arg(a) for a in n.args]
        kwargs = {k: self.arg(v) for k, v in n.kwargs.items()}
        if isinstance(target, OVERLOAD):
            return of(target), bind(of(target), args, kwargs)
        if isinstance(target, HigherOrderOperator) and target.name() in _HIGHER_ORDER:
            found = op(_HIGHER_ORDER[target.name()])
            if target.name() == "invoke_subgraph":
                args = [args[0], tuple(args[2:])]
            return found, bind(found, args, kwargs)
        if target in _PYTHON:
            return op(_PYTHON[target]), tuple(args)
        name = getattr(target, "__name__", str(target))
        raise CannotImport(what=f"call of {name}", why="it is neither an ATen op nor known control flow", source=_source(n))

    def emit(self, n: FxNode, found: Op, args: tuple[Arg, ...], val: Any) -> Arg:
        if found.has("mutates") and found.name.startswith(("aten.", "prims.")):
            why = "it writes to memory that other values may share, and graphs are functional"
            raise CannotImport(what=f"call of {found.name}", why=why, source=_source(n))
        many = isinstance(val, (LIST, TUPLE))
        returns = () if found.returns == 0 else val if many else (val,)
        for v in returns:
            self.note_symbols(v, n)
        values = [Value(type_of(v), f"{n.name}_{i}" if many else n.name) for i, v in enumerate(returns)]
        effect = effect_of(found, args)
        after: tuple[Value, ...] = ()
        outs = list(values)
        if effect is not None:
            after = order_after(effect, self.tokens)
            outs.append(Value(TokenType(effect), "t"))
            advance(effect, outs[-1], self.tokens)
        self.nodes.append(Node(found, args, tuple(outs), after, _loc(n)))
        if outs:
            self.links.calls[n] = outs[0]
        if many:
            self.tuples[n] = tuple(values)
            return tuple(values)
        self.links.values.update((n, v) for v in values)
        return values[0] if values else None

    def do_output(self, n: FxNode) -> None:
        outs = n.args[0]
        self.outputs = tuple(self.arg(a) for a in (outs if isinstance(outs, list | tuple) else (outs,)))


def _is_item(target: Any) -> bool:
    return isinstance(target, OVERLOAD) and of(target).has("data_dependent")


def _loc(n: FxNode) -> Loc:
    stack = n.meta.get("stack_trace") or ""
    modules = n.meta.get("nn_module_stack")
    module = ""
    if modules:
        last = next(reversed(modules.values()))
        module = str(last[0] if isinstance(last, TUPLE) else last)
    return Loc(stack, module) if stack or module else NOWHERE


def _source(n: FxNode) -> str | None:
    return _loc(n).short or None


def from_fx(gm: GraphModule, name: str = "forward", links: FxLinks | None = None) -> Graph:
    """Import a functional fx graph (ATen ops, types in `meta["val"]`) as a tensor-level graph.

    `copy_` onto a placeholder becomes a write of that input; sizes become expressions; control flow keeps its regions.
    `links` is filled with what each fx node stands for. Raises `CannotImport` naming the fx node and the user's line.
    """
    return _Importer(gm, name, {}, {}, links).run()


class _Exporter:
    """One Graph on its way to a GraphModule."""

    def __init__(self, graph: Graph, bare: bool = False, links: FxLinks | None = None) -> None:
        self.links = FxLinks() if links is None else links
        self.graph = graph
        self.bare = bare  # return the one output itself, not a tuple: what torch wants of a loop's condition
        self.fx = torch.fx.Graph()
        self.root = torch.nn.Module()
        self.env: dict[Value, FxNode] = {}
        self.sizes: dict[sympy.Basic, Any] = {}

    def run(self) -> GraphModule:
        taken: set[str] = set()
        for i, v in enumerate(self.graph.inputs):
            name = v.hint if v.hint.isidentifier() and v.hint not in taken else f"{v.hint or 'x'}_{i}"
            taken.add(name)
            self.env[v] = self.fx.placeholder(name)
        for v in self.graph.inputs:
            self.bind_sizes(v)
        for node in self.graph.nodes:
            self.node(node)
        finished: list[Any] = [self.env[v] for _, v in self.graph.writes]
        if len(finished) > 1:  # one may be made of an input that another one overwrites
            finished = [self.fx.call_function(torch.ops.aten.clone.default, (n,)) for n in finished]
        for (i, _), source in zip(self.graph.writes, finished, strict=True):
            target = self.env[self.graph.inputs[i]]
            self.links.writes[self.fx.call_function(torch.ops.aten.copy_.default, (target, source))] = i
        self.links.values.update((n, v) for v, n in self.env.items())
        outputs = tuple(self.arg(a) for a in self.graph.outputs)
        self.fx.output(outputs[0] if self.bare else outputs)
        return GraphModule(self.root, self.fx, self.graph.name)

    def bind_sizes(self, v: Value) -> None:
        """Make size symbols that `v` carries available to expressions."""
        if isinstance(v.type, ScalarType) and isinstance(v.type.expr, sympy.Symbol):
            self.sizes.setdefault(v.type.expr, self.env[v])
        if isinstance(v.type, TensorType):
            for what, dims in ((torch.ops.aten.sym_size.int, v.type.shape), (torch.ops.aten.sym_stride.int, v.type.strides)):
                for i, d in enumerate(dims):
                    if isinstance(d, sympy.Symbol) and d not in self.sizes:
                        self.sizes[d] = self.fx.call_function(what, (self.env[v], i))

    def size(self, expr: Any) -> Any:
        """An expression as an fx node (or int), computed once."""
        if isinstance(expr, int) or expr.is_Integer:
            return int(expr)
        if expr not in self.sizes:
            numerator, denominator = expr.as_numer_denom()
            if denominator != 1:  # a fraction that is whole for all sizes, such as (s0 + 1) / 2
                parts = (self.size(numerator), self.size(denominator))
                self.sizes[expr] = self.fx.call_function(size_ops.FUNCTIONS["FloorDiv"], parts)
                return self.sizes[expr]
            if not expr.args:
                raise CannotImport(what=f"size {expr}", why="no input or node of the graph carries it", source=None)
            self.sizes[expr] = self.compute(expr)
        return self.sizes[expr]

    def compute(self, expr: sympy.Expr) -> Any:
        if expr.is_Rational or expr.is_Float:
            return float(expr)
        parts: tuple[Any, ...] = expr.args
        args = [self.size(a) for a in parts]
        return self.fx.call_function(_size_function(type(expr)), tuple(args))

    def arg(self, a: Arg) -> Any:
        if isinstance(a, Value):
            return self.env[a]
        if isinstance(a, sympy.Expr):
            return self.size(a)
        if isinstance(a, TUPLE):
            return [self.arg(x) for x in a]
        if isinstance(a, Graph):
            return self.region(a)
        if isinstance(a, complex) and not cmath.isfinite(a):  # fx would print a name that Python does not know
            return self.fx.call_function(complex, (a.real, a.imag))
        return a

    def region(self, graph: Graph, bare: bool = False) -> FxNode:
        name = self.free_name(graph.name)
        setattr(self.root, name, _Exporter(graph, bare, self.links).run())
        return self.fx.get_attr(name)

    def free_name(self, hint: str) -> str:
        name = "".join(c if c.isalnum() else "_" for c in hint)
        i = 0
        while hasattr(self.root, name if not i else f"{name}_{i}"):
            i += 1
        return name if not i else f"{name}_{i}"

    def node(self, node: Node) -> None:
        if node.op.name == "plait.constant":
            name = self.free_name(str(node.args[0]))
            self.root.register_buffer(name, self.graph.constants[node.args[0]])
            self.env[node.out] = self.fx.get_attr(name)
            return
        positional = [
            self.region(a, bare=True) if isinstance(a, Graph) and p.name == "condition" else self.arg(a)
            for a, p in zip(node.args, node.op.params, strict=True)
            if not p.keyword_only
        ]
        named = {
            p.name: self.arg(a)
            for a, p in zip(node.args, node.op.params, strict=True)
            if p.keyword_only and not (a is None and p.default is None)
        }
        call = self.fx.call_function(node.op.reference, *_call_args(node, positional, named))
        if node.loc.stack:  # torch joins these texts when it differentiates, and a None among them is an error there
            call.meta["stack_trace"] = node.loc.stack
        if node.outputs:
            self.links.calls[call] = node.outputs[0]
        results = node.results
        if node.op.returns == 1 and len(results) == 1:
            self.env[results[0]] = call
        else:
            for i, v in enumerate(results):
                self.env[v] = self.fx.call_function(operator.getitem, (call, i))
        for v in results:
            self.bind_sizes(v)


def _call_args(node: Node, positional: list[Any], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not node.op.has("control_flow"):
        return tuple(positional), named
    if node.op.name == "plait.call":
        return (positional[0], node.regions[0].name, *positional[1]), named
    wants_tuple = node.op.name != "plait.scan"
    return tuple(tuple(a) if isinstance(a, LIST) and wants_tuple else a for a in positional), named


def _size_function(kind: type) -> Callable[..., Any]:
    """A Python function on ints that computes a sympy operation."""
    found = size_ops.FUNCTIONS.get(kind.__name__)
    if found is None:
        raise CannotImport(what=f"size operation {kind.__name__}", why="it has no integer function", source=None)
    return found


def to_fx(graph: Graph, links: FxLinks | None = None) -> GraphModule:
    """A runnable GraphModule that computes the graph; inputs named in `writes` are mutated.

    Works at the tensor level only. Regions become nested modules. `links` is filled with what each fx node stands for.
    """
    return _Exporter(graph, links=links).run()
