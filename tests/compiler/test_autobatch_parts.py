"""The optimisations of automatic batching, one by one: what each does, and that answers are the same without it."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import plait
import pytest
import torch
from plait.compiler.autobatch import api
from plait.compiler.autobatch.switches import SWITCHES
from plait.errors import AutocastNotBatched, RegionNotBatched, TensorNotBatched, UnknownSwitch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tests.compiler.batched_models import CASES, DRNN, NestedRNN, TreeLSTM, tree


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def vectors(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(shape or (8,)) for _ in range(count)]


def launches(batched: Any) -> int:
    return batched.report().counts.launches


def check(batched: Any, program: Any, *columns: list[Any]) -> None:
    torch.testing.assert_close(
        batched(*columns), [program(*given) for given in zip(*columns, strict=True)], rtol=1e-5, atol=1e-5
    )


# -- switches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", SWITCHES)
@pytest.mark.parametrize("name", ["TreeLSTM", "StackRNN", "NestedRNN"])
def test_answers_are_the_same_without_any_of_them(left_out: str, name: str) -> None:
    case = CASES[name]
    model = case.make()
    batched = plait.autobatch(model, without=(left_out,), compile_after=None)
    rng = random.Random(4)
    for n in (4, 3, 6):
        check(batched, model, *case.columns(rng, n))


def test_an_unknown_one_is_refused_with_all_names() -> None:
    with pytest.raises(UnknownSwitch, match="no optimisation called 'speed'") as caught:
        plait.autobatch(TreeLSTM(), without=("speed",))
    assert "hoisting" in str(caught.value)


def test_an_agenda_schedules_where_it_gives_fewer_launches() -> None:
    """Steps of inner loops of different length are not at the same depth; an agenda sees that they are of one kind."""
    rng, case, launches = random.Random(5), CASES["NestedRNN"], {}
    columns = [case.columns(rng, 12) for _ in range(5)]
    model = case.make()
    for without in ("", "agenda", "depths"):
        batched = plait.autobatch(model, without=("opt-out", *filter(None, [without])))
        for given in columns:
            check(batched, model, *given)
        launches[without] = batched.report().counts.launches
    assert launches[""] == launches["depths"] < launches["agenda"]


@pytest.mark.parametrize("name", ["TreeLSTM", "MV-RNN", "StackRNN", "DRNN"])
def test_rows_are_read_where_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "ENOUGH", 0)
    monkeypatch.setattr(api, "WORTH", 0.0)
    case = CASES[name]
    model = case.make()
    batched = plait.autobatch(model, without=("opt-out",))
    rng = random.Random(6)
    with torch.no_grad():
        for n in (5, 4, 6, 1, *[5] * 16):
            columns = case.columns(rng, n)
            expected = [model(*given) for given in zip(*columns, strict=True)]
            torch.testing.assert_close(batched(*columns), expected, rtol=1e-5, atol=1e-5)
    assert "rows" in str(batched.report())


# -- forks --------------------------------------------------------------------------------------------------------------


def test_calls_that_wait_grow_side_by_side() -> None:
    model = DRNN()
    forked = plait.autobatch(model, compile_after=None)
    alone = plait.autobatch(model, compile_after=None, without=("forks",))
    for n in (4, 4, 8):
        given = vectors(n)
        check(forked, model, given)
        check(alone, model, given)
    assert forked.report().counts.forks > 0
    assert alone.report().counts.forks == 0
    assert launches(forked) < launches(alone) / 2


def test_an_error_in_a_fork_names_the_instance() -> None:
    def grow(h: Tensor, depth: int) -> Any:
        if float(h.sum()) > 50:
            raise ValueError("too large")
        if depth == 0:
            return h * 2
        return grow(h - 1, depth - 1), grow(h + 1, depth - 1)

    batched = plait.autobatch(grow, compile_after=None)
    for _ in range(2):
        batched(vectors(4, 3), [3] * 4)
    with pytest.raises(ValueError, match="too large") as caught:
        batched([torch.ones(3), torch.ones(3) * 15], [2, 2])
    assert "instance 1" in "".join(caught.value.__notes__)


def test_calls_with_effects_are_not_forked() -> None:
    order: list[int] = []

    def visit(h: Tensor, n: int) -> Tensor:
        order.append(n)
        if n > 6 or float(h.sum()) > 100:
            return h
        return visit(h * 0.5, 2 * n) + visit(h * 0.25, 2 * n + 1)

    batched = plait.autobatch(visit, compile_after=None)
    for _ in range(3):
        order.clear()
        batched([torch.ones(3)], [1])
        assert order == [1, 2, 4, 8, 9, 5, 10, 11, 3, 6, 12, 13, 7]


def test_comprehensions_fork_over_many_children() -> None:
    linear = nn.Linear(4, 4)

    def visit(h: Tensor, depth: int) -> Tensor:
        h = torch.tanh(linear(h))
        if depth == 0 or float(h.sum()) > 1.0:
            return h
        parts = [visit(h + k, depth - 1) for k in range(3)]
        return torch.stack(parts).sum(0)

    batched = plait.autobatch(visit, compile_after=None)
    for _ in range(3):
        check(batched, visit, vectors(5, 4), [2] * 5)
    assert batched.report().counts.forks > 0


# -- ghosts -------------------------------------------------------------------------------------------------------------


def test_what_follows_a_branch_is_one_launch() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)

    def step(h: Tensor, long: bool) -> Tensor:
        if long:
            t = torch.tanh(a(h))
            if t.shape[0] == 0:
                return h
            h = torch.relu(b(t))
        else:
            h = torch.sigmoid(a(h))
        return torch.softmax(b(h), -1)

    def program(h: Tensor, flags: list[bool]) -> Tensor:
        for long in flags:
            if long:
                u = torch.tanh(a(h))
                n = u.shape[0]
                h = torch.relu(b(u)) * n
            else:
                h = torch.sigmoid(a(h))
            h = torch.softmax(b(h), -1)
        return h

    for fn, column in ((step, [True, False, True, False]), (program, [[True, False], [False, True], [True, True], []])):
        batched = plait.autobatch(fn, compile_after=None)
        for _ in range(2):
            check(batched, fn, vectors(4, 4), column)


# -- hoisting -----------------------------------------------------------------------------------------------------------


def test_products_that_do_not_depend_on_the_recursion_run_at_once() -> None:
    cell = nn.RNNCell(8, 8)

    def read(words: list[Tensor]) -> Tensor:
        h = torch.zeros(8)
        for x in words:
            h = cell(x, h)
        return h

    batched = plait.autobatch(read)
    plain = plait.autobatch(read, without=("hoisting",))
    for _ in range(5):
        sentences = [vectors(n) for n in (9, 4, 6)]
        check(batched, read, sentences)
        check(plain, read, sentences)
    sizes = sorted(max(b) for b in batched.report().counts.batches.values())
    assert sizes[-1] == 9 + 4 + 6
    assert max(max(b) for b in plain.report().counts.batches.values()) == 3


def test_gradients_go_through_what_was_hoisted() -> None:
    model = NestedRNN()
    batched = plait.autobatch(model)
    rng = random.Random(0)
    for _ in range(5):
        columns = CASES["NestedRNN"].columns(rng, 4)
        expected = [model(*given) for given in zip(*columns, strict=True)]
        got = batched(*columns)
        grads = [torch.autograd.grad(torch.stack(r).pow(2).sum(), list(model.parameters())) for r in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    lines = [sum(b) for b in batched.report().counts.batches.values()]
    hoisted = len(columns[0])  # the same word at every step: one product for an instance
    assert hoisted in lines and sum(n for s in columns[1] for n in s) > hoisted


# -- native launches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_single_instances_in_native_launches(training: bool) -> None:
    model = TreeLSTM()
    batched = plait.autobatch(model, without=("opt-out",))
    rng = random.Random(7)
    with torch.set_grad_enabled(training):
        for n in (5, 3, 8, 8, 1, 1, 2, 1):
            trees = [tree(rng, rng.randrange(2, 12)) for _ in range(n)]
            expected, got = [model(t) for t in trees], batched(trees)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            if training:
                grads = [torch.autograd.grad(torch.stack(r).pow(2).sum(), list(model.parameters())) for r in (got, expected)]
                torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert all(row.runs == "compiled" for row in batched.report().rows)


def test_parameters_that_change_are_read_anew() -> None:
    linear = nn.Linear(40, 40)

    def program(x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = torch.tanh(linear(x))
        return x

    batched = plait.autobatch(program, without=("opt-out",))
    with torch.no_grad():
        for _ in range(5):
            check(batched, program, vectors(5, 40), [1, 2, 3, 2, 1])
        assert all(row.runs == "compiled" for row in batched.report().rows)
        linear.weight.data.mul_(-2)  # leaves no trace but the numbers
        check(batched, program, vectors(5, 40), [1, 2, 3, 2, 1])
        linear.weight.data = torch.randn(40, 80).t()[:40].contiguous().t()  # another layout
        check(batched, program, vectors(5, 40), [1, 2, 3, 2, 1])
        check(batched, program, vectors(5, 40), [1, 2, 3, 2, 1])


@pytest.mark.parametrize("compile_after", [None, 2])
def test_parameters_written_to_before_the_backward_are_refused(compile_after: int | None) -> None:
    linear = nn.Linear(4, 4)

    def program(x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = torch.tanh(linear(x))
        return x

    batched = plait.autobatch(program, compile_after=compile_after, without=("opt-out",))
    for _ in range(5):
        torch.stack(batched(vectors(3, 4), [1, 2, 2])).sum().backward()
    loss = torch.stack(batched(vectors(3, 4), [1, 2, 2])).sum()
    with torch.no_grad():
        linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_goes_on_with_parameters_of_another_layout() -> None:
    linear = nn.Linear(8, 8)

    def program(x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = torch.tanh(linear(x))
        return x

    batched = plait.autobatch(program, without=("opt-out",))
    for step in range(10):
        if step == 5:
            linear.weight.data = linear.weight.detach().t().contiguous().t()
        given = vectors(4, 8), [1, 3, 2, 2]
        results = batched(*given), [program(x, n) for x, n in zip(*given, strict=True)]
        grads = [torch.autograd.grad(torch.stack(r).pow(2).sum(), [linear.weight, linear.bias]) for r in results]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_results_that_are_nested_too_deeply_raise() -> None:
    def program(x: Tensor) -> Any:
        found: Any = x * 2
        for _ in range(200_000):
            found = (found,)
        return found

    batched = plait.autobatch(program, compile_after=None)
    with pytest.raises(RecursionError):
        batched(vectors(1))


def test_a_row_out_of_range_in_a_native_launch_names_the_line() -> None:
    table = nn.Embedding(5, 4)

    def program(n: Tensor) -> Tensor:
        return torch.tanh(table(n))

    batched = plait.autobatch(program, without=("opt-out",))
    with torch.no_grad():
        for _ in range(6):
            batched([torch.tensor(1), torch.tensor(4), torch.tensor(0)])
        with pytest.raises(IndexError, match=r"test_autobatch_parts\.py"):
            batched([torch.tensor(1), torch.tensor(5), torch.tensor(0)])
        check(batched, program, [torch.tensor(3), torch.tensor(2)])


def test_fused_weights_that_are_read_as_they_are_too() -> None:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)

    def program(x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = torch.sigmoid(a(x)) * torch.tanh(b(x)) + x @ a.weight + (x * 2) @ a.weight.t()
            x = x / (1 + x.abs().sum())
        return x

    for compile_after in (None, 2):
        batched = plait.autobatch(program, compile_after=compile_after, without=("opt-out",))
        for _ in range(5):
            given = vectors(4, 6), [1, 3, 2, 2]
            results = batched(*given), [program(x, n) for x, n in zip(*given, strict=True)]
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
            wanted = [a.weight, a.bias, b.weight, b.bias]
            grads = [torch.autograd.grad(torch.stack(r).pow(2).sum(), wanted) for r in results]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


# -- schedules ----------------------------------------------------------------------------------------------------------


def test_a_structure_that_recurs_keeps_its_schedule() -> None:
    model = TreeLSTM()
    batched = plait.autobatch(model, compile_after=None)
    rng = random.Random(0)
    trees = [tree(rng, 7) for _ in range(5)]
    for _ in range(3):
        batched(trees)
    assert batched.report().counts.reused == 1
    check(batched, model, [tree(rng, 8) for _ in range(5)])
    assert batched.report().counts.reused == 0
    check(batched, model, trees)
    assert batched.report().counts.reused == 1


# -- opting out ---------------------------------------------------------------------------------------------------------


def test_what_is_faster_one_by_one_runs_one_by_one() -> None:
    def nearly_nothing(x: Tensor) -> Tensor:
        return x + 1

    batched = plait.autobatch(nearly_nothing)
    for _ in range(12):
        check(batched, nearly_nothing, vectors(1))
    assert batched.report().counts.alone < 1
    assert "one by one" in str(batched.report())
    check(batched, nearly_nothing, vectors(64))  # another size has figures of its own
    assert not batched.report().counts.alone


def test_programs_with_effects_never_run_twice() -> None:
    calls = []

    def noted(x: Tensor) -> Tensor:
        calls.append(1)
        return x + 1

    batched = plait.autobatch(noted)
    for _ in range(8):
        batched(vectors(3))
    assert len(calls) == 8 * 3


def test_iterators_are_never_read_twice() -> None:
    def first(xs: Any) -> Tensor:
        return torch.stack(list(xs)).sum(0)

    batched = plait.autobatch(first)
    for _ in range(8):
        given = vectors(3)
        torch.testing.assert_close(batched([iter([x]) for x in given]), given)


# -- constants and objects ----------------------------------------------------------------------------------------------


def test_constants_can_be_written_to() -> None:
    def fill(x: Tensor, n: int) -> Tensor:
        out = torch.zeros(4)
        for k in range(n):
            out[k] = x[k] * 2
        return out

    batched = plait.autobatch(fill, compile_after=None)
    for _ in range(3):
        check(batched, fill, vectors(4, 4), [0, 1, 4, 2])


def test_constants_know_their_values() -> None:
    def count(x: Tensor) -> Tensor:
        n = torch.tensor(3)
        for _ in range(int(n)):
            x = x * 2
        return x

    batched = plait.autobatch(count, compile_after=None)
    for _ in range(2):
        check(batched, count, vectors(4))
    assert batched.report().counts.launches == 3


@dataclass(frozen=True)
class Node:
    value: Tensor
    parts: tuple[Node, ...]


def test_objects_in_results_hold_real_tensors_with_gradients() -> None:
    linear = nn.Linear(4, 4)

    def grow(h: Tensor, depth: int) -> Node:
        return Node(linear(h), (grow(h * 2, depth - 1), grow(h - 1, depth - 1)) if depth else ())

    batched = plait.autobatch(grow, compile_after=None)
    for _ in range(2):
        given = vectors(3, 4)
        got, expected = batched(given, [2, 0, 1]), [grow(x, n) for x, n in zip(given, [2, 0, 1], strict=True)]

        def values(n: Node) -> list[Tensor]:
            return [n.value, *(v for p in n.parts for v in values(p))]

        flat = [[v for n in nodes for v in values(n)] for nodes in (got, expected)]
        assert all(type(v) is Tensor for v in flat[0])
        torch.testing.assert_close(*flat)
        grads = [torch.autograd.grad(torch.stack(v).pow(2).sum(), linear.weight) for v in flat]
        torch.testing.assert_close(*grads)


def test_what_the_program_keeps_has_gradients() -> None:
    linear = nn.Linear(4, 4)
    kept: list[Tensor] = []

    def program(x: Tensor) -> Tensor:
        kept.append(linear(x).sum())
        return x * 2

    batched = plait.autobatch(program, compile_after=None)
    given = vectors(2, 4)
    batched(given)
    got = torch.autograd.grad(kept[0] * 2 + kept[1], linear.weight)
    expected = torch.autograd.grad(linear(given[0]).sum() * 2 + linear(given[1]).sum(), linear.weight)
    torch.testing.assert_close(got, expected)


def test_nothing_is_left_of_a_call_without_garbage_collection() -> None:
    model = TreeLSTM()
    batched = plait.autobatch(model, compile_after=None)
    rng = random.Random(0)

    def call() -> int:
        with torch.no_grad():
            batched([tree(rng, 5) for _ in range(4)])
        return sum(type(o) is Tensor for o in gc.get_objects())

    for _ in range(8):
        call()
    gc.collect()
    gc.disable()
    try:
        counts = [call() for _ in range(4)]
    finally:
        gc.enable()
    assert len(set(counts)) == 1


def test_threads_take_turns() -> None:
    model = TreeLSTM()
    batched = plait.autobatch(model, without=("opt-out",))
    trees = [[tree(random.Random(k), 3 + k % 7) for _ in range(1 + k % 4)] for k in range(24)]
    expected = [[model(t) for t in some] for some in trees]

    def work(k: int) -> list[Tensor]:
        results = batched(trees[k])
        torch.stack(results).sum().backward()
        return [r.detach() for r in results]

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, range(24)))
    torch.testing.assert_close(got, [[x.detach() for x in some] for some in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["other memory", "another layout"])
def test_parameters_that_change_before_the_backward(change: str) -> None:
    """As in eager, the backward reads what was there in the forward."""
    model = nn.Linear(6, 6)

    def program(x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = torch.tanh(model(x))
        return x

    def gradient(run: Callable[..., Any]) -> Tensor:
        total = torch.stack(run(xs, [1, 2, 3])).sum()
        model.weight.data = 2 * model.weight.data if change == "other memory" else model.weight.data.t().contiguous().t()
        run(xs, [1, 2, 3])
        (found,) = torch.autograd.grad(total, [model.weight])
        return found

    batched = plait.autobatch(program, without=("opt-out",))
    xs = vectors(3, 6)
    for _ in range(5):
        batched(xs, [1, 2, 3])
    before = model.weight.data
    expected = gradient(lambda *columns: [program(*given) for given in zip(*columns, strict=True)])
    model.weight.data = before
    torch.testing.assert_close(gradient(batched), expected, rtol=1e-4, atol=1e-5)


def test_arrays_that_the_program_keeps_stay_as_they_are() -> None:
    kept: list[Any] = []

    def program(x: Tensor) -> Tensor:
        y = x * 2
        kept.append(y.numpy())
        return y + 1

    batched = plait.autobatch(program, without=("opt-out",))
    with torch.no_grad():
        given = [vectors(3) for _ in range(8)]
        for some in given:
            batched(some)
    assert all((a == (x * 2).numpy()).all() for a, x in zip(kept, (x for some in given for x in some), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.int32, torch.bool])
def test_waiting_for_numbers_of_any_kind(dtype: torch.dtype) -> None:
    def program(x: Tensor, n: int) -> Tensor:
        while bool(x.to(dtype).sum().to(dtype)) and n > 0:
            x, n = x * 0.5, n - 1
            if complex(x.to(dtype).reshape(-1)[0].item()).real > 2:
                break
        return x

    batched = plait.autobatch(program, compile_after=None, without=("opt-out",))
    for _ in range(4):
        check(batched, program, [torch.full((3,), float(k)) for k in range(5)], [3, 1, 0, 2, 4])


# -- what a program may do ------------------------------------------------------------------------------------------------


def alone(program: Callable[..., Any], *columns: list[Any]) -> list[Any]:
    return [program(*given) for given in zip(*columns, strict=True)]


def agree(program: Callable[..., Any], make: Callable[[], tuple[list[Any], ...]], calls: int = 7) -> plait.Batched:
    batched = plait.autobatch(program, without=("opt-out",))
    for _ in range(calls):
        columns = make()
        torch.testing.assert_close(batched(*columns), alone(program, *columns), rtol=1e-5, atol=1e-5)
    return batched


def test_a_batched_program_within_another_one() -> None:
    cell = nn.Linear(8, 8)
    inner = plait.autobatch(lambda x: torch.tanh(cell(x)), without=("opt-out",))

    def program(x: Tensor) -> Tensor:
        h = x * 2
        a, b = inner([h, x])
        return a - b

    agree(program, lambda: (vectors(4),))
    xs = [x.requires_grad_() for x in vectors(4)]
    batched = plait.autobatch(program, without=("opt-out",))
    for _ in range(5):
        got = torch.autograd.grad(torch.stack(batched(xs)).sum(), [cell.weight, *xs])
        expected = torch.autograd.grad(torch.stack(alone(program, xs)).sum(), [cell.weight, *xs])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_state_that_all_instances_see_keeps_its_order() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.h = torch.tanh(self.cell(x))
            if self.h.sum() > 0:
                self.h = self.h * 2
            return self.h

    batched = agree(Keeps(), lambda: (vectors(4),))
    assert "instances wait one after the other: it writes to self.h" in str(batched.report())


def test_gradients_of_complex_numbers() -> None:
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

    def program(x: Tensor) -> Tensor:
        return (weight @ x).abs()

    batched = plait.autobatch(program, without=("opt-out",))
    for _ in range(6):
        xs = [torch.randn(4, dtype=torch.complex64) for _ in range(3)]
        got = torch.autograd.grad(torch.stack(batched(xs)).sum(), [weight])
        expected = torch.autograd.grad(torch.stack(alone(program, xs)).sum(), [weight])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [True, False])
def test_layouts_of_parameters_change_between_calls(transposed: bool) -> None:
    model = nn.Linear(8, 8)
    batched = plait.autobatch(model, without=("opt-out",))
    for turn in range(10):
        if turn in (1, 6):
            fresh = torch.randn(16, 16)
            strided = torch.randn(8, 8).t() if transposed else fresh[::2, ::2]
            model.weight.data = strided if turn == 1 else torch.randn(8, 8)
        xs = vectors(4)
        torch.testing.assert_close(batched(xs), alone(model, xs), rtol=1e-5, atol=1e-5)


def test_autocast_is_refused() -> None:
    model = nn.Linear(8, 8)

    def program(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    with pytest.raises(AutocastNotBatched, match=r"on at .*test_autobatch_parts.py:\d+"):
        plait.autobatch(program)(vectors(2))
    batched = plait.autobatch(model)
    batched(vectors(2))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AutocastNotBatched):
        batched(vectors(2))


def test_gradients_of_what_is_first_met_without_them() -> None:
    model = nn.Linear(8, 8)

    def program(x: Tensor) -> Tensor:
        with torch.no_grad():
            s = x.sum()
        return (model(x) * x).sum() * s

    batched = plait.autobatch(program, without=("opt-out",))
    for _ in range(6):
        xs = [x.requires_grad_() for x in vectors(4)]
        got = torch.autograd.grad(torch.stack(batched(xs)).sum(), xs)
        torch.testing.assert_close(got, torch.autograd.grad(torch.stack(alone(program, xs)).sum(), xs), rtol=1e-4, atol=1e-5)


def test_gradients_that_only_the_program_records() -> None:
    model = nn.Linear(8, 8)

    def program(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(x)

    batched = plait.autobatch(program, without=("opt-out",))
    with torch.no_grad():
        for _ in range(5):
            assert all(y.requires_grad for y in batched(vectors(3)))


def test_choices_between_tensors_and_numbers_of_other_objects() -> None:
    @dataclass
    class Node:
        value: int

        def item(self) -> int:
            return self.value

    def program(x: Tensor, node: Node) -> Any:
        s = x.sum().relu()
        kept = s or x.mean()
        both = s and x.max()
        if not (s > 1 or x.mean() > 0) and s >= 0:
            kept = kept * 2
        return kept, both, node.item(), bool(s > 0)

    agree(program, lambda: (vectors(6), [Node(k) for k in range(6)]))


def test_iterators_that_end_within_functions_that_wait() -> None:
    cell = nn.Linear(8, 8)

    def step(words: Any, h: Tensor) -> Tensor:
        h = torch.tanh(cell(h) + next(words))
        return h * 2 if h.sum() > 1 else h

    def program(xs: list[Tensor]) -> Tensor:
        words, h = iter(xs), torch.zeros(8)
        while True:
            try:
                h = step(words, h)
            except StopIteration:
                return h

    agree(program, lambda: ([vectors(n) for n in (1, 3, 2)],))


def test_numbers_beside_double_precision() -> None:
    def program(x: Tensor, a: float) -> tuple[Tensor, Tensor]:
        return x * a, x > a

    numbers = [0.1 * k + 0.7 for k in range(8)]
    agree(program, lambda: ([torch.full((3,), a, dtype=torch.float64) for a in numbers], numbers))


def test_keys_that_read_numbers() -> None:
    cell = nn.Linear(8, 8)

    def program(x: Tensor, several: list[Tensor]) -> Tensor:
        return max(several, key=lambda t: cell(t).sum().item()) * x

    agree(program, lambda: (vectors(4), [vectors(3) for _ in range(4)]))


def test_inference_mode_and_back() -> None:
    model = nn.Linear(8, 8)
    batched = plait.autobatch(model, without=("opt-out",))
    for _ in range(6):
        with torch.inference_mode():
            xs = vectors(4)
            torch.testing.assert_close(batched(xs), alone(model, xs), rtol=1e-5, atol=1e-5)
        batched(vectors(4))[0].sum().backward()


def test_what_cannot_be_a_row_is_refused() -> None:
    class Special(Tensor):
        pass

    batched = plait.autobatch(lambda x: x * 2)
    with pytest.raises(TensorNotBatched, match="class Special"):
        batched([x.as_subclass(Special) for x in vectors(2)])
    with pytest.raises(TensorNotBatched, match=r"layout torch\.sparse_coo"):
        batched([x.to_sparse() for x in vectors(2)])


def test_calls_with_the_wrong_arguments_fail_as_they_do_alone() -> None:
    def leaf(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    def program(x: Tensor, flag: bool) -> Tensor:
        try:
            pair = (leaf(x), leaf(x, x)) if flag else (leaf(x), leaf(2 * x))  # type: ignore[call-arg]
        except TypeError:
            return x
        return pair[0] + pair[1]

    agree(program, lambda: (vectors(4), [False, True, False, False]))


# -- captured graphs ----------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A loop that ends on a value, and a branch on another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def grows(n: Tensor, h: Tensor) -> Tensor:
            return (h.abs().sum() < 20) & (n < 9)

        def step(n: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return n + 1, h * 1.5 + torch.tanh(self.a(h))

        n, h = torch._higher_order_ops.while_loop(grows, step, (torch.zeros((), dtype=torch.int64), self.a(x)))
        y = torch.cond(h.sum() > 0, lambda t: torch.relu(self.b(t)), lambda t: torch.sigmoid(t) - 1, (h,))
        return y, n


def test_captured_branches_and_loops_run_for_those_that_take_them() -> None:
    model = Branches()
    exported = torch.export.export(model, (torch.randn(6),), strict=True)
    batched = plait.autobatch(exported)
    for _ in range(5):
        given = vectors(12, 6)
        with torch.no_grad():
            check(batched, model, given)
    report = batched.report()
    sizes = [row.mean_batch for row in report.rows]
    assert report.counts.waits > 0
    assert min(sizes) < 12 <= max(sizes)


def test_captured_graphs_train() -> None:
    model = Branches()
    batched = plait.autobatch(torch.export.export(model, (torch.randn(6),), strict=True), compile_after=None)
    given = vectors(5, 6)

    def one(x: Tensor) -> Tensor:
        h, n = model.a(x), 0
        while float(h.abs().sum()) < 20 and n < 9:
            n, h = n + 1, h * 1.5 + torch.tanh(model.a(h))
        return torch.relu(model.b(h)) if float(h.sum()) > 0 else torch.sigmoid(h) - 1

    parameters = [*batched.program.parameters()]
    got = torch.autograd.grad(torch.stack([y for y, _ in batched(given)]).sum(), parameters)
    expected = torch.autograd.grad(torch.stack([one(x) for x in given]).sum(), list(model.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_captured_graphs_notice_what_is_to_be_trained() -> None:
    model = Branches()
    batched = plait.autobatch(torch.export.export(model, (torch.randn(6),), strict=True), without=("opt-out",))
    parameters = list(batched.program.parameters())
    for p in parameters:
        p.requires_grad_(False)
    for _ in range(5):
        assert not any(y.requires_grad for y, _ in batched(vectors(3, 6)))
    for p in parameters:
        p.requires_grad_(True)
    for _ in range(5):
        total = torch.stack([y for y, _ in batched(vectors(3, 6))]).sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        assert any(g is not None and bool(g.abs().sum() > 0) for g in found)


def test_captured_scans() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, xs: Tensor) -> tuple[Tensor, Tensor]:
            def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
                h = torch.tanh(self.cell(h) + x)
                return h, h * 2

            return torch._higher_order_ops.scan(step, torch.zeros(4), xs, dim=0)

    model = Scan()
    exported = torch.export.export(model, (torch.randn(5, 4),))
    batched = plait.autobatch(exported)
    for _ in range(5):
        given = vectors(6, 5, 4)
        with torch.no_grad():
            check(batched, model, given)
    assert launches(batched) < 6 * 5


def test_regions_of_other_kinds_are_refused_by_name() -> None:
    class Mapped(nn.Module):
        def forward(self, xs: Tensor) -> Tensor:
            return torch._higher_order_ops.map(lambda x: x.sin(), xs)

    graph = torch.export.export(Mapped(), (torch.randn(3, 2),)).module(check_guards=False)
    if not any("map" in str(n.target) for n in graph.graph.nodes):
        pytest.skip("this torch captures map as another region")
    with pytest.raises(RegionNotBatched, match="map"):
        plait.autobatch(graph)


def test_verify_by_its_name() -> None:
    batched = plait.autobatch(lambda x: F.softmax(x, -1), verify="unbatched")
    for _ in range(2):
        assert len(tree_leaves(batched(vectors(3)))) == 3
