"""The roofline: which cache a buffer comes from, and what bounds a step."""

import pytest
from plait.cost.roofline import Access, Ceilings, Demand, Level, bounds, reuse_distances

INF = float("inf")
MACHINE = Ceilings(2, 100.0, (Level("l2", 50, 20.0, 10.0), Level("l3", 500, 4.0, 2.0), Level("memory", INF, 1.0, 0.5)), 3.0)


def test_a_buffer_is_as_far_as_what_was_touched_since_its_last_use() -> None:
    steps = [[("x", 10), ("w", 100), ("h", 20)], [("h", 20), ("v", 200), ("y", 30)]]
    first, second = reuse_distances(steps)
    # x was last used a round ago: since then w, h, v and y; what the step itself touches besides does not count
    assert first == [10 + 100 + 20 + 200 + 30, 100 + 20 + 200 + 30, 20 + 200 + 30]
    assert second[0] == 20


def test_the_order_of_uses_counts_not_the_number() -> None:
    assert reuse_distances([[("a", 5)], [("b", 7)], [("b", 7)], [("b", 7)]]) == [[12], [12], [7], [7]]
    assert reuse_distances([[("a", 5)]]) == [[5]]
    assert reuse_distances([]) == []


def test_the_longer_of_arithmetic_and_memory_bounds_a_step() -> None:
    heavy = Demand(1000, 1000, (Access("a", read=10), Access("b", written=10)))
    (found,) = bounds([heavy], MACHINE)
    assert (found.compute, found.memory, found.kind) == (10.0, 10 / 20 + 10 / 10, "compute")
    assert found.seconds == 10.0 and found.predicted == 13.0


def test_operations_that_are_no_multiply_adds_run_at_half_the_rate() -> None:
    (found,) = bounds([Demand(100, 40, ())], MACHINE)
    assert found.compute == pytest.approx(40 / 100 + 60 / 50)


def test_weights_that_no_cache_holds_come_from_memory_in_every_call() -> None:
    layers = [Demand(0, 0, (Access(f"w{i}", read=300), Access("h", read=10, written=10))) for i in range(4)]
    for found in bounds(layers, MACHINE):
        assert found.memory == pytest.approx(300 / 1.0 + 10 / 20.0 + 10 / 10.0) and found.kind == "memory"
    small = [Demand(0, 0, (Access(f"w{i}", read=100),)) for i in range(4)]
    assert [f.memory for f in bounds(small, MACHINE)] == [100 / 4.0] * 4


def test_little_work_is_expected_on_one_thread() -> None:
    (found,) = bounds([Demand(10, 10, ())], MACHINE)
    assert found.seconds == 0.1 and found.predicted == pytest.approx(0.2)
