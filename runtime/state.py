"""State of a plan: buffers that it writes and whoever runs it owns, and which inputs of callers it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import SharedMemory
from .calls import resolve_op, written_arguments
from .layout import Layout
from .plan import Call, Launch, Plan, ValueSpec
from .regions import REGION_OPS


def hold(plan: Plan, state: Mapping[str, torch.Tensor]) -> Plan:
    """The plan with its first inputs as constants of these names, in order: state that a plan takes as inputs under the
    compiler is held by who loads it.

    before: inputs (b_count, x), a value that is input 0
    after:  inputs (x,), a value that is constant "count"
    """
    names, count = list(state), len(state)

    def value(v: ValueSpec) -> ValueSpec:
        if v.storage != "input" or not isinstance(v.ref, int):
            return v
        if v.ref >= count:
            return replace(v, ref=v.ref - count)
        return replace(v, storage="constant", ref=names[v.ref], strides=state[names[v.ref]].stride())

    symbols = tuple(replace(s, input=s.input - count) if s.input >= 0 else s for s in plan.symbols)
    return replace(plan, inputs=plan.inputs[count:], values=tuple(map(value, plan.values)), symbols=symbols)


def _written(layout: Layout) -> Iterator[ValueSpec]:
    """The values that own the memory which the steps write."""
    access = {k.name: k.access for k in layout.plan.kernels}
    for step in layout.plan.steps:
        if isinstance(step, Launch):
            ids = [b for b, mode in zip(step.buffers, access[step.kernel], strict=True) if mode != "read"]
        else:
            ids = [*_written_by(step), *(o for o in step.outs if o is not None)]
        yield from (layout.specs[layout.place(id)[0]] for id in ids)


def _written_by(step: Call) -> set[int]:
    return set() if step.op in REGION_OPS else written_arguments(resolve_op(step.op), step)


def written_inputs(plan: Plan) -> list[int]:
    """Positions of the inputs that a call writes, ascending. The plan must have passed `check`."""
    return sorted({int(v.ref) for v in _written(Layout(plan)) if v.storage == "input"})  # type: ignore[arg-type]


def written_constants(plan: Plan) -> list[str]:
    """Names of the constants that a call writes, sorted: the plan's state. The plan must have passed `check`."""
    return sorted({str(v.ref) for v in _written(Layout(plan)) if v.storage == "constant"})


def private(tensor: torch.Tensor) -> torch.Tensor:
    """A writable copy with memory of its own and the same strides, which code in and out of inference_mode may write."""
    with torch.inference_mode(False):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class SharingCheck:
    """Raises SharedMemory for an input that shares memory with another one which the call writes, or with the state.

    A plan reads its inputs and writes them back last. Eager would see the write through the other tensor at once.
    """

    def __init__(self, plan: Plan, constants: Mapping[str, torch.Tensor]) -> None:
        self._names = [spec.name for spec in plan.inputs]
        self._tensors = [i for i, spec in enumerate(plan.inputs) if spec.kind == "tensor"]
        self._written = written_inputs(plan)
        self._state = [(name, constants[name]) for name in written_constants(plan)]
        self.needed = bool(self._state and self._tensors) or bool(self._written and len(self._tensors) > 1)

    def __call__(self, args: Sequence[Any]) -> None:
        owners: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, t in self._state:
            owners.setdefault(t.untyped_storage().data_ptr(), []).append((name, t))
        for i in self._written:
            owners.setdefault(args[i].untyped_storage().data_ptr(), []).append((self._names[i], args[i]))
        for i in self._tensors:
            for name, owner in owners.get(args[i].untyped_storage().data_ptr(), ()):
                if owner is args[i] and name == self._names[i]:
                    continue
                if overlap(owner, args[i]):
                    raise SharedMemory(name=self._names[i], other=name)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage share bytes."""
    if not a.numel() or not b.numel():
        return False
    (first_a, end_a), (first_b, end_b) = map(_span, (a, b))
    if first_a >= end_b or first_b >= end_a:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    start = min(first_a, first_b)  # interleaved, such as columns of one matrix: mark the bytes of one, look for the other's
    bytes_of_a = torch.zeros(max(end_a, end_b) - start, dtype=torch.bool)
    _bytes(bytes_of_a, a, first_a - start).fill_(True)
    return bool(_bytes(bytes_of_a, b, first_b - start).any())


def _bytes(memory: torch.Tensor, t: torch.Tensor, start: int) -> torch.Tensor:
    """The elements of `memory`, one for each byte, that stand for the bytes of a tensor which begins at `start`."""
    return memory.as_strided((*t.shape, t.itemsize), (*(s * t.itemsize for s in t.stride()), 1), start)


def _span(t: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize
