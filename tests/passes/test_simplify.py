"""`simplify`: each rule fires on the form it is for, refuses with its reason elsewhere, and never changes a bit."""

import pytest
import torch
from plait.ir.types import dtype_text
from plait.passes.simplify import Simplify

from tests.helpers import apply, assert_bit_equal, check_pass, graph, random_inputs, refusals, run


def test_before_and_after_of_the_docstring():
    check_pass(
        Simplify(),
        """
def f(x: "f32[4,4]"):
    a = aten.mul.Tensor(x, 1)
    b = aten.permute.default(a, (1, 0))
    c = aten.permute.default(b, (1, 0))
    d = aten.neg.default(c)
    e = aten.neg.default(d)
    f = aten.exp.default(e)
    return (f,)
""",
        """
def f(x: "f32[4,4]"):
    f = aten.exp.default(x)
    return (f,)
""",
    )


#: (rule, lines before, line after) inside `around`; the result is r and feeds neg so that it does not leave the graph.
FIRES = [
    ("mul-one", "b = aten.mul.Tensor(a, 1)", "b = a"),
    ("mul-one", "o = aten.full.default((), 1.0); b = aten.mul.Tensor(o, a)", "b = a"),
    ("mul-minus-one", "b = aten.mul.Tensor(a, -1.0)", "b = aten.neg.default(a)"),
    ("div-one", "b = aten.div.Tensor(a, 1.0)", "b = a"),
    ("add-zero", "b = aten.add.Tensor(a, -0.0)", "b = a"),
    ("sub-zero", "b = aten.sub.Tensor(a, 0)", "b = a"),
    ("pow-one", "b = aten.pow.Tensor_Scalar(a, 1)", "b = a"),
    ("pow-two", "b = aten.pow.Tensor_Scalar(a, 2)", "b = aten.mul.Tensor(a, a)"),
    ("pow-three", "b = aten.pow.Tensor_Scalar(a, 3.0)", "s = aten.mul.Tensor(a, a); b = aten.mul.Tensor(s, a)"),
    ("pow-sqrt", "b = aten.pow.Tensor_Scalar(a, 0.5)", "b = aten.sqrt.default(a)"),
    ("pow-reciprocal", "b = aten.pow.Tensor_Scalar(a, -1)", "b = aten.reciprocal.default(a)"),
    ("neg-neg", "n = aten.neg.default(a); b = aten.neg.default(n)", "b = a"),
    ("abs-neg", "n = aten.neg.default(a); b = aten.abs.default(n)", "b = aten.abs.default(a)"),
    ("relu-relu", "n = aten.relu.default(a); b = aten.relu.default(n)", "b = aten.relu.default(a)"),
    ("round-round", "n = aten.round.default(a); b = aten.round.default(n)", "b = aten.round.default(a)"),
    ("where-same", "c = aten.gt.Scalar(x, 0); b = aten.where.self(c, a, a)", "b = a"),
    ("where-true", "c = aten.full.default((), True); b = aten.where.self(c, a, x)", "b = a"),
    ("where-false", "c = aten.full.default((), False); b = aten.where.self(c, x, a)", "b = a"),
    ("same-view", "b = aten.view.default(a, (2, 3))", "b = a"),
    ("same-view", "b = aten.expand.default(a, (2, 3))", "b = a"),
    ("same-view", "b = aten.slice.Tensor(a, 0, 0, 2)", "b = a"),
    ("permute-permute", "p = aten.permute.default(a, (1, 0)); b = aten.permute.default(p, (1, 0))", "b = a"),
    ("view-view", "v = aten.view.default(a, (6,)); b = aten.view.default(v, (3, 2))", "b = aten.view.default(a, (3, 2))"),
    ("expand-expand", "u = aten.unsqueeze.default(a, 0); v = aten.expand.default(u, (4, 2, 3)); "
     "b = aten.expand.default(v, (5, 4, 2, 3))",
     "u = aten.unsqueeze.default(a, 0); b = aten.expand.default(u, (5, 4, 2, 3))"),
    ("slice-slice", "v = aten.slice.Tensor(a, 1, 1, 3); b = aten.slice.Tensor(v, 1, 1, 2)",
     "b = aten.slice.Tensor(a, 1, 2, 3)"),
    ("unsqueeze-squeeze", "v = aten.unsqueeze.default(a, 1); b = aten.squeeze.dims(v, (1,))", "b = a"),
    ("cat-one", "b = aten.cat.default((a,), 1)", "b = a"),
    ("cat-slices", "v = aten.slice.Tensor(a, 1, 0, 1); w = aten.slice.Tensor(a, 1, 1, 3); "
     "b = aten.cat.default((v, w), 1)", "b = a"),
    ("slice-cat", "e = aten.cos.default(x); v = aten.cat.default((e, a), 0); b = aten.slice.Tensor(v, 0, 2, 4)", "b = a"),
    ("scatter-all", "b = aten.slice_scatter.default(x, a, 1, 0, 3)", "b = a"),
    ("copy-over", "b = aten.copy.default(x, a)", "b = a"),
    ("view-full", "u = aten.full.default((6,), 2.5, dtype=torch.float32); v = aten.view.default(u, (2, 3)); "
     "b = aten.add.Tensor(a, v)",
     'v = aten.full.default((2, 3), 2.5, dtype=torch.float32, device=device("cpu"), pin_memory=False)\n'
     "    b = aten.add.Tensor(a, v)"),
    ("cast-same", "b = aten._to_copy.default(a, dtype=torch.float32)", "b = a"),
    ("cast-cast", "v = aten._to_copy.default(a, dtype=torch.float64); b = aten._to_copy.default(v, dtype=torch.bfloat16)",
     "b = aten._to_copy.default(a, dtype=torch.bfloat16)"),
    ("cast-cast", "v = aten._to_copy.default(a, dtype=torch.float64); b = aten._to_copy.default(v, dtype=torch.float32)",
     "b = a"),
    ("detach", "b = aten.detach.default(a)", "b = a"),
    ("detach", "b = aten.alias.default(a)", "b = a"),
    ("lift", "b = aten.lift_fresh_copy.default(a)", "b = a"),
    ("dropout-off", "b = aten.dropout.default(a, 0.5, False)", "b = a"),
]  # fmt: skip


