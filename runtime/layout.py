"""Where the values of a plan live and how long: dense indices, roots and byte offsets, last uses, slots of sizes.

A value's *root* is the value that owns its memory: itself, or what a chain of views ends in. Native steps address a value
as (base of its root, byte offset); all arena values share base 0.
"""

from __future__ import annotations

import torch

from ..errors import UnsafePlan
from . import sizes
from .calls import call_templates, template_parts, torch_name
from .pending import starts
from .plan import Call, Launch, Plan, SizeExpr, ValueSpec


def step_values(step: Launch | Call) -> list[int]:
    """The ids of all values that a step touches."""
    if isinstance(step, Launch):
        return list(step.buffers)
    return [*argument_values(step), *(v for v in step.outs if v is not None)]


def argument_values(step: Call) -> list[int]:
    """The ids of the values that a `Call` gets as arguments."""
    return list(template_parts(call_templates(step), "v"))


class Layout:
    """The analysis of one plan that its executor is built from.

    Positions: `index[id]` is a value's place in a call's list of values; the plan's inputs come first, in order, so an
    input's position is its argument number.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.specs: dict[int, ValueSpec] = {v.id: v for v in plan.values}
        self.index: dict[int, int] = {}
        later = len(plan.inputs)
        for v in plan.values:
            if v.storage == "input":
                self.index[v.id] = self._input(v)
            else:
                self.index[v.id] = later
                later += 1
        self.count = later
        self.stages = self._stages()
        self.slots = sizes.Slots(self.stages)
        for name, expr in plan.sizes:
            self.slots.define(name, self.slot(expr))
            self.stages[name] = max((self.stages[s] for s in sizes.symbols(expr)), default=0)
        self._places: dict[int, tuple[int, SizeExpr]] = {}
        self.last_use = self._last_uses()

    def _input(self, v: ValueSpec) -> int:
        if not isinstance(v.ref, int) or not 0 <= v.ref < len(self.plan.inputs):
            raise UnsafePlan(why=f"value {v.id} is input {v.ref}, which does not exist")
        return v.ref

    def _stages(self) -> dict[str, int]:
        """Symbol -> 0 when inputs bind it, else 1 + the index of the step that does. Named sizes are added later."""
        stages = {s.name: 0 for s in self.plan.symbols if s.input >= 0}
        for number, step in enumerate(self.plan.steps):
            for out in step.outs if isinstance(step, Call) else ():
                if out is not None and self.specs[out].storage == "scalar" and self.specs[out].ref is not None:
                    stages[str(self.specs[out].ref)] = number + 1
        return stages

    def dtype(self, id: int) -> torch.dtype:
        """The torch dtype of a value."""
        return torch_name(self.specs[id].dtype, torch.dtype)

    def place(self, id: int) -> tuple[int, SizeExpr]:
        """(id of the root, byte offset from the root's first byte; for arena values from the arena's start)."""
        if id not in self._places:
            self._places[id] = self._find_place(id, 0)
        return self._places[id]

    def _find_place(self, id: int, depth: int) -> tuple[int, SizeExpr]:
        spec = self.specs.get(id)
        if spec is None or depth > len(self.specs):
            raise UnsafePlan(why=f"value {id} does not exist" if spec is None else f"value {id} is a view of itself")
        if spec.storage == "arena":
            return id, spec.offset
        if spec.storage != "view":
            return id, 0
        if not isinstance(spec.ref, int):
            raise UnsafePlan(why=f"view {id} is of {spec.ref!r}, which is not a value")
        root, offset = self._find_place(spec.ref, depth + 1)
        return root, sizes.fold(["add", offset, ["mul", spec.offset, self.dtype(id).itemsize]])

    def slot(self, expr: SizeExpr) -> int:
        """The slot of a size expression."""
        try:
            return self.slots.slot(expr)
        except KeyError as unknown:
            raise UnsafePlan(why=f"no input and no step binds the symbol {unknown.args[0]!r}") from None

    def static(self, exprs: tuple[SizeExpr, ...]) -> tuple[int, ...] | None:
        """The values of expressions without symbols, None when one has any."""
        found = [self.slots.constant(self.slot(e)) for e in exprs]
        return None if None in found else tuple(found)  # type: ignore[arg-type]

    def _last_uses(self) -> dict[int, int]:
        """Value id -> the last step that needs it, by itself or through a view; a collective needs what it was given until
        it is waited for. Outputs and mutated inputs live on."""
        last: dict[int, int] = {}
        end = len(self.plan.steps)
        for number, step in enumerate(self.plan.steps):
            for id in step_values(step):
                last[id] = last[self.place(id)[0]] = number
        for start in starts(self.plan.steps):
            for id in start.operands:
                for held in (id, self.place(id)[0]):
                    last[held] = max(last[held], end if start.wait is None else start.wait)
        for out in self.plan.outputs:
            if out.kind == "value" and out.ref is not None:
                last[out.ref] = last[self.place(out.ref)[0]] = end
        return last
