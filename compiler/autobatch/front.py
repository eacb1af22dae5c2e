"""The cut forms of a program's functions: made when recording has shown enough, compiled with the user's own lines."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .captured import Captured
from .cut import PHASE, Cut, Cutter
from .fork import FORK
from .ghosts import DEEPER
from .record import begin_phase, constant, deeper, driven, fork
from .seen import Seen
from .sites import Site
from .source import NoSource, function_of, source_of, with_inner
from .values import Pending, item
from .yields import DRIVE, ITEM, PENDING, TYPE, Yields

_ENDS = frozenset(["next", "__next__", "StopIteration"])
# what generators refer to
YIELDED = {PENDING: Pending, TYPE: type, ITEM: item, DRIVE: driven}


class Front:
    """Cut forms, one for each function and object that its first parameter is bound to.

    `reasons` says of functions why they are run as they are.
    """

    def __init__(self, seen: Seen, without: frozenset[str] = frozenset()) -> None:
        self.seen = seen
        self.without = without
        self.version = self.decided = -1
        self.size = -1, -1  # of `holds`, and of what blocks have taken as arguments
        self.watched = Watched([])  # data that blocks may have been traced with
        self.cells: dict[tuple[types.FunctionType, int], tuple[str, types.CellType]] = {}
        self.reasons: dict[types.FunctionType, str] = {}
        self.holds: list[tuple[Any, str, Any]] = []  # what cut code relies on: (object, attribute, what it holds)
        self.blocks: dict[Any, Site] = {}
        self.generates = "fibers" not in without  # functions that wait are generators
        self.orderly = ""  # why instances do not take turns at waits

    def entry(self, program: Any) -> Callable[..., Any]:
        """What to call in place of the program."""
        changed = any(getattr(o, a, None) is not held for o, a, held in self.holds) or self.watched.changed()
        if changed:
            self.blocks = {}
        if self.version != self.seen.version or changed:
            self.version, self.cells, self.holds = self.seen.version, {}, []
        found = function_of(program)
        if self.version != self.decided and found is not None:
            self.decided = self.version
            self.orderly = self.seen.keeps_order(found[0].__code__, bound=found[1] is not None) if self.seen.demands else ""
            # a generator cannot let an iterator's end pass through
            self.generates = self.generates and not any(_ENDS.intersection(c.co_names) for c in self.seen.demands)
        cut = found is not None and self.seen.ops and "blocks" not in self.without
        name = self._cut(*found, entry=True) if found is not None and cut else None
        if changed and isinstance(program, Captured):
            program.renew()
        size = len(self.holds), sum(len(s.modules) for s in self.blocks.values())
        if changed or size != self.size:
            held = (program, *(x for _, _, x in self.holds), *(m for s in self.blocks.values() for m in s.modules))
            modules = dict.fromkeys(m for x in held if isinstance(x, nn.Module) for m in x.modules())
            self.size, self.watched = size, Watched(list(modules))
        if found is None or name is None:
            return program
        function: Any = self.cells[found[0], id(found[1])][1].cell_contents
        bound = found[1]
        return function if bound is None else lambda *args: function(bound, *args)

    def waits(self, program: Any) -> bool:
        """Whether what `entry` gave is a generator."""
        found = function_of(program)
        cut = found is not None and (found[0], id(found[1])) in self.cells
        return self.takes_turns and cut and found is not None and found[0].__code__ in self.seen.demands

    @property
    def takes_turns(self) -> bool:
        """Whether functions that wait become generators."""
        return self.generates and not self.orderly

    def use_fibers(self) -> None:
        """Functions that wait are plain ones from now on: somebody waits where no generator can."""
        self.generates, self.version = False, -1

    def is_separate(self, program: Any) -> bool:
        """Whether the program is seen to change nothing that others see, so that an instance may run twice."""
        found = function_of(program)
        if isinstance(program, Captured):
            return True
        return found is not None and self.seen.is_separate(found[0].__code__, of_module=isinstance(found[1], nn.Module))

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

        cutter = Cutter(source, bound, self.seen, callee, name.strip("_"), self.without)
        tree = cutter.run(phases=entry and "phases" not in self.without)
        if self.takes_turns:
            own = function.__code__ in self.seen.demands
            tree = Yields(cutter.waiting, cutter.fresh, own=own).run(tree)
            used |= {n: types.CellType(x) for n, x in YIELDED.items()}
        used[PHASE] = types.CellType(begin_phase)
        used[FORK] = types.CellType(fork)
        used[DEEPER] = types.CellType(deeper)
        used |= {name: types.CellType(constant(func)) for name, func in cutter.constants.items()}
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


class Watched:
    """The plain data of modules, and what their parameters are like, by which blocks are traced."""

    PLAIN = (bool, int, float, str, type(None), tuple)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.data = [(vars(m), len(vars(m)), [(k, v) for k, v in vars(m).items() if type(v) in self.PLAIN]) for m in modules]
        self.parameters = [
            (m._parameters, [(k, p, p.dtype, p.device, p.requires_grad) for k, p in m._parameters.items() if p is not None])
            for m in modules
            if m._parameters
        ]

    def changed(self) -> bool:
        """Whether any of it is not what it was."""
        for now, count, before in self.data:
            if len(now) != count:
                return True
            for k, v in before:
                found = now.get(k, self)
                if found is not v and (type(found) is not type(v) or found != v):
                    return True
        for now, held in self.parameters:
            for k, p, dtype, device, grad in held:
                found = now.get(k)
                if found is not p:
                    if found is None:
                        return True
                    p = found
                if p.dtype is not dtype or p.device != device or p.requires_grad is not grad:
                    return True
        return False


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
