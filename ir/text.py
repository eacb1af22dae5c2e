"""Text form of graphs: prints like Python with types in comments, and parses back to an equal graph.

    graph(level="tensor", symbols={"s0": (2, None, 8)})
    def forward(x: "f32[s0,4]"):
        w = plait.constant("w")  # f32[4,4]
        mm = aten.mm.default(x, w)  # f32[s0,4]  model.py:12
        a, b = aten.split.Tensor(mm, 2, 1)  # f32[s0,2]{4,1}, f32[s0,2]{4,1}
        r, t0 = aten.rand.default((4,))  # f32[4], token(random)
        r1, t1 = aten.rand.default((4,), after=(t0,))  # f32[4], token(random)
        return (a, None, 2*s0)

A size symbol prints with its range and the value seen at capture; `"integer"` marks one that may be 0 or less (an integer
argument, or a size that depends on data). Mutated inputs print before `return` as `x[...] = value`. Regions print as nested
functions. A line without a type comment is inferred, so that text can be edited by hand. Text is deterministic: no
addresses, times or unordered iteration.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from ..errors import BadText
from .expr import FUNCTIONS, expr_text
from .graph import Arg, Graph, Loc, Node, Value, bind
from .infer import infer
from .op import Op, op
from .types import (
    TUPLE,
    OpaqueType,
    ScalarType,
    SymbolInfo,
    Symbols,
    TensorType,
    TokenType,
    ValueType,
    dim,
    dtype_from_text,
    size_symbol,
    type_text,
)

_KEYWORDS = frozenset(("graph", "after", "plait", "aten", "py", "torch", "device"))


class Names:
    """Gives every value of a function a unique, readable Python name; hints first."""

    def __init__(self, taken: set[str] | None = None) -> None:
        self.of: dict[Value, str] = {}
        self.taken = set(_KEYWORDS) | (taken or set())
        self.counts: dict[str, int] = {}

    def fresh(self, hint: str) -> str:
        """A name not yet taken, as close to `hint` as can be."""
        base = re.sub(r"\W", "_", hint) or "v"
        if base[0].isdigit():
            base = "v" + base
        if keyword.iskeyword(base):
            base += "_"
        name, n = base, self.counts.get(base, 0)
        while name in self.taken:
            n += 1
            name = f"{base}_{n}"
        self.counts[base] = n
        self.taken.add(name)
        return name

    def define(self, value: Value) -> str:
        """Name a value at its definition."""
        hint = value.hint or ("t" if isinstance(value.type, TokenType) else "v")
        self.of[value] = self.fresh(hint)
        return self.of[value]


def _arg_text(arg: Arg, names: Names, regions: dict[int, str]) -> str:
    if isinstance(arg, Value):
        return names.of.get(arg, f"UNDEFINED_{arg.hint}")
    if isinstance(arg, Graph):
        return regions[id(arg)]
    if isinstance(arg, TUPLE):
        inner = ", ".join(_arg_text(a, names, regions) for a in arg)
        return f"({inner},)" if len(arg) == 1 else f"({inner})"
    if isinstance(arg, sympy.Basic):
        return expr_text(arg)
    if isinstance(arg, torch.dtype | torch.memory_format | torch.layout):
        return str(arg)
    if isinstance(arg, torch.device):
        return f'device("{arg}")'
    if isinstance(arg, float):
        return _float_text(arg)
    if isinstance(arg, complex):
        return f"complex({_float_text(arg.real)}, {_float_text(arg.imag)})"
    return repr(arg)


def _float_text(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _call_text(node: Node, names: Names, regions: dict[int, str]) -> str:
    last = len(node.args)
    positional = [i for i, p in enumerate(node.op.params) if not p.keyword_only]
    while positional and _is_default(node, positional[-1]):
        positional.pop()
    parts = [_arg_text(node.args[i], names, regions) for i in positional]
    for i in range(last):
        param = node.op.params[i]
        if param.keyword_only and not _is_default(node, i):
            parts.append(f"{param.name}={_arg_text(node.args[i], names, regions)}")
    if node.after:
        parts.append(f"after={_arg_text(node.after, names, regions)}")
    return f"{node.op.name}({', '.join(parts)})"


def _is_default(node: Node, i: int) -> bool:
    default, arg = node.op.params[i].default, node.args[i]
    return type(default) is type(arg) and not isinstance(arg, Value | Graph) and bool(default == arg)


def node_text(node: Node, names: Names, regions: dict[int, str] | None = None, *, locations: bool = True) -> str:
    """One node as a line. Values must be named already; outputs are named here where they are not."""
    inside = regions if regions is not None else {id(r): r.name for r in node.regions}
    call = _call_text(node, names, inside)
    outs = ", ".join(names.of.get(v) or names.define(v) for v in node.outputs)
    types = ", ".join(type_text(v.type) for v in node.outputs)
    where = node.loc.short if locations else ""
    comment = "  ".join(filter(None, (types, where))) if node.outputs else where and f"  {where}"
    line = f"{outs} = {call}" if node.outputs else call
    return f"{line}  # {comment}" if comment else line


def print_graph(graph: Graph, *, locations: bool = True, header: bool = True) -> str:
    """The whole graph as text; see the module's docstring for the form."""
    lines: list[str] = []
    if header:
        symbols = ", ".join(
            f'"{s.name}": ({i.low}, {i.high}, {i.hint})'
            if s.is_positive
            else f'"{s.name}": ({i.low}, {i.high}, {i.hint}, "integer")'
            for s, i in sorted(graph.symbols.items(), key=lambda kv: kv[0].name)
        )
        lines.append(f'graph(level="{graph.level}", symbols={{{symbols}}})')
    _print_function(graph, graph.name, lines, "", {s.name for s in graph.symbols}, locations)
    return "\n".join(lines) + "\n"


