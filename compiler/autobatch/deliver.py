"""Handing results over: real tensors in place of pending ones, tied to the parameters where gradients are wanted."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .execute import Execution
from .native import record
from .values import Pending

_PLAIN = (torch.Tensor, nn.Module, str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device,
          types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)  # fmt: skip


class _Joined(torch.autograd.Function):
    """Ties the results of a batch to its parameters."""

    @staticmethod
    def forward(ctx: Any, execution: Execution, values: list[Pending], *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.execution, ctx.values = execution, values
        ctx.save_for_backward(*sources)  # so that torch notices where one is written to before the backward
        ctx.set_materialize_grads(False)
        return tuple(execution.value(v).clone() for v in values)  # parts of one tensor could not be written to

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors  # raises for what was written to: the backward reads it as it is now
        return (None, None, *ctx.execution.backward(ctx.values, grads))


def deliver(execution: Execution, results: list[Any]) -> list[Any]:
    """The results with real tensors in place of pending ones, the same for the same. Pending tensors in attributes of the
    program's own objects are replaced where they are."""
    plain = record.pending_in(results, Pending)
    if plain is not None:
        made = _real(execution, plain)
        return record.rebuilt(results, Pending, [made[x.id] for x in plain])
    leaves, spec = tree_flatten(results)
    inside = list(_attributes(leaves))
    everything = [*leaves, *(x for *_, found, _ in inside for x in found)]
    found = _real(execution, [x for x in everything if type(x) is Pending])

    def replaced(some: list[Any]) -> list[Any]:
        return [found[x.id] if type(x) is Pending else x for x in some]

    for owner, name, held, form in inside:
        object.__setattr__(owner, name, tree_unflatten(replaced(held), form))
    return tree_unflatten(replaced(leaves), spec)


def _real(execution: Execution, pending: list[Pending]) -> dict[int, torch.Tensor]:
    """The real tensors of pending ones, by their ids."""
    values = list({x.id: x for x in pending}.values())
    sources = execution.sources()
    if sources and values:
        with torch.enable_grad():  # the program may have recorded gradients where its caller does not
            real = _Joined.apply(execution, values, *sources)
    else:
        real = execution.values(values)
    return {v.id: t for v, t in zip(values, real, strict=True)}


def _attributes(leaves: list[Any]) -> Iterator[tuple[Any, str, list[Any], TreeSpec]]:
    """(object, attribute, what it holds as leaves, their structure) of all pending tensors in objects that results reach."""
    todo, seen = list(leaves), set[int]()
    while todo:
        owner = todo.pop()
        if type(owner) is Pending or isinstance(owner, _PLAIN) or id(owner) in seen:
            continue
        seen.add(id(owner))
        names = list(vars(owner)) if hasattr(owner, "__dict__") else []
        names += [n for c in type(owner).__mro__ for n in getattr(c, "__slots__", ()) if hasattr(owner, n)]
        for name in names:
            held, form = tree_flatten(getattr(owner, name))
            if any(type(x) is Pending for x in held):
                yield owner, name, held, form
            todo += held
