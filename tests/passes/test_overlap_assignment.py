"""Work beside collectives: what the greedy assignment keeps, and how near it comes to the best."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from plait.passes.overlap.assignment import Work, assign, hidden


def test_best_fit() -> None:
    works = [Work(5, (0, 1)), Work(2, (0, 1)), Work(3, (0, 1))]
    assert assign([5, 5], works) == ((0,), (1, 2))


def test_work_that_only_an_early_collective_can_hide_goes_there() -> None:
    works = [Work(4, (0, 1)), Work(3, (0,))]
    assert assign([4, 4], works) == ((1,), (0,))


def test_what_work_needs_comes_before_it() -> None:
    works = [Work(1, (0, 1)), Work(3, (1,), needs=(0,)), Work(2, (1,), needs=(1,))]
    placed = assign([0.5, 9], works)
    assert placed == ((0,), (1, 2)) or placed == ((), (0, 1, 2))


def test_nothing_large_is_put_beside_what_is_nearly_hidden() -> None:
    assert assign([5, 1], [Work(4.5, (0, 1)), Work(3, (0, 1))]) == ((0,), (1,))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[Work]]:
    collectives = draw(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=3))
    works: list[Work] = []
    for i in range(draw(st.integers(0, 5))):
        first = draw(st.integers(0, len(collectives) - 1))
        beside = tuple(range(first, draw(st.integers(first, len(collectives)))))
        needs = tuple(j for j in range(i) if draw(st.booleans()) and draw(st.booleans()))
        works.append(Work(float(draw(st.integers(1, 9))), beside, needs))
    return collectives, works


def allowed(works: list[Work], placed: tuple[tuple[int, ...], ...]) -> bool:
    """Each piece once, where it may be, after what it needs that was placed at all."""
    order = [(i, k) for k, mine in enumerate(placed) for i in mine]
    at = {i: n for n, (i, _) in enumerate(order)}
    return (
        len(at) == len(order)
        and all(k in works[i].beside for i, k in order)
        and all(j in at and at[j] < at[i] for i, _ in order for j in works[i].needs)
    )


def best(collectives: list[float], works: list[Work]) -> float:
    """By trying all."""
    found = 0.0
    for where in itertools.product(range(len(collectives) + 1), repeat=len(works)):
        placed = tuple(tuple(i for i in range(len(works)) if where[i] == k) for k in range(len(collectives)))
        if allowed(works, placed):
            found = max(found, hidden(collectives, works, placed))
    return found


@given(problems())
def test_every_assignment_is_allowed_and_none_beats_the_best(problem: tuple[list[float], list[Work]]) -> None:
    collectives, works = problem
    placed = assign(collectives, works)
    assert allowed(works, placed)
    assert hidden(collectives, works, placed) <= best(collectives, works)


@settings(max_examples=300)
@given(problems())
def test_half_of_the_best_is_hidden_where_work_may_go_anywhere(problem: tuple[list[float], list[Work]]) -> None:
    collectives, works = problem
    free = [Work(work.seconds, tuple(range(len(collectives)))) for work in works]
    assert hidden(collectives, free, assign(collectives, free)) >= 0.5 * best(collectives, free)


def test_long_work_is_not_spent_on_a_short_collective() -> None:
    assert assign([1, 3], [Work(3, (0, 1))]) == ((), (0,))
