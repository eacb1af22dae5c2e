"""Attention in plait's own template against eager and float64, and its rows against themselves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.codegen.compile import compile_graph
from plait.codegen.cpp.build import build
from plait.codegen.templates.attention import AttentionSpec, generate
from plait.codegen.templates.launch import attention_arguments, bind
from plait.ir import parse_graph
from torch import nn
from torch.nn import functional as F

from tests.codegen.test_cpp_printer import SANITIZE, run_sanitized

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BOUND = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def spec_of(q: torch.Tensor, mask: torch.Tensor | None, scale: float | None = None) -> AttentionSpec:
    dtype, masked = name_of(q.dtype), "" if mask is None else name_of(mask.dtype)
    return AttentionSpec(f"att_{dtype}_{masked}_{str(scale or '').replace('.', 'p')}", dtype, masked, True, scale)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Callable[[AttentionSpec], Path]:
    folder = tmp_path_factory.mktemp("attention")
    dtypes = ("float32", "float64", "bfloat16", "float16")
    specs = [AttentionSpec(f"att_{d}_{m}_", d, m, True) for d in dtypes for m in ("", "bool", d)]
    built = build({s.name: generate(s) for s in specs}, folder)

    def get(spec: AttentionSpec) -> Path:
        if spec.name not in built:
            built.update(build({spec.name: generate(spec)}, folder))
        return built[spec.name]

    return get


@pytest.fixture
def attend(kernels):
    """(output, log-sum-exp) by the template."""

    def run(q, k, v, mask=None, *, causal=False, scale=None, threads=2):
        spec = spec_of(q, mask, scale)
        out = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype)
        lse = torch.full(q.shape[:3], math.nan, dtype=getattr(torch, spec.sums))
        buffers, sizes = attention_arguments(spec, q, k, v, mask, out, lse, causal=causal, threads=threads)
        buffers[-1].fill_(math.nan)
        bind(kernels(spec), spec.name, buffers, sizes, threads)()
        return out, lse

    return run


def wide(q, k, v, mask=None, *, causal=False, scale=None):
    """The definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (scale if scale is not None else q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    powers = torch.softmax(scores, -1).masked_fill(blind, 0)
    return powers @ v, torch.logsumexp(scores, -1).masked_fill(blind[..., 0], 0)


def operands(shape, dtype, generator, *, heads_inside=True):
    b, h, hkv, rows, keys, width, deep = shape

    def make(n, length, size):
        x = torch.randn((b, length, n, size) if heads_inside else (b, n, length, size), generator=generator).to(dtype)
        return x.transpose(1, 2) if heads_inside else x

    return make(h, rows, width), make(hkv, keys, width), make(hkv, keys, deep)


def assert_near(got, want, dtype):
    (out, lse), (o, s) = got, want
    scale = max(o.abs().max().item(), 1e-30) if o.numel() else 1
    assert out.isfinite().all()
    assert ((out.double() - o).abs() / scale).max().item() <= BOUND[dtype] if o.numel() else True
    if s.numel():
        assert ((lse.double() - s).abs() / (1 + s.abs())).max().item() <= 4 * min(BOUND[dtype], 3e-6)


@pytest.mark.parametrize("seed", range(24))
def test_random_problems_are_near_float64(attend, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice(list(BOUND))
    hkv, group = rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 4])
    rows, keys = rng.choice([1, 2, 4, 5, 8, 33, 200, 260]), rng.choice([1, 3, 32, 64, 255, 256, 257, 530])
    width, deep = rng.choice([1, 8, 33, 64, 80, 300]), rng.choice([1, 8, 33, 64, 80])
    shape = (rng.choice([1, 2]), hkv * group, hkv, rows, keys, width, deep)
    q, k, v = operands(shape, dtype, generator, heads_inside=rng.random() < 0.5)
    causal, kind = rng.random() < 0.3, rng.choice(["none", "bool", "full", "rows", "strided"])
    mask = None
    if kind == "bool":
        mask = torch.rand(shape[0], 1, rows, keys, generator=generator) < 0.7
    elif kind != "none":
        sizes = {"full": (*shape[:2], rows, keys), "rows": (shape[1], 1, keys), "strided": (keys, rows)}[kind]
        mask = torch.randn(sizes, generator=generator).to(dtype)
        mask = mask.t() if kind == "strided" else mask
    scale = rng.choice([None, 0.3])
    print(f"seed {seed}: {shape} {dtype} causal={causal} mask={kind} scale={scale}")
    got = attend(q, k, v, mask, causal=causal, scale=scale)
    assert_near(got, wide(q, k, v, mask, causal=causal, scale=scale), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_depends_on_nothing_beside_it(attend, dtype, causal):
    """One thread or three, all rows or one, alone in its batch or not: the same bits."""
    q, k, v = operands((3, 4, 2, 210, 300, 64, 64), dtype, torch.Generator().manual_seed(1))
    whole, sums = attend(q, k, v, causal=causal)
    for threads in (1, 3):
        assert torch.equal(attend(q, k, v, causal=causal, threads=threads)[0], whole)
    assert torch.equal(attend(q[1:2], k[1:2], v[1:2], causal=causal)[0], whole[1:2])
    for count in (1, 2, 3, 4, 5, 7, 13):
        out, lse = attend(q[:, :, :count], k, v, causal=causal)
        assert torch.equal(out, whole[:, :, :count]) and torch.equal(lse, sums[:, :, :count])
    if not causal:
        assert torch.equal(attend(q[:, :2, 100:101], k[:, :1], v[:, :1])[0], whole[:, :2, 100:101])


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_without_keys_and_odd_numbers_as_eager(attend, rows):
    generator = torch.Generator().manual_seed(2)
    q, k, v = operands((1, 2, 2, rows, 70, 16, 16), torch.float32, generator)
    for value in (-math.inf, math.inf, math.nan):
        mask = torch.zeros(rows, 70)
        mask[0] = value
        mask[-1, 3] = value
        got, want = attend(q, k, v, mask), FLASH(q, k, v, attn_mask=mask)
        torch.testing.assert_close(got[0], want[0], equal_nan=True)
        if value != math.inf:  # log-sum-exp of inf: torch gives inf or NaN, by the number of keys
            torch.testing.assert_close(got[1], want[1], equal_nan=True)
    q[0, 0, 0, 0] = math.nan
    torch.testing.assert_close(attend(q, k, v)[0], FLASH(q, k, v)[0], equal_nan=True)
    v[0, 1, 5] = math.inf
    torch.testing.assert_close(attend(q, k, v)[0], FLASH(q, k, v)[0], equal_nan=True)


EDGES = [(0, 2, 2, 4, 4, 8, 8), (2, 2, 2, 0, 4, 8, 8), (2, 2, 2, 3, 0, 8, 8), (1, 2, 2, 3, 4, 0, 8), (1, 2, 2, 3, 4, 8, 0)]


@pytest.mark.parametrize("shape", [*EDGES, (1, 1, 1, 1, 1, 1, 1)], ids=str)
def test_empty_and_single_sizes(attend, shape):
    q, k, v = operands(shape, torch.float32, torch.Generator().manual_seed(3))
    out, lse = attend(q, k, v, scale=0.5)
    if shape[4] == 0:
        assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.zeros_like(lse))
    else:
        assert_near((out, lse), wide(q, k, v, scale=0.5), torch.float32)


