"""`normalise`: every spelling ends in the one form, with the same bits."""

import pytest
from plait.passes.normalise import Normalise

from tests.helpers import apply, assert_bit_equal, check_pass, graph, random_inputs, refusals, run


def full(size: str, value: str, dtype: str) -> str:
    """`full` as normalised."""
    return f'aten.full.default({size}, {value}, dtype=torch.{dtype}, device=device("cpu"), pin_memory=False)'


ARANGE = 'aten.arange.start_step(0, 4, 1, dtype=torch.int64, device=device("cpu"), pin_memory=False)'

#: (rule, input type, line, line after); the result is r.
FORMS = [
    ("mixed-operands", "f32[2,3]", "r = aten.add.Scalar(x, 2, 3)", "r = aten.add.Tensor(x, 2, alpha=3)"),
    ("mixed-operands", "i64[2,3]", "r = aten.div.Scalar(x, 2)", "r = aten.div.Tensor(x, 2)"),
    ("mixed-operands", "bf16[2,3]", "r = aten.mul.Scalar(x, 0.1)", "r = aten.mul.Tensor(x, 0.1)"),
    ("mixed-operands", "f32[2,3]", 'r = aten.div.Scalar_mode(x, 2, rounding_mode="floor")',
     'r = aten.div.Tensor_mode(x, 2, rounding_mode="floor")'),
    ("rsub", "f32[2,3]", "r = aten.rsub.Scalar(x, 1, 2)", "r = aten.sub.Tensor(1, x, alpha=2)"),
    ("rsub", "f32[2,3]", "y = aten.sin.default(x); r = aten.rsub.Tensor(x, y)",
     "y = aten.sin.default(x); r = aten.sub.Tensor(y, x)"),
    ("number-right", "f32[2,3]", "r = aten.mul.Tensor(2.0, x)", "r = aten.mul.Tensor(x, 2.0)"),
    ("plain-quotient", "f32[2,3]", "r = aten.div.Tensor_mode(x, 2.0, rounding_mode=None)", "r = aten.div.Tensor(x, 2.0)"),
    ("reshape-view", "f32[2,3]", "r = aten.reshape.default(x, (3, -1))", "r = aten.view.default(x, (3, 2))"),
    ("reshape-view", "f32[2,3,4]{12,1,3}", "r = aten.reshape.default(x, (2, 3, 2, 2))",
     "r = aten.view.default(x, (2, 3, 2, 2))"),
    ("reshape-view", "f32[2,3]", "r = aten.flatten.using_ints(x)", "r = aten.view.default(x, (6,))"),
    ("reshape-copy", "f32[2,3]{1,2}", "r = aten.reshape.default(x, (6,))",
     "y = aten.clone.default(x, memory_format=torch.contiguous_format); r = aten.view.default(y, (6,))"),
    ("view-sizes", "f32[2,6]", "r = aten.view.default(x, (2, 2, -1))", "r = aten.view.default(x, (2, 2, 3))"),
    ("transpose", "f32[2,3]", "r = aten.t.default(x)", "r = aten.permute.default(x, (1, 0))"),
    ("transpose", "f32[2]", "r = aten.t.default(x)", "r = aten.permute.default(x, (0,))"),
    ("transpose", "f32[2,3,4]", "r = aten.transpose.int(x, -1, 1)", "r = aten.permute.default(x, (0, 2, 1))"),
    ("transpose", "f32[2,3,4]", "r = aten.mT.default(x)", "r = aten.permute.default(x, (0, 2, 1))"),
    ("transpose", "f32[2,3,4]", "r = aten.numpy_T.default(x)", "r = aten.permute.default(x, (2, 1, 0))"),
    ("expand-sizes", "f32[2,1]", "r = aten.expand.default(x, (-1, 4))", "r = aten.expand.default(x, (2, 4))"),
    ("expand-sizes", "f32[2,1]", "y = aten.full.default((2, 3), 1.0); r = aten.expand_as.default(x, y)",
     "r = aten.expand.default(x, (2, 3))"),
    ("split-slices", "f32[2,5]", "a, b, r = aten.split.Tensor(x, 2, -1)", "r = aten.slice.Tensor(x, 1, 4, 5)"),
    ("split-slices", "f32[2,5]", "a, r = aten.split_with_sizes.default(x, (2, 3), 1)",
     "r = aten.slice.Tensor(x, 1, 2, 5)"),
    ("unbind-selects", "f32[2,5]", "a, r = aten.unbind.int(x)", "r = aten.select.int(x, 0, 1)"),
    ("stack-cat", "f32[2,5]", "r = aten.stack.default((x, x), -1)",
     "a = aten.unsqueeze.default(x, 2); b = aten.unsqueeze.default(x, 2); r = aten.cat.default((a, b), 2)"),
    ("squeeze-dims", "f32[2,1,3,1]", "r = aten.squeeze.default(x)", "r = aten.squeeze.dims(x, (1, 3))"),
    ("squeeze-dims", "f32[2,1,3,1]", "r = aten.squeeze.dim(x, -1)", "r = aten.squeeze.dims(x, (3,))"),
    ("dim-front", "f32[2,3]", "r = aten._softmax.default(x, -1, False)", "r = aten._softmax.default(x, 1, False)"),
    ("dim-front", "f32[2,3]", "r = aten.sum.dim_IntList(x, (-1, 0), True)", "r = aten.sum.dim_IntList(x, (1, 0), True)"),
    ("dim-front", "f32[2,3]", "r = aten.permute.default(x, (-1, 0))", "r = aten.permute.default(x, (1, 0))"),
    ("dim-front", "f32[2,3]", "v, r = aten.max.dim(x, -1)", "v, r = aten.max.dim(x, 1)"),
    ("cat-dim-front", "f32[2,3]", "r = aten.cat.default((x, x), -1)", "r = aten.cat.default((x, x), 1)"),
    ("unsqueeze-dim-front", "f32[2,3]", "r = aten.unsqueeze.default(x, -1)", "r = aten.unsqueeze.default(x, 2)"),
    ("slice-bounds", "f32[2,3]", "r = aten.slice.Tensor(x, 1, 1, 9223372036854775807)",
     "r = aten.slice.Tensor(x, 1, 1, 3)"),
    ("slice-bounds", "f32[2,0]", "r = aten.slice.Tensor(x, 1, 1, 9223372036854775807)",
     "r = aten.slice.Tensor(x, 1, 0, 0)"),
    ("slice-bounds", "f32[2,3]", "r = aten.slice.Tensor(x, 1, -2)", "r = aten.slice.Tensor(x, 1, 1, 3)"),
    ("reduce-all", "f32[2,3]", "r = aten.sum.default(x)", "r = aten.sum.dim_IntList(x, (0, 1))"),
    ("reduce-all", "f32[2,3]", "r = aten.mean.default(x)", "r = aten.mean.dim(x, (0, 1))"),
    ("fill", "f32[2,3]", "r = aten.zeros_like.default(x)", "r = " + full("(2, 3)", "0.0", "float32")),
    ("fill", "f32[2]", "r = aten.zeros.default((2,), dtype=torch.bool)", "r = " + full("(2,)", "False", "bool")),
    ("fill", "i64[2]", "r = aten.new_full.default(x, (3,), 2.0)", "r = " + full("(3,)", "2", "int64")),
    ("full-options", "f32[2]", "r = aten.full.default((2,), 1)", "r = " + full("(2,)", "1", "int64")),
    ("arange-options", "f32[2]", "r = aten.arange.default(4)",
     "r = " + ARANGE),
    ("to-copy", "f32[2]", "r = aten.to.dtype(x, torch.float64)", "r = aten._to_copy.default(x, dtype=torch.float64)"),
    ("to-copy", "f32[2]", "r = aten.to.dtype(x, torch.float32)", "r = aten.alias.default(x)"),
    ("contiguous-clone", "f32[2,3]{1,2}", "r = aten.contiguous.default(x)",
     "r = aten.clone.default(x, memory_format=torch.contiguous_format)"),
    ("contiguous-clone", "f32[2,3]", "r = aten.contiguous.default(x)", "r = aten.alias.default(x)"),
]  # fmt: skip


