"""Collectives on their way: what they use is in use until they are waited for, and what they give only waits read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plait.runtime.check import problems
from plait.runtime.dispatch import Collectives
from plait.runtime.executor import Executable
from plait.runtime.layout import Layout
from plait.runtime.pending import WAIT, is_start, is_wait, starts
from plait.runtime.plan import KernelSpec, Launch, OutputSpec, Plan

from tests.runtime.kit import call, tensor_input, v, value
from tests.runtime.late import put_off

START = "_c10d_functional.all_reduce.default"
SIZE = 64  # bytes of a value


def started(of: int, out: int, group: str = "g") -> Any:
    return call(START, [v(of), {"c": "sum"}, {"c": group}], [out])


def waited(of: int, out: int) -> Any:
    return call(WAIT, [v(of)], [out])


def launch(*buffers: int) -> Launch:
    return Launch(f"k{len(buffers)}", buffers, ())


def plan(values: list[Any], made: list[Any], outputs: list[int], arena: int = 8 * SIZE) -> Plan:
    """A plan over one input, value 0, whose kernels read all their buffers but write the last."""
    x = value(0, "input", (16,), 0)
    kernels = [KernelSpec(f"k{n}", "cpp", "0", ("read",) * (n - 1) + ("write",)) for n in range(1, 5)]
    results = tuple(OutputSpec("value", id) for id in outputs)
    return Plan((tensor_input("x", (16,)),), (), (x, *values), tuple(made), results, tuple(kernels), arena)


def arena(id: int, slot: int) -> Any:
    return value(id, "arena", (16,), offset=slot * SIZE)


def handle(id: int) -> Any:
    return value(id, "handle", (16,))


def why(made: Plan) -> str:
    return "; ".join(problems(made))


def test_ops_that_start_and_wait() -> None:
    assert is_start(START) and not is_wait(START) and is_wait(WAIT) and not is_start(WAIT)
    assert is_start("plait.all_to_all_capacity_start.default") and not is_start("plait.all_to_all_capacity.default")
    assert not any(f(op) for f in (is_start, is_wait) for op in ("aten.mm.default", "py.add", "plait.cond"))


@pytest.mark.parametrize("late", [False, True])
def test_memory_of_an_operand_is_used_again_after_the_wait_only(late: bool) -> None:
    values = [arena(1, 0), handle(2), handle(3), arena(4, 0), value(5, "fresh", (16,))]
    between, after = launch(0, 4), waited(2, 3)
    first, second = (after, between) if late else (between, after)
    made = plan(values, [launch(0, 1), started(1, 2), first, second, launch(3, 4, 5)], [5])
    assert why(made) == ("" if late else "values 1 and 4 may share bytes of the arena while both are alive")


def test_the_last_of_several_waits_counts() -> None:
    values = [arena(1, 0), handle(2), handle(3), handle(4), arena(5, 0), value(6, "fresh", (16,))]
    made = plan(values, [launch(0, 1), started(1, 2), waited(2, 3), launch(0, 5), waited(2, 4), launch(3, 4, 5, 6)], [6])
    assert "values 1 and 5 may share bytes" in why(made)


def test_operands_in_use_may_be_read_but_not_written() -> None:
    values = [handle(1), handle(2), value(3, "fresh", (16,))]
    assert not why(plan(values, [started(0, 1), launch(0, 3), waited(1, 2)], [2, 3]))
    written = plan(values, [started(0, 1), launch(0), waited(1, 2), launch(2, 3)], [3])
    text = "step 1 writes to value 0, which the collective _c10d_functional.all_reduce.default of step 0 uses until its wait"
    assert why(written) == text
    assert not why(plan(values, [started(0, 1), waited(1, 2), launch(0), launch(2, 3)], [3]))
    view = value(4, "view", (8,), 0)
    assert "step 1 writes to value 4" in why(plan([*values, view], [started(0, 1), launch(4), waited(1, 2)], [2]))
    of_view = [started(4, 1), launch(0), waited(1, 2)]
    assert "step 1 writes to value 0" in why(plan([*values, view], of_view, [2]))


def test_a_collective_in_place_is_alone_with_its_operand() -> None:
    values = [handle(1), handle(2), value(3, "fresh", (16,))]
    in_place = call("_c10d_functional.all_reduce_.default", [v(0), {"c": "sum"}, {"c": "g"}], [1])
    assert "step 1 reads value 0, which the collective" in why(plan(values, [in_place, launch(0, 3), waited(1, 2)], [2, 3]))
    assert not why(plan(values, [in_place, waited(1, 2), launch(2, 3)], [3]))


def test_what_works_in_place_gives_its_operand_back() -> None:
    in_place = call("_c10d_functional.all_reduce_.default", [v(1), {"c": "sum"}, {"c": "g"}], [2])
    values = [arena(1, 0), handle(2), handle(3), arena(4, 0), value(5, "fresh", (16,))]
    made = [launch(0, 1), in_place, waited(2, 3), launch(0, 4), launch(3, 4, 5)]
    assert "values 1 and 4 may share bytes" in why(plan(values, made, [5]))
    assert "output 3 lies in the arena (value 1)" in why(plan(values[:3], made[:3], [3]))
    of_input = call("_c10d_functional.all_reduce_.default", [v(0), {"c": "sum"}, {"c": "g"}], [1])
    values = [handle(1), handle(2), value(3, "fresh", (16,))]
    made = [of_input, waited(1, 2), launch(0), launch(2, 3)]
    assert "step 3 reads value 2, which may lie where step 2 has written value 0" in why(plan(values, made, [3]))


def test_a_result_is_given_once() -> None:
    values, relu = [handle(1), handle(2), handle(3)], "aten.relu.default"
    twice = "gives value 1 too, a result of the collective"
    assert twice in why(plan(values, [started(0, 1), started(0, 1), waited(1, 2)], [2]))
    assert twice in why(plan(values, [started(0, 1), waited(1, 2), started(0, 1), waited(1, 3)], [2, 3]))
    assert twice in why(plan(values, [started(0, 1), call(relu, [v(0)], [1]), waited(1, 2)], [2]))
    assert twice in why(plan(values, [call(relu, [v(0)], [1]), started(0, 1), waited(1, 2)], [2]))
    assert twice in why(plan(values, [started(0, 1), waited(1, 1)], [1]))


@pytest.mark.parametrize("result", [arena(1, 0), value(1, "fresh", (16,)), value(1, "view", (16,), 0)])
def test_a_result_is_memory_of_the_collective(result: Any) -> None:
    made = plan([result, handle(2)], [started(0, 1), waited(1, 2)], [2])
    assert "has memory of its own in the plan" in why(made)


def test_only_waits_read_what_a_start_gives() -> None:
    values = [handle(1), handle(2), value(3, "fresh", (16,)), value(4, "view", (8,), 1), handle(5)]
    fine = [started(0, 1), waited(1, 2)]
    only = "which only a wait may read"
    assert only in why(plan(values, [*fine, launch(1, 3)], [3]))
    assert only in why(plan(values, [*fine, call("aten.relu.default", [v(1)], [5])], [5]))
    assert only in why(plan(values, [*fine, started(1, 5)], [2]))
    assert only in why(plan(values, [*fine, waited(4, 5)], [2]))
    assert "not yet complete" in why(plan(values, fine, [1]))
    assert "not yet complete" in why(plan(values, fine, [4]))
    assert not why(plan(values, [*fine, waited(1, 5)], [2, 5]))


def test_every_start_has_a_wait() -> None:
    assert "nothing waits for the collective" in why(plan([handle(1)], [started(0, 1)], [0]))


def test_a_wait_for_what_was_not_started_hands_its_operand_on() -> None:
    values = [arena(1, 0), handle(2), arena(3, 0), value(4, "fresh", (16,))]
    made = plan(values, [launch(0, 1), waited(1, 2), launch(0, 3), launch(2, 3, 4)], [4])
    assert "values 1 and 3 may share bytes" in why(made)
    assert "output 2 lies in the arena" in why(plan(values, [launch(0, 1), waited(1, 2)], [2]))
    assert not why(plan(values, [waited(0, 2), launch(2, 4)], [4]))


def test_a_collective_of_which_one_result_is_waited_for_does_not_hold_up_the_plan() -> None:
    both = call("_c10d_functional.all_reduce_coalesced.default", [{"l": [v(0), v(0)]}, {"c": "sum"}, {"c": "g"}], [1, 2])
    one = plan([handle(1), handle(2), handle(3)], [both, waited(2, 3)], [3])
    assert not why(one) and Collectives(one).asynchronous(both)
    assert not Collectives(plan([handle(1), handle(2)], [both], [0])).asynchronous(both)


def test_operands_are_held_until_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    put_off(monkeypatch, {START: lambda x, *_: x * 2})
    values = [handle(id) for id in range(1, 7)]
    relu = "aten.relu.default"
    made = plan(
        values,
        [call(relu, [v(0)], [1]), started(1, 2), started(0, 3), call(relu, [v(1)], [4]), waited(3, 5), waited(2, 6)],
        [4, 5, 6],
    )
    assert not why(made)
    assert [(s.step, s.wait, s.operands, s.results) for s in starts(made.steps)] == [(1, 5, (1,), (2,)), (2, 4, (0,), (3,))]
    last = Layout(made).last_use
    assert (last[0], last[1], last[2]) == (4, 5, 5)
    x = torch.randn(16)
    run = Executable(made, {}, {}, check=False)
    for _ in range(2):
        relued, twice, twice_relued = run.run([x.clone()])
        assert torch.equal(relued, x.relu()) and torch.equal(twice, 2 * x) and torch.equal(twice_relued, 2 * x.relu())


@pytest.mark.parametrize(("at", "found"), [(16, ""), (15, "which the collective"), (0, "which the collective")])
def test_beside_a_part_that_is_in_use_others_are_written(at: int, found: str) -> None:
    """Parts of one value: that which a collective reads stays as it is, the others are computed meanwhile."""
    values = [
        value(1, "arena", (32,)),
        value(2, "view", (16,), 1),
        value(3, "view", (16,), 1, offset=at),
        handle(4),
        handle(5),
    ]
    steps = [launch(0, 2), started(2, 4), launch(0, 3), waited(4, 5)]
    made = why(plan(values, steps, [5]))
    assert found in made and bool(found) == bool(made)
    whole = [launch(0, 2), started(2, 4), launch(0, 1), waited(4, 5)]
    assert "step 2 writes to value 1, which the collective" in why(plan(values, whole, [5]))
