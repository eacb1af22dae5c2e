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
from .plan import Call, Launch, Plan


class NotDirect(Exception):
    """Why a plan needs Python to run."""


@dataclass(frozen=True)
class Direct:
    """Programs for `plait_run` (at `run`), and what a caller fills in before it runs them.

    `sizes` computes sizes and checks guards, 0 where there is nothing to do; `program` launches. `slots` are initial; of
    `symbols` (slot, input, dimension) the caller sets the slots. Slot `arena` then holds the bytes that base 0 must have,
    aligned to 64. `bases` are initial addresses, those of constants set; `inputs` and `outputs` are the bases of the plan's
    inputs (-1: no kernel reads it) and results, which are contiguous. `constants` are names and bases. `checks` are (base,
    slot of the offset) of int64 words that the caller clears before; one that is set afterwards means a row id out of range.
    `keep` owns what the addresses point to.
    """

    run: int
    sizes: int
    program: int
    slots: tuple[int, ...]
    symbols: tuple[tuple[int, int, int], ...]
    arena: int
    bases: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
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
        symbols=tuple((layout.slot(s.name), s.input, s.dim) for s in plan.symbols if s.dim is not None),
        arena=arena,
        bases=tuple(bases),
        inputs=tuple(by_input.get(k, -1) for k in range(len(plan.inputs))),
        outputs=tuple(memory.bases[o.ref] for o in plan.outputs if o.ref is not None),
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
    if memory.mutated or any(s.dim is None or s.input < 0 for s in plan.symbols):
        raise NotDirect("it writes to inputs, or takes sizes as arguments")
    results = [o.ref for o in plan.outputs]
    if len(set(results)) < len(results):
        raise NotDirect("a result is given twice")
    for id in results:
        spec = memory.value(id) if id is not None else None
        if spec is None or spec.storage != "fresh" or spec.id not in memory.bases:
            raise NotDirect("a result is not memory of its own")
        expected = 1
        for size, stride in zip(reversed(spec.shape), reversed(spec.strides), strict=True):
            if stride != expected and size != 1:
                raise NotDirect("a result is not contiguous")
            expected = expected * size if isinstance(size, int) else -1  # only the first size may be a symbol
    inner = {v.id for v in plan.values if v.storage in ("fresh", "handle", "scalar")}
    if not inner <= set(results):
        raise NotDirect("it allocates more than its results")
