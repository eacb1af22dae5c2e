"""`compile_budget_s` and `specialise`: a correct plan at once, better ones later, checked before they take over."""

from __future__ import annotations

import copy
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.codegen.lowering import POINTWISE
from plait.compiler import background, deferred, inspection, judging, specialised
from plait.compiler.debugging.bundle import read_bundle
from plait.compiler.decisions import Decisions, deciding
from plait.compiler.deferred import BEING_COMPILED
from plait.compiler.static import at_sizes
from plait.errors import BackgroundLost, BadOption, BetterPlanWrong, FallbackRefused, WrongInputValue
from plait.ir import Graph, verify
from plait.runtime.plan import Call
from torch import nn

AT_ONCE = {"compile_budget_s": 0}
MINUTE = 120.0


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, so that there is something to compile; nothing is left running for the next test."""
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PLAIT_DEBUG_DIR", str(tmp_path / "failures"))
    torch._dynamo.reset()
    yield tmp_path
    assert plait.wait(MINUTE)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds back everything that is compiled in the background until the event is set."""
    free = threading.Event()
    run = background.Job.run

    def waiting(job: background.Job) -> None:
        assert free.wait(MINUTE)
        run(job)

    monkeypatch.setattr(background.Job, "run", waiting)
    yield free
    free.set()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) * 2 + x


