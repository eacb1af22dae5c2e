"""What `record.cpp`, `launch.cpp` and `tasks.cpp` do, in Python, for machines without a compiler or Python's headers.

Every line goes the slow way, and every launch runs from Python.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

Scheduled = tuple[bytearray, tuple[int, ...], tuple[int, ...]]
Bucket = tuple[int, "array[int]", "array[int]"]  # a block, arguments of all its lines, first results of each


class Handle:
    """What a pending tensor consists of."""

    __slots__ = ("ancestors", "depth", "id", "state", "type", "view_of", "viewed")

    @property
    def recorder(self) -> Any:
        """The recorder of the call."""
        return self.state.recorder


class Table:
    """Types and blocks, by number."""

    def __init__(self) -> None:
        self.types = 0
        self.blocks: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.recursion: list[list[bool]] = []

    def type(self, row_bytes: int) -> int:
        """The number of a new type."""
        self.types += 1
        return self.types - 1

    def block(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
        """The number of a new block, of types of arguments and results."""
        self.blocks.append((inputs, outputs))
        self.recursion.append([False] * len(inputs))
        return len(self.blocks) - 1

    def recursive(self, block: int) -> tuple[bool, ...]:
        """Which of a block's arguments have come from itself so far."""
        return tuple(self.recursion[block])


