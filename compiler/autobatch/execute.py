"""Running what was recorded: lines of equal block and depth are one launch, in the order of depths.

All values of one type lie in one pool, in the order in which they are computed, so that the results of a launch are a
contiguous part of it and arguments are rows that an index names. With gradients a launch keeps its own small autograd
graph; the backward goes through the launches in reverse, and adds into pools of gradients by the same indices.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .blocks import Block
from .compile import Compiled
from .report import Counts
from .values import INTEGER, REAL, Pending, Type

Lines = Sequence[tuple[Block, bytes, bytes, bytes]]  # ids of arguments, depths, first ids of results, as int64


@dataclass
class Pool:
    """Rows of values of one type; `used` of them hold something."""

    type: Type
    rows: torch.Tensor
    used: int = 0

    @staticmethod
    def of(type: Type) -> Pool:
        """An empty pool."""
        return Pool(type, torch.empty((0, *type.shape), dtype=type.dtype, device=type.device))

    def reserve(self, more: int) -> None:
        """Make room for so many more rows."""
        wanted = self.used + more
        if wanted <= self.rows.shape[0]:
            return
        grown = self.rows.new_empty((max(wanted, 2 * self.used), *self.type.shape))
        grown[: self.used] = self.rows[: self.used]
        self.rows = grown


@dataclass(frozen=True)
class Launch:
    """One batched application: the rows of its arguments in their pools, and where its results begin in theirs.

    `leaves` and `results` are the ends of its autograd graph where it ran in torch, `saved` is for the compiled backward.
    """

    block: Block
    count: int
    rows: tuple[torch.Tensor, ...]
    starts: tuple[int, ...]
    leaves: tuple[torch.Tensor, ...] = ()
    results: tuple[torch.Tensor, ...] = ()
    saved: tuple[Any, ...] | None = None


class Execution:
    """Values of one call, and the launches that made them."""

    def __init__(self, compile: Callable[[Block], None]) -> None:
        self.compile = compile  # compiles a block, if it is time to
        self.pools: dict[Type, Pool] = {}
        self.row_of = np.full(1024, -1, dtype=np.int64)
        self.waiting: dict[Type, list[tuple[int, torch.Tensor]]] = {}  # given tensors that are not in their pool yet
        self.launches: list[Launch] = []
        self.counts = Counts()
        self.wanting: list[tuple[torch.Tensor, Type, int]] = []  # given tensors that want a gradient: type and id

    # -- values -------------------------------------------------------------------------------------------------------

    def given(self, value: Pending, tensor: torch.Tensor) -> None:
        """Take a real tensor as a value."""
        self.waiting.setdefault(value.type, []).append((value.id, tensor.detach()))
        if tensor.requires_grad and torch.is_grad_enabled():
            self.wanting.append((tensor, value.type, value.id))

    def has(self, id: int) -> bool:
        """Whether a value has been computed."""
        return id < len(self.row_of) and self.row_of[id] >= 0

    def value(self, x: Pending) -> torch.Tensor:
        """A computed value: a view of its row."""
        return self.pools[x.type].rows[int(self.row_of[x.id])]

    # -- launches -----------------------------------------------------------------------------------------------------

    def run(self, lines: Lines, numbers: Sequence[bytes], ids: int) -> None:
        """Compute all lines; `numbers` are plain numbers that are values, as `State.take_numbers` gives them, and `ids` are
        given out so far."""
        started, before = time.perf_counter(), self.counts.seconds.scheduling + self.counts.seconds.gathers
        if ids > len(self.row_of):
            grown = np.full(max(ids, 2 * len(self.row_of)), -1, dtype=np.int64)
            grown[: len(self.row_of)] = self.row_of
            self.row_of = grown
        self._take_given(numbers)
        more: Counter[Type] = Counter()
        for block, _, depths, _ in lines:
            more.update({t: len(depths) // 8 * n for t, n in Counter(block.outputs).items()})
        for type, rows in more.items():
            self.pools.setdefault(type, Pool.of(type)).reserve(rows)
        spent = self.counts.seconds
        launches = list(self._launches(lines))
        spent.scheduling += time.perf_counter() - started
        for block, arguments, firsts in launches:
            self._launch(block, arguments, firsts)
        spent.kernels += time.perf_counter() - started - (spent.scheduling + spent.gathers - before)

    def _take_given(self, numbers: Sequence[bytes]) -> None:
        waiting, self.waiting = self.waiting, {}
        for type, tensors in waiting.items():
            pool = self.pools.setdefault(type, Pool.of(type))
            pool.reserve(len(tensors))
            torch.stack([t for _, t in tensors], out=pool.rows[pool.used : pool.used + len(tensors)])
            self._placed(pool, [id for id, _ in tensors])
        for k, type in enumerate((INTEGER, REAL)):
            ids = np.frombuffer(numbers[2 * k], dtype=np.int64)
            if len(ids):
                pool = self.pools.setdefault(type, Pool.of(type))
                pool.reserve(len(ids))
                values = np.frombuffer(numbers[2 * k + 1], dtype=np.float64 if k else np.int64)
                pool.rows[pool.used : pool.used + len(ids)] = torch.from_numpy(values.copy())
                self._placed(pool, ids)

    def _placed(self, pool: Pool, ids: Any) -> None:
        self.row_of[ids] = np.arange(pool.used, pool.used + len(ids))
        pool.used += len(ids)

    @staticmethod
    def _launches(lines: Lines) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
        """(block, ids of arguments as launch by position, first ids of results), by depth, then by block."""
        found: list[tuple[int, int, Block, np.ndarray, np.ndarray]] = []
        for block, arguments, depths, firsts in lines:
            deep = np.frombuffer(depths, dtype=np.int64)
            order = np.argsort(deep, kind="stable")
            ids = np.frombuffer(arguments, dtype=np.int64).reshape(len(deep), -1)[order]
            first, sorted_depths = np.frombuffer(firsts, dtype=np.int64)[order], deep[order]
            cuts = [0, *(np.flatnonzero(np.diff(sorted_depths)) + 1).tolist(), len(deep)]
            for a, b in itertools.pairwise(cuts):
                found.append((int(sorted_depths[a]), block.number, block, ids[a:b], first[a:b]))
        for _, _, block, ids, first in sorted(found, key=lambda e: e[:2]):
            yield block, ids, first

    def _launch(self, block: Block, ids: np.ndarray, firsts: np.ndarray) -> None:
        count = len(firsts)
        rows = [torch.from_numpy(self.row_of[ids[:, k]]) for k in range(ids.shape[1])]
        started = time.perf_counter()
        stacked = [self._gathered(self.pools[t], r) for t, r in zip(block.inputs, rows, strict=True)]
        self.counts.seconds.gathers += time.perf_counter() - started
        self.compile(block)
        saved: tuple[Any, ...] | None = None
        leaves: list[torch.Tensor] = []
        if block.compiled is not None:
            made, saved = self._run_compiled(block, block.compiled, stacked)
        else:
            leaves = [x.detach().requires_grad_(block.grad and (x.is_floating_point() or x.is_complex())) for x in stacked]
            with torch.set_grad_enabled(block.grad):
                made = block.batched(leaves)
        starts = []
        for k, (type, x) in enumerate(zip(block.outputs, made, strict=True)):
            pool = self.pools[type]
            starts.append(pool.used)
            pool.rows[pool.used : pool.used + count] = x.detach()[:count]
            self.row_of[firsts + k] = np.arange(pool.used, pool.used + count)
            pool.used += count
        block.launches += 1
        self.counts.launches += 1
        self.counts.lines += count
        self.counts.batches.setdefault(block, []).append(count)
        if saved is not None:
            self.launches.append(Launch(block, count, tuple(rows), tuple(starts), saved=saved))
        elif any(x.requires_grad for x in made):
            self.launches.append(Launch(block, count, tuple(rows), tuple(starts), tuple(leaves), tuple(made)))

    @staticmethod
    def _run_compiled(block: Block, compiled: Compiled, stacked: list[torch.Tensor]) -> tuple[Any, tuple[Any, ...] | None]:
        """(results, what the backward reads). One instance alone runs twice: graphs hold for two and more."""
        with torch.no_grad():
            made = compiled.forward([*(_doubled(x) for x in stacked), *(s.detach() for s in block.shared)])
        results = made[: len(block.outputs)]
        return results, compiled.save(made[len(results) :]) if compiled.backward is not None else None

    def _gathered(self, pool: Pool, rows: torch.Tensor) -> torch.Tensor:
        first, count = int(rows[0]), len(rows)
        if int(rows[-1]) - first == count - 1 and bool((rows[1:] - rows[:-1] == 1).all()):
            return pool.rows[first : first + count].data  # with a version of its own: rows are never written twice
        made = pool.rows.index_select(0, rows)
        self.counts.gathered_bytes += made.numel() * made.element_size()
        return made

    # -- gradients ----------------------------------------------------------------------------------------------------

    def sources(self) -> list[torch.Tensor]:
        """The real tensors that gradients flow to: shared ones, then given ones."""
        shared = {id(s): s for x in self.launches for s in x.block.shared if s.requires_grad}
        return [*shared.values(), *(t for t, _, _ in self.wanting)]

    def backward(
        self, values: Sequence[Pending], grads: Sequence[torch.Tensor | None], sources: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Gradients of `sources` for those of some values."""
        pools = {
            t: torch.zeros_like(p.rows[: p.used])
            for t, p in self.pools.items()
            if t.dtype.is_floating_point or t.dtype.is_complex
        }
        touched = {t: np.zeros(len(g), dtype=bool) for t, g in pools.items()}
        for value, grad in zip(values, grads, strict=True):
            if grad is not None:
                row = int(self.row_of[value.id])
                pools[value.type][row] += grad
                touched[value.type][row] = True
        shared: dict[int, torch.Tensor] = {}
        for launch in reversed(self.launches):
            self._launch_backward(launch, pools, touched, shared)
        found: list[torch.Tensor | None] = [shared.get(id(s)) for s in sources[: len(sources) - len(self.wanting)]]
        for _, type, id_ in self.wanting:
            row = int(self.row_of[id_])
            found.append(pools[type][row] if touched[type][row] else None)
        return found

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
        places = [k for k, x in enumerate((*launch.leaves, *launch.block.shared)) if x.requires_grad]
        wanted = [(*launch.leaves, *launch.block.shared)[k] for k in places]
        made = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True) if pairs else ()
        return [(k, g) for k, g in zip(places, made, strict=False) if g is not None]


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.shape[0] == 1 else x
