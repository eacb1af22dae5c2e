"""Random training programs with MoE layers, in pieces and with weight gradients placed anew, compute what they did."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from plait.codegen.compile import compile_graph
from plait.compiler.debugging.interpret import interpret
from plait.cost.communication import record
from plait.cost.estimate import Estimates, Rates
from plait.cost.profile import Table, Timing
from plait.ir import Graph, verify
from plait.passes.base import Context
from plait.passes.overlap.chunks import OverlapChunks
from plait.passes.overlap.cuts import EXCHANGE
from plait.passes.overlap.weights import OverlapDW
from plait.runtime.check import check

from tests import moe_random
from tests.moe_programs import single_rank

SEED = random.SystemRandom().randrange(1 << 30)


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    with single_rank() as name:
        yield name


def costs(group: str, seed: int) -> Estimates:
    """A link of some speed between two ranks, as the passes are told."""
    table = Table()
    for size in (1, 1 << 20):
        s = size * 10.0 ** -(4 + seed % 7)
        record(table, EXCHANGE, 2, size, "cpu/gloo", Timing(1, s, s, s, s))
    return Estimates(Rates(1e11, 1e10, 1e-6), table, ranks={group: 2})


def transformed(graph: Graph, group: str, seed: int) -> tuple[Graph, bool]:
    """A graph after the passes with the options of a seed; whether every sum keeps its order: that of rows of a buffer which
    is cut by capacity, or in the backward, does not."""
    options, chunks, weights = moe_random.options(seed)
    ctx = Context(at="joint", costs=costs(group, seed))
    if chunks:
        graph = OverlapChunks(**options).run(graph, ctx)
        verify(graph)
    if weights:
        graph = OverlapDW().run(graph, ctx)
        verify(graph)
    return graph, not chunks or (options["by"] == "tokens" and not options["backward"])


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    assert (found.double() - wanted.double()).abs().max() <= bound * max(1e-30, float(wanted.double().abs().max()))


@pytest.mark.parametrize("turn", range(6))
def test_interpreted(group: str, turn: int) -> None:
    seed = SEED + turn
    print(f"seed {seed}")
    graph, inputs = moe_random.step(moe_random.draw(seed, dtypes=(torch.float64,)), group)
    made, _ = transformed(graph, group, seed)
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        if wanted is not None:
            close(found, wanted, 1e-5)  # libraries give rows of few other last bits, and probabilities are float32


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(2))
def test_compiled(group: str, turn: int) -> None:
    """Plait's own kernels keep every bit."""
    seed = SEED + 100 + turn
    print(f"seed {seed}")
    graph, inputs = moe_random.step(moe_random.draw(seed, layers=1), group)
    made, exact = transformed(graph, group, seed)
    plans = compile_graph(made), compile_graph(graph)
    for plan in plans:
        check(plan.plan)
    results = [plan.executable(*inputs) for plan in plans]
    for number, (found, wanted) in enumerate(zip(*results, strict=True)):
        if wanted is None:
            continue
        if exact or number == 0:
            assert torch.equal(found, wanted), f"result {number}"
        else:
            close(found, wanted, 1e-5 if wanted.dtype is torch.float32 else 0.05)