def wrap(lines: str) -> str:
    """The lines between ops that keep them off the graph's edges; `b = a` is written by using a."""
    last = "b"
    kept = []
    for line in lines.split(";"):
        if line.strip() == "b = a":
            last = "a"
        else:
            kept.append("    " + line.strip())
    body = "\n".join(kept)
    return f'def f(x: "f32[2,3]"):\n    a = aten.sin.default(x)\n{body}\n    r = aten.exp.default({last})\n    return (r,)\n'


@pytest.mark.parametrize(("rule", "before", "after"), FIRES, ids=[f"{r}-{i}" for i, (r, _, _) in enumerate(FIRES)])
def test_rule_fires(rule: str, before: str, after: str):
    from plait.ir import prune

    from tests.helpers import assert_structural_equal, check_graph

    start = graph(wrap(before))
    step = apply(Simplify(), start)
    assert rule in step.fired, (dict(step.fired), refusals(step))
    check_graph(step.after)
    assert_structural_equal(prune(step.after), graph(wrap(after)))
    for seed in range(3):
        inputs = random_inputs(start, seed)
        assert_bit_equal(run(step.after, inputs), run(start, inputs))


#: (rule, why, graph) with rules that match but must not fire.
REFUSES = [
    ("add-zero", "-0.0 + 0.0 is +0.0", wrap("b = aten.add.Tensor(a, 0.0)")),
    ("add-zero", "scaled by alpha=2", wrap("b = aten.add.Tensor(-0.0, a, alpha=2)")),
    ("sub-zero", "-0.0 - -0.0 is +0.0", wrap("b = aten.sub.Tensor(a, -0.0)")),
    ("sub-zero", "scaled by alpha=3", wrap("b = aten.sub.Tensor(a, 0, alpha=3)")),
    ("mul-one", "the replacement is f32[2,3], not f64", wrap("o = aten.full.default((1, 1), 1, dtype=torch.float64)\n"
                                                             "    b = aten.mul.Tensor(a, o)")),
    ("mul-one", "share memory with an input", 'def f(x: "f32[2]"):\n    b = aten.mul.Tensor(x, 1)\n    return (b,)\n'),
    ("mul-one", "two outputs would share memory",
     'def f(x: "f32[2]"):\n    a = aten.sin.default(x)\n    b = aten.mul.Tensor(a, 1)\n    return (a, b)\n'),
    ("mul-one", "two outputs would share memory",
     'def f(x: "f32[2]"):\n    a = aten.sin.default(x)\n    b = aten.mul.Tensor(a, 1)\n'
     "    v = aten.view.default(b, (2, 1))\n    return (a, v)\n"),
    ("mul-one", "share memory with an input",
     'def f(x: "f32[2]", y: "f32[2]"):\n    b = aten.mul.Tensor(y, 1)\n    x[...] = b\n    return ()\n'),
    ("pow-sqrt", "half types", 'def f(x: "bf16[4]"):\n    b = aten.pow.Tensor_Scalar(x, 0.5)\n    return (b,)\n'),
    ("logical-not-not", "not boolean",
     wrap("n = aten.logical_not.default(a); m = aten.logical_not.default(n); b = aten.where.self(m, a, x)")),
    ("same-view", "same tensor as an input", 'def f(x: "f32[2]"):\n    b = aten.view.default(x, (2,))\n    return (b,)\n'),
    ("same-view", "two outputs would be the same tensor",
     'def f(x: "f32[2]"):\n    a = aten.sin.default(x)\n    b = aten.view.default(a, (2,))\n    return (a, b)\n'),
    ("view-view", "needs a copy", wrap("p = aten.permute.default(a, (1, 0)); v = aten.view.default(p, (3, 2, 1)); "
     "b = aten.view.default(v, (3, 1, 2))")),
    ("slice-slice", "different dimensions", wrap("v = aten.slice.Tensor(a, 1, 1, 3); b = aten.slice.Tensor(v, 0, 1, 2)")),
    ("slice-slice", "has a step", wrap("v = aten.slice.Tensor(a, 1, 0, 3, 2); b = aten.slice.Tensor(v, 1, 1, 2)")),
    ("slice-slice", "counted from the end", wrap("v = aten.slice.Tensor(a, 1, -2, 3); b = aten.slice.Tensor(v, 1, 1, 2)")),
    ("cat-slices", "not all of one tensor, in order",
     wrap("v = aten.slice.Tensor(a, 1, 0, 1); w = aten.slice.Tensor(a, 1, 1, 3); b = aten.cat.default((w, v), 1)")),
    ("slice-cat", "not one of the joined tensors",
     wrap("v = aten.cat.default((a, x), 0); b = aten.slice.Tensor(v, 0, 1, 3)")),
    ("view-full", "not contiguous",
     wrap("u = aten.full.default((2, 6), 2.0); v = aten.slice.Tensor(u, 1, 0, 3); b = aten.add.Tensor(a, v)")),
    ("view-full", "a complex number",
     wrap("u = aten.full.default((6,), 2.0, dtype=torch.complex64); v = aten.view.default(u, (2, 3)); "
          "w = aten.view_as_real.default(v); z = aten.select.int(w, 2, 0); b = aten.add.Tensor(a, z)")),
    ("cast-cast", "moves the tensor or changes its layout",
     wrap("v = aten._to_copy.default(a, dtype=torch.float64, memory_format=torch.contiguous_format); "
          "b = aten._to_copy.default(v, dtype=torch.float32)")),
    ("cast-cast", "does not hold every torch.float32",
     wrap("v = aten._to_copy.default(a, dtype=torch.bfloat16); b = aten._to_copy.default(v, dtype=torch.float32)")),
    ("cast-cast", "convert differently",
     wrap("v = aten._to_copy.default(a, dtype=torch.float64); b = aten._to_copy.default(v, dtype=torch.int32)")),
    ("dropout-off", "drops elements", wrap("b, t = aten.dropout.default(a, 0.5, True)")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "why", "text"), REFUSES, ids=[f"{r}-{i}" for i, (r, _, _) in enumerate(REFUSES)])
