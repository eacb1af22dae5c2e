"""Turns the steps of a plan into closures `step(vals, frame)`: native segments, kernel launches and calls of torch ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import GuardFailed, KernelMissing, UnsafePlan, WrongOpResult
from . import native, sizes
from .calls import Arguments, Values, resolve_op, written_arguments
from .dispatch import WAIT, Collectives, is_collective
from .layout import Layout, argument_values
from .memory import Maker, Memory, Step, describe
from .plan import Call, Launch, OutputSpec
from .regions import REGION_OPS
from .streams import Streams


class Builder:
    """Builds what an `Executable` runs: `steps` (with the plan's step numbers of each), `results`, `enter`."""

    def __init__(
        self,
        layout: Layout,
        kernels: Mapping[str, Any],
        regions: Mapping[str, Any],
        runner: native.Runner | None,
    ) -> None:
        self._layout = layout
        self._plan = layout.plan
        self._kernels = kernels
        self.memory = Memory(layout)
        self._arguments = Arguments(layout.index, layout.slots, regions)
        self._messages = [message for _, message in self._plan.asserts]
        self._hooks: dict[int, list[Callable[[Any], None]]] = {}
        in_segments = any(self._address(s) is not None for s in self._plan.steps)
        self.collectives = Collectives(self._plan)
        self._runner = (runner or native.default_runner()) if in_segments else None
        cuda = sorted({v.device for v in self._plan.values if v.device.startswith("cuda")})
        self.streams = Streams(self._plan, torch.device(cuda[0])) if cuda else None
        self.uses_torch = any(isinstance(s, Call) for s in self._plan.steps)
        self.numbers: list[range] = []
        self.steps = self._build_steps()
        self.results = self._results()
        needed = max((layout.stages[name] for name in sizes.symbols(self._plan.arena)), default=0)
        if needed:
            raise UnsafePlan(why=f"the arena needs a size that step {needed - 1} gives")
        self.arena_slot = layout.slot(self._plan.arena)
        guards = self._guards()
        for stage, hooks in self._hooks.items():
            hooks.extend(filter(None, [self._stage_program(stage, guards)]))
        self.enter = self._stage_program(0, guards)

    def _kernel(self, step: Launch) -> Any:
        if step.kernel not in self._kernels:
            raise KernelMissing(kind="kernel", name=step.kernel)
        return self._kernels[step.kernel]

    def _address(self, step: Launch | Call) -> int | None:
        """The address of a kernel that the native runner calls; None: Python launches or calls it."""
        kernel = self._kernel(step) if isinstance(step, Launch) else None
        return kernel if isinstance(kernel, int) else None

    def _build_steps(self) -> list[Step]:
        made: list[Step] = []
        plan, number = self._plan.steps, 0
        while number < len(plan):
            first, step = number, plan[number]
            number += 1
            if isinstance(step, Call):
                made.append(self._call(first, step))
            elif self._address(step) is None:
                made.append(self._launch(first, step))
            else:
                while number < len(plan) and self._address(plan[number]) is not None:
                    number += 1
                made.append(self._segment(range(first, number)))
            self.numbers.append(range(first, number))
        returned = [o.ref for o in self._plan.outputs if o.kind == "value" and o.ref is not None]
        # what is fresh and unwritten now has no elements, or else check.py refuses the plan
        prepare = self.memory.prepare([id for id in returned if self.memory.value(id).storage in ("view", "fresh")])
        if prepare:
            made.append(prepare)
            self.numbers.append(range(len(plan), len(plan)))
        return made

    def _dead(self, steps: range) -> list[int]:
        return [] if self.streams else self.memory.deaths(steps)  # side streams may still use them

    def _segment(self, numbers: range) -> Step:
        """Consecutive launches as one native call."""
        program = native.Program()
        touched: list[int] = []
        for step in (s for s in self._plan.steps[numbers.start : numbers.stop] if isinstance(s, Launch)):
            program.launch(self._kernel(step), self.memory.buffers(step), [self._layout.slot(e) for e in step.sizes])
            touched += step.buffers
        prepare = self.memory.prepare(touched)
        dead = self._dead(numbers)
        assert self._runner is not None
        run, start, messages, threads = self._runner.run, program.seal(), self._messages, torch.get_num_threads

        def segment(vals: Values, frame: Any, program: native.Program = program) -> None:
            if prepare is not None:
                prepare(vals, frame)
            status = run(start, frame.bases_at, frame.slots_at, threads(), frame.times_at)
            if status:
                native.raise_status(status, messages)
            for position in dead:
                vals[position] = None

        return segment

    def _launch(self, number: int, step: Launch) -> Step:
        """One launch from Python: on a device, or of a Python callable."""
        kernel = self._kernel(step)
        buffers, at = self.memory.buffers(step), [self._layout.slot(e) for e in step.sizes]
        prepare = self.memory.prepare(step.buffers)
        dead = self._dead(range(number, number + 1))
        streams = self.streams

        def launch(vals: Values, frame: Any) -> None:
            if prepare is not None:
                prepare(vals, frame)
            slots, bases = frame.slots, frame.bases
            addresses = [bases[base] + slots[offset] for base, offset in buffers]
            numbers = [slots[slot] for slot in at]
            if streams is None:
                kernel(addresses, numbers, torch.get_num_threads())
            else:
                kernel.launch(addresses, numbers, streams.before(number, frame.stream, frame.events))
                streams.after(number, frame.stream, frame.events)
            for position in dead:
                vals[position] = None

        return launch

    def _call(self, number: int, step: Call) -> Step:
        """One call of a torch op or a region op."""
        if step.op in REGION_OPS:
            function, written = REGION_OPS[step.op], set()
        else:
            function = resolve_op(step.op)
            written = written_arguments(function, step)
            if is_collective(step):
                function = self.collectives.started(number, step, function, bool(written))
            elif step.op == WAIT:
                function = self.collectives.waited(function)
        build = self._arguments.compile(list(step.args))
        names = tuple(name for name, _ in step.kwargs)
        build_named = self._arguments.compile([template for _, template in step.kwargs])
        into = [v for v in step.outs if v is not None and self.memory.value(v).storage not in ("handle", "scalar")]
        touched = [*argument_values(step), *into]
        prepare = self.memory.prepare([id for id in touched if self.memory.value(id).storage in ("view", "fresh")])
        prelude = self.memory.materialise(touched)
        store = self._store(number, step, written)
        dead = self._dead(range(number, number + 1))
        streams = self.streams

        def call(vals: Values, frame: Any) -> None:
            if prepare is not None:
                prepare(vals, frame)
            for position, make in prelude:
                vals[position] = make(vals, frame)
            if streams is not None:
                streams.before(number, frame.stream, frame.events)
            args = build(vals, frame.slots)
            if names:
                result = function(*args, **dict(zip(names, build_named(vals, frame.slots), strict=True)))
            else:
                result = function(*args)
            store(result, vals, frame)
            if streams is not None:
                streams.after(number, frame.stream, frame.events)
            for position in dead:
                vals[position] = None

        return call

    def _store(self, number: int, step: Call, written: set[int]) -> Callable[[Any, Values, Any], None]:
        """A function that puts the results of a call where the plan wants them."""
        kinds = {"handle": self._store_handle, "scalar": self._store_scalar}
        self.memory.origins.update({id: step.op for id in step.outs if id is not None})
        stores: list[tuple[int, Callable[[Any, Values, Any], None]]] = []
        for position, id in enumerate(step.outs):
            if id is not None and id not in written:
                make = kinds.get(self.memory.value(id).storage, self._store_copy)
                stores.append((position, make(number, step.op, id)))
        expected = len(step.outs)
        if not expected:
            return lambda result, vals, frame: None
        if expected == 1 and len(stores) == 1 and step.op not in REGION_OPS:
            only = stores[0][1]

            def store_one(result: Any, vals: Values, frame: Any) -> None:
                only(result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result, vals, frame)

            return store_one

        def store_all(result: Any, vals: Values, frame: Any) -> None:
            results = result if isinstance(result, (tuple, list)) else (result,)
            if len(results) != expected:
                raise WrongOpResult(op=step.op, got=f"{len(results)} results", expected=str(expected))
            for position, store in stores:
                store(results[position], vals, frame)

        return store_all

    def _store_handle(self, number: int, op: str, id: int) -> Callable[[Any, Values, Any], None]:
        position = self._layout.index[id]

        def keep(result: Any, vals: Values, frame: Any) -> None:
            vals[position] = result

        return keep

    def _store_scalar(self, number: int, op: str, id: int) -> Callable[[Any, Values, Any], None]:
        position, symbol = self._layout.index[id], self.memory.value(id).ref
        if symbol is None:

            def keep(result: Any, vals: Values, frame: Any) -> None:
                vals[position] = result

            return keep
        slot = self._layout.slot(str(symbol))
        hooks = self._hooks.setdefault(number + 1, [])  # filled when all expressions of the plan are known

        def bind(result: Any, vals: Values, frame: Any) -> None:
            vals[position] = result
            frame.slots[slot] = int(result)
            for hook in hooks:
                hook(frame)

        return bind

    def _store_copy(self, number: int, op: str, id: int) -> Callable[[Any, Values, Any], None]:
        position = self._layout.index[id]

        def copy(result: Any, vals: Values, frame: Any) -> None:
            if result.shape != vals[position].shape:
                raise WrongOpResult(op=op, got=describe(result), expected=describe(vals[position]))
            vals[position].copy_(result)

        return copy

    def _guards(self) -> dict[int, list[tuple[int, int]]]:
        """Stage -> (slot, index) of the plan's assertions that can be checked there."""
        guards: dict[int, list[tuple[int, int]]] = {}
        for index, (expr, _) in enumerate(self._plan.asserts):
            slot = self._layout.slot(expr)
            guards.setdefault(max(self._layout.slots.stage(slot), 0), []).append((slot, index))
        return guards

    def _stage_program(self, stage: int, guards: dict[int, list[tuple[int, int]]]) -> Callable[[Any], None] | None:
        """A function that computes the sizes known from this stage on and checks the guards over them."""
        instructions = self._layout.slots.programs.get(stage, [])
        checks, messages = guards.get(stage, []), self._messages
        if not instructions and not checks:
            return None
        if self._runner is None:

            def evaluate(frame: Any) -> None:
                sizes.run_slots(instructions, frame.slots)
                for slot, index in checks:
                    if not frame.slots[slot]:
                        raise GuardFailed(message=messages[index])

            return evaluate
        program = native.Program()
        program.evaluate(instructions)
        for slot, index in checks:
            program.guard(slot, index)
        run, start = self._runner.run, program.seal()

        def enter(frame: Any, program: native.Program = program) -> None:
            status = run(start, frame.bases_at, frame.slots_at, 1, 0)
            if status:
                native.raise_status(status, messages)

        return enter

    def _results(self) -> Callable[[Values, Any], list[Any]]:
        """A function that gives the plan's outputs in order."""
        outputs = [self._output(o) for o in self._plan.outputs]
        positions = [o for o in outputs if isinstance(o, int)]
        if len(positions) < len(outputs):
            makers = [_taken(o) if isinstance(o, int) else o for o in outputs]
            return lambda vals, frame: [make(vals, frame) for make in makers]
        return lambda vals, frame: [vals[position] for position in positions]

    def _output(self, out: OutputSpec) -> Maker | int:
        """How an output is made, or the position where it lies."""
        if out.kind == "none":
            return lambda vals, frame: None
        if out.kind == "constant":
            return lambda vals, frame: out.const
        if out.kind == "size":
            if out.expr is None:
                raise UnsafePlan(why="an output is a size without an expression")
            slot = self._layout.slot(out.expr)
            return lambda vals, frame: frame.slots[slot]
        id = self.memory.value(out.ref).id
        root, _ = self._layout.place(id)
        if self.memory.value(root).storage == "arena":
            raise UnsafePlan(why=f"output {id} lies in the arena, which the next call overwrites")
        todo = self.memory.materialise([id])
        position = self._layout.index[id]
        if not todo:
            return position
        self.uses_torch = True
        ((position, make),) = todo

        def view(vals: Values, frame: Any) -> torch.Tensor:
            vals[position] = made = make(vals, frame)
            return made

        return view


def _taken(position: int) -> Maker:
    return lambda vals, frame: vals[position]
