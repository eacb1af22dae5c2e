"""Differential tests on generated programs, and tests of the generator, the judge and the shrinking themselves.

A failure prints the seed, the shrunk program and the command that runs it again.
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from tests import generate
from tests.generate.judge import judge
from tests.generate.program import Input, Program, Statement
from tests.generate.worlds import Worlds

SEEDS = 60
SHRINK_BUDGET = 40


def compiler(backend):
    """How `check` compiles: the whole program or an error, dynamic sizes where the program has them."""

    def compile(program: Program):
        torch._dynamo.reset()
        return torch.compile(program.fn, backend=backend, fullgraph=True, dynamic=program.dynamic)

    return compile


@pytest.mark.parametrize("seed", range(SEEDS))
def test_plait_agrees_with_eager(seed):
    program, compile = generate.program(seed), compiler("plait")
    result = generate.check(program, compile)
    if result.kind == "close":
        warnings.warn(f"seed {seed} is close, not equal: {result.detail}", stacklevel=1)
    if not result.fine:
        program = generate.shrink(program, lambda p: generate.check(p, compile).kind == result.kind, budget=SHRINK_BUDGET)
        pytest.fail(generate.reproduction(program, generate.check(program, compile), "plait"), pytrace=False)


def test_a_seed_gives_one_program():
    assert [generate.program(s).source for s in range(8)] == [generate.program(s).source for s in range(8)]


def test_programs_cover_what_they_promise():
    programs = [generate.program(seed) for seed in range(120)]
    text = "\n".join(p.source for p in programs)
    for word in (
        "float64",
        "bfloat16",
        "float16",
        "int32",
        "bool",
        "special",
        "strided",
        "expanded",
        ".permute",
        "::2",
        "@",
    ):
        assert word in text
    statements = [s for p in programs for s in p.statements]
    assert any(s.mutates for s in statements) and any(len(s.defines) > 1 for s in statements)
    assert any(p.dynamic for p in programs) and any(len(p.sizes) == 3 for p in programs)
    sizes = [t.numel() for p in programs for t in p.make_inputs()]
    assert 0 in sizes and 1 in sizes


def test_the_source_runs_on_its_own(tmp_path):
    path = tmp_path / "generated.py"
    path.write_text(generate.program(2).source)
    done = subprocess.run([sys.executable, path, "eager"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def wrong_tanh(gm, inputs):
    """A backend with a planted bug: tanh is computed as sin."""

    def compile(graph, example):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.tanh.default:
                node.target = torch.ops.aten.sin.default
        graph.recompile()
        return graph

    return aot_autograd(fw_compiler=compile)(gm, inputs)


def test_a_planted_bug_is_found_and_shrunk():
    lines = ["v0 = a + 1", "v1 = v0.reshape(-1)", "v2 = torch.tanh(v1)", "v3 = v2 * 2", "v4 = v0.sum(0)", "v5 = v3 - 1"]
    reads = [("a",), ("v0",), ("v1",), ("v2",), ("v0",), ("v3",)]
    statements = tuple(Statement(t, r, (f"v{i}",)) for i, (t, r) in enumerate(zip(lines, reads, strict=True)))
    given = (Input("a", 'data(1, (3, 4), torch.float32, "normal")'),)
    program = Program(0, given, statements, ("v4", "v5", "v0"), ((("n", 1),),))
    compile = compiler(wrong_tanh)
    assert generate.check(program, compile).kind == "wrong"
    small = generate.shrink(program, lambda p: generate.check(p, compile).kind == "wrong")
    assert [s.text for s in small.statements] == ["v2 = torch.tanh(a)"]
    assert "python -m tests.generate 0 --backend" in generate.reproduction(small, generate.check(small, compile), "planted")


def test_a_refused_statement_leaves_no_trace():
    worlds = Worlds([(("n", 3),)], seed=0)
    worlds.bind(Input("a", 'data(1, (n,), torch.float32, "normal")'))
    before = worlds.value("a").clone()
    assert worlds.accept(Statement("a.add_(torch.ones(7))", ("a",), mutates=("a",)))
    assert torch.equal(worlds.value("a"), before)
    assert worlds.accept(Statement("v0 = a.reshape(5)", ("a",), ("v0",)))
    assert "v0" not in worlds.each[0].actual


def test_discontinuities_that_hang_by_a_rounding_error_are_refused():
    worlds = Worlds([(("n", 5),)], seed=0)
    worlds.bind(Input("a", 'data(1, (n,), torch.float32, "normal")'))
    assert not worlds.accept(Statement("v0 = torch.tanh(a)", ("a",), ("v0",)))
    assert worlds.accept(Statement("v1 = v0 > torch.tanh(a)", ("v0", "a"), ("v1",), numerics="exact")) == (
        "an integer depends on rounding"
    )
    assert not worlds.accept(Statement("v1 = v0 > -2", ("v0",), ("v1",), numerics="exact"))


class TestJudge:
    def test_equal(self):
        x = torch.tensor([1.0, float("nan"), float("inf")])
        assert judge([x, 3, None], [x.clone(), 3, None], lambda: pytest.fail("not needed")).kind == "equal"

    def test_close_when_eager_itself_is_as_far_from_float64(self):
        eager, ours, exact = torch.tensor([1.0]), torch.tensor([1.002]), torch.tensor([1.001], dtype=torch.float64)
        assert judge(ours, eager, lambda: exact).kind == "close"

    def test_wrong_when_eager_is_right(self):
        eager, ours, exact = torch.tensor([1.0]), torch.tensor([1.002]), torch.tensor([1.0], dtype=torch.float64)
        assert judge(ours, eager, lambda: exact).kind == "wrong"

    def test_an_overflow_in_eager_excuses_only_the_true_value(self):
        eager, exact = torch.tensor([float("inf"), 1.0]), torch.tensor([7e4, 1.0], dtype=torch.float64)
        assert judge(torch.tensor([7e4, 1.0]), eager, lambda: exact).kind == "close"
        assert judge(torch.tensor([5.0, 1.0]), eager, lambda: exact).kind == "wrong"

    @pytest.mark.parametrize(
        "ours",
        [
            torch.tensor([1, 3]),
            torch.tensor([1.0, 2.0]),
            torch.tensor([[1, 2]]),
            torch.tensor([1, 2], dtype=torch.int32),
        ],
    )
    def test_integers_dtypes_and_shapes_are_never_close(self, ours):
        assert judge(ours, torch.tensor([1, 2]), lambda: torch.tensor([1, 2])).kind == "wrong"

    def test_a_missing_result_is_wrong(self):
        assert judge([torch.ones(1)], [torch.ones(1), torch.ones(1)], lambda: None).kind == "wrong"

    def test_nan_where_eager_has_none_is_wrong(self):
        ours, eager = torch.tensor([float("nan"), 1.0]), torch.tensor([0.5, 1.0])
        assert judge(ours, eager, lambda: eager.double()).kind == "wrong"