@pytest.mark.slow
def test_the_kernel_touches_no_memory_that_is_not_its_own(tmp_path):
    specs = {
        s.name: s for s in (AttentionSpec("a", mask="bool", lse=True), AttentionSpec("b", "bfloat16", "bfloat16", True))
    }
    libraries = build({n: generate(s) for n, s in specs.items()}, tmp_path, flags=SANITIZE)
    runs: list[list[Any]] = []
    for name, spec in specs.items():
        for shape in [
            (1, 2, 1, 7, 33, 9, 5),
            (2, 2, 2, 1, 300, 64, 64),
            (1, 1, 1, 200, 40, 33, 64),
            (1, 1, 1, 3, 2, 300, 1),
        ]:
            dtype = getattr(torch, spec.dtype)
            q, k, v = operands(shape, dtype, torch.Generator().manual_seed(4), heads_inside=False)
            mask = torch.ones(*shape[:2], shape[3], shape[4], dtype=getattr(torch, spec.mask))
            out = torch.zeros(*q.shape[:3], shape[6], dtype=dtype)
            lse = torch.zeros(q.shape[:3])
            buffers, sizes = attention_arguments(spec, q, k, v, mask, out, lse, causal=bool(len(runs) % 2), threads=2)
            files = []
            for x in buffers:
                file = tmp_path / f"{len(runs)}-{len(files)}.bin"
                file.write_bytes(x.contiguous().view(torch.uint8).numpy().tobytes())
                files.append(str(file))
            runs.append([str(libraries[name]), name, files, sizes, 2])
    done = run_sanitized(runs, tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]


