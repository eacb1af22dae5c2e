"""`fold`, `share`, `prune` and `layout`."""

import pytest
import torch
from plait.passes.fold import Fold
from plait.passes.layout import Layout
from plait.passes.prune import Prune
from plait.passes.share import Share

from tests.helpers import apply, assert_bit_equal, check_graph, check_pass, graph, random_inputs, refusals, run

W = torch.arange(6, dtype=torch.float32).reshape(2, 3)


# -- fold -------------------------------------------------------------------------------------------------------------


def test_fold_computes_what_depends_on_constants():
    start = graph(
        """
def f(x: "f32[3,2]"):
    w = plait.constant("w")
    a = aten.permute.default(w, (1, 0))
    b = aten.mul.Tensor(a, 2.0)
    c = aten.add.Tensor(x, b)
    return (c,)
""",
        {"w": W},
    )
    step = apply(Fold(), start)
    assert step.fired == {"fold": 1}
    check_graph(step.after)
    assert [n.op.name for n in step.after.nodes[2:]] == ["plait.constant", "aten.add.Tensor"]
    made = step.after.constants[step.after.nodes[2].args[0]]
    assert_bit_equal(made, W.t() * 2)
    inputs = random_inputs(start)
    assert_bit_equal(run(step.after, inputs), run(start, inputs))
    assert apply(Prune(), step.after).after.constants.keys() == {step.after.nodes[2].args[0]}


def test_fold_turns_uniform_results_into_full():
    check_pass(
        Fold(),
        """
def f(x: "f32[4]"):
    w = plait.constant("w")
    a = aten.sub.Tensor(w, w)
    b = aten.add.Tensor(x, a)
    return (b,)
""",
        """
def f(x: "f32[4]"):
    a = aten.full.default((4,), 0.0, dtype=torch.float32, device=device("cpu"), pin_memory=False)
    b = aten.add.Tensor(x, a)
    return (b,)
""",
        {"w": torch.arange(4.0)},
        fold=1,
    )


def test_fold_names_depend_on_content():
    text = 'def f():\n    w = plait.constant("w")\n    a = aten.mul.Tensor(w, 2.0)\n    return (a,)\n'
    one = apply(Fold(), graph(text, {"w": W})).after
    same = apply(Fold(), graph(text, {"w": W.clone()})).after
    other = apply(Fold(), graph(text, {"w": W + 1})).after
    assert str(one) == str(same) != str(other)


def test_fold_gives_equal_constants_of_regions_one_name():
    text = """
def f(p: "b1[]", x: "f32[2,3]"):
    def yes(x: "f32[2,3]"):
        w = plait.constant("w")
        a = aten.mul.Tensor(w, 2.0)
        b = aten.add.Tensor(x, a)
        return (b,)
    def no(x: "f32[2,3]"):
        w = plait.constant("w")
        a = aten.mul.Tensor(w, 2.0)
        b = aten.sub.Tensor(x, a)
        return (b,)
    r = plait.cond(p, yes, no, (x,))  # f32[2,3]
    return (r,)
"""
    step = apply(Fold(), graph(text, {"w": torch.where(W > 4, float("nan"), W)}))
    assert step.fired == {"fold": 2}
    check_graph(step.after, runs=False)
    yes, no = step.after.nodes[0].regions
    assert yes.constants.keys() == no.constants.keys()


def test_fold_lets_large_constants_die():
    text = 'def f():\n    w = plait.constant("w")\n    a = aten.mul.Tensor(w, 2.0)\n    return (a{})\n'
    big = torch.arange(100.0)
    alone = apply(Fold(max_elements=10), graph(text.format(","), {"w": big}))
    assert alone.fired == {"fold": 1}
    kept = apply(Fold(max_elements=10), graph(text.format(", w"), {"w": big}))
    assert not kept.changed
    assert refusals(kept) == {"its 100 elements are more than max_elements=10"}


