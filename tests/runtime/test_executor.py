import gc
import threading
import time

import pytest
import torch
from plait.errors import GuardFailed, KernelMissing, OpNotAvailable, SizeFailed, UnsafePlan, WrongOpResult
from plait.runtime.executor import Executable
from plait.runtime.plan import InputSpec, Launch, OutputSpec, SymbolSpec

from tests.runtime.kit import call, chain, make_plan, tensor_input, v, value

S0 = (SymbolSpec("s0", 0, 0),)


def test_static_plan(kernels):
    x = torch.randn(64)
    (y,) = Executable(chain(64), kernels, {})(x)
    assert torch.equal(y, 4 * x)


@pytest.mark.parametrize("check", [True, False])
def test_dynamic_sizes(kernels, check):
    run = Executable(chain(), kernels, {}, check=check)
    for n in (1, 1000, 3, 0, 17, 1 << 16):
        x = torch.randn(n)
        assert torch.equal(run(x)[0], 4 * x)


def test_derived_sizes_and_offsets(kernels):
    # x is (s0, s1); rows 1.. of it go into the second half of an arena buffer
    rows, cols = "s0", "s1"
    tail = ["mul", ["add", rows, -1], cols]
    plan = make_plan(
        [tensor_input("x", (rows, cols))],
        [
            value(0, "input", (rows, cols), 0),
            value(1, "view", (["add", rows, -1], cols), 0, offset=cols),
            value(2, "arena", (tail,), offset=["mul", 64, ["ceildiv", ["mul", tail, 4], 64]]),
            value(3, "fresh", (tail,)),
        ],
        [Launch("twice", (1, 2), (tail,)), Launch("twice", (2, 3), (tail,))],
        [3, OutputSpec("size", expr=tail)],
        symbols=(SymbolSpec("s0", 0, 0), SymbolSpec("s1", 0, 1)),
        arena=["mul", 128, ["ceildiv", ["mul", tail, 4], 64]],
    )
    run = Executable(plan, kernels, {})
    for shape in ((2, 3), (5, 7), (100, 33)):
        x = torch.randn(shape)
        y, size = run(x)
        assert torch.equal(y, 4 * x[1:].flatten())
        assert size == (shape[0] - 1) * shape[1]


def test_named_sizes(kernels):
    plan = make_plan(
        [tensor_input("x", ("s0",))],
        [value(0, "input", ("s0",), 0), value(1, "arena", ("s0",), offset="second"), value(2, "fresh", ("s0",))],
        [Launch("twice", (0, 1), ("s0",)), Launch("twice", (1, 2), ("s0",))],
        [2, OutputSpec("size", expr=["add", "bytes", 1])],
        symbols=S0,
        sizes=(("bytes", ["mul", "s0", 4]), ("second", ["mul", 64, ["ceildiv", "bytes", 64]])),
        arena=["mul", 2, "second"],
    )
    run = Executable(plan, kernels, {})
    for n in (7, 1, 100):
        x = torch.randn(n)
        y, size = run(x)
        assert torch.equal(y, 4 * x)
        assert size == 4 * n + 1


def test_outputs_are_not_touched_by_later_calls(kernels):
    run = Executable(chain(), kernels, {})
    inputs = [torch.randn(50) for _ in range(100)]
    kept = [run(x)[0] for x in inputs]
    assert all(torch.equal(y, 4 * x) for x, y in zip(inputs, kept, strict=True))


def test_eight_threads(kernels):
    run = Executable(chain(slow=True), kernels, {})
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for n in (5, 500, 50):
            x = torch.randn(n + seed, generator=generator)
            if not torch.equal(run(x)[0], 4 * x):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_interleaved_and_recursive_calls_have_their_own_arena(kernels):
    # the plan calls back into itself between writing the arena and reading it
    depth = []

    def again(addresses, sizes, nthreads):
        if len(depth) < 3:
            depth.append(1)
            n = 10 * len(depth)
            assert torch.equal(run(torch.full((n,), 7.0))[0], torch.full((n,), 28.0))

    plan = make_plan(
        [tensor_input("x", ("s0",))],
        [value(0, "input", ("s0",), 0), value(1, "arena", ("s0",)), value(2, "fresh", ("s0",))],
        [Launch("add", (0, 0, 1), ("s0",)), Launch("nothing", (0, 1), ()), Launch("twice", (1, 2), ("s0",))],
        [2],
        symbols=S0,
        arena=["mul", "s0", 4],
    )
    run = Executable(plan, {**kernels, "nothing": again}, {})
    x = torch.randn(40)
    assert torch.equal(run(x)[0], 4 * x)
    assert len(depth) == 3


