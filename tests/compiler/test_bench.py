"""`plait bench`: peers side by side, and the profile of each kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import plait
import pytest
import torch
from click.testing import CliRunner, Result
from plait.codegen.compile import CodegenOptions
from plait.compiler import peers
from plait.compiler.cli import main
from plait.compiler.peers import PEERS, Peer, Task, chosen
from plait.compiler.profile import profile
from plait.compiler.timing import Alternated, Spread, alternate
from plait.compiler.tracing import events
from plait.errors import CannotProfile, MissingPackage, PeerRefused, UnknownPeer
from plait.runtime.collectives import Record
from plait.runtime.plan import Call, Launch, Plan
from torch import nn

from tests.compiler.factories import MLP


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bench_factories.py").write_text(MLP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(main, ["bench", *args], catch_exceptions=False)


class Layers(nn.Module):
    """Twelve equal layers and an op that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.sort().values


class Counting(nn.Module):
    """Writes a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count


# -- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_answers_are_checked_and_times_compared() -> None:
    result = run("bench_factories:mlp", "--seconds", "0.2", "--peer", "eager", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["contenders"].keys() == {"plait", "eager"} and found["rounds"] >= 3
    assert found["threads"] == torch.get_num_threads() and "profile" not in found
    for one in found["contenders"].values():
        assert one["difference"]["equal"] and one["settings"] and one["compile_seconds"] >= 0
        assert 0 < one["milliseconds"]["p10"] <= one["milliseconds"]["median"] <= one["milliseconds"]["p90"]
    assert found["contenders"]["plait"]["times_plait"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    text = run("bench_factories:mlp", "--seconds", "0.1", "--peer", "eager").stdout
    assert "times plait" in text and "as it is" in text


@pytest.mark.usefixtures("folder")
def test_a_peer_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    result = run("bench_factories:mlp", "--peer", "eager", "--peer", "openvino")
    assert result.exit_code == 2 and result.stdout == ""
    assert "the peer openvino needs the package openvino" in result.stderr and "[peers]" in result.stderr
    with pytest.raises(MissingPackage, match="onnxruntime"):
        chosen(["onnxruntime"])
    assert [p.name for p in chosen(["inductor", "eager", "inductor"])] == ["inductor", "eager"]


@pytest.mark.usefixtures("folder")
def test_an_unknown_peer_is_refused() -> None:
    result = run("bench_factories:mlp", "--peer", "eager,tvm")
    assert result.exit_code == 2 and "P0708" in result.stderr and "openvino, onnxruntime" in result.stderr
    with pytest.raises(UnknownPeer):
        chosen(["tvm"])


def test_a_peer_that_does_not_take_the_model_says_why() -> None:
    def fails(task: Task) -> object:
        raise NotImplementedError("no sort here")

    with pytest.raises(PeerRefused, match="other does not take this model: NotImplementedError: no sort here"):
        Peer("other", "", fails).ready(Task(nn.ReLU(), (torch.ones(2),)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_peer_gives_eagers_answer(name: str) -> None:
    missing = [p for p in PEERS[name].packages if find_spec(p) is None]
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}: pip install -c constraints.txt -e '.[peers]'")
    task = Task(Layers().eval(), (torch.randn(5, 256),))
    (got,) = chosen([name])[0].ready(task)()
    torch.testing.assert_close(got, task.eager(*task.args))


def test_spread_and_ratio_go_round_by_round() -> None:
    timed = Alternated({"a": (1.0, 2.0, 4.0), "b": (2.0, 2.0, 2.0)})
    assert timed.rounds == 3 and timed.seconds("a") == Spread(2.0, 1.0, 4.0)
    assert timed.ratio("a", "b") == Spread(1.0, 0.5, 2.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert alternate({"a": lambda: None, "b": lambda: None}, seconds=0.0).rounds == 3


# -- profiles ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> plait.CompiledModel:
    return plait.compile(Layers().eval(), (torch.randn(64, 256),))


def test_a_profile_is_complete_and_adds_up(compiled: plait.CompiledModel) -> None:
    found = compiled.profile(seconds=0.5)
    steps = compiled.compiled.plan.steps
    assert sorted(i for row in found.rows for i in row.steps) == list(range(len(steps)))
    assert all(row.seconds.median > 0 for row in found.rows)
    assert [r.seconds.median for r in found.rows] == sorted((r.seconds.median for r in found.rows), reverse=True)
    assert sum(found.share(row) for row in found.rows) == pytest.approx(1.0)
    assert found.runs >= 5 and 0.3 < found.total.median / found.whole.median < 3.0  # the machine may be busy
    layers = max(found.rows, key=lambda row: row.flops)
    assert layers.count == 12 and layers.kind == "kernel" and "test_bench.py:" in layers.source
    assert layers.flops == 12 * (2 * 64 * 256 * 256 + 64 * 256) and "layer(x)" in layers.code
    assert layers.bound is not None and layers.predicted is not None and layers.predicted >= layers.bound > 0
    (sort,) = [row for row in found.rows if row.kind == "library"]
    assert sort.name == "aten.sort.default" and sort.bound is None and sort.roofline is None
    assert found.ratio is not None and found.ratio.median > 0


def test_a_profile_prints_and_is_json(compiled: plait.CompiledModel, tmp_path: Path) -> None:
    found = compiled.profile(torch.randn(64, 256), seconds=0.1)
    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["ms", "share", "count", "step"] and len(lines) >= 2 + len(found.rows) + 3
    assert "sum of the steps" in str(found) and "Gflop/s" in str(found)
    data = json.loads(json.dumps(found.as_json()))
    assert data["rows"][0].keys() >= {"kind", "name", "count", "seconds", "share", "flops", "read", "written", "bound",
                                      "predicted", "roofline", "source", "sources"}  # fmt: skip
    assert data["total"]["median"] > 0 and data["ceilings"]["levels"][-1]["capacity"] is None
    compiled.report(tmp_path / "page.html", found)
    page = (tmp_path / "page.html").read_text()
    assert "Where the time goes" in page and all(row.name in page for row in found.rows)
    compiled.report(tmp_path / "plain.html")
    assert "Where the time goes" not in (tmp_path / "plain.html").read_text()


def test_profiling_leaves_state_and_inputs_alone() -> None:
    model = plait.compile(Counting().eval(), (torch.ones(3),))
    x = torch.ones(3)
    model.profile(x, seconds=0.05)
    assert model.state["count"].tolist() == [0.0] * 3 and x.tolist() == [1.0] * 3
    assert model(x).tolist() == [1.0] * 3


def test_dynamic_sizes_are_those_of_the_inputs() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    model = plait.compile(nn.Linear(8, 4).eval(), (torch.ones(3, 8),), dynamic_shapes=({0: rows},))
    flops = {n: sum(r.flops for r in model.profile(torch.ones(n, 8), seconds=0.02).rows) for n in (2, 7)}
    assert flops == {2: 2 * 2 * 8 * 4, 7: 2 * 7 * 8 * 4}


def test_plans_of_devices_are_not_profiled(compiled: plait.CompiledModel) -> None:
    elsewhere = replace(compiled.compiled, options=CodegenOptions(target="cuda:90"))
    with pytest.raises(CannotProfile, match="cuda:90"):
        profile(elsewhere, compiled.executable, ())


def test_bench_shows_and_writes_the_profile(folder: Path) -> None:
    args = ("bench_factories:mlp", "--seconds", "0.1", "--peer", "eager")
    result = run(*args, "--report", "page.html", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["profile"]["rows"] and "Where the time goes" in (folder / "page.html").read_text()
    assert "roofline" in run(*args, "--profile").stdout


# -- traces -----------------------------------------------------------------------------------------------------------


def test_a_trace_shows_each_step_of_one_call(tmp_path: Path) -> None:
    model = plait.compile(Layers().eval(), (torch.randn(64, 256),))
    model.trace(tmp_path / "call.json")
    found = json.loads((tmp_path / "call.json").read_text())["traceEvents"]
    predicted = [e["name"] for e in found if e["pid"] == 0 and e["ph"] == "X"]
    found = [e for e in found if e["pid"] == 1]
    names = {(e["name"], e.get("tid")): e["args"]["name"] for e in found if e["ph"] == "M"}
    assert names == {("process_name", None): "measured", ("thread_name", 0): "compute"}
    spans = [e for e in found if e["ph"] == "X"]
    assert [e["args"]["step"] for e in spans] == list(range(len(model.executable.plan.steps)))
    assert predicted == [*(e["name"] for e in spans), "outside of the plan"]
    assert spans[-1]["name"].startswith("aten.sort") and "test_bench.py" in spans[-1]["args"]["source"]
    assert spans[0]["ts"] == 0 and all(e["dur"] > 0 for e in spans)
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(spans))


def test_a_trace_leaves_state_as_it_is(tmp_path: Path) -> None:
    model = plait.compile(Counting(), (torch.ones(3),))
    model.trace(tmp_path / "call.json", torch.ones(3))
    assert torch.equal(model.state["count"], torch.zeros(3))


def test_collectives_are_threads_beside_the_steps() -> None:
    sort = Call("aten.sort.default", (), (), (), "library", "", "model.py:3")
    plan = Plan((), (), (), (Launch("k", (), ()), sort), (), ())
    spans = [(0, 5_000, 9_000), (1, 9_000, 21_000)]
    records = [
        Record("g", "all_reduce, collective 1 of the plan,", 4_000, 12_000, 64),
        Record("h", "exchange", 7_000, 9_000, 0),
    ]
    found = events(plan, spans, records, label="rank 1", process=3)
    assert {e["pid"] for e in found} == {3} and found[0]["args"] == {"name": "rank 1"}
    assert [e["args"]["name"] for e in found[1:4]] == ["compute", "communication g", "communication h"]
    shown = [(e["tid"], e["name"], e["ts"], e["dur"]) for e in found[4:]]
    steps = [(0, "k", 1.0, 4.0), (0, "aten.sort", 5.0, 12.0)]
    assert shown == [*steps, (1, "all_reduce", 0.0, 8.0), (2, "exchange", 3.0, 2.0)]
    assert found[5]["args"] == {"step": 1, "source": "model.py:3"} and found[6]["args"] == {"group": "g", "bytes": 64}
    assert events(plan, [], records[:1])[2]["args"] == {"name": "communication"}


def test_bench_writes_a_trace(folder: Path) -> None:
    args = ("bench_factories:mlp", "--seconds", "0.1", "--peer", "eager", "--trace", "call.json")
    assert json.loads(run(*args, "--json").stdout)["trace"] == "call.json"
    assert json.loads((folder / "call.json").read_text())["traceEvents"]
    assert "wrote call.json" in run(*args).stdout