def value_names(graph: Graph) -> Mapping[Value, str]:
    """The names that the graph's text gives to its values, those inside regions excepted."""
    return _print_function(graph, graph.name, [], "", {s.name for s in graph.symbols}, False).of


def _print_function(graph: Graph, name: str, lines: list[str], indent: str, taken: set[str], locations: bool) -> Names:
    names = Names(taken)
    params = ", ".join(f'{names.define(v)}: "{type_text(v.type)}"' for v in graph.inputs)
    lines.append(f"{indent}def {name}({params}):")
    inner = indent + "    "
    for node in graph.nodes:
        regions: dict[int, str] = {}
        for region in node.regions:
            if id(region) not in regions:
                regions[id(region)] = names.fresh(region.name)
                _print_function(region, regions[id(region)], lines, inner, taken, locations)
        lines.append(inner + node_text(node, names, regions, locations=locations))
    lines.extend(f"{inner}{names.of[graph.inputs[i]]}[...] = {names.of[v]}" for i, v in graph.writes)
    lines.append(f"{inner}return {_arg_text(graph.outputs, names, {})}")
    return names


# -- parsing ----------------------------------------------------------------------------------------------------------

_TYPE = re.compile(r"^(?P<dtype>[a-z]\w*)\[(?P<shape>[^\]]*)\](?:\{(?P<strides>[^}]*)\})?(?:@(?P<device>[\w:]+))?$")


def _split_top(text: str) -> list[str]:
    parts: list[str] = []
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