def test_call_between_segments(kernels):
    # sort reads an arena value and gives a handle that the next segment reads
    n = "s0"
    plan = make_plan(
        [tensor_input("x", (n,))],
        [
            value(0, "input", (n,), 0),
            value(1, "arena", (n,)),
            value(2, "handle", (n,)),
            value(3, "fresh", (n,)),
            value(4, "handle", (n,), dtype="int64"),
        ],
        [
            Launch("twice", (0, 1), (n,)),
            call("aten.sort.default", [v(1)], [2, 4], [("descending", {"c": True})]),
            Launch("twice", (2, 3), (n,)),
        ],
        [3, 4],
        symbols=S0,
        arena=["mul", n, 4],
    )
    run = Executable(plan, kernels, {})
    for size in (10, 1, 300):
        x = torch.randn(size)
        y, order = run(x)
        expected = (2 * x).sort(descending=True)
        assert torch.equal(y, 2 * expected.values)
        assert torch.equal(order, expected.indices)


def test_results_are_copied_into_planned_memory(kernels):
    plan = make_plan(
        [tensor_input("x", (8,))],
        [value(0, "input", (8,), 0), value(1, "arena", (8,)), value(2, "fresh", (8,)), value(3, "fresh", (8,))],
        [
            call("aten.neg.default", [v(0)], [1]),
            Launch("twice", (1, 2), (8,)),
            call("aten.exp.out", [v(1)], [3], [("out", v(3))]),
        ],
        [2, 3],
        arena=32,
    )
    x = torch.randn(8)
    y, z = Executable(plan, kernels, {})(x)
    assert torch.equal(y, -2 * x)
    assert torch.equal(z, torch.exp(-x))


def test_handles_with_other_strides_are_laid_out_again(kernels, caplog):
    # the plan announces a contiguous result where the op returns a transposed one
    plan = make_plan(
        [tensor_input("x", (3, 4))],
        [value(0, "input", (3, 4), 0), value(1, "handle", (4, 3)), value(2, "fresh", (4,))],
        [call("aten.t.default", [v(0)], [1]), Launch("rowsum", (1, 2), (4, 3, 3))],
        [2],
    )
    x = torch.randn(3, 4)
    run = Executable(plan, kernels, {})
    for _ in range(2):
        assert torch.allclose(run(x)[0], x.sum(0))
    assert caplog.text.count("aten.t.default returns strides") == 1


def test_wrong_op_results_are_named(kernels):
    values = [value(0, "input", (8,), 0), value(1, "handle", (4,)), value(2, "fresh", (4,))]
    inputs = [tensor_input("x", (8,))]
    steps = [call("aten.neg.default", [v(0)], [1]), Launch("twice", (1, 2), (4,))]
    with pytest.raises(WrongOpResult, match=r"aten.neg.default returned float32\[8\], the plan expects float32\[4\]"):
        Executable(make_plan(inputs, values, steps, [2]), kernels, {})(torch.randn(8))
    with pytest.raises(WrongOpResult, match="4 results, the plan expects 2"):
        plan = make_plan(inputs, values, [call("aten.split.Tensor", [v(0), {"c": 2}], [1, None])], [1])
        Executable(plan, {}, {})(torch.randn(8))
    with pytest.raises(WrongOpResult, match=r"the plan expects float32\[4\]"):
        plan = make_plan(inputs, values, [call("aten.neg.default", [v(0)], [2])], [2])
        Executable(plan, {}, {})(torch.randn(8))


