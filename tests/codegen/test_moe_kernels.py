"""Kernels between tokens and buffers of experts: the bits of the ops' references, on any loads, layouts and dtypes.

Loads are uneven on purpose: experts that nobody chose, full buffers, dropped pairs. Each test prints its seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from plait.codegen.compile import CompiledGraph, compile_graph
from plait.codegen.moe import CHOICES
from plait.ir import parse_graph
from plait.runtime import moe
from torch import Tensor

assert moe is not None  # importing registers the ops
ops = torch.ops.plait
NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
SEEDS = range(4)


@dataclass(frozen=True)
class Sizes:
    tokens: int
    k: int
    experts: int
    capacity: int
    h: int


PLAIN = Sizes(40, 2, 4, 15, 33)
ALL = [PLAIN, Sizes(100, 1, 3, 20, 64), Sizes(9, 3, 8, 9, 1), Sizes(600, 2, 4, 350, 200), Sizes(30, 4, 4, 2, 7)]
NO_ROWS = pytest.mark.unchecked_graphs("ids of rows in buffers without any")
EMPTY = [
    *(replace(PLAIN, tokens=0), replace(PLAIN, h=0), Sizes(5, 0, 2, 3, 4), replace(PLAIN, tokens=0, experts=0)),
    pytest.param(replace(PLAIN, capacity=0), marks=NO_ROWS),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """For the largest sizes; a kernel runs small ones in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


COMPILED: dict[str, CompiledGraph] = {}


def text_of(x: Tensor) -> str:
    layout = "" if x.is_contiguous() else f"{{{','.join(map(str, x.stride()))}}}"
    return f'"{NAMES.get(x.dtype, "i64")}[{",".join(map(str, x.shape))}]{layout}"'


def compiled(name: str, args: tuple[Any, ...]) -> tuple[CompiledGraph, list[Tensor]]:
    """A graph of one op on these operands, and the tensors among them."""
    tensors: list[Tensor] = []

    def written(arg: Any) -> str:
        if isinstance(arg, list):
            return f"({', '.join(map(written, arg))},)"
        if not isinstance(arg, Tensor):
            return str(arg)
        tensors.append(arg)
        return f"x{len(tensors) - 1}"

    call = f"plait.{name}.default({', '.join(map(written, args))})"
    results = "a, b, c" if name == "moe_slots" else "a"
    head = ", ".join(f"x{i}: {text_of(x)}" for i, x in enumerate(tensors))
    text = f"def f({head}):\n    {results} = {call}\n    return ({results},)\n"
    if text not in COMPILED:
        COMPILED[text] = compile_graph(parse_graph(text))
    return COMPILED[text], tensors


