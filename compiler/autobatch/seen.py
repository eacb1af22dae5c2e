"""What running has shown: from which places of the user's source ops came, and where values were asked for."""

from __future__ import annotations

import ast
import builtins
import contextlib
import dataclasses
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .source import NoSource, Place, parse, place_in, place_of, with_inner

Frame = tuple[types.CodeType, int, dict[str, Any]]  # code, instruction, globals

_CHANGES = frozenset(
    ["append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "setdefault", "add", "discard", "reverse",
     "sort"]
)  # fmt: skip
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
        self.globals: dict[types.CodeType, dict[str, Any]] = {}
        self._straight: dict[tuple[types.CodeType, bool], tuple[int, bool]] = {}
        self._separate: dict[tuple[types.CodeType, bool], tuple[int, bool]] = {}

    def note(self, frames: list[Frame], *, demand: bool) -> None:
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

    def _as_written(self, stack: list[Frame]) -> Iterator[tuple[types.CodeType, Place | None]]:
        """The same stack in the program as the user wrote it: a block stands for the function that it is cut from."""
        inside = False
        for code, at, names in stack:
            self.globals[self.cut.get(code, code)] = names
            if not inside:
                yield self.cut.get(code, code), place_in(code, at)
            inside = code in self.blocks

    def has_op(self, code: types.CodeType, place: Place) -> bool:
        """Whether ops came from a place of a function."""
        return any((c, place) in self.ops for c in with_inner(code))

    def callees(self, code: types.CodeType, place: Place) -> set[types.CodeType]:
        """The user's functions in which ops came about that were called from a place of a function."""
        return set().union(*(self.calls.get((c, place), ()) for c in with_inner(code)))

    def is_straight(self, code: types.CodeType, *, of_module: bool) -> bool:
        """Whether a user function is tensor code as a whole: no value is asked for, it does not reach itself, nothing in it
        changes what others see, and it reads no data but its arguments, and, as a method of a module, the module's."""
        key = code, of_module
        found = self._straight.get(key)
        if found is None or found[0] != self.version:
            self._straight[key] = self.version, False  # while it is being decided: what reaches itself is not straight
            self._straight[key] = found = self.version, self._decide(code, of_module)
        return found[1]

    def is_separate(self, code: types.CodeType, *, of_module: bool) -> bool:
        """Whether nothing in a user function changes what others see, so that calls of it may run in any order. It may ask
        for values, reach itself and read anything."""
        key = code, of_module
        found = self._separate.get(key)
        if found is None or found[0] != self.version:
            self._separate[key] = (
                self.version,
                True,
            )  # while it is being decided: what reaches itself is as separate as it is
            try:
                holds = _Separate(self, code, parse(code), of_module).holds()
            except NoSource:
                holds = False
            self._separate[key] = found = self.version, holds
        return found[1]

    def keeps_order(self, code: types.CodeType, *, bound: bool) -> str:
        """Why instances of a program must not take turns at waits: what it was found to write that they all see. `bound`:
        its first parameter is one object for all."""
        found: dict[tuple[types.CodeType, bool], str] = {}

        def look(code: types.CodeType, bound: bool, outer: frozenset[str], *, entry: bool = False) -> str:
            if (code, bound) not in found:
                found[code, bound] = ""  # while it is being decided
                with contextlib.suppress(NoSource):
                    found[code, bound] = _Writes(self, code, parse(code), bound, outer, entry, look).first()
            return found[code, bound]

        return look(code, bound, frozenset(), entry=True)

    def _decide(self, code: types.CodeType, of_module: bool) -> bool:
        if not self.demands.isdisjoint(with_inner(code)):
            return False
        try:
            tree = parse(code)
        except NoSource:
            return False
        return _Straight(self, code, tree, of_module).holds()


class _Straight:
    """Looks at a function's syntax for what makes it more than tensor code."""

    def __init__(self, seen: Seen, code: types.CodeType, tree: ast.FunctionDef, of_module: bool) -> None:
        self.seen, self.code, self.tree = seen, code, tree
        self.owner = code.co_varnames[0] if of_module and code.co_argcount else ""
        self.locals = frozenset((*code.co_varnames, *code.co_cellvars))
        self.lists = {t.id for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.List)
                      for t in n.targets if isinstance(t, ast.Name)}  # fmt: skip

    def holds(self) -> bool:
        """Whether nothing was found."""
        return all(self.is_harmless(n) for s in self.tree.body for n in ast.walk(s))

    def is_harmless(self, n: ast.AST) -> bool:
        match n:
            case (
                ast.Global() | ast.Nonlocal() | ast.Yield() | ast.YieldFrom() | ast.Await() | ast.Import() | ast.ImportFrom()
            ):
                return False
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef() | ast.Delete() | ast.Try() | ast.Lambda():
                return False
            case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                return self.seen.has_op(self.code, place_of(n))
            case ast.Attribute(ctx=ast.Load()):
                return self.seen.has_op(self.code, place_of(n)) or self.root(n) == self.owner or self.is_code(n)
            case ast.Name(ctx=ast.Load(), id=name):
                return name in self.locals or name == self.owner or self.is_code(n)
            case ast.Call():
                return self.is_harmless_call(n)
        return True

    def root(self, n: ast.expr) -> str:
        """The name that a chain of attributes begins with."""
        while isinstance(n, ast.Attribute):
            n = n.value
        return n.id if isinstance(n, ast.Name) else ""

    def is_code(self, n: ast.expr) -> bool:
        """Whether an expression is a method of a tensor, or stands for a module, a function or a class: what does not
        change from call to call."""
        if isinstance(n, ast.Attribute) and (self.root(n) in self.locals or not self.root(n)):
            return hasattr(torch.Tensor, n.attr) or (n.attr == "append" and self.root(n) in self.lists)
        found = self.object(n)
        return found is not None and is_code(found)

    def object(self, n: ast.expr) -> Any:
        """What a global name, or an attribute of a module, stands for."""
        if isinstance(n, ast.Name):
            return self.seen.globals.get(self.code, {}).get(n.id, getattr(builtins, n.id, None))
        if isinstance(n, ast.Attribute):
            base = self.object(n.value)
            return getattr(base, n.attr, None) if isinstance(base, types.ModuleType) else None
        return None

    def is_harmless_call(self, n: ast.Call) -> bool:
        place = place_of(n)
        if self.seen.has_op(self.code, place):
            return True
        if callees := self.seen.callees(self.code, place):
            own = bool(self.owner) and self.root(n.func) == self.owner
            return all(self.seen.is_straight(c, of_module=own) for c in callees)
        match n.func:
            case ast.Name(id=name):
                return name in _HARMLESS and hasattr(builtins, name)
            case ast.Attribute(value=ast.Name(id=name), attr="append"):
                return name in self.lists
        return False


