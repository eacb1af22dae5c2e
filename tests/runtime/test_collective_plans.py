"""Plans with collectives: started early, waited for late, in the same order on all ranks."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from plait.errors import ChannelBroken, CollectiveFailed, CollectiveTimedOut, PlansDiffer
from plait.runtime import collectives
from plait.runtime.dispatch import agreements
from plait.runtime.executor import Executable
from plait.runtime.plan import Call

from tests.runtime.kit import call, make_plan, tensor_input, v, value
from tests.runtime.ranks import Ranks, on_ranks

SHAPE = (4, 64, 96)
START, WAIT = "plait.all_to_all_capacity_start.default", "_c10d_functional.wait_tensor.default"
BUFFER, ROWS = value(0, "input", SHAPE, 0), value(1, "input", (4, 2), 1, dtype="int64")
INPUTS = [tensor_input("buf", SHAPE), tensor_input("rows", (4, 2), "int64")]


def c(constant):
    return {"c": constant}


def braided(*between, group="0"):
    """buf * 2 + what comes of buf, with steps between the start of the exchange and the product."""
    handles = [value(i, "handle", SHAPE) for i in (2, 4, 5, 7)]
    values = [BUFFER, ROWS, *handles, *(value(i, "handle", (4, 2), dtype="int64") for i in (3, 6))]
    steps = [
        Call(START, (v(0), v(1), c(None), c(group)), (), (2, 3), "library", "test", "model.py:7"),
        *between,
        call("aten.mul.Tensor", [v(0), c(2.0)], [4]),
        call(WAIT, [v(2)], [5]),
        call(WAIT, [v(3)], [6]),
        call("aten.add.Tensor", [v(4), v(5)], [7]),
    ]
    return make_plan(INPUTS, sorted(values, key=lambda s: s.id), steps, [7, 6])


def inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    buf = torch.randint(-99, 99, SHAPE, generator=generator).float()
    rows = torch.randint(0, 65, (4, 2), generator=generator).sort(1).values
    return buf, rows


def expected(buf, rows):
    out, came = torch.ops.plait.all_to_all_capacity(buf, rows, None, "0")
    return buf * 2 + out, came


def runs(rank, size):
    buf, rows = inputs(rank)
    wanted = expected(buf, rows)
    run = Executable(braided(), {}, {})
    with collectives.recording() as records:
        assert all(map(torch.equal, run(buf, rows), wanted))
    (record,) = records
    sent = (rows[:, 1] - rows[:, 0])[[2, 3] if rank == 0 else [0, 1]].sum().item()
    assert record.name.startswith("plait.all_to_all_capacity_start, collective 1 of the plan")
    assert (record.group, record.bytes) == ("0", sent * 96 * 4 + 2 * 16) and record.start < record.end
    if rank == 1:
        time.sleep(0.4)
    results, times = run.profile(buf, rows)
    assert all(map(torch.equal, results, wanted))
    if rank == 0:
        took = dict(times)
        assert took[0] < 1e8 < 2e8 < took[2], "the start does not wait for the other rank"
    for _ in range(20):
        assert all(map(torch.equal, run(buf, rows), wanted))
    return True


def test_a_start_is_waited_for_where_the_plan_says():
    assert all(on_ranks(runs, 2))


def as_torch_does(rank, size):
    """all_to_all_single and all_reduce of torch, read by waits, by another op, and returned as they are."""
    x = torch.arange(8.0) + 100 * rank
    exchanged, summed = torch.empty(8), x.clone()
    dist.all_to_all_single(exchanged, x)
    dist.all_reduce(summed)
    values = [value(0, "input", (8,), 0), *(value(i, "handle", (8,)) for i in (1, 2, 3, 4, 5))]
    exchange = "_c10d_functional.all_to_all_single.default"
    splits = {"l": [{"e": 4}, {"e": 4}]}
    steps = [
        call(exchange, [v(0), splits, splits, c("0")], [1]),
        call("_c10d_functional.all_reduce.default", [v(0), c("sum"), c("0")], [2]),
        call(exchange, [v(0), splits, splits, c("0")], [3]),
        call(WAIT, [v(2)], [4]),
        call(WAIT, [v(1)], [5]),
    ]
    plan = make_plan([tensor_input("x", (8,))], values, steps, [4, 5, 3])
    several = "_c10d_functional.all_reduce_coalesced.default"
    both = make_plan(
        [tensor_input("x", (8,))],
        values[:5],
        [call(several, [{"l": [v(0), v(0)]}, c("sum"), c("0")], [1, 2]), call(WAIT, [v(1)], [3]), call(WAIT, [v(2)], [4])],
        [3, 4],
    )
    with collectives.recording() as records:
        assert all(map(torch.equal, Executable(plan, {}, {})(x), (summed, exchanged, exchanged)))
        assert all(map(torch.equal, Executable(both, {}, {})(x), (summed, summed)))
    return [r.name.split(",")[0].split(".")[1] for r in records]


def test_collectives_of_torch_go_through_the_channel():
    order = ["all_to_all_single", "all_reduce", "all_to_all_single", "all_reduce_coalesced"]
    assert on_ranks(as_torch_does, 2) == [order] * 2


def breaking(rank, size):
    buf, rows = inputs(rank)
    wanted = expected(buf, rows)
    bad = Executable(braided(call("aten.view.default", [v(0), {"l": [c(5)]}], [4])), {}, {})
    good = Executable(braided(), {}, {})
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shape"):
            bad(buf, rows)
        buf.add_(0)  # the exchange that was in flight has ended
        assert all(map(torch.equal, good(buf, rows), wanted))
    return True


def test_a_call_that_raises_leaves_nothing_in_flight():
    assert all(on_ranks(breaking, 2))


def dying(rank, size):
    buf, rows = inputs(rank)
    run = Executable(braided(), {}, {})
    run(buf, rows)
    if rank == 1:
        return True
    time.sleep(0.5)
    with pytest.raises(CollectiveFailed) as failed:
        run(buf, rows)
    with pytest.raises(ChannelBroken) as broken:
        run(buf, rows)
    return str(failed.value), str(broken.value)


def test_errors_name_the_collective_and_the_line_of_the_user():
    with Ranks(dying, 2) as ranks:
        ranks.result(1)
        ranks.processes[1].kill()
        failed, broken = ranks.result(0)
    for text in (failed, broken):
        assert "plait.all_to_all_capacity_start, collective 1 of the plan, " in text and "\n  at model.py:7" in text


def synchronous():
    plan = braided()
    return replace(plan, steps=(replace(plan.steps[0], op="plait.all_to_all_capacity.default"), *plan.steps[1:]))


def twice():
    plan = synchronous()
    return replace(plan, steps=(*braided().steps[:1], *plan.steps[1:], replace(plan.steps[0], outs=(None, None))))


def differing(rank, size):
    buf, rows = inputs(rank)
    Executable(braided(), {}, {})(buf, rows)
    if rank == 0:  # a rank may compile again on its own, as long as its collectives stay the same
        own = braided(call("aten.neg.default", [v(0)], [4]))
    else:
        own = braided()
    Executable(own, {}, {})(buf, rows)
    found = []
    with pytest.raises(PlansDiffer) as differ:
        collectives.agree("0", f"digest {rank}", f"one\ntwo of {rank}\nthree of {rank}")
    found.append(str(differ.value))
    with pytest.raises(PlansDiffer) as differ:
        Executable(synchronous() if rank else twice(), {}, {})(buf, rows)
    found.append(str(differ.value))
    both = Executable(synchronous(), {}, {})  # the group can still be used
    assert all(map(torch.equal, both(buf, rows), expected(buf, rows)))
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(collectives.VARIABLE, "0.2")
            with pytest.raises(CollectiveTimedOut) as late:
                collectives.agree("0", "digest", "text")
        found.append(str(late.value))
    return found


def test_ranks_agree_on_their_collectives_before_the_first_call():
    (texts, plans, late), other = on_ranks(differing, 2)
    assert "ranks 0 and 1 of group '0'" in texts and "ranks 1 and 0 of group '0'" in other[0]
    for text, ranks in ((texts, (0, 1)), (other[0], (1, 0))):
        assert "collective 2 is\n" in text and [f"on rank {r}: two of {r}" in text for r in ranks] == [True, True]
    for text in (plans, other[1]):
        assert "collective 1 is" in text
        assert "plait.all_to_all_capacity_start.default(buf=float32[4, 64, 96], rows=int64[4, 2], expected=None" in text
        assert "plait.all_to_all_capacity.default(buf=float32[4, 64, 96], rows=int64[4, 2], expected=None" in text
    assert late.startswith("[P1102] the agreement on what the ranks run has not ended after 0.2 s on rank 0 of 2")
    assert "waiting for rank 1" in late


def test_what_is_agreed_on():
    uneven = make_plan(
        [tensor_input("x", ("n", 8))],
        [value(0, "input", ("n", 8), 0), value(1, "handle", ("n", 8)), value(2, "handle", ("n", 8))],
        [
            call("_c10d_functional.all_to_all_single.default", [v(0), {"l": [{"e": 1}]}, {"l": [{"e": "n"}]}, c("5")], [1]),
            call("_c10d_functional.all_reduce.default", [v(0), c("sum"), c("5")], [2]),
        ],
        [1],
    )
    assert agreements(uneven) == {
        "5": "_c10d_functional.all_to_all_single.default(input=float32[*, 8], group_name='5')\n"
        "_c10d_functional.all_reduce.default(input=float32[?, 8], reduce_op='sum', group_name='5')"
    }
    nested = make_plan([*INPUTS], [BUFFER, ROWS], [call("plait.call", [{"g": "inner"}, {"l": [v(0), v(1)]}], [])], [0])
    nested = replace(nested, regions=(("inner", braided()),))
    (text,) = agreements(nested).values()
    assert text.startswith("inner: plait.all_to_all_capacity_start.default(buf=float32[4, 64, 96]")