# -- in models --------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2) + 1


def test_a_model_runs_it_as_a_generated_kernel():
    q, k, v = operands((2, 4, 4, 9, 9, 16, 16), torch.float32, torch.Generator().manual_seed(5))
    compiled = plait.compile(Fused(), (q, k, v))
    assert compiled.coverage.library == compiled.coverage.fallback == 0
    assert any("attention" in kernel.name for kernel in compiled.kernels)
    torch.testing.assert_close(compiled(q, k, v), Fused()(q, k, v))


def test_sizes_are_runtime_values():
    torch._dynamo.reset()
    compiled = torch.compile(Fused(), backend="plait", dynamic=True, options={"fallback": "error"})
    for seed, (b, rows, keys) in enumerate([(2, 5, 7), (3, 300, 40), (4, 33, 513)]):
        q, k, v = operands((b, 4, 4, rows, keys, 16, 16), torch.float32, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(q, k, v), Fused()(q, k, v))


def test_gradients_pass_through_it():
    torch._dynamo.reset()
    made = operands((2, 4, 4, 9, 11, 16, 16), torch.float32, torch.Generator().manual_seed(6))
    mine, theirs = ([x.clone().requires_grad_() for x in made] for _ in range(2))
    torch.compile(Fused(), backend="plait")(*mine).square().sum().backward()
    Fused()(*theirs).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_layers_share_one_kernel():
    text = """def f(q: "f32[1,2,8,16]", k: "f32[1,2,8,16]", v: "f32[1,2,8,16]"):
        a, s = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
        b, t = aten._scaled_dot_product_flash_attention_for_cpu.default(a, k, v)
        return (b, t)
"""
    compiled = compile_graph(parse_graph(text))
    q, k, v = (torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    want = FLASH(FLASH(q, k, v)[0], k, v)
    for got, right in zip(compiled.executable(q, k, v), want, strict=True):
        torch.testing.assert_close(got, right)
    assert compiled.coverage.generated == 2 and len(compiled.sources) == 2  # with and without log-sum-exp


def test_an_operand_without_contiguous_rows_is_copied():
    text = """def f(q: "f32[1,2,8,16]{256,128,1,8}", k: "f32[1,2,8,16]", v: "f32[1,2,8,16]"):
        a = aten.scaled_dot_product_attention.default(q, k, v)
        return (a,)
"""
    compiled = compile_graph(parse_graph(text))
    q, k, v = (torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    (got,) = compiled.executable(q.mT.contiguous().mT, k, v)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v))
    assert compiled.coverage.library == 0


def test_what_it_does_not_take_says_why():
    text = """def f(q: "f32[1,2,8,16]", m: "f32[1,1,8,16]"):
        a = aten.scaled_dot_product_attention.default(q, m, m)
        return (a,)
"""
    ((_, why),) = compile_graph(parse_graph(text)).coverage.reasons
    assert why == "torch's attention: heads that do not share keys in equal groups"
