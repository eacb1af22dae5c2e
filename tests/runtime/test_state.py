"""State of plans: what a call writes, inputs that become state, and artifacts that hold it."""

import pytest
import torch
from plait.errors import DamagedArtifact
from plait.runtime.artifact import Parts, load, write
from plait.runtime.check import check
from plait.runtime.executor import Executable
from plait.runtime.plan import Launch
from plait.runtime.state import hold, written_constants, written_inputs

from tests.runtime.kit import call, edit_manifest, make_plan, structure, tensor_input, v, value


def counting():
    """count += 1; y = x + count, over vectors of length 8; `count` is the first input."""
    values = [value(0, "input", (8,), 0), value(1, "input", (8,), 1), value(2, "fresh", (8,))]
    steps = [Launch("increment", (0,), (8,)), Launch("add", (1, 0, 2), (8,))]
    return make_plan([tensor_input("count", (8,)), tensor_input("x", (8,))], values, steps, [2])


def test_written_inputs_become_state(kernels):
    plan = counting()
    count = torch.zeros(8)
    held = hold(plan, {"count": count})
    assert (written_inputs(plan), written_constants(plan)) == ([0], [])
    assert (written_inputs(held), written_constants(held)) == ([], ["count"])
    assert [spec.name for spec in held.inputs] == ["x"]
    check(held)
    run = Executable(held, kernels, {"count": count})
    assert [run(torch.zeros(8))[0][0].item() for _ in range(3)] == [1, 2, 3]
    assert count[0].item() == 3


def test_writes_of_torch_ops_and_through_views_count():
    values = [value(i, "input", (8,), i) for i in range(4)] + [value(4, "view", (4,), 1, offset=4), value(5, "fresh", (8,))]
    steps = [
        call("aten.add_.Tensor", [v(0), v(2)], [None]),
        Launch("increment", (4,), (4,)),
        call("aten.relu.default", [v(2)], [3]),
        call("aten.mul.Tensor", [v(0), v(2)], [5]),
    ]
    plan = make_plan([tensor_input(n, (8,)) for n in "abcd"], values, steps, [5])
    check(plan)
    assert written_inputs(plan) == [0, 1, 3]


def test_an_artifact_whose_list_of_buffers_is_wrong(binaries, cache, tmp_path):
    path, count = tmp_path / "m.plait", torch.zeros(8)
    plan = hold(counting(), {"count": count})
    x = structure(torch.zeros(8))
    write(path, Parts(plan, {"count": count}, x, structure(0).child(0).child(0), binaries={"x86-64-v3": binaries},
                      state={"model.count": "count"}))  # fmt: skip
    model = load(path)
    assert model(torch.zeros(8))[0].item() == 1 and list(model.state) == ["model.count"]
    for wrong in (3, [["model.count"]], [["model.count", "other"]], {"a": 1}):
        with pytest.raises(DamagedArtifact, match="buffers"):
            load(edit_manifest(path, lambda m, wrong=wrong: m.update(state=wrong)))
    assert load(edit_manifest(path, lambda m: m.pop("state"))).state == {}