def text(kind: str, lines: str) -> str:
    body = "\n".join("    " + line.strip() for line in lines.split(";"))
    return f'def f(x: "{kind}"):\n{body}\n    return (r,)\n'


@pytest.mark.parametrize(("rule", "kind", "before", "after"), FORMS, ids=[f"{f[0]}-{i}" for i, f in enumerate(FORMS)])
def test_each_spelling(rule: str, kind: str, before: str, after: str):
    step = check_pass(Normalise(), text(kind, before), text(kind, after))
    assert rule in step.fired


def test_unsafe_view_of_a_product():
    step = check_pass(
        Normalise(),
        """
def f(x: "f32[2,3,4]", w: "f32[4,5]"):
    a = aten.view.default(x, (6, 4))
    b = aten.mm.default(a, w)
    r = aten._unsafe_view.default(b, (2, 3, 5))
    return (r,)
""",
        """
def f(x: "f32[2,3,4]", w: "f32[4,5]"):
    a = aten.view.default(x, (6, 4))
    b = aten.mm.default(a, w)
    r = aten.view.default(b, (2, 3, 5))
    return (r,)
""",
        reshape_view=1,
    )
    assert not apply(Normalise(), step.after).changed


@pytest.mark.parametrize(
    ("rule", "why", "kind", "line"),
    [
        ("number-right", "scaled by alpha=2", "f32[2]", "r = aten.add.Tensor(2.0, x, alpha=2)"),
        ("reshape-copy", "it is a view", "f32[2,3]{1,2}", "r = aten.reshape.default(x, (2, 1, 3))"),
        ("fill", "not row-major", "f32[2,3]{1,2}", "r = aten.zeros_like.default(x)"),
    ],
)
def test_refusals(rule: str, why: str, kind: str, line: str):
    step = apply(Normalise(), graph(text(kind, line)))
    assert any(name == rule and why in str(reason) for name, _, reason in step.refused), refusals(step)
    inputs = random_inputs(step.before)
    assert_bit_equal(run(step.after, inputs), run(step.before, inputs))


