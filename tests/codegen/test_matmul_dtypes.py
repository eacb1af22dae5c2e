"""Products of halves and bytes through code generation: what is generated, how exact it is, what is left to libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import plait
import pytest
import torch
from plait.codegen import tuning
from plait.codegen.compile import CompiledGraph, compile_graph
from plait.ir import parse_graph
from plait.runtime import weights
from torch import Tensor
from torch.nn import functional as F

from tests.generate.judge import judge
from tests.models import build, example

pytestmark = pytest.mark.slow  # the compiler builds many drivers

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the template, also on processors that would leave such products to a library."""
    monkeypatch.setattr(tuning, "cpu_flags", frozenset)


def captured(fn: Callable[..., Tensor], *args: Any) -> tuple[CompiledGraph, Tensor]:
    """What plait compiled a function of tensors to, and its result."""
    torch.compiler.reset()
    compiled = plait.compile(_Module(fn), args)
    return compiled.compiled, compiled(*args)


class _Module(torch.nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


def alone(compiled: CompiledGraph) -> None:
    """One kernel computes everything."""
    coverage = compiled.coverage
    assert (coverage.launches, coverage.library, coverage.fallback) == (1, 0, 0), coverage


FLOATS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "mm": (lambda x, w: torch.relu(x @ w), ((7, 300), (300, 70))),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w, alpha=0.7, beta=1.3), ((70,), (9, 65), (65, 70))),
    "bmm": (lambda x, y: torch.bmm(x, y.mT) * 0.5, ((3, 20, 33), (3, 40, 33))),
    "baddbmm": (lambda b, x, y: torch.baddbmm(b, x, y, beta=-1), ((3, 1, 40), (3, 20, 33), (3, 33, 40))),
    "linear": (lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r, ((2, 5, 600), (70, 600), (70,), (2, 5, 70))),
    "vector": (lambda x, w: F.linear(x, w), ((1, 515), (70, 515))),
    "empty": (lambda x, w: F.linear(x, w), ((0, 5), (70, 5))),
    "no sum": (lambda x, w, b: F.linear(x, w, b), ((3, 0), (70, 0), (70,))),
}


@pytest.mark.parametrize("dtype", list(HALVES))
@pytest.mark.parametrize("name", list(FLOATS))
def test_halves_are_no_less_exact_than_eager(name: str, dtype: str) -> None:
    fn, shapes = FLOATS[name]
    seed = int(torch.randint(1 << 30, ()))
    print(f"seed {seed}")
    made = torch.Generator().manual_seed(seed)
    args = [torch.randn(s, generator=made).to(HALVES[dtype]) for s in shapes]
    compiled, got = captured(fn, *args)
    alone(compiled)
    expected, exact = fn(*args), fn(*(x.double() for x in args))
    assert judge(got, expected, lambda: exact).kind != "wrong"
    if got.numel():  # the sums differ from eager's only in their order: at most a rounding of the result more
        ours, eager = ((x.double() - exact).abs().max() for x in (got, expected))
        assert ours <= 1.3 * eager + 1e-6


def test_a_bias_is_added_before_the_one_rounding() -> None:
    x, w, b = torch.full((2, 1), 256.0), torch.ones(3, 1), torch.full((3,), 1.5)
    x, w, b = x.bfloat16(), w.bfloat16(), b.bfloat16()  # 256 + 1.5 lies nearer to 258 than to 256, half of it does not
    _, got = captured(lambda x, w, b: F.linear(x, w, b + 0.0), x, w, b)
    assert torch.equal(got, torch.full((2, 3), 258.0, dtype=torch.bfloat16)) and torch.equal(got, F.linear(x, w, b))


def test_rows_and_batches_of_halves_change_no_bit() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(40, 600).bfloat16(), torch.randn(70, 600).bfloat16()
    whole = captured(F.linear, x, w)[1]
    for rows in (1, 3, 8, 13):
        assert torch.equal(captured(F.linear, x[:rows], w)[1], whole[:rows])
    batched = captured(torch.bmm, torch.stack([x, x]), torch.stack([w.t(), w.t()]))[1]
    assert torch.equal(batched, torch.stack([whole, whole]))


def test_owned_halves_and_bytes_lie_in_panels() -> None:
    text = """def f(x: "bf16[%d,5]"):
    w = plait.constant("w")
    t = aten.permute.default(w, (1, 0))
    y = aten.mm.default(x, t)
    return (y,)
"""
    for rows in (1, 3, 40):
        x, w = torch.randn(rows, 5).bfloat16(), torch.randn(33, 5).bfloat16()
        compiled = compile_graph(parse_graph(text % rows, {"w": w}))
        assert [str(v.ref) for v in weights.constants(compiled.plan)] == ["w|panels:k:33x5"]
        assert torch.equal(compiled.executable(x)[0], captured(F.linear, x, w)[1])


