"""The cut forms of a program's functions: made when recording has shown enough, compiled with the user's own lines."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .cut import PHASE, Cut, Cutter
from .record import begin_phase
from .seen import Seen
from .sites import Site
from .source import NoSource, function_of, source_of, with_inner


class Front:
    """Cut forms, one for each function and object that its first parameter is bound to.

    `reasons` says of functions why they are run as they are.
    """

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.version = -1
        self.state: Any = None
        self.modules: list[nn.Module] = []  # whose data blocks may have been traced with
        self.cells: dict[tuple[types.FunctionType, int], tuple[str, types.CellType]] = {}
        self.reasons: dict[types.FunctionType, str] = {}
        self.holds: list[tuple[Any, str, Any]] = []  # what cut code relies on: (object, attribute, what it holds)
        self.blocks: dict[Any, Site] = {}

    def entry(self, program: Any) -> Callable[..., Any]:
        """What to call in place of the program."""
        changed = any(getattr(o, a, None) is not held for o, a, held in self.holds) or _state(self.modules) != self.state
        if changed:
            self.blocks = {}
        if self.version != self.seen.version or changed:
            self.version, self.cells, self.holds = self.seen.version, {}, []
        found = function_of(program)
        name = self._cut(*found, entry=True) if found is not None and self.seen.ops else None
        held = (program, *(x for _, _, x in self.holds), *(m for s in self.blocks.values() for m in s.modules))
        self.modules = list(dict.fromkeys(m for x in held if isinstance(x, nn.Module) for m in x.modules()))
        self.state = _state(self.modules)
        if found is None or name is None:
            return program
        function: Any = self.cells[found[0], id(found[1])][1].cell_contents
        bound = found[1]
        return function if bound is None else lambda *args: function(bound, *args)

    def apart(self) -> list[tuple[str, str]]:
        """Functions and places that run op by op, and why."""
        found = [(f.__qualname__, why) for f, why in self.reasons.items()]
        return found + [(s.line.rpartition("/")[2], s.why) for s in self.blocks.values() if s.why]

    def _cut(self, function: types.FunctionType, bound: Any, *, entry: bool = False) -> str | None:
        """The name under which cut code finds the cut form of a function; None where it stays as it is."""
        key = function, id(bound)
        if key in self.cells:
            return self.cells[key][0]
        if function in self.reasons or not self._is_seen(function.__code__):
            return None
        name, cell = f"_plait_{len(self.cells)}", types.CellType()
        self.cells[key] = name, cell
        try:
            cell.cell_contents = self._made(function, bound, name, entry)
        except NoSource as why:
            self.reasons[function] = str(why)
            del self.cells[key]
            return None
        return name

    def _is_seen(self, code: types.CodeType) -> bool:
        own = with_inner(code)
        return any(c in own for c, _ in (*self.seen.ops, *self.seen.calls))

    def _made(self, function: types.FunctionType, bound: Any, name: str, entry: bool) -> types.FunctionType:
        source = source_of(function)
        used: dict[str, types.CellType] = {}

        def callee(other: types.FunctionType, its: Any) -> str | None:
            found = self._cut(other, its)
            if found is not None:
                used[found] = self.cells[other, id(its)][1]
            return found

        cutter = Cutter(source, bound, self.seen, callee, name.strip("_"))
        tree = cutter.run(phases=entry)
        used[PHASE] = types.CellType(begin_phase)
        for cut in cutter.cuts:
            used[cut.name] = self._block(function, cut).cell
        self.holds += cutter.holds
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)) | used
        made = _compiled(tree, function, cells)
        self._stands_for(made, function)
        return made

    def _stands_for(self, made: types.FunctionType, function: types.FunctionType) -> None:
        self.seen.cut.update(dict.fromkeys(with_inner(made.__code__), function.__code__))

    def _block(self, function: types.FunctionType, cut: Cut) -> Site:
        text = ast.unparse(cut.tree).partition("(")[2]  # without its name
        key = function.__code__, cut.line, text, tuple((n, id(x)) for n, x in cut.fixed.items())
        if key not in self.blocks:
            made = _compiled(cut.tree, function, {n: types.CellType(x) for n, x in cut.fixed.items()})
            self._stands_for(made, function)
            self.seen.blocks.add(made.__code__)
            self.blocks[key] = Site(made, f"{function.__code__.co_filename}:{cut.line}")
        return self.blocks[key]


def _state(modules: list[nn.Module]) -> Any:
    """The plain data of modules, and what their parameters are like, by which blocks are traced."""
    plain = (bool, int, float, str, type(None), tuple)
    return [
        (
            [(k, v) for k, v in vars(m).items() if type(v) in plain],
            [(k, p.dtype, p.device, p.requires_grad) for k, p in m._parameters.items() if p is not None],
        )
        for m in modules
    ]


def _compiled(tree: ast.FunctionDef, like: types.FunctionType, cells: dict[str, types.CellType]) -> types.FunctionType:
    """A function of this tree with the globals and defaults of another, whose free names are bound to these cells."""
    parameters = [ast.arg(n) for n in cells]
    arguments = ast.arguments(posonlyargs=[], args=parameters, kwonlyargs=[], kw_defaults=[], defaults=[])
    outer = ast.FunctionDef(name="_plait_outer", args=arguments, body=[tree], decorator_list=[])
    module = ast.fix_missing_locations(
        ast.copy_location(ast.Module([ast.fix_missing_locations(ast.copy_location(outer, tree))], []), tree)
    )
    code = compile(module, like.__code__.co_filename, "exec")
    outer_code = next(c for c in code.co_consts if isinstance(c, types.CodeType))
    inner = next(c for c in outer_code.co_consts if isinstance(c, types.CodeType) and c.co_name == tree.name)
    closure = tuple(cells[n] for n in inner.co_freevars)
    made = types.FunctionType(
        inner, like.__globals__, tree.name, like.__defaults__ if tree.name == like.__name__ else None, closure
    )
    if tree.name == like.__name__:
        made.__kwdefaults__ = like.__kwdefaults__
    return made
