"""Which work goes beside which collective: a generalised assignment, solved greedily and then improved move by move.

Collectives run one after the other; work that a collective does not wait for, and that does not wait for it, may run beside
it. Each piece of work goes beside one collective at most. What is hidden is the sum over collectives of the shorter of its
seconds and those of the work beside it. Best fit (Lancet, MLSys 2024, algorithm 1) with what its code adds: work becomes
available once the work that it needs was placed; a collective takes nothing that is more than twice what is left of it, when
it has something; work that no later collective could hide is placed at its last one. Best fit looks at one collective at a
time and may spend long work on a short one, so pieces are then moved one by one as long as more is hidden: where no work
needs other work, this is at least half of the most that could be hidden (a local optimum of submodular welfare).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LARGE = 2.0
"""Work of so many times the seconds that are left of a collective is no fit."""


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work: seconds, the collectives that may hide it (ascending positions), pieces that must come before it and
    are listed before it."""

    seconds: float
    beside: tuple[int, ...]
    needs: tuple[int, ...] = ()


def assign(collectives: Sequence[float], works: Sequence[Work]) -> tuple[tuple[int, ...], ...]:
    """For each collective, given by its seconds in order, the pieces of work beside it, ascending, which keeps needs."""
    where = _moved(collectives, works, _best_fit(collectives, works))
    return tuple(tuple(i for i in range(len(works)) if where.get(i) == k) for k in range(len(collectives)))


def _best_fit(collectives: Sequence[float], works: Sequence[Work]) -> dict[int, int]:
    """Piece -> collective."""
    left = dict(enumerate(works))
    where: dict[int, int] = {}
    for k, seconds in enumerate(collectives):
        room, some = seconds, False

        def take(i: int, at: int = k) -> float:
            """Place a piece with all that it still needs; its seconds."""
            total = sum(take(j) for j in works[i].needs if j in left)
            where[i] = at
            return total + left.pop(i).seconds

        for i in [i for i, work in left.items() if work.beside and work.beside[-1] == k]:
            if i in left and _together(i, works, left, k):
                room, some = room - take(i), True
        while room > 0:
            fits = [i for i, work in left.items() if k in work.beside and not any(j in left for j in work.needs)]
            best = min(fits, key=lambda i: abs(room - works[i].seconds), default=None)
            if best is None or (some and works[best].seconds > LARGE * room):
                break
            room, some = room - take(best), True
    return where


def _moved(collectives: Sequence[float], works: Sequence[Work], where: dict[int, int]) -> dict[int, int]:
    """An assignment after moving one piece at a time, that which hides most more, until none hides more."""
    load = [0.0] * len(collectives)
    for i, k in where.items():
        load[k] += works[i].seconds
    later: dict[int, list[int]] = {}
    for i, work in enumerate(works):
        for j in work.needs:
            later.setdefault(j, []).append(i)

    def gain(i: int, k: int) -> float:
        seconds = works[i].seconds
        more = min(collectives[k], load[k] + seconds) - min(collectives[k], load[k])
        if i not in where:
            return more
        at = where[i]
        return more - min(collectives[at], load[at]) + min(collectives[at], load[at] - seconds)

    def may(i: int, k: int) -> bool:
        needs = all(j in where and where[j] <= k for j in works[i].needs)
        return needs and where.get(i) != k and all(where.get(j, k) >= k for j in later.get(i, ()))

    least = 1e-9 * sum(collectives)
    while True:
        moves = [(gain(i, k), i, k) for i, work in enumerate(works) for k in work.beside if may(i, k)]
        best, i, k = max(moves, default=(0.0, -1, -1))
        if best <= least:
            return where
        if i in where:
            load[where[i]] -= works[i].seconds
        where[i] = k
        load[k] += works[i].seconds


def _together(i: int, works: Sequence[Work], left: Mapping[int, Work], k: int) -> bool:
    """Whether a piece and all that it still needs may run beside collective k."""
    return k in works[i].beside and all(_together(j, works, left, k) for j in works[i].needs if j in left)


def hidden(collectives: Sequence[float], works: Sequence[Work], placed: Sequence[Sequence[int]]) -> float:
    """Seconds of the collectives that lie behind work."""
    return sum(min(seconds, sum(works[i].seconds for i in mine)) for seconds, mine in zip(collectives, placed, strict=True))


__all__ = ["Work", "assign", "hidden"]
