"""Sites: what cut code calls to run a block.

The first call with arguments of some kind goes through the recorder, which finds the block. From it a *quick* form is
written, Python text for these kinds: it compares kinds, appends a line, and makes the results.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from ...errors import DataDependentShape
from .blocks import Outcome
from .record import current, here
from .values import Pending, Type

# data that may decide what a block computes: a block is made for each value of it
PLAIN = (bool, int, float, complex, str, type(None), type(Ellipsis), slice, torch.dtype, torch.device, torch.Size, nn.Module,
         types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)  # fmt: skip
VERSIONS = 64  # values of plain data for which a place gets blocks of its own
LIFTED_AFTER = 4  # such values after which numbers become tensors, which all instances may have of their own
QUICK = 6  # kinds of arguments that the quick form tells apart


class Site:
    """One place of a program that runs a block. `why` says why it does not, where it runs op by op instead.

    `cell` is the variable through which cut code finds what to call: the site itself, or its quick form.
    """

    def __init__(self, fn: types.FunctionType, line: str) -> None:
        self.fn = fn
        self.line = line
        self.why = ""
        self.keys: set[Any] = set()
        self.lifts = True
        self.cell = types.CellType(self)
        self.versions: list[tuple[tuple[Any, ...], bool, Outcome]] = []

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

    def recorded(self, args: tuple[Any, ...], leaves: list[Any]) -> Any:
        """Record one line. Raises DataDependentShape."""
        key = tuple((type(x), x) for x in leaves if not isinstance(x, torch.Tensor))
        self.keys.add(key)
        recorder = current()
        alone = not any(isinstance(x, torch.Tensor) and not recorder.is_shared(x) for x in leaves)
        many = len(self.keys) > LIFTED_AFTER or alone  # with numbers alone, they are what differs between instances
        recorder.last = None
        if many and self.lifts and any(type(a) in (int, float) for a in args):
            try:
                made = recorder.apply(self.fn, tuple(recorder.number(a) if type(a) in (int, float) else a for a in args), {})
                self.quicken(args, recorder.last, lifted=True)
                return made
            except Exception:  # a number decides about shapes, or the program's own error: which, shows without lifting
                self.lifts = False
        if len(self.keys) > VERSIONS:
            self.why = "too many values of plain data"
            self.cell.cell_contents = self
        made = recorder.apply(self.fn, args, {})
        self.quicken(args, recorder.last, lifted=False)
        return made

    # -- the quick form -----------------------------------------------------------------------------------------------

    def quicken(self, args: tuple[Any, ...], outcome: Outcome | None, *, lifted: bool) -> None:
        """Add the kinds of these arguments to the quick form, where their block's results are simple."""
        if outcome is None or outcome.block is None or self.why or len(self.versions) == QUICK:
            return
        flat = all(a is None or isinstance(a, (torch.Tensor, *PLAIN)) for a in args)
        kinds = tuple(_kind(a, lifted) for a in args) if flat else ()
        simple = not (outcome.written or outcome.same) and all(tensor for tensor, _ in outcome.results)
        depth = outcome.spec.is_leaf() or (outcome.spec.type is tuple and all(c.is_leaf() for c in outcome.spec.children()))
        if not flat or None in kinds or not simple or not depth:
            return
        self.versions.append((kinds, torch.is_grad_enabled(), outcome))
        self.cell.cell_contents = self.written()

    def written(self) -> types.FunctionType:
        """The quick form, from text."""
        names = [f"a{i}" for i in range(self.fn.__code__.co_argcount)]
        scope: dict[str, Any] = {"here": here, "slow": self, "Pending": Pending, "new": Pending.__new__,
                                 "grad": torch.is_grad_enabled, "Tensor": torch.Tensor}  # fmt: skip
        lines = [f"def quick({', '.join(names)}):", "    try:", "        r = here.recorder", "        g = grad()"]
        for v, (kinds, grad, outcome) in enumerate(self.versions):
            lines += _version(v, kinds, grad, outcome, names, scope)
        lines += ["    except AttributeError:", "        pass", f"    return slow({', '.join(names)})"]
        exec("\n".join(lines), scope)
        return scope["quick"]


def _kind(a: Any, lifted: bool) -> Any:
    """What a quick form compares an argument with: (how, what); None for what it cannot tell quickly."""
    if type(a) is Pending:
        return "pending", a.type
    if isinstance(a, torch.Tensor):
        return ("same", a) if current().is_shared(a) else ("real", Type.of(a))
    if lifted and type(a) in (int, float):
        return "number", type(a)
    if isinstance(a, float):
        return None
    if isinstance(a, int | str | types.MethodType):
        return "equal", a
    return "same", a


def _version(
    v: int, kinds: tuple[Any, ...], grad: bool, outcome: Outcome, names: list[str], scope: dict[str, Any]
) -> list[str]:
    block = outcome.block
    assert block is not None
    tests = ["g" if grad else "not g"]
    before: list[str] = []
    given: list[str] = []
    for i, (name, (how, what)) in enumerate(zip(names, kinds, strict=True)):
        scope[f"k{v}_{i}"] = what
        match how:
            case "pending":
                tests.append(f"{name}.type is k{v}_{i}")
                given.append(name)
            case "real":
                tests.append(f"type({name}) is Tensor and (p{i} := r.lift_as({name}, k{v}_{i})) is not None")
                given.append(f"p{i}")
            case "number":
                tests.append(f"{name}.__class__ is k{v}_{i}")
                before.append(f"            p{i} = r.number({name})")
                given.append(f"p{i}")
            case "equal":
                scope[f"c{v}_{i}"] = type(what)
                tests.append(f"{name}.__class__ is c{v}_{i} and {name} == k{v}_{i}")
            case _:
                tests.append(f"{name} is k{v}_{i}")
    scope[f"b{v}"] = block
    lines = [f"        if {' and '.join(tests)}:", *before, f"            w = r.writers.get(b{v}) or r.writer(b{v})",
             "            d = r.floor"]  # fmt: skip
    for name in given:
        lines += [f"            w[0]({name}.id)", f"            if {name}.depth > d: d = {name}.depth"]
    lines += ["            d += 1", "            n = r.next_id", f"            r.next_id = n + {len(block.outputs)}",
              "            w[1](d); w[2](n)"]  # fmt: skip
    for k, t in enumerate(block.outputs):
        scope[f"t{v}_{k}"] = t
        lines.append(
            f"            x{k} = new(Pending); x{k}.recorder = r; x{k}.type = t{v}_{k}; x{k}.id = n + {k}; x{k}.depth = d; "
            f"x{k}.view_of = None; x{k}.viewed = False"
        )
    lines += [f"            x{at}.view_of = {given[base]}; {given[base]}.viewed = True" for at, base in _bases(outcome)]
    results = [f"x{at}" for _, at in outcome.results]
    lines.append(f"            return {results[0] if outcome.spec.is_leaf() else '(' + ', '.join(results) + ',)'}")
    return lines


def _bases(outcome: Outcome) -> list[tuple[int, int]]:
    """(result of the block, argument of the block) that share memory in eager."""
    return [(outcome.results[k][1], outcome.places.index(at)) for k, at in outcome.views.items()]
