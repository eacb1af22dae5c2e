"""What torch offers for debugging works on plait: its bisector, its minifier, its logs and its traces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import plait.compiler.backend  # registers plait's choices with torch's bisector
import pytest
import torch
from plait.ir import Builder, Graph, Rule, Var, pattern
from plait.ir.rewrite import Match
from plait.passes.base import Context, Pass
from torch._inductor.compiler_bisector import BACKENDS, CompilerBisector

X = torch.linspace(-2, 2, 64).view(4, 16)


@dataclass(frozen=True)
class Slip(Pass):
    """Turns `x * 2` into `x * 2.5`, after two right rewrites."""

    name: ClassVar[str] = "slip"
    at: ClassVar[Any] = "split"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        def negated(m: Match, b: Builder) -> Any:
            return b.call("aten.add.Tensor", m["x"], -0.5)

        def scaled(m: Match, b: Builder) -> Any:
            return b.call("aten.mul.Tensor", m["x"], 2.5)

        rules = [
            Rule("harmless", pattern("aten.sub.Tensor", Var("x"), 0.5), negated),
            Rule("wrong", pattern("aten.mul.Tensor", Var("x"), 2), scaled),
        ]
        return ctx.rewrite(graph, rules)


def program(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh((x - 0.5 - 0.5) * 2)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # where the bisector keeps its state
    yield
    torch._dynamo.reset()


def test_torchs_bisector_finds_a_wrong_rewrite() -> None:
    def right() -> bool:
        torch._dynamo.reset()
        got = torch.compile(program, backend="plait", options={"passes": [Slip()]})(X)
        return torch.allclose(got, program(X), atol=1e-4)

    known = list(BACKENDS)
    assert known.index("plait") == known.index("eager") + 1 and "inductor" in known
    found: Any = CompilerBisector.do_bisect(right)
    assert (found.backend, found.subsystem) == ("plait", "passes")
    assert found.debug_info.startswith("slip, rule wrong, aten.mul.Tensor at test_torch_hooks.py:")
    assert not CompilerBisector.bisection_enabled and right() is False  # nothing is left behind


def test_registering_twice_changes_nothing() -> None:
    before = dict(BACKENDS)
    assert plait.compiler.decisions.register_with_torch()
    assert list(BACKENDS) == list(before) and BACKENDS["plait"] is before["plait"]


# -- other processes ------------------------------------------------------------------------------------------------------

PLANTED = """
from dataclasses import dataclass
from typing import Any, ClassVar
from plait.compiler.backend import plait
from plait.ir import Rule, Var, pattern
from plait.passes.base import Pass

def trip(m, b):
    raise IndexError("planted")

@dataclass(frozen=True)
class Faulty(Pass):
    name: ClassVar[str] = "faulty"
    at: ClassVar[Any] = "split"

    def run(self, graph, ctx):
        return ctx.rewrite(graph, [Rule("trip", pattern("aten.relu.default", Var("x")), trip)])

def backend(gm, inputs, **how):
    return plait(gm, inputs, options={"passes": [Faulty()]})
"""
PROGRAM = """
import torch

def program(x):
    x = torch.sin(x) * 0.5 + 1
    return torch.exp(torch.relu(x) - 2).sum()

print(torch.compile(program, backend="%s")(torch.linspace(-2, 2, 64).view(4, 16)))
"""


def run(folder: Path, script: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    if isinstance(script, str):
        (folder / "program.py").write_text(script)
        script = folder / "program.py"
    return subprocess.run(
        [sys.executable, str(script)], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_torchs_minifier_works(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    info = tmp_path / "planted-1.dist-info"  # the launcher is another process: it finds the backend by its entry point
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\nplanted = planted:backend\n")
    env = {"PYTHONPATH": str(tmp_path), "TORCHDYNAMO_REPRO_AFTER": "dynamo"}
    first = run(tmp_path, PROGRAM % "planted", **env)
    assert first.returncode != 0 and "IndexError: planted" in first.stderr
    launcher = next((tmp_path / "torch_compile_debug").glob("run_*/minifier/minifier_launcher.py"))
    assert "torch.exp" in launcher.read_text()
    done = run(tmp_path, launcher, PYTHONPATH=str(tmp_path))
    repro = (tmp_path / "repro.py").read_text()
    assert "Wrote minimal repro" in done.stdout + done.stderr
    assert "torch.relu" in repro and "torch.exp" not in repro and "torch.sin" not in repro


def test_the_minifier_has_nothing_to_say_of_right_programs(tmp_path: Path) -> None:
    done = run(tmp_path, PROGRAM % "plait", TORCHDYNAMO_REPRO_AFTER="dynamo")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("torch_compile_debug/run_*/minifier/*"))


def test_logs_and_traces_show_every_pass(tmp_path: Path) -> None:
    done = run(tmp_path, PROGRAM % "plait", TORCH_LOGS="+plait", TORCH_TRACE=str(tmp_path / "trace"))
    assert done.returncode == 0, done.stderr
    assert "pipelines.py" in done.stderr
    assert "0_0_inference after simplify:" in done.stderr and "aten.relu.default(" in done.stderr
    artifacts = traced(tmp_path / "trace")
    names = [n.removeprefix("plait_0_0_inference_") for n in artifacts if n.startswith("plait_0_0_inference_")]
    order = ("captured", "normalise", "pack-weights", "fold", "attention", "simplify", "share", "channels-last", "layout",
             "prune")  # fmt: skip
    passes = [f"{i:03d}_{name}" for i, name in enumerate(order)]
    assert names == [*passes, "coverage"]
    assert "def inference(" in artifacts["plait_0_0_inference_005_simplify"]
    assert json.loads(artifacts["plait_0_0_inference_coverage"])["generated"] > 0


def test_tlparse_shows_the_artifacts(tmp_path: Path) -> None:
    done = run(tmp_path, PROGRAM % "plait", TORCH_TRACE=str(tmp_path / "trace"))
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "trace").glob("*.log")
    tlparse = Path(sys.executable).with_name("tlparse")
    done = subprocess.run(
        [tlparse, "--strict", "--no-browser", "-o", tmp_path / "shown", log], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "shown" / "index.html").read_text()
    (graph,) = (tmp_path / "shown").glob("*/plait_0_0_inference_005_simplify_*.txt")
    (coverage,) = (tmp_path / "shown").glob("*/plait_0_0_inference_coverage_*.json")
    assert graph.name in index and coverage.name in index
    assert "def inference(" in graph.read_text()


def traced(folder: Path) -> dict[str, str]:
    """The artifacts in TORCH_TRACE files: a line of JSON for each, its payload on the lines behind it, after a tab."""
    found: dict[str, str] = {}
    (path,) = folder.glob("*.log")
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("\t"):
            if name:
                found[name] += line[1:] + "\n"
            continue
        entry = json.loads(line[line.index("{") :])
        name = entry.get("artifact", {}).get("name", "")
        if name:
            found[name] = ""
    return found
