"""`plait reduce`, `bundle`, `replay` and `bisect`, from SRC to exit code; and the forked processes behind `--jobs`."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from plait import errors
from plait.codegen.compile import CompiledGraph
from plait.codegen.lowering import POINTWISE
from plait.compiler.cli import main
from plait.compiler.debugging import subject as subjects
from plait.compiler.debugging.bisect import bisect
from plait.compiler.debugging.bundle import read_bundle, write_bundle
from plait.compiler.debugging.check import Check
from plait.compiler.debugging.forked import Died, Forks, apart
from plait.compiler.debugging.reduce import reduce
from plait.compiler.debugging.subject import Subject, failure_apart
from plait.ir import parse_graph

FACTORIES = """
import torch

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)

    def forward(self, x):
        return {"y": self.down(torch.tanh(self.up(x))) + x}

def mlp(): return Mlp(), (torch.ones(4, 8),)
"""

JUDGE = """
import sys, torch, plait
from debugging_factories import mlp

model, inputs = mlp()
with torch.no_grad():
    good = torch.allclose(plait.load(sys.argv[1])(*inputs)["y"], model(*inputs)["y"], atol=1e-4)
sys.exit(0 if good else 1)
"""

SRC = "debugging_factories:mlp"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "debugging_factories.py").write_text(FACTORIES)
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def wrong_tanh() -> Iterator[Callable[[], None]]:
    right = POINTWISE["aten.tanh.default"]
    POINTWISE["aten.tanh.default"] = POINTWISE["aten.sin.default"]
    yield lambda: POINTWISE.__setitem__("aten.tanh.default", right)
    POINTWISE["aten.tanh.default"] = right


def plait(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), catch_exceptions=False)


def test_from_a_source_to_a_small_bundle_and_back(folder: Path, wrong_tanh: Callable[[], None]) -> None:
    made = plait("bundle", SRC, "-o", "b.zip", "--json")
    assert made.exit_code == 0, made.stderr
    found = json.loads(made.stdout)
    assert found["bundle"] == "b.zip" and found["replays"] and found["failure"]["kind"] == "wrong"
    assert "the same failure" in plait("replay", "b.zip").stdout

    reduced = plait("reduce", "b.zip", "-o", "small.zip", "--json")
    assert reduced.exit_code == 0, reduced.stderr
    small = json.loads(reduced.stdout)
    assert small["nodes"] == 1 < small["before"] and "aten.tanh.default" in small["graph"] and small["replays"]

    again = plait("replay", "small.zip", "--json")
    assert again.exit_code == 1 and json.loads(again.stdout)["outcome"] == "same"
    wrong_tanh()
    gone = plait("replay", "small.zip")
    assert gone.exit_code == 0 and "does not fail any more" in gone.stdout


def test_another_failure_has_a_code_of_its_own(wrong_tanh: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert plait("bundle", SRC, "-o", "b.zip").exit_code == 0

    def trips(*_: Any) -> None:
        raise RuntimeError("tripped")

    monkeypatch.setattr("plait.compiler.debugging.subject.compile_graph", trips)
    result = plait("replay", "b.zip")
    assert result.exit_code == 6 and "another failure: raises RuntimeError" in result.stdout
    result = plait("reduce", "b.zip")
    assert result.exit_code == 6 and "P0642" in result.stderr


def test_a_right_program_is_an_exit_code() -> None:
    for command in (("bundle", SRC, "-o", "b.zip"), ("reduce", SRC), ("bisect", SRC)):
        result = plait(*command)
        assert result.exit_code == 1 and "P0611" in result.stderr and not result.stdout
    assert not Path("b.zip").exists()


def test_bundles_that_cannot_be_read(folder: Path) -> None:
    (folder / "b.zip").write_text("no zip")
    for command in ("replay", "reduce", "bisect"):
        result = plait(command, "b.zip")
        assert result.exit_code == 4 and "P0631" in result.stderr
    assert plait("reduce", "b.zip", "--shape", "x=4x8").exit_code == 2


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_bisect_names_the_choice(wrong_tanh: Callable[[], None], jobs: str) -> None:
    result = plait("bisect", SRC, "--jobs", jobs, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["stage"], found["op"]) == ("generate", "aten.tanh.default")
    assert 0 < found["choice"] <= found["total"] and found["failure"]["kind"] == "wrong"
    assert found["at"].startswith("debugging_factories.py:")


@pytest.mark.slow
def test_bisect_by_a_command(wrong_tanh: Callable[[], None], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    result = plait("bisect", SRC, "--check", f"{sys.executable} judge.py {{}}", "--jobs", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["op"] == "aten.tanh.default"


def test_a_command_that_cannot_be_run() -> None:
    for command in ("judge", "no-such-program-here {}", "judge '{}"):
        result = plait("bisect", SRC, "--check", command)
        assert result.exit_code == 2 and "P0641" in result.stderr
    with pytest.raises(errors.BadCheck, match="where the artifact's path goes"):
        Check.of(Subject.of(parse_graph(TANH)), "true")


# -- forked processes ---------------------------------------------------------------------------------------------------

TANH = """def f(x: "f32[64,64]"):
    t = aten.tanh.default(x)
    s = aten.sum.dim_IntList(t, (1,))
    return (s,)
