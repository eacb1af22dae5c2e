import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait.errors import ArtifactVersion, DamagedArtifact
from plait.runtime.plan import Call, InputSpec, KernelSpec, Launch, OutputSpec, Plan, SymbolSpec, from_json, to_json

from tests.runtime.kit import call, chain, make_plan, tensor_input, v, value


def everything():
    """A plan with every kind of part."""
    inner = chain(8)
    inputs = (
        tensor_input("x", ("s0", 4)),
        tensor_input("y", ("s0",), strides=None),
        InputSpec("n", "int", expr="n"),
        InputSpec("f", "float", expr=math.inf),
        InputSpec("b", "bool"),
        InputSpec("no", "none"),
    )
    arguments = [
        v(0),
        {"e": ["add", "s0", 1]},
        {"l": [v(1), {"c": None}]},
        {"c": -math.inf},
        {"c": 2 + 1j},
        {"c": [1, "a", True]},
    ]
    arguments += [{"d": "float32"}, {"dev": "cpu"}, {"lay": "strided"}, {"mf": "contiguous_format"}, {"g": "inner"}]
    steps = (
        Launch("k", (0, 1), ("s0", ["mul", "s0", 4])),
        Launch("g", (0,), (), stream=2, waits=(0,)),
        Call("aten.foo.default", tuple(arguments), (("out", v(1)),), (2, None), "library", "measured faster", "line 3"),
    )
    return Plan(
        inputs,
        (SymbolSpec("s0", 0, 0, 2, 100), SymbolSpec("n", 2, None), SymbolSpec("u0", -1, None)),
        (
            value(0, "input", ("s0", 4), 0),
            value(1, "arena", ("s0",), offset=64),
            value(2, "scalar", (), "u0", dtype="int64"),
        ),
        steps,
        (
            OutputSpec("value", 0),
            OutputSpec("size", expr="s0"),
            OutputSpec("constant", const=[1.5, None]),
            OutputSpec("none"),
        ),
        (
            KernelSpec("k", "cpp", "abc", ("read", "write")),
            KernelSpec("g", "triton", "d", ("read",), ("s0", 1), (("warps", 4),)),
        ),
        ["mul", "s0", 8],
        (("inner", inner),),
        ((["le", "s0", 100], "s0 is at most 100"),),
        (("twice", ["mul", "s0", 2]),),
        origin={"aten.relu": "model.py:3"},
    )


def test_round_trip_through_text():
    plan = everything()
    text = json.dumps(to_json(plan), allow_nan=False, sort_keys=True)
    assert from_json(json.loads(text)) == plan
    assert json.dumps(to_json(from_json(json.loads(text))), allow_nan=False, sort_keys=True) == text


def test_defaults_are_left_out():
    assert to_json(make_plan([], [], [], [])) == {
        "inputs": [],
        "symbols": [],
        "values": [],
        "steps": [],
        "outputs": [],
        "kernels": [],
        "version": 1,
    }


def test_other_versions_are_refused_by_name():
    data = to_json(chain())
    with pytest.raises(ArtifactVersion, match="format version 2, this plait reads version 1"):
        from_json({**data, "version": 2, "something": "new"})


@pytest.mark.parametrize(
    ("path", "bad", "message"),
    [
        (("steps", 0, "buffers", 1), "0", r"plan.steps\[0\].buffers\[1\]: expected a 64-bit int, got '0'"),
        (("steps", 0, "buffers", 1), True, "expected a 64-bit int, got True"),
        (("steps", 0, "kernel"), 3, r"plan.steps\[0\].kernel: expected a string"),
        (("steps", 0, "step"), "jump", "a step of kind"),
        (("steps", 2, "args", 0), {"z": 1}, "an argument of one of the kinds v, e, l"),
        (("steps", 2, "args", 0), {"v": 1, "e": 2}, "an argument with one key"),
        (("steps", 2, "args", 4), {"c": {"complex": [1]}}, "a plain value"),
        (("steps", 2, "kind"), "magic", "one of 'library', 'fallback'"),
        (("values", 0, "shape", 0), ["add", "s0"], r"plan.values\[0\].shape\[0\]: add has 1 operands"),
        (("values", 0, "shape", 0), ["shell", "s0", 1], "expected a size expression"),
        (("values", 0, "shape", 0), "__import__('os')", "is not a symbol's name"),
        (("values", 0, "storage"), "attic", "one of 'input'"),
        (("inputs", 0), [], r"plan.inputs\[0\]: expected an object"),
        (("inputs",), {}, "plan.inputs: expected a list"),
        (("symbols", 0, "low"), 2**70, "expected a 64-bit int"),
        (("kernels", 0, "access", 0), "delete", "one of 'read'"),
        (("regions", 0), ["inner"], "expected a pair"),
        (("regions", 0, 1, "steps", 0, "sizes", 0), 1.5, r"plan.regions\[0\]\[1\].steps\[0\].sizes\[0\]"),
        (("origin", "aten.relu"), 1, "plan.origin.aten.relu: expected a string"),
        (("arena",), None, "plan.arena: expected a size expression"),
        (("colour",), "red", "unknown field 'colour'"),
    ],
)
def test_ill_formed_fields_are_named(path, bad, message):
    data = json.loads(json.dumps(to_json(everything())))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = bad
    with pytest.raises(DamagedArtifact, match=message):
        from_json(data)


def test_missing_fields_and_depth():
    data = to_json(chain())
    del data["steps"]
    with pytest.raises(DamagedArtifact, match="plan: the field 'steps' is missing"):
        from_json(data)
    deep = 1
    for _ in range(100_000):
        deep = ["neg", deep]
    with pytest.raises(DamagedArtifact, match="nested too deeply"):
        from_json({**to_json(chain()), "arena": deep})
    with pytest.raises(DamagedArtifact, match="expected an object"):
        from_json(None)


def paths(x, here=()):
    yield here
    for key, part in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from paths(part, (*here, key))


ALL_PATHS = [p for p in paths(to_json(everything())) if p]
junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({}), st.just([[]])
)


@given(st.sampled_from(ALL_PATHS), junk)
def test_any_damage_gives_a_plan_or_a_named_error(path, bad):
    data = json.loads(json.dumps(to_json(everything())))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = bad
    with contextlib.suppress(DamagedArtifact, ArtifactVersion):
        assert isinstance(from_json(data), Plan)


def test_calls_of_the_kit_are_well_formed():
    plan = make_plan(
        [tensor_input("x", (8,))], [value(0, "input", (8,), 0)], [call("aten.neg.default", [v(0)], [None])], [0]
    )
    assert from_json(to_json(plan)) == plan
