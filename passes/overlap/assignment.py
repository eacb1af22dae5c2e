"""Which work goes beside which collective: a generalised assignment, solved greedily.

Collectives run one after the other; work that a collective does not wait for, and that does not wait for it, may run beside
it. Each piece of work goes beside one collective at most. What is hidden is the sum over collectives of the shorter of its
seconds and those of the work beside it. Best fit (Lancet, MLSys 2024, algorithm 1) with what its code adds: work becomes
available once the work that it needs was placed; a collective takes nothing that is more than twice what is left of it, when
it has something; work that no later collective could hide is placed at its last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LARGE = 2.0
"""Work of so many times the seconds that are left of a collective is no fit."""


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work: seconds, the collectives that may hide it (ascending positions), pieces that must come before it."""

    seconds: float
    beside: tuple[int, ...]
    needs: tuple[int, ...] = ()


def assign(collectives: Sequence[float], works: Sequence[Work]) -> tuple[tuple[int, ...], ...]:
    """For each collective, given by its seconds in order, the pieces of work beside it, in an order that keeps needs."""
    left = dict(enumerate(works))
    placed: list[list[int]] = []
    for k, seconds in enumerate(collectives):
        mine: list[int] = []
        room = seconds

        def take(i: int, into: list[int] = mine) -> float:
            """Place a piece with all that it still needs; its seconds."""
            total = sum(take(j) for j in works[i].needs if j in left)
            into.append(i)
            return total + left.pop(i).seconds

        for i in [i for i, work in left.items() if work.beside and work.beside[-1] == k]:
            if i in left and _together(i, works, left, k):
                room -= take(i)
        while room > 0:
            fits = [i for i, work in left.items() if k in work.beside and not any(j in left for j in work.needs)]
            best = min(fits, key=lambda i: abs(room - works[i].seconds), default=None)
            if best is None or (mine and works[best].seconds > LARGE * room):
                break
            room -= take(best)
        placed.append(mine)
    return tuple(map(tuple, placed))


def _together(i: int, works: Sequence[Work], left: Mapping[int, Work], k: int) -> bool:
    """Whether a piece and all that it still needs may run beside collective k."""
    return k in works[i].beside and all(_together(j, works, left, k) for j in works[i].needs if j in left)


def hidden(collectives: Sequence[float], works: Sequence[Work], placed: Sequence[Sequence[int]]) -> float:
    """Seconds of the collectives that lie behind work."""
    return sum(min(seconds, sum(works[i].seconds for i in mine)) for seconds, mine in zip(collectives, placed, strict=True))


__all__ = ["Work", "assign", "hidden"]
