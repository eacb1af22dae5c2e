"""Convolutions get their images channels-last where that saves copies, and nobody outside sees it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import plait
import pytest
import torch
from plait.codegen.compile import compile_graph
from plait.ir import Graph, Value
from plait.ir.strides import channels_last_strides
from plait.passes.channels_last import ChannelsLast
from plait.runtime import weights
from plait.runtime.plan import Call
from plait.runtime.reordered import Reordered
from torch import nn

from tests.helpers import apply, graph, random_inputs, refusals, run

SIGNATURE = 'def f(x: "f32[2,8,10,10]", w: "f32[8,8,3,3]", v: "f32[8,8,3,3]", s: "f32[8,1,1]"):\n'
CONV = "aten.convolution.default({}, {}, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)"
TWO = (f"a = {CONV.format('x', 'w')}", "b = aten.relu.default(a)", f"c = {CONV.format('b', 'v')}")


def text(*lines: str, result: str = "c", signature: str = SIGNATURE) -> str:
    return signature + "".join(f"    {line}\n" for line in (*lines, f"return ({result},)"))


def layouts(made: Graph, op: str) -> list[bool]:
    """Whether each result of an op lies channels-last."""
    outs = [n.outputs[0].tensor for n in made.nodes if n.op.name == op]
    return [kind.strides == channels_last_strides(kind.shape) for kind in outs]


def same(before: Graph, after: Graph) -> None:
    inputs = random_inputs(before)
    for got, want in zip(run(after, [x.clone() for x in inputs]), run(before, inputs), strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def test_a_chain_of_convolutions_is_copied_at_its_ends_only() -> None:
    before = graph(text(*TWO))
    step = apply(ChannelsLast(), before)
    assert step.fired == {"convolution": 2}
    assert layouts(step.after, "aten.convolution.default") == [True, True] and layouts(step.after, "aten.relu.default") == [
        True
    ]
    assert sum(n.op.name == "aten.clone.default" for n in step.after.nodes) == 2
    same(before, step.after)


def test_what_pools_normalises_and_joins_follows() -> None:
    lines = (
        *TWO,
        "d = aten.mul.Tensor(c, s)",
        "e = aten.add.Tensor(x, d)",  # the input is copied once, for this and the first convolution
        "g = aten.cat.default((e, b), 1)",
        "p, i = aten.max_pool2d_with_indices.default(g, (2, 2), (2, 2), (0, 0), (1, 1), False)",
        "m = aten.mean.dim(p, (2, 3), False)",
    )
    before = graph(text(*lines, result="m, i"))
    step = apply(ChannelsLast(), before)
    for op in ("mul.Tensor", "add.Tensor", "cat.default", "max_pool2d_with_indices.default"):
        assert layouts(step.after, f"aten.{op}") == [True], op
    assert sum(n.op.name == "aten.clone.default" for n in step.after.nodes) == 2  # of x, of the indices
    same(before, step.after)


@pytest.mark.parametrize(
    "line",
    [
        "r = aten.view.default(c, (2, 800))",
        "r = aten.as_strided.default(c, (5, 5), (100, 1), 3)",
        "r = aten.as_strided_copy.default(c, (5, 5), (100, 1), 3)",
        "n = aten.sym_stride.int(c, 1); r = aten.full.default((3,), n)",
        "r = aten.view.default(c, (16, 100))",
        "r, t = aten.bernoulli.p(c, 0.5); ",
        "q = aten.permute.default(c, (1, 0, 3, 2)); r = aten.relu.default(q)",
    ],
)
def test_what_asks_for_a_layout_gets_the_one_that_it_had(line: str) -> None:
    lines = [*TWO, *(part for part in line.split("; ") if part)]
    before = graph(text(*lines, result="r"))
    after = apply(ChannelsLast(), before).after
    assert layouts(after, "aten.convolution.default")[0]
    torch.manual_seed(0)
    inputs = random_inputs(before)
    want = run(before, [x.clone() for x in inputs])
    torch.manual_seed(0)
    got = run(after, inputs)
    torch.testing.assert_close(got, want)
    assert got[0].stride() == want[0].stride()


def test_weights_larger_than_their_images_keep_the_layout() -> None:
    signature = 'def f(x: "f32[1,64,4,4]", w: "f32[64,64,3,3]"):\n'
    step = apply(ChannelsLast(), graph(text(f"c = {CONV.format('x', 'w')}", signature=signature)))
    assert not step.changed


def test_they_do_so_after_one_that_changed_too() -> None:
    signature = 'def f(x: "f32[1,64,4,4]", u: "f32[64,1,3,3]", w: "f32[64,64,3,3]"):\n'
    depthwise = CONV.format("x", "u").removesuffix("1)") + "64)"
    lines = (f"a = {depthwise}", "e = aten.relu.default(a)", f"c = {CONV.format('e', 'w')}")
    before = graph(text(*lines, result="c", signature=signature))
    step = apply(ChannelsLast(), before)
    assert layouts(step.after, "aten.convolution.default")[-1:] == [False]
    same(before, step.after)


def test_it_says_why_where_copies_would_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.passes.channels_last._COPY", 2.0)
    step = apply(ChannelsLast(), graph(text(*TWO, "d = aten.sin.default(b)", result="a, b, c, d")))
    assert not step.changed and all("would save" in r for r in refusals(step)) and len(refusals(step)) == 1


def test_sizes_may_be_symbols() -> None:
    source = 'graph(level="tensor", symbols={"s0": (2, None, 5)})\n' + text(*TWO).replace("f32[2,8", "f32[s0,8")
    before = graph(source)
    step = apply(ChannelsLast(), before)
    assert layouts(step.after, "aten.convolution.default") == [True, True]
    for rows in (2, 7):
        x, w, v, s = torch.randn(rows, 8, 10, 10), *(torch.randn(8, 8, 3, 3) for _ in range(2)), torch.randn(8, 1, 1)
        (got,), (want,) = run(step.after, [x, w, v, s]), run(before, [x, w, v, s])
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


@pytest.mark.parametrize("training", [False, True])
def test_nobody_sees_it_through_compile(training: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.MaxPool2d(2),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 49, 5),
    ).train(training)  # fmt: skip
    compiled = torch.compile(model, backend="plait")
    x = torch.randn(2, 3, 30, 30)
    results = []
    for one in (model, compiled):
        torch.manual_seed(3)
        model.zero_grad()
        out = one(x)
        out.square().sum().backward()
        results.append((out.detach(), *(p.grad for p in model.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_results_that_share_memory_go_on_to_do_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.passes.channels_last._COPY", 0.0)
    lines = (*TWO, "p = aten.permute.default(c, (0, 2, 3, 1))", "q = aten.slice.Tensor(p, 1, 1, 8)")
    before = graph(text(*lines, result="c, q"))
    step = apply(ChannelsLast(), before)
    assert step.fired
    c, q = run(step.after, random_inputs(before))
    c.zero_()
    assert not q.any() and q.stride() == (800, 10, 1, 100)


def test_values_are_followed_by_what_took_their_place() -> None:
    before = graph(text(*TWO))
    step = apply(ChannelsLast(), before)
    (first, *_) = (n.out for n in before.nodes)
    became = step.became(first)
    assert isinstance(became, Value) and became is not first and became.tensor.shape == first.tensor.shape
    assert plait.passes.make("channels-last").numerics().kind == "reassociates"


LINE = "aten.convolution.default(x, w, None, (2, 1), (1, 0), (1, 1), False, (0, 0), 2)"
OWNED = f"""def f(x: "f32[{{n}},4,6,7]"):
    w = plait.constant("w")
    y = {LINE}
    z = aten.relu.default(y)
    return (z,)
