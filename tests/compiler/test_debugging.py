"""Numerics after each pass, and dump, edit, run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import plait
import pytest
import torch
from plait import errors
from plait.compiler import debugging as debug
from plait.compiler.debugging.compare import bits_equal, distance
from plait.ir import Graph, parse_graph
from plait.passes.base import Numerics, Step

TEXT = """\
graph(level="tensor", symbols={"s0": (2, None, 6)})
def f(x: "f32[s0,4]", w: "bf16[4,4]", i: "i64[s0]", n: "i64[]"):
    b = plait.constant("b")  # f32[4]
    wide = aten._to_copy.default(w, dtype=torch.float32)
    y = aten.mm.default(x, wide)
    z = aten.add.Tensor(y, b)
    r, t = aten.bernoulli.p(z, 0.5)  # f32[s0,4], token(random)
    m = aten.mul.Tensor(z, r)
    k = aten.add.Tensor(n, 1)
    n[...] = k
    return (m, None, s0)
"""
CONSTANTS = {"b": torch.tensor([0.1, 0.2, 0.3, 0.4])}


@pytest.fixture
def graph() -> Graph:
    return parse_graph(TEXT, CONSTANTS)


def changed(graph: Graph, old: str, new: str) -> Graph:
    text = str(graph)
    assert old in text
    return parse_graph(text.replace(old, new), CONSTANTS)


def step(name: str, before: Graph, after: Graph, numerics: Numerics) -> Step:
    return Step(name, {}, numerics, before, after, {}, (), 0.0)


def test_random_inputs_fit_the_types(graph: Graph) -> None:
    x, w, i, n = debug.random_inputs(graph)
    assert x.shape == (6, 4) and w.dtype == torch.bfloat16 and i.shape == (6,) and n.shape == ()
    assert set(i.tolist()) <= {0, 1}
    torch.testing.assert_close(debug.random_inputs(graph)[0], x)


def test_inputs_keep_their_strides() -> None:
    graph = parse_graph('def f(x: "f32[3,4]{1,3}", e: "f32[2,5]{0,1}"):\n    return (x, e)\n')
    x, e = debug.random_inputs(graph)
    assert x.stride() == (1, 3) and e.stride() == (0, 1)


def test_running_leaves_inputs_alone_and_repeats_random_draws(graph: Graph) -> None:
    inputs = debug.random_inputs(graph)
    kept = [x.clone() for x in inputs]
    first, second = debug.interpret(graph, inputs), debug.interpret(graph, inputs)
    torch.testing.assert_close(inputs, kept)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first[1:3] == (None, 6) and first[3] == inputs[3] + 1


def test_the_reference_is_computed_in_float64(graph: Graph) -> None:
    inputs = debug.random_inputs(graph)
    wide = debug.interpret_wide(graph, inputs)
    assert wide[0].dtype == torch.float64
    x, w, _, _ = inputs
    exact = x.double() @ w.double() + CONSTANTS["b"].double()
    kept = wide[0] != 0
    torch.testing.assert_close(wide[0][kept], exact[kept], rtol=1e-14, atol=0)
    torch.testing.assert_close(wide[0].float(), debug.interpret(graph, inputs)[0])


def test_regions_are_widened_too() -> None:
    graph = parse_graph(
        """\
def f(x: "f32[4]", p: "b1[]"):
    def yes(a: "f32[4]"):
        c = aten._to_copy.default(a, dtype=torch.float32)
        d = aten.exp.default(c)
        return (d,)
    def no(a: "f32[4]"):
        d = aten.sin.default(a)
        return (d,)
    r = plait.cond(p, yes, no, (x,))
    return (r,)