def test_all_kinds_of_arguments():
    plan = make_plan(
        [tensor_input("x", ("s0",))],
        [value(0, "input", ("s0",), 0), value(1, "handle", ("s0",)), value(2, "handle", ("s0", 2), dtype="float64")],
        [
            call(
                "aten.full.default",
                [{"l": [{"e": "s0"}, {"c": 2}]}, {"c": 1.5}],
                [2],
                [
                    ("dtype", {"d": "float64"}),
                    ("device", {"dev": "cpu"}),
                    ("layout", {"lay": "strided"}),
                    ("pin_memory", {"c": False}),
                ],
            ),
            call("aten.clone.default", [v(0)], [1], [("memory_format", {"mf": "contiguous_format"})]),
        ],
        [1, 2],
        symbols=S0,
    )
    x = torch.randn(5)
    y, z = Executable(plan, {}, {})(x)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(z, torch.full((5, 2), 1.5, dtype=torch.float64))


def test_lists_of_values():
    plan = make_plan(
        [tensor_input("x", (2, 3)), tensor_input("y", (1, 3))],
        [value(0, "input", (2, 3), 0), value(1, "input", (1, 3), 1), value(2, "handle", (3, 3))],
        [call("aten.cat.default", [{"l": [v(0), v(1)]}], [2])],
        [2],
    )
    x, y = torch.randn(2, 3), torch.randn(1, 3)
    assert torch.equal(Executable(plan, {}, {})(x, y)[0], torch.cat([x, y]))


def test_sizes_bound_while_running(kernels):
    # u0 = number of non-zeros; kernels after it use u0 and expressions of it
    double = ["mul", 2, "u0"]
    plan = make_plan(
        [tensor_input("x", ("s0",))],
        [
            value(0, "input", ("s0",), 0),
            value(1, "handle", ("u0",)),
            value(2, "scalar", (), "u0", dtype="int64"),
            value(3, "fresh", (double,)),
            value(4, "view", ("u0",), 3, offset="u0"),
            value(5, "handle", ("s0",), dtype="bool"),
        ],
        [
            call("aten.ne.Scalar", [v(0), {"c": 0}], [5]),
            call("aten.masked_select.default", [v(0), v(5)], [1]),
            call("aten.sym_size.int", [v(1), {"c": 0}], [2]),
            Launch("twice", (1, 3), ("u0",)),
            Launch("twice", (1, 4), ("u0",)),
        ],
        [3, OutputSpec("size", expr=double)],
        symbols=(*S0, SymbolSpec("u0", -1, None)),
        asserts=((["le", "u0", "s0"], "more non-zeros than elements"), (["lt", "u0", 5], "too many")),
    )
    run = Executable(plan, kernels, {})
    x = torch.tensor([0.0, 1.0, 0.0, 3.0])
    y, size = run(x)
    assert y.tolist() == [2, 6, 2, 6]
    assert size == 4
    with pytest.raises(GuardFailed, match="too many"):
        run(torch.ones(6))
    assert run(x)[0].tolist() == [2, 6, 2, 6]


@pytest.mark.parametrize("native", [True, False])
def test_guards_and_size_errors(kernels, native):
    values = [value(0, "input", ("s0",), 0), value(1, "fresh", ("s0",))]
    step = Launch("twice", (0, 1), ("s0",)) if native else call("aten.neg.default", [v(0)], [1])

    def plan(**rest):
        return make_plan([tensor_input("x", ("s0",))], values, [step], [1], symbols=S0, **rest)

    run = Executable(plan(asserts=((["eq", ["mod", "s0", 2], 0], "s0 must be even"),)), kernels, {})
    run(torch.randn(4))
    with pytest.raises(GuardFailed, match="s0 must be even"):
        run(torch.randn(3))
    with pytest.raises(SizeFailed, match="division by zero"):
        Executable(plan(arena=["floordiv", 64, ["add", "s0", -3]]), kernels, {})(torch.randn(3))
    with pytest.raises(SizeFailed, match="64-bit"):
        Executable(plan(arena=["pow", ["add", "s0", 2**40], 3]), kernels, {})(torch.randn(3))