def check(name: str, *args: Any, kernels: int = 1) -> None:
    """The op must have become a kernel, which gives what the reference gives."""
    made, tensors = compiled(name, args)
    assert not made.coverage.reported and made.coverage.launches == kernels, made.coverage
    wanted = getattr(ops, name)(*args)
    for got, want in zip(made.executable(*tensors), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert got.dtype is want.dtype and got.shape == want.shape
        same = bits(got) == bits(want)
        assert bool(same.all()), f"{int((~same).sum())} of {want.numel()} differ"


def bits(x: Tensor) -> Tensor:
    """What lies in memory, as integers: zeros have signs."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def numbers(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randint(0, 2**31))).to(dtype)


def chosen(s: Sizes, rng: random.Random) -> Tensor:
    """Different experts for each token, the first ones far more often than the last, which nobody chooses; some choices are
    missing."""
    popular = [2.0 ** -(2 * e) for e in range(max(s.experts - 1, s.k))]
    rows = []
    for _ in range(s.tokens):
        ids: list[int] = []
        while len(ids) < s.k:
            e = rng.choices(range(len(popular)), popular)[0]
            ids += [e] if e not in ids else []
        rows.append([-1 if rng.random() < 0.05 else e for e in ids])
    return torch.tensor(rows, dtype=torch.int64).view(s.tokens, s.k)


def routed(s: Sizes, seed: int) -> tuple[random.Random, Tensor, Tensor]:
    """(choice, slot) of all tokens; experts have used some of their rows before."""
    rng = random.Random(seed)
    print("seed", seed)
    choice = chosen(s, rng)
    used = torch.tensor([rng.choice([0, 0, rng.randint(0, s.capacity)]) for _ in range(s.experts)], dtype=torch.int64)
    return rng, choice, ops.moe_slots(choice, used, s.capacity)[0]


# -- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("s", [*ALL, *EMPTY], ids=str)
def test_places(s: Sizes, seed: int) -> None:
    rng = random.Random(seed)
    print("seed", seed)
    choice = chosen(s, rng)
    for _ in range(3):
        used = torch.tensor([rng.randint(0, s.capacity + 1) for _ in range(s.experts)], dtype=torch.int64)
        check("moe_slots", choice, used, s.capacity)
    order = torch.tensor(rng.sample(range(s.tokens), s.tokens), dtype=torch.int64)
    for by, turn in itertools.product((False, True), (None, order)):
        check("moe_keep", choice, turn, s.experts, s.capacity, by)


@pytest.mark.parametrize("weight", [None, *NAMES], ids=["plain", *NAMES.values()])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("s", [*ALL, *EMPTY], ids=str)
def test_rows_between_tokens_and_buffers(s: Sizes, dtype: torch.dtype, weight: torch.dtype | None) -> None:
    rng, choice, slot = routed(s, s.h)
    gate = None if weight is None else numbers(rng, s.tokens, s.k, dtype=weight)
    check("moe_encode", numbers(rng, s.tokens, s.h, dtype=dtype), choice, slot, gate, s.experts, s.capacity)
    check("moe_decode", numbers(rng, s.experts, s.capacity, s.h, dtype=dtype), choice, slot, gate)


@pytest.mark.parametrize(("dtype", "grad"), list(itertools.product(NAMES, NAMES)), ids=str)
@pytest.mark.parametrize("s", [*ALL, *EMPTY], ids=str)
def test_gradients_of_weights(s: Sizes, dtype: torch.dtype, grad: torch.dtype) -> None:
    rng, choice, slot = routed(s, s.h)
    buf = numbers(rng, s.experts, s.capacity, s.h, dtype=dtype)
    check("moe_decode_weight", buf, choice, slot, numbers(rng, s.tokens, s.h, dtype=grad))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_joins(dtype: torch.dtype, parts: int, seed: int) -> None:
    rng = random.Random(seed)
    print("seed", seed)
    for groups, capacity, h in ((4, 30, 20), (3, 700, 130), (1, 1, 1), (0, 4, 4), (4, 0, 4), (4, 4, 0)):
        bounds = torch.tensor(
            [sorted(rng.randint(0, capacity) for _ in range(2 * parts)) for _ in range(groups)], dtype=torch.int64
        ).view(groups, parts, 2)  # with gaps
        ranges = [bounds[:, i] for i in rng.sample(range(parts), parts)]  # tables that are no rows of their own
        check("moe_join", [numbers(rng, groups, capacity, h, dtype=dtype) for _ in ranges], ranges)


def test_what_is_not_a_number_stays_in_rows_that_are_used() -> None:
    _, choice, slot = routed(PLAIN, 3)
    assert (slot < 0).any()
    x = torch.full((PLAIN.tokens, PLAIN.h), torch.inf)
    weight = torch.where(slot < 0, torch.nan, 1.0)
    buf = ops.moe_encode(x, choice, slot, weight, PLAIN.experts, PLAIN.capacity)
    check("moe_encode", x, choice, slot, weight, PLAIN.experts, PLAIN.capacity)
    check("moe_decode", buf, choice, slot, weight)
    check("moe_decode_weight", buf, choice, slot, x)
    assert not ops.moe_decode(buf, choice, slot, weight).isnan().any()
    assert ops.moe_decode_weight(buf, choice, slot, x)[slot < 0].eq(0).all()


# -- layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_operands_may_lie_in_memory_anyhow(seed: int) -> None:
    s = PLAIN
    rng, choice, slot = routed(s, seed)

    def strided(x: Tensor) -> Tensor:
        order = rng.sample(range(x.dim()), x.dim())
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])

    for _ in range(3):
        c, at, w = strided(choice), strided(slot), strided(numbers(rng, s.tokens, s.k))
        x = strided(numbers(rng, s.tokens, s.h))
        buf = strided(numbers(rng, s.experts, s.capacity, s.h))
        copies = [int(v.stride(-1) != 1) for v in (x, buf)]
        check("moe_slots", c, torch.zeros(1, dtype=torch.int64).expand(s.experts), s.capacity)
        check("moe_encode", x, c, at, w, s.experts, s.capacity, kernels=1 + copies[0])
        check("moe_decode", buf, c, at, w, kernels=1 + copies[1])
        rows = strided(torch.tensor([[0, 3], [3, 9], [0, s.capacity], [5, 5]]))
        check("moe_join", [buf], [rows], kernels=1 + copies[1])


def test_gradients_that_are_one_number() -> None:
    _, choice, slot = routed(PLAIN, 1)
    buf = torch.ones(PLAIN.experts, PLAIN.capacity, PLAIN.h)
    check("moe_decode_weight", buf, choice, slot, torch.full((1, 1), 2.0).expand(PLAIN.tokens, PLAIN.h), kernels=2)


def test_pieces_are_read_where_they_lie() -> None:
    s = PLAIN
    rng, choice, slot = routed(s, 2)
    x = numbers(rng, s.tokens, s.h)
    made = compile_graph(parse_graph(
        f"def f(x: {text_of(x)}, c: {text_of(choice)}, p: {text_of(slot)}):\n"
        "    xs = aten.slice.Tensor(x, 0, 10, 30)\n    cs = aten.slice.Tensor(c, 0, 10, 30)\n"
        "    ps = aten.slice.Tensor(p, 0, 10, 30)\n"
        f"    y = plait.moe_encode.default(xs, cs, ps, None, {s.experts}, {s.capacity})\n    return (y,)\n"
    ))  # fmt: skip
    assert made.coverage.launches == made.coverage.generated == 1
    (got,) = made.executable(x, choice, slot)
    assert torch.equal(got, ops.moe_encode(x[10:30], choice[10:30], slot[10:30], None, s.experts, s.capacity))


@NO_ROWS
def test_sizes_may_be_symbols() -> None:
    made = compile_graph(parse_graph(
        'graph(level="tensor", symbols={"s0": (0, None, 8), "s1": (0, None, 8), "s2": (1, None, 8)})\n'
        'def f(x: "f32[s0,s2]", c: "i64[s0,2]", u: "i64[4]", w: "f32[s0,2]", b: "f32[4,s1,s2]"):\n'
        "    p, q, r = plait.moe_slots.default(c, u, s1)\n"
        "    y = plait.moe_encode.default(x, c, p, w, 4, s1)\n"
        "    j = plait.moe_join.default((y,), (r,))\n"
        "    z = plait.moe_decode.default(j, c, p, None)\n"
        "    g = plait.moe_decode_weight.default(b, c, p, x)\n    return (z, g)\n"
    ))  # fmt: skip
    assert made.coverage.generated == 5
    for s in (PLAIN, replace(PLAIN, tokens=7, h=5), replace(PLAIN, tokens=0, capacity=0)):
        rng, choice, _ = routed(s, s.h)
        x, w, b = numbers(rng, s.tokens, s.h), numbers(rng, s.tokens, 2), numbers(rng, 4, s.capacity, s.h)
        used = torch.zeros(4, dtype=torch.int64)
        z, g = made.executable(x, choice, used, w, b)
        slot, _, _ = ops.moe_slots(choice, used, s.capacity)
        y = ops.moe_encode(x, choice, slot, w, 4, s.capacity)
        assert torch.equal(z, ops.moe_decode(y, choice, slot, None))
        assert torch.equal(g, ops.moe_decode_weight(b, choice, slot, x))


# -- what is wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "slot"), [([[4, 0]], [[0, 0]]), ([[-2, 0]], [[0, 0]]), ([[0, 0]], [[1 << 40, 0]]), ([[-1, 0]], [[15, 0]])]
)
def test_pairs_outside_of_the_buffers_raise(choice: list[list[int]], slot: list[list[int]]) -> None:
    s, rng = PLAIN, random.Random(0)
    c, at = (torch.tensor(v).expand(s.tokens, 2).contiguous() for v in (choice, slot))
    x, buf = numbers(rng, s.tokens, s.h), numbers(rng, s.experts, s.capacity, s.h)
    for name, args in (
        ("moe_encode", (x, c, at, None, s.experts, s.capacity)),
        ("moe_decode", (buf, c, at, None)),
        ("moe_decode_weight", (buf, c, at, x)),
    ):
        made, tensors = compiled(name, args)
        with pytest.raises(IndexError, match="out of range"):
            made.executable(*tensors)


@pytest.mark.parametrize("wrong", [4, -2, 1 << 40])
def test_choices_of_experts_that_there_are_not_raise(wrong: int) -> None:
    choice = torch.tensor([[0, wrong]] * PLAIN.tokens)
    order = torch.arange(PLAIN.tokens)
    for name, args in (
        ("moe_slots", (choice, torch.zeros(4, dtype=torch.int64), 15)),
        ("moe_keep", (choice, None, 4, 15, True)),
        ("moe_keep", (choice.clamp(max=3, min=-1), order + wrong, 4, 15, False)),
    ):
        made, tensors = compiled(name, args)
        with pytest.raises(IndexError, match="out of range"):
            made.executable(*tensors)


def test_ranges_outside_of_the_buffer_are_neither_read_nor_written() -> None:
    part, wrong = torch.ones(3, 7, 5), torch.tensor([[-5, 2], [6, 900], [5, 3]])
    made, tensors = compiled("moe_join", ([part], [wrong]))
    (got,) = made.executable(*tensors)
    assert torch.equal(got, ops.moe_join([part], [torch.tensor([[0, 2], [6, 7], [0, 0]])]))


@pytest.mark.parametrize(
    ("head", "call", "why"),
    [
        ('x: "i32[6,8]", c: "i64[6,2]", p: "i64[6,2]"', "moe_encode.default(x, c, p, None, 4, 5)", "x of int32"),
        ('x: "f32[6,8]", c: "i32[6,2]", p: "i64[6,2]"', "moe_encode.default(x, c, p, None, 4, 5)", "choice of int32"),
        (f'b: "f32[99,4,8]", c: "i64[6,{CHOICES + 1}]", p: "i64[6,{CHOICES + 1}]"',
         "moe_decode.default(b, c, p, None)", "choices of a token"),
    ],
)  # fmt: skip
def test_what_has_no_kernel_has_a_reason(head: str, call: str, why: str) -> None:
    made = compile_graph(parse_graph(f"def f({head}):\n    y = plait.{call}\n    return (y,)\n"))
    assert made.coverage.fallback == 1 and why in made.coverage.reported[0].reason


def test_layers_and_pieces_share_their_kernels() -> None:
    made = compile_graph(parse_graph(
        'def f(x: "f32[6,8]", c: "i64[6,2]", u: "i64[4]"):\n'
        "    xs = aten.slice.Tensor(x, 0, 0, 3)\n    ys = aten.slice.Tensor(x, 0, 3, 6)\n"
        "    cs = aten.slice.Tensor(c, 0, 0, 3)\n    ds = aten.slice.Tensor(c, 0, 3, 6)\n"
        "    p, v, r = plait.moe_slots.default(cs, u, 5)\n    q, w, s = plait.moe_slots.default(ds, v, 5)\n"
        "    a = plait.moe_encode.default(xs, cs, p, None, 4, 5)\n    b = plait.moe_encode.default(ys, ds, q, None, 4, 5)\n"
        "    j = plait.moe_join.default((a, b), (r, s))\n    return (j, w)\n"
    ))  # fmt: skip
    assert made.coverage.launches == 5 and len(made.sources) == 3
    rng = random.Random(1)
    x, choice, used = numbers(rng, 6, 8), chosen(Sizes(6, 2, 4, 5, 8), rng), torch.zeros(4, dtype=torch.int64)
    whole, after = made.executable(x, choice, used)
    slot, want, _ = ops.moe_slots(choice, used, 5)
    assert torch.equal(whole, ops.moe_encode(x, choice, slot, None, 4, 5)) and torch.equal(after, want)
