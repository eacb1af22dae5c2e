"""Plans: the fastest of what there is, within memory, for any batch; profiles are read as they were written."""

from __future__ import annotations

import copy
import itertools
import json
import random
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
from plait.cost.curve import Curve
from plait.errors import BadProfile, BadSchedule, NoPartition
from plait.passes.stages.layers import FrozenLayer, Layer, Links, Profile
from plait.passes.stages.partition import Partition, Problem, best, bound
from plait.passes.stages.plan import (
    SCHEDULES,
    Filler,
    Plan,
    data_parallel,
    described,
    equal_layers,
    idle_share,
    plan,
    planned,
    stage_costs,
)

SEED = 20261205


def linear(seconds: float, fixed: float = 0.0) -> Curve:
    return Curve(((1, seconds + fixed), (8, 8 * seconds + fixed), (64, 64 * seconds + fixed)))


def layer(name: str, forward: float, **fields: float) -> Layer:
    return Layer(name, linear(forward, 0.05), linear(2 * forward, 0.05), linear(forward), **fields)


def profile(
    layers: int, frozen: int = 0, *, chains: int = 1, condition: float = 0.0, links: Links | None = None, seed: int = 0
) -> Profile:
    rng = random.Random(seed)
    made = tuple(
        tuple(
            layer(
                f"{c}.{i}", 0.5 + rng.random(), crossing=rng.choice([1.0, 4.0]), crossing_back=1.0, saved=8.0,
                parameters=40.0, gradients=40.0,
            )
            for i in range(layers)
        )
        for c in range(chains)
    )  # fmt: skip
    encoder = tuple(FrozenLayer(f"e{i}", linear(0.3, 0.1), 2.0, (i - 1,) if i else ()) for i in range(frozen))
    links = Links(20.0, 0.01, 10.0, 0.1) if links is None else links
    return Profile(made, encoder, links, condition=condition, feedback=1.0, device="paper")


def checked(made: Plan, given: Profile, devices: int, batch: int, memory: float = inf) -> Plan:
    problem = made.problem
    assert made.groups * problem.microbatches * problem.samples == batch
    assert made.devices <= devices and made.groups * problem.devices == devices
    assert max(made.memory) <= memory and len(made.memory) == problem.stages == len(made.partition.replicas)
    assert all(made.seconds <= seconds for _, seconds in made.alternatives)
    assert list(made.costs) == stage_costs(problem, made.partition)
    assert made.step.schedule.check().microbatches == problem.microbatches
    assert (made.conditioned is not None) == (given.condition > 0)
    assert 0 <= made.bubble_share < 1 and 0 <= made.unfilled_share < 1
    rows = sum(n * r for n, r in zip(made.step.filling.rows, made.partition.replicas, strict=True))
    assert not given.frozen or batch // made.groups <= rows < batch // made.groups + max(made.partition.replicas)
    assert str(made) == described(problem, made.step.schedule.name, made.partition)
    return made


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("chains", [1, 2])
def test_plans_for_any_number_of_devices(devices: int, chains: int) -> None:
    given = profile(6, 3, chains=chains, condition=0.5 * (devices == 4))
    for batch in (8, 9):
        checked(plan(given, devices, batch), given, devices, batch)


