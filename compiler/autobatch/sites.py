"""Sites: what cut code calls to run a block.

The first call with arguments of some kind goes through the recorder, which finds the block. Then a *quick* call takes its
place (`record.cpp`): it compares kinds, appends a line, and makes the results.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ...errors import DataDependentShape
from .blocks import Outcome
from .native import record
from .record import current
from .values import Pending, Type

# data that may decide what a block computes: a block is made for each value of it
PLAIN = (bool, int, float, complex, str, type(None), type(Ellipsis), slice, torch.dtype, torch.device, torch.Size, nn.Module,
         types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)  # fmt: skip
VERSIONS = 64  # values of plain data for which a place gets blocks of its own
LIFTED_AFTER = 4  # such values after which numbers become tensors, which all instances may have of their own
QUICK = 6  # kinds of arguments that quick calls tell apart


class Site:
    """One place of a program that runs a block. `why` says why it does not, where it runs op by op instead.

    `cell` is the variable through which cut code finds what to call: the site itself, or its quick call.
    """

    def __init__(self, fn: types.FunctionType, line: str) -> None:
        self.fn = fn
        self.line = line
        self.why = ""
        self.keys: set[Any] = set()
        self.modules: set[nn.Module] = set()  # that were arguments
        self.lifts = True  # numbers may become tensors
        self.lifting = False  # and have
        self.cell = types.CellType(self)
        self.quick: Any = None
        self.count = 0  # of the kinds of arguments that quick calls know

    def __call__(self, *args: Any) -> Any:
        if not self.why:
            with torch._C.DisableTorchFunction():
                leaves = tree_flatten(args)[0]
                strange = next((x for x in leaves if not isinstance(x, torch.Tensor) and not isinstance(x, PLAIN)), None)
                if strange is None:
                    try:
                        return self.recorded(args, leaves)
                    except DataDependentShape:
                        self.why = "it asks for values"
                else:
                    self.why = f"it reads a {type(strange).__name__}"
        return self.fn(*args)

    def forget(self) -> None:
        """Let calls find their blocks anew."""
        self.quick, self.count, self.cell.cell_contents = None, 0, self

    def recorded(self, args: tuple[Any, ...], leaves: list[Any]) -> Any:
        """Record one line. Raises DataDependentShape."""
        key = tuple((type(x), x) for x in leaves if not isinstance(x, torch.Tensor))
        self.keys.add(key)
        self.modules.update(x for x in leaves if isinstance(x, nn.Module))
        recorder = current()
        alone = not any(isinstance(x, torch.Tensor) and not recorder.is_shared(x) for x in leaves)
        many = len(self.keys) > LIFTED_AFTER or alone  # with numbers alone, they are what differs between instances
        recorder.last = None
        wide = any(type(a) is float for a in args) and _is_wide(leaves)  # lifted numbers are float32
        if many and self.lifts and not wide and any(type(a) in (int, float) for a in args):
            try:
                given = tuple(recorder.number(a) if type(a) in (int, float) else a for a in args)
                made = recorder.apply(self.fn, given, {}, self.line)
                if not self.lifting:  # blocks for single numbers would split what can be one launch
                    self.lifting, self.quick, self.count = True, None, 0
                self.quicken(args, recorder.last, lifted=True)
                return made
            except Exception:  # a number decides about shapes, or the program's own error: which, shows without lifting
                self.lifts = False
        if len(self.keys) > VERSIONS:
            self.why = "too many values of plain data"
            self.cell.cell_contents = self
        made = recorder.apply(self.fn, args, {}, self.line)
        self.quicken(args, recorder.last, lifted=False)
        return made

    def quicken(self, args: tuple[Any, ...], outcome: Outcome | None, *, lifted: bool) -> None:
        """Let quick calls take arguments of these kinds, where their block's results are simple."""
        if outcome is None or outcome.block is None or self.why or self.count == QUICK or record.Quick is None:
            return
        flat = all(a is None or isinstance(a, (torch.Tensor, *PLAIN)) for a in args)
        kinds = tuple(_kind(a, lifted) for a in args) if flat else ()
        simple = not (outcome.written or outcome.same) and all(tensor for tensor, _ in outcome.results)
        depth = outcome.spec.is_leaf() or (outcome.spec.type is tuple and all(c.is_leaf() for c in outcome.spec.children()))
        if not flat or None in kinds or not simple or not depth:
            return
        self.count += 1
        if self.quick is None:
            self.quick = record.Quick(self, Pending, torch.Tensor)
        views = tuple((outcome.results[k][1], at) for k, at in outcome.views.items())
        order = tuple(at for _, at in outcome.results)
        single = outcome.spec.is_leaf()
        block = outcome.block
        before = outcome.before
        hoisted = before and (before.block.number, len(before.block.outputs), before.places, before.kept)
        self.quick.add(torch.is_grad_enabled(), block.number, kinds, block.outputs, views, order, single, hoisted)
        self.cell.cell_contents = self.quick


def _is_wide(leaves: list[Any]) -> bool:
    """Whether there is a tensor of double precision among arguments or in their modules."""
    dtypes = {x.dtype for x in leaves if isinstance(x, torch.Tensor)}
    dtypes |= {p.dtype for m in leaves if isinstance(m, nn.Module) for p in (*m.parameters(), *m.buffers())}
    return not dtypes.isdisjoint((torch.float64, torch.complex128)) or torch.get_default_dtype() is torch.float64


PENDING, SAME, EQUAL, NUMBER, REAL = range(5)  # as `How` of record.cpp


def _kind(a: Any, lifted: bool) -> tuple[int, Any] | None:
    """What a quick call compares an argument with: (how, what); None for what it cannot tell quickly."""
    if type(a) is Pending:
        return PENDING, a.type
    if isinstance(a, torch.Tensor):
        return (SAME, a) if current().is_shared(a) else (REAL, Type.of(a))
    if lifted and type(a) in (int, float):
        return NUMBER, type(a)
    if isinstance(a, float):
        return None
    return (EQUAL, a) if isinstance(a, int | str | types.MethodType) else (SAME, a)
