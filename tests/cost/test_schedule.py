"""Schedules simulated: starts and ends, exposed communication, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait.cost.schedule import Span, Task, Timeline, duration, simulate
from plait.errors import CircularSchedule

OVERLAPPED = (
    Task("a", "compute", 2.0),
    Task("send", "network", 3.0, after=(0,)),
    Task("b", "compute", 1.0),
    Task("c", "compute", 1.0, after=(1,)),
)


def test_streams_run_in_order_and_wait_for_what_they_need() -> None:
    line = simulate(OVERLAPPED)
    assert line.spans == (Span(0, 2), Span(2, 5), Span(2, 3), Span(5, 6))
    assert line.seconds == 6 and line.idle("compute") == [Span(3, 5)] and line.idle("network") == [Span(0, 2), Span(5, 6)]
    assert line.exposed({"network"}, {"compute"}) == 2


def test_streams_that_run_at_once_slow_each_other() -> None:
    line = simulate(OVERLAPPED, slowdown={("compute", "network"): 2.0})
    assert line.spans == (Span(0, 2), Span(2, 5), Span(2, 4), Span(5, 6))
    both = simulate(OVERLAPPED, slowdown={("compute", "network"): 2.0, ("network", "compute"): 1.5})
    # 2 s at two thirds of the pace leave 3 - 4/3 of the sending
    assert both.spans[2] == Span(2, 4) and both.spans[1].end == pytest.approx(4 + 3 - 4 / 3)


def test_launches_that_wait_for_each_other_are_an_error_that_names_them() -> None:
    tasks = [Task("a", "x", 1, after=(2,)), Task("b", "x", 1), Task("c", "y", 1, after=(1,))]
    with pytest.raises(CircularSchedule, match=r"a on x waits for c; c on y waits for b"):
        simulate(tasks)


def test_memory_lives_from_its_writer_to_its_last_reader() -> None:
    tasks = [
        Task("a", "s", 1, writes=(("x", 100),)),
        Task("b", "s", 1, reads=("x",), writes=(("y", 50),), scratch=7),
        Task("c", "s", 1, reads=("y",), writes=(("z", 120),)),
    ]
    assert simulate(tasks).peak_bytes == 170
    assert simulate(tasks, resident=1000).peak_bytes == 1170
    assert simulate(tasks, kept=["x"]).peak_bytes == 270


def test_a_trace_has_a_thread_for_each_stream() -> None:
    events = simulate(OVERLAPPED).trace(process=3)
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"predicted", "compute", "network"}
    assert [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"][1] == ("send", 2e6, 3e6)
    assert {e["pid"] for e in events} == {3}


def test_nothing_takes_no_time() -> None:
    assert simulate([]).seconds == 0 and simulate([]).peak_bytes == 0
    assert simulate([Task("a", "s", 0.0), Task("b", "s", 0.0, after=(0,))]).spans == (Span(0, 0), Span(0, 0))


@st.composite
def schedules(draw: st.DrawFn) -> list[Task]:
    count = draw(st.integers(1, 12))
    tasks: list[Task] = []
    for i in range(count):
        after = tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else ()
        stream, seconds = draw(st.sampled_from("abc")), draw(st.integers(0, 9))
        reads = tuple(f"v{j}" for j in after)
        tasks.append(Task(f"t{i}", stream, seconds, after, reads, ((f"v{i}", draw(st.integers(0, 99))),)))
    return tasks


@given(schedules())
def test_every_start_is_the_end_of_something_that_it_waited_for(tasks: list[Task]) -> None:
    line = simulate(tasks)
    last: dict[str, float] = {}
    for task, span in zip(tasks, line.spans, strict=True):
        ready = max([last.get(task.stream, 0.0), *(line.spans[j].end for j in task.after)])
        assert span.start == ready and span.seconds == task.seconds
        last[task.stream] = span.end
    assert line.peak_bytes == _alive_at_most(line)
    for stream in set("abc"):
        everything = line.busy({stream}) + line.idle(stream)
        assert sum(s.seconds for s in everything) == pytest.approx(line.seconds)
    assert 0 <= line.exposed({"a"}, {"b", "c"}) <= sum(s.seconds for s in line.busy({"a"}))


@st.composite
def tangled(draw: st.DrawFn) -> list[Task]:
    """Tasks in any order, some of which may wait for each other."""
    tasks = draw(schedules())
    count = len(tasks)
    order = draw(st.permutations(range(count)))
    more = draw(st.lists(st.tuples(*[st.integers(0, count - 1)] * 2), max_size=2))
    after = {i: {*tasks[i].after, *(b for a, b in more if a == i)} for i in range(count)}
    return [replace(tasks[i], after=tuple(order.index(j) for j in after[i])) for i in order]


@given(tangled())
def test_streams_that_do_not_slow_each_other_take_the_short_way_to_the_same_times(tasks: list[Task]) -> None:
    none = {("d", "e"): 2.0}  # of streams that do not occur: the long way
    try:
        wanted = simulate(tasks, slowdown=none)
    except CircularSchedule as error:
        with pytest.raises(CircularSchedule) as found:
            simulate(tasks)
        assert str(found.value) == str(error)
        return
    for line in (simulate(tasks), simulate(tasks, slowdown={("a", "b"): 1.0})):
        for span, other in zip(line.spans, wanted.spans, strict=True):
            assert (span.start, span.end) == pytest.approx((other.start, other.end))
        assert line.peak_bytes == wanted.peak_bytes
    assert duration(tasks) == pytest.approx(duration(tasks, slowdown=none)) == pytest.approx(wanted.seconds)


@given(schedules(), st.sampled_from([1.0, 1.3, 2.0]))
def test_slowing_down_never_shortens_a_task(tasks: list[Task], factor: float) -> None:
    slow = simulate(tasks, slowdown={("a", "b"): factor, ("b", "a"): factor})
    for task, span in zip(tasks, slow.spans, strict=True):
        assert task.seconds * (1 - 1e-9) <= span.seconds <= task.seconds * factor * (1 + 1e-9)


def _alive_at_most(line: Timeline) -> int:
    """Bytes alive, looked at just after each start."""
    until: dict[object, float] = {}
    for task, span in zip(line.tasks, line.spans, strict=True):
        for buffer in (*task.reads, *(b for b, _ in task.writes)):
            until[buffer] = max(until.get(buffer, 0), span.end)
    most = 0
    for moment in {span.start for span in line.spans}:
        alive = sum(
            size
            for task, span in zip(line.tasks, line.spans, strict=True)
            for buffer, size in task.writes
            if span.start <= moment and (until[buffer] > moment or until[buffer] == span.start)
            and not (until[buffer] == span.start < moment)
        )  # fmt: skip
        most = max(most, alive)
    return most
