"""From a compiled graph to a file and back, in this process and in one without the compiler."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plait.codegen.compile import CodegenOptions, compile_graph
from plait.compiler.aot import parts, save
from plait.compiler.source import Targets
from plait.errors import BadTarget
from plait.ir import parse_graph, structurally_equal
from plait.runtime.artifact import load

from tests.compiler.small import expected, ready


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aot") / "small.plait"
    save(ready(), path)
    return path


def test_a_loaded_model_gives_the_same_answer(artifact: Path) -> None:
    model = load(artifact)
    for rows in (2, 7, 64):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


def test_the_manifest_says_what_was_done(artifact: Path) -> None:
    manifest = load(artifact).manifest
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["name"] == "small"
    assert [p["name"] for p in manifest["passes"]] == ["prune"]
    assert manifest["passes"][0]["fired"] == {"dead-node": 1} and manifest["passes"][0]["numerics"]["kind"] == "exact"
    assert set(manifest["targets"]) == {"x86-64-v3", "x86-64-v4"}
    assert manifest["coverage"]["generated"] >= 2
    assert [r["op"] for r in manifest["coverage"]["reported"]] == ["aten.sort.default"]


def test_graphs_come_back_equal_from_the_file(artifact: Path) -> None:
    model = load(artifact)
    weights = {"w": torch.tensor([-1.0, 0.0, 1.0, 2.0])}
    assert structurally_equal(parse_graph(model.graphs["captured"], weights), ready().captured)
    assert "aten.exp" in model.graphs["captured"] and "aten.exp" not in model.graphs["tensor"]


def test_the_file_runs_in_a_process_without_the_compiler(artifact: Path, tmp_path: Path) -> None:
    code = """
import json, sys, torch, plait
out = plait.load(sys.argv[1])(torch.arange(8.0).reshape(2, 4))
modules = sorted({m.split(".")[1] for m in sys.modules if m.startswith("plait.")})
print(json.dumps({"act": out["act"].tolist(), "modules": modules}))
"""
    run = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["act"] == expected(torch.arange(8.0).reshape(2, 4))["act"].tolist()
    assert found["modules"] == ["errors", "formats", "runtime"]


def test_kernels_travel_as_source_and_as_binaries(artifact: Path) -> None:
    names = zipfile.ZipFile(artifact).namelist()
    sources = [n for n in names if n.startswith("kernels/src/")]
    assert any(n.endswith(".cpp") and "runner" not in n for n in sources) and any(n.endswith(".h") for n in sources)
    for isa in ("x86-64-v3", "x86-64-v4"):
        assert {f"kernels/bin/{isa}/runner.so", f"kernels/bin/{isa}/kernels-0.so"} <= set(names)


def test_only_what_was_asked_for_is_built() -> None:
    assert set(parts(ready(), Targets(isas=("x86-64-v3",))).binaries) == {"x86-64-v3"}


def test_products_of_halves_come_with_binaries_for_processors_that_multiply_pairs() -> None:
    text = """def f(x: "bf16[3,5]", y: "bf16[5,7]"):
    z = aten.mm.default(x, y)
    return (z,)
"""
    graph = parse_graph(text)
    halves = replace(ready(), compiled=compile_graph(graph), captured=graph)
    assert set(parts(halves).binaries) == {"x86-64-v3", "x86-64-v4", "x86-64-v4-dot"}
    assert set(parts(ready()).binaries) == {"x86-64-v3", "x86-64-v4"}


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(ready(), tmp_path / name, targets=Targets(isas=("x86-64-v3",)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_model_captured_on_a_gpu_has_no_plan_for_cpus() -> None:
    made = ready()
    there = replace(made, compiled=replace(made.compiled, options=CodegenOptions(target="cuda:90")))
    with pytest.raises(BadTarget, match="captured for cuda:90"):
        parts(there, Targets(isas=("x86-64-v3",)))
