"""Running what was recorded: lines of equal block and depth are one launch, in the order of depths.

All values of one type lie in one pool, in the order in which they are computed, so that the results of a launch are a
contiguous part of it and arguments are rows that an index names. With gradients a launch keeps its own small autograd
graph; the backward goes through the launches in reverse, and adds into pools of gradients by the same indices.

Launches whose plans need no Python run one after the other in native code (`launch.cpp`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ...runtime.native import raise_status
from ...runtime.ops import ROW_OUT_OF_RANGE
from .blocks import Block
from .compile import Compiled, Substitute, layouts_of
from .fuse import Derived
from .report import Counts
from .values import INTEGER, REAL, Pending, Type

READ = {
    torch.float32: 1, torch.float64: 2, torch.int64: 3, torch.int32: 4, torch.bool: 5, torch.uint8: 6, torch.int16: 7,
    torch.int8: 8,
}  # fmt: skip
BAD_ROW, NO_MEMORY = -100, -101  # as in launch.cpp


@dataclass(frozen=True)
class Launch:
    """One batched application: the rows of its arguments in their pools, and where its results begin in theirs.

    `leaves`, `shared` and `results` are the ends of its autograd graph where it ran in torch, `saved` is for the compiled
    backward.
    """

    block: Block
    count: int
    rows: tuple[torch.Tensor, ...]
    starts: tuple[int, ...]
    leaves: tuple[torch.Tensor, ...] = ()
    shared: tuple[torch.Tensor, ...] = ()
    results: tuple[torch.Tensor, ...] = ()
    saved: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Native:
    """Launches that native code keeps, from one number to another, and their blocks with the shared tensors of each as they
    were."""

    first: int
    end: int
    blocks: dict[Block, tuple[torch.Tensor, ...]]


class Learnt(Protocol):
    """What launching needs of a table of blocks."""

    native: Any
    types: dict[Type, int]
    derived: dict[int, Derived]
    binder: Any


class Execution:
    """Values of one call, and the launches that made them. `state` is what the call records into, `pools` may be those of a
    call that has ended, `compile` compiles a block if it is time to."""

    def __init__(self, state: Any, table: Learnt, pools: dict[Type, torch.Tensor], compile: Callable[[Block], None]) -> None:
        self.state = state
        self.learnt = table
        self.table = table.native
        self.types = table.types
        self.derived = table.derived
        self.made: dict[tuple[int, bool], torch.Tensor] = {}  # derived tensors of this call
        self.pools = pools
        self.compile = compile
        self.outgrown: list[torch.Tensor] = []  # pools whose rows launches may have kept for the backward
        self.used: tuple[int, ...] = ()  # rows of each type that hold something
        self.addresses: tuple[int, ...] = ()  # of the pools
        self.bound: dict[int, tuple[Compiled, tuple[torch.Tensor, ...]]] = {}  # blocks that run without Python, and have
        self.binder = object()  # shared tensors of this call while it is the table's binder
        self.kinds: dict[Type, tuple[int, int]] = {}  # types that are single numbers: address of the pool, how to read it
        self.launches: list[Launch | Native] = []
        self.counts = Counts()

    # -- values -------------------------------------------------------------------------------------------------------

    def given_as(self, value: Pending) -> torch.Tensor | None:
        """The real tensor that a value was given as, while it waits for its pool."""
        found = self.state.waiting.get(value.type, {}).get(value.id)
        return None if found is None else found.detach()

    def has(self, id: int) -> bool:
        """Whether a value has been computed."""
        return self.state.row(id) >= 0

    def value(self, x: Pending) -> torch.Tensor:
        """A computed value: a view of its row."""
        return self.pools[x.type][self.state.row(x.id)]

    def copy(self, x: Pending) -> torch.Tensor:
        """A computed value as a tensor of its own: rows of a pool are those of another value in a later call."""
        with torch._C.DisableTorchFunction():
            return self.value(x).clone()

    def numbers(self, values: list[Pending]) -> list[Any]:
        """The numbers of computed values; the tensors of those that hold several."""
        found = self.state.read(values, self.kinds)
        return [self._number(x) if n is None else n for x, n in zip(values, found, strict=True)] if None in found else found

    def _number(self, x: Pending) -> Any:
        copied = self.copy(x)
        with torch._C.DisableTorchFunction():
            return copied.item() if x.type.numel == 1 else copied

    def values(self, found: Sequence[Pending]) -> list[torch.Tensor]:
        """Computed values as tensors of their own. Those of one type are parts of one."""
        by_type: dict[Type, list[Pending]] = {}
        for x in found:
            by_type.setdefault(x.type, []).append(x)
        made: dict[Type, Iterator[torch.Tensor]] = {}
        for type, same in by_type.items():
            rows = torch.frombuffer(self.state.rows(same), dtype=torch.int64)
            made[type] = iter(self.pools[type].index_select(0, rows).unbind(0))
        return [next(made[x.type]) for x in found]

    def shared(self, block: Block) -> list[torch.Tensor]:
        """What all instances share, derived tensors as they are in this call."""
        return [self._actual(s, grad=block.grad) for s in block.shared]

    def _actual(self, s: torch.Tensor, *, grad: bool) -> torch.Tensor:
        derived = self.derived.get(id(s))
        if derived is None:
            return s
        key = id(s), grad
        if key not in self.made:
            with torch.set_grad_enabled(grad):
                self.made[key] = derived.make()
        return self.made[key]

    # -- launches -----------------------------------------------------------------------------------------------------

    def run(self, blocks: Sequence[Block]) -> None:
        """Compute all lines that are recorded."""
        started, spent = time.perf_counter(), self.counts.seconds
        if self.learnt.binder is not self.binder:  # this call begins, or one within it has ended
            self.learnt.binder, self.bound = self.binder, {}
        waiting, self.state.waiting = self.state.waiting, {}
        given = [(t, tensors, self.state.put(self.types[t], tuple(tensors))) for t, tensors in waiting.items()]
        launches = self.state.schedule()
        self.counts.reused += self.state.reused
        self._reserve(self.state.used())
        with torch.no_grad():
            for type, tensors, start in given:
                torch.stack(list(tensors.values()), out=self.pools[type][start : start + len(tensors)])
        self.state.numbers(*(self.pools[t].data_ptr() for t in (INTEGER, REAL)))
        gathers, now = spent.gathers, time.perf_counter()
        spent.scheduling += now - started
        self._launches(blocks, launches)
        spent.kernels += time.perf_counter() - now - (spent.gathers - gathers)

    def _reserve(self, used: tuple[int, ...]) -> None:
        """Make room for so many rows of each type."""
        changed = len(self.addresses) != len(used)
        for type, number in self.types.items():
            pool, wanted = self.pools.get(type), used[number]
            if pool is None or pool.shape[0] < wanted:
                before = self.used[number] if number < len(self.used) else 0
                size = max(wanted, 2 * before)
                grown = torch.empty((size, *type.shape), dtype=type.dtype, device=type.device)
                if pool is not None and before:
                    grown[:before] = pool[:before]
                    self.outgrown.append(pool)
                self.pools[type] = grown
                changed = True
        self.used = used
        if changed:
            self.addresses = tuple(self.pools[t].data_ptr() for t in self.types)
            self.kinds = {
                t: (address, READ[t.dtype])
                for t, address in zip(self.types, self.addresses, strict=True)
                if t.numel == 1 and t.dtype in READ and t.device.type == "cpu"
            }

    def _launches(self, blocks: Sequence[Block], launches: Sequence[tuple[int, int]]) -> None:
        at = 0
        while at < len(launches):
            end = at
            while end < len(launches) and self._is_direct(blocks[launches[end][0]]):
                self._count(blocks[launches[end][0]], launches[end][1])
                end += 1
            if end > at:
                first = self.state.kept()
                status, ran, gathered, gathers, _ = self.state.run(at, end, self.addresses, torch.get_num_threads())
                if (kept := self.state.kept()) > first:
                    these = dict.fromkeys(blocks[number] for number, _ in launches[at:end])
                    self.launches.append(Native(first, kept, {b: self.bound[b.number][1] for b in these if b.grad}))
                self.counts.gathered_bytes += gathered
                self.counts.seconds.gathers += 1e-9 * gathers
                if status:
                    _raise(status, blocks[launches[at + ran - 1][0]])
            else:
                self._launch(blocks[launches[at][0]], launches[at][1], at)
                end = at + 1
            at = end

    def _is_direct(self, block: Block) -> bool:
        """Whether a block runs without Python; its shared tensors are where they are now."""
        held = self.bound.get(block.number)
        if held is not None and held[0] is block.compiled:
            return True
        self.compile(block)
        if block.compiled is None:
            return False
        shared = self.shared(block)
        if layouts_of(shared) != block.compiled.layouts:
            block.compiled = None  # it is compiled anew for what they are like now
            return False
        if block.compiled.forward is not None:
            return False
        self.table.shared(block.number, tuple(s.data_ptr() for s in shared))
        # with memory of their own for the backward: a parameter may be given other memory (`p.data = …`) before it
        self.bound[block.number] = block.compiled, tuple(s.detach() for s in shared) if block.grad else ()
        return True

    def _count(self, block: Block, count: int) -> None:
        block.launches += 1
        self.counts.launches += 1
        self.counts.lines += count
        self.counts.batches.setdefault(block, []).append(count)

    def _launch(self, block: Block, count: int, launch: int) -> None:
        started = time.perf_counter()
        rows, starts, side = self.state.scheduled(launch)
        at = [torch.frombuffer(rows, dtype=torch.int64, count=count, offset=8 * k * count) for k in range(len(side))]
        stacked = [self._gathered(self.pools[t], r, s) for t, r, s in zip(block.inputs, at, side, strict=True)]
        self.counts.seconds.gathers += time.perf_counter() - started
        saved: tuple[Any, ...] | None = None
        leaves: list[torch.Tensor] = []
        shared: list[torch.Tensor] = []
        if block.compiled is not None:
            made, saved = self._run_compiled(block, block.compiled, stacked)
        else:
            leaves = [x.detach().requires_grad_(block.grad and (x.is_floating_point() or x.is_complex())) for x in stacked]
            shared = [_leaf(t) if t is not s else s for s, t in zip(block.shared, self.shared(block), strict=True)]
            instead = {id(s): t for s, t in zip(block.shared, shared, strict=True) if t is not s}
            with torch.set_grad_enabled(block.grad), Substitute(instead) if instead else contextlib.nullcontext():
                made = block.batched(leaves)
        for start, type, x in zip(starts, block.outputs, made, strict=True):
            self.pools[type][start : start + count] = x.detach()[:count]
        self._count(block, count)
        if saved is not None:
            self.launches.append(Launch(block, count, tuple(at), starts, saved=saved))
        elif any(x.requires_grad for x in made):
            self.launches.append(Launch(block, count, tuple(at), starts, tuple(leaves), tuple(shared), tuple(made)))

    def _run_compiled(
        self, block: Block, compiled: Compiled, stacked: list[torch.Tensor]
    ) -> tuple[Any, tuple[Any, ...] | None]:
        """(results, what the backward reads). One instance alone runs twice: graphs hold for two and more."""
        assert compiled.forward is not None
        with torch.no_grad():
            made = compiled.forward([*(_doubled(x) for x in stacked), *(s.detach() for s in self.shared(block))])
        results = made[: len(block.outputs)]
        return results, compiled.save(made[len(results) :]) if compiled.backward is not None else None

    def _gathered(self, pool: torch.Tensor, rows: torch.Tensor, side: int) -> torch.Tensor:
        if side >= 0:
            return pool[side : side + len(rows)].data  # with a version of its own: rows are never written twice
        made = pool.index_select(0, rows)
        self.counts.gathered_bytes += made.numel() * made.element_size()
        return made

    # -- gradients ----------------------------------------------------------------------------------------------------

    def sources(self) -> list[torch.Tensor]:
        """The real tensors that gradients flow to: shared ones, then given ones."""
        return [*self._shared_sources().values(), *(t for t, _, _ in self.state.wanting)]

    def _shared_sources(self) -> dict[int, torch.Tensor]:
        blocks = [b for x in self.launches for b in (x.blocks if isinstance(x, Native) else (x.block,))]
        shared = {id(s): s for b in dict.fromkeys(blocks) for s in b.shared if s.requires_grad}
        return {k: self._actual(s, grad=True) for k, s in shared.items()}

    def backward(self, values: Sequence[Pending], grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients of the sources for those of some values."""
        pools = {
            t: torch.zeros_like(p[: self.used[self.types[t]]])
            for t, p in self.pools.items()
            if t.dtype.is_floating_point or t.dtype.is_complex
        }
        touched = {t: np.zeros(len(g), dtype=bool) for t, g in pools.items()}
        for value, grad in zip(values, grads, strict=True):
            if grad is not None:
                row = self.state.row(value.id)
                pools[value.type][row] += grad
                touched[value.type][row] = True
        shared: dict[int, torch.Tensor] = {}
        for launch in reversed(self.launches):
            if isinstance(launch, Native):
                self._native_backward(launch, pools, touched, shared)
            else:
                self._launch_backward(launch, pools, touched, shared)
        found: list[torch.Tensor | None] = [shared.get(k) for k in self._shared_sources()]
        for _, type, id_ in self.state.wanting:
            row = self.state.row(id_)
            found.append(pools[type][row] if touched[type][row] else None)
        return found

    def _native_backward(
        self,
        launches: Native,
        pools: dict[Type, torch.Tensor],
        touched: dict[Type, np.ndarray],
        shared: dict[int, torch.Tensor],
    ) -> None:
        sums: dict[int, torch.Tensor] = {}
        for s in dict.fromkeys(s for b in launches.blocks for s in b.shared if s.requires_grad):
            held = shared.get(id(s))
            sums[id(s)] = torch.zeros_like(s, memory_format=torch.contiguous_format) if held is None else held.contiguous()
        found = {
            block.number: tuple(
                x
                for s, held in zip(block.shared, shared_then, strict=True)
                for x in (held.data_ptr(), sums[id(s)].data_ptr() if id(s) in sums else 0)
            )
            for block, shared_then in launches.blocks.items()
        }
        addresses = tuple(pools[t].data_ptr() if t in pools else 0 for t in self.types)
        flags = tuple(touched[t].ctypes.data if t in touched else 0 for t in self.types)
        status, ran = self.state.backward(launches.first, launches.end, addresses, flags, found, torch.get_num_threads())
        if status:
            _raise(status, next(iter(launches.blocks)))
        shared.update({id(s): sums[id(s)] for b in launches.blocks if b.number in ran for s in b.shared if id(s) in sums})

    def _launch_backward(
        self,
        launch: Launch,
        pools: dict[Type, torch.Tensor],
        touched: dict[Type, np.ndarray],
        shared: dict[int, torch.Tensor],
    ) -> None:
        given = [
            pools[type][start : start + launch.count]
            if type in touched and touched[type][start : start + launch.count].any()
            else None
            for type, start in zip(launch.block.outputs, launch.starts, strict=True)
        ]
        if all(g is None for g in given):
            return
        found = self._compiled_gradients(launch, given) if launch.saved is not None else self._torch_gradients(launch, given)
        count = len(launch.block.inputs)
        for k, grad in found:
            if k >= count:
                s = launch.block.shared[k - count]
                shared[id(s)] = shared[id(s)] + grad if id(s) in shared else grad
            else:
                type = launch.block.inputs[k]
                if grad.untyped_storage()._cdata == pools[type].untyped_storage()._cdata:  # what only passes a gradient on
                    grad = grad.clone()
                pools[type].index_add_(0, launch.rows[k], grad[: launch.count])
                touched[type][launch.rows[k].numpy()] = True

    @staticmethod
    def _compiled_gradients(launch: Launch, given: list[torch.Tensor | None]) -> list[tuple[int, torch.Tensor]]:
        compiled = launch.block.compiled
        assert compiled is not None and compiled.backward is not None and launch.saved is not None
        tangents = []
        for k in compiled.differentiable:
            type, grad = launch.block.outputs[k], given[k]
            if grad is None:
                grad = torch.zeros((launch.count, *type.shape), dtype=type.dtype, device=type.device)
            tangents.append(torch.cat([grad, torch.zeros_like(grad)]) if launch.count == 1 else grad)
        with torch.no_grad():
            made = compiled.backward([*launch.saved, *tangents])
        return [(k, g) for k, g in enumerate(made) if g is not None]

    @staticmethod
    def _torch_gradients(launch: Launch, given: list[torch.Tensor | None]) -> list[tuple[int, torch.Tensor]]:
        pairs = [(x, g) for x, g in zip(launch.results, given, strict=True) if x.requires_grad and g is not None]
        everything = (*launch.leaves, *launch.shared)
        places = [k for k, x in enumerate(everything) if x.requires_grad]
        wanted = [everything[k] for k in places]
        if not pairs:
            return []
        results, grads = [x for x, _ in pairs], [g for _, g in pairs]
        # the graph is kept: results may be asked for their gradients one after the other
        made = torch.autograd.grad(results, wanted, grads, allow_unused=True, retain_graph=True)
        return [(k, g) for k, g in zip(places, made, strict=False) if g is not None]


def _raise(status: int, block: Block) -> None:
    """Raise the error of a launch without Python."""
    if status == BAD_ROW:
        raise IndexError(f"{ROW_OUT_OF_RANGE} (at {block.source})")
    if status == NO_MEMORY:
        raise MemoryError(f"what the backward of the block at {block.source} reads does not fit")
    raise_status(status, [f"a guard of the plan of {block.source}"] * status)


def _leaf(derived: torch.Tensor) -> torch.Tensor:
    """A derived tensor for one launch, whose gradients end here: those of what it is made of follow once, for all."""
    return derived.detach().requires_grad_(derived.requires_grad)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.shape[0] == 1 else x
