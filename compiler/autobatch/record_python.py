"""What `record.cpp` and `launch.cpp` do, in Python, for machines without a compiler or Python's headers.

Every line goes the slow way, and every launch runs from Python.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Any


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
        self.reused = False  # no schedules are kept here
        self.buckets: dict[tuple[int, int], tuple[array[int], array[int]]] = {}  # by depth and block: arguments, results
        self.integers: dict[int, int] = {}
        self.reals: dict[int, float] = {}
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

    def lifted(self, tensor: Any, value: Any) -> None:
        """Nothing: there are no quick calls."""

    def end(self) -> bool:
        """Whether no pending tensor is left: nobody counts them here."""
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

    def schedule(self) -> tuple[list[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]], bytearray]:
        """([(block, count, where the rows of its arguments begin, first rows of its results, first rows of arguments that
        lie side by side, else -1)], rows as int64): what was recorded, by depth, then by block."""
        for type, values in ((0, self.integers), (1, self.reals)):
            self.put(type, tuple(values))
        found = []
        rows = array("q")
        for (_, block), (arguments, firsts) in sorted(self.buckets.items()):
            inputs, outputs = self.table.blocks[block]
            count, begin, side = len(firsts), len(rows), []
            for k in range(len(inputs)):
                column = [self.row_of[id] for id in arguments[k :: len(inputs)]]
                side.append(column[0] if column == list(range(column[0], column[0] + count)) else -1)
                rows.extend(column)
            starts = tuple(self.put(type, tuple(first + k for first in firsts)) for k, type in enumerate(outputs))
            found.append((block, count, begin, starts, tuple(side)))
        self.buckets = {}
        self.computed = self.next_id
        return found, bytearray(rows.tobytes())

    def numbers(self, integers: int, reals: int) -> None:
        """Write the plain numbers that are values into their rows of the pools at these addresses."""
        for id, n in self.integers.items():
            ctypes.c_int64.from_address(integers + 8 * self.row_of[id]).value = n
        for id, x in self.reals.items():
            ctypes.c_float.from_address(reals + 4 * self.row_of[id]).value = x
        self.integers, self.reals = {}, {}


def enter(state: State | None) -> None:
    """Nothing: there are no quick calls."""


def pending_in(results: Any, cls: type) -> None:
    """Nothing: results are looked through as torch does."""


Quick = None
