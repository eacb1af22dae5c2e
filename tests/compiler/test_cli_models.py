"""`plait run`, `plait inspect` and `plait diff` on an artifact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from plait.compiler.aot import save
from plait.compiler.cli import main
from plait.compiler.running import compare, random_inputs
from plait.compiler.source import Targets
from plait.runtime.artifact import load
from safetensors.torch import load_file, save_file

from tests.compiler.small import expected, ready


def plait(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), catch_exceptions=False)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cli") / "small.plait"
    save(ready(), path, targets=Targets(isas=("x86-64-v3",)))
    return str(path)


def test_run_on_random_inputs(artifact: str) -> None:
    result = plait("run", artifact, "--random", "--seed", "3", "--size", "s0=5", "--json")
    found = json.loads(result.stdout)
    assert [o["kind"] for o in found["outputs"]] == ["float32[5, 4]", "float32[5, 4]", "int"]
    assert found["outputs"][2]["value"] == 5 and found["outputs"][0]["min"] == 0.0
    assert found == json.loads(plait("run", artifact, "--random", "--seed", "3", "--size", "s0=5", "--json").stdout)
    assert found != json.loads(plait("run", artifact, "--random", "--seed", "4", "--size", "s0=5", "--json").stdout)


def test_run_on_files(artifact: str, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.safetensors"):
        out = str(tmp_path / "out.safetensors")
        assert plait("run", artifact, "--inputs", str(tmp_path / name), "--save", out).exit_code == 0
        assert torch.equal(load_file(out)["output0"], expected(x)["act"])


def test_run_compares_with_the_graph_and_times(artifact: str) -> None:
    result = plait("run", artifact, "--random", "--compare", "graph", "--repeat", "3", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["seconds"] > 0
    assert [(c["equal"], c["max_abs"]) for c in found["comparison"]] == [(True, 0.0)] * 3


SOURCE = """
import torch

class Model(torch.nn.Module):
    def forward(self, x):
        act = torch.relu(x + torch.tensor([-1.0, 0.0, 1.0, {last}]))
        return act, act.sort().values, x.shape[0]

def make(): return Model(), (torch.ones(2, 4),)
"""


@pytest.mark.parametrize(("last", "code"), [("2.0", 0), ("2.5", 1)])
def test_run_compares_with_eager(
    last: str, code: int, artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"eager_{code}"
    (tmp_path / f"{name}.py").write_text(SOURCE.format(last=last))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = plait("run", artifact, "--random", "--compare", "eager", "--source", f"{name}:make")
    assert result.exit_code == code
    assert ("DIFFERS" in result.stdout) == bool(code)
    loose = plait("run", artifact, "--random", "--compare", "eager", "--source", f"{name}:make", "--atol", "0.6")
    assert loose.exit_code == 0


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ((), 2, "either --inputs or --random"),
        (("--random", "--compare", "eager"), 2, "needs --source"),
        (("--random", "--size", "s0=many"), 2, "SYMBOL=N"),
        (("--random", "--size", "s1=2"), 2, "no size is called 's1', only s0"),
        (("--random", "--size", "s0=1000"), 4, "P0508"),
        (("--inputs", "{folder}/bad.npy"), 2, "P0704"),
        (("--inputs", "{folder}/other.safetensors"), 2, "no tensor 'x'"),
        (("--inputs", "{folder}/rank.npy"), 4, "P0505"),
        (("--inputs", "{folder}/rank.npy", "--inputs", "{folder}/rank.npy"), 2, "2 files were given"),
    ],
)
def test_wrong_use_of_run(args: tuple[str, ...], code: int, text: str, artifact: str, tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY nothing")
    np.save(tmp_path / "rank.npy", np.ones(4, np.float32))
    save_file({"y": torch.ones(1)}, tmp_path / "other.safetensors")
    result = plait("run", artifact, *(a.format(folder=tmp_path) for a in args))
    assert result.exit_code == code and text in result.stderr and result.stdout == "", result.stderr


def test_a_damaged_file_is_an_exit_code_not_a_traceback(artifact: str, tmp_path: Path) -> None:
    data = bytearray(Path(artifact).read_bytes())
    at = data.index(b"aten.sort")
    data[at : at + 4] = b"nope"
    (tmp_path / "damaged.plait").write_bytes(data)
    result = plait("run", str(tmp_path / "damaged.plait"), "--random")
    assert result.exit_code == 4 and "P0520" in result.stderr and "Traceback" not in result.stderr
    (tmp_path / "text.plait").write_text("nothing")
    assert "P0521" in plait("inspect", str(tmp_path / "text.plait")).stderr


def test_inspect(artifact: str) -> None:
    found = json.loads(plait("inspect", artifact, "--json").stdout)
    assert found["inputs"] == ["x: float32[s0,4]"] and found["symbols"] == {"s0": "2..64"}
    assert found["targets"] == ["x86-64-v3"] and found["kernels"] == 1
    assert "x: float32[s0,4]" in plait("inspect", artifact).stdout
    assert "aten.relu" in plait("inspect", artifact, "--graph", "tensor").stdout
    plan = plait("inspect", artifact, "--graph", "plan").stdout
    assert "launch relu_" in plan and "aten.sort.default(v4, -1, False)  # library: torch's sort" in plan
    assert "P0707" in plait("inspect", artifact, "--graph", "nothing").stderr
    assert "// ==== runner.cpp" in plait("inspect", artifact, "--kernels").stdout
    assert "torch's sort" in plait("inspect", artifact, "--coverage").stdout


def test_diff_of_artifacts(artifact: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.plait")
    save(ready(w3=5.0), other, targets=Targets(isas=("x86-64-v3",)))
    assert plait("diff", artifact, artifact).exit_code == 0
    result = plait("diff", artifact, other, "--json")
    assert result.exit_code == 1 and set(json.loads(result.stdout)["differences"]) == {"weights"}
    assert plait("diff", artifact, other, "--graph", "tensor").exit_code == 0


def test_random_inputs_respect_range_layout_and_kind(artifact: str) -> None:
    plan = load(artifact).executable.plan
    assert random_inputs(plan)[0].shape == (8, 4)
    assert random_inputs(plan, given={"s0": 2})[0].shape == (2, 4)


def test_comparison_of_results() -> None:
    nan, inf = float("nan"), float("inf")
    one = torch.tensor([1.0, nan, inf])
    assert [c.equal for c in compare([one, 3], [one.clone(), 3])] == [True, True]
    near = compare([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])])[0]
    assert not near.equal and near.max_abs == 0.5 and near.relative == pytest.approx(0.5 / (1 + 2.5**2) ** 0.5)
    assert compare([torch.ones(2)], [torch.ones(3)])[0].note == "float32[2] against float32[3]"
    assert compare([torch.ones(2)], [torch.ones(2), 1])[0].note == "1 results against 2"
    assert not compare([torch.ones(2)], [torch.tensor([1.0, nan])])[0].equal
    assert compare([torch.empty(0)], [torch.empty(0)])[0].equal