def test_rule_refuses_with_its_reason(rule: str, why: str, text: str):
    start = graph(text)
    step = apply(Simplify(), start)
    assert any(name == rule and why in str(reason) for name, _, reason in step.refused), (refusals(step), dict(step.fired))
    assert rule not in step.fired
    inputs = random_inputs(start)
    assert_bit_equal(run(step.after, inputs), run(start, inputs))


@pytest.mark.parametrize("at", ["forward", "any"])
def test_detach_stays_before_autograd(at: str):
    step = apply(Simplify(), graph(wrap("b = aten.detach.default(a)")), at)
    assert not step.changed
    assert refusals(step) == {"before autograd, detach cuts the gradient"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exponent", [1, 2, 3, 0.5, -1])
def test_powers_are_bit_equal_on_hard_numbers(dtype: torch.dtype, exponent: float):
    text = f'def f(x: "{dtype_text(dtype)}[67]"):\n    b = aten.pow.Tensor_Scalar(x, {exponent})\n'
    start = graph(text + "    r = aten.neg.default(b)\n    return (r,)\n")
    after = apply(Simplify(), start).after
    x = torch.randn(67, dtype=torch.float64) * torch.logspace(-30, 30, 67, dtype=torch.float64)
    x[:5] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")], dtype=torch.float64)
    assert_bit_equal(run(after, [x.to(dtype)]), run(start, [x.to(dtype)]))


@pytest.mark.parametrize(
    ("op", "number", "kind", "rule"),
    [
        ("bitwise_and.Tensor", "True", "b1", "bitwise-and-ones"),
        ("bitwise_or.Tensor", "False", "b1", "bitwise-or-zero"),
        ("bitwise_xor.Tensor", "False", "b1", "bitwise-xor-zero"),
        ("logical_and.default", "True", "b1", "and-true"),
        ("logical_or.default", "False", "b1", "or-false"),
        ("bitwise_and.Tensor", "-1", "i64", "bitwise-and-ones"),
        ("add.Tensor", "0", "i64", "add-zero"),
    ],
)
def test_neutral_elements_of_integers_and_masks(op: str, number: str, kind: str, rule: str):
    for operands in ("m, o", "o, m"):
        text = f'def f(x: "{kind}[4]"):\n    m = aten.bitwise_not.default(x)\n'
        dtype = "torch.bool" if kind == "b1" else "torch.int64"
        text += f"    o = aten.full.default((1,), {number}, dtype={dtype})\n    b = aten.{op}({operands})\n"
        step = apply(Simplify(), graph(text + "    r = aten.view.default(b, (2, 2))\n    return (r,)\n"))
        assert step.fired[rule] == 1
        inputs = random_inputs(step.before)
        assert_bit_equal(run(step.after, inputs), run(step.before, inputs))


def test_a_swap_of_two_inputs_keeps_its_copies():
    text = """
def f(x: "f32[2]", y: "f32[2]"):
    a = aten.mul.Tensor(x, 1)
    b = aten.mul.Tensor(y, 1)
    x[...] = b
    y[...] = a
    return ()
"""
    step = apply(Simplify(), graph(text))
    assert not step.changed
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert_bit_equal(run(step.after, [a, b]), [b, a])


def test_dynamic_sizes():
    check_pass(
        Simplify(),
        """
graph(level="tensor", symbols={"s0": (2, None, 5)})
def f(x: "f32[s0,4]"):
    a = aten.sin.default(x)
    b = aten.view.default(a, (4*s0,))
    c = aten.view.default(b, (s0, 2, 2))
    d = aten.expand.default(c, (s0, 2, 2))
    e = aten.neg.default(d)
    return (e,)
""",
        """
graph(level="tensor", symbols={"s0": (2, None, 5)})
def f(x: "f32[s0,4]"):
    a = aten.sin.default(x)
    c = aten.view.default(a, (s0, 2, 2))
    e = aten.neg.default(c)
    return (e,)
""",
        view_view=1,
        same_view=1,
    )


def test_rules_reach_into_regions():
    text = """
def f(p: "b1[]", x: "f32[3]"):
    def yes(x: "f32[3]"):
        a = aten.neg.default(x)
        b = aten.neg.default(a)
        c = aten.sin.default(b)
        return (c,)
    def no(x: "f32[3]"):
        c = aten.cos.default(x)
        return (c,)
    r = plait.cond(p, yes, no, (x,))  # f32[3]
    return (r,)
"""
    step = apply(Simplify(), graph(text))
    assert step.fired == {"neg-neg": 1}
    inputs = random_inputs(step.before)
    assert_bit_equal(run(step.after, inputs), run(step.before, inputs))
