"""Writes to inputs: by the kernel that computes them where nobody needs the old value any more, and right in all cases."""

import random
from collections.abc import Callable
from typing import Any

import plait
import pytest
import torch
from plait.errors import SharedMemory
from plait.runtime.plan import Launch, Plan

SEED = random.SystemRandom().randrange(1 << 30)


def compiled_with_plan(fn: Callable[..., Any], given: list[torch.Tensor], **how: Any) -> tuple[Callable[..., Any], Plan]:
    """`fn` compiled, called once on copies of what is given, and its plan."""
    with plait.observe() as seen, torch.no_grad():
        compiled = torch.compile(fn, backend="plait", **how)
        compiled(*[x.clone() for x in given])
    (record,) = seen.graphs
    assert record.compiled is not None and not record.coverage.fallback
    return compiled, record.compiled.plan


def agree(fn: Callable[..., Any], *given: torch.Tensor, **how: Any) -> Plan:
    """Compare results and written arguments with eager; the plan."""
    torch._dynamo.reset()
    compiled, plan = compiled_with_plan(fn, list(given), **how)
    ours, theirs = [[x.clone() for x in given] for _ in range(2)]
    with torch.no_grad():
        got, expected = compiled(*ours), fn(*theirs)
    torch.testing.assert_close((got, ours), (expected, theirs), rtol=1e-6, atol=1e-6, equal_nan=True, msg=f"seed {SEED}")
    return plan


def launches(plan: Plan) -> int:
    return sum(isinstance(s, Launch) for s in plan.steps)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def test_an_update_is_one_kernel_and_needs_no_memory() -> None:
    def step(p: torch.Tensor, m: torch.Tensor, grad: torch.Tensor) -> None:
        m.mul_(0.9).add_(grad)
        p.sub_(0.1 * m)

    for shape in ((37, 50), (1,), (0, 3)):
        plan = agree(step, drawn(*shape), drawn(*shape) * 2, drawn(*shape) * 3)
        assert launches(plan) <= 1 and plan.arena == 0
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    agree(step, special, special.flip(0), special)
    turned = drawn(6, 9).t()
    assert launches(agree(step, turned, turned * 2, turned * 3)) == 1
    strided = torch.empty(4, 16)[:, ::2].copy_(drawn(4, 8))  # clones are dense, so that both layouts are met
    agree(step, strided, strided * 2, strided * 3)
    assert launches(agree(step, drawn(37, 50), drawn(37, 50), drawn(37, 50), dynamic=True)) == 1


def test_statistics_are_updated_where_they_are_computed() -> None:
    def update(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        now = x.mean(0)
        mean.mul_(0.9).add_(now, alpha=0.1)
        return x - now

    agree(update, drawn(40, 30), drawn(30))


def both(x: torch.Tensor) -> torch.Tensor:
    new = x * 2 + 1
    result = new.sum(0, keepdim=True) * x  # a later kernel needs the new value and the old one
    x.copy_(new)
    return result


def transposed(x: torch.Tensor) -> None:
    x.copy_(x.t() * 2 + x)


def shifted(x: torch.Tensor) -> None:
    x[:-1].copy_(x[:-1] + x[1:])


def first_row(x: torch.Tensor) -> None:
    x.copy_(x + x[0])


def softmax(x: torch.Tensor) -> None:
    x.copy_(x.softmax(-1))


def minus_total(x: torch.Tensor) -> None:
    x.sub_(x.sum())


def flipped(x: torch.Tensor) -> None:
    x.copy_(x.flip(0) + x)


def gathered(x: torch.Tensor) -> None:
    x.copy_(x[torch.arange(x.shape[0] - 1, -1, -1)] * 2)


def product(x: torch.Tensor) -> None:
    x.copy_(x @ x + x)


def returned(x: torch.Tensor) -> torch.Tensor:
    y = x * 3
    x.copy_(y)
    return y


def view_returned(x: torch.Tensor) -> torch.Tensor:
    y = x * 3
    x.copy_(y)
    return y.view(-1)[3:]


def read_later_as_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x.cos()
    late = x.view(-1).cumsum(0)
    x.copy_(y)
    return late + y.view(-1)


def scanned(x: torch.Tensor) -> None:
    x.copy_(x.cumsum(0))


@pytest.mark.parametrize(
    "fn",
    [both, transposed, shifted, first_row, softmax, minus_total, flipped, gathered, product, returned, view_returned,
     read_later_as_a_view, scanned],
    ids=lambda fn: fn.__name__,
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 5, 64])
def test_old_values_are_read_before_they_are_overwritten(fn: Callable[..., Any], size: int) -> None:
    agree(fn, drawn(size, size) / size)
    if size > 1:
        agree(fn, drawn(size, size) / size, dynamic=True)


def test_a_returned_value_has_memory_of_its_own() -> None:
    x = drawn(5, 5)
    y = torch.compile(returned, backend="plait")(x)
    x.zero_()
    assert y.count_nonzero()


def test_inputs_that_become_each_other() -> None:
    def cross(a: torch.Tensor, b: torch.Tensor) -> None:
        old = a * 2
        a.copy_(b * 3)
        b.copy_(old)

    def same(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
        new = a * b + c
        a.copy_(new)
        b.copy_(new)
        c.copy_(a + b)

    agree(cross, drawn(33, 7), drawn(33, 7) + 1)
    agree(same, drawn(33, 7), drawn(33, 7) + 1, drawn(33, 7) + 2)


def test_inputs_that_share_memory() -> None:
    def move(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.copy_(a + b)
        return b * 2

    torch._dynamo.reset()
    compiled = torch.compile(move, backend="plait")
    base, expected = drawn(6, 8), drawn(6, 8)
    torch.testing.assert_close(compiled(base[:4], base[2:]), move(expected[:4], expected[2:]))
    torch.testing.assert_close(base, expected)
    alone = plait.compile(move, (drawn(4, 8), drawn(4, 8)))
    with pytest.raises(SharedMemory):
        alone(base[:4], base[2:])


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda ps, **how: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01, **how),
    "adam": lambda ps, **how: torch.optim.Adam(ps, lr=0.01, **how),
    "adamw": lambda ps, **how: torch.optim.AdamW(ps, lr=0.01, amsgrad=True, **how),
}


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "single"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_step_in_place(name: str, foreach: bool) -> None:
    shapes = ((17, 30), (30,), (1,), (8, 4, 3))
    eager, ours, wide = [
        [torch.nn.Parameter(drawn(*s).to(d)) for s in shapes] for d in (torch.float32,) * 2 + (torch.float64,)
    ]
    optimisers = [OPTIMISERS[name](ps, foreach=foreach) for ps in (eager, ours, wide)]
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(SEED + 1)
    with plait.observe() as seen:
        steps = [o.step for o in optimisers]
        steps[1] = torch.compile(lambda: optimisers[1].step(), backend="plait")
        for _ in range(4):
            for a, b, c in zip(eager, ours, wide, strict=True):
                grad = torch.randn(a.shape, generator=g)
                a.grad, b.grad, c.grad = grad, grad.clone(), grad.double()
            for step in steps:
                step()
    assert not sum(r.coverage.fallback for r in seen.graphs)
    plan = seen.graphs[-1].compiled.plan  # type: ignore[union-attr]
    assert launches(plan) <= 3 * len(shapes)  # parameters, counters of steps, and what is computed from these
    for a, b, c in zip(eager, ours, wide, strict=True):
        error, scale = (b.double() - c).abs().max(), (a.double() - c).abs().max()
        assert error <= 2 * scale + 1e-6, f"seed {SEED}"