def test_a_reshape_that_may_or_may_not_copy_stays():
    start = graph(
        'graph(level="tensor", symbols={"s0": (0, None, 4)})\n'
        'def f(x: "f32[s0,3]{1,s0}"):\n    r = aten.reshape.default(x, (3*s0,))  # f32[3*s0]\n    return (r,)\n'
    )
    step = apply(Normalise(), start)
    assert not step.changed
    assert refusals(step) == {"it needs a copy, or may need one for some sizes", "whether it copies is not known"}


def test_dynamic_sizes():
    check_pass(
        Normalise(),
        """
graph(level="tensor", symbols={"s0": (2, None, 5)})
def f(x: "f32[s0,4]"):
    a = aten.reshape.default(x, (-1, 2))
    b = aten.slice.Tensor(a, 0, 1, 9223372036854775807)
    c = aten.rsub.Scalar(b, s0)
    d = aten.zeros_like.default(c)
    e = aten.add.Tensor(c, d)
    return (e,)
""",
        f"""
graph(level="tensor", symbols={{"s0": (2, None, 5)}})
def f(x: "f32[s0,4]"):
    a = aten.view.default(x, (2*s0, 2))
    b = aten.slice.Tensor(a, 0, 1, 2*s0)
    c = aten.sub.Tensor(s0, b)
    d = {full("(2*s0-1, 2)", "0.0", "float32")}
    e = aten.add.Tensor(c, d)
    return (e,)
""",
    )