@pytest.mark.parametrize(
    ("why", "lines"),
    [
        ("has effects", "    a, t = aten.bernoulli.default(w)\n"),
        ("size is symbolic", "    u = aten.unsqueeze.default(w, 0)\n    b = aten.expand.default(u, (s0, 2, 3))\n"
                             "    a = aten.neg.default(b)\n"),
        ("depends on data", "    a = aten.nonzero.default(w)  # i64[6,2]\n"),
        ("numbers alone", "    r = aten.arange.start_step(0, 50)\n    a = aten.mul.Tensor(r, 2)\n"),
    ],
)  # fmt: skip
def test_fold_refuses(why: str, lines: str):
    text = 'graph(level="tensor", symbols={"s0": (2, None, 5)})\ndef f(x: "f32[s0]"):\n    w = plait.constant("w")\n'
    step = apply(Fold(), graph(text + lines + "    return (a,)\n", {"w": W / 6}))
    assert not step.changed
    assert any(why in r for r in refusals(step)) or why == "size is symbolic", refusals(step)


def test_fold_leaves_parameters_that_train():
    w = torch.nn.Parameter(W.clone())
    start = graph('def f():\n    w = plait.constant("w")\n    a = aten.mul.Tensor(w, 2.0)\n    return (a,)\n', {"w": w})
    assert not apply(Fold(), start).changed


def test_fold_keeps_strides_of_sizes_of_one():
    """Elements that are all alike become `full` only where it has their very strides: nodes that read them keep theirs."""
    text = """
def f():
    a = aten.full.default((5,), 1, dtype=torch.int32)
    b = aten.unfold.default(a, 0, 3, 4)  # i32[1,3]{4,1}
    c = aten.clone.default(b)  # i32[1,3]{4,1}
    return (c,)
"""
    step = apply(Fold(), graph(text))
    check_graph(step.after)
    assert step.fired == {"fold": 1}
    assert step.after.outputs[0].type == step.before.outputs[0].type


def test_fold_sees_through_made_tensors():
    """A causal mask that is all true for one row vanishes; a larger one is left to the kernel that reads it."""
    text = """
def f(x: "f32[4,{n}]"):
    i = aten.arange.start_step(0, {n})
    b = aten.ge.Scalar(i, 0)
    z = aten.full.default((), 0.0)
    r = aten.where.self(b, x, z)
    return (r,)
"""
    step = apply(Fold(), graph(text.format(n=50)))
    assert step.fired == {"fold": 1}
    assert step.after.nodes[1].op.name == "aten.full.default"


# -- share ------------------------------------------------------------------------------------------------------------


def test_share_merges_equal_applications():
    check_pass(
        Share(),
        """
def f(x: "f32[4]", y: "f32[4]"):
    a = aten.add.Tensor(x, y)
    b = aten.add.Tensor(y, x)
    c = aten.exp.default(a)
    d = aten.exp.default(b)
    e = aten.mul.Tensor(c, d)
    return (e,)
""",
        """
def f(x: "f32[4]", y: "f32[4]"):
    a = aten.add.Tensor(x, y)
    c = aten.exp.default(a)
    e = aten.mul.Tensor(c, c)
    return (e,)
""",
        equal=2,
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("aten.add.Tensor(x, y, alpha=2)", "aten.add.Tensor(y, x, alpha=2)"),
        ("aten.sub.Tensor(x, y)", "aten.sub.Tensor(y, x)"),
        ("aten.mul.Tensor(x, 1)", "aten.mul.Tensor(x, 1.0)"),
        ("aten.mul.Tensor(x, 0.0)", "aten.mul.Tensor(x, -0.0)"),
        ("aten.mul.Tensor(x, True)", "aten.mul.Tensor(x, 1)"),
        ("aten.exp.default(x)", "aten.exp.default(y)"),
    ],
)
def test_share_keeps_different_applications(a: str, b: str):
    text = f'def f(x: "f32[4]", y: "f32[4]"):\n    a = {a}\n    b = {b}\n    c = aten.div.Tensor(a, b)\n    return (c,)\n'
    assert not apply(Share(), graph(text)).changed


