"""Functions and their source: syntax trees whose places are those of the code that runs."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn

Place = tuple[str, tuple[int, ...]]  # class of the syntax, and where it is: see `place_of`

# which syntax an instruction may come from
_SYNTAX = {
    "CALL": "Call",
    "CALL_FUNCTION_EX": "Call",
    "CALL_KW": "Call",
    "BINARY_OP": "BinOp",
    "BINARY_SUBSCR": "Subscript",
    "BINARY_SLICE": "Subscript",
    "STORE_SUBSCR": "Subscript",
    "STORE_SLICE": "Subscript",
    "LOAD_ATTR": "Attribute",
    "COMPARE_OP": "Compare",
    "UNARY_NEGATIVE": "UnaryOp",
    "UNARY_INVERT": "UnaryOp",
    "UNARY_POSITIVE": "UnaryOp",
}


class NoSource(Exception):
    """Why a function's source cannot be used."""


def place_of(node: ast.AST) -> Place:
    """The place of an expression. Of a call only the end counts: compilers move the start of `x.f(…)` to the name f."""
    where = (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)  # type: ignore[attr-defined]
    name = type(node).__name__
    if name == "AugAssign":
        name = "BinOp"
    return name, (where[1], where[3]) if name == "Call" else where


@cache
def _places(code: types.CodeType) -> tuple[Place | None, ...]:
    """The place of every instruction of a code object, None where it computes nothing."""
    import dis

    names = {i.offset: i.opname for i in dis.get_instructions(code)}
    found: list[Place | None] = []
    name = ""
    for unit, where in enumerate(code.co_positions()):
        name = names.get(2 * unit, name)  # an instruction's caches follow it, and a frame that calls stands at the last
        syntax = _SYNTAX.get(name)
        if syntax is None or None in where:
            found.append(None)
        else:
            line, end_line, column, end_column = where
            found.append((syntax, (end_line, end_column) if syntax == "Call" else (line, end_line, column, end_column)))  # type: ignore[arg-type]
    return tuple(found)


@cache
def with_inner(code: types.CodeType) -> tuple[types.CodeType, ...]:
    """A function's code and that of its comprehensions, whose places are in the same text."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return code, *(deep for c in inner for deep in with_inner(c))


def place_in(code: types.CodeType, at: int) -> Place | None:
    """The place of the instruction at an offset."""
    places = _places(code)
    return places[at // 2] if 0 <= at // 2 < len(places) else None


@dataclass(frozen=True, eq=False)
class Source:
    """A function with its syntax tree."""

    function: types.FunctionType
    tree: ast.FunctionDef
    globals: Mapping[str, object]

    @property
    def locals(self) -> frozenset[str]:
        """Names that are the function's own, or its closure's."""
        code = self.function.__code__
        return frozenset((*code.co_varnames, *code.co_cellvars, *code.co_freevars))

    def known(self) -> Mapping[str, object]:
        """What the closure binds."""
        names, cells = self.function.__code__.co_freevars, self.function.__closure__ or ()
        found: dict[str, object] = {}
        for name, cell in zip(names, cells, strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        return found


@cache
def parse(code: types.CodeType) -> ast.FunctionDef:
    """The syntax tree of a function's code. Raises NoSource for what cannot be compiled again from its text."""
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError) as why:
        raise NoSource(f"its source cannot be read: {why}") from None
    text = "".join(lines)
    indented = text[:1].isspace()
    try:
        tree = ast.parse("if True:\n" + text if indented else text)
    except SyntaxError:
        raise NoSource("it is no function of its own in the source") from None
    found = tree.body[0].body[0] if indented else tree.body[0]  # type: ignore[attr-defined]
    if not isinstance(found, ast.FunctionDef):
        raise NoSource("it is no plain function")
    if found.decorator_list:
        raise NoSource("it is decorated")
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise NoSource("it is a generator or a coroutine")
    ast.increment_lineno(found, first - (2 if indented else 1))
    return found


def source_of(function: types.FunctionType) -> Source:
    """A function with its tree. Raises NoSource."""
    tree = parse(function.__code__)
    if any(isinstance(n, ast.Global | ast.Nonlocal) for n in ast.walk(tree)):
        raise NoSource("it binds names of its surroundings")
    if any(_is_private(n) for n in ast.walk(tree)):
        raise NoSource("it uses names that Python mangles")
    return Source(function, tree, function.__globals__)


def _is_private(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.startswith("__") and not name.endswith("__")


def function_of(callee: object) -> tuple[types.FunctionType, object] | None:
    """(function, what its first parameter is bound to) of something that is called: a function, a bound method, a module
    whose call does nothing but its forward. None for anything else."""
    if isinstance(callee, nn.Module):
        plain = type(callee).__call__ is nn.Module.__call__ and "forward" not in vars(callee)
        hooks = callee._forward_hooks or callee._forward_pre_hooks or callee._backward_hooks or callee._backward_pre_hooks
        forward = type(callee).forward
        return (forward, callee) if plain and not hooks and isinstance(forward, types.FunctionType) else None
    if isinstance(callee, types.MethodType) and isinstance(callee.__func__, types.FunctionType):
        return callee.__func__, callee.__self__
    if isinstance(callee, types.FunctionType):
        return callee, None
    return None
