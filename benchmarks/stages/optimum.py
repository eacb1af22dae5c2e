"""Letter a: partitions against brute force, and how long planning takes."""

from __future__ import annotations

import random
import time
from math import inf
from typing import Any

from plait.cost.curve import Curve
from plait.errors import NoPartition
from plait.passes.stages.layers import FrozenLayer, Layer, Links, Profile
from plait.passes.stages.partition import Figures, Problem, best, bound, every
from plait.passes.stages.plan import plan

from ..runner import Outcome, Run

CASES, QUICK_CASES = 1000, 100
SAME = 1e-8


def problem(seed: int) -> Problem:
    """A small problem: up to 8 layers, 4 stages, 6 devices; one backbone or two."""
    rng = random.Random(seed)
    two = rng.random() < 0.4
    chains = [_chain(rng, rng.randint(1, 5 if two else 8), "a")]
    if two:
        chains.append(_chain(rng, rng.randint(1, 5), "b"))
    stages = rng.randint(1, 4)
    links = Links(rng.choice([inf, 5.0, 1.0]), rng.choice([0, 0.2]), rng.choice([inf, 1.0, 3.0]), rng.choice([0, 0.1]))
    profile = Profile(tuple(chains), links=links, condition=0.0 if two else rng.choice([0, 0, 0.5]), feedback=1.0)
    return Problem(
        profile, rng.randint(stages, 6), stages, rng.choice([1, 4, 8]), rng.choice([1, 4, 6]), rng.choice(["any", "equal"]),
        rng.choice([inf, inf, 60.0]), groups=rng.choice([1, 1, 4]),
    )  # fmt: skip


def _chain(rng: random.Random, count: int, name: str) -> tuple[Layer, ...]:
    found: list[Layer] = []
    for i in range(count):
        seconds, fixed = rng.choice([0.5, 1, 1, 2, 3, rng.random()]), rng.choice([0, 0.1])
        found.append(
            Layer(
                f"{name}{i}",
                Curve(((1, seconds + fixed), (2, 2 * seconds + fixed))),
                Curve(((1, 2 * seconds), (2, 4 * seconds))),
                crossing=rng.choice([0, 1, 5, 20]),
                crossing_back=rng.choice([0, 1, 5]),
                crossing_fixed=rng.choice([0, 0, 3]),
                saved=rng.choice([0, 1, 2]),
                parameters=rng.choice([1, 2, 10]),
                gradients=rng.choice([0, 1, 2, 10]),
            )
        )
    return tuple(found)


def large(layers: int = 200, seed: int = 0) -> Profile:
    """A trained model of many layers with 40 frozen ones, as it might be measured on a large GPU."""
    rng = random.Random(seed)

    def curve(seconds: float) -> Curve:
        return Curve(tuple((n, seconds * (n + 2.4) / 10.4) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)))

    chain = tuple(
        Layer(
            f"layer {i}", curve(2e-3 * rng.uniform(0.5, 1.5)), curve(4e-3 * rng.uniform(0.5, 1.5)), curve(2e-3),
            crossing=2e6, crossing_back=2e6, saved=5e6, parameters=1e7, gradients=1e7,
        )
        for i in range(layers)
    )  # fmt: skip
    frozen = tuple(
        FrozenLayer(f"frozen {i}", curve(8e-3 * rng.uniform(0.2, 2)), after=(i - 1,) if i else ()) for i in range(40)
    )
    return Profile((chain,), frozen, Links(12e9, 2e-5, 12e9, 5e-5))


def measure(run: Run) -> Outcome | None:
    """Partitions that differ from the best of all there are, and seconds of planning 64 devices and 200 layers."""
    count = QUICK_CASES if run.quick else CASES
    differ: list[dict[str, Any]] = []
    looked_at = none = 0
    for seed in range(count):
        if seed % 50 == 0:
            run.say(f"{seed} of {count} problems")
        one = problem(seed)
        figures = Figures.of(one)
        seconds = [bound(one, p, figures).seconds for p in every(one)]
        looked_at += len(seconds)
        want = min(seconds, default=inf)
        try:
            found = best(one)
            got = inf if found is None else found[1].seconds
        except NoPartition:
            got = inf
        none += want == inf
        if got != want and abs(got - want) > SAME * want:
            differ.append({"seed": seed, "brute force": want, "found": got})
    took: dict[str, float] = {}
    profile = large(60 if run.quick else 200)
    for replicas in ("equal", "any"):
        start = time.process_time()
        plan(profile, 16 if run.quick else 64, 2048, memory=80e9, replicas=replicas)
        took[replicas] = round(time.process_time() - start, 2)
    figure = {
        "problems": count, "partitions of brute force": looked_at, "without any": none, "that differ": len(differ),
        "planning (s), equal replicas": took["equal"], "planning (s), any replicas": took["any"],
    }  # fmt: skip
    return Outcome(figure, not differ and max(took.values()) < 10, differ)
