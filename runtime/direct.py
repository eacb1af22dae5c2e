"""Plans as data for callers that are native code themselves: what `Executable` does on the CPU, without Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import KernelMissing
from . import native
from .layout import Layout
from .memory import Memory
from .ops import CHECK_ROWS, CLEAR_STATUS
from .plan import Call, Launch, OutputSpec, Plan, SizeExpr


class NotDirect(Exception):
    """Why a plan needs Python to run."""


@dataclass(frozen=True)
class Result:
    """One result of a plan: `kind` "memory" (base `at`, as many bytes as slot `bytes` says), "input" (input number `at`),
    "size", or "none". A result may be another view of such memory, from its first byte on; `contiguous` says whether its
    elements lie there one after the other. Several results may be the same memory."""

    kind: str
    at: int = -1
    bytes: int = -1
    contiguous: bool = True


@dataclass(frozen=True)
class Direct:
    """Programs for `plait_run` (at `run`), and what a caller fills in before it runs them.

    `sizes` computes sizes and checks guards, 0 where there is nothing to do; `program` launches. `slots` are initial; of
    `symbols` (slot, input, dimension) the caller sets the slots. Slot `arena` then holds the bytes that base 0 must have,
    aligned to 64. `bases` are initial addresses, those of constants set; `inputs` are the bases of the plan's
    inputs (-1: no kernel reads it). `constants` are names and bases. `checks` are (base,
    slot of the offset) of int64 words that the caller clears before; one that is set afterwards means a row id out of range.
    `keep` owns what the addresses point to.
    """

    run: int
    sizes: int
    program: int
    slots: tuple[int, ...]
    symbols: tuple[tuple[int, int, int | None], ...]
    arena: int
    bases: tuple[int, ...]
    inputs: tuple[int, ...]
    results: tuple[Result, ...]
    constants: tuple[tuple[str, int], ...]
    checks: tuple[tuple[int, int], ...]
    keep: tuple[Any, ...]


def direct(plan: Plan, kernels: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> Direct:
    """The plan as data. Raises NotDirect for one with torch ops, kernels that are no native functions, or results that are
    not memory of their own."""
    import ctypes

    layout = Layout(plan)
    memory = Memory(layout)
    launches = [s for s in plan.steps if isinstance(s, Launch)]
    checks = _checks(plan)
    _check(plan, len(launches) + 2 * len(checks), kernels, memory)
    program = native.Program()
    for step in launches:
        program.launch(kernels[step.kernel], memory.buffers(step), [layout.slot(e) for e in step.sizes])
    words = []
    for id in checks:
        root, offset = layout.place(id)
        words.append((memory.bases.get(root, 0), layout.slot(offset)))
    arena = layout.slot(plan.arena)
    results = tuple(_result(o, layout, memory) for o in plan.outputs)
    guards = [(layout.slot(e), index) for index, (e, _) in enumerate(plan.asserts)]
    sizes = native.Program()
    sizes.evaluate(layout.slots.programs.get(0, []))
    for guard in guards:
        sizes.guard(*guard)
    bases = [0] * memory.base_count
    held, placed = [], []
    for spec in plan.values:
        if spec.storage == "constant" and spec.id in memory.bases:
            if spec.ref not in constants:
                raise KernelMissing(kind="constant", name=spec.ref)
            held.append(constants[str(spec.ref)].detach())
            bases[memory.bases[spec.id]] = held[-1].data_ptr()
            placed.append((str(spec.ref), memory.bases[spec.id]))
    by_input = {v.ref: memory.bases.get(v.id, -1) for v in plan.values if v.storage == "input"}
    runner = native.default_runner()
    return Direct(
        run=ctypes.cast(runner.run, ctypes.c_void_p).value or 0,
        sizes=sizes.seal() if layout.slots.programs.get(0) or guards else 0,
        program=program.seal(),
        slots=tuple(layout.slots.initial),
        symbols=tuple((layout.slot(s.name), s.input, s.dim) for s in plan.symbols),
        arena=arena,
        bases=tuple(bases),
        inputs=tuple(by_input.get(k, -1) for k in range(len(plan.inputs))),
        results=results,
        constants=tuple(placed),
        checks=tuple(words),
        keep=(runner, program, sizes, held, kernels),
    )


def _checks(plan: Plan) -> list[int]:
    """The status words that are cleared before, and checked after, all launches that use them."""
    cleared = [dict(s.kwargs)["status"]["v"] for s in plan.steps if isinstance(s, Call) and s.op == CLEAR_STATUS]  # type: ignore[index]
    checked = [s.args[0]["v"] for s in plan.steps if isinstance(s, Call) and s.op == CHECK_ROWS]
    return cleared if sorted(cleared) == sorted(checked) and len(set(cleared)) == len(cleared) else []


def _check(plan: Plan, simple: int, kernels: Mapping[str, Any], memory: Memory) -> None:
    if simple < len(plan.steps) or plan.regions:
        raise NotDirect("it calls torch ops")
    if not all(isinstance(kernels[s.kernel], int) for s in plan.steps if isinstance(s, Launch)):
        raise NotDirect("its kernels do not run on the CPU")
    if memory.mutated or any(s.input < 0 for s in plan.symbols):
        raise NotDirect("it writes to inputs, or finds sizes while it runs")
    results = {memory.layout.place(o.ref)[0] for o in plan.outputs if o.kind == "value" and o.ref is not None}
    inner = {v.id for v in plan.values if v.storage in ("fresh", "handle", "scalar")}
    if not inner <= results:
        raise NotDirect("it allocates more than its results")


def _result(out: OutputSpec, layout: Layout, memory: Memory) -> Result:
    if out.kind != "value":
        if out.kind == "constant":
            raise NotDirect("a result is a number")
        return Result(out.kind)
    spec = memory.value(out.ref)
    id, offset = layout.place(spec.id)
    root = memory.value(id)
    if root.storage not in ("input", "fresh") or layout.slots.constant(layout.slot(offset)) != 0:
        raise NotDirect("a result is not memory of its own")
    expected: SizeExpr = 1
    contiguous = True
    for size, stride in zip(reversed(spec.shape), reversed(spec.strides), strict=True):
        contiguous = contiguous and (stride == expected or size == 1)
        expected = expected * size if isinstance(size, int) and isinstance(expected, int) else -1  # the first alone may vary
    if root.storage == "input":
        return Result("input", int(root.ref), -1, contiguous)  # type: ignore[arg-type]
    if id not in memory.bases:
        raise NotDirect("no kernel writes a result")
    bytes = ["mul", layout.dtype(id).itemsize, 1, *root.shape]
    return Result("memory", memory.bases[id], layout.slot(bytes), contiguous)
