"""What the steps of a plan ask of the machine, and the machine's ceilings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plait.codegen.ceilings import ceilings
from plait.codegen.compile import trace
from plait.codegen.demand import StepWork, step_work
from plait.cost.profile import Table
from plait.ir import parse_graph


def steps(text: str, *shapes: tuple[int, ...], sizes: dict[str, int] | None = None) -> list[StepWork]:
    traced = trace(parse_graph(text, {f"c{i}": torch.zeros(s) for i, s in enumerate(shapes)}))
    found = step_work(traced, {s: (sizes or {})[s.name] for s in traced.scheduled.graph.symbols if s.name in (sizes or {})})
    assert len(found) == len(traced.compiled.plan.steps)
    return found


def read(step: StepWork) -> int:
    return sum(a.read for a in step.demand.accesses)


def written(step: StepWork) -> int:
    return sum(a.written for a in step.demand.accesses)


def test_a_fused_kernel_reads_and_writes_its_buffers_once() -> None:
    (step,) = steps("""
def f(x: "f32[8,16]", y: "f32[16]"):
    a = aten.mul.Tensor(x, y)
    b = aten.add.Tensor(a, x)
    return (b,)
""")
    assert (step.kind, step.demand.flops, step.demand.fma, step.known) == ("kernel", 2 * 128, 0, True)
    assert (read(step), written(step)) == (4 * (128 + 16), 4 * 128)


def test_a_product_counts_multiply_adds_and_what_is_fused_behind_it() -> None:
    (step,) = steps("""
def f(x: "f32[8,16]", y: "f32[16,32]"):
    a = aten.mm.default(x, y)
    b = aten.relu.default(a)
    return (b,)
""")
    assert (step.demand.fma, step.demand.flops) == (2 * 8 * 16 * 32, 2 * 8 * 16 * 32 + 8 * 32)
    assert read(step) == 4 * (8 * 16 + 16 * 32) and written(step) == 4 * 8 * 32  # and no scratch


def test_of_a_table_only_the_rows_that_are_looked_up_are_read() -> None:
    found = steps("""
def f(w: "f32[1000,16]", ids: "i64[3]"):
    a = aten.embedding.default(w, ids)
    b = aten.relu.default(a)
    return (b,)
""")
    (kernel,) = [s for s in found if s.kind == "kernel"]
    assert read(kernel) == 8 * 3 + 4 * 3 * 16
    assert {s.kind for s in found} == {"kernel", "internal"}
    assert all(s.demand.flops == 0 and not s.demand.accesses for s in found if s.kind == "internal")


def test_symbols_take_the_sizes_of_the_call_and_without_them_nothing_is_claimed() -> None:
    text = """
graph(level="tensor", symbols={"s0": (2, 64, 8)})
def f(x: "f32[s0,4]"):
    a = aten.relu.default(x)
    b, i = aten.sort.default(a)
    return (b,)
"""
    relu, sort = steps(text, sizes={"s0": 5})
    assert relu.known and (relu.demand.flops, read(relu)) == (20, 80)
    assert sort.kind == "library" and not sort.known and read(sort) == 80 and written(sort) == 80 + 160
    assert [(s.known, s.demand.flops, s.demand.accesses) for s in steps(text)] == [(False, 0, ())] * 2


def test_a_value_that_takes_the_place_of_a_dead_one_is_the_same_memory() -> None:
    found = steps("""
def f(x: "f32[64,64]"):
    a = aten.mm.default(x, x)
    b = aten.mm.default(a, x)
    c = aten.mm.default(b, x)
    d = aten.mm.default(c, x)
    return (d,)
""")
    places = [a.buffer for s in found for a in s.demand.accesses if a.written]
    assert len(places) == 4 and len(set(places)) == 3  # c lies where a did


def test_ceilings_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(tmp_path / "profile.json")
    found = ceilings(table, 1)
    assert 1e8 < found.fma < 1e12 and found.region > 0 and found.threads == 1
    assert found.levels[-1].capacity == float("inf")
    assert all(1e7 < x.read < 1e12 and 1e7 < x.write < 1e12 for x in found.levels)
    assert [x.capacity for x in found.levels] == sorted(x.capacity for x in found.levels)
    table.save()
    calls: list[int] = []
    again = Table(tmp_path / "profile.json")
    monkeypatch.setattr("plait.codegen.ceilings._measured", lambda probes, threads: calls.append(threads) or {})
    for _, timings in again:
        assert timings.keys() == {"generated"}
    assert ceilings(again, 1) == found
    assert len(calls) <= 1  # measured again only where other work disturbed it


def test_a_disturbed_measurement_does_not_lower_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.codegen import ceilings as module
    from plait.cost.profile import Timing

    speed = 1e-3

    def measured(probes: dict, threads: int) -> dict:
        return {name: Timing.of([speed, speed], contended=True) for name in probes}

    monkeypatch.setattr(module, "_measured", measured)
    table = Table()
    first = ceilings(table, 2)
    speed = 2e-3
    assert ceilings(table, 2) == first
    speed = 5e-4
    assert ceilings(table, 2).fma == pytest.approx(2 * first.fma)
