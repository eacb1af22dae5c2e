"""Failures say where they come from and how to go on: a crash in a pass, a broken graph, broken numerics, a wrong kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import plait
import pytest
import torch
from plait import errors
from plait.codegen.lowering import POINTWISE
from plait.compiler.debugging.bundle import read_bundle
from plait.compiler.debugging.subject import Subject
from plait.ir import Builder, Graph, Rule, Var, pattern
from plait.ir.rewrite import Match
from plait.passes.base import Context, Pass
from torch import nn

X = torch.linspace(-2, 2, 64).view(4, 16)


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * 2) - 0.5


@dataclass(frozen=True)
class Faulty(Pass):
    """Goes wrong in the way that `how` says, at `x * 2`."""

    name: ClassVar[str] = "faulty"
    at: ClassVar[Any] = "split"
    how: str = "crash"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if self.how == "structure":
            return graph.replace(nodes=graph.nodes[1:])

        def build(m: Match, b: Builder) -> Any:
            if self.how == "crash":
                raise IndexError("out of hands")
            return b.call("aten.mul.Tensor", m["x"], 2.5)

        return ctx.rewrite(graph, [Rule("slip", pattern("aten.mul.Tensor", Var("x"), 2), build)])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAIT_DEBUG_DIR", str(tmp_path / "failures"))
    return tmp_path / "failures"


@pytest.fixture
def wrong_tanh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "cache"))  # wrong graphs stay out of the user's
    monkeypatch.setitem(POINTWISE, "aten.tanh.default", POINTWISE["aten.sin.default"])


def by_compile(options: dict[str, Any]) -> None:
    plait.compile(Net().eval(), (X,), options=options)(X)


def by_torch(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.compile(Net(), backend="plait", options=options)(X)


WAYS = pytest.mark.parametrize("way", [by_compile, by_torch])
Way = Callable[[dict[str, Any]], None]


def go_on(text: str, folder: Path) -> Path:
    """The bundle that a message names, after checking the commands; the failure shows again."""
    path = re.search(r"plait replay (\S+\.zip)", text)
    assert path is not None and text.rstrip().endswith(f"plait reduce {path[1]}")
    assert Path(path[1]).parent == folder
    replayed = read_bundle(path[1]).replay()
    assert replayed.same, replayed
    return Path(path[1])


def message(way: Way, options: dict[str, Any], kind: type[errors.PlaitError]) -> str:
    with pytest.raises(Exception) as caught:
        way(options)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, errors.PlaitError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    assert isinstance(error, kind)
    return str(error)


@WAYS
def test_a_crash_in_a_pass(way: Way, folder: Path) -> None:
    text = message(way, {"passes": [Faulty()]}, errors.PassFailed)
    assert "pass faulty" in text and "rule slip" in text and "IndexError: out of hands" in text
    assert "--> mul = aten.mul.Tensor(" in text and "test_failures.py" in text
    go_on(text, folder)


@WAYS
def test_a_broken_graph(way: Way, folder: Path) -> None:
    text = message(way, {"passes": [Faulty("structure")], "verify": "each-pass"}, errors.PassFailed)
    assert "pass faulty" in text and "invalid graph" in text and "used before it is defined" in text
    assert "-->" in text and "test_failures.py" in text
    go_on(text, folder)


@WAYS
def test_broken_numerics(way: Way, folder: Path) -> None:
    text = message(way, {"passes": [Faulty("slip")], "verify": "each-pass"}, errors.NumericsBroken)
    assert "pass faulty changed output 0: it promises bit-equal results" in text
    assert "first at aten.mul.Tensor, made by rule slip" in text and "2.5)" in text and "-->" in text
    assert re.search(r"\n  at test_failures.py:\d+", text)
    go_on(text, folder)


@WAYS
def test_a_wrong_kernel(way: Way, folder: Path, wrong_tanh: None) -> None:
    text = message(way, {"verify": "each-pass"}, errors.WrongResults)
    assert "the kernels of" in text and "first bad node: aten.tanh.default after kernel" in text
    assert "--> tanh = aten.tanh.default(" in text and re.search(r"\n  at test_failures.py:\d+", text)
    go_on(text, folder)


def test_a_wrong_kernel_is_an_error_of_the_call(wrong_tanh: None) -> None:
    model = plait.compile(Net().eval(), (X,), options={"verify": "each-pass"})
    for _ in range(2):  # and stays one
        with pytest.raises(errors.WrongResults, match="compute a wrong result 0"):
            model(X)


def test_kernels_are_not_judged_unless_asked(wrong_tanh: None, folder: Path) -> None:
    by_compile({"verify": "structure"})
    assert not folder.exists()


def test_right_kernels_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    judge = Subject.judge
    monkeypatch.setattr(Subject, "judge", lambda self, results: judged.append(1) or judge(self, results))
    model = plait.compile(Net().eval(), (X,), options={"verify": "each-pass"})
    assert judged == []
    for _ in range(3):
        torch.testing.assert_close(model(X), Net()(X))
    assert len(judged) == 2  # the references among themselves, and the kernels


def test_inputs_that_are_refused_are_the_calls_to_complain_of(caplog: pytest.LogCaptureFixture) -> None:
    def pick(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, i)

    model = plait.compile(pick, (X, torch.tensor([1, 2])), options={"verify": "each-pass"})
    with pytest.raises((IndexError, RuntimeError)):
        model(X, torch.tensor([1, 7]))
    assert "not checked" in caplog.text
    torch.testing.assert_close(model(X, torch.tensor([1, 3])), X[[1, 3]])


def test_draws_and_written_buffers_are_judged_too() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return torch.nn.functional.dropout(x, 0.5) * self.count

    model = plait.compile(Counting(), (X,), options={"verify": "each-pass", "training": True})
    torch.manual_seed(3)
    first = model(X)
    assert model.state["count"] == 1  # the judging ran on copies, and drew from a seed of its own
    torch.manual_seed(3)
    torch.testing.assert_close(model(X), first * 2)


def test_the_dump_folder_comes_first(tmp_path: Path) -> None:
    text = message(by_compile, {"passes": [Faulty()], "dump_dir": str(tmp_path / "dump")}, errors.PassFailed)
    go_on(text, tmp_path / "dump")


def test_the_same_failure_goes_to_the_same_file(folder: Path) -> None:
    texts = [message(by_compile, {"passes": [Faulty()]}, errors.PassFailed) for _ in range(2)]
    assert texts[0] == texts[1] and len(list(folder.iterdir())) == 1


def test_a_bundle_that_cannot_be_written_hides_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder should be")
    text = message(by_compile, {"passes": [Faulty()]}, errors.PassFailed)
    assert "out of hands" in text and "plait replay" not in text and "is not written down" in caplog.text


def test_searches_write_nothing(folder: Path) -> None:
    found = Subject.of(Net().eval(), (X,), options={"passes": [Faulty()]}).failure()
    assert found is not None and found.what == "P0205" and not folder.exists()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    torch._dynamo.reset()
