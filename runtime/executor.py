"""Runs plans: `Executable(plan, kernels, constants)` is called with flat inputs and returns flat outputs.

Everything that can be decided is decided at construction: each step becomes one closure over positions, consecutive
kernel launches on the CPU become one native call (`native.py`), size expressions become slots of an int64 table. A call
takes a frame (arena, tables) from a small pool and gives it back, so calls may overlap in threads and recurse.

Forking: kernels open no parallel region when torch's thread count is 1, so a child process made by `torch.utils.data`
(which sets it) can run plans. A bare `os.fork` of a process that has already run OpenMP at two or more threads hangs in
its first parallel region, in plait as in torch itself: call `torch.set_num_threads(1)` in such a child.
"""

from __future__ import annotations

import operator
import struct
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import KernelMissing, UnsafePlan, WrongInputCount
from . import dispatch, native
from .collectives import Pending, drain
from .inputs import InputCheck
from .layout import Layout
from .memory import Memory
from .plan import Plan
from .state import SharingCheck
from .steps import Builder

ALIGNMENT = 64
POOLED_FRAMES = 8

Span = tuple[int, int, int]
"""Index of a step, its start and its end by `time.perf_counter_ns`."""


_watchers: list[list[tuple[Executable, list[Span]]]] = []


@contextmanager
def watching() -> Iterator[list[tuple[Executable, list[Span]]]]:
    """Collects what `Executable.trace` gives of each call of every executable that ends within the block."""
    calls: list[tuple[Executable, list[Span]]] = []
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers[:] = [c for c in _watchers if c is not calls]


class Frame:
    """The memory of one running call: slots of sizes, base addresses, the arena, and values that outlive calls."""

    __slots__ = (
        "arena", "bases", "bases_at", "capacity", "events", "sized", "slots", "slots_at", "stream", "tail", "times_at",
    )  # fmt: skip

    def __init__(self, slots: Sequence[int], bases: int, tail: int) -> None:
        self.slots = array("q", slots)
        self.slots_at = self.slots.buffer_info()[0]
        self.bases = array("Q", [0] * bases)
        self.bases_at = self.bases.buffer_info()[0]
        self.tail: list[Any] = [None] * tail
        self.arena: torch.Tensor | None = None
        self.capacity = -1
        self.sized = False  # whether slots and arena are those of the inputs' sizes that `slots` holds
        self.times_at = 0  # where the native runner puts the time of each launch; 0: nowhere
        self.stream: Any = None
        self.events: dict[int, Any] = {}