def test_the_plan_is_no_slower_than_what_else_there_is() -> None:
    for turn in range(6):
        print(f"seed {SEED + turn}")
        rng = random.Random(SEED + turn)
        links = Links(rng.choice([inf, 5.0, 50.0]), 0.01, rng.choice([0.5, 5.0, 50.0]), 0.1)
        given = profile(rng.randint(2, 6), rng.randint(0, 3), links=links, seed=turn)
        devices, batch = rng.choice([2, 4]), rng.choice([8, 12])
        made = checked(plan(given, devices, batch, schedules=SCHEDULES), given, devices, batch)
        for s, r in itertools.product((1, 2, 4), (1, 2, 4)):
            groups = devices // (s * r)
            if s > len(given.chains[0]) or groups * s * r != devices or batch % (groups * 2 * s):
                continue
            problem = Problem(given, devices // groups, s, 2 * s, batch // groups // (2 * s), "equal", groups=groups)
            for choice in (equal_layers(problem), best(problem)[0]):
                for name in SCHEDULES:
                    other = planned(problem, replace(choice, replicas=(r,) * s), name)
                    assert made.seconds <= other.seconds * 1.02, (str(made), str(other))


def test_only_the_fastest_schedule_is_taken() -> None:
    given = profile(6, links=Links(inf, 0.0, 1.0, 0.0))
    apart = {name: plan(given, 4, 16, schedules=(name,)).seconds for name in SCHEDULES}
    assert apart["zero-bubble"] < apart["1f1b"]
    assert plan(given, 4, 16, schedules=SCHEDULES).seconds == min(apart.values())


def test_unknown_schedules_are_refused() -> None:
    for name in ("interleaved", "2f2b"):
        with pytest.raises(BadSchedule, match=f"1f1b, gpipe, zero-bubble, not for '{name}'"):
            plan(profile(4), 2, 8, schedules=("1f1b", name))


def test_memory_is_kept_or_there_is_no_plan() -> None:
    given = profile(6, 2)
    free = checked(plan(given, 4, 16, schedules=SCHEDULES), given, 4, 16)
    most = max(free.memory)
    tight = [checked(plan(given, 4, 16, memory=m, schedules=SCHEDULES), given, 4, 16, m) for m in (most, 0.75 * most)]
    assert free.seconds == tight[0].seconds <= tight[1].seconds
    # GPipe keeps all micro-batches; 1F1B has room where it has none
    room = 6 * 40 * 4 / 2 + 20 * 8.0
    wanted: dict[str, Any] = {"stage_counts": (2,), "microbatch_counts": (16,), "groups": (1,), "memory": room}
    with pytest.raises(NoPartition):
        plan(given, 2, 16, schedules=("gpipe",), **wanted)
    assert max(plan(given, 2, 16, **wanted).memory) <= room
    with pytest.raises(NoPartition, match="no cut fits the memory of a device") as error:
        plan(given, 4, 16, memory=100.0)
    assert "plan for more devices or stages, smaller micro-batches, more memory" in str(error.value)
    two = profile(3, chains=2)
    with pytest.raises(NoPartition, match="what schedules keep alive does not fit memory"):
        plan(two, 3, 12, memory=330.0, stage_counts=(3,))  # each stage alone has 160 resident


def test_a_batch_that_does_not_divide_has_uneven_parts_or_no_plan() -> None:
    given = profile(4, 2)
    # 7 micro-batches of one row; three devices, each with a stage, since 3 divides no 64
    seven = checked(plan(given, 4, 7), given, 4, 7)
    assert seven.problem.microbatches in (1, 7)
    many = checked(plan(given, 3, 64, stage_counts=(3,)), given, 3, 64)
    assert many.problem.stages == 3 and many.problem.microbatches in (4, 8, 16, 32)
    # a single stage on all devices computes uneven parts, too
    single = profile(1, 1)
    alone = checked(plan(single, 3, 8), single, 3, 8)
    assert alone.partition == Partition(((),), (3,)) and alone.problem.samples * alone.problem.microbatches == 8
    with pytest.raises(NoPartition, match="goes into 4 devices and a batch of 8"):
        plan(given, 4, 8, microbatch_counts=(3, 5))
    with pytest.raises(NoPartition, match="goes into 4 devices and a batch of 8"):
        plan(given, 4, 8, groups=(0, 3))
    with pytest.raises(NoPartition, match="goes into 4 devices and a batch of 0"):
        plan(given, 4, 0)
    with pytest.raises(NoPartition):
        plan(given, 4, 8, stage_counts=(0, 5), microbatch_counts=(0, 8))


def test_what_is_asked_for_is_done() -> None:
    given = profile(6, 2)
    made = plan(given, 4, 16, stage_counts=iter((2,)), microbatch_counts=iter((8,)), groups=iter((1,)))
    checked(made, given, 4, 16)
    assert (made.problem.stages, made.problem.microbatches, made.groups) == (2, 8, 1)
    cut = plan(given, 4, 16, cuts=((1, 2),))
    assert cut.partition.cuts == ((1, 2),) and cut.problem.stages == 3
    with pytest.raises(NoPartition, match="places where it may be cut"):
        plan(given, 4, 16, cuts=((2, 9),))
    equal = plan(given, 4, 16, replicas="equal", groups=(1,), stage_counts=(2,))
    assert equal.partition.replicas == (2, 2)
    seen: list[tuple[int, int, str]] = []
    plan(given, 2, 8, progress=lambda i, n, what: seen.append((i, n, what)))
    assert {what for _, _, what in seen} == {"partitions", "schedules"} and all(i < n for i, n, _ in seen)


def test_filled_bubbles_shorten_the_step_and_the_share() -> None:
    given = profile(6, 4, links=Links(50.0, 0.0, 1.0, 0.0))
    fixed: dict[str, Any] = {"stage_counts": (3,), "microbatch_counts": (6,), "groups": (1,)}
    empty, whole, full = (
        plan(given, 3, 12, filler=filler, **fixed) for filler in (Filler(use=False), Filler(partial=False), Filler())
    )
    assert full.seconds <= whole.seconds < empty.seconds
    assert full.bubble_share < empty.bubble_share and whole.bubble_share < empty.bubble_share
    # layers behind a step on all devices are what it would be without filling
    assert empty.unfilled_share == pytest.approx(empty.bubble_share, abs=0.01)
    assert full.unfilled_share > full.bubble_share
    assert full.step.timeline == empty.step.timeline
    one = planned(full.problem, full.partition, "1f1b", Filler(least=inf))
    assert one.seconds == empty.seconds and idle_share(one.step, one.partition.replicas) == one.bubble_share


def test_self_conditioning_takes_longer_and_is_expected_half_of_the_time() -> None:
    for chains in (1, 2):
        given = profile(4, 2, chains=chains, condition=0.5)
        made = plan(given, 4, 16, stage_counts=(2,))
        assert made.conditioned is not None and made.conditioned.seconds > made.step.seconds
        assert made.seconds == pytest.approx((made.step.seconds + made.conditioned.seconds) / 2)


def test_without_waiting_for_links_a_step_keeps_to_its_bound() -> None:
    for turn in range(12):
        print(f"seed {SEED + turn}")
        rng = random.Random(SEED + turn)
        chains = rng.choice([1, 2])
        given = profile(rng.randint(3, 5), chains=chains, links=Links(inf, 0.0, rng.choice([1.0, 10.0]), 0.1), seed=turn)
        stages = rng.randint(1, 3)
        problem = Problem(given, 4, stages, rng.choice([stages, 4, 8]), 4)
        found = best(problem)
        assert found is not None
        assert planned(problem, found[0], "1f1b").seconds <= found[1].seconds * (1 + 1e-9)


def test_costs_of_stages_add_up_those_of_layers() -> None:
    chain = tuple(
        replace(layer(f"l{i}", 1.0, crossing=10.0 * (i + 1), crossing_back=5.0, saved=3.0, parameters=2.0, gradients=8.0),
                saved_for_weight=1.0)
        for i in range(3)
    )  # fmt: skip
    given = Profile((chain,), links=Links(10.0, 0.5, 4.0, 0.25), condition=0.5, feedback=4.0)
    problem = Problem(given, 3, 2, 4, 4, groups=2)
    first, second = stage_costs(problem, Partition(((2,),), (1, 2)))
    assert first.forward == pytest.approx(2 * 4.05) and first.backward == pytest.approx(2 * 8.05)
    assert first.weight == pytest.approx(8) and second.forward == pytest.approx(2.05)
    # 4 rows of 20 bytes there, and of 5 back: the first stage has one device to send and to receive
    assert first.send == pytest.approx(80 / 10 + 0.5) and second.send_back == pytest.approx(20 / 10 + 0.5)
    assert first.send_back == 0 and second.send == pytest.approx(2 * 4 / 10 + 0.5)  # what goes back to the first stage
    assert (first.saved, first.saved_for_weight, first.resident) == (24, 8, 16)
    assert (second.saved, second.saved_for_weight, second.resident) == (6, 2, 8)
    assert first.sync == pytest.approx(2 / 2 * 16 / 4 + 0.25)  # two pipelines
    assert second.sync == pytest.approx(2 * 3 / 4 * 8 / 4 + 0.25)  # two replicas in each


def test_data_parallel_hides_sums_behind_backwards() -> None:
    chain = tuple(Layer(f"l{i}", Curve(((1, 1.0),)), Curve(((1, 2.0),)), gradients=8.0) for i in range(3))
    one = Profile((chain,), (FrozenLayer("e", Curve(((1, 0.5),))),), Links(sum_rate=4.0, sum_latency=0.25))
    assert data_parallel(one, 1, 1) == (9.5, 0.0)
    # a sum of 8 bytes over 2 devices takes 2 s: of three the last is seen
    assert data_parallel(one, 2, 2) == pytest.approx((9.5 + 2 + 0.25, 2.25))
    slow = replace(one, links=Links(sum_rate=1.0))
    assert data_parallel(slow, 2, 2) == pytest.approx((0.5 + 3 + 2 + 3 * 8, 0.5 + 3 + 2 + 24 - 9.5))
    # 3 rows on 2 devices are 2 rows, and with self-conditioning forwards are half as many again
    assert data_parallel(replace(one, links=Links()), 2, 3) == (19.0, 0.0)
    assert data_parallel(replace(one, links=Links(), condition=0.5), 2, 2)[0] == 11.0


def test_equal_layers_are_what_people_start_with() -> None:
    problem = Problem(profile(7, chains=2), 6, 3, 4, 4)
    assert equal_layers(problem) == Partition(((2, 5), (2, 5)), (2, 2, 2))
    assert bound(problem, equal_layers(problem)).seconds >= best(problem)[1].seconds


def test_many_devices_and_layers_are_planned() -> None:
    given = profile(60, 8)
    checked(plan(given, 16, 64), given, 16, 64)


def test_a_profile_of_no_seconds_has_a_plan() -> None:
    nothing = Profile(((Layer("l", linear(0), linear(0)), Layer("m", linear(0), linear(0))),))
    made = plan(nothing, 2, 4)
    assert made.seconds == 0 and made.bubble_share == 0 and made.unfilled_share == 0


# -- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chains", [1, 2])
def test_profiles_are_read_as_they_were_written(chains: int) -> None:
    one = profile(3, 4, chains=chains, condition=0.5)
    odd = replace(
        one, links=Links(), optimizer=0.0, frozen=(*one.frozen, FrozenLayer("", Curve(((2.5, 0.0),)), after=(0, 2)))
    )
    for given in (one, odd):
        text = json.dumps(given.to_json(), allow_nan=False)
        assert Profile.from_json(json.loads(text)) == given == given.checked()
    assert Profile.from_json(
        {"version": 1, "chains": [[{"name": "l", "forward": [[1, 1]], "backward": [[1, 2]]}]]}
    ) == Profile(((Layer("l", Curve(((1, 1.0),)), Curve(((1, 2.0),))),),))


def changed(*path: Any, to: Any) -> Any:
    data = copy.deepcopy(profile(2, 2).to_json())
    at = data
    for key in path[:-1]:
        at = at[key]
    if to is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return data


LAYER = ("chains", 0, 0)
WRONG: dict[str, tuple[Any, str]] = {
    "a negative time": (changed(*LAYER, "forward", to=[[1, -1.0]]), "layer '0.0' has a time or a size that is negative"),
    "a time that is no number": (changed(*LAYER, "backward", to=[[1, nan]]), "layer '0.0' has a time or a size"),
    "no end of a time": (changed("frozen", 1, "seconds", to=[[1, inf]]), "layer 'e1' has a time or a size"),
    "a number of rows that is none": (changed(*LAYER, "forward", to=[[nan, 1.0]]), "layer '0.0' has a time or a size"),
    "negative bytes": (changed(*LAYER, "saved", to=-1), "layer '0.0' has a time or a size that is negative"),
    "bytes that are a curve": (changed(*LAYER, "saved", to=[[1, 2]]), "TypeError"),
    "bytes that are a word": (changed(*LAYER, "saved", to="many"), "ValueError"),
    "a time that is one number": (changed(*LAYER, "forward", to=0.5), "TypeError"),
    "a curve without points": (changed(*LAYER, "forward", to=[]), "layer '0.0' has a curve without points"),
    "a point of three numbers": (changed(*LAYER, "forward", to=[[1, 2, 3]]), "ValueError"),
    "a layer without a time": (changed(*LAYER, "forward", to=KeyError), "layer '0.0' has no forward"),
    "a layer without a name": (changed(*LAYER, "name", to=KeyError), "layer '' has no name"),
    "a word that means nothing": (changed(*LAYER, "forwards", to=1), "a layer has 'forwards'"),
    "a reader of a later layer": (changed("frozen", 0, "after", to=[1]), "frozen layer 'e0' reads what comes behind it"),
    "a reader of itself": (changed("frozen", 1, "after", to=[1]), "frozen layer 'e1' reads what comes behind it"),
    "a reader of nothing": (changed("frozen", 1, "after", to=[-1]), "frozen layer 'e1' reads what comes behind it"),
    "readers without end": (changed("frozen", 1, "after", to=[inf]), "OverflowError"),
    "another version": (changed("version", to=2), "it is of version 2, and this plait reads 1"),
    "no version": (changed("version", to=KeyError), "it has no 'version'"),
    "no chains": (changed("chains", to=KeyError), "it has no 'chains'"),
    "an empty chain": (changed("chains", to=[[], []]), "one or two chains of trained layers, none of them empty"),
    "no chain": (changed("chains", to=[]), "one or two chains of trained layers"),
    "three chains": (changed("chains", to=profile(2).to_json()["chains"] * 3), "one or two chains of trained layers"),
    "a link that stands": (changed("links", "send_rate", to=0), "a link has a rate that is not positive"),
    "a link of no number": (changed("links", "sum_rate", to=nan), "a link has a rate that is not positive"),
    "a negative latency": (changed("links", "sum_latency", to=-1), "a latency, optimizer or feedback is negative"),
    "an unknown link": (changed("links", "nvlink", to=1), "unexpected keyword argument 'nvlink'"),
    "a negative optimizer": (changed("optimizer", to=-1), "a latency, optimizer or feedback is negative"),
    "no probability": (changed("condition", to=1.5), "condition is no probability"),
    "a probability of no number": (changed("condition", to=nan), "condition is no probability"),
    "no object": ([], "TypeError"),
    "nothing": (None, "TypeError"),
}


@pytest.mark.parametrize("case", WRONG)
def test_profiles_that_make_no_sense_are_refused(case: str) -> None:
    data, why = WRONG[case]
    with pytest.raises(BadProfile, match=why):
        Profile.from_json(data)