def test_sizes_are_computed_anew_only_when_they_change(kernels):
    plan = make_plan(
        [tensor_input("x", ("s0",))],
        [value(0, "input", ("s0",), 0), value(1, "arena", ("s0",)), value(2, "fresh", ("s0",))],
        [Launch("twice", (0, 1), ("s0",)), Launch("twice", (1, 2), ("s0",))],
        [2],
        symbols=S0,
        arena=["mul", 4, "s0"],
        asserts=((["eq", ["mod", "s0", 2], 0], "s0 must be even"),),
    )
    run, sized = Executable(plan, kernels, {}), []
    enter = run._enter
    run._enter = lambda frame: (sized.append(frame.slots[0]), enter(frame))
    for size in (4, 4, 1000, 1000, 4, 3, 3, 4):
        x = torch.randn(size)
        if size % 2:
            with pytest.raises(GuardFailed):
                run(x)
        else:
            assert torch.equal(run(x)[0], 4 * x)
    assert len(sized) == 6  # neither the second 4 nor the second 1000; a call that fails leaves nothing behind


def test_mutated_inputs_count_their_versions(kernels):
    plan = make_plan(
        [tensor_input("x", (4,)), tensor_input("y", (4,)), tensor_input("z", (4,))],
        [value(0, "input", (4,), 0), value(1, "input", (4,), 1), value(2, "input", (4,), 2)],
        [Launch("increment", (0,), (4,)), Launch("twice", (0, 1), (4,)), call("aten.add_.Scalar", [v(2), {"c": 1}], [None])],
        [0],
    )
    run = Executable(plan, kernels, {})
    x, y, z = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    (out,) = run(x, y, z)
    assert out is x
    assert (x.tolist(), y.tolist(), z.tolist()) == ([1] * 4, [2] * 4, [1] * 4)
    assert (x._version, y._version, z._version) == (1, 1, 1)
    with torch.inference_mode():
        run(x, y, z)
        run(torch.zeros(4), torch.zeros(4), torch.zeros(4))
    assert x.tolist() == [2] * 4