def test_share_never_merges_random_draws():
    start = graph(
        "def f():\n    a, t = aten.rand.default((4,))\n    b, u = aten.rand.default((4,), after=(t,))\n"
        "    c = aten.sub.Tensor(a, b)\n    return (c,)\n"
    )
    step = apply(Share(), start)
    assert not step.changed
    assert bool((run(step.after, [])[0] != 0).any())


def test_share_merges_constants_by_content():
    start = graph(
        'def f(x: "f32[2,3]"):\n    v = plait.constant("v")\n    w = plait.constant("w")\n    u = plait.constant("u")\n'
        "    a = aten.add.Tensor(v, w)\n    b = aten.add.Tensor(a, u)\n    return (b,)\n",
        {"v": W, "w": W.clone(), "u": W + 1},
    )
    step = apply(Share(), start)
    assert step.fired == {"equal": 1}
    assert step.after.constants.keys() == {"v", "u"}
    assert apply(Share(max_compared=1), start).fired == {}
    parameters = {k: torch.nn.Parameter(v) for k, v in start.constants.items()}
    assert not apply(Share(), start.replace(constants=parameters)).changed


def test_share_keeps_two_outputs_apart():
    text = 'def f(x: "f32[4]"):\n    a = aten.sin.default(x)\n    b = aten.sin.default(x)\n    {}\n    return (a, {})\n'
    step = apply(Share(), graph(text.format("v = aten.view.default(b, (2, 2))", "v")))
    assert not step.changed
    assert refusals(step) == {"two outputs would share memory"}
    assert apply(Share(), graph(text.format("v = aten.neg.default(b)", "v"))).fired == {"equal": 1}


def test_share_keeps_equal_applications_with_other_layouts():
    text = """
def f(x: "f32[2,3]", y: "f32[2,3]{1,2}"):
    a = aten.mul.Tensor(x, y)  # f32[2,3]
    b = aten.mul.Tensor(y, x)  # f32[2,3]{1,2}
    c = aten.view.default(a, (6,))
    d = aten.permute.default(b, (1, 0))
    return (c, d)
"""
    step = apply(Share(), graph(text))
    assert not step.changed
    assert refusals(step) == {"equal applications were captured with different layouts"}


# -- prune ------------------------------------------------------------------------------------------------------------


def test_prune_drops_dead_nodes_and_keeps_effects():
    step = check_pass(
        Prune(),
        """
def f(p: "b1[]", x: "f32[4]"):
    a = aten.sin.default(x)
    b = aten.exp.default(a)
    r, t = aten.rand.default((4,))
    def yes(x: "f32[4]"):
        dead = aten.cos.default(x)
        a = aten.neg.default(x)
        return (a,)
    def no(x: "f32[4]"):
        a = aten.abs.default(x)
        return (a,)
    c = plait.cond(p, yes, no, (x,))  # f32[4]
    return (c, a)
""",
        """
def f(p: "b1[]", x: "f32[4]"):
    a = aten.sin.default(x)
    r, t = aten.rand.default((4,))
    def yes(x: "f32[4]"):
        a = aten.neg.default(x)
        return (a,)
    def no(x: "f32[4]"):
        a = aten.abs.default(x)
        return (a,)
    c = plait.cond(p, yes, no, (x,))  # f32[4]
    return (c, a)
""",
        dead_node=2,
    )
    assert apply(Prune(), step.after).after is step.after


# -- layout -----------------------------------------------------------------------------------------------------------


def test_layout_before_and_after_of_the_docstring():
    check_pass(
        Layout(),
        """
def f(x: "f32[2,3,4]", w: "f32[2,4,5]"):
    a = aten.permute.default(x, (0, 2, 1))
    b = aten.relu.default(a)
    c = aten.permute.default(b, (0, 2, 1))
    d = aten.clone.default(c)
    r = aten.bmm.default(d, w)
    return (r,)
""",
        """
def f(x: "f32[2,3,4]", w: "f32[2,4,5]"):
    b = aten.relu.default(x)
    r = aten.bmm.default(b, w)
    return (r,)
""",
        permute_around=1,
        clone_same=1,
    )