class State:
    """What a call has recorded since it was last scheduled, and where its values are."""

    def __init__(self, recorder: Any, table: Table) -> None:
        self.recorder = recorder
        self.table = table
        self.next_id = 0
        self.computed = 0
        self.floor = 0
        self.keeps = True
        self.scheduler = 0
        self.launches: list[Scheduled] = []
        self.reused = False  # no schedules are kept here
        self.buckets: dict[tuple[int, int], tuple[array[int], array[int]]] = {}  # by depth and block: arguments, results
        self.integers: dict[int, int] = {}
        self.reals: dict[int, float] = {}
        self.waiting: dict[Any, dict[int, torch.Tensor]] = {}  # by type: real tensors that are not in their pool yet
        self.wanting: list[tuple[torch.Tensor, Any, int]] = []  # real tensors that want a gradient: type and id
        self.lifted: dict[int, tuple[torch.Tensor, Any]] = {}
        self.shared: Any = None
        self.row_of: dict[int, int] = {}
        self.rows_used: dict[int, int] = {}

    def pending(self, cls: type, type: Any, id: int, depth: int, ancestors: int) -> Any:
        """A pending tensor of this call."""
        made: Any = cls.__new__(cls)  # pyright: ignore[reportCallIssue]
        made.state, made.type, made.id, made.depth, made.view_of, made.viewed = self, type, id, depth, None, False
        made.ancestors = ancestors
        return made

    def line(self, block: int, given: list[Any], results: int) -> tuple[int, int, int]:
        """(depth, id of the first result, ancestors) of a new line."""
        depth = max((self.floor, *(x.depth for x in given if x.id >= self.computed))) + 1
        arguments, firsts = self.buckets.setdefault((depth, block), (array("q"), array("q")))
        arguments.extend(x.id for x in given)
        firsts.append(self.next_id)
        self.next_id += results
        ancestors, own = 1 << block % 64, 1 << block % 64
        for k, x in enumerate(given):
            ancestors |= x.ancestors
            self.table.recursion[block][k] |= bool(x.ancestors & own)
        return depth, firsts[-1], ancestors

    def number(self, n: int | float) -> int:
        """The id of a plain number as a value. Raises OverflowError for one that does not fit."""
        if isinstance(n, float):
            self.reals[self.next_id] = n
        elif not -(2**63) <= n < 2**63:
            raise OverflowError("a number does not fit 64 bits")
        else:
            self.integers[self.next_id] = n
        self.next_id += 1
        return self.next_id - 1

    def lift(self, cls: type, tensor: torch.Tensor, type: Any) -> Any:
        """The value of a real tensor."""
        if id(tensor) not in self.lifted:
            value = self.pending(cls, type, self.next_id, 0, 0)
            self.next_id += 1
            self.waiting.setdefault(type, {})[value.id] = tensor
            self.lifted[id(tensor)] = tensor, value
        value = self.lifted[id(tensor)][1]
        if tensor.requires_grad and torch.is_grad_enabled() and not any(t is tensor for t, _, _ in self.wanting):
            self.wanting.append((tensor, type, value.id))
        return value

    def end(self) -> bool:
        """Whether no pending tensor is left: nobody counts them here."""
        self.lifted.clear()
        return False

    def put(self, type: int, ids: tuple[int, ...]) -> int:
        """The row from which on these values lie."""
        start = self.rows_used.get(type, 0)
        self.rows_used[type] = start + len(ids)
        self.row_of.update(zip(ids, range(start, start + len(ids)), strict=True))
        return start

    def row(self, id: int) -> int:
        """Where a value lies in the pool of its type; -1 where it is not computed."""
        return self.row_of.get(id, -1) if id < self.computed else -1

    def rows(self, values: list[Any]) -> bytearray:
        """Where values lie, as int64."""
        return bytearray(array("q", [self.row_of[x.id] for x in values]).tobytes())

    def read(self, values: list[Any], kinds: dict[Any, tuple[int, int]]) -> list[Any]:
        """The numbers of computed values: none is read here."""
        return [None] * len(values)

    def used(self) -> tuple[int, ...]:
        """Rows of each type."""
        return tuple(self.rows_used.get(k, 0) for k in range(self.table.types))

    def schedule(self) -> list[tuple[int, int]]:
        """[(block, count)]: launches of what was recorded."""
        for type, values in ((0, self.integers), (1, self.reals)):
            self.put(type, tuple(values))
        found: list[tuple[int, int]] = []
        self.launches = []
        for block, arguments, firsts in self._by_agenda() if self.scheduler == 1 else self._by_depth():
            inputs, outputs = self.table.blocks[block]
            count, rows, side = len(firsts), array("q"), []
            for k in range(len(inputs)):
                column = [self.row_of[id] for id in arguments[k :: len(inputs)]]
                side.append(column[0] if column == list(range(column[0], column[0] + count)) else -1)
                rows.extend(column)
            starts = tuple(self.put(type, tuple(first + k for first in firsts)) for k, type in enumerate(outputs))
            found.append((block, count))
            self.launches.append((bytearray(rows.tobytes()), starts, tuple(side)))
        self.buckets = {}
        self.computed = self.next_id
        return found

    def scheduled(self, launch: int) -> Scheduled:
        """(rows of its arguments as int64, first rows of its results, first rows of arguments that lie side by side, else
        -1)"""
        return self.launches[launch]

    def _by_depth(self) -> list[Bucket]:
        return [(block, arguments, firsts) for (_, block), (arguments, firsts) in sorted(self.buckets.items())]

    def _by_agenda(self) -> list[Bucket]:
        """Of the blocks with lines that are ready, the one whose lines are least deep in the mean, with all of those."""
        lines: list[tuple[int, int, array[int]]] = []  # first result, block, arguments
        for (_, block), (arguments, firsts) in self.buckets.items():
            arity = len(self.table.blocks[block][0])
            lines += [(first, block, arguments[i * arity : (i + 1) * arity]) for i, first in enumerate(firsts)]
        lines.sort()
        maker: dict[int, int] = {}
        depths: list[int] = []
        waits: list[int] = []
        users: list[list[int]] = [[] for _ in lines]
        for n, (first, block, arguments) in enumerate(lines):
            before = [maker[a] for a in arguments if a in maker]
            for m in before:
                users[m].append(n)
            waits.append(len(before))
            depths.append(max((depths[m] + 1 for m in before), default=0))
            maker.update({first + k: n for k in range(len(self.table.blocks[block][1]))})
        mean = {b: fmean(d for d, line in zip(depths, lines, strict=True) if line[1] == b) for b in {b for _, b, _ in lines}}
        ready: dict[int, list[int]] = {}
        for n, (_, block, _) in enumerate(lines):
            if not waits[n]:
                ready.setdefault(block, []).append(n)
        found: list[Bucket] = []
        while ready:
            best = min(ready, key=lambda b: (mean[b], b))
            run = ready.pop(best)
            found.append((best, array("q", [a for n in run for a in lines[n][2]]), array("q", [lines[n][0] for n in run])))
            for user in (u for n in run for u in users[n]):
                waits[user] -= 1
                if not waits[user]:
                    ready.setdefault(lines[user][1], []).append(user)
        return found

    def numbers(self, integers: int, reals: int) -> None:
        """Write the plain numbers that are values into their rows of the pools at these addresses."""
        for id, n in self.integers.items():
            ctypes.c_int64.from_address(integers + 8 * self.row_of[id]).value = n
        for id, x in self.reals.items():
            ctypes.c_float.from_address(reals + 4 * self.row_of[id]).value = x
        self.integers, self.reals = {}, {}