class Counter(nn.Module):
    """Writes a buffer and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        memory.mul_(0.5).add_(x.sum(0))
        return torch.sin(x) * self.calls + memory


def seeded() -> torch.Generator:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def near(got: torch.Tensor, model: Callable[..., torch.Tensor], *args: torch.Tensor) -> None:
    """No further from float64 than rounding explains."""
    exact = model(*(a.double() if a.is_floating_point() else a for a in args))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def wide(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


# -- the first plan, and the swap ---------------------------------------------------------------------------------------


def test_a_plan_at_once_and_a_better_one_later(held: threading.Event) -> None:
    model, x = Net().eval(), torch.randn(4, 16, generator=seeded())
    compiled = plait.compile(model, (x,), options=AT_ONCE)
    near(compiled(x), wide(model), x)
    assert compiled.coverage.generated == 0 and {why for _, why in compiled.coverage.reasons} == {BEING_COMPILED}
    assert "op by op" in repr(compiled.record) and "being compiled" in str(compiled) and not plait.wait(0.01)
    held.set()
    assert plait.wait(MINUTE)
    assert "judged in the next call" in repr(compiled.record)
    near(compiled(x), wide(model), x)  # both plans run, and their answers agree
    (swap,) = compiled.record.swaps
    assert (swap.plan, swap.outcome) == ("kernels", "swapped in") and swap.seconds > 0
    assert compiled.coverage.generated > 0 and compiled.coverage.fallback == 0 and "swapped in" in str(compiled)
    near(compiled(x), wide(model), x)
    assert compiled.record.runs == 3


def test_without_a_budget_all_is_compiled_before_the_first_call(held: threading.Event) -> None:
    compiled = plait.compile(Net().eval(), (torch.ones(4, 16),))
    assert compiled.coverage.generated > 0 and compiled.record.swaps == () and not compiled.record.plan


def test_what_fits_is_waited_for(held: threading.Event) -> None:
    held.set()
    model, x = Net().eval(), torch.ones(4, 16)
    compiled = plait.compile(model, (x,), options={"compile_budget_s": 600})
    assert compiled.coverage.generated > 0 and compiled.record.swaps == ()
    near(compiled(x), wide(model), x)


def test_what_does_not_fit_is_not_waited_for(held: threading.Event) -> None:
    start = time.perf_counter()
    compiled = plait.compile(Net().eval(), (torch.ones(4, 16),), options={"compile_budget_s": 0.2})
    assert compiled.coverage.generated == 0 and time.perf_counter() - start < 60


def test_an_estimate_beyond_the_budget_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "BUILD_S", 1e6)
    start = time.perf_counter()
    compiled = plait.compile(Net().eval(), (torch.ones(4, 16),), options={"compile_budget_s": 300})
    assert compiled.coverage.generated == 0 and time.perf_counter() - start < 200


def test_building_takes_no_time_where_all_is_built() -> None:
    assert deferred.build_seconds(0) == 0 < deferred.build_seconds(1) < deferred.build_seconds(100)


def test_the_first_plan_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    model, x = Net().eval(), torch.randn(4, 16, generator=seeded())
    compiled = plait.compile(model, (x,), options=AT_ONCE)
    assert plait.wait(MINUTE)
    near(compiled(x), wide(model), x)
    (swap,) = compiled.record.swaps
    assert swap.outcome == "failed" and "P0" in swap.detail and "failed" in caplog.text
    assert not compiled.record.plan, "nothing is on its way any more"


def test_torch_compile_trains_within_a_budget(held: threading.Event) -> None:
    model, x = Net(), torch.randn(4, 16, generator=seeded())
    compiled = torch.compile(model, backend="plait", options=AT_ONCE)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        compiled(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with plait.observe() as seen:
        first = step()
        assert [r.coverage.generated for r in seen.graphs] == [0, 0]
        held.set()
        assert plait.wait(MINUTE)
        step()
        last = step()
    assert [[s.outcome for s in r.swaps] for r in seen.graphs] == [["swapped in"], ["swapped in"]]
    assert all(r.coverage.generated > 0 for r in seen.graphs)
    model.zero_grad()
    model(x).square().sum().backward()
    for p, a, b in zip(model.parameters(), first, last, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(a, p.grad)
        torch.testing.assert_close(b, p.grad)


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (3, 16)])
def test_edge_sizes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=seeded())
    x[-1:, 0], x[-1:, 1] = torch.inf, torch.nan
    model = Net().eval()
    compiled = plait.compile(model, (x,), options=AT_ONCE)
    first = compiled(x)
    assert plait.wait(MINUTE)
    for got in (first, compiled(x), compiled(x)):
        torch.testing.assert_close(got, model(x), equal_nan=True)
    assert [s.outcome for s in compiled.record.swaps] == ["swapped in"]


def test_inputs_laid_out_otherwise() -> None:
    model, x = Net().eval(), torch.randn(16, 4, generator=seeded()).t()
    compiled = plait.compile(model, (x,), options=AT_ONCE)
    assert plait.wait(MINUTE)
    for _ in range(3):
        near(compiled(x), wide(model), x)
    assert [s.outcome for s in compiled.record.swaps] == ["swapped in"]


# -- what must not happen twice -----------------------------------------------------------------------------------------


def test_state_and_written_inputs_advance_once_for_each_call() -> None:
    x, generator = torch.randn(3, 4), seeded()
    memory = torch.randn(4, generator=generator)
    eager, mine, theirs = Counter(), memory.clone(), memory.clone()
    compiled = plait.compile(Counter(), (x, memory.clone()), options={**AT_ONCE, "training": True})
    torch.testing.assert_close(compiled(x, mine), eager(x, theirs))
    assert plait.wait(MINUTE)
    for _ in range(3):
        x = torch.randn(3, 4, generator=generator)
        torch.testing.assert_close(compiled(x, mine), eager(x, theirs))
        torch.testing.assert_close(mine, theirs)
    assert [s.outcome for s in compiled.record.swaps] == ["swapped in"]
    assert compiled.state["calls"] == 4


def test_random_draws_are_not_repeated() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + torch.nn.functional.dropout(x, 0.5) * torch.rand_like(x)

    x = torch.randn(32, 8, generator=seeded())
    compiled = torch.compile(noisy, backend="plait", options=AT_ONCE)
    steady = torch.compile(noisy, backend="plait")

    def draws(fn: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [fn(x) for _ in range(3)]

    with plait.observe() as seen:
        torch.manual_seed(3)
        got = [compiled(x)]
    assert plait.wait(MINUTE)
    got += [compiled(x), compiled(x)]
    (record,) = seen.graphs
    (swap,) = record.swaps
    assert swap.outcome == "swapped in" and "not compared" in swap.detail
    for a, b in zip(got, draws(steady), strict=True):
        torch.testing.assert_close(a, b)


def test_plans_with_other_effects_are_not_swapped() -> None:
    with plait.observe() as seen:
        torch.compile(lambda x: torch.sin(x) + torch.rand_like(x), backend="plait")(torch.ones(8))
    (record,) = seen.graphs
    assert record.graph is not None and record.compiled is not None
    plan, op_by_op = record.compiled.plan, deferred.op_by_op(record.graph, record.compiled.options).plan
    assert len(judging.effects(record.graph)) == 1
    assert judging.same_effects(record.graph, op_by_op, plan)
    draws = [s for s in plan.steps if isinstance(s, Call)]
    assert not judging.same_effects(record.graph, op_by_op, replace(plan, steps=()))
    assert not judging.same_effects(record.graph, op_by_op, replace(plan, steps=(*plan.steps, *draws)))


# -- a better plan that is wrong ----------------------------------------------------------------------------------------


@pytest.fixture
def wrong_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POINTWISE, "aten.tanh.default", POINTWISE["aten.sin.default"])


def test_a_wrong_plan_is_kept_out(wrong_tanh: None, caches: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Net().eval(), torch.randn(4, 16, generator=seeded())
    compiled = plait.compile(model, (x,), options=AT_ONCE)
    assert plait.wait(MINUTE)
    for _ in range(3):
        near(compiled(x), wide(model), x)
    (swap,) = compiled.record.swaps
    assert swap.outcome == "wrong" and not compiled.record.plan and compiled.coverage.generated == 0
    assert "[P0416]" in caplog.text
    path = re.search(r"plait replay (\S+\.zip)", caplog.text)
    assert path is not None and read_bundle(path[1]).replay().same
    saved = caches / "net.plait"
    compiled.save(saved)  # the plan that was found right goes into the artifact
    near(plait.load(saved)(x), wide(model), x)


def test_verification_raises_for_a_wrong_plan(wrong_tanh: None) -> None:
    x = torch.randn(4, 16, generator=seeded())
    compiled = plait.compile(Net().eval(), (x,), options={**AT_ONCE, "verify": "each-pass"})
    compiled(x)  # the first plan is right
    assert plait.wait(MINUTE)
    with pytest.raises(BetterPlanWrong, match="Net that was compiled in the background is wrong"):
        compiled(x)
    compiled(x)


def test_a_wrong_plan_of_a_training_step_is_kept_out(wrong_tanh: None) -> None:
    model, x = Net(), torch.randn(4, 16, generator=seeded())
    compiled = torch.compile(model, backend="plait", options=AT_ONCE)
    with plait.observe() as seen:
        for _ in range(2):
            near(compiled(x).detach(), wide(model), x)
            assert plait.wait(MINUTE)
    assert [s.outcome for r in seen.graphs for s in r.swaps] == ["wrong"]


def test_inputs_that_are_refused_say_nothing_of_a_plan() -> None:
    table = torch.randn(8, 4, generator=seeded())
    compiled = plait.compile(lambda i: torch.sin(table[i]), (torch.tensor([1, 2]),), options=AT_ONCE)
    assert plait.wait(MINUTE)
    with pytest.raises(IndexError):
        compiled(torch.tensor([1, 8]))
    assert compiled.record.swaps == ()
    torch.testing.assert_close(compiled(torch.tensor([3, 0])), torch.sin(table[[3, 0]]))
    assert [s.outcome for s in compiled.record.swaps] == ["swapped in"]


# -- with other options -------------------------------------------------------------------------------------------------


def test_a_bisection_compiles_all_at_once(held: threading.Event) -> None:
    model, x = Net().eval(), torch.ones(4, 16)
    with deciding(Decisions()) as counted:
        compiled = plait.compile(model, (x,), options=AT_ONCE)
    assert counted.count > 0 and compiled.coverage.generated > 0
    limited = plait.compile(model, (x,), options={**AT_ONCE, "bisect_limit": 3})
    assert not limited.record.plan
    near(limited(x), wide(model), x)


def test_what_may_not_fall_back_is_refused_at_once(held: threading.Event) -> None:
    strict = {**AT_ONCE, "fallback": "error"}
    with pytest.raises(FallbackRefused, match="would run in torch"):
        plait.compile(lambda x: torch.logcumsumexp(x, 0), (torch.eye(3),), options=strict)
    compiled = plait.compile(Net().eval(), (torch.ones(4, 16),), options=strict)  # its kernels come later
    assert compiled.coverage.generated == 0


def test_an_artifact_holds_the_kernels(held: threading.Event, caches: Path) -> None:
    model, x = Net().eval(), torch.randn(4, 16, generator=seeded())
    compiled = plait.compile(model, (x,), options=AT_ONCE)
    compiled.save(caches / "net.plait")
    assert inspection.coverage(caches / "net.plait")["generated"] > 0
    near(plait.load(caches / "net.plait")(x), wide(model), x)


def test_frozen_parameters(held: threading.Event) -> None:
    model, x = Net().eval().requires_grad_(False), torch.randn(4, 16, generator=seeded())
    compiled = torch.compile(model, backend="plait", options={**AT_ONCE, "freeze": True})
    near(compiled(x), wide(model), x)
    held.set()
    assert plait.wait(MINUTE)
    near(compiled(x), wide(model), x)
    model.linear.weight.mul_(2)
    near(compiled(x), wide(model), x)
    assert plait.wait(MINUTE)
    near(compiled(x), wide(model), x)


@pytest.mark.parametrize(
    ("name", "value"), [("compile_budget_s", -1), ("compile_budget_s", float("nan")), ("specialise", "always")]
)
def test_options_are_checked(name: str, value: object) -> None:
    with pytest.raises(BadOption, match=name):
        plait.compile(Net().eval(), (torch.ones(4, 16),), options={name: value})


# -- threads, processes -------------------------------------------------------------------------------------------------


def test_eight_threads_call_meanwhile(held: threading.Event) -> None:
    model, generator = Net().eval(), seeded()
    compiled = plait.compile(model, (torch.ones(4, 16),), options=AT_ONCE)
    inputs = [torch.randn(4, 16, generator=generator) for _ in range(8)]
    expected = [model(x) for x in inputs]
    failed: list[str] = []
    done = threading.Event()

    def calling(x: torch.Tensor, want: torch.Tensor) -> None:
        while not done.is_set():
            try:
                torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
            except Exception as error:
                failed.append(str(error))
                return

    threads = [threading.Thread(target=calling, args=pair) for pair in zip(inputs, expected, strict=True)]
    for t in threads:
        t.start()
    held.set()
    assert plait.wait(MINUTE)
    until = time.monotonic() + MINUTE
    while not compiled.record.swaps and not failed and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    done.set()
    for t in threads:
        t.join()
    assert failed == [] and [s.outcome for s in compiled.record.swaps] == ["swapped in"]


def test_another_thread_that_writes_an_input_says_nothing_of_a_plan() -> None:
    x = torch.randn(8, generator=seeded())
    compiled = plait.compile(lambda x: torch.sin(x) + 1, (x.clone(),), options=AT_ONCE)
    assert plait.wait(MINUTE)
    swapping: Any = compiled._run
    better, job = swapping._offered

    def meanwhile(args: list[Any]) -> Any:
        results = better.run(args)
        x.add_(1)
        return results

    swapping._offered = replace(better, run=meanwhile), job
    torch.testing.assert_close(compiled(x), torch.sin(x) + 1)
    assert compiled.record.swaps == ()
    swapping._offered = better, job
    compiled(x)
    assert [s.outcome for s in compiled.record.swaps] == ["swapped in"]


LEAVING = """
import torch, plait
model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8 + i, 9 + i), torch.nn.GELU()) for i in range(12)]).eval()
x = torch.ones(2, 8)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="plait", options={"compile_budget_s": 0})(x), model(x))
import atexit, time, sys
time.sleep(float(sys.argv[1]))
atexit.register(lambda: print(time.time(), flush=True))
print(time.time(), flush=True)
"""


@pytest.mark.parametrize("after", [0.0, 1.5])
def test_a_process_that_ends_does_not_wait(after: float) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING, str(after)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "terminate" not in done.stderr, done.stderr
    joined = [float(t) for t in done.stdout.split()]
    assert joined[1] - joined[0] < 1, "the process waited for threads at its end"


def test_a_forked_child_keeps_the_first_plan(held: threading.Event) -> None:
    job = background.submit("model", lambda: None)
    told: list[str] = []
    job.then(lambda job: told.append(str(job.error)))
    pid = os.fork()
    if pid == 0:
        good = plait.wait(5) and job.ended and isinstance(job.error, BackgroundLost) and "P0417" in told[0]
        os._exit(0 if good else 1)
    assert os.waitpid(pid, 0)[1] == 0
    with pytest.raises(BackgroundLost, match="model was being compiled"):
        raise BackgroundLost(name="model")
    assert not job.ended


# -- specialisation -----------------------------------------------------------------------------------------------------


def test_only_what_is_faster_by_more_than_noise_pays() -> None:
    slow = [1.0, 1.02, 0.98, 1.01, 0.99]
    assert specialised.gain(slow, [0.5 * t for t in slow]) == pytest.approx(0.5)
    assert specialised.gain(slow, [0.97 * t for t in slow]) is None, "less than 5 %"
    assert specialised.gain(slow, slow) is None
    assert specialised.gain(slow, [1.3 * t for t in slow]) is None
    assert specialised.gain([0.5, 1.0, 1.5, 0.6, 1.4], [0.45, 0.9, 1.3, 0.5, 1.2]) is None, "within the spread"
    assert specialised.gain([*slow, 9.0, 9.0], [0.5, 0.5, 0.5, 0.5, 7.0]) == pytest.approx(0.51, abs=0.02), "outliers"


def rows(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.cat([x, x * 2], 0), -1).square().sum(1) + x.shape[0]


def dynamic(options: dict[str, Any]) -> plait.CompiledModel:
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    return plait.compile(Rows().eval(), (torch.randn(4, 8),), dynamic_shapes=shapes, options=options)


class Rows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rows(x)


def call_often(compiled: Callable[..., Any], sizes: list[int], times: int, generator: torch.Generator) -> None:
    for i in range(times):
        x = torch.randn(sizes[i % len(sizes)], 8, generator=generator)
        near(compiled(x), rows, x)


@pytest.mark.parametrize("pays", [True, False])
def test_sizes_that_come_again_get_a_plan_of_their_own_where_it_pays(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    monkeypatch.setattr(specialised, "gain", lambda dynamic, static: 0.25 if pays else None)
    generator, compiled = seeded(), dynamic({"specialise": "measured"})
    call_often(compiled, [6], specialised.AFTER, generator)
    assert plait.wait(MINUTE)
    call_often(compiled, [6, 5], 5 * specialised.ROUNDS, generator)
    (swap, *_) = compiled.record.swaps
    assert swap.plan.endswith("=6") and swap.outcome == ("swapped in" if pays else "not faster")
    assert ("25% of the time saved" in str(compiled)) == pays
    call_often(compiled, [6, 7, 2, 64], 12, generator)
    assert compiled.coverage.generated > 0


def test_without_the_option_nothing_is_specialised() -> None:
    generator, compiled = seeded(), dynamic({})
    call_often(compiled, [6], 2 * specialised.AFTER, generator)
    assert plait.wait(MINUTE) and compiled.record.swaps == ()


def test_variants_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialised, "AFTER", 2)
    compiled = dynamic({"specialise": "measured"})
    call_often(compiled, list(range(2, 12)), 40, seeded())
    assert plait.wait(MINUTE)
    call_often(compiled, list(range(2, 12)), 20 * specialised.ROUNDS * 2, seeded())
    assert len(compiled.record.swaps) == specialised.TRIED


def test_a_wrong_variant_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = dynamic({"specialise": "measured"})
    generator = seeded()
    real = specialised.at_sizes

    def slipped(graph: Graph, sizes: Any) -> Graph:
        made = real(graph, sizes)
        n = next(n for n in made.nodes if n.op.name == "aten.mul.Tensor")
        return made.replace(nodes=tuple(n.with_args((n.args[0], 3, *n.args[2:])) if m is n else m for m in made.nodes))

    monkeypatch.setattr(specialised, "at_sizes", slipped)
    call_often(compiled, [6], specialised.AFTER, generator)
    assert plait.wait(MINUTE)
    call_often(compiled, [6], 5, generator)
    assert [s.outcome for s in compiled.record.swaps] == ["wrong"]


def test_dynamic_training_is_specialised_after_its_kernels_are_there() -> None:
    model, generator = Net(), seeded()
    options = {**AT_ONCE, "specialise": "measured"}
    compiled = torch.compile(model, backend="plait", dynamic=True, options=options)

    def step(n: int) -> None:
        x = torch.randn(n, 16, generator=generator)
        model.zero_grad()
        compiled(x).square().sum().backward()
        got = [p.grad for p in model.parameters()]
        model.zero_grad()
        model(x).square().sum().backward()
        for a, p in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)

    with plait.observe() as seen:
        for _ in range(3):
            step(5)
            assert plait.wait(MINUTE)
        for _ in range(specialised.AFTER):
            step(5)
        assert plait.wait(MINUTE)
        for _ in range(2 * specialised.ROUNDS + 4):
            step(5)
        step(7)
    for record in seen.graphs:
        assert [s.plan == "kernels" for s in record.swaps] == [True, False], record.swaps
        assert record.swaps[1].outcome in ("swapped in", "not faster")


def test_a_graph_at_given_sizes() -> None:
    compiled = dynamic({})
    (symbol,) = compiled.graph.symbols
    fixed = at_sizes(compiled.graph, {symbol: 6})
    verify(fixed)
    assert str(symbol) not in str(fixed) and str(symbol) in str(compiled.graph)
    x = torch.randn(6, 8, generator=seeded())
    torch.testing.assert_close(fixed.run(x)[0], rows(x))


def test_sizes_out_of_range_are_named_with_the_way_out() -> None:
    compiled = dynamic({"specialise": "measured", **AT_ONCE})
    for size in (1, 65):
        with pytest.raises(WrongInputValue, match=rf"dimension 0 of x' must be between 2 and 64, got {size}") as caught:
            compiled(torch.ones(size, 8))
        assert "compile again with" in str(caught.value) and "range wider" in str(caught.value)