def test_a_copy_of_a_transposed_product_is_the_product_of_transposed_operands():
    check_pass(
        Layout(),
        """
def f(x: "f32[2,3,4]", w: "f32[2,4,5]"):
    p = aten.bmm.default(x, w)
    t = aten.permute.default(p, (0, 2, 1))
    r = aten.clone.default(t, memory_format=torch.contiguous_format)
    return (r,)
""",
        """
def f(x: "f32[2,3,4]", w: "f32[2,4,5]"):
    a = aten.permute.default(w, (0, 2, 1))
    b = aten.permute.default(x, (0, 2, 1))
    r = aten.bmm.default(a, b)
    return (r,)
""",
        turned_product=1,
    )


@pytest.mark.parametrize(
    ("rule", "lines", "after"),
    [
        ("clone-clone", "b = aten.view.default(a, (1, 2, 3, 1)); p = aten.expand.default(b, (1, 2, 3, 4)); "
                        "v = aten.clone.default(p, memory_format=torch.channels_last); "
                        "r = aten.clone.default(v, memory_format=torch.contiguous_format)",
         "b = aten.view.default(a, (1, 2, 3, 1)); p = aten.expand.default(b, (1, 2, 3, 4)); "
         "r = aten.clone.default(p, memory_format=torch.contiguous_format)"),
        ("clone-uniform", "u = aten.full.default((), 2.0); v = aten.expand.default(u, (2, 3)); "
                          "w = aten.clone.default(v, memory_format=torch.contiguous_format); r = aten.mul.Tensor(a, w)",
         'w = aten.full.default((2, 3), 2.0, dtype=torch.float32, device=device("cpu"), pin_memory=False); '
         "r = aten.mul.Tensor(a, w)"),
    ],
)  # fmt: skip
def test_layout_rules(rule: str, lines: str, after: str):
    def text(some: str) -> str:
        body = "\n".join("    " + line.strip() for line in some.split(";"))
        return f'def f(x: "f32[2,3]"):\n    a = aten.sin.default(x)\n{body}\n    s = aten.exp.default(r)\n    return (s,)\n'

    step = check_pass(Layout(), text(lines), text(after))
    assert rule in step.fired


@pytest.mark.parametrize(
    ("rule", "why", "lines"),
    [
        ("clone-same", "share memory with an input", "r = aten.clone.default(x)"),
        ("clone-same", "two outputs would share memory", "a = aten.sin.default(x); b = aten.clone.default(a); r = (a, b)"),
        ("clone-clone", "keeps the layout that the first copy made",
         "p = aten.permute.default(x, (1, 0)); a = aten.clone.default(p, memory_format=torch.contiguous_format); "
         "b = aten.clone.default(a); r = (a, b)"),
        ("turned-product", "not a contiguous copy of a transposed product",
         "u = aten.unsqueeze.default(x, 0); v = aten.unsqueeze.default(y, 0); m = aten.bmm.default(u, v); "
         "p = aten.permute.default(m, (1, 2, 0)); r = aten.clone.default(p, memory_format=torch.contiguous_format)"),
        ("permute-around", "do not undo each other",
         "u = aten.unsqueeze.default(x, 0); p = aten.permute.default(u, (1, 2, 0)); e = aten.exp.default(p); "
         "r = aten.permute.default(e, (1, 2, 0))"),
        ("permute-around", "also changes the layout",
         "p = aten.permute.default(x, (1, 0)); "
         "e = aten._to_copy.default(p, dtype=torch.float64, memory_format=torch.contiguous_format); "
         "r = aten.permute.default(e, (1, 0))"),
    ],
)  # fmt: skip
def test_layout_refuses(rule: str, why: str, lines: str):
    body = "\n".join("    " + line.strip() for line in lines.split(";"))
    text = f'def f(x: "f32[2,3]", y: "f32[3,4]"):\n{body}\n    return (r,)\n'
    start = graph(text.replace("    r = (a, b)\n    return (r,)", "    return (a, b)"))
    step = apply(Layout(), start)
    assert any(name == rule and why in str(reason) for name, _, reason in step.refused), refusals(step)
    inputs = random_inputs(start)
    assert_bit_equal(run(step.after, inputs), run(start, inputs))