class Executable:
    """A plan ready to run on flat inputs.

    `kernels` maps kernel names to addresses of `void(void* const* bufs, const int64_t* sizes, int nthreads)`, to Python
    callables of (addresses, sizes, threads), or to device kernels with `.launch(addresses, sizes, stream)`. `constants`
    maps names to the weights, which the executable keeps and does not copy. `runner` is the native runner, by default
    this machine's. With `check=False` the caller vouches for the inputs (torch.compile has guards of its own). A `region`
    is a plan that another one calls.

    Before the first call of a plan with collectives all ranks of their groups agree on these.

    Raises the catalogue's WrongInput* errors for inputs that the plan was not compiled for, SharedMemory for those that
    share memory with what it writes.
    """

    def __init__(
        self,
        plan: Plan,
        kernels: Mapping[str, Any],
        constants: Mapping[str, torch.Tensor],
        *,
        check: bool = True,
        runner: native.Runner | None = None,
        region: bool = False,
    ) -> None:
        self.plan = plan
        self._layout = layout = Layout(plan)
        regions = {
            name: Executable(inner, kernels, constants, check=False, runner=runner, region=True)
            for name, inner in plan.regions
        }
        builder = Builder(layout, kernels, regions, runner)
        memory = builder.memory
        self._steps, self._numbers, self._results = builder.steps, builder.numbers, builder.results
        self._enter = builder.enter
        self._streams = builder.streams
        self._collective = bool(builder.collectives.numbers)
        self._agreed = region or not dispatch.agreements(plan)
        self._guarded = builder.uses_torch
        self._mutated = memory.mutated
        self._arena_slot = builder.arena_slot
        self._arena_device = memory.arena_device()
        self._arena_tensors = memory.static_arena_tensors()
        self._base_count = memory.base_count
        self._check = InputCheck(plan) if check else None
        self._arity = len(plan.inputs)
        self._bind_symbols()
        self._bind_addresses(memory.native_inputs())
        self._constants = self._place_constants(constants, memory)
        sharing = SharingCheck(plan, constants) if check else None
        self._sharing = sharing if sharing is not None and sharing.needed else None
        self._idle: list[Frame] = []

    def _bind_symbols(self) -> None:
        bound = [(self._layout.slot(s.name), s.input, s.dim) for s in self.plan.symbols if s.input >= 0]
        self._from_ints = [(slot, position) for slot, position, dim in bound if dim is None]
        self._from_dims = [(slot, position, dim) for slot, position, dim in bound if dim is not None]

    def _bind_addresses(self, positions: list[int]) -> None:
        """Native steps read the addresses of these inputs from base 1 on."""
        self._take = operator.itemgetter(*positions) if len(positions) > 1 else None
        self._single = positions[0] if len(positions) == 1 else None
        self._pack = struct.Struct(f"{len(positions)}Q").pack_into

    def _place_constants(self, constants: Mapping[str, torch.Tensor], memory: Memory) -> list[tuple[int, int, Any]]:
        """(position in the tail, base or -1, tensor) of each constant."""
        placed = []
        for spec in self.plan.values:
            if spec.storage == "constant":
                if spec.ref not in constants:
                    raise KernelMissing(kind="constant", name=spec.ref)
                position = self._layout.index[spec.id]
                tensor = constants[str(spec.ref)].detach()
                placed.append((position - self._arity, memory.bases.get(spec.id, -1), tensor))
        return placed

    def _new_frame(self) -> Frame:
        frame = Frame(self._layout.slots.initial, self._base_count, self._layout.count - self._arity)
        for position, base, tensor in self._constants:
            frame.tail[position] = tensor
            if base >= 0:
                frame.bases[base] = tensor.data_ptr()
        return frame

    def _grow_arena(self, frame: Frame, size: int) -> None:
        # Not an inference tensor even inside inference_mode: later calls outside it write to the same arena.
        with torch.inference_mode(False):
            arena = torch.empty(size, dtype=torch.uint8, device=self._arena_device)
            frame.arena, frame.capacity = arena, size
            frame.bases[0] = arena.data_ptr()
            if size and frame.bases[0] % ALIGNMENT:
                raise UnsafePlan(why=f"torch gave the arena an address that is no multiple of {ALIGNMENT}")
            for position, make in self._arena_tensors:
                frame.tail[position - self._arity] = make([], frame)

    def __call__(self, *args: Any) -> list[Any]:
        """Run the plan on flat inputs; the results in order of the plan's outputs."""
        return self.run(list(args))

    def run(self, args: list[Any]) -> list[Any]:
        """Like a call, but empties `args`, so that inputs which only the list holds are freed as soon as they are dead."""
        if not _watchers:
            return self._run(args, None)
        spans: list[Span] = []
        results = self._run(args, spans)
        for calls in _watchers:
            calls.append((self, spans))
        return results

    def profile(self, *args: Any) -> tuple[list[Any], list[tuple[int, int]]]:
        """Run once; the results, and (index of the step, nanoseconds) of every step in order."""
        results, spans = self.trace(*args)
        return results, [(number, end - start) for number, start, end in spans]

    def trace(self, *args: Any) -> tuple[list[Any], list[Span]]:
        """Run once; the results, and when every step began and ended, in order.

        Launches that one native call makes follow each other without gaps from where the call began. On devices these are
        the times at which the host was at it.
        """
        spans: list[Span] = []
        return self._run(list(args), spans), spans

    def trim(self) -> None:
        """Free the arenas of calls that have ended."""
        self._idle.clear()

    def _run(self, args: list[Any], spans: list[Span] | None) -> list[Any]:
        if self._check is not None:
            self._check(args)
            if self._sharing is not None:
                self._sharing(args)
        elif len(args) != self._arity:
            raise WrongInputCount(expected=self._arity, got=len(args), names=", ".join(s.name for s in self.plan.inputs))
        try:
            frame = self._idle.pop()
        except IndexError:
            frame = self._new_frame()
        if not self._guarded:
            results = self._execute(args, frame, spans)
        else:
            grad = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)
            try:
                if torch._C._is_any_autocast_enabled():  # the captured graph already holds autocast's casts
                    with torch._C._DisableAutocast():
                        results = self._execute(args, frame, spans)
                else:
                    results = self._execute(args, frame, spans)
            finally:
                torch._C._set_grad_enabled(grad)
        if len(self._idle) < POOLED_FRAMES:  # a frame whose call raised is dropped
            self._idle.append(frame)
        return results

    def _execute(self, args: list[Any], frame: Frame, spans: list[Span] | None) -> list[Any]:
        vals = args + frame.tail
        args.clear()
        slots = frame.slots
        for slot, position in self._from_ints:
            if slots[slot] != vals[position]:
                slots[slot], frame.sized = vals[position], False
        for slot, position, dim in self._from_dims:
            size = vals[position].shape[dim]
            if slots[slot] != size:
                slots[slot], frame.sized = size, False
        if self._take is not None:
            self._pack(frame.bases, 8, *map(torch.Tensor.data_ptr, self._take(vals)))
        elif self._single is not None:
            frame.bases[1] = vals[self._single].data_ptr()
        if not frame.sized:  # else everything that follows from the sizes is what it was in the frame's last call
            self._size(vals, frame)
        if self._streams is not None:
            frame.stream = self._streams.begin(frame.stream)
        if not self._agreed:
            dispatch.agree(self.plan)
            self._agreed = True
        try:
            if spans is None:
                for step in self._steps:
                    step(vals, frame)
            else:
                self._timed_steps(vals, frame, spans)
        except Exception:
            if self._collective:  # those in flight read the caller's tensors
                drain(v for v in vals if isinstance(v, Pending))
            raise
        if self._streams is not None:
            self._streams.finish(frame.stream)
        if self._mutated:
            torch.autograd.graph.increment_version([vals[i] for i in self._mutated])
        return self._results(vals, frame)

    def _size(self, vals: list[Any], frame: Frame) -> None:
        if self._enter is not None:
            self._enter(frame)
        need = frame.slots[self._arena_slot]
        if need > frame.capacity or frame.arena is None:  # views of it are wanted where nothing lies in it, too
            self._grow_arena(frame, need)
            vals[self._arity :] = frame.tail
        frame.sized = True

    def _timed_steps(self, vals: list[Any], frame: Frame, spans: list[Span]) -> None:
        for step, numbers in zip(self._steps, self._numbers, strict=True):
            launches = array("q", [-1] * len(numbers))
            frame.times_at = launches.buffer_info()[0]
            start = time.perf_counter_ns()
            try:
                step(vals, frame)
            finally:
                frame.times_at = 0
            if len(launches) == 1 and launches[0] < 0:  # not a native segment
                launches[0] = time.perf_counter_ns() - start
            for number, taken in zip(numbers, launches, strict=True):
                spans.append((number, start, start + taken))
                start += taken
