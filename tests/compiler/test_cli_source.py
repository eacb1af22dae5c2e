"""SRC, --shape, --dynamic and --target as the command line reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plait.compiler import source
from plait.errors import BadShape, BadSource, BadTarget

FACTORIES = """
import torch

class Model(torch.nn.Module):
    def forward(self, x, mask=None):
        return x.relu() if mask is None else x * mask

def bare(): return Model()
def with_inputs(): return Model(), (torch.ones(2, 3),)
def one_tensor(): return Model(), torch.ones(2, 3)
def dynamic(): return Model(), (torch.ones(2, 3),), {"x": {0: torch.export.Dim.DYNAMIC}}
def wrong(): return {"model": Model()}
def raises(): raise RuntimeError("weights are missing")
class Home:
    @staticmethod
    def make(): return Model(), (torch.ones(1),)
number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_factories", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_factory_gives_a_model_in_eval_mode_and_inputs(folder: Path) -> None:
    found = source.load("my_factories:with_inputs")
    assert not found.model.training and found.names == ("x",)
    assert torch.equal(found.inputs[0], torch.ones(2, 3)) and found.dynamic_shapes is None
    assert source.load("my_factories:one_tensor").inputs[0].shape == (2, 3)
    assert source.load("my_factories:Home.make").inputs[0].shape == (1,)
    assert source.load("my_factories:dynamic").dynamic_shapes == {"x": {0: torch.export.Dim.DYNAMIC}}


def test_shapes_replace_the_inputs_of_a_factory(folder: Path) -> None:
    found = source.load("my_factories:bare", ["x=4x5:bfloat16,mask=5:bool"], seed=3)
    assert [(tuple(t.shape), t.dtype) for t in found.inputs] == [((4, 5), torch.bfloat16), ((5,), torch.bool)]
    again = source.load("my_factories:bare", ["mask=5:bool", "x=4x5:bfloat16"], seed=3)
    assert found.names == again.names == ("x", "mask")
    assert torch.equal(found.inputs[0], again.inputs[0])
    assert not torch.equal(found.inputs[0], source.load("my_factories:bare", ["x=4x5:bfloat16"], seed=4).inputs[0])


def test_dynamic_dimensions_reach_torch_export(folder: Path) -> None:
    found = source.load("my_factories:with_inputs", dynamic=["x:0=2..64", "x:1"])
    assert isinstance(found.model, torch.nn.Module)
    program = torch.export.export(found.model, found.inputs, dynamic_shapes=found.dynamic_shapes)
    ranges = {(int(r.lower), str(r.upper)) for r in program.range_constraints.values()}
    assert ranges == {(2, "64"), (2, "int_oo")}


def test_dynamic_sizes_may_be_named_and_then_are_equal_and_may_be_one(folder: Path) -> None:
    shapes = ["x=3x4,mask=3x4"]
    found = source.load("my_factories:bare", shapes, dynamic=["x:0=rows:1..9", "mask:0=rows", "x:1=1..", "mask:1=x_1"])
    assert found.dynamic_shapes["x"][0] is found.dynamic_shapes["mask"][0]
    assert isinstance(found.model, torch.nn.Module)
    program = torch.export.export(found.model, found.inputs, dynamic_shapes=found.dynamic_shapes)
    assert {(int(r.lower), str(r.upper)) for r in program.range_constraints.values()} == {(1, "9"), (1, "int_oo")}


def test_an_exported_program_brings_its_inputs(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(4, 3),))
    torch.export.save(program, tmp_path / "m.pt2")
    found = source.load(str(tmp_path / "m.pt2"))
    assert found.names == ("input",) and torch.equal(found.inputs[0], torch.ones(4, 3))
    assert torch.equal(found.eager()(torch.ones(4, 3)), program.module()(torch.ones(4, 3)))


@pytest.mark.parametrize(
    ("src", "why"),
    [
        ("model", "holds no colon"),
        ("absent.pt2", "no such file"),
        ("done.plait", "compiled already"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("my_factories:absent", "has no 'absent'"),
        ("my_factories:number", "not a function"),
        ("my_factories:wrong", "returned a dict"),
        ("my_factories:bare", "without example inputs"),
        ("my factories:bare", "is a module"),
    ],
)
def test_a_bad_source_says_why(src: str, why: str, folder: Path) -> None:
    with pytest.raises(BadSource, match=why):
        source.load(src)


def test_a_file_that_is_no_exported_program(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"nothing")
    with pytest.raises(BadSource, match="no zip file"):
        source.load(str(tmp_path / "m.pt2"))


def test_errors_of_the_factory_pass_through(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="weights are missing"):
        source.load("my_factories:raises")
    (folder / "imports_absent.py").write_text("import absent_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        source.load("imports_absent:f")


@pytest.mark.parametrize(
    ("shapes", "dynamic", "why"),
    [
        (["x=3y4"], [], "cannot be read"),
        (["x=3x4:float99"], [], "no dtype 'float99'"),
        (["y=3x4"], [], "takes x, mask"),
        ([], ["x"], "cannot be read"),
        ([], ["x:0="], "cannot be read"),
        ([], ["x:0=rows:"], "cannot be read"),
        ([], ["y:0"], "takes x"),
        ([], ["x:2"], "has 2 dimensions"),
    ],
)
def test_a_bad_shape_says_why(shapes: list[str], dynamic: list[str], why: str, folder: Path) -> None:
    with pytest.raises(BadShape, match=why):
        source.load("my_factories:with_inputs", shapes, dynamic)


def test_shapes_of_an_exported_program_are_fixed(tmp_path: Path) -> None:
    with pytest.raises(BadShape, match=r"fixed by torch\.export"):
        source.load("m.pt2", ["x=1"])


def test_targets() -> None:
    assert source.parse_targets("cpu") == source.Targets(("x86-64-v3", "x86-64-v4", "x86-64-v4-dot"))
    assert source.parse_targets("cpu:x86-64-v3, cuda:90,cuda:sm_80") == source.Targets(("x86-64-v3",), (90, 80))


@pytest.mark.parametrize("text", ["gpu", "cpu:i386", "cuda", "cuda:x"])
def test_an_unknown_target_is_named(text: str) -> None:
    with pytest.raises(BadTarget, match=text):
        source.parse_targets(text)