@dataclass(eq=False)
class Task:
    """A generator, and who waits for it: another task, or the call, in its `slot`. `floor` and `grad` are what it left when
    it waited."""

    generator: Generator[Any, Any, Any]
    parent: Task | None
    slot: int
    floor: int
    grad: bool
    left: int = 0
    results: list[Any] = field(default_factory=list)
    error: tuple[int, Exception] | None = None


class Tasks:
    """The tasks of one call."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.forks = 0
        self.results: list[Any] = []
        self.grad = torch.is_grad_enabled()
        self.ready: list[tuple[Task, Any]] = []
        self.waiting: list[Task] = []
        self.asked: list[Any] = []  # what for

    def start(self, program: Callable[..., Any], instances: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Begin with all instances; gives what they ask for."""
        self.results = [None] * len(instances)
        self.ready = [(Task(program(*given), None, i, 0, self.grad), None) for i, given in enumerate(instances)][::-1]
        return self._all_ready()

    def resume(self, values: list[Any]) -> list[Any]:
        """Go on with the values of what was asked for; gives what is asked for next."""
        self.ready = list(zip(self.waiting, values, strict=True))[::-1]
        return self._all_ready()

    def close(self) -> None:
        """End all that have not ended."""
        for task in (*(t for t, _ in self.ready), *self.waiting):
            task.generator.close()
        self.ready, self.waiting, self.asked = [], [], []

    def _all_ready(self) -> list[Any]:
        self.waiting, self.asked = [], []
        while self.ready:
            task, value = self.ready.pop()
            self.state.floor = task.floor
            torch._C._set_grad_enabled(task.grad)
            try:
                wanted = self._resumed(task, value)
            except StopIteration as end:
                self._end(task, end.value, None)
                continue
            except Exception as error:
                torch._C._set_grad_enabled(self.grad)
                self._end(task, None, error)
                continue
            task.floor, task.grad = self.state.floor, torch.is_grad_enabled()
            torch._C._set_grad_enabled(self.grad)
            if type(wanted) is tuple:
                self._fork(task, wanted)
            else:
                self.waiting.append(task)
                self.asked.append(wanted)
        return self.asked

    @staticmethod
    def _resumed(task: Task, value: Any) -> Any:
        if task.error is None:
            return task.generator.send(value)
        (_, error), task.error = task.error, None
        return task.generator.throw(error)

    def _fork(self, task: Task, calls: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]) -> None:
        self.forks += 1
        if not calls:
            self.ready.append((task, ()))
            return
        task.left = len(calls)
        task.results = [None] * task.left
        self.ready += [(Task(fn(*args), task, i, task.floor, task.grad), None) for i, (fn, args) in enumerate(calls)][::-1]

    def _end(self, task: Task, value: Any, error: Exception | None) -> None:
        parent = task.parent
        if parent is None:
            if error is not None:
                error.add_note(f"plait.autobatch: this was raised in instance {task.slot}")
                raise error
            self.results[task.slot] = value
            return
        parent.results[task.slot] = value
        if error is not None and (parent.error is None or task.slot < parent.error[0]):
            parent.error = task.slot, error
        parent.left -= 1
        if parent.left == 0:
            self.ready.append((parent, tuple(parent.results)))


def enter(state: State | None) -> None:
    """Nothing: there are no quick calls."""


def pending_in(results: Any, cls: type) -> None:
    """Nothing: results are looked through as torch does."""


Quick = None
