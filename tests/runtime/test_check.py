from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait.errors import OpNotAvailable, UnsafePlan
from plait.runtime import sizes
from plait.runtime.check import check, problems
from plait.runtime.plan import InputSpec, KernelSpec, Launch, OutputSpec, Plan, SymbolSpec, from_json, to_json

from tests.runtime.kit import call, chain, make_plan, tensor_input, v, value

X = value(0, "input", (8,), 0)
INPUTS = [tensor_input("x", (8,))]


def why(plan):
    return "; ".join(problems(plan))


def straight(offsets, lengths, uses, arena, symbols=()):
    """Arena value i + 1 is written by step i and read last by step uses[i]; byte offsets and float32 lengths are given."""
    count = len(offsets)
    values = [X, *(value(i + 1, "arena", (n,), offset=o) for i, (o, n) in enumerate(zip(offsets, lengths, strict=True)))]
    values.append(value(count + 1, "fresh", (8,)))
    steps, kernels = [], []
    for number in range(count + 1):
        reads = [i + 1 for i in range(count) if uses[i] == number and i < number]
        kernels.append(KernelSpec(f"k{number}", "cpp", "0", ("read",) * (1 + len(reads)) + ("write",)))
        steps.append(Launch(f"k{number}", (0, *reads, number + 1), ()))
    inputs = [tensor_input("x", (8,)), *(InputSpec(s.name, "int", expr=s.name) for s in symbols)]
    outputs = (OutputSpec("value", count + 1),)
    return Plan(tuple(inputs), symbols, tuple(values), tuple(steps), outputs, tuple(kernels), arena)


@st.composite
def layouts(draw):
    count = draw(st.integers(1, 8))
    lengths = [draw(st.integers(1, 20)) for _ in range(count)]
    uses = [draw(st.integers(i, count)) for i in range(count)]
    offsets = [4 * draw(st.integers(0, 60)) for _ in range(count)]
    return offsets, lengths, uses


@given(layouts())
def test_overlaps_are_found_exactly(layout):
    offsets, lengths, uses = layout
    clash = any(
        offsets[i] < offsets[j] + 4 * lengths[j] and offsets[j] < offsets[i] + 4 * lengths[i] and j <= uses[i]
        for i in range(len(offsets))
        for j in range(i + 1, len(offsets))
    )
    plan = straight(offsets, lengths, uses, 4 * 80)
    assert ("share bytes" in why(plan)) == clash
    assert bool(why(plan)) == clash