class _Parser:
    def __init__(self, text: str, constants: Mapping[str, torch.Tensor]) -> None:
        self.lines = text.splitlines()
        self.constants = constants
        self.symbols: Symbols = {}
        self.at = 0

    def fail(self, why: str, line: int | None = None) -> BadText:
        at = self.at if line is None else line
        shown = self.lines[at - 1].strip() if 0 < at <= len(self.lines) else ""
        return BadText(line=at, why=why, text=shown)

    def expr(self, text: str) -> Any:
        try:
            return self.value(ast.parse(text, mode="eval").body, {})
        except SyntaxError as error:
            raise self.fail(f"bad size expression {text!r}") from error

    def type(self, text: str) -> ValueType:
        found = _TYPE.match(text)
        try:
            if found:
                shape = tuple(dim(self.expr(p)) for p in _split_top(found["shape"]))
                strides = tuple(dim(self.expr(p)) for p in _split_top(found["strides"] or ""))
                return TensorType(shape, dtype_from_text(found["dtype"]), found["device"] or "cpu", strides)
            if text.startswith("token("):
                return TokenType(text[6:-1])
            if text.startswith("opaque("):
                return OpaqueType(text[7:-1])
            head, _, rest = text.partition("(")
            if head in ("int", "float", "bool"):
                return ScalarType(head, sympy.sympify(self.expr(rest[:-1])) if rest else None)
        except (KeyError, TypeError) as error:
            raise self.fail(f"bad type {text!r}") from error
        raise self.fail(f"bad type {text!r}")

    def value(self, e: ast.expr, scope: dict[str, Any]) -> Arg:
        """Evaluate an argument: only names, literals, arithmetic on sizes and the known functions."""
        if isinstance(e, ast.Constant):
            return e.value
        if isinstance(e, ast.Tuple):
            return tuple(self.value(x, scope) for x in e.elts)
        if isinstance(e, ast.Name):
            if e.id in scope:
                return scope[e.id]
            if re.fullmatch(r"z?[su]f?\d+|[a-z]\w*", e.id):
                return self._symbol(e.id)
            raise self.fail(f"unknown name {e.id!r}", e.lineno)
        if isinstance(e, ast.Attribute) and isinstance(e.value, ast.Name) and e.value.id == "torch":
            found = getattr(torch, e.attr, None)
            if isinstance(found, torch.dtype | torch.memory_format | torch.layout):
                return found
        if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
            return -self.value(e.operand, scope)
        if isinstance(e, ast.BinOp):
            return self._arith(e, scope)
        if isinstance(e, ast.Call) and isinstance(e.func, ast.Name):
            args = [self.value(a, scope) for a in e.args]
            if e.func.id in ("float", "complex"):
                return {"float": float, "complex": complex}[e.func.id](*args)
            if e.func.id == "device":
                return torch.device(*args)
            if e.func.id in FUNCTIONS:
                return FUNCTIONS[e.func.id](*[sympy.sympify(a) for a in args])
        raise self.fail(f"cannot read {ast.unparse(e)!r}")

    def _symbol(self, name: str) -> sympy.Symbol:
        for s in self.symbols:
            if s.name == name:
                return s
        raise self.fail(f"unknown name {name!r}")

    def _arith(self, e: ast.BinOp, scope: dict[str, Any]) -> Any:
        a, b = self.value(e.left, scope), self.value(e.right, scope)
        table: dict[type, Any] = {ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b,
                                  ast.Div: lambda: sympy.sympify(a) / b, ast.Pow: lambda: a**b,
                                  ast.FloorDiv: lambda: FUNCTIONS["FloorDiv"](*map(sympy.sympify, (a, b)))}  # fmt: skip
        if type(e.op) not in table:
            raise self.fail(f"cannot read {ast.unparse(e)!r}")
        return table[type(e.op)]()

    def graph(self) -> Graph:
        text = "\n".join(self.lines)
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            self.at = error.lineno or 0
            raise self.fail(error.msg) from error
        level = "tensor"
        for stmt in tree.body:
            self.at = stmt.lineno
            if isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call):
                for kw in stmt.value.keywords:
                    value = ast.literal_eval(kw.value)
                    if kw.arg == "level":
                        level = value
                    elif kw.arg == "symbols":
                        self.symbols = {size_symbol(n, positive=len(v) < 4): SymbolInfo(*v[:3]) for n, v in value.items()}
            elif isinstance(stmt, ast.FunctionDef):
                return _at_level(self.function(stmt), level)
        raise self.fail("no graph found")

    def function(self, fn: ast.FunctionDef) -> Graph:
        scope: dict[str, Any] = {}
        inputs: list[Value] = []
        for a in fn.args.args:
            self.at = a.lineno
            if not (isinstance(a.annotation, ast.Constant) and isinstance(a.annotation.value, str)):
                raise self.fail(f"input {a.arg!r} has no type")
            inputs.append(Value(self.type(a.annotation.value), a.arg))
            scope[a.arg] = inputs[-1]
        nodes: list[Node] = []
        writes: list[tuple[int, Value]] = []
        used: dict[str, torch.Tensor] = {}
        for stmt in fn.body:
            self.at = stmt.lineno
            if isinstance(stmt, ast.FunctionDef):
                scope[stmt.name] = self.function(stmt)
            elif isinstance(stmt, ast.Return):
                outs = self.value(stmt.value, scope) if stmt.value is not None else ()
                return Graph(fn.name, tuple(inputs), tuple(nodes), outs, tuple(writes), symbols=self.symbols, constants=used)
            elif isinstance(stmt, ast.Assign) and isinstance(stmt.targets[0], ast.Subscript):
                target = self.value(stmt.targets[0].value, scope)
                if target not in inputs:
                    raise self.fail("only inputs are written")
                writes.append((inputs.index(target), self.value(stmt.value, scope)))
            elif isinstance(stmt, ast.Assign) or (isinstance(stmt, ast.Expr) and _is_op_call(stmt.value)):
                nodes.append(self.node(stmt, scope, used))
            else:
                raise self.fail("only assignments, regions and one return are allowed")
        raise self.fail(f"{fn.name} has no return")

    def node(self, stmt: ast.Assign | ast.Expr, scope: dict[str, Any], used: dict[str, torch.Tensor]) -> Node:
        call = stmt.value
        if not isinstance(call, ast.Call):
            raise self.fail("the right side must be a call of an op")
        found = op(ast.unparse(call.func))
        args = [self.value(a, scope) for a in call.args]
        kwargs = {kw.arg or "": self.value(kw.value, scope) for kw in call.keywords}
        after = kwargs.pop("after", ())
        try:
            bound = bind(found, args, kwargs)
        except TypeError as error:
            raise self.fail(str(error)) from error
        if found.name == "plait.constant":
            if bound[0] not in self.constants:
                raise self.fail(f"no constant {bound[0]!r} was given")
            used[bound[0]] = self.constants[bound[0]]
        types = self.types_of(stmt, found, bound)
        target = stmt.targets[0] if isinstance(stmt, ast.Assign) else ast.Tuple([])
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        for name in map(ast.unparse, targets):
            if not name.isidentifier():
                raise self.fail(f"{name} cannot be assigned to")
            if any(s.name == name for s in self.symbols):
                raise self.fail(f"{name} is the name of a size symbol")
        if len(targets) != len(types):
            raise self.fail(f"{found.name} gives {len(types)} values, {len(targets)} named")
        outs = tuple(Value(t, ast.unparse(x)) for t, x in zip(types, targets, strict=True))
        scope.update({v.hint: v for v in outs})
        return Node(found, bound, outs, after, Loc())

    def types_of(self, stmt: ast.stmt, found: Op, bound: tuple[Arg, ...]) -> tuple[ValueType, ...]:
        line, column = stmt.end_lineno or stmt.lineno, stmt.end_col_offset or 0
        behind = self.lines[line - 1].encode()[column:].decode()  # offsets of ast count bytes
        _, mark, comment = behind.partition("  # ")
        if mark:
            return tuple(self.type(t) for t in _split_top(comment.split("  ")[0]))
        if found.name == "plait.constant":
            tensor = self.constants[bound[0]]
            return (TensorType(tuple(tensor.shape), tensor.dtype, str(tensor.device), tuple(tensor.stride())),)
        return infer(found, bound, self.symbols)


def _at_level(graph: Graph, level: str) -> Graph:
    """The graph at another level, regions included."""
    nodes = tuple(
        n.with_args(tuple(_at_level(a, level) if isinstance(a, Graph) else a for a in n.args)) if n.regions else n
        for n in graph.nodes
    )
    return graph.replace(level=level, nodes=nodes)


def _is_op_call(e: ast.expr) -> bool:
    return isinstance(e, ast.Call) and isinstance(e.func, ast.Attribute)


def parse_graph(text: str, constants: Mapping[str, torch.Tensor] | None = None) -> Graph:
    """Read a graph from its text form. `constants` supplies the tensors that `plait.constant` names.

    Raises `BadText` with line and reason, `UnknownOp`, `InferenceFailed`.
    """
    return _Parser(text, constants or {}).graph()
