"""Partitions: the one found is as good as the best of all, whatever is restricted, and none at all is an error."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest
from plait.cost.curve import Curve
from plait.errors import NoPartition
from plait.passes.stages.layers import Layer, Links, Profile
from plait.passes.stages.partition import Figures, Partition, Problem, best, bound, every

SEED = 20261203
TURNS = 90


def linear(seconds: float, fixed: float = 0.0) -> Curve:
    return Curve(((1, seconds + fixed), (2, 2 * seconds + fixed)))


def drawn_chain(rng: random.Random, count: int, name: str) -> tuple[Layer, ...]:
    found: list[Layer] = []
    for i in range(count):
        forward, fixed = rng.choice([0.5, 1, 1, 2, 3, rng.random()]), rng.choice([0, 0.1])
        found.append(
            Layer(
                f"{name}{i}", linear(forward, fixed), linear(2 * forward), crossing=rng.choice([0, 1, 5, 20]),
                crossing_back=rng.choice([0, 1, 5]), crossing_fixed=rng.choice([0, 0, 3]), saved=rng.choice([0, 1, 2]),
                parameters=rng.choice([1, 2, 10]), gradients=rng.choice([0, 1, 2, 10]),
            )
        )  # fmt: skip
    return tuple(found)


def drawn(rng: random.Random) -> Problem:
    two = rng.random() < 0.35
    chains = [drawn_chain(rng, rng.randint(2, 5 if two else 8), "a")]
    if two:
        chains.append(drawn_chain(rng, rng.randint(2, 4), "b"))
    stages = rng.randint(1, min(3 if two else 4, *map(len, chains)))
    links = Links(rng.choice([inf, 5.0, 1.0]), rng.choice([0, 0.2]), rng.choice([inf, 1.0, 3.0]), rng.choice([0, 0.1]))
    profile = Profile(tuple(chains), links=links, condition=rng.choice([0, 0, 0.01, 0.5, 1.0]), feedback=1.0)
    allowed = None
    if rng.random() < 0.3:
        allowed = tuple(
            rng.choice([None, tuple(sorted(rng.sample(range(len(c) + 1), rng.randint(stages - 1, len(c) + 1))))])
            for c in chains
        )
    return Problem(
        profile, rng.randint(stages, stages + 2), stages, rng.choice([1, 4, 8]), rng.choice([1, 4, 6]),
        rng.choice(["any", "any", "equal"]), rng.choice([inf, inf, 60.0, 90.0]),
        rng.choice([None, None, tuple(rng.randint(1, 5) for _ in range(stages))]), allowed, rng.choice([1, 1, 3]),
    )  # fmt: skip


def least(problem: Problem) -> float:
    figures = Figures.of(problem)
    return min((bound(problem, one, figures).seconds for one in every(problem)), default=inf)


def plain(*forward: float, **fields: float) -> tuple[Layer, ...]:
    """Layers whose backward takes twice their forward."""
    return tuple(Layer(f"l{i}", linear(f), linear(2 * f), **fields) for i, f in enumerate(forward))


def found(problem: Problem) -> Partition:
    one = best(problem)
    assert one is not None and one[1] == bound(problem, one[0])
    return one[0]


@pytest.mark.parametrize("part", range(3))
def test_the_partition_found_is_the_best_of_all(part: int) -> None:
    fits = 0
    for turn in range(part, TURNS, 3):
        print(f"seed {SEED + turn}")
        rng = random.Random(SEED + turn)
        problem = drawn(rng)
        wanted = least(problem)
        if wanted == inf:
            with pytest.raises(NoPartition):
                best(problem)
            assert best(problem, 1e9) is None
            continue
        fits += 1
        one = best(problem)
        assert one is not None and one[1] == bound(problem, one[0])
        assert one[1].seconds == pytest.approx(wanted, rel=1e-8)
        assert valid(problem, one[0])
        # what may cost less than a limit is found below it, and nothing else is
        for factor in (rng.random(), 1 - 1e-6):
            assert best(problem, wanted * factor) is None
        for factor in (1 + 1e-6, 1 + rng.random()):
            below = best(problem, wanted * factor)
            assert below is not None and below[1].seconds == pytest.approx(wanted, rel=1e-8)
    assert fits > TURNS // 3 // 2


def valid(problem: Problem, one: Partition) -> bool:
    assert len(one.replicas) == problem.stages and sum(one.replicas) <= problem.devices and min(one.replicas) >= 1
    assert problem.replicas == "any" or len(set(one.replicas)) == 1
    for c, chain in enumerate(problem.profile.chains):
        at = one.cuts[c]
        assert list(at) == sorted(set(at)) and len(at) == problem.stages - 1 and set(at) <= set(range(1, len(chain)))
        allowed = None if problem.allowed is None else problem.allowed[c]
        assert allowed is None or set(at) <= set(allowed)
        assert [a for a, _ in one.ranges(c, len(chain))] == [0, *at]
    return True


def test_terms_are_those_of_diffusionpipe() -> None:
    chain = tuple(
        Layer(f"l{i}", linear(f), linear(2 * f), crossing=c, crossing_back=1.0, gradients=12.0, parameters=2.0, saved=3.0)
        for i, (f, c) in enumerate([(1.0, 2.0), (2.0, 30.0), (1.0, 0.0)])
    )
    links = Links(send_rate=10.0, send_latency=0.5, sum_rate=4.0, sum_latency=0.25)
    problem = Problem(Profile((chain,), links=links, feedback=5.0), 3, 2, 4, 2)
    first, second = Partition(((1,),), (1, 2)), Partition(((2,),), (2, 1))
    # K = 4 + 2; of stages 6 and (1 row each) 9 the slowest; 12 bytes of gradients a layer, twice half of them each way
    one = bound(problem, first)
    assert one.slowest == 9.0 and one.gap == pytest.approx(24 / 4 + 0.25 - 2 * 1.0)
    assert one.seconds == pytest.approx(6 * 9 + one.gap)
    # the cut is crossed by 2 rows of 30 bytes, and 1 back: 6.5 and 0.7
    two = bound(problem, second)
    assert two.slowest == 9.0 and two.gap == pytest.approx(24 / 4 + 0.25)  # nothing is before the first stage
    slow = bound(replace(problem, profile=replace(problem.profile, links=replace(links, send_rate=5.0))), second)
    assert slow.slowest == pytest.approx(60 / 5 + 0.5 + 2 / 5 + 0.5)
    # self-conditioning: a forward more, values travel once more, and what it gives goes back once
    half = bound(replace(problem, profile=replace(problem.profile, condition=0.5)), first)
    assert half.slowest_conditioned == 12.0
    assert half.seconds == pytest.approx(6 * (9 + 12) / 2 + one.gap + 0.5 * (5 * 2 / 10 + 0.5))
    # 4 bytes for each of a parameter, and what is saved: 8 + 2 micro-batches of 2 rows of 3, 16 + 1 of 1 row of 6
    assert bound(replace(problem, memory=22.0), first).seconds == one.seconds
    assert bound(replace(problem, memory=21.0), first).seconds == inf
    assert bound(replace(problem, memory=22.0, in_flight=(3, 1)), first).seconds == inf
    # three pipelines sum over 6 devices
    assert bound(replace(problem, groups=3), first).gap == pytest.approx(2 * 5 / 6 * 24 / 4 + 0.25 - 2.0)


def test_a_skip_connection_is_not_cut() -> None:
    layers = list(plain(*[1.0] * 8, crossing=1.0, crossing_back=1.0))
    for i in range(2, 6):  # alive from layer 2 to layer 6
        layers[i] = replace(layers[i], crossing=1000.0, crossing_back=1000.0)
    profile = Profile((tuple(layers),), links=Links(send_rate=100.0))
    assert found(Problem(profile, 2, 2, 8, 1)).cuts[0][0] in (2, 7)
    fast = replace(profile, links=Links())
    assert found(Problem(fast, 2, 2, 8, 1)) == Partition(((4,),), (1, 1))
    # what crosses for any number of rows counts as much
    fixed = tuple(
        replace(one, crossing=0, crossing_back=0, crossing_fixed=3000.0 * (2 <= i < 6)) for i, one in enumerate(layers)
    )
    assert found(Problem(replace(profile, chains=(fixed,)), 2, 2, 8, 1)).cuts[0][0] in (2, 7)


def test_more_devices_go_where_more_is_to_do() -> None:
    profile = Profile((plain(1.0, 1.0, 6.0, 1.0, 1.0),))
    assert found(Problem(profile, 4, 2, 4, 12)).replicas in ((1, 3), (3, 1))
    assert len(set(found(Problem(profile, 4, 2, 4, 12, "equal")).replicas)) == 1
    # sums that take long are not worth it
    dear = Profile((plain(1.0, 1.0, gradients=1000.0),), links=Links(sum_rate=1.0))
    assert found(Problem(dear, 8, 2, 4, 4)).replicas == (1, 1)
    # one row cannot be shared
    assert found(Problem(profile, 4, 2, 4, 1)).replicas == (1, 1)


def test_cuts_of_a_user_are_taken_as_they_are() -> None:
    profile = Profile((plain(*[1.0] * 6),))
    assert found(Problem(profile, 3, 3, 4, 1, allowed=((1, 2),))).cuts == ((1, 2),)
    assert found(Problem(profile, 2, 2, 4, 1, allowed=((1, 4),))).cuts == ((4,),)
    two = Profile((plain(*[1.0] * 4), plain(*[1.0] * 4)))
    assert found(Problem(two, 2, 2, 4, 1, allowed=(None, (1,)))).cuts[1] == (1,)
    # ends are no cuts, and others than there are are none
    with pytest.raises(NoPartition, match="there are 0 places where it may be cut"):
        best(Problem(profile, 3, 2, 4, 1, allowed=((0, 6, 9),)))


def test_memory_moves_cuts() -> None:
    chain = plain(*[1.0] * 6, parameters=1.0, saved=1.0)
    free = Problem(Profile((chain,), optimizer=4.0), 2, 2, 8, 1)
    assert found(free).cuts == ((3,),)
    # the first stage keeps two micro-batches, the second one: 6 bytes a layer and 5
    assert found(replace(free, memory=18.0)).cuts == ((3,),)
    assert found(replace(free, memory=20.0, in_flight=(6, 1))).cuts == ((2,),)
    with pytest.raises(NoPartition, match="no cut fits the memory of a device"):
        best(replace(free, memory=15.0))
    assert best(replace(free, memory=15.0), 1e9) is None


def test_both_backbones_share_the_devices_of_a_block() -> None:
    down, up = plain(4.0, 1.0, 1.0), plain(1.0, 1.0, 4.0)
    one = found(Problem(Profile((down, up)), 3, 2, 4, 6))
    # the slow ends of both are on the same block, which gets two devices
    assert one == Partition(((1,), (2,)), (2, 1))
    # each block runs the micro-batches of both
    assert Problem(Profile((down, up)), 3, 2, 4, 6).rounds == 2 * 4 + 2


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (Problem(Profile((plain(1, 1, 1),)), 1, 2, 4, 1), "2 stages on 1 devices: each stage needs a device"),
        (Problem(Profile((plain(1, 1),)), 4, 3, 4, 1), "3 stages on 4 devices: there are 1 places where it may be cut"),
        (Problem(Profile((plain(1, 1, 1), plain(1))), 4, 2, 4, 1), "there are 0 places where it may be cut"),
        (Problem(Profile((plain(1, 1, 1),)), 4, 3, 4, 1, allowed=((2,),)), "there are 1 places where it may be cut"),
        (Problem(Profile((plain(1, 1, parameters=9),)), 4, 2, 4, 1, memory=20), "no cut fits the memory of a device"),
        (Problem(Profile((plain(1, 1, parameters=9),)), 4, 2, 4, 1, "equal", memory=20), "no cut fits the memory"),
    ],
)
def test_no_partition_is_an_error_that_says_why(problem: Problem, why: str) -> None:
    with pytest.raises(NoPartition, match=why):
        best(problem)


def test_one_stage_is_everything() -> None:
    problem = Problem(Profile((plain(1, 2, 3),), links=Links(sum_rate=1.0)), 3, 1, 4, 3)
    assert found(problem) == Partition(((),), (3,)) and bound(problem, found(problem)).seconds == 4 * 18
    assert len(list(every(problem))) == 3
