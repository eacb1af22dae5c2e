"""Predicted timelines of plans: parts measured alone, ranks in one schedule, traces with both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait import errors
from plait.compiler.costs import Link
from plait.compiler.predicted import REST, Computed, Parts, merged, tasks_of
from plait.compiler.report import render_report
from plait.cost.curve import Curve
from plait.cost.estimate import COMMUNICATION, COMPUTE, EXCHANGES
from plait.cost.schedule import Task, simulate
from plait.runtime.collectives import recording
from torch import nn

from tests.compiler.training_models import OPTIMIZERS, classes, mlp, vectors
from tests.moe_programs import single_rank

SUM = "_c10d_functional.all_reduce.default"


class Sent(nn.Module):
    """Rows that an exchange takes to another rank, here to the only one, between two products."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        self.before, self.after = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([[0, len(x)]])
        y, _ = torch.ops.plait.all_to_all_capacity(self.before(x)[None], rows, None, self.group)
        return self.after(self.drop(y[0]))


def mean(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


@pytest.fixture
def step() -> Any:
    with single_rank() as group:
        torch.manual_seed(0)
        model = Sent(group)
        yield plait.train_step(model, mean, OPTIMIZERS["sgd"](model.parameters()))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def test_a_prediction_leaves_the_model_as_it_is(step: Any) -> None:
    step(X)
    before = {name: t.clone() for name, t in step.model.state_dict().items()}
    grads = [p.grad for p in step.model.parameters()]
    random = torch.get_rng_state()
    found = step.predicted(X)
    assert all(torch.equal(t, before[name]) for name, t in step.model.state_dict().items())
    assert all(p.grad is g for p, g in zip(step.model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert found.seconds > 0 and found.measured > 0 and found.error == found.seconds / found.measured - 1
    assert "predicted" in str(found) and "measured" in str(found)


def test_without_anything_hidden_the_prediction_is_what_the_parts_took(step: Any) -> None:
    step(X)
    executable = step.compiled.executable
    found = step.predicted(X)
    line = found.timeline
    assert found.exposed == pytest.approx(sum(t.seconds for t in line.tasks if t.stream == COMMUNICATION))
    assert line.seconds == pytest.approx(sum(t.seconds for t in line.tasks))
    assert line.tasks[-1].name == REST and {t.stream for t in line.tasks} == {COMPUTE, COMMUNICATION}
    calls = [t.name for t in line.tasks if t.stream == COMMUNICATION]
    assert calls == [r.name.split(",")[0] for r in found.records] and len(calls) == 2
    assert found.peak_bytes >= executable.plan.arena + 4 * sum(p.numel() for p in step.model.parameters())


def test_a_trace_has_both_sides(step: Any, tmp_path: Path) -> None:
    found = step.trace(tmp_path / "step.json", X)
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "predicted", 1: "measured"}
    threads = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert threads == {(p, t) for p in (0, 1) for t in (COMPUTE, COMMUNICATION)}
    ends = [max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == p) for p in (0, 1)]
    assert ends[0] == pytest.approx(1e6 * found.seconds) and ends[1] > 0
    kernels = [[e["name"] for e in events if e["ph"] == "X" and e["pid"] == p and "_" in e["name"]] for p in (0, 1)]
    assert set(kernels[1]) - {"plait.all_to_all_capacity"} <= set(kernels[0])


def test_the_variant_that_runs_the_batch_is_predicted(step: Any) -> None:
    step(X)
    step(X[:4])
    found = step.predicted(X)
    assert len(step.variants) == 2 and found.records[0].name == step.predicted(X[:4]).records[0].name
    assert len(found.timeline.tasks) == len(step.variants[0].executable.plan.steps) + 5  # two starts, two waits, the rest


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_collectives_take_the_time_of_their_curve(step: Any) -> None:
    step(X)
    plan = step.compiled.executable.plan
    known = Link({EXCHANGES[0]: Curve(((0, 1.0), (1000, 2.0)))}, {})
    starts = [i for i, s in enumerate(plan.steps) if getattr(s, "op", "").startswith("plait.all_to_all")]
    computed = Computed(tuple(0.0 for _ in plan.steps), 0.25, {starts[0]: 500, starts[1]: 1000})
    tasks, running = tasks_of(plan, computed, known)
    # the first one tells how many rows are coming, which the second one knows
    assert [tasks[i].seconds for i in running] == [1.5 + 1.0, 2.0]
    found = Parts(plan, None, computed, 5.0, (), ()).on(known)
    assert found.seconds == 4.75 and found.exposed == 4.5 and found.error == pytest.approx(-0.05)


def test_a_collective_begins_when_all_ranks_are_there_and_the_one_before_has_ended() -> None:
    def rank(before: float, between: float, first: float, second: float) -> tuple[list[Task], list[int]]:
        tasks = [
            Task("start", COMPUTE, before),
            Task("a", COMMUNICATION, first, (0,), writes=(("x", 8),)),
            Task("start", COMPUTE, between),
            Task("b", COMMUNICATION, second, (2,)),
            Task("wait", COMPUTE, 0.0, (1,), reads=("x",)),
            Task("wait", COMPUTE, 0.0, (3,)),
        ]
        return tasks, [1, 3]

    tasks, ranges = merged([rank(1, 1, 5, 2), rank(3, 0.5, 1, 2)])
    line = simulate(tasks)
    spans = [[(s.start, s.end) for s in line.part(r, {}).spans] for r in ranges]
    assert spans[0][1] == (3, 8) and spans[1][1] == (3, 4)  # less comes to rank 1
    assert spans[0][3] == spans[1][3] == (8, 10)
    assert spans[1][4] == (4, 4)  # which goes on
    mine = line.part(ranges[1], {"communication 1": COMMUNICATION}, resident=100)
    assert mine.peak_bytes == 108 and {t.stream for t in mine.tasks} == {"compute 1", COMMUNICATION}
    assert mine.tasks[4].after == (1,) and mine.tasks[1].after == (0,)


def test_links_between_two_rates() -> None:
    def at(rate: float) -> Link:
        curve = Curve(tuple((n, 1.0 + n / rate) for n in (10, 100)))
        return Link({SUM: curve}, {(COMPUTE, COMMUNICATION): 1.0 + rate / 100})

    found = Link.between((10.0, at(10.0)), (50.0, at(50.0)), 20.0)
    assert [found.seconds(SUM, n) for n in (10, 55, 100)] == pytest.approx([1.5, 3.75, 6.0])
    assert found.slowdown[COMPUTE, COMMUNICATION] == pytest.approx(1.2)
    assert found.seconds("other", 10) == 0.0


# -- what passes say --------------------------------------------------------------------------------------------------


def test_reports_of_passes_are_shown() -> None:
    with single_rank() as group:
        torch.manual_seed(0)
        model = Sent(group)
        step = plait.train_step(model, mean, OPTIMIZERS["sgd"](model.parameters()), passes=["overlap-dw"])
        step(X)
    (said,) = step.compiled.said
    assert str(said) in str(step.compiled) and "step " in str(said)
    assert "communication that nothing hides" in render_report(step.compiled)
    plain = mlp()
    other = plait.train_step(plain, classes, OPTIMIZERS["sgd"](plain.parameters()))
    other(*vectors(torch.float32))
    assert other.compiled.said == ()


def test_models_are_predicted_too(tmp_path: Path) -> None:
    model = plait.compile(nn.Sequential(nn.Linear(64, 64), nn.GELU()), (torch.randn(16, 64),))
    found = model.trace(tmp_path / "call.json")
    steps = len(model.executable.plan.steps)
    assert [t.stream for t in found.timeline.tasks] == [COMPUTE] * (steps + 1) and len(found.spans) == steps


# -- alone ------------------------------------------------------------------------------------------------------------


def test_what_was_not_recorded_cannot_be_repeated(step: Any) -> None:
    from plait.runtime.collectives import alone

    step(X)
    with recording(results=True) as kept:
        step(X)
    with alone(kept), recording() as copies:
        step(X)
    assert [(c.name, c.bytes) for c in copies] == [(r.name, 0) for r in kept]
    with alone([]), pytest.raises(errors.NotRecorded, match="all_to_all_capacity"):
        step(X)
    step(X)