def test_autograd_sees_a_natively_mutated_input(kernels):
    plan = make_plan([tensor_input("x", (4,))], [value(0, "input", (4,), 0)], [Launch("increment", (0,), (4,))], [])
    w = torch.ones(4, requires_grad=True)
    x = torch.ones(4)
    y = (w * x).sum()
    Executable(plan, kernels, {})(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_outputs_of_every_kind(kernels):
    weight = torch.randn(3)
    plan = make_plan(
        [tensor_input("x", (2, 3)), InputSpec("n", "int", expr="n"), InputSpec("flag", "bool")],
        [
            value(0, "input", (2, 3), 0),
            value(1, "view", (3, 2), 0, strides=(1, 3)),
            value(2, "constant", (3,), "w"),
            value(3, "view", (2,), 2, offset=1),
            value(4, "view", (6,), 0, dtype="int32"),
            value(5, "fresh", (0,)),
        ],
        [],
        [0, 1, 2, 3, 4, 5, OutputSpec("size", expr=["mul", "n", 3]), OutputSpec("constant", const="hi"), OutputSpec("none")],
        symbols=(SymbolSpec("n", 1, None),),
    )
    x = torch.randn(4, 3)[1:3]  # its storage starts elsewhere
    a, b, c, d, e, f, size, text, none = Executable(plan, kernels, {"w": weight})(x, 14, True)
    assert a is x
    assert torch.equal(b, x.t())
    assert b.data_ptr() == x.data_ptr()
    assert torch.equal(c, weight)
    assert torch.equal(d, weight[1:])
    assert torch.equal(e, x.flatten().view(torch.int32))
    assert f.shape == (0,)
    assert (size, text, none) == (42, "hi", None)


def test_dead_values_are_freed_early(kernels):
    import weakref

    alive = []

    def look(addresses, sizes, nthreads):
        gc.collect()
        alive.append([r() is not None for r in refs])

    n = 1000
    plan = make_plan(
        [tensor_input("x", (n,))],
        [value(0, "input", (n,), 0), value(1, "handle", (n,)), value(2, "handle", (n,)), value(3, "fresh", (n,))],
        [
            call("aten.neg.default", [v(0)], [1]),
            call("aten.neg.default", [v(1)], [2]),
            Launch("nothing", (2, 2), ()),
            Launch("twice", (2, 3), (n,)),
        ],
        [3],
    )
    run = Executable(plan, {**kernels, "nothing": look}, {})
    x = torch.randn(n)
    refs = [weakref.ref(x)]
    args = [x]
    del x
    run.run(args)
    assert args == []
    assert alive == [[False]]


def test_number_of_threads_follows_torch(kernels):
    plan = make_plan(
        [tensor_input("x", (1,))],
        [value(0, "fresh", (1,), dtype="int64"), value(1, "fresh", (1,), dtype="int64"), value(2, "input", (1,), 0)],
        [Launch("threads", (0,), ()), Launch("nothing", (2, 2), ()), Launch("threads", (1,), ())],
        [0, 1],
    )

    def change(addresses, sizes, nthreads):
        torch.set_num_threads(1)

    run = Executable(plan, {**kernels, "nothing": change}, {})
    torch.set_num_threads(2)
    before, after = run(torch.zeros(1))
    assert (before.item(), after.item()) == (2, 1)


def test_grad_modes_and_autocast_do_not_reach_the_calls(kernels):
    plan = make_plan(
        [tensor_input("x", (4, 4))],
        [value(0, "input", (4, 4), 0), value(1, "handle", (4, 4)), value(2, "arena", (4, 4)), value(3, "fresh", (4, 4))],
        [
            call("aten.mm.default", [v(0), v(0)], [1]),
            call("aten.neg.out", [v(1)], [2], [("out", v(2))]),
            Launch("twice", (2, 3), (16,)),
        ],
        [1, 3],
        arena=64,
    )
    run = Executable(plan, kernels, {})
    x = torch.randn(4, 4, requires_grad=True)
    expected = (x @ x).detach()
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with context:
            y, z = run(x)
            assert torch.is_grad_enabled() == (type(context) in (torch.autocast, torch.enable_grad))
        assert y.dtype == torch.float32
        assert not y.requires_grad
        assert torch.equal(y, expected)
        assert torch.equal(z, -2 * expected)


def test_what_is_missing_is_named(kernels):
    with pytest.raises(KernelMissing, match="kernel 'add'"):
        Executable(chain(4), {}, {})
    constant = make_plan([], [value(0, "constant", (4,), "w")], [], [0])
    with pytest.raises(KernelMissing, match="constant 'w'"):
        Executable(constant, {}, {})
    unknown = make_plan(
        [tensor_input("x", (4,))], [value(0, "input", (4,), 0)], [call("aten.nonsense.default", [v(0)], [])], []
    )
    with pytest.raises(OpNotAvailable, match=r"aten.nonsense.default"):
        Executable(unknown, {}, {})
    region = make_plan(
        [tensor_input("x", (4,))], [value(0, "input", (4,), 0)], [call("plait.call", [{"g": "r"}, {"l": []}], [])], []
    )
    with pytest.raises(KernelMissing, match="region 'r'"):
        Executable(region, {}, {})
    symbol = make_plan([], [value(0, "fresh", ("s9",))], [], [0])
    with pytest.raises(UnsafePlan, match="symbol 's9'"):
        Executable(symbol, {}, {})
    escaping = make_plan([], [value(0, "arena", (4,))], [], [0], arena=16)
    with pytest.raises(UnsafePlan, match="lies in the arena"):
        Executable(escaping, {}, {})


def test_profile_and_trim(kernels):
    plan = make_plan(
        [tensor_input("x", (64,))],
        [value(0, "input", (64,), 0), value(1, "handle", (64,)), value(2, "fresh", (64,)), value(3, "fresh", (64,))],
        [
            call("aten.neg.default", [v(0)], [1]),
            Launch("twice", (1, 2), (64,)),
            Launch("slow_twice", (2, 3), (64,)),
        ],
        [3],
    )
    run = Executable(plan, kernels, {})
    x = torch.randn(64)
    (y,), times = run.profile(x)
    assert torch.equal(y, -4 * x)
    assert [number for number, _ in times] == [0, 1, 2]
    assert times[2][1] > 30_000_000
    before = time.perf_counter_ns()
    (y,), spans = run.trace(x)
    after = time.perf_counter_ns()
    assert torch.equal(y, -4 * x) and [number for number, _, _ in spans] == [0, 1, 2]
    ends = [before, *(moment for _, *span in spans for moment in span), after]
    assert ends == sorted(ends) and spans[1][2] == spans[2][1] and spans[2][2] - spans[2][1] > 30_000_000
    run.trim()
    assert torch.equal(run(x)[0], -4 * x)
