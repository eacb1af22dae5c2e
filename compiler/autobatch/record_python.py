"""What `record.cpp` does, in Python, for machines without a compiler or Python's headers. Every line goes the slow way."""

from __future__ import annotations

from array import array
from typing import Any


class Handle:
    """What a pending tensor consists of."""

    __slots__ = ("depth", "id", "recorder", "type", "view_of", "viewed")


class State:
    """What a call has recorded since it was last taken."""

    def __init__(self, recorder: Any) -> None:
        self.next_id = 0
        self.floor = 0
        self.lines: dict[int, tuple[array[int], array[int], array[int]]] = {}
        self.numbers: tuple[array[int], array[int], array[int], array[float]] = _numbers()

    def line(self, block: int, given: list[Any], results: int) -> tuple[int, int]:
        """(depth, id of the first result) of a new line."""
        arguments, depths, firsts = self.lines.setdefault(block, (array("q"), array("q"), array("q")))
        arguments.extend(x.id for x in given)
        depth = max((self.floor, *(x.depth for x in given))) + 1
        depths.append(depth)
        firsts.append(self.next_id)
        self.next_id += results
        return depth, firsts[-1]

    def number(self, n: int | float) -> int:
        """The id of a plain number as a value. Raises OverflowError for one that does not fit."""
        integer_ids, integers, real_ids, reals = self.numbers
        if isinstance(n, float):
            real_ids.append(self.next_id)
            reals.append(n)
        else:
            integers.append(n)
            integer_ids.append(self.next_id)
        self.next_id += 1
        return self.next_id - 1

    def take(self) -> list[tuple[int, bytes, bytes, bytes]]:
        """[(block, ids of arguments, depths, first ids of results)], each as bytes of int64; they are gone then."""
        lines, self.lines = self.lines, {}
        return [(block, a.tobytes(), d.tobytes(), f.tobytes()) for block, (a, d, f) in sorted(lines.items())]

    def take_numbers(self) -> tuple[bytes, bytes, bytes, bytes]:
        """(ids, integers, ids, reals) as bytes of int64 and of double; they are gone then."""
        numbers, self.numbers = self.numbers, _numbers()
        return tuple(a.tobytes() for a in numbers)  # type: ignore[return-value]


def _numbers() -> tuple[array[int], array[int], array[int], array[float]]:
    return array("q"), array("q"), array("q"), array("d")


def enter(state: State | None) -> None:
    """Nothing: there are no quick calls."""


Quick = None