"""


def test_children_give_their_answers_in_order() -> None:
    torch.ones(1 << 20).exp().sum()  # this process has run at several threads
    pids: set[int] = set()

    def work(n: int) -> tuple[int, int, float]:
        time.sleep(0.02 * (4 - n))
        return n, os.getpid(), float(torch.ones(1 << 20).exp().sum())

    answers = list(Forks(2).map(work, range(4)))
    pids.update(pid for _, pid, _ in answers)
    assert [n for n, _, _ in answers] == [0, 1, 2, 3] and len(pids) == 4 and os.getpid() not in pids
    assert len({total for _, _, total in answers}) == 1


def test_large_answers_do_not_block() -> None:
    assert [len(x) for x in Forks(2).map(lambda n: b"x" * n, [1 << 20, 1 << 21])] == [1 << 20, 1 << 21]


def test_errors_of_children_are_raised_here() -> None:
    def raises(_: int) -> None:
        raise errors.NothingToFind(name="net")

    def odd(_: int) -> None:
        class Local(Exception):
            pass

        raise Local("tripped")

    with pytest.raises(errors.NothingToFind, match="net gives the right results") as caught:
        list(Forks(2).map(raises, [1]))
    assert caught.value.fields == {"name": "net"}
    with pytest.raises(RuntimeError, match="Local: tripped"):
        list(Forks(1).map(odd, [1]))


def test_children_that_die_are_noticed() -> None:
    assert apart(lambda: ctypes.string_at(0)) == Died("SIGSEGV")
    assert apart(lambda: os._exit(3)) == Died("exit code 3")
    assert apart(lambda: 7) == 7
    with pytest.raises(errors.ProcessDied, match="SIGSEGV"):
        list(Forks(2).map(lambda n: ctypes.string_at(0) if n else b"", [0, 1, 0]))


def test_crashes_are_failures_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subjects.run_compiled

    def deadly(compiled: CompiledGraph, inputs: Any) -> list[Any]:
        if any("sin(" in text for text in compiled.sources.values()):
            ctypes.string_at(0)
        return real(compiled, inputs)

    text = TANH.replace("s = ", "e = aten.sigmoid.default(t)\n    m = aten.mm.default(e, x)\n    q = ")
    text = text.replace("(t, (1,))", "(m, (1,))").replace("(s,)", "(q,)").replace("aten.tanh", "aten.sin")
    subject = Subject.of(parse_graph(text))
    assert failure_apart(subject) is None
    monkeypatch.setattr(subjects, "run_compiled", deadly)
    failure = failure_apart(subject)
    assert failure is not None and (failure.kind, failure.what) == ("crashes", "SIGSEGV")

    found = reduce(subject, failure)
    assert [n.op.name for n in found.subject.graph.nodes] == ["aten.sin.default"]
    path = write_bundle("crash.zip", found.subject, found.failure)
    assert read_bundle(path).replay().same
    result = plait("bisect", "crash.zip", "--json")
    assert result.exit_code == 0, result.stderr
    culprit = json.loads(result.stdout)
    assert culprit["failure"]["what"] == "SIGSEGV" and culprit["stage"] == "generate"


def test_bisection_in_processes_finds_what_one_process_finds(wrong_tanh: Callable[[], None]) -> None:
    subject = Subject.of(parse_graph(TANH))
    alone, together = bisect(subject), bisect(subject, pool=Forks(2), ways=2)
    assert alone.decision is not None and together.decision is not None
    assert alone.decision.index == together.decision.index and together.decision.stage == "generate"
