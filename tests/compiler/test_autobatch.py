"""Programs written for one instance, run as batches: the same answers and gradients as one by one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait import errors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tests.compiler import control_flow
from tests.compiler.batched_models import CASES, TreeLSTM, tree


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def total(results: Any) -> Tensor:
    """A number that depends on every tensor of some results."""
    leaves = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
    return sum(((x * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum() for x in leaves), torch.tensor(0.0))


def gradients(results: Any, model: nn.Module) -> tuple[Tensor, ...]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(total(results), wanted, allow_unused=True, materialize_grads=True)


def equal(batched: Any, program: Any, *columns: list[Any]) -> Any:
    """Check a batched call against the instances one by one, forward and gradients; its results."""
    expected = [program(*given) for given in zip(*columns, strict=True)]
    got = batched(*columns)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if isinstance(program, nn.Module) and total(expected).requires_grad:
        torch.testing.assert_close(gradients(got, program), gradients(expected, program), rtol=1e-4, atol=1e-5)
    return got


@pytest.mark.parametrize("name", CASES)
def test_the_seven_models(name: str) -> None:
    case = CASES[name]
    model = case.make()
    batched = plait.autobatch(model, compile_after=None)
    rng = random.Random(1)
    for n in (5, 3, 1, 8):
        equal(batched, model, *case.columns(rng, n))
    assert batched.report().apart == ()


@pytest.mark.parametrize(
    "name", [n if n in ("TreeLSTM", "StackRNN") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_the_seven_models_compiled(name: str) -> None:
    case = CASES[name]
    model = case.make()
    batched = plait.autobatch(model)
    rng = random.Random(2)
    for n in (5, 3, 1, 8, 8, 8):
        equal(batched, model, *case.columns(rng, n))
    assert all(row.runs == "compiled" for row in batched.report().rows if row.launches > 1)


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(s, marks=pytest.mark.slow) for s in range(30, 300))])
def test_generated_programs(seed: int, tmp_path: Path) -> None:
    model = control_flow.load(seed, tmp_path)
    batched = plait.autobatch(model, compile_after=None)
    rng = random.Random(seed)
    for n in (4, 6, 2):
        instances = [control_flow.node(rng, rng.randrange(3)) for _ in range(n)]
        expected = [model(x) for x in instances]
        got = batched(instances)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        if total(expected).requires_grad:
            torch.testing.assert_close(gradients(got, model), gradients(expected, model), rtol=1e-3, atol=1e-4)


# -- how much is batched ------------------------------------------------------------------------------------------------


def height(t: Any) -> int:
    return 0 if t.left is None else 1 + max(height(t.left), height(t.right))


def test_a_tree_model_is_three_blocks_and_one_launch_a_level() -> None:
    model = TreeLSTM()
    batched = plait.autobatch(model, compile_after=None)
    rng = random.Random(3)
    batched([tree(rng, 9) for _ in range(4)])
    trees = [tree(rng, rng.randrange(2, 20)) for _ in range(16)]
    batched(trees)
    counts = batched.report().counts
    leaves = sum(1 for t in trees for _ in _leaves(t))
    assert len(counts.batches) == 3
    assert counts.lines == leaves + (leaves - len(trees)) + len(trees)
    internal = next(sizes for block, sizes in counts.batches.items() if sum(sizes) == leaves - len(trees))
    assert len(internal) == max(map(height, trees))


def _leaves(t: Any) -> Any:
    yield from [t] if t.left is None else [*_leaves(t.left), *_leaves(t.right)]


def test_instances_that_wait_go_on_together() -> None:
    """All ask for a value at each step: one flush a step serves all."""

    def program(x: Tensor) -> tuple[Tensor, int]:
        steps = 0
        while x.abs().max() > 0.1:
            x = torch.tanh(x) * 0.5
            steps += 1
        return x, steps

    batched = plait.autobatch(program, compile_after=None)
    xs = [torch.full((4,), 0.05 * 2.0**k) for k in range(6)]
    equal(batched, program, xs)
    got = equal(batched, program, xs)
    most = max(steps for _, steps in got)
    assert batched.report().counts.launches <= 2 * most + 2


# -- what programs may do -----------------------------------------------------------------------------------------------


def test_functions_closures_and_methods() -> None:
    weight = torch.randn(4, 4)

    class Helper:
        def __init__(self) -> None:
            self.gain = 0.5

        def step(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ weight) * self.gain

    helper = Helper()

    def program(x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = helper.step(x)
        return x

    batched = plait.autobatch(program, compile_after=None)
    xs = [torch.randn(4) for _ in range(5)]
    for _ in range(2):
        equal(batched, program, xs, [1, 3, 0, 2, 3])
    helper.gain = 0.25  # seen by the next call
    equal(batched, program, xs, [1, 3, 0, 2, 3])


def test_numbers_that_differ_between_instances() -> None:
    def program(x: Tensor, n: int, scale: float) -> Tensor:
        return x[n] * scale + x.sum() / n

    batched = plait.autobatch(program, compile_after=None)
    xs = [torch.randn(9) for _ in range(8)]
    for _ in range(3):
        equal(batched, program, xs, list(range(1, 9)), [0.5 * k for k in range(8)])
    assert batched.report().counts.launches <= 4


def test_numbers_that_decide_shapes() -> None:
    def program(x: Tensor, n: int) -> Tensor:
        return torch.tanh(x).view(n, -1).sum(0)

    batched = plait.autobatch(program, compile_after=None)
    for _ in range(3):
        equal(batched, program, [torch.randn(12) for _ in range(6)], [1, 2, 3, 4, 6, 12])


def test_tensors_of_instances_get_gradients() -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x) * y.sum() if float(y[0].detach()) > 0 else x.cumsum(0)

    batched = plait.autobatch(program, compile_after=None)
    for _ in range(2):
        xs = [torch.randn(3, requires_grad=True) for _ in range(4)]
        ys = [torch.randn(2, requires_grad=True) for _ in range(4)]
        expected = [program(x, y) for x, y in zip(xs, ys, strict=True)]
        wanted = torch.autograd.grad(total(expected), [*xs, *ys], allow_unused=True, materialize_grads=True)
        found = torch.autograd.grad(total(batched(xs, ys)), [*xs, *ys], allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, wanted)


def test_parts_without_gradients() -> None:
    model = nn.Linear(4, 4)

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = torch.tanh(self.model(x))
            return self.model(x) * x.detach()

    program = Program()
    batched = plait.autobatch(program, compile_after=None)
    for _ in range(2):
        equal(batched, program, [torch.randn(4) for _ in range(3)])


def test_writing_to_own_values() -> None:
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, n: int) -> Tensor:
            h = self.linear(x)
            for i in range(n):
                h += x * i
                h[i] = 0.5
            h.mul_(2)
            return h

    program = Program()
    batched = plait.autobatch(program, compile_after=None)
    for _ in range(2):
        equal(batched, program, [torch.randn(4) for _ in range(3)], [0, 2, 3])


def test_lists_stacks_and_results_of_any_structure() -> None:
    def program(xs: list[Tensor]) -> dict[str, Any]:
        stack: list[Tensor] = []
        for x in xs:
            stack.append(torch.sigmoid(x))
            if len(stack) > 2:
                a, b = stack.pop(), stack.pop()
                stack.append(a * b)
        return {"top": stack[-1], "all": stack, "n": len(xs), "none": None, "shape": xs[0].shape}

    batched = plait.autobatch(program, compile_after=None)
    for _ in range(2):
        equal(batched, program, [[torch.randn(3) for _ in range(n)] for n in (1, 4, 2, 6)])


def test_values_that_outlive_the_call() -> None:
    kept: list[Tensor] = []

    def program(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        kept.append(h)
        return h * 2

    batched = plait.autobatch(program, compile_after=None)
    xs = [torch.randn(3) for _ in range(2)]
    batched(xs)
    for h, x in zip(kept, xs, strict=True):
        torch.testing.assert_close(h + 1, torch.tanh(x) + 1)
        assert float(h.sum()) == pytest.approx(float(torch.tanh(x).sum()))


def test_no_instances() -> None:
    assert plait.autobatch(torch.tanh)([]) == []


def test_modules_of_torch() -> None:
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)
            self.lstm = nn.LSTMCell(8, 8)
            self.conv = nn.Conv1d(5, 3, 3)

        def forward(self, x: Tensor, n: int) -> Tensor:
            x, _ = self.attention(x[None], x[None], x[None], need_weights=False)
            h = c = torch.zeros(8)
            for row in self.norm(x[0])[:n]:
                h, c = self.lstm(row, (h, c))
            return h + F.relu(self.conv(x[0])).mean()

    program = Program()
    batched = plait.autobatch(program, compile_after=None)
    for _ in range(2):
        equal(batched, program, [torch.randn(5, 8) for _ in range(4)], [1, 5, 3, 2])


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_writing_to_what_others_see() -> None:
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += x
            return self.seen * 2

    with pytest.raises(errors.SharedWrite, match="a shared tensor") as caught:
        plait.autobatch(Program())([torch.ones(3)])
    assert "test_autobatch.py" in str(caught.value)

    def writes(x: Tensor) -> Tensor:
        x.add_(1)
        return x

    with pytest.raises(errors.SharedWrite, match="the instance was given"):
        plait.autobatch(writes)([torch.ones(3)])


def test_writing_through_a_view() -> None:
    def program(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        h[:2].mul_(0)
        return h

    with pytest.raises(errors.WriteThroughView, match=r"test_autobatch\.py"):
        plait.autobatch(program)([torch.ones(3)])


def test_shapes_that_depend_on_data() -> None:
    def program(x: Tensor) -> Tensor:
        return torch.tanh(x).nonzero()

    with pytest.raises(errors.DataDependentShape, match=r"nonzero(.|\n)*test_autobatch\.py"):
        plait.autobatch(program)([torch.ones(3)])


def test_what_an_instance_raises_names_it() -> None:
    def program(x: Tensor, names: dict[str, int]) -> Tensor:
        return torch.tanh(x) * names["scale"]

    with pytest.raises(KeyError, match="scale") as caught:
        plait.autobatch(program)([torch.ones(2)] * 3, [{"scale": 1}, {"scale": 2}, {}])
    assert any("instance 2" in note for note in caught.value.__notes__)


def test_one_of_many_fibers_raises() -> None:
    def program(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x * 2
            if x.sum() > 5:
                raise ValueError("too large")
        return x

    batched = plait.autobatch(program, compile_after=None)
    fine = [torch.full((2,), 0.1 * k) for k in range(3)]
    for _ in range(2):
        equal(batched, program, fine)
    with pytest.raises(ValueError, match="too large") as caught:
        batched([*fine, torch.ones(2), *fine])
    assert any("instance 3" in note for note in caught.value.__notes__)
    equal(batched, program, fine)


# -- what may change between calls --------------------------------------------------------------------------------------

GAIN = 2.0


def scaled(x: Tensor) -> Tensor:
    return torch.tanh(x) * GAIN


def test_data_that_changes_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Globals, attributes of objects and of modules, modules put in place of others, the mode of training."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = 1.0
            self.drop = nn.Dropout(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) + self.shift

    class Holder:
        factor = 3.0

        def apply(self, x: Tensor) -> Tensor:
            return x * self.factor

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.linear = nn.Linear(3, 3)
            self.holder = Holder()

        def forward(self, x: Tensor, n: int) -> Tensor:
            for _ in range(n):
                x = self.inner(self.holder.apply(scaled(self.linear(x)))) * GAIN
            return x

    program = Program().eval()
    batched = plait.autobatch(program)
    xs, ns = [torch.randn(3) for _ in range(4)], [1, 2, 1, 3]

    def thrice() -> None:
        for _ in range(3):
            equal(batched, program, xs, ns)

    thrice()
    monkeypatch.setitem(globals(), "GAIN", 0.5)
    thrice()
    program.holder.factor = 0.25
    thrice()
    program.inner.shift = -1.0
    thrice()
    program.linear = nn.Linear(3, 3)
    thrice()
    program.train()
    thrice()
    program.linear.weight.requires_grad_(False)
    xs_given = batched(xs, ns)
    assert program.linear.weight.grad is None and xs_given[0].requires_grad
    program.double()
    xs = [x.double() for x in xs]
    thrice()


def test_some_instances_are_checked_alone() -> None:
    calls = 0

    def program(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(x) + calls  # no function of its arguments

    with pytest.raises(errors.BatchDiffers, match="instance 0"):
        plait.autobatch(program, verify=2)([torch.ones(2)] * 3)
    steady = plait.autobatch(torch.tanh, verify=2)
    assert len(steady([torch.ones(2)] * 3)) == 3


def test_recording_without_a_compiler(tmp_path: Path) -> None:
    """The same in Python, in a process of its own, and a word about it."""
    script = tmp_path / "program.py"
    script.write_text(
        "import plait, torch\n"
        "def program(x, n):\n"
        "    for _ in range(n):\n"
        "        x = torch.tanh(x) * 2\n"
        "    return x\n"
        "batched = plait.autobatch(program, compile_after=None)\n"
        "xs = [torch.full((2,), float(k)) for k in range(3)]\n"
        "for _ in range(3):\n"
        "    torch.testing.assert_close(batched(xs, [1, 3, 2]), [program(x, n) for x, n in zip(xs, [1, 3, 2])])\n"
    )
    env = {**os.environ, "CXX": "/nowhere/g++", "PLAIT_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "autobatch records in Python" in run.stderr


def test_numbers_share_launches_once_they_are_tensors() -> None:
    """The first few numbers have blocks of their own; later, theirs is the block of all."""

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 4)
            self.out = nn.Linear(4, 3)

        def forward(self, word: int, label: int) -> Tensor:
            x = torch.tanh(self.table(torch.tensor(word)))
            return F.cross_entropy(self.out(x), torch.tensor(label))

    program = Program()
    batched = plait.autobatch(program)
    words, labels = [k % 20 for k in range(30)], [k % 3 for k in range(30)]
    for _ in range(4):
        equal(batched, program, words, labels)
    report = batched.report()
    assert report.counts.launches == 1
    assert [row.runs for row in report.rows] == ["compiled"]


def test_waiting_where_no_gradients_are_recorded() -> None:
    """Instances that begin meanwhile record theirs."""

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                large = bool(self.linear(x).sum() > 0)
            return self.linear(x) * (2 if large else 3)

    program = Program()
    batched = plait.autobatch(program, compile_after=None)
    for _ in range(3):
        equal(batched, program, [torch.randn(3) for _ in range(5)])


def test_modules_that_a_function_closes_over_change_mode() -> None:
    drop, linear = nn.Dropout(1.0).eval(), nn.Linear(3, 3)

    def program(x: Tensor) -> Tensor:
        return drop(torch.tanh(linear(x))) + 1

    batched = plait.autobatch(program)
    xs = [torch.randn(3) for _ in range(4)]
    for mode in (False, True, False):
        drop.train(mode)
        for _ in range(4):
            equal(batched, program, xs)
