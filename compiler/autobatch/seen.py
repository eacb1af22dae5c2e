"""What running has shown: from which places of the user's source ops came, and where values were asked for."""

from __future__ import annotations

import ast
import builtins
import itertools
import types
from collections.abc import Iterator
from typing import Any

from .source import NoSource, Place, parse, place_in, place_of, with_inner

_HARMLESS = frozenset(
    [
        "len",
        "range",
        "zip",
        "enumerate",
        "min",
        "max",
        "int",
        "float",
        "bool",
        "isinstance",
        "tuple",
        "list",
        "dict",
        "reversed",
        "getattr",
        "abs",
        "sum",
    ]
)


class Seen:
    """Facts that recording collects, for all calls of one batched program."""

    def __init__(self) -> None:
        self.ops: dict[tuple[types.CodeType, Place], bool] = {}
        self.calls: dict[tuple[types.CodeType, Place], set[types.CodeType]] = {}
        self.demands: set[types.CodeType] = set()
        self.version = 0  # grows with every new fact
        self.cut: dict[types.CodeType, types.CodeType] = {}  # code of cut forms and of blocks: what it was cut from
        self.blocks: set[types.CodeType] = set()
        self._straight: dict[types.CodeType, tuple[int, bool]] = {}

    def note(self, frames: list[tuple[types.CodeType, int]], *, demand: bool) -> None:
        """An op, or a demand for a value, that came from the first of the user's frames, innermost first."""
        stack = list(self._as_written(frames))
        if not stack:
            return
        inner, place = stack[0]
        if demand:
            new = {code for code, _ in stack} - self.demands
            self.demands |= new
            self.version += bool(new)
        elif place is not None and (inner, place) not in self.ops:
            self.ops[inner, place] = True
            self.version += 1
        for (callee, _), (caller, place) in itertools.pairwise(stack):
            if place is not None:
                known = self.calls.setdefault((caller, place), set())
                if callee not in known:
                    known.add(callee)
                    self.version += 1

    def _as_written(self, stack: list[tuple[types.CodeType, int]]) -> Iterator[tuple[types.CodeType, Place | None]]:
        """The same stack in the program as the user wrote it: a block stands for the function that it is cut from."""
        inside = False
        for code, at in stack:
            if not inside:
                yield self.cut.get(code, code), place_in(code, at)
            inside = code in self.blocks

    def has_op(self, code: types.CodeType, place: Place) -> bool:
        """Whether ops came from a place of a function."""
        return any((c, place) in self.ops for c in with_inner(code))

    def callees(self, code: types.CodeType, place: Place) -> set[types.CodeType]:
        """The user's functions in which ops came about that were called from a place of a function."""
        return set().union(*(self.calls.get((c, place), ()) for c in with_inner(code)))

    def is_straight(self, code: types.CodeType) -> bool:
        """Whether a user function is tensor code as a whole: no value is asked for, it does not reach itself, and nothing
        in it changes what others see."""
        found = self._straight.get(code)
        if found is None or found[0] != self.version:
            self._straight[code] = self.version, False  # while it is being decided: what reaches itself is not straight
            self._straight[code] = found = self.version, self._decide(code)
        return found[1]

    def _decide(self, code: types.CodeType) -> bool:
        if not self.demands.isdisjoint(with_inner(code)):
            return False
        try:
            tree = parse(code)
        except NoSource:
            return False
        lists = {t.id for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.List)
                 for t in n.targets if isinstance(t, ast.Name)}  # fmt: skip
        return all(self._is_harmless(code, n, lists) for s in tree.body for n in ast.walk(s))

    def _is_harmless(self, code: types.CodeType, n: ast.AST, lists: set[str]) -> bool:
        match n:
            case (
                ast.Global() | ast.Nonlocal() | ast.Yield() | ast.YieldFrom() | ast.Await() | ast.Import() | ast.ImportFrom()
            ):
                return False
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef() | ast.Delete() | ast.Try() | ast.Lambda():
                return False
            case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                return self.has_op(code, place_of(n))
            case ast.Call():
                return self._is_harmless_call(code, n, lists)
        return True

    def _is_harmless_call(self, code: types.CodeType, n: ast.Call, lists: set[str]) -> bool:
        place = place_of(n)
        if self.has_op(code, place):
            return True
        if callees := self.callees(code, place):
            return all(self.is_straight(c) for c in callees)
        match n.func:
            case ast.Name(id=name):
                return name in _HARMLESS and hasattr(builtins, name)
            case ast.Attribute(value=ast.Name(id=name), attr="append"):
                return name in lists
        return False


def stack_of(frame: Any, foreign: tuple[str, ...]) -> list[tuple[types.CodeType, int]]:
    """(code, instruction) of the user's frames from `frame` outwards, innermost first, up to where the batch was begun.
    `foreign` are folders whose code is not theirs, of which the first is this package's."""
    found = []
    while frame is not None and not (
        frame.f_code.co_name == "_instance" and frame.f_code.co_filename.startswith(foreign[0])
    ):
        name = frame.f_code.co_filename
        if not name.startswith(foreign) and not name.startswith("<"):
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return found