""".replace("r = plait.cond(p, yes, no, (x,))", "r = plait.cond(p, yes, no, (x,))  # f32[4]")
    )
    x = torch.randn(4)
    for p in (True, False):
        (wide,) = debug.interpret_wide(graph, [x, torch.tensor(p)])
        torch.testing.assert_close(wide, (x.double().exp() if p else x.double().sin()), rtol=1e-15, atol=0)


def test_promises_are_judged(graph: Graph) -> None:
    inputs = debug.random_inputs(graph)
    other = changed(graph, "aten.add.Tensor(y, b)", "aten.add.Tensor(b, y)")
    rows = debug.ledger(graph, [step("swap", graph, other, Numerics("exact"))], inputs)
    assert [r.pass_name for r in rows] == ["captured"] * 2 + ["swap"] * 2
    assert rows[2].equal and not rows[2].broken and rows[2].error.relative < 1e-6
    assert rows[3].result == "written n" and rows[3].equal
    table = debug.ledger_table(rows)
    assert "swap" in table and "output 0" in table and "yes" in table


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (Numerics("exact"), False),
        (Numerics("approximate", 1e-4), False),
        (Numerics("approximate", 0.6), True),
        (Numerics("reassociates"), False),
    ],
)
def test_broken_promises_are_named(graph: Graph, said: Numerics, kept: bool) -> None:
    other = changed(graph, "aten.mul.Tensor(z, r)", "aten.mul.Tensor(z, 0.5)")
    inputs = debug.random_inputs(graph)
    # a draw of its own so that only the factor differs
    half = changed(graph, "aten.mul.Tensor(z, r)", "aten.mul.Tensor(z, 1)")
    steps = [step("halve", half, other, said)]
    if kept:
        assert debug.check_ledger(half, steps, inputs)
    else:
        with pytest.raises(errors.NumericsBroken, match=r"(?s)halve changed output 0.*halve"):
            debug.check_ledger(half, steps, inputs)


def test_signs_of_zero_count_as_bits_and_nan_equals_nan() -> None:
    a = torch.tensor([0.0, float("nan"), 1.0])
    assert bits_equal(a, a.clone()) and not bits_equal(a, torch.tensor([-0.0, float("nan"), 1.0]))
    assert not bits_equal(a, a.double()) and bits_equal(torch.arange(3), torch.arange(3))
    far = distance(torch.tensor([1.0, float("inf"), float("nan")]), torch.tensor([1.5, float("inf"), float("nan")]))
    assert (far.absolute, far.relative) == (0.5, pytest.approx(1 / 3)) and far.ulps == 0.5 * 2**23
    assert distance(torch.tensor([1.0]), torch.tensor([float("nan")])).absolute == float("inf")


def test_nan_inputs_are_refused(graph: Graph) -> None:
    inputs = debug.random_inputs(graph)
    inputs[0][0, 0] = float("nan")
    with pytest.raises(errors.NotANumber, match="an input holds NaN"):
        debug.ledger(graph, [], inputs)


def test_graphs_that_do_not_run_on_random_inputs_are_left(caplog: pytest.LogCaptureFixture) -> None:
    graph = parse_graph('def f(x: "f32[3]", i: "i64[1]"):\n    y = aten.index_select.default(x, 0, i)\n    return (y,)\n')
    wrong = [torch.randn(3), torch.tensor([7])]
    assert debug.check_ledger(graph, [], wrong) == []
    assert "are not checked" in caplog.text


# -- dump, edit, run again --------------------------------------------------------------------------------------------


def test_dump_edit_rerun(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()).eval()
    x = torch.randn(5, 4)
    model = plait.compile(layer, (x,))
    paths = debug.dump(model.captured, model.history, tmp_path)
    assert [p.name for p in paths][:2] == ["000_captured.txt", "001_lower.txt"]
    assert len(paths) == len(model.history) + 1
    torch.testing.assert_close(debug.rerun(paths[-1])(x)[0], layer(x).detach())
    edited = paths[-1].read_text().replace("aten.relu.default(", "aten.sigmoid.default(")
    assert edited != paths[-1].read_text()
    (tmp_path / "edited.txt").write_text(edited)
    want = torch.sigmoid(layer[0](x)).detach()
    torch.testing.assert_close(debug.rerun(tmp_path / "edited.txt")(x)[0], want)
    torch.testing.assert_close(debug.rerun(edited, model.graph.constants)(x)[0], want)
    with pytest.raises(errors.BadText, match="line"):
        debug.rerun(edited.replace("return", "returns"), model.graph.constants)
    with pytest.raises(errors.WrongInputShape):
        debug.rerun(paths[-1])(torch.randn(5, 3))


def test_steps_that_changed_nothing_add_no_rows(graph: Graph) -> None:
    same = step("idle", graph, graph, Numerics("exact"))
    assert {r.pass_name for r in debug.ledger(graph, [same], debug.random_inputs(graph))} == {"captured"}
    assert not replace(same).changed
