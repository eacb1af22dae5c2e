"""Micro-batch schedules on paper: seconds, bubbles, bytes and sums of gradients that can be computed by hand."""

from __future__ import annotations

import random

import pytest
from plait.cost.curve import Curve
from plait.cost.microbatches import (
    Times,
    bidirectional,
    gpipe,
    interleaved,
    one_f_one_b,
    self_conditioned,
    zero_bubble,
)
from plait.cost.schedule import Span, Timeline
from plait.cost.stages import StageCost, bubble_share, bubbles, compute, link, peak_bytes, run

SEED = 20261202
SHAPES = [(1, 1), (1, 4), (2, 2), (2, 5), (3, 3), (4, 8), (5, 2)]


def named(line: Timeline) -> dict[str, Span]:
    return {task.name: span for task, span in zip(line.tasks, line.spans, strict=True)}


def spans(line: Timeline, stream: str) -> dict[str, Span]:
    return {task.name: span for task, span in zip(line.tasks, line.spans, strict=True) if task.stream == stream}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_stages_take_what_is_known(shape: tuple[int, int]) -> None:
    stages, count = shape
    costs = [StageCost(1.0, 2.0, 1.0)] * stages
    for one in (gpipe(*shape), one_f_one_b(*shape)):
        line = run(one, costs)
        assert line.seconds == 3 * (count + stages - 1)
        assert bubble_share(one, line) == pytest.approx((stages - 1) / (count + stages - 1))
        assert bubbles(one, line)[stages - 1][:1] == ([Span(0, stages - 1)] if stages > 1 else [])
    if count >= stages:
        # ZB-H1: of the 3 (S - 1) of a ramp only the forwards are left
        assert run(zero_bubble(*shape), costs).seconds == 3 * count + stages - 1
    if count % stages == 0:
        halves = [StageCost(0.5, 1.0)] * 2 * stages
        assert run(interleaved(*shape), halves).seconds == 3 * (count + (stages - 1) / 2)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_with_more_in_flight_zero_bubble_has_none(stages: int) -> None:
    count = 2 * stages + 1
    one = zero_bubble(stages, count, in_flight=2 * stages - 1)
    line = run(one, [StageCost(1.0, 2.0, 1.0)] * stages)
    for s in range(stages):
        assert line.busy({compute(s)}) == [Span(s, s + 3 * count)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_1f1b_keeps_as_many_micro_batches_as_stages_follow_and_gpipe_all(shape: tuple[int, int]) -> None:
    stages, count = shape
    costs = [StageCost(1.0, 2.0, saved=100, resident=7 * (s + 1)) for s in range(stages)]
    few = [min(count, stages - s) for s in range(stages)]
    for one, kept in ((gpipe(*shape), [count] * stages), (one_f_one_b(*shape), few)):
        assert peak_bytes(one, costs, run(one, costs)) == [100 * n + 7 * (s + 1) for s, n in enumerate(kept)]


def test_what_w_needs_stays_from_i_to_w() -> None:
    cost = StageCost(1.0, 2.0, 1.0, saved=100, saved_for_weight=10)
    one = zero_bubble(1, 3)
    assert str(one) == "rank 0: 0F0 0I0 0W0 0F1 0I1 0W1 0F2 0I2 0W2"
    assert peak_bytes(one, [cost], run(one, [cost])) == [110]  # while I runs
    late = zero_bubble(1, 3, in_flight=3)
    assert str(late).startswith("rank 0: 0F0 0F1 0F2 0I0")
    assert peak_bytes(late, [cost], run(late, [cost])) == [310]


def test_values_travel_on_links_one_after_the_other_and_beside_computing() -> None:
    costs = [StageCost(1.0, 2.0, send=3.0), StageCost(1.0, 2.0, send_back=0.5)]
    line = run(gpipe(2, 2), costs)
    assert spans(line, link(0, 1)) == {"0F0 sent": Span(1, 4), "0F1 sent": Span(4, 7)}
    assert spans(line, compute(1)) == {"1F0": Span(4, 5), "1F1": Span(7, 8), "1B0": Span(8, 10), "1B1": Span(10, 12)}
    assert spans(line, link(1, 0)) == {"1B0 sent": Span(10, 10.5), "1B1 sent": Span(12, 12.5)}
    assert line.seconds == 14.5
    assert bubbles(gpipe(2, 2), line) == [[Span(2, 10.5)], [Span(0, 4), Span(5, 7), Span(12, 14.5)]]
    assert {task.stream for task in run(interleaved(1, 2), costs).tasks} == {compute(0)}  # both stages on one rank


def test_only_the_gradient_of_inputs_travels_where_the_backward_is_in_two() -> None:
    costs = [StageCost(1.0, 3.0, 2.0), StageCost(1.0, 3.0, 2.0, send_back=1.0)]
    line = run(zero_bubble(2, 1), costs)
    last, first = spans(line, compute(1)), spans(line, compute(0))
    assert last["1I0"] == Span(2, 3) and last["1W0"] == Span(3, 5)
    assert spans(line, link(1, 0)) == {"1I0 sent": Span(3, 4)} and first["0I0"] == Span(4, 5)


def test_gradients_are_summed_behind_the_last_backward_and_parameters_change_behind_that() -> None:
    costs = [StageCost(1.0, 2.0, sync=4.0, update=0.5), StageCost(1.0, 2.0, sync=4.0, update=0.5)]
    line = run(one_f_one_b(2, 2), costs)
    assert spans(line, "sums 1") == {"1 sum": Span(7, 11)} and spans(line, "sums 0") == {"0 sum": Span(9, 13)}
    assert spans(line, compute(1))["1 update"] == Span(11, 11.5) and line.seconds == 13.5
    both = run(interleaved(1, 1), costs)  # two stages of a rank share its stream for sums
    assert spans(both, "sums 0") == {"1 sum": Span(4, 8), "0 sum": Span(8, 12)}


def test_self_conditioning_runs_a_forward_more_whose_result_goes_back() -> None:
    costs = [StageCost(1.0, 2.0, send=0.25), StageCost(1.0, 2.0, send=0.5)]
    line = run(self_conditioned(one_f_one_b(2, 1)), costs)
    assert spans(line, compute(0))["0C0"] == Span(0, 1) and spans(line, compute(1))["1C0"] == Span(1.25, 2.25)
    assert spans(line, link(1, 0))["1C0 sent"] == Span(2.25, 2.75)
    assert spans(line, compute(0))["0F0"].start == 2.75
    long = run(self_conditioned(one_f_one_b(2, 40)), [StageCost(1.0, 2.0)] * 2)
    assert 160 < long.seconds < 170  # 4 for each micro-batch, and no wait for what goes back but at the ends
    saved = [StageCost(1.0, 2.0, saved=10)] * 2
    one = self_conditioned(one_f_one_b(2, 4))
    assert peak_bytes(one, saved, run(one, saved)) == [20, 10]  # no backward follows, so that nothing is kept


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_backbones_fill_each_others_bubbles(shape: tuple[int, int]) -> None:
    stages, count = shape
    costs = [StageCost(1.0, 2.0, saved=10, resident=100 + s) for s in range(2 * stages)]
    one = bidirectional(*shape)
    line = run(one, costs)
    apart = 2 * run(one_f_one_b(*shape), costs[:stages]).seconds
    assert 6 * count <= line.seconds <= apart and (stages == 1 or line.seconds < apart)
    assert all(n >= 2 * 100 + 2 * stages - 1 for n in peak_bytes(one, costs, line))  # a rank has a stage of each
    conditioned = self_conditioned(one)
    line = run(conditioned, costs)
    done = named(line)
    for chain in one.chains:
        for m in range(count):
            assert done[f"{chain[-1]}C{m}"].end <= done[f"{chain[0]}F{m}"].start
    assert line.seconds >= 8 * count


def test_shares_count_devices() -> None:
    one, costs = one_f_one_b(2, 1), [StageCost(1.0, 1.0), StageCost(2.0, 2.0)]
    line = run(one, costs)
    assert bubble_share(one, line) == pytest.approx((4 + 2) / 12)
    assert bubble_share(one, line, [3, 1]) == pytest.approx((3 * 4 + 2) / 24)
    nothing = [StageCost(0.0, 0.0)] * 2
    assert bubble_share(one, run(one, nothing)) == 0.0


def test_any_schedule_runs_every_action_once_and_no_two_of_a_rank_at_once() -> None:
    for turn in range(20):
        rng = random.Random(SEED + turn)
        print(f"seed {SEED + turn}")
        stages, count = rng.randint(1, 4), rng.randint(1, 6)
        costs = [
            StageCost(rng.random(), 1 + rng.random(), rng.random(), *(rng.choice([0, rng.random()]) for _ in range(2)))
            for _ in range(2 * stages)
        ]
        times = [Times(c.forward, c.backward - c.weight, c.weight, max(c.send, c.send_back)) for c in costs]
        one = rng.choice([
            gpipe(stages, count), one_f_one_b(stages, count), zero_bubble(stages, count, times[:stages]),
            interleaved(stages, stages * count), bidirectional(stages, count, times),
        ])  # fmt: skip
        for made in (one, self_conditioned(one)):
            line = run(made, costs)
            for rank, actions in enumerate(made.ranks):
                mine = spans(line, compute(rank))
                assert list(mine) == list(map(str, actions))
                ends = [0.0, *(span.end for span in mine.values())]
                assert all(span.start >= end for span, end in zip(mine.values(), ends, strict=False))
                idle = sum(span.seconds for span in bubbles(made, line)[rank])
                assert idle + sum(span.seconds for span in mine.values()) == pytest.approx(line.seconds)
            # with what travels written down it is the same
            again = run(made.with_comms(), costs)
            assert named(again) == named(line)


def test_a_curve_goes_on_at_its_last_rate() -> None:
    flat = Curve.of([(1, 2.0), (4, 2.0)])
    assert flat.seconds(0) == flat.seconds(3) == flat.seconds(100) == 2.0 and flat.rate == float("inf")
    bent = Curve.of([(1, 1.0), (2, 1.0), (4, 2.0), (8, 10.0)])
    assert bent.seconds(16) == 10 + 8 * 2.0  # as from 4 to 8
    twice = Curve.of([(2, 3.0), (2, 1.0), (4, 5.0)])
    assert 1.0 <= twice.seconds(2) <= 3.0 and twice.seconds(3) == pytest.approx((twice.seconds(2) + 5) / 2)
