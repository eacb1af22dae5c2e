"""`Call` steps: resolving torch ops by name and turning argument templates into argument lists."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..errors import DamagedArtifact, KernelMissing, OpNotAvailable
from ..formats import ops as quantized_ops  # noqa: F401  registers the ops on quantized weights
from . import exchange, moe, ops  # noqa: F401  registers the ops of plait that plans call
from .plan import Call
from .scalars import SCALAR_OPS
from .sizes import Slots

Values = list[Any]
Getter = Callable[[Values, "array[int]"], Any]


def resolve_op(name: str) -> Callable[..., Any]:
    """The torch op called `namespace.name.overload`, or the scalar function `py.name`. Raises OpNotAvailable."""
    if name in SCALAR_OPS:
        return SCALAR_OPS[name]
    parts = name.split(".")
    found: Any = torch.ops
    if len(parts) == 3:
        try:
            for part in parts:
                found = getattr(found, part)
        except (AttributeError, RuntimeError):
            found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise OpNotAvailable(op=name, torch=torch.__version__)
    return found


def torch_name(name: str, kind: type) -> Any:
    """The dtype, layout or memory format that torch calls `name`."""
    found = getattr(torch, name, None)
    if not isinstance(found, kind):
        raise DamagedArtifact(part="plan", why=f"{name!r} is not a {kind.__name__}")
    return found


def template_parts(templates: Any, kind: str) -> Iterator[Any]:
    """What the templates of one kind hold: expressions for "e", regions' names for "g", …"""
    for template in templates:
        ((found, x),) = template.items()
        if found == kind:
            yield x
        elif found == "l":
            yield from template_parts(x, kind)


def call_templates(step: Call) -> list[Any]:
    """All argument templates of a step."""
    return [*step.args, *(template for _, template in step.kwargs)]


def schema_arguments(op: Callable[..., Any], step: Call) -> Iterator[tuple[Any, Any]]:
    """(argument of the schema, template given for it); nothing for what is no torch op."""
    if not isinstance(op, torch._ops.OpOverload):
        return
    named = dict(step.kwargs)
    for position, argument in enumerate(op._schema.arguments):
        if position < len(step.args):
            yield argument, step.args[position]
        elif argument.name in named:
            yield argument, named[argument.name]


def _schema_values(op: Callable[..., Any], step: Call) -> Iterator[tuple[Any, list[int]]]:
    """(argument of the schema, ids of the values given for it)."""
    for argument, template in schema_arguments(op, step):
        yield argument, list(template_parts([template], "v"))


def written_arguments(op: Callable[..., Any], step: Call) -> set[int]:
    """The ids of the arguments that the op writes, in place or as `out`."""
    return {i for a, ids in _schema_values(op, step) if a.alias_info and a.alias_info.is_write for i in ids}


def out_arguments(op: Callable[..., Any], step: Call) -> set[int]:
    """The ids of the arguments that the op writes without reading them."""
    return {i for a, ids in _schema_values(op, step) if a.is_out for i in ids}


def aliased_arguments(op: Callable[..., Any], step: Call) -> set[int]:
    """The ids of the arguments whose memory a result may share."""
    if not isinstance(op, torch._ops.OpOverload) or not any(r.alias_info for r in op._schema.returns):
        return set()
    return {i for a, ids in _schema_values(op, step) if a.alias_info for i in ids}


class Arguments:
    """Argument templates of one plan, compiled: constants are made once, the rest is filled in per call."""

    def __init__(self, index: Mapping[int, int], slots: Slots, regions: Mapping[str, Any]) -> None:
        self._index = index
        self._slots = slots
        self._regions = regions

    def compile(self, templates: list[Any]) -> Callable[[Values, array[int]], list[Any]]:
        """A function from the call's values and slots to the list of arguments."""
        blank: list[Any] = []
        values: list[tuple[int, int]] = []
        others: list[tuple[int, Getter]] = []
        for position, template in enumerate(templates):
            constant, made = self._one(template)
            blank.append(made if constant else None)
            if not constant and "v" in template:
                values.append((position, self._index[template["v"]]))
            elif not constant:
                others.append((position, made))

        def build(vals: Values, slots: array[int]) -> list[Any]:
            args = blank.copy()
            for position, i in values:
                args[position] = vals[i]
            for position, getter in others:
                args[position] = getter(vals, slots)
            return args

        return build

    def _one(self, template: Any) -> tuple[bool, Any]:
        """(True, constant) or (False, getter) of one template."""
        ((kind, x),) = template.items()
        if kind == "v":
            i = self._index[x]
            return False, lambda vals, slots: vals[i]
        if kind == "e":
            slot = self._slots.slot(x)
            constant = self._slots.constant(slot)
            return (False, lambda vals, slots: slots[slot]) if constant is None else (True, constant)
        if kind == "l":
            parts = [self._one(part) for part in x]
            if all(constant for constant, _ in parts):
                return True, [made for _, made in parts]
            build = self.compile(x)
            return False, build
        if kind == "g":
            if x not in self._regions:
                raise KernelMissing(kind="region", name=x)
            return True, self._regions[x]
        return True, _constant(kind, x)


def _constant(kind: str, x: Any) -> Any:
    if kind == "d":
        return torch_name(x, torch.dtype)
    if kind == "dev":
        return torch.device(x)
    if kind == "lay":
        return torch_name(x, torch.layout)
    if kind == "mf":
        return torch_name(x, torch.memory_format)
    return x