class _Separate(_Straight):
    """Looks for what changes something that others see."""

    def is_harmless(self, n: ast.AST) -> bool:
        match n:
            case ast.Attribute(ctx=ast.Load()) | ast.Name(ctx=ast.Load()):
                return True
            case ast.Subscript(ctx=ast.Store(), value=ast.Name(id=name)):
                return name in self.lists or self.seen.has_op(self.code, place_of(n))
        return super().is_harmless(n)

    def is_harmless_call(self, n: ast.Call) -> bool:
        place = place_of(n)
        if self.seen.has_op(self.code, place):
            return True
        if callees := self.seen.callees(self.code, place):
            own = bool(self.owner) and self.root(n.func) == self.owner
            return all(self.seen.is_separate(c, of_module=own) for c in callees)
        if isinstance(n.func, ast.Attribute) and isinstance(n.func.value, ast.Name) and n.func.value.id in self.lists:
            return n.func.attr in ("append", "pop", "extend", "insert", "reverse")
        made = self.object(n.func)
        if isinstance(made, type) and (dataclasses.is_dataclass(made) or issubclass(made, tuple)):
            return not hasattr(made, "__post_init__")
        demanded = isinstance(n.func, ast.Attribute) and n.func.attr in ("item", "tolist")
        return demanded or super().is_harmless_call(n)


class _Writes(_Straight):
    """Looks for writes to what other instances see as well, between which they must not take turns. `outer` are names of
    functions around it that are called once an instance."""

    def __init__(
        self,
        seen: Seen,
        code: types.CodeType,
        tree: ast.FunctionDef,
        bound: bool,
        outer: frozenset[str],
        entry: bool,
        look: Callable[..., str],
    ) -> None:
        super().__init__(seen, code, tree, bound)
        self.locals |= outer
        self.entry, self.look = entry, look

    def first(self) -> str:
        """What was found first, in words; empty for nothing."""
        return next((why for s in self.tree.body for n in ast.walk(s) if (why := self.why(n))), "")

    def why(self, n: ast.AST) -> str:
        match n:
            case ast.Global(names=names):
                return f"it writes to {names[0]}, which all instances see"
            case ast.Nonlocal(names=names) if self.entry:
                return f"it writes to {names[0]}, which all instances see"
            case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()) if self.is_seen_by_all(n.value):
                return f"it writes to {ast.unparse(n)}, which all instances see"
            case ast.Call(func=ast.Attribute(attr=attr, value=value)) if attr in _CHANGES and self.is_seen_by_all(value):
                return f"it changes {ast.unparse(value)}, which all instances see"
            case ast.Call():
                own = bool(self.owner) and self.root(n.func) == self.owner
                callees = self.seen.callees(self.code, place_of(n))
                inner = with_inner(self.code)
                return next((w for c in callees if (w := self.look(c, own, self.locals if c in inner else frozenset()))), "")
        return ""

    def is_seen_by_all(self, n: ast.expr) -> bool:
        """Whether an expression stands for the program's own object, a part of it, or something global."""
        while isinstance(n, ast.Subscript | ast.Attribute):
            n = n.value
        name = n.id if isinstance(n, ast.Name) else ""
        return bool(name) and (name == self.owner or name not in self.locals)


def is_code(x: object) -> bool:
    """Whether an object is a module, a function or a class, or a torch op: nothing with data that may change."""
    plain = isinstance(x, types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type)
    return plain or (callable(x) and type(x).__module__.startswith("torch._ops"))


def stack_of(frame: Any, foreign: tuple[str, ...]) -> list[Frame]:
    """The user's frames from `frame` outwards, innermost first, up to where the batch was begun.
    `foreign` are folders whose code is not theirs, of which the first is this package's."""
    found = []
    while frame is not None and not (
        frame.f_code.co_name in ("_instance", "_resumed_all") and frame.f_code.co_filename.startswith(foreign[0])
    ):
        name = frame.f_code.co_filename
        if not name.startswith(foreign) and not name.startswith("<"):
            found.append((frame.f_code, frame.f_lasti, frame.f_globals))
        frame = frame.f_back
    return found
