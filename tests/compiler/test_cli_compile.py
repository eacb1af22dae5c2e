"""`plait compile` and `explain` on small models, from SRC to exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from plait.compiler.cli import main
from plait.compiler.commands.models import default_output
from plait.runtime.artifact import load

from tests.compiler.factories import MLP

FACTORIES = f"""{MLP}
class Jump(torch.nn.Module):
    def forward(self, x):
        return x.relu() if x.sum().item() > 0 else x

def jump(): return Jump(), (torch.ones(3),)
def broken(): raise RuntimeError("weights are missing")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "compile_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def plait(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), catch_exceptions=False)


def test_compile_run_and_compare(folder: Path) -> None:
    made = plait("compile", "compile_factories:mlp", "--dynamic", "x:0=1..64", "--target", "cpu:x86-64-v3")
    assert made.exit_code == 0, made.stderr
    assert "generated kernels" in made.stdout and "wrote mlp.plait" in made.stdout
    symbol = next(iter(json.loads(plait("inspect", "mlp.plait", "--json").stdout)["symbols"]))
    for rows in ("1", "5", "64"):
        command = ("run", "mlp.plait", "--random", "--size", f"{symbol}={rows}")
        result = plait(*command, "--compare", "eager", "--source", "compile_factories:mlp", "--json")
        assert result.exit_code == 0, result.stdout
        assert json.loads(result.stdout)["outputs"][0]["kind"] == f"float32[{rows}, 8]"


def test_compile_says_what_it_did_as_json(folder: Path) -> None:
    command = ("compile", "compile_factories:mlp", "-o", "m.plait", "--target", "cpu:x86-64-v3", "--json")
    found = json.loads(plait(*command).stdout)
    assert found["artifact"] == "m.plait" and found["bytes"] == Path("m.plait").stat().st_size
    assert found["coverage"]["generated"] > 0 and found["seconds"].keys() == {"compile", "build and write"}
    assert {p["name"] for p in found["passes"]} >= {"prune"}


def test_results_go_to_stdout_and_nothing_else_does_where_nobody_watches(folder: Path) -> None:
    command = [sys.executable, "-m", "plait.compiler.cli", "compile", "compile_factories:mlp", "--dry-run", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0 and run.stderr == ""
    assert json.loads(run.stdout)["artifact"] is None


def test_an_exported_program_compiles(folder: Path) -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(4, 3),))
    torch.export.save(program, folder / "lin.pt2")
    assert plait("compile", "lin.pt2", "--target", "cpu:x86-64-v3").exit_code == 0
    x = torch.randn(4, 3)
    torch.testing.assert_close(load(folder / "lin.plait")(x), program.module()(x))


def test_a_dry_run_needs_no_compiler_and_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("CXX", str(folder / "absent"))
    before = set(os.listdir(folder))
    result = plait("compile", "compile_factories:mlp", "--dry-run")
    assert result.exit_code == 0 and "wrote nothing (dry run)" in result.stdout, result.stderr
    assert not [n for n in set(os.listdir(folder)) - before if n.endswith(".plait")]
    refused = plait("compile", "compile_factories:mlp")
    assert refused.exit_code == 3 and "P0303" in refused.stderr


def test_graphs_are_printed_and_dumped(folder: Path) -> None:
    result = plait("compile", "compile_factories:mlp", "--dry-run", "--print-after", "prune", "--dump-dir", "dump")
    assert "after prune" in result.stderr and "def " in result.stderr
    assert list(Path("dump").rglob("*.txt"))


def test_passes_can_be_left_out(folder: Path) -> None:
    found = json.loads(plait("compile", "compile_factories:mlp", "--dry-run", "--disable-pass", "prune", "--json").stdout)
    assert "prune" not in {p["name"] for p in found["passes"]}


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("compile_factories:absent",), 2, "P0701"),
        (("compile_factories:mlp", "--shape", "y=1"), 2, "P0702"),
        (("compile_factories:mlp", "--target", "gpu"), 2, "P0703"),
        (("compile_factories:mlp", "--pass", "nonsense"), 2, "P0201"),
        (("compile_factories:mlp", "--disable-pass", "nonsense"), 2, "P0201"),
        (("compile_factories:mlp", "--option", "nonsense=1"), 2, "P0402"),
        (("compile_factories:jump",), 3, "P0406"),
        (("compile_factories:broken",), 5, "weights are missing"),
    ],
)
def test_mistakes_have_an_exit_code_and_a_way_out(args: tuple[str, ...], code: int, text: str) -> None:
    result = plait("compile", *args)
    assert result.exit_code == code and text in result.stderr and result.stdout == "", result.stderr
    assert ("Traceback" in result.stderr) == (code == 5)


def test_the_traceback_of_an_error_is_there_with_v() -> None:
    result = plait("compile", "compile_factories:absent", "-v")
    assert result.exit_code == 2 and "Traceback" in result.stderr


def test_explain_names_graph_breaks() -> None:
    found = json.loads(plait("explain", "compile_factories:jump", "--json").stdout)
    assert len(found["graphs"]) == 2 and len(found["breaks"]) == 1
    assert "compile_factories.py" in found["breaks"][0]["source"]
    assert "2 graphs, 1 graph breaks" in plait("explain", "compile_factories:jump").stdout


def test_the_artifact_is_named_after_the_source() -> None:
    assert default_output("models.vit:make") == "make.plait"
    assert default_output("dir/encoder.pt2") == "encoder.plait"
    assert default_output("models:Vit.make") == "make.plait"