def first_fit(lengths, uses, align=64):
    """The planner of a test: static first fit."""
    offsets = []
    for i, n in enumerate(lengths):
        taken = sorted((offsets[j], offsets[j] + 4 * lengths[j]) for j in range(i) if uses[j] >= i)
        at = 0
        for start, end in taken:
            if at + 4 * n <= start:
                break
            at = max(at, -(-end // align) * align)
        offsets.append(at)
    return offsets


@given(layouts(), st.data())
def test_planted_overlaps_are_caught(layout, data):
    _, lengths, uses = layout
    offsets = first_fit(lengths, uses)
    arena = max(o + 4 * n for o, n in zip(offsets, lengths, strict=True))
    check(straight(offsets, lengths, uses, arena))
    together = [(i, j) for j in range(len(lengths)) for i in range(j) if uses[i] >= j]
    if together:
        i, j = data.draw(st.sampled_from(together))
        offsets[j] = offsets[i] + 4 * data.draw(st.integers(0, lengths[i] - 1))
        assert "share bytes" in why(straight(offsets, lengths, uses, 10_000))


@st.composite
def symbolic_layouts(draw):
    """A stack of aligned symbolic sizes; a value lies on the end of some earlier value or on that plus or minus a slip."""
    count = draw(st.integers(1, 6))
    lengths = [
        draw(st.sampled_from(["a", "b", ["mul", 3, "a"], ["mul", "a", "b"], 5, ["ceildiv", "b", 2]])) for _ in range(count)
    ]
    uses = [draw(st.integers(i, count)) for i in range(count)]
    offsets = []
    for i in range(count):
        under = draw(st.integers(-1, i - 1))
        at = 0 if under < 0 else ["add", offsets[under], ["mul", 64, ["ceildiv", ["mul", 4, lengths[under]], 64]]]
        slip = draw(st.sampled_from([0, 0, 0, 64, -64]))
        offsets.append(["add", at, slip] if slip > 0 or (slip and under >= 0) else at)
    return offsets, lengths, uses


@given(symbolic_layouts(), st.integers(1, 40), st.integers(1, 40))
def test_accepted_symbolic_layouts_never_overlap(layout, a, b):
    offsets, lengths, uses = layout
    symbols = (SymbolSpec("a", 1, None, low=1), SymbolSpec("b", 2, None, low=1))
    arena = ["add", *offsets, *(["mul", 4, n] for n in lengths), 64]
    if why(straight(offsets, lengths, uses, arena, symbols)):
        return
    env = {"a": a, "b": b}
    at = [sizes.evaluate(o, env) for o in offsets]
    size = [4 * sizes.evaluate(n, env) for n in lengths]
    for j in range(len(at)):
        assert 0 <= at[j] <= sizes.evaluate(arena, env) - size[j]
        for i in range(j):
            assert uses[i] < j or at[i] + size[i] <= at[j] or at[j] + size[j] <= at[i]


def test_a_symbolic_stack_is_accepted():
    symbols = (SymbolSpec("a", 1, None), SymbolSpec("b", 2, None))

    def aligned(n):
        return ["mul", 64, ["ceildiv", ["mul", 4, n], 64]]

    offsets = [0, aligned("a"), ["add", aligned("a"), aligned("b")]]
    plan = straight(
        offsets, ["a", "b", ["mul", "a", "b"]], [3, 3, 3], ["add", offsets[2], aligned(["mul", "a", "b"])], symbols
    )
    check(plan)
    short = replace(plan, arena=offsets[2])
    assert "value 3 is not proven to lie inside the arena" in why(short)
    assert "values 1 and 2 may share" in why(
        straight([0, aligned("b"), 4096], ["a", "b", 1], [3, 3, 3], plan.arena, symbols)
    )


def test_a_tall_stack_of_named_offsets():
    # as a planner for dynamic shapes makes it: every value on top of the one before
    count = 300
    symbols = (SymbolSpec("a", 1, None), SymbolSpec("b", 2, None, low=1))
    lengths = [["mul", 1 + i % 7, "a"] if i % 2 else ["add", "b", i % 5] for i in range(count)]
    names, top = [], 0
    for i, n in enumerate(lengths):
        names.append((f"o{i}", ["add", top, ["mul", 64, ["ceildiv", ["mul", 4, n], 64]]]))
        top = f"o{i}"
    offsets = [0, *(name for name, _ in names[:-1])]
    plan = replace(straight(offsets, lengths, [count] * count, top, symbols), sizes=tuple(names))
    assert why(plan) == ""
    assert from_json(to_json(plan)) == plan
    slipped = list(names)
    slipped[70] = ("o70", ["add", "o69", ["mul", 64, ["floordiv", ["mul", 4, lengths[70]], 64]]])
    assert why(replace(plan, sizes=tuple(slipped))) == "values 71 and 72 may share bytes of the arena while both are alive"
    again = replace(plan, sizes=(*names, names[0]))
    assert "symbol o0 is defined twice" in why(again)
    assert "'c'" in why(replace(plan, sizes=(("o0", "c"), *names[1:])))


def test_inputs_over_unknown_sizes():
    plan = make_plan([tensor_input("x", ("s0",)), tensor_input("y", ("u",))], [], [], [], symbols=(SymbolSpec("s0", 0, 0),))
    assert why(plan) == "input y needs the symbol u, which no input binds"


def test_views_keep_their_memory_alive():
    def plan(last):
        values = [
            X,
            value(1, "arena", (8,)),
            value(2, "view", (4,), 1, offset=4),
            value(3, "arena", (8,)),
            value(4, "fresh", (8,)),
        ]
        steps = [Launch("twice", (0, 1), ()), Launch("twice", (0, 3), ()), Launch("add", (3, last, 4), ())]
        return make_plan(INPUTS, values, steps, [4], arena=32)

    assert why(plan(0)) == ""
    assert why(plan(2)) == "values 1 and 3 may share bytes of the arena while both are alive"


def test_handles_that_alias_keep_memory_alive():
    def plan(op, args, last):
        values = [X, value(1, "arena", (8,)), value(2, "handle", (8,)), value(3, "arena", (8,)), value(4, "fresh", (8,))]
        steps = [
            Launch("twice", (0, 1), ()),
            call(op, [v(1), *args], [2]),
            Launch("twice", (0, 3), ()),
            Launch("add", (3, last, 4), ()),
        ]
        return make_plan(INPUTS, values, steps, [4], arena=32)

    assert why(plan("aten.neg.default", [], 2)) == ""
    assert why(plan("aten.view.default", [{"l": [{"c": 8}]}], 0)) == ""
    assert "values 1 and 3 may share" in why(plan("aten.view.default", [{"l": [{"c": 8}]}], 2))


def test_kernels_do_not_write_through_a_handle_that_may_alias():
    def reason(op, args):
        steps = [call(op, [v(0), *args], [1]), Launch("increment", (1,), ())]
        return why(make_plan(INPUTS, [X, value(1, "handle", (8,))], steps, [1]))

    assert reason("aten.neg.default", []) == ""
    shares = "step 1 writes to value 1, which may share the memory of value 0"
    assert reason("aten.view.default", [{"l": [{"c": 8}]}]) == shares


def test_nothing_in_the_arena_leaves_the_call():
    values = [X, value(1, "arena", (8,)), value(2, "handle", (8,)), value(3, "view", (4,), 1)]
    steps = [Launch("twice", (0, 1), ()), call("aten.view.default", [v(1), {"l": [{"c": 8}]}], [2])]
    for out in (1, 2, 3):
        assert f"output {out} lies in the arena (value 1)" in why(make_plan(INPUTS, values, steps, [out], arena=32))


def test_reads_before_writes():
    values = [X, value(1, "arena", (8,)), value(2, "fresh", (8,)), value(3, "handle", (8,)), value(4, "scalar", ())]

    def reason(*steps, outputs=()):
        return why(make_plan(INPUTS, values, steps, outputs, arena=32))

    assert reason(Launch("twice", (1, 2), ())) == "step 0 reads value 1 before anything has written it"
    assert reason(Launch("increment", (1,), ())) == "step 0 reads value 1 before anything has written it"
    assert reason(Launch("twice", (0, 3), ())) == "step 0 reads value 3 before anything has written it"
    assert reason(call("aten.neg.default", [v(3)], [None])) == "step 0 reads value 3 before anything has written it"
    assert reason(call("aten.neg_.default", [v(1)], [None])) == "step 0 reads value 1 before anything has written it"
    assert reason(call("aten.neg.out", [v(0)], [None], [("out", v(1))]), Launch("twice", (1, 2), ()), outputs=[2]) == ""
    assert reason(outputs=[2]) == "output 2 is never written"
    assert reason(Launch("twice", (0, 4), ())) == "step 0 gives the number 4 to a kernel as a buffer"


def joined(*steps, low=(4,), high=(4,), at=4, strides=None):
    """Value 1 lies in the arena, values 2 and 3 are parts of it, values 4 and 5 read it and its second half."""
    values = [X, value(1, "arena", (8,)), value(2, "view", low, 1), value(3, "view", high, 1, offset=at, strides=strides)]
    values += [value(4, "fresh", (8,)), value(5, "fresh", (4,)), value(6, "view", (2,), 1, offset=6)]
    return why(make_plan(INPUTS, values, list(steps), [], arena=32))


LOW, HIGH, WHOLE = Launch("twice", (0, 2), ()), Launch("twice", (0, 3), ()), Launch("twice", (1, 4), ())


def test_a_value_in_parts_is_read_once_all_are_written():
    assert joined(LOW, HIGH, WHOLE) == joined(HIGH, LOW, WHOLE) == ""
    assert joined(LOW, WHOLE) == "step 1 reads value 1 before anything has written all of it"
    assert joined(HIGH, WHOLE) == "step 1 reads value 1 before anything has written all of it"
    assert joined(LOW, WHOLE, HIGH) == "step 1 reads value 1 before anything has written all of it"
    assert joined(HIGH, Launch("twice", (6, 5), ())) == joined(LOW, Launch("twice", (2, 5), ())) == ""
    assert joined(LOW, Launch("twice", (3, 5), ())) == "step 1 reads value 3 before anything has written all of it"
    assert joined(LOW, HIGH, WHOLE, high=(3,)) == "step 2 reads value 1 before anything has written all of it"
    assert joined(LOW, HIGH, WHOLE, high=(3,), at=5) == "step 2 reads value 1 before anything has written all of it"
    gaps = joined(LOW, HIGH, WHOLE, high=(2,), at=4, strides=(3,))
    assert gaps == "step 2 reads value 1 before anything has written all of it"


def test_parts_do_not_overwrite_each_other():
    assert joined(LOW, HIGH, WHOLE, low=(5,)) == "step 1 writes value 3, which may share bytes with value 2"
    assert joined(LOW, HIGH, WHOLE, at=3) == (
        "step 1 writes value 3, which may share bytes with value 2; "
        "step 2 reads value 1 before anything has written all of it"
    )


@pytest.mark.parametrize(("width", "found"), [("s0", ""), (["add", "s0", -1], "before anything has written all of it")])
def test_parts_of_symbolic_sizes(width, found):
    n = ["mul", "s0", 2]
    values = [value(0, "input", ("s0",), 0), value(1, "fresh", (n,)), value(2, "view", ("s0",), 1)]
    values += [value(3, "view", (width,), 1, offset="s0"), value(4, "fresh", (n,))]
    steps = [Launch("twice", (0, 2), ("s0",)), Launch("twice", (0, 3), (width,)), Launch("twice", (1, 4), (n,))]
    plan = make_plan([tensor_input("x", ("s0",))], values, steps, [4], symbols=(SymbolSpec("s0", 0, 0, low=2),))
    assert found in why(plan) and bool(found) == bool(why(plan))


def test_an_output_in_parts_is_written_whole():
    values = [X, value(1, "fresh", (16,)), value(2, "view", (8,), 1), value(3, "view", (8,), 1, offset=8)]
    assert why(make_plan(INPUTS, values, [LOW, HIGH], [1])) == ""
    assert why(make_plan(INPUTS, values, [LOW], [1])) == "output 1 is never written"


def test_streams():
    def plan(waits, offset=0):
        values = [X, value(1, "arena", (8,)), value(2, "arena", (8,), offset=32), value(3, "arena", (8,), offset=offset)]
        values.append(value(4, "fresh", (8,)))
        steps = [
            Launch("twice", (0, 1), ()),
            Launch("twice", (1, 2), (), stream=1, waits=waits),  # reads value 1 on the side
            Launch("twice", (0, 3), ()),
            Launch("add", (3, 2, 4), (), waits=(1,)),
        ]
        return make_plan(INPUTS, values, steps, [4], arena=96)

    assert why(plan((0,), 64)) == ""
    assert why(plan((), 64)) == "steps 0 and 1 touch value 1 on two streams without a wait"
    assert why(plan((0,), 0)) == "values 1 and 3 may share bytes of the arena while both are alive"
    assert "waits for step 7, which does not come before it" in why(plan((7,), 64))


def test_views_and_arena_values_lie_inside():
    def reason(*values):
        return why(make_plan(INPUTS, [X, *values], [], [], arena=32))

    assert reason(value(1, "view", (4,), 0, offset=4)) == ""
    assert reason(value(1, "view", (4,), 0, offset=5)) == "value 1 does not lie inside value 0"
    assert reason(value(1, "view", (4,), 0, offset=-1)) == "value 1 does not lie inside value 0"
    assert reason(value(1, "view", (2, 2), 0, strides=(6, 2))) == "value 1 does not lie inside value 0"
    assert reason(value(1, "view", (16,), 0, dtype="int16")) == ""
    assert reason(value(1, "view", (17,), 0, dtype="int16")) == "value 1 does not lie inside value 0"
    assert reason(value(1, "arena", (9,))) == "value 1 is not proven to lie inside the arena"
    assert reason(value(1, "arena", (1,), offset=-4)) == "value 1 is not proven to lie inside the arena"
    assert reason(value(1, "arena", (1,), offset=2)) == "value 1 lies at byte 2 of the arena, its elements have 4 bytes"
    assert reason(value(1, "fresh", (-1,))) == "value 1 has a negative size or stride"


def test_names_that_do_not_exist():
    def reason(values=(X,), steps=(), outputs=(), **rest):
        return why(make_plan(INPUTS, list(values), list(steps), outputs, **rest))

    assert reason([X, X]) == "value 0 is defined twice"
    assert reason([value(0, "input", (8,), 1)]) == "value 0 is input 1, which is not a tensor of the plan"
    assert reason([X, value(1, "view", (8,), 5)]) == "value 1 is a view of 5, which does not exist"
    assert reason([X, value(1, "view", (8,), 2), value(2, "view", (8,), 1)]) == "value 1 is a view of itself"
    assert reason(steps=[Launch("twice", (0, 9), ())]) == "step 0 uses value 9, which does not exist"
    assert reason(steps=[Launch("twice", (0,), ())]) == "step 0 gives 1 buffers to kernel twice, which has 2"
    assert (
        reason(steps=[call("plait.call", [{"g": "r"}, {"l": [v(0)]}], [])])
        == "step 0 uses the region 'r', which does not exist"
    )
    assert reason(outputs=[4]) == "an output is value 4, which does not exist"
    assert reason([X, value(1, "fresh", (8,), strides=(1, 1))]) == "value 1 has 1 sizes and 2 strides"
    bad = (SymbolSpec("s", 0, 3), SymbolSpec("t", 4, None), SymbolSpec("u", 0, None))
    found = reason(symbols=bad)
    assert "symbol s is bound by dimension 3 of input 0, which does not exist" in found
    assert "symbol t is bound by input 4, which does not exist" in found
    assert "symbol u is bound by input 0, which is of kind tensor" in found
    plan = replace(chain(8), kernels=())
    assert "step 0 launches the kernel 'add', which does not exist" in why(plan)
    with pytest.raises(OpNotAvailable):
        check(make_plan(INPUTS, [X], [call("aten.gibberish.default", [v(0)], [])], []))


def test_symbols_before_they_are_bound():
    values = [X, value(1, "handle", ("u0",)), value(2, "scalar", (), "u0"), value(3, "fresh", ("u0",))]
    select = call("aten.masked_select.default", [v(0), v(0)], [1])
    size = call("aten.sym_size.int", [v(1), {"c": 0}], [2])
    symbols = (SymbolSpec("u0", -1, None),)

    def reason(*steps, **rest):
        return why(make_plan(INPUTS, values, steps, [3], symbols=symbols, **rest))

    assert reason(select, size, Launch("twice", (1, 3), ("u0",))) == ""
    assert "step 1 needs the symbol u0 before step 2 binds it" in reason(select, Launch("twice", (1, 3), ()), size)
    assert "the arena needs the symbol u0 before" in reason(select, size, Launch("twice", (1, 3), ()), arena="u0")
    assert "step 2 needs the symbol w, which nothing binds" in reason(select, size, Launch("twice", (1, 3), ("w",)))


def test_inputs_must_lie_as_kernels_expect():
    def reason(spec, storage=X):
        return why(make_plan([spec], [storage, value(1, "fresh", (8,))], [Launch("twice", (0, 1), ())], [1]))

    assert reason(tensor_input("x", (8,))) == ""
    assert "input x may have any strides" in reason(tensor_input("x", (8,), strides=None))
    assert "differ in strides" in reason(tensor_input("x", (8,), strides=(2,)))
    assert "differ in dtype or shape" in reason(tensor_input("x", (7,)))


def test_regions_are_checked_too():
    inner = make_plan(INPUTS, [X, value(1, "fresh", (8,))], [], [1])
    plan = make_plan(INPUTS, [X], [call("plait.call", [{"g": "r"}, {"l": [v(0)]}], [None])], [0], regions=(("r", inner),))
    with pytest.raises(UnsafePlan, match="region r: output 1 is never written"):
        check(plan)


def overwriting(*steps, access=("read", "read_write")):
    """A plan whose value 2 is what input 0 becomes, value 3 a view of the old and value 4 one of the new."""
    values = (
        X, value(1, "fresh", (8,)), value(2, "view", (8,), 0), value(3, "view", (4,), 0), value(4, "view", (4,), 2),
        value(5, "handle", (8,)),
    )  # fmt: skip
    kernels = (KernelSpec("update", "cpp", "0", access), KernelSpec("copy", "cpp", "0", ("read", "write")))
    return Plan(tuple(INPUTS), (), values, steps, (OutputSpec("value", 1),), kernels, 0)


UPDATE = Launch("update", (0, 2), ())


def test_an_input_may_be_overwritten_after_its_last_reader():
    for reader in (0, 3):
        assert not why(overwriting(Launch("copy", (reader, 1), ()), UPDATE))
    for reader in (2, 4):
        assert not why(overwriting(UPDATE, Launch("copy", (reader, 1), ())))


@pytest.mark.parametrize("reader", [0, 3])
def test_old_values_are_not_read_once_they_are_overwritten(reader):
    plan = overwriting(UPDATE, Launch("copy", (reader, 1), ()))
    assert f"step 1 reads value {reader}, which step 0 has overwritten with value 2" in why(plan)


def test_a_kernel_that_overwrites_what_it_reads_says_so():
    plan = overwriting(UPDATE, Launch("copy", (2, 1), ()), access=("read", "write"))
    assert "step 0 reads value 0 and overwrites it with value 2" in why(plan)


def test_views_that_calls_made_of_old_values_are_not_read_after():
    view = call("aten.view.default", [v(0), {"l": [{"c": 8}]}], [5])
    assert not why(overwriting(view, Launch("copy", (5, 1), ()), UPDATE))
    late = overwriting(view, UPDATE, Launch("copy", (5, 1), ()))
    assert "step 2 reads value 5, which may lie where step 1 has written value 2" in why(late)
