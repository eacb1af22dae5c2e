import torch
from plait.runtime.check import check
from plait.runtime.executor import Executable
from plait.runtime.plan import InputSpec, Launch, OutputSpec, SymbolSpec

from tests.runtime.kit import call, make_plan, tensor_input, v, value


def unary(kernel, n=4):
    """A region of one vector: the result of `kernel`."""
    values = [value(0, "input", (n,), 0), value(1, "fresh", (n,))]
    return make_plan([tensor_input("x", (n,))], values, [Launch(kernel, (0, 1), (n,))], [1])


def identity(n=4):
    return make_plan([tensor_input("x", (n,))], [value(0, "input", (n,), 0)], [], [0])


def run_plan(plan, kernels, *args):
    check(plan)
    return Executable(plan, kernels, {})(*args)


def test_cond(kernels):
    # the predicate is computed; the chosen region's operand lies in the arena, the other region returns it as it is
    plan = make_plan(
        [tensor_input("x", (4,))],
        [
            value(0, "input", (4,), 0),
            value(1, "arena", (4,)),
            value(2, "handle", (), dtype="bool"),
            value(3, "handle", (4,)),
            value(4, "handle", ()),
        ],
        [
            Launch("twice", (0, 1), (4,)),
            call("aten.sum.default", [v(0)], [4]),
            call("aten.gt.Scalar", [v(4), {"c": 0}], [2]),
            call("plait.cond", [v(2), {"g": "yes"}, {"g": "no"}, {"l": [v(1)]}], [3]),
        ],
        [3],
        arena=16,
        regions=(("yes", unary("twice")), ("no", identity())),
    )
    run = Executable(plan, kernels, {})
    check(plan)
    x = torch.rand(4)
    kept = [run(x)[0], run(-x)[0], run(x + 1)[0]]
    assert torch.equal(kept[0], 4 * x)
    assert torch.equal(kept[1], -2 * x)  # not overwritten by the third call: it does not lie in the arena


def loop_regions():
    """Condition i < 5 and body (i + 1, 2 * x)."""
    counter = value(0, "input", (), 0, dtype="int64")
    vector = value(1, "input", (4,), 1)
    inputs = [tensor_input("i", (), "int64"), tensor_input("x", (4,))]
    steps = [call("aten.lt.Scalar", [v(0), {"c": 5}], [2])]
    condition = make_plan(inputs, [counter, vector, value(2, "handle", (), dtype="bool")], steps, [2])
    steps = [call("aten.add.Scalar", [v(0), {"c": 1}], [2]), Launch("twice", (1, 3), (4,))]
    body = make_plan(
        inputs, [counter, vector, value(2, "handle", (), dtype="int64"), value(3, "fresh", (4,))], steps, [2, 3]
    )
    return condition, body


def loop_plan(op, shapes):
    condition, body = loop_regions()
    inputs = [tensor_input("i", (), "int64"), tensor_input("x", (4,))]
    values = [value(0, "input", (), 0, dtype="int64"), value(1, "input", (4,), 1)]
    values += [value(2, "handle", shapes[0], dtype="int64"), value(3, "handle", shapes[1])]
    step = call(op, [{"g": "c"}, {"g": "b"}, {"l": [v(0), v(1)]}, {"l": []}], [2, 3])
    return make_plan(inputs, values, [step], [2, 3], regions=(("c", condition), ("b", body)))


def test_while_loop(kernels):
    x = torch.randn(4)
    for start, turns in ((0, 5), (3, 2), (5, 0)):
        i, y = run_plan(loop_plan("plait.while_loop", [(), (4,)]), kernels, torch.tensor(start), x)
        assert i.item() == 5
        assert torch.equal(y, x * 2**turns)
        assert y.data_ptr() != x.data_ptr()


def test_while_loop_stack_output(kernels):
    x = torch.randn(4)
    plan = loop_plan("plait.while_loop_stack_output", [(3,), (3, 4)])
    i, y = run_plan(plan, kernels, torch.tensor(2), x)
    assert i.tolist() == [3, 4, 5]
    assert torch.equal(y, torch.stack([2 * x, 4 * x, 8 * x]))
    i, y = run_plan(plan, kernels, torch.tensor(7), x)
    assert i.tolist() == [7]
    assert torch.equal(y, x[None])


def test_scan(kernels):
    # carry + row, twice the row
    inner_values = [value(0, "input", (4,), 0), value(1, "input", (4,), 1), value(2, "fresh", (4,)), value(3, "fresh", (4,))]
    combine = make_plan(
        [tensor_input("carry", (4,)), tensor_input("row", (4,))],
        inner_values,
        [Launch("add", (0, 1, 2), (4,)), Launch("twice", (1, 3), (4,))],
        [2, 3],
    )
    plan = make_plan(
        [tensor_input("init", (4,)), tensor_input("xs", ("s0", 4))],
        [
            value(0, "input", (4,), 0),
            value(1, "input", ("s0", 4), 1),
            value(2, "handle", (4,)),
            value(3, "handle", ("s0", 4)),
        ],
        [call("plait.scan", [{"g": "f"}, {"l": [v(0)]}, {"l": [v(1)]}, {"l": []}], [2, 3])],
        [2, 3],
        symbols=(SymbolSpec("s0", 1, 0),),
        regions=(("f", combine),),
    )
    init, xs = torch.randn(4), torch.randn(6, 4)
    carry, rows = run_plan(plan, kernels, init, xs)
    torch.testing.assert_close(carry, init + xs.sum(0))
    assert torch.equal(rows, 2 * xs)


def test_call_of_a_region_with_sizes(kernels):
    inner = make_plan(
        [tensor_input("x", ("n",)), InputSpec("k", "int", expr="k")],
        [value(0, "input", ("n",), 0), value(1, "fresh", ("n",))],
        [Launch("twice", (0, 1), ("n",))],
        [1, OutputSpec("size", expr=["add", "n", "k"])],
        symbols=(SymbolSpec("n", 0, 0), SymbolSpec("k", 1, None)),
    )
    plan = make_plan(
        [tensor_input("x", ("s0",))],
        [value(0, "input", ("s0",), 0), value(1, "handle", ("s0",)), value(2, "scalar", (), "total")],
        [call("plait.call", [{"g": "f"}, {"l": [v(0), {"e": ["mul", 2, "s0"]}]}], [1, 2])],
        [1, OutputSpec("size", expr=["mul", "total", 10])],
        symbols=(SymbolSpec("s0", 0, 0), SymbolSpec("total", -1, None)),
        regions=(("f", inner),),
    )
    y, total = run_plan(plan, kernels, x := torch.randn(5))
    assert torch.equal(y, 2 * x)
    assert total == 150