# ---- bytes --------------------------------------------------------------------------------------------------------------


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    low = 0 if dtype is torch.uint8 else -128
    return torch.randint(low, low + 256, shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("rows", [1, 3, 17, 80])
@pytest.mark.parametrize("turned", [False, True])
def test_products_of_bytes_are_eager_s(dtype: torch.dtype, rows: int, turned: bool) -> None:
    x, w = numbers(dtype, rows, 130), numbers(torch.int8, 130, 70)
    w = w.t().contiguous().t() if turned else w
    compiled, got = captured(torch._int_mm, x, w)
    alone(compiled)
    assert got.dtype is torch.int32 and torch.equal(got, torch._int_mm(x, w))


def test_what_follows_a_product_of_bytes_is_fused() -> None:
    def dequantised(x: Tensor, w: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
        return F.relu(torch._int_mm(x, w).float() * scale * rows)

    args = numbers(torch.int8, 9, 64), numbers(torch.int8, 64, 40), torch.rand(40), torch.rand(9, 1)
    compiled, got = captured(dequantised, *args)
    alone(compiled)
    assert torch.equal(got, dequantised(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [torch.int8, torch.uint8])
@pytest.mark.parametrize("form", ["linear", "cast of a view", "matmul"])
@pytest.mark.parametrize("rows", [2, 30])
def test_weights_of_bytes_are_widened_in_the_product(dtype: torch.dtype, weight: torch.dtype, form: str, rows: int) -> None:
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "linear": lambda x, w: F.linear(x, w.to(x.dtype)),
        "cast of a view": lambda x, w: x @ w.t().to(x.dtype),
        "matmul": lambda x, w: x[:, :70] @ w.to(x.dtype),
    }
    fn = forms[form]
    torch.manual_seed(0)
    x, w = torch.randn(rows, 133).to(dtype), numbers(weight, 70, 133)
    compiled, got = captured(fn, x, w)
    alone(compiled)
    assert torch.equal(got, captured(fn, x, w.to(dtype))[1])


def test_a_widened_weight_that_others_read_too_is_made_once() -> None:
    def both(x: Tensor, w: Tensor) -> Tensor:
        wide = w.to(x.dtype)
        return F.linear(x, wide) + wide.sum(1)

    x, w = torch.randn(6, 64), numbers(torch.int8, 40, 64)
    compiled, got = captured(both, x, w)
    assert compiled.coverage.library == compiled.coverage.fallback == 0
    torch.testing.assert_close(got, both(x, w), rtol=1e-5, atol=1e-3)


def test_scales_of_a_weight_stay_before_the_sum() -> None:
    """Moving them behind it would round otherwise than the program says."""

    def scaled(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return F.linear(x, w.to(x.dtype) * s[:, None])

    x, w, s = torch.randn(6, 64).bfloat16(), numbers(torch.int8, 40, 64), torch.rand(40).bfloat16()
    assert torch.equal(captured(scaled, x, w, s)[1], captured(F.linear, x, w.to(x.dtype) * s[:, None])[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_bytes_with_scales(dtype: torch.dtype) -> None:
    x, w, s = torch.randn(6, 64).to(dtype), numbers(torch.int8, 32, 64), torch.rand(32).to(dtype)
    compiled, got = captured(torch._weight_int8pack_mm, x, w, s)
    alone(compiled)
    exact = (x.double() @ w.double().t()) * s.double()
    assert judge(got, torch._weight_int8pack_mm(x, w, s), lambda: exact).kind != "wrong"


# ---- libraries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "dtype", "n"), [("amx_bf16", "bf16", 40), ("avx512_fp16", "f16", 40)])
def test_processors_with_instructions_for_halves_leave_large_products_to_onednn(
    monkeypatch: pytest.MonkeyPatch, flag: str, dtype: str, n: int
) -> None:
    monkeypatch.setattr(tuning, "cpu_flags", lambda: frozenset((flag,)))
    x, w = torch.randn(64, 32).to(HALVES[dtype]), torch.randn(n, 32).to(HALVES[dtype])  # what was compiled is kept
    compiled, got = captured(F.linear, x, w)
    (reported,) = compiled.coverage.reported
    assert reported.kind == "library" and flag in reported.reason
    assert torch.equal(got, F.linear(x, w))
    alone(captured(F.linear, x[:4], w)[0])
    alone(captured(F.linear, x.float(), w.float())[0])


# ---- models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_in_bfloat16_are_generated(name: str) -> None:
    model = build(name).bfloat16().eval()
    given = example(name)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="plait", dynamic=False)
    with torch.no_grad():
        got, expected = compiled(**given), model(**given)
        exact = copy.deepcopy(model).double()(**given)
        told = plait.explain(copy.deepcopy(model))(**given)
    assert judge(got, expected, lambda: exact).kind != "wrong"
    assert not [op for op, _ in told.coverage.reasons if op.split(".")[1].strip("_") in ("mm", "addmm", "bmm", "linear")]