"""


def test_weights_of_the_graph_are_laid_out_once() -> None:
    w = torch.randn(6, 2, 3, 3)
    text = 'graph(level="tensor", symbols={"s0": (2, None, 5)})\n' + OWNED.format(n="s0")
    before = graph(text, {"w": w})
    after = apply(ChannelsLast(), before).after
    compiled = compile_graph(after)
    (name,) = (str(v.ref) for v in weights.constants(compiled.plan))
    found = Reordered.named(name)
    assert found == Reordered("w", (5, 4, 6, 7), (2, 1), (1, 0), (1, 1), 2) and found.name == name
    assert [i.op for i in compiled.plan.steps if isinstance(i, Call)] == ["mkldnn._convolution_pointwise.default"]
    assert list(weights.stored(compiled.plan, after.constants)) == ["w"]
    for rows in (2, 5, 33):
        x = torch.randn(rows, 4, 6, 7)
        torch.testing.assert_close(compiled.executable(x)[0], run(before, [x])[0])


def test_artifacts_hold_the_weight_itself(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 300, 1)).eval()
    x = torch.randn(3, 4, 5, 5)
    compiled = plait.compile(model, (x,))
    compiled.save(tmp_path / "m.plait")
    loaded = plait.load(tmp_path / "m.plait")
    assert torch.equal(loaded(x), compiled(x))
    torch.testing.assert_close(loaded(x), model(x))
    raw = zipfile.ZipFile(tmp_path / "m.plait").read("weights.safetensors")
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert sorted(header) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_names_of_other_constants_are_no_layouts() -> None:
    assert all(Reordered.named(n) is None for n in ("w", "w|panels:k:33x5", "w|onednn:3", "w|onednn:1x2:a:0:1:1"))
