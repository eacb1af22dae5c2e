"""How near the assignment of work to collectives comes to the best there is, which an integer programme finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from plait.cost.communication import record
from plait.cost.estimate import Estimates, Rates
from plait.cost.profile import Table, Timing
from plait.passes.base import Context
from plait.passes.overlap.assignment import Work, assign, hidden
from plait.passes.overlap.chunks import OverlapChunks
from plait.passes.overlap.cuts import EXCHANGE
from plait.passes.overlap.pieces import asynchronous
from plait.passes.overlap.weights import Problem
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from tests import moe_random
from tests.moe_programs import Sizes, single_rank, step


def best(collectives: Sequence[float], works: Sequence[Work]) -> float:
    """The most seconds that can be hidden.

    x[i, k] is 1 where work i runs beside collective k, h[k] what is hidden of it: maximise the sum of h, with
    h[k] <= its seconds, h[k] <= sum over i of seconds[i] x[i, k], each work once at most, what it needs beside k or before.
    """
    unit = max(collectives)  # the solver's tolerances are absolute
    collectives = [s / unit for s in collectives]
    works = [Work(work.seconds / unit, work.beside, work.needs) for work in works]
    at = {(i, k): n for n, (i, k) in enumerate((i, k) for i, work in enumerate(works) for k in work.beside)}
    size = len(at) + len(collectives)
    rows: list[dict[int, float]] = []
    most: list[float] = []
    for k in range(len(collectives)):
        rows.append({n: -works[i].seconds for (i, j), n in at.items() if j == k} | {len(at) + k: 1.0})
        most.append(0.0)
    for i, work in enumerate(works):
        rows.append({at[i, k]: 1.0 for k in work.beside})
        most.append(1.0)
        for j in work.needs:
            for k in work.beside:
                rows.append({at[i, k]: 1.0} | {at[j, m]: -1.0 for m in works[j].beside if m <= k})
                most.append(0.0)
    where = [(r, c, x) for r, row in enumerate(rows) for c, x in row.items()]
    lines, columns, numbers = (np.array(x) for x in zip(*where, strict=True))
    matrix = csr_array((numbers, (lines, columns)), shape=(len(rows), size))
    found = milp(
        -np.array([0.0] * len(at) + [1.0] * len(collectives)),
        integrality=np.array([1] * len(at) + [0] * len(collectives)),
        bounds=Bounds(np.zeros(size), np.array([1.0] * len(at) + list(collectives))),
        constraints=LinearConstraint(matrix, -np.inf, np.array(most)),
        options={"mip_rel_gap": 1e-3, "time_limit": 20},
    )
    assert found.x is not None, found.message
    return -unit * float(found.mip_dual_bound)


def share(collectives: Sequence[float], works: Sequence[Work]) -> float:
    """What the assignment hides, as a share of the most."""
    most = best(collectives, works)
    reached = hidden(collectives, works, assign(collectives, works))
    assert reached <= most * (1 + 1e-5)
    return reached / most if most > 0 else 1.0


def problem(seed: int) -> tuple[list[float], list[Work]]:
    """Up to 40 works and 8 collectives: windows that end with the last collective, as in a backward, or any; chains."""
    draw = random.Random(seed)
    count = draw.randint(1, 8)
    collectives = [draw.uniform(0.2, 3) for _ in range(count)]
    scale = draw.choice((0.3, 1.0, 3.0))
    works: list[Work] = []
    for i in range(draw.randint(1, 40)):
        first = draw.randrange(count)
        last = count if draw.random() < 0.6 else draw.randint(first + 1, count)
        needs = tuple(j for j in range(max(0, i - 4), i) if draw.random() < 0.1)
        works.append(Work(scale * draw.uniform(0.05, 1), tuple(range(first, last)), needs))
    return collectives, works


def test_random_problems() -> None:
    base = random.SystemRandom().randrange(1 << 30)
    print(f"seed {base}")
    shares = [share(*problem(base + i)) for i in range(12)]
    print(f"mean {np.mean(shares):.3f}, worst {min(shares):.3f}")
    assert min(shares) > 0.5
    assert np.mean(shares) > 0.9


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    with single_rank() as name:
        yield name


def slow_link(group: str, seconds_per_byte: float) -> Estimates:
    table = Table()
    for size in (1, 1 << 20):
        s = size * seconds_per_byte
        record(table, EXCHANGE, 2, size, "cpu/gloo", Timing(1, s, s, s, s))
    return Estimates(Rates(2e10, 1e10, 1e-6), table, ranks={group: 2})


def test_training_steps(group: str) -> None:
    graph, _ = step(Sizes(batch=6, length=16, width=32, hidden=64), "top2", group)
    for pieces, link in itertools.product((1, 3), (1e-10, 1e-9, 1e-8)):
        costs, made = slow_link(group, link), graph
        if pieces > 1:
            made = OverlapChunks(count=pieces, around="layer", backward=True).run(graph, Context(at="joint", costs=costs))
        found = Problem.of(asynchronous(made), costs)
        assert len(found.seconds) == 8 * pieces
        reached = share(found.seconds, found.works)
        print(f"{len(found.works)} works, {len(found.seconds)} collectives: {reached:.3f}")
        assert reached > 0.85


def test_random_training_steps(group: str) -> None:
    shares: list[float] = []
    for seed in range(3):
        costs = slow_link(group, 10.0 ** -(8 + seed))
        graph, _ = moe_random.step(moe_random.draw(seed + 3, dtypes=(torch.float32,)), group)
        found = Problem.of(asynchronous(graph), costs)
        shares.append(share(found.seconds, found.works))
    print(shares)
    assert min(shares) > 0.8
