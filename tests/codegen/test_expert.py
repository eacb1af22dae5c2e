"""Products of experts on the matmul template: against the ops' references, and rows against themselves bit for bit.

Loads are uneven on purpose: experts without tokens, full buffers, rows that begin anywhere. Each test prints its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from plait.codegen.compile import CodegenOptions, CompiledGraph, compile_graph
from plait.codegen.cpp.build import build
from plait.codegen.expert import expert_of
from plait.codegen.items import KernelItem
from plait.codegen.schedule import schedule
from plait.codegen.target import retarget
from plait.codegen.templates import matmul as mm
from plait.codegen.triton.interpret import Interpreter
from plait.errors import InvalidMatmul
from plait.ir import from_fx, parse_graph
from plait.runtime import moe
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.codegen.cuda_plan import run_interpreted
from tests.codegen.products import PLAIN
from tests.codegen.test_cpp_printer import SANITIZE, run_sanitized

assert moe is not None  # importing registers the ops
ops = torch.ops.plait
NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Sizes:
    ranks: int
    experts: int
    capacity: int
    a: int
    b: int

    @property
    def groups(self) -> int:
        return self.ranks * self.experts


ODD = Sizes(2, 3, 70, 37, 45)
DEEP = Sizes(1, 4, 30, 600, 40)  # sums of several blocks
WIDE = Sizes(3, 1, 290, 20, 2080)  # several blocks of rows and of columns
ALL = [ODD, DEEP, WIDE, Sizes(1, 1, 1, 1, 1), Sizes(4, 2, 5, 8, 33)]


def text_of(x: Tensor, layout: str = "") -> str:
    return f'"{NAMES.get(x.dtype, "i64")}[{",".join(map(str, x.shape))}]{layout}"'


COMPILED: dict[str, CompiledGraph] = {}


def call(text: str, *args: Tensor) -> Tensor:
    (out,) = run(text, *args)
    return out


def run(text: str, *args: Tensor) -> tuple[Tensor, ...]:
    """Runs the one op of a graph, which must have become a kernel."""
    if text not in COMPILED:
        COMPILED[text] = compile_graph(parse_graph(text))
    made = COMPILED[text]
    assert made.coverage.generated == made.coverage.launches == 1, made.coverage
    return tuple(made.executable(*args))


def product(x: Tensor, w: Tensor, rows: Tensor) -> Tensor:
    layout = "" if w.is_contiguous() else f"{{{','.join(map(str, w.stride()))}}}"
    text = (f"def f(x: {text_of(x)}, w: {text_of(w, layout)}, r: {text_of(rows)}):\n"
            "    y = plait.expert_mm.default(x, w, r)\n    return (y,)\n")  # fmt: skip
    return call(text, x, w, rows)


def weights(x: Tensor, grad: Tensor, rows: Tensor, experts: int) -> Tensor:
    text = (f"def f(x: {text_of(x)}, g: {text_of(grad)}, r: {text_of(rows)}):\n"
            f"    y = plait.expert_mm_weight.default(x, g, r, {experts})\n    return (y,)\n")  # fmt: skip
    return call(text, x, grad, rows)


def loads(s: Sizes, rng: random.Random) -> Tensor:
    """Any ranges of rows: none, all, and anything between."""
    found = []
    for _ in range(s.groups):
        first, end = sorted((rng.randint(0, s.capacity), rng.randint(0, s.capacity)))
        found.append(rng.choice([(first, end), (first, end), (0, s.capacity), (first, first), (0, end)]))
    return torch.tensor(found)


def numbers(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32, whole: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(rng.randint(0, 2**31))
    return torch.randint(-4, 5, shape, generator=g).to(dtype) if whole else torch.randn(shape, generator=g).to(dtype)


def spoilt(x: Tensor, rows: Tensor) -> Tensor:
    """x with not-a-number in every row that is not used."""
    return torch.where(moe._mask(rows, x.shape[1]), x, torch.nan)


# -- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", ALL, ids=str)
@pytest.mark.parametrize("layout", ["n", "k"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_products_are_those_of_the_reference(s: Sizes, layout: str, dtype: torch.dtype) -> None:
    seed = hash((s.a, layout)) % 1000
    rng = random.Random(seed)
    rows = loads(s, rng)
    print("seed", seed, rows.tolist())
    x = numbers(rng, s.groups, s.capacity, s.a, dtype=dtype, whole=True)
    w = numbers(rng, s.experts, s.a, s.b, dtype=dtype, whole=True)
    w = w if layout == "n" else w.transpose(1, 2).contiguous().transpose(1, 2)
    got = product(spoilt(x, rows), w, rows)
    assert torch.equal(got, ops.expert_mm(x, w, rows))  # whole numbers: exact in any order


@pytest.mark.parametrize("s", ALL, ids=str)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_gradients_of_weights_are_those_of_the_reference(s: Sizes, dtype: torch.dtype) -> None:
    rng = random.Random(s.a)
    rows = loads(s, rng)
    print("seed", s.a, rows.tolist())
    x = numbers(rng, s.groups, s.capacity, s.a, dtype=dtype, whole=True).clamp(-1, 1)
    grad = numbers(rng, s.groups, s.capacity, s.b, dtype=dtype, whole=True).clamp(-1, 1)
    got = weights(spoilt(x, rows), spoilt(grad, rows), rows, s.experts)
    wide = ops.expert_mm_weight(x.double(), grad.double(), rows, s.experts)
    assert torch.equal(got, wide.to(dtype))  # sums of halves are rounded once


@pytest.mark.parametrize("make", [lambda c: (0, 0), lambda c: (c, c), lambda c: (0, c)], ids=["none", "last", "full"])
def test_no_rows_and_all_rows(make: Callable[[int], tuple[int, int]]) -> None:
    rng = random.Random(0)
    rows = torch.tensor([make(ODD.capacity)] * ODD.groups)
    x, w = numbers(rng, ODD.groups, ODD.capacity, ODD.a), numbers(rng, ODD.experts, ODD.a, ODD.b)
    grad = numbers(rng, ODD.groups, ODD.capacity, ODD.b)
    torch.testing.assert_close(product(x, w, rows), ops.expert_mm(x, w, rows))
    torch.testing.assert_close(
        weights(x, grad, rows, ODD.experts), ops.expert_mm_weight(x, grad, rows, ODD.experts), rtol=1e-4, atol=1e-4
    )


def test_rows_outside_the_buffer_are_neither_read_nor_written() -> None:
    s = replace(ODD, ranks=1)
    x, w = torch.ones(s.groups, s.capacity, s.a), torch.ones(s.experts, s.a, s.b)
    wrong, inside = torch.tensor([[-5, 2], [60, 900], [9, 3]]), torch.tensor([[0, 2], [60, 70], [9, 9]])
    assert torch.equal(product(x, w, wrong), ops.expert_mm(x, w, inside))


# -- bits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [ODD, DEEP, WIDE], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_the_rows_have_the_bits_of_the_whole(s: Sizes, seed: int) -> None:
    rng = random.Random(seed)
    rows = loads(s, rng)
    print("seed", seed, rows.tolist())
    dtype = rng.choice([torch.float32, torch.bfloat16])
    x = numbers(rng, s.groups, s.capacity, s.a, dtype=dtype)
    w = numbers(rng, s.experts, s.a, s.b, dtype=dtype)
    whole, at, parts, used = product(x, w, rows), rows[:, 0], [], []
    for piece in range(3):
        end = (
            rows[:, 1]
            if piece == 2
            else torch.tensor([rng.randint(int(a), int(e)) for a, e in zip(at, rows[:, 1], strict=True)])
        )
        used.append(torch.stack([at, end], 1))
        parts.append(product(spoilt(x, used[-1]), w, used[-1]))
        at = end
    assert torch.equal(ops.moe_join(parts, used), whole)
    assert torch.equal(sum(parts[1:], parts[0]), whole)  # and zeros elsewhere


@pytest.mark.parametrize("seed", range(4))
def test_a_row_alone_has_the_bits_that_it_has_in_a_full_buffer(seed: int) -> None:
    rng = random.Random(seed)
    print("seed", seed)
    x, w = numbers(rng, ODD.groups, ODD.capacity, ODD.a), numbers(rng, ODD.experts, ODD.a, ODD.b)
    whole = product(x, w, torch.tensor([[0, ODD.capacity]] * ODD.groups))
    for _ in range(5):
        g, r = rng.randrange(ODD.groups), rng.randrange(ODD.capacity)
        rows = torch.zeros(ODD.groups, 2, dtype=torch.int64)
        rows[g] = torch.tensor([r, r + 1])
        assert torch.equal(product(x, w, rows)[g, r], whole[g, r])


def test_threads_give_the_same_bits() -> None:
    rng = random.Random(5)
    rows = torch.tensor([[0, 290], [3, 4], [100, 250]])  # one expert has nearly all of the work
    x, w = numbers(rng, 3, 290, 20), numbers(rng, 1, 20, 2080)
    torch.set_num_threads(1)
    want = product(x, w, rows), weights(x, product(x, w, rows), rows, 1)
    torch.set_num_threads(2)
    assert torch.equal(product(x, w, rows), want[0])
    assert torch.equal(weights(x, want[0], rows, 1), want[1])


# -- activations --------------------------------------------------------------------------------------------------------


def activate(x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str) -> Tensor:
    given = {n: v for n, v in (("x", x), ("b", bias), ("o", other), ("r", rows)) if v is not None}
    text = (
        f"def f({', '.join(f'{n}: {text_of(v)}' for n, v in given.items())}):\n"
        f"    y = plait.expert_act.default(x, {'b' if bias is not None else None}, {'o' if other is not None else None}, r, "
        f'"{kind}")\n    return (y,)\n'
    )
    return call(text, *given.values())


BOUND = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("kind", moe.KINDS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_activations_are_those_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    seed = moe.KINDS.index(kind)
    rng = random.Random(seed)
    for s in (ODD, replace(ODD, ranks=1)):
        rows = loads(s, rng)
        print("seed", seed, rows.tolist())
        x, other = (numbers(rng, s.groups, s.capacity, s.b, dtype=dtype) for _ in range(2))
        bias = numbers(rng, s.experts, s.b, dtype=dtype)
        for b, o in ((None, None), (bias, other)):
            got = activate(spoilt(x, rows), b, None if o is None else spoilt(o, rows), rows, kind)
            want = ops.expert_act(x, b, o, rows, kind)
            torch.testing.assert_close(got, want, rtol=BOUND[dtype], atol=BOUND[dtype])


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_activated_rows_have_the_bits_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    rows, kind = loads(ODD, rng), rng.choice(moe.KINDS)
    print("seed", seed, rows.tolist(), kind)
    x, bias = numbers(rng, ODD.groups, ODD.capacity, ODD.b), numbers(rng, ODD.experts, ODD.b)
    middle = torch.tensor([rng.randint(a, e) for a, e in rows.tolist()])
    used = [torch.stack([rows[:, 0], middle], 1), torch.stack([middle, rows[:, 1]], 1)]
    parts = [activate(x, bias, None, r, kind) for r in used]
    assert torch.equal(ops.moe_join(parts, used), activate(x, bias, None, rows, kind))


def gradients(
    grad: Tensor, x: Tensor, bias: Tensor | None, other: Tensor | None, rows: Tensor, kind: str, results: str = "y, z"
) -> tuple[Tensor, ...]:
    given = {n: v for n, v in (("g", grad), ("x", x), ("b", bias), ("o", other), ("r", rows)) if v is not None}
    text = (
        f"def f({', '.join(f'{n}: {text_of(v)}' for n, v in given.items())}):\n"
        f"    y, z = plait.expert_act_backward.default(g, x, {'b' if bias is not None else None}, "
        f'{"o" if other is not None else None}, r, "{kind}")\n    return ({results},)\n'
    )
    return run(text, *given.values())


@pytest.mark.parametrize("kind", moe.KINDS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_gradients_of_activations_are_those_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    seed = moe.KINDS.index(kind)
    rng = random.Random(seed)
    for s in (ODD, replace(ODD, ranks=1)):
        rows = loads(s, rng)
        print("seed", seed, rows.tolist())
        grad, x, other = (numbers(rng, s.groups, s.capacity, s.b, dtype=dtype) for _ in range(3))
        bias = numbers(rng, s.experts, s.b, dtype=dtype)
        for b, o in ((None, None), (bias, other)):
            got = gradients(spoilt(grad, rows), spoilt(x, rows), b, None if o is None else spoilt(o, rows), rows, kind)
            want = ops.expert_act_backward(grad, x, b, o, rows, kind)
            for a, w in zip(got, want, strict=True):
                torch.testing.assert_close(a, w, rtol=BOUND[dtype], atol=BOUND[dtype])


@pytest.mark.parametrize("results", ["y", "z"])
def test_a_gradient_that_nobody_reads_is_not_computed(results: str) -> None:
    rng = random.Random(2)
    rows = loads(ODD, rng)
    grad, x, other = (numbers(rng, ODD.groups, ODD.capacity, ODD.b) for _ in range(3))
    both = gradients(grad, x, None, other, rows, "silu")
    (alone,) = gradients(grad, x, None, other, rows, "silu", results)
    assert torch.equal(alone, both["yz".index(results)])
    (key,) = (key for key in COMPILED if "act_backward" in key and f"return ({results},)" in key)
    (text,) = COMPILED[key].sources.values()
    assert text.count("store(") == 2  # of what is computed, and of zeros


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_gradients_have_the_bits_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    rows, kind = loads(ODD, rng), rng.choice(moe.KINDS)
    print("seed", seed, rows.tolist(), kind)
    grad, x, other = (numbers(rng, ODD.groups, ODD.capacity, ODD.b) for _ in range(3))
    bias = numbers(rng, ODD.experts, ODD.b)
    middle = torch.tensor([rng.randint(a, e) for a, e in rows.tolist()])
    used = [torch.stack([rows[:, 0], middle], 1), torch.stack([middle, rows[:, 1]], 1)]
    parts = [gradients(grad, x, bias, other, r, kind) for r in used]
    for i, whole in enumerate(gradients(grad, x, bias, other, rows, kind)):
        assert torch.equal(ops.moe_join([p[i] for p in parts], used), whole)


def test_buffers_without_elements() -> None:
    rows = torch.zeros(2, 2, dtype=torch.int64)
    for shape in ((2, 0, 8), (2, 4, 0)):
        x, w = torch.zeros(shape), torch.zeros(1, shape[2], 8)
        assert torch.equal(product(x, w, rows), torch.zeros(2, shape[1], 8))
        assert torch.equal(weights(x, x, rows, 1), torch.zeros(1, shape[2], shape[2]))
        compiled = compile_graph(parse_graph(
            f"def f(x: {text_of(x)}, r: {text_of(rows)}):\n"
            '    y = plait.expert_act.default(x, None, None, r, "silu")\n    return (y,)\n'
        ))  # fmt: skip
        assert compiled.executable(x, rows)[0].shape == shape


def test_cuda_devices_activate_in_a_kernel_and_multiply_by_a_library(interpreter: Interpreter) -> None:
    rng = random.Random(8)
    rows = loads(ODD, rng)
    x, w = numbers(rng, ODD.groups, ODD.capacity, ODD.a), numbers(rng, ODD.experts, ODD.a, ODD.b)
    bias = numbers(rng, ODD.experts, ODD.b)
    text = (
        f"def f(x: {text_of(x)}, w: {text_of(w)}, b: {text_of(bias)}, r: {text_of(rows)}):\n"
        "    y = plait.expert_mm.default(x, w, r)\n"
        '    z = plait.expert_act.default(y, b, y, r, "gelu_tanh")\n    return (z,)\n'
    )
    made = compile_graph(retarget(parse_graph(text)), CodegenOptions(target="cuda:90"))
    assert made.coverage.generated == 1
    assert set(made.coverage.reasons) == {("plait.expert_mm.default", "cuBLAS's matmul of whole buffers")}
    y = ops.expert_mm(x, w, rows)
    (got,) = run_interpreted(made, [x, w, bias, rows], interpreter)
    torch.testing.assert_close(got, ops.expert_act(y, bias, y, rows, "gelu_tanh"), rtol=1e-5, atol=1e-5)


def test_cuda_devices_compute_both_gradients_in_a_kernel(interpreter: Interpreter) -> None:
    rng = random.Random(9)
    rows = loads(ODD, rng)
    grad, x, other = (numbers(rng, ODD.groups, ODD.capacity, ODD.b) for _ in range(3))
    bias = numbers(rng, ODD.experts, ODD.b)
    for gate in (other, None):
        text = (
            f"def f(g: {text_of(x)}, x: {text_of(x)}, b: {text_of(bias)}, o: {text_of(x)}, r: {text_of(rows)}):\n"
            f'    y, z = plait.expert_act_backward.default(g, x, b, {None if gate is None else "o"}, r, "silu")\n'
            f"    return ({'y,' if gate is None else 'y, z'})\n"
        )
        made = compile_graph(retarget(parse_graph(text)), CodegenOptions(target="cuda:90"))
        assert made.coverage.generated == made.coverage.launches == 1
        got = run_interpreted(made, [grad, x, bias, other, rows], interpreter)
        for a, w in zip(got, ops.expert_act_backward(grad, x, bias, gate, rows, "silu"), strict=gate is not None):
            torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-5)


# -- in a graph ---------------------------------------------------------------------------------------------------------


def test_sizes_may_be_symbols() -> None:
    graph = parse_graph(
        'graph(level="tensor", symbols={"s0": (1, None, 8), "s1": (1, None, 8)})\n'
        'def f(x: "f32[6,s0,s1]", w: "f32[3,s1,5]", r: "i64[6,2]"):\n'
        "    y = plait.expert_mm.default(x, w, r)\n    z = plait.expert_mm_weight.default(x, y, r, 3)\n    return (y, z)\n"
    )
    made, rng = compile_graph(graph), random.Random(3)
    assert made.coverage.generated == 2
    for capacity, features in ((7, 300), (90, 3), (1, 64)):
        s = Sizes(2, 3, capacity, features, 5)
        rows = loads(s, rng)
        x, w = numbers(rng, 6, capacity, features, whole=True), numbers(rng, 3, features, 5, whole=True)
        y, z = made.executable(x, w, rows)
        assert torch.equal(y, ops.expert_mm(x, w, rows))
        assert torch.equal(z, ops.expert_mm_weight(x, y, rows, 3))


def test_layers_share_their_kernel() -> None:
    graph = parse_graph(
        'def f(x: "f32[4,9,8]", v: "f32[2,8,8]", w: "f32[2,8,8]", r: "i64[4,2]"):\n'
        "    y = plait.expert_mm.default(x, v, r)\n    z = plait.expert_mm.default(y, w, r)\n    return (z,)\n"
    )
    made, rng = compile_graph(graph), random.Random(4)
    assert made.coverage.launches == 2 and len(made.sources) == 1
    x, v, w = numbers(rng, 4, 9, 8, whole=True), numbers(rng, 2, 8, 8, whole=True), numbers(rng, 2, 8, 8, whole=True)
    rows = loads(Sizes(2, 2, 9, 8, 8), rng)
    assert torch.equal(made.executable(x, v, w, rows)[0], ops.expert_mm(ops.expert_mm(x, v, rows), w, rows))


def test_buffers_with_room_between_rows_are_read_where_they_lie() -> None:
    rng = random.Random(6)
    rows = loads(ODD, rng)
    wide = numbers(rng, ODD.groups, ODD.capacity, ODD.a + 5, whole=True)
    w = numbers(rng, ODD.experts, ODD.a, ODD.b, whole=True)
    text = (
        f"def f(x: {text_of(wide)}, w: {text_of(w)}, r: {text_of(rows)}):\n"
        f"    v = aten.slice.Tensor(x, 2, 2, {ODD.a + 2})\n"
        "    y = plait.expert_mm.default(v, w, r)\n    return (y,)\n"
    )
    made = compile_graph(parse_graph(text))
    assert torch.equal(made.executable(wide, w, rows)[0], ops.expert_mm(wide[:, :, 2:-3], w, rows))
    assert made.coverage.generated == 1


@pytest.mark.parametrize(
    ("x", "w", "why"),
    [
        ("f32[4,9,8]{72,1,9}", "f32[2,8,8]", "rows are not equally far apart"),
        ("f32[4,9,8]{8,32,1}", "f32[2,8,8]", "rows are not equally far apart"),
        ("f32[4,9,8]", "f32[2,8,8]{128,16,2}", "without a contiguous axis"),
        ("i32[4,9,8]", "i32[2,8,8]", "operands of int32"),
    ],
)
def test_what_the_template_does_not_take_has_a_reason(x: str, w: str, why: str) -> None:
    graph = parse_graph(
        f'def f(x: "{x}", w: "{w}", r: "i64[4,2]"):\n    y = plait.expert_mm.default(x, w, r)\n    return (y,)\n'
    )
    found = expert_of(graph.nodes[0])
    assert isinstance(found, str) and why in found, found
    made = compile_graph(graph)
    assert made.coverage.generated == 0


def test_only_products_of_experts_are_looked_at() -> None:
    graph = parse_graph('def f(x: "f32[4,8]", w: "f32[8,8]"):\n    y = aten.mm.default(x, w)\n    return (y,)\n')
    assert expert_of(graph.nodes[0]) is None


@pytest.mark.parametrize("changes", [{"group": ""}, {"group": "k"}, {"a": "m"}, {"b": "packed"}, {"a_ids": True}], ids=str)
def test_the_template_refuses_used_rows_that_it_does_not_have(changes: dict[str, object]) -> None:
    good = replace(PLAIN, group="m", used=True)
    assert "tables" in good.buffer_names and mm.generate(good)
    with pytest.raises(InvalidMatmul, match="used rows"):
        replace(good, **changes)


@pytest.mark.slow
def test_kernels_touch_no_memory_that_is_not_theirs(tmp_path: Path) -> None:
    """Under AddressSanitizer, on buffers that end where their elements end, with rows out of range too."""
    rng, runs = random.Random(10), []
    sources: dict[str, str] = {}
    for s in ALL:
        x, w, grad = (f'"f32[{a},{b},{c}]"' for a, b, c in (
            (s.groups, s.capacity, s.a), (s.experts, s.a, s.b), (s.groups, s.capacity, s.b)))  # fmt: skip
        for head, body in (
            (f"x: {x}, w: {w}", "plait.expert_mm.default(x, w, r)"),
            (f"x: {x}, g: {grad}", f"plait.expert_mm_weight.default(x, g, r, {s.experts})"),
        ):
            graph = parse_graph(f'def f({head}, r: "i64[{s.groups},2]"):\n    y = {body}\n    return (y,)\n')
            (item,) = schedule(graph).items
            assert isinstance(item, KernelItem) and isinstance(item.source, str)
            sources[item.name] = item.source
            for rows in (loads(s, rng), torch.tensor([[-3, s.capacity + 9]] * s.groups)):
                files = []
                for v in item.buffers:
                    content = rows if v.tensor.dtype is torch.int64 and v.hint == "r" else torch.zeros(
                        [int(n) for n in v.tensor.shape], dtype=v.tensor.dtype)  # fmt: skip
                    files.append(str(tmp_path / f"{len(runs)}-{len(files)}.bin"))
                    Path(files[-1]).write_bytes(content.contiguous().view(torch.uint8).numpy().tobytes())
                runs.append([item.name, files, [int(n) for n in item.sizes]])
    libraries = build(sources, tmp_path, flags=SANITIZE)
    done = run_sanitized([[str(libraries[name]), name, files, sizes, 2] for name, files, sizes in runs], tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]


def layer(x: Tensor, choice: Tensor, gate: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    experts, capacity = w1.shape[0], 11
    slot, _, rows = ops.moe_slots(choice, choice.new_zeros(experts), capacity)
    buf = ops.moe_encode(x, choice, slot, None, experts, capacity)
    hidden = ops.expert_act(ops.expert_mm(buf, w1, rows), b1, None, rows, "gelu")
    return ops.moe_decode(ops.expert_mm(hidden, w2, rows), choice, slot, gate)


def test_a_layer_trains_as_in_eager() -> None:
    g = torch.Generator().manual_seed(9)
    choice = torch.randint(0, 3, (20, 2), generator=g).clamp(max=1)  # the third expert has nobody, the second overflows
    floats = [torch.randn(s, generator=g) for s in ((20, 24), (20, 2), (3, 24, 40), (3, 40), (3, 40, 24))]
    found = []
    for fn in (layer, torch.compile(layer, backend="plait", fullgraph=True)):
        x, gate, *rest = (v.clone().requires_grad_() for v in floats)
        y = fn(x, choice, gate, *rest)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, gate, *rest))])
    for got, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert found[1][4][2].eq(0).all()  # the expert that nobody chose


def test_no_kernel_of_a_step_masks_whole_buffers() -> None:
    g = torch.Generator().manual_seed(9)
    choice = torch.randint(0, 3, (20, 2), generator=g)
    floats = [
        torch.randn(s, generator=g, requires_grad=True) for s in ((20, 24), (20, 2), (3, 24, 40), (3, 40), (3, 40, 24))
    ]

    def step(x: Tensor, choice: Tensor, *rest: Tensor) -> list[Tensor]:
        y = layer(x, choice, *rest)
        return [y, *torch.autograd.grad(y.square().sum(), (x, *rest))]

    graph = from_fx(make_fx(step, tracing_mode="fake")(floats[0], choice, *floats[1:]))
    names = [node.op.name for node in graph.nodes]
    assert names.count("plait.expert_act_backward.default") == 1
    assert not {"aten.where.self", "aten.where.ScalarOther", "aten.gelu_backward.default"} & set(names)
    made = compile_graph(graph)
    assert sum(name.startswith("expert_act_backward") for name in made.sources) == 1
